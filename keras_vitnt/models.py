"""ViT, DeiT and TNT: functions that return a functional `keras.Model`.

Layer names are part of the interface: `patches` or `pixels`, `encoder`, `block00`...,
`norm`, `pool`, `head`; they are the paths of weights, features and pictures.
"""

from concurrent.futures import ThreadPoolExecutor

import keras
from keras import layers

from .tnt import PixelEmbedding, TNTBlock, WordsToPatch, blocks
from .variants import decode_variant
from .vit import (
    AttentionPooling,
    PatchEncoder,
    Patches,
    TokenPooling,
    TransformerBlock,
    check_divisible,
    require,
)
from .weights import load_weights


def check_input_shape(input_shape, patch_size):
    require(
        len(tuple(input_shape)) == 3 and all(isinstance(side, int) for side in input_shape),
        f"`input_shape` must be (height, width, channels), all known; got {input_shape!r}.",
    )
    check_divisible(*input_shape[:2], patch_size)
    return input_shape[0] // patch_size, input_shape[1] // patch_size


def drop_path_rates(drop_path, depth):
    """Stochastic depth grows linearly from 0 in the first block to `drop_path` in the last."""
    return [drop_path * i / max(depth - 1, 1) for i in range(depth)]


def policy_name(dtype):
    """A policy by its name: a layer that was given an object cannot be saved by itself."""
    return keras.dtype_policies.get(dtype).name


def build_top(
    tokens,
    encoder,
    dtype,
    include_top,
    pooling,
    classes,
    classifier_activation,
    layer_norm_epsilon,
    fc_norm=False,
    representation_size=None,
    **map_head,
):
    """From the last block's tokens to a model's output: norm, pool, head.

    `encoder` is the `PatchEncoder`, which knows the prefix tokens; `map_head` the numbers of
    `AttentionPooling`. Distilled models have a head for each of their two tokens and
    average the logits (DeiT, section 4).
    """
    pooled = include_top or pooling is not None
    pooling = pooling or ("token" if encoder.has_class_token else "avg")
    require(
        pooling in ("token", "avg", "map"),
        f'`pooling` must be "token", "avg" or "map"; got pooling={pooling!r}.',
    )
    require(
        pooling != "token" or encoder.has_class_token,
        'pooling="token" takes the class token, but class_token=False: use "avg" or "map".',
    )
    distilled = encoder.has_distillation_token
    require(
        pooling == "token" or not distilled,
        f'A distilled model pools by its two tokens: pooling="token"; got {pooling!r}.',
    )
    fc_norm = fc_norm and pooled
    norm = layers.LayerNormalization(
        epsilon=layer_norm_epsilon, dtype=dtype, name="fc_norm" if fc_norm else "norm"
    )
    x = tokens if fc_norm else norm(tokens)
    if not pooled:
        return x
    prefix = encoder.num_prefix_tokens
    if pooling == "map":
        vectors = [
            AttentionPooling(
                num_prefix_tokens=prefix,
                layer_norm_epsilon=layer_norm_epsilon,
                dtype=dtype,
                name="pool",
                **map_head,
            )(x)
        ]
    else:
        vectors = [
            TokenPooling(pooling, index, prefix, dtype=dtype, name=f"pool{suffix}")(x)
            for index, suffix in enumerate(["", "_distillation"][: 1 + distilled])
        ]
    if fc_norm:
        vectors = [norm(vector) for vector in vectors]
    if representation_size:
        pre_logits = layers.Dense(
            representation_size, activation="tanh", dtype=dtype, name="pre_logits"
        )
        vectors = [pre_logits(vector) for vector in vectors]
    if include_top:
        # Logits are float32 under every policy: bfloat16 has three digits.
        vectors = [
            layers.Dense(classes, dtype="float32", name=f"head{suffix}")(vector)
            for vector, suffix in zip(vectors, ["", "_distillation"])
        ]
        dtype = "float32"
    if distilled:
        vectors = [layers.Average(dtype=dtype, name="average")(vectors)]
    if include_top and classifier_activation:
        activation = layers.Activation(classifier_activation, dtype="float32", name="predictions")
        vectors = [activation(vectors[0])]
    return vectors[0]


def load_into(model, weights):
    if weights is not None:
        load_weights(model, weights)
    return model


