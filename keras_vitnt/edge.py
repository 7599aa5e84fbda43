"""The same network rewritten for a runtime that fuses nothing: LiteRT's XNNPACK delegate.

There every operation is a pass over memory, so the graph has as few as the arithmetic allows. What
is rewritten, exactly up to rounding:

* token streams of rank 2 (B * T, D), words of rank 3 (B * N, M, c), which all readers take as they
  are: a dense layer is one FULLY_CONNECTED, and nothing is copied to change its shape;
* pixels are brought into squares by transposing: a convolution would read pixel by pixel, which is
  slowest with three channels;
* every writer to the patch stream is centred (its mean over the width is subtracted from its
  weights), so that a LayerNorm needs no mean: x * rsqrt(mean(x * x) + epsilon); TNT's words keep
  their means, because the fold's norm reads the words of a patch together;
* a norm's scale and shift are folded into the dense layer that reads it, and the columns of that
  are centred, which takes off the mean of what it reads;
* the attention scale is folded into the queries, layer scale into the layer before it;
* in float32 a wide product is a batch of narrower ones, panels of its columns: a core keeps the
  weights of one in its cache, and heads come apart and together without being copied;
* the last block computes only the rows that the head reads, and no keys and values: q K' =
  (q Wk') x';
* words' attention is exponentials by their sums, where the weights prove that none overflows, not
  even in float16;
* prefix tokens and positions are one constant; the pooling query is a constant;
* uint8 pixels are normalised by the weights of the patch projection.

B images, T tokens, N patches, D width; M words per patch, c inner width, h heads, d of each.
"""

import re

import keras
import numpy as np
from keras import ops

from .tnt import PixelEmbedding, TNTBlock, WordsToPatch
from .vit import AttentionPooling, PatchEncoder, Patches, TokenPooling, TransformerBlock


def lean(model, batch_size=1, mean_std=None, panels=False):
    """A `ViT`, `DeiT` or `TNT` as a TensorFlow function.

    Args:
        model: built by those functions, float32, under any backend; its numbers are copied.
        batch_size: B.
        mean_std: None if the function gets what the model gets; (mean, std) per channel, of pixels
            in 0..1, if it gets uint8 pixels and shall normalise them itself.
        panels: whether wide products are batches of narrower ones, which is faster in float32 and
            slower in int8.

    Returns:
        Function: float32 or uint8 tensor (B, H, W, C) -> the model's output. Its operations are
        named by the parts of the network, see `PARTS`.

    Raises:
        ValueError: if the model has other layers than those functions give it.
    """
    check(model)
    layers = {layer.name: layer for layer in model.layers}
    blocks = [layer for layer in model.layers if layer.name.startswith("block")]
    stem = (tnt_stem if "pixels" in layers else vit_stem)(layers, batch_size, mean_std)
    run = tnt_blocks if "pixels" in layers else vit_blocks
    body = run(blocks, layers["encoder"], rows_read(layers), batch_size, panels)
    head = top(layers, batch_size)

    def function(images):
        import tensorflow as tf

        with tf.name_scope("stem"):
            x = stem(tf.cast(images, tf.float32))
        x = body(*x)
        with tf.name_scope("head"):
            return head(x)

    return function


# The parts of the network whose operations carry their name, as a pattern.
PARTS = r"stem|block\d+/(?:attention|mlp|inner|fold)|head"
# A panel of an MLP has at least so many columns; kernels of fewer weights than `CACHED` stay whole,
# because a core's cache holds them anyway.
PANEL, CACHED = 192, 1 << 17
# A head is a panel if it fills whole kernels: XNNPACK's widest for float32 has so many columns.
LANES = 32
# Logarithm of what a sum of exponentials may reach: delegates for GPUs compute in float16.
LARGEST = np.log(6e4)


