"""A reference checkpoint -> our names and layouts -> strict assignment.

A source is recognised by the names of its arrays. Each scheme is a table of renames, read
top to bottom, and a rule for layouts. Loading is total: every variable gets an array and every
array is used, or one error lists the differences and nothing is assigned.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import positions


def block(match):
    return f"block{int(match[1]):02}."


TIMM_VIT = [
    (r"^blocks\.(\d+)\.", block),
    (r"\.attn\.", ".attention."),
    (r"\.ls(\d)\.", r".scale\1."),
    (r"^patch_embed\.proj\.", "encoder.projection."),
    (r"^cls_token$", "encoder.class_token"),
    (r"^dist_token$", "encoder.distillation_token"),
    (r"^reg_token$", "encoder.register_tokens"),
    (r"^pos_embed$", "encoder.position_embedding"),
    (r"^head_dist\.", "head_distillation."),
]
TIMM_TNT = [
    (r"^blocks\.(\d+)\.", block),
    (r"\.attn_in\.", ".inner.attention."),
    (r"\.norm_in\.", ".inner.norm1."),
    (r"\.norm_mlp_in\.", ".inner.norm2."),
    (r"\.mlp_in\.", ".inner.mlp."),
    (r"\.attn_out\.", ".outer.attention."),
    (r"\.norm_out\.", ".outer.norm1."),
    (r"\.norm_mlp\.", ".outer.norm2."),
    (r"^(block\d+)\.mlp\.", r"\1.outer.mlp."),
    (r"^(block\d+)\.norm([12])_proj\.", r"\1.fold.norm\2."),
    (r"^(block\d+)\.proj\.", r"\1.fold.proj."),
    (r"^norm([12])_proj\.", r"patches.norm\1."),
    (r"^proj\.", "patches.proj."),
    (r"^pixel_embed\.proj\.", "pixels.projection."),
    (r"^pixel_pos$", "pixels.position_embedding"),
    (r"^cls_token$", "encoder.class_token"),
    (r"^patch_pos$", "encoder.position_embedding"),
]
TORCH_LEAVES = [
    (r"norm(\d?)\.weight$", r"norm\1.gamma"),
    (r"norm(\d?)\.bias$", r"norm\1.beta"),
    (r"\.weight$", ".kernel"),
    (r"\.", "/"),
]
GOOGLE = [
    (r"^(opt/target/|params/)", ""),
    (r"^embedding/", "encoder/projection/"),
    (r"^cls$", "encoder/class_token"),
    (r"^(Transformer/posembed_input/)?pos_embedding$", "encoder/position_embedding"),
    (r"^Transformer/encoderblock_(\d+)/", lambda m: f"block{int(m[1]):02}/"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^MAPHead_0/probe$", "pool/query_token"),
    (r"^MAPHead_0/MultiHeadDotProductAttention_0/out/", "pool/proj/"),
    (r"^MAPHead_0/MultiHeadDotProductAttention_0/", "pool/"),
    (r"^MAPHead_0/LayerNorm_0/", "pool/norm/"),
    (r"^MAPHead_0/MlpBlock_0/", "pool/mlp/"),
    (r"/LayerNorm_0/", "/norm1/"),
    (r"/LayerNorm_[12]/", "/norm2/"),
    (r"/MultiHeadDotProductAttention_[01]/out/", "/attention/proj/"),
    (r"/MultiHeadDotProductAttention_[01]/", "/attention/"),
    (r"/MlpBlock_[03]/", "/mlp/"),
    (r"/Dense_0/", "/fc1/"),
    (r"/Dense_1/", "/fc2/"),
    (r"norm(\d?)/scale$", r"norm\1/gamma"),
    (r"norm(\d?)/bias$", r"norm\1/beta"),
]
# A fused projection of ours holds the source's parts side by side, in this order.
FUSED = {
    "attention/query": ("attention/qkv", 0),
    "attention/key": ("attention/qkv", 1),
    "attention/value": ("attention/qkv", 2),
    "attention/qk": ("attention/qkv", 0),
    "attention/v": ("attention/qkv", 1),
    "pool/key": ("pool/key_value", 0),
    "pool/value": ("pool/key_value", 1),
}
ADDED_TOKENS = re.compile(r"(_token|_tokens|position_embedding)$")


def torch_layout(name, array):
    """A PyTorch array in our layout: kernels (in, out), images channels last."""
    if name == "pixels/position_embedding":  # (1, c, m, m), or (1, M, c)
        return array[0] if array.ndim == 3 else flatten(array[0].transpose(1, 2, 0))
    if name == "pixels/projection/kernel":  # (c, C, 7, 7)
        return array.transpose(2, 3, 1, 0)
    if name == "encoder/projection/kernel":  # (D, C, P, P)
        return flatten(array.transpose(2, 3, 1, 0))
    if name.endswith("/kernel"):
        return array.T
    return array[0] if ADDED_TOKENS.search(name) else array


def google_layout(name, array):
    """A Flax array in our layout: only the split into heads (or a patch's sides) goes."""
    if name.endswith("proj/kernel"):  # (h, d, D)
        return array.reshape(-1, array.shape[-1])
    if name.endswith("projection/kernel"):  # (P, P, C, D)
        return flatten(array)
    if name.endswith("/kernel"):  # (D, h, d)
        return array.reshape(array.shape[0], -1)
    return array[0] if ADDED_TOKENS.search(name) else array.reshape(-1)


def flatten(array):
    """(P, P, C, D) -> (P * P * C, D): a patch's numbers row by row, as `Patches` gives them."""
    return array.reshape(-1, array.shape[-1])


class Scheme(NamedTuple):
    name: str
    mark: str  # the name that only this scheme's files have
    renames: list
    layout: callable


SCHEMES = [
    Scheme("timm TNT", r"^pixel_embed\.", TIMM_TNT + TORCH_LEAVES, torch_layout),
    Scheme("timm ViT or DeiT", r"^patch_embed\.", TIMM_VIT + TORCH_LEAVES, torch_layout),
    Scheme("Google ViT", r"^(opt/target/|params/)?embedding/", GOOGLE, google_layout),
]


class Row(NamedTuple):
    variable: str
    sources: tuple  # the names in the file
    shape: tuple
    action: str  # "loaded", "resized from ... to ...", "re-initialised"


class Report(NamedTuple):
    """What `load_weights` did; prints as a table."""

    source: str
    scheme: str
    rows: list

    def __str__(self):
        lines = [f"{self.source} ({self.scheme})"]
        for row in self.rows:
            shape = " x ".join(map(str, row.shape))
            lines.append(f"{row.variable:42} {shape:>18}  {row.action}: {', '.join(row.sources)}")
        return "\n".join(lines)


def read_arrays(path):
    """All arrays of a .safetensors or .npz file, by name.

    Raises:
        FileNotFoundError, ValueError: for a missing, foreign or damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
    except Exception as error:  # zip, JSON, header and dtype errors of two libraries
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    raise ValueError(f"{path}: expected a .safetensors or .npz file.")


def to_ours(arrays, source):
    """Rename and lay out a source's arrays: -> (scheme, {our name: (array, sources)})."""
    found = [s for s in SCHEMES if any(re.search(s.mark, name) for name in arrays)]
    if not found:
        raise ValueError(
            f"{source} holds no checkpoint that is known here: expected the names of "
            f"{', '.join(s.name for s in SCHEMES)}; it has {', '.join(sorted(arrays)[:3])}, ..."
        )
    parts = {}
    for source_name, array in arrays.items():
        name = source_name
        for pattern, replacement in found[0].renames:
            name = re.sub(pattern, replacement, name)
        array = found[0].layout(name, array)
        order = 0
        layer, _, leaf = name.rpartition("/")
        for part, (fused, place) in FUSED.items():
            if layer.endswith(part):
                name, order = f"{layer.removesuffix(part)}{fused}/{leaf}", place
        parts.setdefault(name, []).append((order, source_name, array))
    ours = {}
    for name, found_parts in parts.items():
        _, sources, pieces = zip(*sorted(found_parts, key=lambda part: part[0]))
        array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)
        ours[name] = (array, sources)
    return found[0], ours