def ViT(
    variant=None,
    *,
    input_shape=(224, 224, 3),
    classes=1000,
    include_top=True,
    pooling=None,
    classifier_activation=None,
    weights=None,
    name="vit",
    dtype=None,
    positions="learned",
    drop_path=0.0,
    dropout=0.0,
    attention_dropout=0.0,
    class_token=True,
    register_tokens=0,
    prefix_positions=True,
    qkv_bias=True,
    layer_scale=None,
    fc_norm=False,
    representation_size=None,
    layer_norm_epsilon=1e-6,
    gelu="erf",
    distilled=False,
    patch_size=None,
    dim=None,
    depth=None,
    num_heads=None,
    mlp_dim=None,
):
    """A Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929).

    Args:
        variant: "SIZE/PATCH", such as "B/16" (sizes: `VARIANTS["ViT"]`); or None, with
            `patch_size`, `dim`, `depth` and `num_heads` given.
        input_shape: (height, width, channels), both sides divisible by the patch size.
        classes: number of classes of the head.
        include_top: False returns the normed tokens (B, T, D), or with `pooling` (B, D).
        pooling: "token" (the class token; the default where there is one), "avg" (the mean
            of the patches; the default otherwise) or "map" (attention pooling).
        classifier_activation: None for logits, or a name such as "softmax".
        weights: a file for `load_weights`.
        name: of the model.
        dtype: name of the dtype policy of all layers; None for Keras' global policy.
        positions: "learned", "sincos2d", "factorized2d" or "none".
        drop_path: rate of stochastic depth in the last block, growing linearly from 0.
        dropout, attention_dropout: rates on dense outputs and on attention scores.
        class_token, register_tokens, prefix_positions: see `PatchEncoder`.
        qkv_bias, layer_scale, layer_norm_epsilon, gelu: see `TransformerBlock`.
        fc_norm: norm the pooled vector instead of the tokens (timm's ViTs with "avg").
        representation_size: width of a dense tanh layer before the head, Google's
            `pre_logits`; None for none.
        distilled: a distillation token and a second head, as in DeiT.
        patch_size, dim, depth, num_heads, mlp_dim: in place of the variant's numbers.

    Returns:
        A functional `keras.Model`: images (B, H, W, C) -> logits (B, classes).

    Raises:
        ValueError: for an unknown variant or option, or a side that the patch does not divide.

    Example:
        >>> model = ViT("Ti/4", input_shape=(32, 32, 3), classes=10, drop_path=0.1)
        >>> model(keras.ops.ones((1, 32, 32, 3))).shape
        (1, 10)
    """
    given = dict(patch_size=patch_size, dim=dim, depth=depth, num_heads=num_heads, mlp_dim=mlp_dim)
    size = decode_variant("ViT", variant, given)
    grid = check_input_shape(input_shape, size["patch_size"])
    dtype = policy_name(dtype)

    inputs = keras.Input(input_shape, name="images")
    x = Patches(size["patch_size"], dtype=dtype, name="patches")(inputs)
    encoder = PatchEncoder(
        grid,
        size["dim"],
        positions=positions,
        class_token=class_token,
        distillation_token=distilled,
        register_tokens=register_tokens,
        prefix_positions=prefix_positions,
        dropout=dropout,
        dtype=dtype,
        name="encoder",
    )
    x = encoder(x)
    for i, rate in enumerate(drop_path_rates(drop_path, size["depth"])):
        x = TransformerBlock(
            size["num_heads"],
            size["mlp_dim"],
            qkv_bias=qkv_bias,
            layer_scale=layer_scale,
            drop_path=rate,
            dropout=dropout,
            attention_dropout=attention_dropout,
            layer_norm_epsilon=layer_norm_epsilon,
            gelu=gelu,
            dtype=dtype,
            name=f"block{i:02}",
        )(x)
    outputs = build_top(
        x,
        encoder,
        dtype,
        include_top,
        pooling,
        classes,
        classifier_activation,
        layer_norm_epsilon,
        fc_norm,
        representation_size,
        num_heads=size["num_heads"],
        mlp_dim=size["mlp_dim"],
        gelu=gelu,
    )
    return load_into(keras.Model(inputs, outputs, name=name), weights)


def DeiT(variant=None, *, distilled=False, name="deit", **kwargs):
    """A data-efficient image transformer (Touvron et al. 2021, arXiv:2012.12877).

    A ViT; `distilled=True` adds the distillation token with its own head, and the model
    returns the mean of both heads' logits. (Train the heads apart on the outputs of the
    layers `head` and `head_distillation`.)

    Args:
        variant: "SIZE/PATCH" (sizes: `VARIANTS["DeiT"]`), or None as in `ViT`.
        distilled: whether to add the token and the head.
        name, **kwargs: as in `ViT`.

    Example:
        >>> DeiT("S/16", distilled=True).count_params()
        22436432
    """
    if variant is not None:
        decode_variant("DeiT", variant, {})
    return ViT(variant, distilled=distilled, name=name, **kwargs)