def check(model):
    """Refuse a model that `lean` cannot read.

    Raises:
        ValueError: if its layers are not those that `ViT`, `DeiT` and `TNT` make.
    """
    kinds = {
        "images": keras.layers.InputLayer,
        "patches": Patches | WordsToPatch,
        "pixels": PixelEmbedding,
        "encoder": PatchEncoder,
        r"block\d+": TransformerBlock | TNTBlock,
        "(fc_)?norm": keras.layers.LayerNormalization,
        "pool(_distillation)?": TokenPooling | AttentionPooling,
        "pre_logits|head(_distillation)?": keras.layers.Dense,
        "average": keras.layers.Average,
        "predictions": keras.layers.Activation,
    }
    layers = {layer.name: layer for layer in model.layers}
    foreign = [
        name
        for name, layer in layers.items()
        if not any(re.fullmatch(p, name) and isinstance(layer, k) for p, k in kinds.items())
    ]
    whole = {"encoder", "block00"} <= set(layers) and {"norm", "fc_norm"} & set(layers)
    of_vectors = {"fc_norm", "pre_logits", "head"} & set(layers)
    if foreign or not whole or (of_vectors and "pool" not in layers):
        raise ValueError(
            f"Only a whole ViT, DeiT or TNT of this package has a lean graph; {model.name!r} has "
            f'the layers {", ".join((foreign or list(layers))[:4])}: pass graph="plain".'
        )
    if "fc_norm" in layers and isinstance(layers["pool"], AttentionPooling):
        raise ValueError(
            'fc_norm with pooling="map" reads tokens with their means, which the lean graph drops: '
            'pass graph="plain".'
        )
    for name, layer in layers.items():
        usual = "tanh" if name == "pre_logits" else "linear"
        if isinstance(layer, keras.layers.Dense) and layer.activation.__name__ != usual:
            raise ValueError(
                f"The lean graph has {usual} in {name}; {model.name!r} has "
                f'{layer.activation.__name__}: pass graph="plain".'
            )
    activation = activation_of(layers)
    if activation not in (None, "softmax", "sigmoid"):
        raise ValueError(
            f"The lean graph ends in logits, softmax or sigmoid; {model.name!r} ends in "
            f'{activation}: pass graph="plain".'
        )


def activation_of(layers):
    """The name of the activation behind the head; None for logits."""
    name = layers["predictions"].activation.__name__ if "predictions" in layers else "linear"
    return None if name == "linear" else name


def number(x):
    """A variable or tensor in float64: folding must not add rounding of its own."""
    return np.asarray(ops.convert_to_numpy(x), "float64")


def constant(x):
    return np.asarray(x, "float32")


def centred(kernel, bias=None):
    """A dense layer's numbers for outputs whose mean over the width is zero."""
    kernel = kernel - kernel.mean(axis=-1, keepdims=True)
    return kernel, None if bias is None else bias - bias.mean()


def dense_numbers(layer):
    return number(layer.kernel), None if layer.bias is None else number(layer.bias)


def after_norm(norm, kernel, bias):
    """A dense layer that reads a norm: its scale, shift and subtraction of the mean folded in."""
    count = len(kernel) // norm.gamma.shape[0]  # of normed vectors that the layer reads at once
    gamma, beta = np.tile(number(norm.gamma), count), np.tile(number(norm.beta), count)
    shift = beta @ kernel
    vectors = (gamma[:, None] * kernel).reshape(count, -1, kernel.shape[1])
    vectors = vectors - vectors.mean(axis=1, keepdims=True)
    return vectors.reshape(kernel.shape), shift if bias is None else bias + shift


def dense(kernel, bias=None):
    """FULLY_CONNECTED of fixed numbers: (..., in) -> (..., out)."""
    kernel, bias = constant(kernel), None if bias is None else constant(bias)

    def call(x):
        import tensorflow as tf

        y = tf.linalg.matmul(x, kernel)
        return y if bias is None else y + bias

    return call


def to_panels(kernel, bias, count):
    """A dense layer whose output is in panels: (T, in) -> (count, T, out / count)."""
    kernel = constant(np.stack(np.split(kernel, count, axis=1)))
    bias = None if bias is None else constant(bias.reshape(count, 1, -1))

    def call(x):
        import tensorflow as tf

        y = tf.linalg.matmul(tf.reshape(x, (1, *x.shape)), kernel)  # x[None] would be a copy
        return y if bias is None else y + bias

    return call


def from_panels(kernel, bias, count):
    """A dense layer whose input is in panels: (count, T, in / count) -> (T, out)."""
    kernel, bias = constant(np.stack(np.split(kernel, count))), constant(bias)

    def call(x):
        import tensorflow as tf

        return tf.reduce_sum(tf.linalg.matmul(x, kernel), 0) + bias

    return call


def central(x, axes=-1):
    """Rows without their mean."""
    import tensorflow as tf

    return x - tf.reduce_mean(x, axes, keepdims=True)