def fit_positions(model, array):
    """A position table resampled to the model's grid where only the grid differs."""
    encoder = model.get_layer("encoder")
    prefix = encoder.num_prefix_tokens if encoder.prefix_positions else 0
    side = int(max(len(array) - prefix, 0) ** 0.5)
    if encoder.grid is None or prefix + side * side != len(array):
        return array  # not a square grid: left as it is, for the shapes' error to name
    return positions.resize(array, (side, side), encoder.grid, prefix)


def load_weights(model, source, new_head=False):
    """Load a public checkpoint into a model, strictly.

    Args:
        model: a `ViT`, `DeiT` or `TNT`.
        source: path of timm's ViT, DeiT or TNT `.safetensors`, or Google's ViT `.npz`
            (vision_transformer or big_vision). Position tables of another, square image are
            resampled as timm does.
        new_head: keep the model's own head where the file's has another number of classes.

    Returns:
        A `Report`, a row for each variable.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a variable would get no array or one of another shape, or an array
            would stay unused; nothing has been assigned then.

    Example:
        >>> model = ViT("B/16", weights="vit_base_patch16_224.safetensors")  # or
        >>> print(load_weights(model, "vit_base_patch16_224.safetensors"))
    """
    scheme, ours = to_ours(read_arrays(source), source)
    variables = {v.path: v for v in model.weights if "seed_generator" not in v.path}
    rows, values, problems = [], {}, []
    for path, variable in variables.items():
        if path not in ours:
            problems.append(f"the file has nothing for {path} {tuple(variable.shape)}")
            continue
        array, sources = ours[path]
        shape, action = tuple(variable.shape), "loaded"
        if path == "encoder/position_embedding" and array.shape != shape:
            resized = fit_positions(model, array)
            if resized.shape == shape:
                array, action = resized, f"resized from {len(array)} to {len(resized)} positions"
        if array.shape != shape and new_head and path.startswith("head"):
            array, action = None, "re-initialised"
        elif array.shape != shape:
            problems.append(f"{path} is {shape}, the file has {array.shape}")
        values[path] = array
        rows.append(Row(path, sources, shape, action))
    for path in ours.keys() - variables.keys():
        problems.append(f"the model has no {path} for {', '.join(ours[path][1])}")
    if problems:
        shown = "; ".join(sorted(problems)[:6]) + ("; ..." if len(problems) > 6 else "")
        raise ValueError(
            f"{source} ({scheme.name}) does not fit the model {model.name!r}: "
            f"{len(problems)} differences: {shown}."
        )
    for path, array in values.items():
        if array is not None:
            variables[path].assign(array)
    return Report(str(source), scheme.name, rows)
