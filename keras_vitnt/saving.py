"""Our weights into files for PyTorch, under the names of timm or transformers."""

import json
from pathlib import Path

import numpy as np
from keras import ops

from .schemes import HUGGING_FACE, TIMM_TNT, TIMM_VIT, TORCH_LEAVES, Scheme, theirs, to_torch
from .weights import shares


def save_weights(model, path, names="timm", preprocessing=None):
    """Write a model's weights as `.safetensors`, under timm's or transformers' names.

    Args:
        model: a `ViT`, `DeiT` or `TNT`.
        path: of the new file; written whole or not at all.
        names: "timm" (loads strictly into the timm model of the same numbers) or "huggingface"
            (ViT and DeiT, as transformers' `save_pretrained` writes them).
        preprocessing: an `images.Preprocessing`, to be kept in the file for `preprocessing`.

    Returns:
        The names written -> their shapes.

    Raises:
        ValueError: for an unknown `names`, another suffix, a model of others, or one with
            variables for which the other implementation has no place; they are named.

    Example:
        >>> save_weights(TNT("S/16"), "tnt_s.safetensors")
    """
    from safetensors.numpy import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"Weights are written as .safetensors; got {path}.")
    layers = {layer.name for layer in model.layers}
    if not {"encoder", "block00"} <= layers:
        raise ValueError(
            f"Only a ViT, DeiT or TNT of this package is expected; got {model.name!r}."
        )
    is_tnt = "pixels" in layers
    tables = {"timm": TIMM_TNT if is_tnt else TIMM_VIT}
    if not is_tnt:  # a model with a head has no pooler there
        tables["huggingface"] = {k: v for k, v in HUGGING_FACE.items() if k != "pre_logits"}
    if names not in tables:
        raise ValueError(f"`names` must be one of {', '.join(tables)} here; got {names!r}.")
    scheme = Scheme(names, "", tables[names], TORCH_LEAVES)
    values = {v.path: v for v in model.weights if "seed_generator" not in v.path}
    arrays, homeless = {}, []
    encoder = model.get_layer("encoder")
    if encoder.positions in ("sincos2d", "factorized2d"):
        for factor in [p for p in values if p.startswith("encoder/") and "position" in p]:
            del values[factor]
        values["encoder/position_embedding"] = encoder.patch_positions(encoder.output.shape[-1])
    for variable, value in values.items():
        found = theirs(scheme, variable)
        if not found:
            homeless.append(variable)
            continue
        array = np.asarray(ops.convert_to_numpy(value), "float32")
        parts = np.cumsum(shares(found))
        ends = parts[:-1] * array.shape[-1] // parts[-1]
        for name, part in zip(found, np.split(array, ends, axis=-1)):
            arrays[name] = np.ascontiguousarray(to_torch(variable, part, model.input_shape[-1]))
    if homeless:
        raise ValueError(f"{names} has no place for {', '.join(homeless)} of {model.name!r}.")
    if names == "huggingface":
        if not (encoder.has_class_token and encoder.prefix_positions) or "head" not in layers:
            raise ValueError(
                "transformers' ViT has a class token with a position of its own and a head; "
                f"{model.name!r} has not."
            )
        arrays = hugging_face_names(arrays)
    partial = path.with_name(f".{path.name}.partial")
    try:
        facts = {"format": "pt", **describe(model)}
        if preprocessing:
            facts["preprocessing"] = json.dumps(preprocessing._asdict())
        partial.touch()
        mode = partial.stat().st_mode
        save_file(arrays, partial, facts)
        partial.chmod(mode)  # safetensors' own files are readable for their owner alone
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return {name: array.shape for name, array in arrays.items()}


def hugging_face_names(arrays):
    """The names of transformers' whole models, from those without the first word."""
    distilled = "embeddings.distillation_token" in arrays
    new = {}
    for name, array in arrays.items():
        if "classifier" not in name:
            name = f"{'deit' if distilled else 'vit'}.{name}"
        elif distilled and name.startswith("classifier"):
            name = f"cls_{name}"
        new[name] = array
    return new


def describe(model):
    """What the arrays alone do not say, as a safetensors file's metadata."""
    block = model.get_layer("block00")
    outer = getattr(block, "outer", block)
    heads = {"num_heads": outer.attention.num_heads}
    if outer is not block:
        heads = {
            "num_heads_inner": block.inner.attention.num_heads,
            "num_heads_outer": outer.attention.num_heads,
        }
    pools = [layer for layer in model.layers if layer.name.startswith("pool")]
    facts = {
        **heads,
        "img_size": "{}x{}".format(*model.input_shape[1:3]),
        "layer_norm_epsilon": outer.norm1.epsilon,
        "gelu": outer.mlp.gelu,
        "global_pool": getattr(pools[0], "pooling", "map") if pools else "",
        "positions": model.get_layer("encoder").positions,
    }
    return {name: str(value) for name, value in facts.items()}