def normed(x, norm):
    """A norm without scale and shift, of rows that are centred already."""
    import tensorflow as tf

    return x * tf.math.rsqrt(tf.reduce_mean(tf.square(x), -1, keepdims=True) + norm.epsilon)


def normed_words(x, norm):
    """As `normed`, of rows with a mean, which the weights of the reader take off."""
    import tensorflow as tf

    mean = tf.reduce_mean(x, -1, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(x, mean), -1, keepdims=True)
    return x * tf.math.rsqrt(variance + norm.epsilon)


def scaled(query, size):
    """The attention scale, in the numbers of the query."""
    return [part * size**-0.5 for part in query]


def scores(q, k):
    """Scaled queries and keys (..., T, d) -> attention scores (..., T, T)."""
    import tensorflow as tf

    return tf.nn.softmax(tf.linalg.matmul(q, k, transpose_b=True))


def largest_score(query, bias, key, heads):
    """What no score exceeds, from the numbers of scaled queries and keys of normed rows.

    A row n without its mean has |n|**2 <= c; its score is n A n' + b n', with A = Wq Wk' and
    b = bq Wk' of each head.
    """
    query, key = (np.stack(np.split(part, heads, axis=1)) for part in (query, key))  # (h, c, d)
    turned = key.transpose(0, 2, 1)
    products = np.linalg.norm(query @ turned, 2, axis=(1, 2))
    shifts = np.linalg.norm(bias.reshape(heads, 1, -1) @ turned, axis=(1, 2))
    width = query.shape[1]
    return (width * products + width**0.5 * shifts).max()


def mixed(s, v):
    """Scores (..., h, T, T) and turned values (..., h, d, T) -> (..., T, h, d)."""
    import tensorflow as tf

    y = tf.linalg.matmul(s, v, transpose_b=True)  # XNNPACK packs a transposed right side fast
    return tf.transpose(y, (1, 0, 2) if len(y.shape) == 3 else (0, 2, 1, 3))


def words_by_softmax(q, k, v):
    """Attention of queries (..., M, d) with turned keys and values (..., d, M) -> (..., d, M)."""
    import tensorflow as tf

    s = tf.nn.softmax(tf.linalg.matmul(q, k))
    return tf.linalg.matmul(v, s, transpose_b=True)  # not s v, whose d columns fill no kernel


def words_by_exponentials(k, q, v):
    """The same of keys (..., M, d), turned queries and values; softmax is slow on short rows."""
    import tensorflow as tf

    e = tf.exp(tf.linalg.matmul(k, q))  # a column for each query: the next product takes it as is
    return tf.linalg.matmul(v, e / tf.reduce_sum(e, -2, keepdims=True))


def few_queries(rows):
    """Whether only some rows attend; then the weights of keys and values are taken to them."""
    return rows is not None


def gelu(mlp):
    exact = mlp.gelu == "erf"

    def call(x):
        import tensorflow as tf

        if not exact:
            return tf.nn.gelu(x, approximate=True)
        # This form both LiteRT's converter and ONNX Runtime make one operation of.
        return 0.5 * x * (1.0 + tf.math.erf(x * 0.70710677))

    return call


def table(encoder, dim):
    """What the encoder adds: (prefix + N, D), prefix tokens with their positions first."""
    prefix = [number(token) for token in encoder.prefix_tokens()]
    patches = number(encoder.patch_positions(dim))
    if prefix and encoder.prefix_positions:
        positions = number(encoder.position_embedding)[: encoder.num_prefix_tokens]
        prefix = [np.concatenate(prefix) + positions]
    found = np.concatenate([*prefix, patches])
    return found - found.mean(axis=1, keepdims=True)


def with_prefix(x, prefix, batch_size, added=None):
    """(B * N, D) -> (B * T, D): rows of zeros before those of each image; plus `added` (T, D)."""
    import tensorflow as tf

    width = x.shape[-1]
    if batch_size > 1 or not prefix:  # or the converter merges a bias with what is added
        x = tf.reshape(x, (batch_size, -1, width))
    x = tf.pad(x, ((0, 0),) * (len(x.shape) - 2) + ((prefix, 0), (0, 0)))
    return tf.reshape(x if added is None else x + added, (-1, width))


def leading(x, rows, batch_size):
    """(B * T, D) -> (B * rows, D): the first rows of each image; all if `rows` is None."""
    import tensorflow as tf

    if rows is None:
        return x
    if batch_size == 1:
        return x[:rows]
    return tf.reshape(tf.reshape(x, (batch_size, -1, x.shape[-1]))[:, :rows], (-1, x.shape[-1]))


