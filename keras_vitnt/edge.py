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

from .edge_tnt import tnt_blocks, tnt_stem
from .edge_vit import (
    after_norm,
    central,
    constant,
    dense,
    dense_numbers,
    gelu,
    heads_are_panels,
    normed,
    number,
    panel_count,
    vit_blocks,
    vit_stem,
)
from .tnt import PixelEmbedding, TNTBlock, WordsToPatch
from .vit import AttentionPooling, PatchEncoder, Patches, TokenPooling, TransformerBlock

# The parts of the network whose operations carry their name, as a pattern.
PARTS = r"stem|block\d+/(?:attention|mlp|inner|fold)|head"


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


def has_panels(model):
    """Whether `panels` changes a model's lean graph."""
    blocks = [layer for layer in model.layers if layer.name.startswith("block")]
    blocks = [getattr(block, "outer", block) for block in blocks]
    return any(heads_are_panels(block.attention) or panel_count(block.mlp) > 1 for block in blocks)


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
