"""The same network rewritten for a runtime that fuses nothing: LiteRT's XNNPACK delegate.

There every operation is a pass over memory, so the graph has as few as the arithmetic allows. What
is rewritten, exactly up to rounding:

* batch 1, token streams of rank 2 (T, D): a dense layer is one FULLY_CONNECTED;
* every writer to the patch stream is centred (its mean over the width is subtracted from its
  weights), so that a LayerNorm needs no mean: x * rsqrt(mean(x * x) + epsilon); TNT's words keep
  their means, because the fold's norm reads the words of a patch together;
* a norm's scale and shift are folded into the dense layer that reads it;
* the attention scale is folded into the queries, layer scale into the layer before it;
* the last block computes only the rows that the head reads;
* prefix tokens and positions are one constant; the pooling query is a constant.

T tokens, N patches, D width; M words per patch, c inner width, h heads.
"""

import re

import numpy as np
from keras import ops


def lean(model):
    """A `ViT`, `DeiT` or `TNT` as a TensorFlow function of one image.

    Args:
        model: built by those functions, float32, under any backend; its numbers are copied.

    Returns:
        Function: float32 tensor (1, H, W, C) -> the model's output of batch 1.

    Raises:
        ValueError: if the model has other layers than those functions give it.
    """
    check(model)
    layers = {layer.name: layer for layer in model.layers}
    blocks = [layers[name] for name in sorted(layers) if name.startswith("block")]
    stem = tnt_stem(layers) if "pixels" in layers else vit_stem(layers)
    run = tnt_blocks if "pixels" in layers else vit_blocks
    rows = rows_read(layers)
    body = run(blocks, layers["encoder"], rows)
    head = top(layers, model)

    def function(images):
        return head(body(*stem(images)))

    return function


def check(model):
    """Refuse a model that `lean` cannot read.

    Raises:
        ValueError: if its layers are not those that `ViT`, `DeiT` and `TNT` make.
    """
    known = r"images|patches|pixels|encoder|block\d+|norm|fc_norm|pool(_distillation)?|pre_logits"
    known += r"|head(_distillation)?|average|predictions"
    names = [layer.name for layer in model.layers]
    foreign = [name for name in names if not re.fullmatch(known, name)]
    missing = {"encoder", "block00"} - set(names)
    if foreign or missing or len(model.outputs) != 1:
        raise ValueError(
            f"Only a whole ViT, DeiT or TNT of this package has a lean graph; {model.name!r} has "
            f'the layers {", ".join((foreign or names)[:4])}: pass graph="plain".'
        )


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
    """A dense layer that reads a norm, with the norm's scale and shift folded in."""
    shift = number(norm.beta) @ kernel
    return number(norm.gamma)[:, None] * kernel, shift if bias is None else bias + shift


def dense(kernel, bias=None):
    """FULLY_CONNECTED of fixed numbers: (T, in) -> (T, out)."""
    kernel, bias = constant(kernel), None if bias is None else constant(bias)

    def call(x):
        import tensorflow as tf

        y = tf.linalg.matmul(x, kernel)
        return y if bias is None else y + bias

    return call


def central(x):
    """Rows without their mean."""
    import tensorflow as tf

    return x - tf.reduce_mean(x, -1, keepdims=True)


def normed(x, epsilon):
    """A norm without scale and shift of rows that are centred already."""
    import tensorflow as tf

    return x * tf.math.rsqrt(tf.reduce_mean(tf.square(x), -1, keepdims=True) + epsilon)


def gelu(mlp):
    approximate = mlp.gelu == "tanh"

    def call(x):
        import tensorflow as tf

        return tf.nn.gelu(x, approximate)

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


def vit_stem(layers):
    """Images -> (token stream (T, D),)."""
    encoder, side = layers["encoder"], layers["patches"].patch_size
    kernel, bias = centred(*dense_numbers(encoder.projection))
    width = kernel.shape[1]
    filters = constant(kernel.reshape(side, side, -1, width))
    added = table(encoder, width)
    prefix = encoder.num_prefix_tokens
    added[prefix:] += bias
    added = constant(added)

    def stem(images):
        import tensorflow as tf

        x = tf.nn.conv2d(images, filters, side, "VALID")  # (1, rows, columns, D)
        x = tf.reshape(x, (-1, width))
        return (tf.pad(x, ((prefix, 0), (0, 0))) + added,)

    return stem


