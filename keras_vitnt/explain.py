"""What a model looks at, and the shapes its data takes: arrays first, pictures of them next.

B batch, N patches, T tokens, D width, h heads; in TNT M words per patch of inner width c.
"""

import keras
import numpy as np
from keras import ops

from .tnt import PixelEmbedding, TNTBlock, WordsToPatch, blocks
from .vit import AttentionPooling, PatchEncoder, Patches, TokenPooling, TransformerBlock


def block_inputs(model, images):
    """The model's blocks, each with the list of tensors that it receives for these images."""
    found = blocks(model)
    if not found:
        raise ValueError(f"{model.name!r} has no TransformerBlock or TNTBlock to look into.")
    wanted = keras.tree.flatten([layer.input for layer in found])
    received = iter(keras.tree.flatten(keras.Model(model.input, wanted)(images)))
    return [(x, [next(received) for _ in keras.tree.flatten(x.input)]) for x in found]


def attention_maps(model, images):
    """The attention scores of every block.

    Args:
        model: a `ViT`, `DeiT` or `TNT`, freshly built or loaded.
        images: array (B, H, W, C) as the model takes them.

    Returns:
        A list with an array (B, h, T, T) per block: query by key, rows sum to 1. For TNT the
        outer block's; `inner_attention_maps` has the others.

    Example:
        >>> attention_maps(ViT("Ti/16"), np.zeros((1, 224, 224, 3)))[0].shape
        (1, 3, 197, 197)
    """
    maps = []
    for layer, received in block_inputs(model, images):
        scores = layer.attention_scores(*received)
        maps.append(ops.convert_to_numpy(scores[1] if isinstance(layer, TNTBlock) else scores))
    return maps


def inner_attention_maps(model, images):
    """TNT's attention among the words of each patch: (B, N, h, M, M) per block."""
    found = block_inputs(model, images)
    if not isinstance(found[0][0], TNTBlock):
        raise ValueError(f"{model.name!r} is no TNT: it has no inner attention.")
    maps = []
    for layer, (pixels, patches) in found:
        inner = ops.convert_to_numpy(layer.attention_scores(pixels, patches)[0])
        maps.append(inner.reshape(-1, pixels.shape[1], *inner.shape[1:]))
    return maps


def rollout(maps):
    """Attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928): (B, T, T).

    Heads are averaged, half of each row is the residual path, blocks are multiplied.
    """
    joined = None
    for scores in maps:
        mean = scores.astype("float64").mean(axis=1)
        step = 0.5 * (mean + np.eye(mean.shape[-1]))
        joined = step if joined is None else step @ joined
    return joined


def attention_overlay(model, images):
    """Where the pooled token looks, by rollout: (B, H, W) in 0..1, at the images' size.

    Without a class token it is the mean of what the patches look at.
    """
    from PIL import Image

    encoder = model.get_layer("encoder")
    prefix = encoder.num_prefix_tokens
    joined = rollout(attention_maps(model, images))
    looked = joined[:, 0] if encoder.has_class_token else joined.mean(axis=1)
    maps = looked[:, prefix:].reshape(-1, *encoder.grid)
    maps = maps - maps.min(axis=(1, 2), keepdims=True)
    maps = maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-12)
    height, width = images.shape[1:3]
    return np.stack(
        [
            np.asarray(
                Image.fromarray(m.astype("float32")).resize(
                    (width, height), Image.Resampling.BICUBIC
                )
            ).clip(0, 1)
            for m in maps
        ]
    )


def shape_walk(model, images):
    """Walk images through a model and note each stage's shape as it is at run time.

    Args:
        model: a `ViT`, `DeiT` or `TNT`.
        images: array (B, H, W, C).

    Returns:
        A list of (layer, stage, shape).
    """
    rows = []

    def note(layer, stage, value):
        rows.append((layer, stage, tuple(value.shape)))
        return value

    def walk_block(name, block, x, stream=""):
        y = note(name, f"{stream}norm1", block.norm1(x))
        heads = block.attention.heads(y)
        query, key, value = (ops.transpose(part, (0, 2, 1, 3)) for part in heads)
        note(name, f"{stream}queries, keys, values of the heads", query)
        note(name, f"{stream}attention scores", block.attention.scores(y))
        note(name, f"{stream}attention output", block.attention(y))
        note(name, f"{stream}MLP hidden", block.mlp.activate(block.norm2(x)))
        return note(name, f"{stream}block output", block(x))

    values = {}
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer):
            x = note(layer.name, "images", ops.convert_to_tensor(images, "float32"))
            values[id(layer.output)] = x
            continue
        received = layer.input if isinstance(layer.input, list | tuple) else [layer.input]
        inputs = [values[id(tensor)] for tensor in received]
        if isinstance(layer, TNTBlock):
            pixels, patches = inputs
            words = ops.reshape(pixels, (-1, *pixels.shape[2:]))
            walk_block(layer.name, layer.inner, words, "pixels: ")
            new_pixels = note(layer.name, "pixels", layer.run_inner(pixels))
            note(layer.name, "words folded into patches", layer.fold(new_pixels))
            fused = layer.fuse(new_pixels, patches)
            outputs = [new_pixels, walk_block(layer.name, layer.outer, fused, "patches: ")]
            note(layer.name, "patches", outputs[1])
        elif isinstance(layer, TransformerBlock):
            outputs = [walk_block(layer.name, layer, *inputs)]
        else:
            if isinstance(layer, PatchEncoder) and layer.projection_dim:
                note(layer.name, "projected patches", layer.projection(*inputs))
            merges = isinstance(layer, keras.layers.Average)
            result = layer(inputs if merges else inputs[0])
            outputs = [note(layer.name, STAGES.get(type(layer), layer.name), result)]
        made = layer.output if isinstance(layer.output, list | tuple) else [layer.output]
        values |= {id(tensor): value for tensor, value in zip(made, outputs)}
    return rows


STAGES = {
    Patches: "patches",
    PixelEmbedding: "pixel stream: words of each patch",
    WordsToPatch: "patch stream: words folded into patches",
    PatchEncoder: "tokens with positions",
    TokenPooling: "pooled",
    AttentionPooling: "pooled",
}


def picture_attention(model, images, pixels, titles):
    """Photos above their attention overlays: a matplotlib figure.

    Args:
        model, images: as in `attention_overlay`.
        pixels: list of B uint8 arrays (h, w, 3), the photos as people see them, any size.
        titles: list of str, one above each photo.
    """
    from matplotlib.figure import Figure

    overlays = attention_overlay(model, images)
    count = len(pixels)
    figure = Figure(figsize=(1.7 * count, 3.9), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    for column, (photo, overlay, title) in enumerate(zip(pixels, overlays, titles)):
        axes[0, column].imshow(photo, interpolation="bilinear")
        axes[0, column].set_title(title, fontsize=10, parse_math=False)
        axes[1, column].imshow(photo.mean(axis=-1), cmap="gray", interpolation="bilinear")
        height, width = photo.shape[:2]
        axes[1, column].imshow(
            overlay,
            cmap="inferno",
            alpha=0.6,
            vmin=0,
            vmax=1,
            interpolation="bilinear",
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        )
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle("Photos, and where the model looks (attention rollout)", fontsize=11)
    return figure
