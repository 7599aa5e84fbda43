"""The same network rewritten for a runtime that fuses nothing: LiteRT's XNNPACK delegate.

There every operation is a pass over memory, so the graph has as few as the arithmetic allows. What
is rewritten, exactly up to rounding:

* streams of rank 3, tokens (B, T, D) and words (B * N, M, c), which all readers take as they are: a
  dense layer is one FULLY_CONNECTED, and nothing is copied to change its shape;
* pixels are brought into squares first: a convolution would read pixel by pixel, which is slowest
  with three channels;
* every writer to the patch stream is centred (its mean over the width is subtracted from its
  weights), so that a LayerNorm needs no mean: x * rsqrt(mean(x * x) + epsilon); TNT's words keep
  their means, because the fold's norm reads the words of a patch together;
* a norm's scale and shift are folded into the dense layer that reads it, and the columns of that
  are centred, which takes off the mean of what it reads;
* the attention scale is folded into the queries, layer scale into the layer before it;
* in float32 a wide product is a batch of narrower ones, panels of its columns: a core keeps the
  weights of one in its cache, and heads come apart without being copied;
* the last block computes only the rows that the head reads, and no keys and values: q K' =
  (q Wk') x';
* words' attention multiplies values by exponentials and divides by their sums at last; the largest
  score is taken off first only where the weights do not prove that float16 holds them all (for
  that values are divided, and what reads them is multiplied, by a power of two);
* prefix tokens and positions are one constant; the pooling query is a constant;
* uint8 pixels are normalised by the weights of the patch projection.

Here stand the whole, its head and the models it is for; `edge_vit` and `edge_tnt` hold the parts.

B images, T tokens, N patches, D width; M words per patch, c inner width, h heads, d of each.
"""

import re

import keras

from .edge_tnt import tnt_blocks, tnt_stem
from .edge_vit import (
    attention_pooling,
    constant,
    dense,
    dense_numbers,
    forms,
    normed,
    number,
    vit_blocks,
    vit_stem,
)
from .tnt import PixelEmbedding, TNTBlock, WordsToPatch, blocks
from .vit import AttentionPooling, PatchEncoder, Patches, TokenPooling, TransformerBlock

# The parts of the network whose operations carry their name, as a pattern.
PARTS = r"stem|block\d+/(?:attention|mlp|inner|fold)|head"


def lean(model, mean_std=None, panels=False):
    """A `ViT`, `DeiT` or `TNT` as a TensorFlow function.

    Args:
        model: built by those functions, float32, under any backend; its numbers are copied.
        mean_std: None if the function gets what the model gets; (mean, std) per channel, of pixels
            in 0..1, if it gets uint8 pixels and shall normalise them itself.
        panels: whether wide products are batches of narrower ones, which is faster in float32 and
            slower in int8.

    Returns:
        Function: float32 or uint8 tensor (B, H, W, C) of fixed shape -> the model's output. Its
        operations are named by the parts of the network, see `PARTS`.

    Raises:
        ValueError: if the model has other layers than those functions give it.
    """
    check(model)
    layers = {layer.name: layer for layer in model.layers}
    run = blocks_and_rows(model)
    if "pixels" in layers:
        stem = tnt_stem(layers, mean_std)
        body = tnt_blocks(run, panels, layers["encoder"].num_prefix_tokens)
    else:
        stem = vit_stem(layers, mean_std)
        body = vit_blocks(run, panels)
    head = top(layers)

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
        if isinstance(layer, keras.layers.Dense) and name_of(layer.activation) != usual:
            raise ValueError(
                f"The lean graph has {usual} in {name}; {model.name!r} has "
                f'{name_of(layer.activation)}: pass graph="plain".'
            )
    activation = activation_of(layers)
    if activation not in (None, "softmax", "sigmoid"):
        raise ValueError(
            f"The lean graph ends in logits, softmax or sigmoid; {model.name!r} ends in "
            f'{activation}: pass graph="plain".'
        )


def name_of(activation):
    return getattr(activation, "__name__", repr(activation))


def activation_of(layers):
    """The name of the activation behind the head; None for logits."""
    name = name_of(layers["predictions"].activation) if "predictions" in layers else "linear"
    return None if name == "linear" else name


def blocks_and_rows(model):
    """[(block, how many leading rows of each image are read of it; None: all)]."""
    *others, last = blocks(model)
    layers = {layer.name: layer for layer in model.layers}
    return [(block, None) for block in others] + [(last, rows_read(layers))]


def has_panels(model):
    """Whether `panels` changes a model's lean graph."""
    outer = [(getattr(block, "outer", block), rows) for block, rows in blocks_and_rows(model)]
    return any(
        forms(block, rows, panels=True) != forms(block, rows, panels=False) for block, rows in outer
    )


def rows_read(layers):
    """How many leading tokens the head reads; None for all."""
    pools = [layer for name, layer in layers.items() if name.startswith("pool")]
    if {getattr(pool, "pooling", "map") for pool in pools} != {"token"}:
        return None
    return max(pool.index for pool in pools) + 1


def top(layers):
    """The last block's rows (B, rows, D) -> the model's output."""
    norm = layers.get("fc_norm") or layers["norm"]
    gamma, beta = number(norm.gamma), number(norm.beta)
    pools = [layers[name] for name in ("pool", "pool_distillation") if name in layers]
    heads = [layers[name] for name in ("head", "head_distillation") if name in layers]
    pre_logits = dense(*dense_numbers(layers["pre_logits"])) if "pre_logits" in layers else None
    activation = activation_of(layers)
    outputs = [dense(*dense_numbers(head)) for head in heads]
    mapped = pools and isinstance(pools[0], AttentionPooling)
    map_head = attention_pooling(pools[0]) if mapped else None

    def call(x):
        import tensorflow as tf

        def affine(x):
            return normed(x, norm) * constant(gamma) + constant(beta)

        if "fc_norm" not in layers:
            x = affine(x)
        if not pools:
            return x
        if map_head:
            vectors = [map_head(x)]
        elif pools[0].pooling == "avg":
            vectors = [tf.reduce_mean(x[:, pools[0].num_prefix_tokens :], 1)]
        else:
            vectors = [
                tf.reshape(x[:, pool.index : pool.index + 1], (x.shape[0], -1)) for pool in pools
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
