"""What the parts of `vit` become in the lean graph, as functions of TensorFlow's tensors.

A function that makes a part copies its numbers and returns the part: a function of token streams
(B, T, D) or of rows (..., D) of any kind. Numbers are folded in float64.

B images, T tokens, N patches, D width; h heads, d columns of each.
"""

import numpy as np
from keras import ops

# A panel of an MLP has at least so many columns; kernels of fewer weights than `CACHED` stay whole,
# because a core's cache holds them anyway.
PANEL, CACHED = 256, 1 << 17
# A head is a panel if it fills whole kernels: XNNPACK's widest for float32 has so many columns.
LANES = 32


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


def layer_scaled(kernel, bias, scale):
    """A dense layer's numbers, with those of the `LayerScale` behind it; it may be None."""
    factor = 1 if scale is None else number(scale.gamma)
    return kernel * factor, bias * factor


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
    """A dense layer whose output is in panels: (B, T, in) -> (count, B * T, out / count)."""
    kernel = constant(np.stack(np.split(kernel, count, axis=1)))
    bias = None if bias is None else constant(bias.reshape(count, 1, -1))

    def call(x):
        import tensorflow as tf

        x = x if x.shape[0] == 1 else tf.reshape(x, (1, -1, x.shape[-1]))
        y = tf.linalg.matmul(x, kernel)
        return y if bias is None else y + bias

    return call


def from_panels(kernel, bias, count):
    """A dense layer whose input is in panels: (count, B * T, in / count) -> (1, B * T, out)."""
    kernel, bias = constant(np.stack(np.split(kernel, count))), constant(bias)

    def call(x):
        import tensorflow as tf

        return tf.reduce_sum(tf.linalg.matmul(x, kernel), 0, keepdims=True) + bias

    return call


def central(x):
    """Rows without their mean."""
    import tensorflow as tf

    return x - tf.reduce_mean(x, -1, keepdims=True)


def normed(x, norm):
    """A norm without scale and shift, of rows that are centred already."""
    import tensorflow as tf

    return x * tf.math.rsqrt(tf.reduce_mean(tf.square(x), -1, keepdims=True) + norm.epsilon)


def scaled(query, size):
    """The attention scale, in the numbers of the query."""
    return [part * size**-0.5 for part in query]


def scores(q, k):
    """Scaled queries (..., S, d) and keys (..., T, d) -> attention scores (..., S, T)."""
    import tensorflow as tf

    return tf.nn.softmax(tf.linalg.matmul(q, k, transpose_b=True))


def gelu(mlp):
    exact = mlp.gelu == "erf"

    def call(x):
        import tensorflow as tf

        if not exact:
            return tf.nn.gelu(x, approximate=True)
        # Of this form LiteRT's converter makes one operation.
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


def with_prefix(x, prefix):
    """(B, N, D) -> (B, T, D): rows of zeros before those of each image."""
    import tensorflow as tf

    return tf.pad(x, ((0, 0), (prefix, 0), (0, 0)))


def leading(x, rows):
    """(B, T, D) -> (B, rows, D): the first rows of each image; all if `rows` is None."""
    return x if rows is None else x[:, :rows]


def normalization(mean_std, channels):
    """(mean, factor) of float64 (C,) that make uint8 pixels a model's input; (0, 1) for None."""
    mean, std = (0.0, 1 / 255) if mean_std is None else mean_std
    ones = np.ones(channels)
    return 255 * np.asarray(mean) * ones, ones / (255 * np.asarray(std))


def squares(x, side):
    """(B, H, W, k) -> (B, H / side, W / side, side * side * k): the pixels of each square."""
    import tensorflow as tf

    return x if side == 1 else tf.nn.space_to_depth(x, side)


def of_squares(kernel, bias):
    """A convolution that reads each pixel once: (B, H, W, C) -> (B, N, D)."""
    side, width = kernel.shape[0], kernel.shape[-1]
    project = dense(kernel.reshape(-1, width), bias)

    def call(x):
        import tensorflow as tf

        y = project(tf.reshape(squares(x, side), (-1, side * side * x.shape[3])))
        # Reshaped after the bias is added: where there are no prefix tokens the converter would
        # merge it with the positions, which become as narrow as the weights.
        return tf.reshape(y, (x.shape[0], -1, width))

    return call