def TNT(
    variant=None,
    *,
    input_shape=(224, 224, 3),
    classes=1000,
    include_top=True,
    pooling=None,
    classifier_activation=None,
    weights=None,
    name="tnt",
    dtype=None,
    positions="learned",
    drop_path=0.0,
    dropout=0.0,
    attention_dropout=0.0,
    class_token=True,
    register_tokens=0,
    prefix_positions=True,
    qkv_bias=False,
    layer_scale=None,
    layer_norm_epsilon=1e-5,
    gelu="erf",
    layout="official",
    pixel_stride=4,
    patch_size=None,
    dim=None,
    depth=None,
    num_heads=None,
    mlp_dim=None,
    inner_dim=None,
    inner_num_heads=None,
    inner_mlp_dim=None,
):
    """Transformer in Transformer (Han et al. 2021, arXiv:2103.00112).

    Args:
        variant: "SIZE/PATCH", such as "S/16" (sizes: `VARIANTS["TNT"]`); or None, with
            `patch_size`, `dim`, `depth`, `num_heads`, `inner_dim`, `inner_num_heads` given.
        layout: "official" (the authors' code; timm's `tnt_s_patch16_224`) or "legacy" (timm's
            `tnt_s_legacy_patch16_224`): two networks with different weights.
        pixel_stride: of the words inside a patch, in pixels.
        inner_dim, inner_num_heads, inner_mlp_dim: of the pixel stream.
        positions: "none" leaves out the words' positions too.
        input_shape, ..., mlp_dim: as in `ViT`. TNT's defaults differ: no bias in queries,
            keys and values, epsilon 1e-5.

    Returns:
        A functional `keras.Model`: images (B, H, W, C) -> logits (B, classes).

    Raises:
        ValueError: for an unknown variant or option, or a side that the patch does not divide.

    Example:
        >>> TNT("S/16").count_params()
        23768584
    """
    given = dict(
        patch_size=patch_size,
        dim=dim,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        inner_dim=inner_dim,
        inner_num_heads=inner_num_heads,
        inner_mlp_dim=inner_mlp_dim,
    )
    size = decode_variant("TNT", variant, given)
    grid = check_input_shape(input_shape, size["patch_size"])
    dtype = policy_name(dtype)

    inputs = keras.Input(input_shape, name="images")
    pixels = PixelEmbedding(
        size["patch_size"],
        size["inner_dim"],
        pixel_stride=pixel_stride,
        layout=layout,
        positions=positions != "none",
        dtype=dtype,
        name="pixels",
    )(inputs)
    # Every layout's first fold is the official one; the legacy layout differs in its blocks.
    x = WordsToPatch(
        size["dim"], layer_norm_epsilon=layer_norm_epsilon, dtype=dtype, name="patches"
    )(pixels)
    encoder = PatchEncoder(
        grid,
        positions=positions,
        class_token=class_token,
        register_tokens=register_tokens,
        prefix_positions=prefix_positions,
        dropout=dropout,
        dtype=dtype,
        name="encoder",
    )
    x = encoder(x)
    for i, rate in enumerate(drop_path_rates(drop_path, size["depth"])):
        pixels, x = TNTBlock(
            size["num_heads"],
            size["mlp_dim"],
            size["inner_num_heads"],
            size["inner_mlp_dim"],
            layout=layout,
            qkv_bias=qkv_bias,
            layer_scale=layer_scale,
            drop_path=rate,
            dropout=dropout,
            attention_dropout=attention_dropout,
            layer_norm_epsilon=layer_norm_epsilon,
            gelu=gelu,
            dtype=dtype,
            name=f"block{i:02}",
        )(pixels, x)
    outputs = build_top(
        x,
        encoder,
        dtype,
        include_top,
        pooling,
        classes,
        classifier_activation,
        layer_norm_epsilon,
        num_heads=size["num_heads"],
        mlp_dim=size["mlp_dim"],
        gelu=gelu,
    )
    return load_into(keras.Model(inputs, outputs, name=name), weights)


def features(model, indices=None):
    """Intermediate patch tokens as maps, for dense tasks: a model of the same weights.

    Args:
        model: a `ViT`, `DeiT` or `TNT`.
        indices: which blocks, counted from 0 or from the end; None for all.

    Returns:
        A functional model: images (B, H, W, C) -> list of maps (B, rows, columns, D), the
        chosen blocks' outputs without prefix tokens, before the final norm.

    Raises:
        ValueError: if the model has no such block.

    Example:
        >>> backbone = features(ViT("Ti/16"), indices=(3, 7, 11))
        >>> [y.shape for y in backbone(keras.ops.ones((1, 224, 224, 3)))]
        [(1, 14, 14, 192), (1, 14, 14, 192), (1, 14, 14, 192)]
    """
    found = blocks(model)
    indices = range(len(found)) if indices is None else indices
    wrong = [i for i in indices if not -len(found) <= i < len(found)]
    require(not wrong, f"The model has {len(found)} blocks; got indices={list(indices)}.")
    encoder = model.get_layer("encoder")
    maps = []
    for i in indices:
        tokens = found[i].output
        tokens = tokens[1] if isinstance(tokens, list | tuple) else tokens
        patches = tokens[:, encoder.num_prefix_tokens :]
        maps.append(layers.Reshape((*encoder.grid, tokens.shape[-1]))(patches))
    return keras.Model(model.input, maps, name=f"{model.name}_features")


def blueprint(builder, *args, **kwargs):
    """A model without memory for its weights: to count and to check, not to run.

    It is made in a thread of its own, with which Keras' list of variables that wait for their
    values ends; policies, names and seeds of the caller's thread stay as they are.
    """

    def build():
        with keras.StatelessScope(initialize_variables=False):
            return builder(*args, **kwargs)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(build).result()