def attention(layer, norm, epsilon, scale=None, shape=None):
    """Attention of normed rows: function of (x (T, D), rows) -> (rows, D), a centred writer.

    `shape` is (N, M) for the words of TNT, which attend within their patch; x is then (N * M, c).
    """
    heads = layer.num_heads
    kernel, bias = after_norm(norm, *dense_numbers(layer.qkv))
    width = kernel.shape[1] // 3
    size = width // heads
    parts = [[*np.split(kernel, 3, axis=1)], [*np.split(bias, 3)]]
    query = dense(parts[0][0] * size**-0.5, parts[1][0] * size**-0.5)
    # A key's bias adds the same to all scores of a query, which softmax cancels.
    key = dense(parts[0][1])
    kernel, bias = dense_numbers(layer.proj)
    # A value's bias passes the attention unchanged, because its scores sum to one.
    bias = bias + parts[1][2] @ kernel
    value = dense(parts[0][2])
    scale = 1.0 if scale is None else number(scale.gamma)
    kernel, bias = kernel * scale, bias * scale
    proj = dense(*centred(kernel, bias)) if shape is None else dense(kernel, bias)
    batch = () if shape is None else (shape[0],)
    order = (1, 0, 2) if shape is None else (0, 2, 1, 3)
    turned = (1, 2, 0) if shape is None else (0, 2, 3, 1)

    def call(x, rows=None):
        import tensorflow as tf

        def split(y):
            return tf.reshape(y, (*batch, -1 if shape is None else shape[1], heads, size))

        x = normed(x if shape is None else central(x), epsilon)
        q = tf.transpose(split(query(x if rows is None else x[:rows])), order)
        k = tf.transpose(split(key(x)), order)
        v = tf.transpose(split(value(x)), turned)
        scores = tf.nn.softmax(tf.linalg.matmul(q, k, transpose_b=True))
        y = tf.linalg.matmul(scores, v, transpose_b=True)
        return proj(tf.reshape(tf.transpose(y, order), (-1, width)))

    return call


def mlp(layer, norm, epsilon, scale=None, shape=None):
    """The MLP of normed rows (T, D) -> (T, D), a centred writer (`shape` as in `attention`)."""
    first = dense(*after_norm(norm, *dense_numbers(layer.fc1)))
    kernel, bias = dense_numbers(layer.fc2)
    scale = 1.0 if scale is None else number(scale.gamma)
    kernel, bias = kernel * scale, bias * scale
    second = dense(*centred(kernel, bias)) if shape is None else dense(kernel, bias)
    activate = gelu(layer)

    def call(x):
        x = normed(x if shape is None else central(x), epsilon)
        return second(activate(first(x)))

    return call


def transformer_block(block, shape=None):
    """A `TransformerBlock` on a centred stream, or on words; with `rows`, only the first ones."""
    scaled = block.layer_scale is not None
    attend = attention(
        block.attention,
        block.norm1,
        block.norm1.epsilon,
        block.scale1 if scaled else None,
        shape,
    )
    feed = mlp(block.mlp, block.norm2, block.norm2.epsilon, block.scale2 if scaled else None, shape)

    def call(x, rows=None):
        x = (x if rows is None else x[:rows]) + attend(x, rows)
        return x + feed(x)

    return call


def vit_blocks(blocks, encoder, rows):
    run = [transformer_block(block) for block in blocks]

    def body(x):
        for block in run[:-1]:
            x = block(x)
        return run[-1](x, rows)

    return body


def tnt_stem(layers):
    """Images -> (words (N * M, c), token stream (T, D))."""
    pixels, encoder, fold = layers["pixels"], layers["encoder"], layers["patches"]
    rows, columns = encoder.grid
    side, m, width = pixels.patch_size, pixels.word_side, pixels.inner_dim
    bias = number(pixels.projection.bias)
    if pixels.positions:
        bias = bias + number(pixels.position_embedding)  # (M, c)
    filters, stride = constant(number(pixels.projection.kernel)), pixels.projection.strides[0]
    added = constant(np.broadcast_to(bias, (m * m, width)).reshape(1, -1))
    to_patch = folding(fold)
    dim = fold.dim
    start = constant(table(encoder, dim))
    prefix = encoder.num_prefix_tokens

    def stem(images):
        import tensorflow as tf

        def cut(x, size):  # (1, rows * size, columns * size, k) -> (N, size, size, k)
            k = x.shape[-1]
            x = tf.reshape(x, (rows, size, columns, size * k))
            return tf.reshape(tf.transpose(x, (0, 2, 1, 3)), (rows * columns, size, size, k))

        border = ((0, 0), (3, 3), (3, 3), (0, 0))
        if pixels.layout == "official":
            x = tf.nn.conv2d(tf.pad(cut(images, side), border), filters, stride, "VALID")
        else:
            x = cut(tf.nn.conv2d(tf.pad(images, border), filters, stride, "VALID"), m)
        x = tf.reshape(x, (rows * columns, m * m * width)) + added
        tokens = tf.pad(to_patch(x), ((prefix, 0), (0, 0))) + start
        return tf.reshape(x, (-1, width)), tokens

    return stem