def vit_stem(layers, mean_std):
    """Images -> (token stream (B, T, D),)."""
    encoder, side = layers["encoder"], layers["patches"].patch_size
    kernel, bias = centred(*dense_numbers(encoder.projection))
    width = kernel.shape[1]
    kernel = kernel.reshape(side, side, -1, width)
    mean, factor = normalization(mean_std, kernel.shape[2])
    kernel = factor[:, None] * kernel
    project = of_squares(kernel, bias - np.einsum("hwcd,c->d", kernel, mean))
    prefix = encoder.num_prefix_tokens
    added = constant(table(encoder, width))

    def stem(images):
        return (with_prefix(project(images), prefix) + added,)

    return stem


def attention_numbers(layer, norm, scale):
    """(kernel, bias) of scaled queries, the kernels of keys and values, (kernel, bias) behind them.

    A key's bias adds the same to all scores of a query, which softmax cancels. A value's bias
    passes the attention unchanged, because its scores sum to one.
    """
    kernel, bias = after_norm(norm, *dense_numbers(layer.qkv))
    (query, key, value), biases = np.split(kernel, 3, axis=1), np.split(bias, 3)
    query = scaled((query, biases[0]), len(biases[0]) // layer.num_heads)
    kernel, bias = dense_numbers(layer.proj)
    return query, key, value, layer_scaled(kernel, bias + biases[2] @ kernel, scale)


def rows_of_heads(y, heads):
    """A row for each token of each head: (B, T, h * d) -> (B * h, T, d).

    The last reshape, to rank 3, saves a transposition that XNNPACK else makes of a right factor.
    """
    import tensorflow as tf

    y = tf.reshape(y, (*y.shape[:2], heads, y.shape[2] // heads))
    y = tf.transpose(y, (0, 2, 1, 3))
    return tf.reshape(y, (-1, *y.shape[2:]))


def attention(layer, norm, scale):
    """Attention within images: function of a stream (B, T, D), of which it computes the update."""
    heads = layer.num_heads
    query, key, value, after = attention_numbers(layer, norm, scale)
    query, key, value, proj = dense(*query), dense(key), dense(value), dense(*centred(*after))

    def call(x):
        import tensorflow as tf

        x = normed(x, norm)
        q, k, v = (rows_of_heads(part(x), heads) for part in (query, key, value))
        y = tf.reshape(tf.linalg.matmul(scores(q, k), v), (x.shape[0], heads, x.shape[1], -1))
        return proj(tf.reshape(tf.transpose(y, (0, 2, 1, 3)), (*x.shape[:2], -1)))

    return call


def attention_in_panels(layer, norm, scale):
    """As `attention`, with a panel of queries, keys and values for each head."""
    heads = layer.num_heads
    query, key, value, after = attention_numbers(layer, norm, scale)
    query, proj = to_panels(*query, heads), dense(*centred(*after))
    key, value = to_panels(key, None, heads), to_panels(value, None, heads)

    def call(x):
        import tensorflow as tf

        def split(y):  # (h, B * T, d) -> (h * B, T, d)
            return tf.reshape(y, (-1, x.shape[1], y.shape[-1]))

        n = normed(x, norm)
        q, k, v = (split(part(n)) for part in (query, key, value))
        y = tf.reshape(tf.linalg.matmul(scores(q, k), v), (heads, *x.shape[:2], -1))
        return proj(tf.reshape(tf.transpose(y, (1, 2, 0, 3)), x.shape))

    return call


def attention_of_few(layer, norm, scale, rows):
    """As `attention` of the `rows` leading rows of each image; without keys and values.

    Queries are multiplied by the keys' weights and then compared with the tokens themselves; the
    weighted sums of tokens are multiplied by the values' weights: q K' = (q Wk') x' and
    s V = (s x) Wv.
    """
    heads = layer.num_heads
    query, key, value, after = attention_numbers(layer, norm, scale)
    query, key, value, proj = dense(*query), dense(key.T), dense(value), dense(*centred(*after))
    # Ones in each head's columns.
    own = constant(np.repeat(np.eye(heads), layer.qkv.units // 3 // heads, axis=1))

    def call(x):
        import tensorflow as tf

        x = normed(x, norm)
        q = tf.reshape(query(leading(x, rows)), (-1, 1, own.shape[1])) * own
        q = key(tf.reshape(q, (x.shape[0], rows * heads, -1)))
        y = value(tf.linalg.matmul(scores(q, x), x))
        y = tf.reduce_sum(tf.reshape(y, (-1, *own.shape)) * own, 1)
        return proj(tf.reshape(y, (x.shape[0], rows, -1)))

    return call


def mlp(layer, norm, scale):
    """The MLP of a stream (B, T, D), of which it computes the update."""
    first = dense(*after_norm(norm, *dense_numbers(layer.fc1)))
    second = dense(*centred(*layer_scaled(*dense_numbers(layer.fc2), scale)))
    activate = gelu(layer)

    def call(x):
        return second(activate(first(normed(x, norm))))

    return call


def mlp_in_panels(layer, norm, scale):
    """As `mlp`, with panels of the hidden layer."""
    count = panel_count(layer)
    first = to_panels(*after_norm(norm, *dense_numbers(layer.fc1)), count)
    second = centred(*layer_scaled(*dense_numbers(layer.fc2), scale))
    second = from_panels(*second, count)
    activate = gelu(layer)

    def call(x):
        import tensorflow as tf

        return tf.reshape(second(activate(first(normed(x, norm)))), x.shape)

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


def layer_scales(block):
    return (None, None) if block.layer_scale is None else (block.scale1, block.scale2)


def forms(block, rows, panels):
    """The two functions that make a block's attention and MLP; see `transformer_block`."""
    attend, feed = attention, mlp
    if panels and heads_are_panels(block.attention):
        attend = attention_in_panels
    if panels and panel_count(block.mlp) > 1:
        feed = mlp_in_panels
    return (attend if rows is None else attention_of_few), feed


def transformer_block(block, rows, panels):
    """A `TransformerBlock`: function of the centred stream (B, T, D), alike out.

    It computes the `rows` leading rows of each image, all if None.
    """
    make_attention, make_mlp = forms(block, rows, panels)
    scale1, scale2 = layer_scales(block)
    few = () if rows is None else (rows,)
    attend = make_attention(block.attention, block.norm1, scale1, *few)
    feed = make_mlp(block.mlp, block.norm2, scale2)

    def call(x):
        import tensorflow as tf

        with tf.name_scope("attention"):
            x = leading(x, rows) + attend(x)
        with tf.name_scope("mlp"):
            return x + feed(x)

    return call


def vit_blocks(blocks, panels):
    """[(block, rows that are read of it)] -> function of the token stream."""
    run = [transformer_block(block, rows, panels) for block, rows in blocks]

    def body(x):
        import tensorflow as tf

        for i, block in enumerate(run):
            with tf.name_scope(f"block{i:02d}"):
                x = block(x)
        return x

    return body


def attention_pooling(pool):
    """`AttentionPooling` of normed tokens (B, T, D) -> (B, D); its query is a constant."""
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

        def split(y, order):  # (B, T, D) -> (B, h, N, d) or (B, h, d, N)
            return tf.transpose(tf.reshape(y, (x.shape[0], -1, heads, size))[:, prefix:], order)

        s = tf.reduce_sum(split(key(x), (0, 2, 1, 3)) * query, -1)  # (B, h, N)
        s = tf.nn.softmax(s)[:, :, None]
        y = tf.linalg.matmul(s, split(value(x), (0, 2, 3, 1)), transpose_b=True)
        pooled = proj(tf.reshape(y, (x.shape[0], width)))
        return pooled + second(activate(first(normed(central(pooled), pool.norm))))

    return call
