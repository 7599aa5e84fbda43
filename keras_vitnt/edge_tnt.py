"""What the parts of `tnt` become in the lean graph; see `edge_vit`.

B images, N patches, M words per patch, c inner width; h heads, d columns of each.
"""

import numpy as np

from .edge_vit import (
    after_norm,
    attention_numbers,
    central,
    centred,
    constant,
    dense,
    dense_numbers,
    gelu,
    layer_scaled,
    layer_scales,
    normalization,
    normed,
    number,
    squares,
    table,
    transformer_block,
    with_prefix,
)

# Logarithm of what a sum of exponentials may reach: delegates for GPUs compute in float16.
LARGEST = np.log(6e4)
# Zeros above and left of what `PixelEmbedding` convolves.
MARGIN = 3


def normed_words(x, norm):
    """As `normed`, of rows with a mean, which the weights of the reader take off."""
    import tensorflow as tf

    mean = tf.reduce_mean(x, -1, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(x, mean), -1, keepdims=True)
    return x * tf.math.rsqrt(variance + norm.epsilon)


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


def words_attention(layer, norm, scale):
    """Attention within patches: function of words (B * N, M, c), which computes their update."""
    heads = layer.num_heads
    query_numbers, key_kernel, value_kernel, after = attention_numbers(layer, norm, scale)
    query, key, value = dense(*query_numbers), dense(key_kernel), dense(value_kernel)
    largest, proj = largest_score(*query_numbers, key_kernel, heads), dense(*after)

    def call(x):
        import tensorflow as tf

        def split(y, *order):
            return tf.transpose(tf.reshape(y, (y.shape[0], -1, heads, y.shape[-1] // heads)), order)

        x = normed_words(x, norm)
        q, k, v = query(x), key(x), split(value(x), 0, 2, 3, 1)
        if largest + np.log(x.shape[1]) <= LARGEST:
            y = words_by_exponentials(split(k, 0, 2, 1, 3), split(q, 0, 2, 3, 1), v)
        else:
            y = words_by_softmax(split(q, 0, 2, 1, 3), split(k, 0, 2, 3, 1), v)
        return proj(tf.reshape(tf.transpose(y, (0, 3, 1, 2)), q.shape))

    return call


def words_mlp(layer, norm, scale):
    """The MLP of words (B * N, M, c), of which it computes the update."""
    first = dense(*after_norm(norm, *dense_numbers(layer.fc1)))
    second = dense(*layer_scaled(*dense_numbers(layer.fc2), scale))
    activate = gelu(layer)
    return lambda x: second(activate(first(normed_words(x, norm))))


def inner_block(block):
    """A `TNTBlock`'s inner `TransformerBlock`: function of words (B * N, M, c), alike out."""
    scale1, scale2 = layer_scales(block)
    attend = words_attention(block.attention, block.norm1, scale1)
    feed = words_mlp(block.mlp, block.norm2, scale2)

    def call(x):
        import tensorflow as tf

        with tf.name_scope("attention"):
            x = x + attend(x)
        with tf.name_scope("mlp"):
            return x + feed(x)

    return call


def convolution(kernel, stride):
    """A convolution (B, H, W, C) -> (B, H / stride, W / stride, c) with a border of zeros.

    It reads squares of `stride` x `stride` pixels. The border is `MARGIN` pixels wide above and
    left; below and right it is as wide as needed.

    Args:
        kernel: (size, size, C, c).
    """
    size, _, channels, width = kernel.shape
    before, after = -(-MARGIN // stride), (size - 1 - MARGIN) // stride
    taps = before + 1 + after
    first = before * stride - MARGIN  # pixel of the first square that the kernel reads
    edges = (first, taps * stride - first - size)
    kernel = np.pad(kernel, (edges, edges, (0, 0), (0, 0)))
    kernel = kernel.reshape(taps, stride, taps, stride, channels, width)
    kernel = constant(kernel.transpose(0, 2, 1, 3, 4, 5).reshape(taps, taps, -1, width))
    border = ((0, 0), (before, after), (before, after), (0, 0))

    def call(x):
        import tensorflow as tf

        shape = (-1, x.shape[1] // stride, x.shape[2] // stride, kernel.shape[2])
        x = tf.reshape(squares(x, stride), shape)
        return tf.nn.conv2d(tf.pad(x, border), kernel, 1, "VALID")

    return call


def tnt_stem(layers, batch_size, mean_std):
    """Images -> (words (B * N, M, c), token stream (B * T, D))."""
    pixels, encoder, fold = layers["pixels"], layers["encoder"], layers["patches"]
    m, width = pixels.word_side, pixels.inner_dim
    bias = number(pixels.projection.bias)
    if pixels.positions:
        bias = bias + number(pixels.position_embedding)  # (M, c)
    kernel, stride = number(pixels.projection.kernel), pixels.projection.strides[0]
    mean, factor = normalization(mean_std, kernel.shape[2])
    project = convolution(factor[:, None] * kernel, stride)
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
    """`WordsToPatch` of words (B * N, M, c) -> (B * N, D), a centred writer."""
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


def tnt_blocks(blocks, batch_size, panels, prefix):
    """[(block, rows that are read of it)] -> function of words and the token stream."""
    run = [
        (
            inner_block(block.inner),
            folding(block.fold),
            transformer_block(block.outer, batch_size, rows, panels),
        )
        for block, rows in blocks
    ]

    def body(words, x):
        import tensorflow as tf

        for i, (inner, fold, outer) in enumerate(run):
            with tf.name_scope(f"block{i:02d}"):
                with tf.name_scope("inner"):
                    words = inner(words)
                with tf.name_scope("fold"):
                    x = x + with_prefix(fold(words), prefix, batch_size)
                x = outer(x)
        return x

    return body