def folding(fold):
    """`WordsToPatch` of words (N, M * c) -> (N, D), a centred writer."""
    kernel, bias = dense_numbers(fold.proj)
    count = len(kernel) // len(number(fold.norm1.gamma))  # legacy norms each word apart
    gamma, beta = (np.tile(number(x), count) for x in (fold.norm1.gamma, fold.norm1.beta))
    kernel, bias = gamma[:, None] * kernel, beta @ kernel + (0 if bias is None else bias)
    legacy = fold.layout == "legacy"
    proj = dense(*centred(kernel, bias))
    epsilon = fold.norm1.epsilon
    if not legacy:
        scale, shift = constant(number(fold.norm2.gamma)), number(fold.norm2.beta)
        shift = constant(shift - shift.mean())

    def call(x):
        import tensorflow as tf

        if legacy:
            words = normed(central(tf.reshape(x, (-1, x.shape[1] // count))), epsilon)
            return proj(tf.reshape(words, x.shape))
        y = normed(proj(normed(central(x), epsilon)), fold.norm2.epsilon)
        return central(y * scale) + shift

    return call


def tnt_blocks(blocks, encoder, rows):
    patches, prefix = encoder.num_patches, encoder.num_prefix_tokens
    run = []
    for block in blocks:
        words = block.fold.proj.kernel.shape[0] // block.inner.mlp.fc2.kernel.shape[1]
        inner = transformer_block(block.inner, (patches, words))
        run.append((inner, folding(block.fold), transformer_block(block.outer)))

    def body(pixels, x):
        import tensorflow as tf

        for i, (inner, fold, outer) in enumerate(run):
            pixels = inner(pixels)
            folded = fold(tf.reshape(pixels, (patches, -1)))
            x = x + tf.pad(folded, ((prefix, 0), (0, 0)))
            x = outer(x, rows if i == len(run) - 1 else None)
        return x

    return body


def rows_read(layers):
    """How many leading tokens the head reads; None for all."""
    pools = [layer for name, layer in layers.items() if name.startswith("pool")]
    if not pools or any(getattr(layer, "pooling", "map") != "token" for layer in pools):
        return None
    return max(layer.index for layer in pools) + 1


def top(layers, model):
    """The last block's rows -> the model's output."""
    norm = layers.get("fc_norm") or layers["norm"]
    gamma, beta = number(norm.gamma), number(norm.beta)
    pools = [layers[name] for name in ("pool", "pool_distillation") if name in layers]
    heads = [layers[name] for name in ("head", "head_distillation") if name in layers]
    pre_logits = dense(*dense_numbers(layers["pre_logits"])) if "pre_logits" in layers else None
    activation = layers["predictions"].activation.__name__ if "predictions" in layers else None
    outputs = [dense(*dense_numbers(head)) for head in heads]
    map_head = attention_pooling(pools[0]) if pools and not hasattr(pools[0], "pooling") else None

    def call(x):
        import tensorflow as tf

        if "fc_norm" not in layers:
            x = normed(x, norm.epsilon) * constant(gamma) + constant(beta)
        if not pools:
            return x[None]
        if map_head:
            vectors = [map_head(x)]
        else:
            vectors = [
                x[pool.index : pool.index + 1]
                if pool.pooling == "token"
                else tf.reduce_mean(x[pool.num_prefix_tokens :], 0, keepdims=True)
                for pool in pools
            ]
        if "fc_norm" in layers:
            vectors = [normed(v, norm.epsilon) * constant(gamma) + constant(beta) for v in vectors]
        if pre_logits:
            vectors = [tf.math.tanh(pre_logits(vector)) for vector in vectors]
        if outputs:
            vectors = [output(vector) for output, vector in zip(outputs, vectors)]
        y = vectors[0] if len(vectors) == 1 else (vectors[0] + vectors[1]) * 0.5
        return getattr(tf.nn, activation)(y) if activation else y

    return call


def attention_pooling(pool):
    """`AttentionPooling` of normed tokens (T, D) -> (1, D); its query is a constant."""
    heads, prefix = pool.num_heads, pool.num_prefix_tokens
    kernel, bias = dense_numbers(pool.query)
    width = len(kernel)
    size = width // heads
    query = (number(pool.query_token) @ kernel + bias) * size**-0.5
    query = constant(query.reshape(1, heads, size).transpose(1, 0, 2))  # (h, 1, d)
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

        def split(y):
            return tf.transpose(tf.reshape(y, (-1, heads, size)), (1, 0, 2))

        x = x[prefix:]
        scores = tf.nn.softmax(tf.linalg.matmul(query, split(key(x)), transpose_b=True))
        y = tf.linalg.matmul(scores, split(value(x)))  # (h, 1, d)
        pooled = proj(tf.reshape(y, (1, width)))
        return pooled + second(activate(first(normed(central(pooled), pool.norm.epsilon))))

    return call
