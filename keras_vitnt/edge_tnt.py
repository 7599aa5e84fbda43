"""What the parts of `tnt` become in the lean graph; see `edge_vit`.

B images, N patches of each, P = B * N of all, M words per patch, c inner width; h heads, d columns
of each.
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
    rows_of_heads,
    squares,
    table,
    transformer_block,
    with_prefix,
)

# Logarithms of the least that an exponential and the most that a sum of them may be: delegates for
# GPUs compute in float16.
SMALLEST, LARGEST = np.log(6.2e-5), np.log(6e4)
# Zeros above and left of what `PixelEmbedding` convolves.
MARGIN = 3


def normed_words(x, norm, axes=-1):
    """As `normed`, of words with a mean, which the weights of the reader take off.

    Numbers of the same word are normed together or, by axes (1, 2), those of the same patch.
    """
    import tensorflow as tf

    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(x, mean), axes, keepdims=True)
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


def largest_value(kernel):
    """What no value of normed rows exceeds; see `largest_score`."""
    return (len(kernel) * np.square(kernel).sum(axis=0).max()) ** 0.5


def columns_of_heads(y, heads):
    """As `rows_of_heads`, with columns: (P, M, h * d) -> (P * h, d, M)."""
    import tensorflow as tf

    words, width = y.shape[1:]
    return tf.reshape(tf.transpose(y, (0, 2, 1)), (-1, width // heads, words))


def exponentials(k, q, bounded):
    """Of keys' scores, (..., M, d) by scaled queries (..., d, M): a column for each query.

    Columns are not normalised; unless scores are known to be `bounded`, their largest is 1.
    """
    import tensorflow as tf

    s = tf.linalg.matmul(k, q)
    return tf.exp(s if bounded else s - tf.reduce_max(s, -2, keepdims=True))


def words_attention(layer, norm, scale):
    """Attention within patches: function of words (P, M, c), which computes their update."""
    heads = layer.num_heads
    query_numbers, key_kernel, value_kernel, (kernel, bias) = attention_numbers(layer, norm, scale)
    largest = largest_score(*query_numbers, key_kernel, heads)
    # With values up to 1, sums of values by exponentials are no larger than those of exponentials.
    unit = 2 ** np.ceil(np.log2(max(1, largest_value(value_kernel))))
    query, key, value = dense(*query_numbers), dense(key_kernel), dense(value_kernel / unit)
    proj = dense(unit * kernel, bias)

    def call(x):
        import tensorflow as tf

        patches, words, _ = x.shape
        x = normed_words(x, norm)
        k = rows_of_heads(key(x), heads)
        q, v = (columns_of_heads(part(x), heads) for part in (query, value))
        e = exponentials(k, q, -largest >= SMALLEST and largest + np.log(words) <= LARGEST)
        # Divided last: a query has fewer columns than scores.
        y = tf.linalg.matmul(v, e) / tf.reduce_sum(e, -2, keepdims=True)
        return proj(tf.transpose(tf.reshape(y, (patches, -1, words)), (0, 2, 1)))

    return call


def words_mlp(layer, norm, scale):
    """The MLP of words (P, M, c), of which it computes the update."""
    first = dense(*after_norm(norm, *dense_numbers(layer.fc1)))
    second = dense(*layer_scaled(*dense_numbers(layer.fc2), scale))
    activate = gelu(layer)
    return lambda x: second(activate(first(normed_words(x, norm))))


def inner_block(block):
    """A `TNTBlock`'s inner `TransformerBlock`: function of words (P, M, c), alike out."""
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

        x = squares(x, stride)
        return tf.nn.conv2d(tf.pad(x, border), kernel, 1, "VALID")

    return call


def tnt_stem(layers, mean_std):
    """Images -> (words (P, M, c), token stream (B, T, D))."""
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

        def cut(x, side):  # into patches (P, side, side, k)
            return tf.reshape(squares(x, side), (-1, side, side, x.shape[3]))

        x = images - constant(mean) if mean.any() else images  # then zeros are mean pixels
        if pixels.layout == "official":
            x = cut(x, pixels.patch_size)
            rest = m * stride - pixels.patch_size
            x = tf.pad(x, ((0, 0), (0, rest), (0, rest), (0, 0))) if rest else x
        x = project(x)
        x = cut(x, m) if pixels.layout == "legacy" else x
        x = tf.reshape(x, (-1, m * m, width)) + bias
        return x, with_prefix(to_patch(x, images.shape[0]), prefix) + added

    return stem


def folding(fold):
    """`WordsToPatch`, a centred writer: function of words (P, M, c) and of B -> (B, N, D)."""
    kernel, bias = after_norm(fold.norm1, *dense_numbers(fold.proj))
    proj = dense(*centred(kernel, bias))
    legacy = fold.layout == "legacy"  # which norms each word apart
    if not legacy:
        scale, shift = constant(number(fold.norm2.gamma)), number(fold.norm2.beta)
        shift = constant(shift - shift.mean())

    def call(x, batch_size):
        import tensorflow as tf

        y = normed_words(x, fold.norm1, -1 if legacy else (1, 2))
        y = proj(tf.reshape(y, (x.shape[0], -1)))
        if not legacy:
            y = central(normed(y, fold.norm2) * scale) + shift
        return tf.reshape(y, (batch_size, -1, y.shape[1]))  # after the bias, see `of_squares`

    return call


def tnt_blocks(blocks, panels, prefix):
    """[(block, rows that are read of it)] -> function of words and the token stream."""
    run = [
        (
            inner_block(block.inner),
            folding(block.fold),
            transformer_block(block.outer, rows, panels),
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
                    x = x + with_prefix(fold(words, x.shape[0]), prefix)
                x = outer(x)
        return x

    return body