def normalization(mean_std, channels):
    """(mean, factor) of float64 (C,) that make uint8 pixels a model's input; (0, 1) for None."""
    mean, std = (0.0, 1 / 255) if mean_std is None else mean_std
    ones = np.ones(channels)
    return 255 * np.asarray(mean) * ones, ones / (255 * np.asarray(std))


def squares(x, side):
    """(B, H, W, k) -> (B * H / side, W / side, side, side * k): the squares of each row of them."""
    import tensorflow as tf

    x = tf.reshape(x, (-1, side, x.shape[2] // side, side * x.shape[3]))
    return tf.transpose(x, (0, 2, 1, 3))


def convolution(kernel, bias, stride, margin=0):
    """A convolution (B, H, W, C) -> (B, H / stride, W / stride, c) with a border of zeros.

    It reads squares of `stride` x `stride` pixels; where the kernel is one of them, it is a dense
    layer of them.

    Args:
        kernel: (size, size, C, c).
        bias: (c,) or None.
        margin: width of the border above and left; below and right it is as wide as needed.
    """
    size, _, channels, width = kernel.shape
    before, after = -(-margin // stride), (size - 1 - margin) // stride
    taps = before + 1 + after
    first = before * stride - margin  # pixel of the first square that the kernel reads
    edges = (first, taps * stride - first - size)
    kernel = np.pad(kernel, (edges, edges, (0, 0), (0, 0)))
    kernel = kernel.reshape(taps, stride, taps, stride, channels, width)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(taps, taps, -1, width)
    border = ((0, 0), (before, after), (before, after), (0, 0))
    inputs = kernel.shape[2]
    filters, of_square = constant(kernel), dense(kernel[0, 0], bias)

    def call(x):
        import tensorflow as tf

        shape = (-1, x.shape[1] // stride, x.shape[2] // stride)
        x = squares(x, stride)
        if taps == 1:
            return tf.reshape(of_square(tf.reshape(x, (-1, inputs))), (*shape, width))
        y = tf.nn.conv2d(tf.pad(tf.reshape(x, (*shape, inputs)), border), filters, 1, "VALID")
        return y if bias is None else y + constant(bias)

    return call


def vit_stem(layers, batch_size, mean_std):
    """Images -> (token stream (B * T, D),)."""
    encoder, side = layers["encoder"], layers["patches"].patch_size
    kernel, bias = centred(*dense_numbers(encoder.projection))
    width = kernel.shape[1]
    kernel = kernel.reshape(side, side, -1, width)
    mean, factor = normalization(mean_std, kernel.shape[2])
    kernel = factor[:, None] * kernel
    project = convolution(kernel, bias - np.einsum("hwcd,c->d", kernel, mean), side)
    prefix = encoder.num_prefix_tokens
    added = constant(table(encoder, width))

    def stem(images):
        import tensorflow as tf

        x = tf.reshape(project(images), (-1, width))
        return (with_prefix(x, prefix, batch_size, added),)

    return stem


def attention_numbers(layer, norm, scale, words):
    """(kernel, bias) of scaled queries, the kernels of keys and values, (kernel, bias) behind them.

    A key's bias adds the same to all scores of a query, which softmax cancels. A value's bias
    passes the attention unchanged, because its scores sum to one.
    """
    kernel, bias = after_norm(norm, *dense_numbers(layer.qkv))
    (query, key, value), biases = np.split(kernel, 3, axis=1), np.split(bias, 3)
    query = scaled((query, biases[0]), len(biases[0]) // layer.num_heads)
    kernel, bias = dense_numbers(layer.proj)
    return query, key, value, writer(kernel, bias + biases[2] @ kernel, scale, words)


def attention(layer, norm, scale, groups, words):
    """Attention within groups: function of a stream (B * T, D) or words (B * N, M, c), alike out.

    The groups are images, or, with `words`, the patches that the words are of. Only the output for
    patches is centred. Given `rows`, the function computes that many leading rows of each group.
    """
    heads = layer.num_heads
    query_numbers, key_kernel, value_kernel, after = attention_numbers(layer, norm, scale, words)
    width = key_kernel.shape[1]
    size = width // heads
    query, value, proj = dense(*query_numbers), dense(value_kernel), dense(*after)
    key, key_turned = dense(key_kernel), dense(key_kernel.T)
    own = constant(np.repeat(np.eye(heads), size, axis=1))  # (h, width): each head's columns
    group = () if groups == 1 else (groups,)
    order, turned = ((1, 0, 2), (1, 2, 0)) if groups == 1 else ((0, 2, 1, 3), (0, 2, 3, 1))
    back = (2, 0, 1) if groups == 1 else (0, 3, 1, 2)
    largest = largest_score(*query_numbers, key_kernel, heads) if words else None

    def call(x, rows=None):
        import tensorflow as tf

        def split(y, order):
            return tf.transpose(tf.reshape(y, (*group, -1, heads, size)), order)

        x = normed_words(x, norm) if words else normed(x, norm)
        q = query(leading(x, rows, groups))
        if few_queries(rows):
            return proj(attend_with_weights(q, x, rows))
        shape, k, v = q.shape, key(x), split(value(x), turned)
        if not words:
            y = mixed(scores(split(q, order), split(k, order)), v)
        elif largest + np.log(shape[-2]) <= LARGEST:
            y = tf.transpose(words_by_exponentials(split(k, order), split(q, turned), v), back)
        else:
            y = tf.transpose(words_by_softmax(split(q, order), split(k, turned), v), back)
        return proj(tf.reshape(y, shape))

    def attend_with_weights(q, x, rows):
        """Each head's query takes the keys' weights to the tokens, and the values' weights back."""
        import tensorflow as tf

        q = tf.reshape(q, (-1, 1, width)) * own
        q = key_turned(tf.reshape(q, (-1, width)))
        tokens = tf.reshape(x, (groups, -1, x.shape[-1]))
        s = scores(tf.reshape(q, (groups, rows * heads, -1)), tokens)
        y = value(tf.reshape(tf.linalg.matmul(s, tokens), (-1, x.shape[-1])))
        return tf.reduce_sum(tf.reshape(y, (-1, heads, width)) * own, 1)

    return call


def attention_in_panels(layer, norm, scale, images):
    """As `attention` of a stream (B * T, D), with a panel for each head."""
    heads = layer.num_heads
    query, key, value, after = attention_numbers(layer, norm, scale, words=False)
    query, proj = to_panels(*query, heads), from_panels(*after, heads)
    key, value = to_panels(key, None, heads), to_panels(value, None, heads)
    of_few = attention(layer, norm, scale, images, words=False)

    def call(x, rows=None):
        import tensorflow as tf

        if few_queries(rows):
            return of_few(x, rows)

        def split(y):  # (h, B * T, d) -> (h * B, T, d)
            return y if images == 1 else tf.reshape(y, (heads * images, -1, y.shape[-1]))

        x = normed(x, norm)
        q = query(leading(x, rows, images))
        y = tf.linalg.matmul(scores(split(q), split(key(x))), split(value(x)))
        return proj(tf.reshape(y, q.shape))

    return call


def writer(kernel, bias, scale, words):
    """A dense layer's numbers, whose output is added to a stream; that of patches stays centred."""
    if scale is not None:
        kernel, bias = kernel * number(scale.gamma), bias * number(scale.gamma)
    return (kernel, bias) if words else centred(kernel, bias)


def mlp(layer, norm, scale, words):
    """The MLP of rows (..., D) -> (..., D); see `attention`."""
    first = dense(*after_norm(norm, *dense_numbers(layer.fc1)))
    second = dense(*writer(*dense_numbers(layer.fc2), scale, words))
    activate = gelu(layer)

    def call(x):
        return second(activate(first(normed_words(x, norm) if words else normed(x, norm))))

    return call


def mlp_in_panels(layer, norm, scale):
    """As `mlp` of a stream (T, D), with panels of the hidden layer."""
    count = panel_count(layer)
    first = to_panels(*after_norm(norm, *dense_numbers(layer.fc1)), count)
    second = from_panels(*writer(*dense_numbers(layer.fc2), scale, words=False), count)
    activate = gelu(layer)

    def call(x):
        return second(activate(first(normed(x, norm))))

    return call


def panel_count(layer):
    """How many panels the hidden layer of an `MLP` has; 1: it stays whole."""
    width = layer.fc1.units
    if width * layer.fc2.units < CACHED:
        return 1
    return next((n for n in range(width // PANEL, 1, -1) if width % n == 0), 1)


def heads_are_panels(layer):
    """Whether each head of an `Attention` has panels of its own."""
    return layer.qkv.units // 3 // layer.num_heads % LANES == 0


def has_panels(model):
    """Whether `panels` changes a model's lean graph."""
    blocks = [layer for layer in model.layers if layer.name.startswith("block")]
    blocks = [getattr(block, "outer", block) for block in blocks]
    return any(heads_are_panels(block.attention) or panel_count(block.mlp) > 1 for block in blocks)


def transformer_block(block, groups, words=False, panels=False):
    """A `TransformerBlock` on the centred stream of patches, or on words."""
    scale1, scale2 = (None, None) if block.layer_scale is None else (block.scale1, block.scale2)
    if panels and heads_are_panels(block.attention):
        attend = attention_in_panels(block.attention, block.norm1, scale1, groups)
    else:
        attend = attention(block.attention, block.norm1, scale1, groups, words)
    if panels and panel_count(block.mlp) > 1:
        feed = mlp_in_panels(block.mlp, block.norm2, scale2)
    else:
        feed = mlp(block.mlp, block.norm2, scale2, words)

    def call(x, rows=None):
        import tensorflow as tf

        with tf.name_scope("attention"):
            x = leading(x, rows, groups) + attend(x, rows)
        with tf.name_scope("mlp"):
            return x + feed(x)

    return call


def vit_blocks(blocks, encoder, rows, batch_size, panels):
    run = [transformer_block(block, batch_size, panels=panels) for block in blocks]

    def body(x):
        import tensorflow as tf

        for i, block in enumerate(run):
            with tf.name_scope(f"block{i:02d}"):
                x = block(x, rows if i == len(run) - 1 else None)
        return x

    return body


def tnt_stem(layers, batch_size, mean_std):
    """Images -> (words (B * N, M, c), token stream (B * T, D))."""
    pixels, encoder, fold = layers["pixels"], layers["encoder"], layers["patches"]
    m, width = pixels.word_side, pixels.inner_dim
    bias = number(pixels.projection.bias)
    if pixels.positions:
        bias = bias + number(pixels.position_embedding)  # (M, c)
    kernel, stride = number(pixels.projection.kernel), pixels.projection.strides[0]
    mean, factor = normalization(mean_std, kernel.shape[2])
    project = convolution(factor[:, None] * kernel, None, stride, 3)
    bias = constant(np.broadcast_to(bias, (1, m * m, width)))
    to_patch = folding(fold)
    prefix = encoder.num_prefix_tokens
    added = constant(table(encoder, fold.dim))

    def stem(images):
        import tensorflow as tf

        def cut(x, side):  # into patches (B * N, side, side, k)
            return tf.reshape(squares(x, side), (-1, side, side, x.shape[3]))

        x = images - constant(mean) if mean.any() else images  # then zeros are mean pixels
        if pixels.layout == "official":
            x = cut(x, pixels.patch_size)
            rest = m * stride - pixels.patch_size
            x = tf.pad(x, ((0, 0), (0, rest), (0, rest), (0, 0))) if rest else x
        x = project(x)
        x = cut(x, m) if pixels.layout == "legacy" else x
        x = tf.reshape(x, (-1, m * m, width)) + bias
        return x, with_prefix(to_patch(x), prefix, batch_size, added)

    return stem


def folding(fold):
    """`WordsToPatch` of words (N, M, c) -> (N, D), a centred writer."""
    kernel, bias = after_norm(fold.norm1, *dense_numbers(fold.proj))
    proj = dense(*centred(kernel, bias))
    legacy = fold.layout == "legacy"  # which norms each word apart
    if not legacy:
        scale, shift = constant(number(fold.norm2.gamma)), number(fold.norm2.beta)
        shift = constant(shift - shift.mean())

    def call(x):
        import tensorflow as tf

        patches = (x.shape[0], -1)
        if legacy:
            return proj(tf.reshape(normed(central(x), fold.norm1), patches))
        x = tf.reshape(central(x, (1, 2)), patches)
        y = normed(proj(normed(x, fold.norm1)), fold.norm2)
        return central(y * scale) + shift

    return call


def tnt_blocks(blocks, encoder, rows, batch_size, panels):
    patches, prefix = batch_size * encoder.num_patches, encoder.num_prefix_tokens
    run = [
        (
            transformer_block(block.inner, patches, words=True),
            folding(block.fold),
            transformer_block(block.outer, batch_size, panels=panels),
        )
        for block in blocks
    ]

    def body(words, x):
        import tensorflow as tf

        for i, (inner, fold, outer) in enumerate(run):
            with tf.name_scope(f"block{i:02d}"):
                with tf.name_scope("inner"):
                    words = inner(words)
                with tf.name_scope("fold"):
                    x = x + with_prefix(fold(words), prefix, batch_size)
                x = outer(x, rows if i == len(run) - 1 else None)
        return x

    return body


def rows_read(layers):
    """How many leading tokens the head reads; None for all."""
    pools = [layer for name, layer in layers.items() if name.startswith("pool")]
    if {getattr(pool, "pooling", "map") for pool in pools} != {"token"}:
        return None
    return max(pool.index for pool in pools) + 1


def top(layers, batch_size):
    """The last block's rows (B * rows, D) -> the model's output."""
    norm = layers.get("fc_norm") or layers["norm"]
    gamma, beta = number(norm.gamma), number(norm.beta)
    pools = [layers[name] for name in ("pool", "pool_distillation") if name in layers]
    heads = [layers[name] for name in ("head", "head_distillation") if name in layers]
    pre_logits = dense(*dense_numbers(layers["pre_logits"])) if "pre_logits" in layers else None
    activation = activation_of(layers)
    outputs = [dense(*dense_numbers(head)) for head in heads]
    mapped = pools and isinstance(pools[0], AttentionPooling)
    map_head = attention_pooling(pools[0], batch_size) if mapped else None

    def call(x):
        import tensorflow as tf

        def affine(x):
            return normed(x, norm) * constant(gamma) + constant(beta)

        if "fc_norm" not in layers:
            x = affine(x)
        width = x.shape[-1]
        if not pools:
            return tf.reshape(x, (batch_size, -1, width))
        if map_head:
            vectors = [map_head(x)]
        elif pools[0].pooling == "avg":
            tokens = tf.reshape(x, (batch_size, -1, width))[:, pools[0].num_prefix_tokens :]
            vectors = [tf.reduce_mean(tokens, 1)]
        else:
            tokens = tf.reshape(x, (batch_size, -1, width))
            vectors = [
                tf.reshape(tokens[:, pool.index : pool.index + 1], (batch_size, width))
                for pool in pools
            ]
        if "fc_norm" in layers:
            vectors = [affine(vector) for vector in vectors]
        if pre_logits:
            vectors = [tf.math.tanh(pre_logits(vector)) for vector in vectors]
        if outputs:
            vectors = [output(vector) for output, vector in zip(outputs, vectors)]
        y = vectors[0] if len(vectors) == 1 else (vectors[0] + vectors[1]) * 0.5
        return getattr(tf.nn, activation)(y) if activation else y

    return call


def attention_pooling(pool, batch_size):
    """`AttentionPooling` of normed tokens (B * T, D) -> (B, D); its query is a constant."""
    heads, prefix = pool.num_heads, pool.num_prefix_tokens
    kernel, bias = dense_numbers(pool.query)
    width = len(kernel)
    size = width // heads
    query = (number(pool.query_token) @ kernel + bias) * size**-0.5
    query = constant(query.reshape(1, heads, 1, size))
    kernel, bias = dense_numbers(pool.key_value)
    key = dense(kernel[:, :width])
    value = dense(kernel[:, width:])
    out, out_bias = dense_numbers(pool.proj)
    proj = dense(out, out_bias + bias[width:] @ out)
    first = dense(*after_norm(pool.norm, *dense_numbers(pool.mlp.fc1)))
    second = dense(*dense_numbers(pool.mlp.fc2))
    activate = gelu(pool.mlp)

    def call(x):
        import tensorflow as tf

        def split(y, order):  # (B * T, D) -> (B, h, N, d) or (B, h, d, N)
            y = tf.reshape(y, (batch_size, -1, heads, size))[:, prefix:]
            return tf.transpose(y, order)

        s = tf.reduce_sum(split(key(x), (0, 2, 1, 3)) * query, -1)  # (B, h, N)
        s = tf.nn.softmax(s)[:, :, None]
        y = tf.linalg.matmul(s, split(value(x), (0, 2, 3, 1)), transpose_b=True)
        pooled = proj(tf.reshape(y, (batch_size, width)))
        return pooled + second(activate(first(normed(central(pooled), pool.norm))))

    return call
