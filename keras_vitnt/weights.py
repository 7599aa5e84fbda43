"""Public checkpoints into our variables, strictly; `saving` is the way back.

Loading is total: every variable gets an array and every array is used, or one error lists both
differences before anything is assigned.
"""

import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from keras import ops

from .checkpoints import Checkpoint, open_checkpoint
from .fitting import fit
from .schemes import (
    ADDED_TOKENS,
    FLAX_LEAVES,
    GOOGLE,
    HUGGING_FACE,
    SCHEMES,
    Scheme,
    theirs,
    to_ours,
)

HEAD = re.compile(r"^(head|head_distillation|pre_logits)/")


class Names(NamedTuple):
    """A checkpoint under a scheme's own spelling."""

    scheme: Scheme
    checkpoint: Checkpoint
    originals: dict  # spelling of the table -> name in the file
    shapes: dict  # spelling of the table -> shape

    def sources(self, path):
        """The names, in the table's spelling, of a variable of ours; () if it has none."""
        return theirs(self.scheme, path)

    def shape(self, path):
        """The shape of a variable of ours in the checkpoint, or None where it has none."""
        names = self.sources(path)
        if not names or any(name not in self.shapes for name in names):
            return None
        parts = [self.part(path, name) for name in names]
        return (*parts[0][:-1], sum(part[-1] for part in parts))

    def part(self, path, name):
        """The shape in our layout of one of the arrays that make up a variable."""
        shape = self.shapes[name]
        tokens = ADDED_TOKENS.search(path) and self.scheme.leaves
        rank = 2 if path.endswith("kernel") or ADDED_TOKENS.search(path) else 1
        rank = 4 if path.endswith("projection/kernel") and self.scheme.leaves else rank
        try:
            found = to_ours(self.scheme, path, blank(shape)).shape
        except (IndexError, ValueError):
            found = ()
        if len(found) not in (rank, 4 if self.scheme.leaves is None else rank) or (
            tokens and shape[0] != 1
        ):
            raise ValueError(
                f"{self.checkpoint.source} ({self.scheme.name}): {self.originals[name]} has the "
                f"shape {shape}, which is none for {path}."
            )
        return found


def blank(shape):
    """An array without memory, to see what becomes of a shape."""
    return np.broadcast_to(np.float32(0), shape)


def unstacked(checkpoint):
    """big_vision's scan layout, one array for all blocks, as an array for each block."""
    stacked = re.compile(r"Transformer/encoderblock/")
    if not any(stacked.search(name) for name in checkpoint.shapes):
        return checkpoint
    shapes, places = {}, {}
    for name, shape in checkpoint.shapes.items():
        if not stacked.search(name):
            shapes[name], places[name] = shape, (name, None)
        for i in range(shape[0]) if stacked.search(name) else ():
            shapes[f"{name}[{i}]"], places[f"{name}[{i}]"] = shape[1:], (name, i)
    whole = lru_cache(maxsize=3)(checkpoint.read)  # query, key and value of all blocks

    def read(name):
        name, i = places[name]
        return checkpoint.read(name) if i is None else whole(name)[i]

    return checkpoint._replace(shapes=shapes, read=read)


def recognise(checkpoint):
    """A checkpoint -> its `Names`.

    Raises:
        ValueError: if it is of no scheme that is known here.
    """
    found = [s for s in SCHEMES if any(re.search(s.mark, name) for name in checkpoint.shapes)]
    if not found:
        raise ValueError(
            f"{checkpoint.source} holds no checkpoint that is known here: expected the names of "
            f"{', '.join(s.name for s in SCHEMES)}; it has "
            f"{', '.join(sorted(checkpoint.shapes)[:3])}, ..."
        )
    scheme = found[0]
    checkpoint = unstacked(checkpoint) if scheme.table is GOOGLE else checkpoint
    originals = {}
    for original in checkpoint.shapes:
        name = original
        for pattern, replacement in scheme.aliases:
            name = re.sub(pattern, replacement, name)
        if name in originals:
            raise ValueError(f"{checkpoint.source} has both {originals[name]} and {original}.")
        originals[name] = original
    # transformers' DeiT without a second head has the token all the same: then it is a register.
    if scheme.table is HUGGING_FACE and "distillation_classifier.weight" not in originals:
        table = dict(scheme.table)
        table["encoder/register_tokens"] = table.pop("encoder/distillation_token")
        scheme = scheme._replace(table=table)
    shapes = {name: checkpoint.shapes[original] for name, original in originals.items()}
    return Names(scheme, checkpoint, originals, shapes)


def weights_h5(checkpoint, model):
    """Keras' `.weights.h5`, whose names follow from a model's layers, under the model's names."""
    from keras.src.utils.naming import to_snake_case

    layers, variables, shapes, places = {}, {}, {}, {}
    for layer in model.layers:
        kind = to_snake_case(type(layer).__name__)
        layers[kind] = count = layers.get(kind, -1) + 1
        folder = f"layers/{kind}_{count}" if count else f"layers/{kind}"
        for variable in layer.weights:
            owner = variable.path.rpartition("/")[0]
            variables[owner] = index = variables.get(owner, -1) + 1
            inner = owner.removeprefix(layer.name)
            places[variable.path] = f"{folder}{inner}/vars/{index}"
    for path, place in places.items():
        if place in checkpoint.shapes:
            shapes[path] = checkpoint.shapes[place]
    known = set(places.values())
    shapes |= {name: shape for name, shape in checkpoint.shapes.items() if name not in known}
    return checkpoint._replace(
        shapes=shapes, read=lambda path: checkpoint.read(places.get(path, path))
    )


class Row(NamedTuple):
    variable: str
    sources: tuple  # the names in the file
    shape: tuple
    action: str  # "loaded", "transposed", "resized from ... to ...", "re-initialised", ...


class LoadReport(NamedTuple):
    """What loading did, a row for each variable; prints as a table."""

    source: str
    scheme: str
    rows: list
    unused: dict  # names in the file -> why they are not used
    notes: list = []  # what `from_checkpoint` took from elsewhere than the arrays

    def __str__(self):
        lines = [f"{self.source} ({self.scheme})"]
        for row in self.rows:
            shape = " x ".join(map(str, row.shape))
            names = f": {', '.join(row.sources)}" if row.sources else ""
            lines.append(f"{row.variable:42} {shape:>18}  {row.action}{names}")
        lines += [f"unused: {name} ({reason})" for name, reason in self.unused.items()]
        return "\n".join([*lines, *self.notes])


def plan(model, names, new_head=False, adapt_channels=False, method="timm"):
    """What `load_weights` would do: (`LoadReport`, {variable: change of its array})."""
    variables = {v.path: tuple(v.shape) for v in model.weights if "seed_generator" not in v.path}
    rows, changes, missing, misfits, used = [], {}, [], [], set()
    for path, shape in variables.items():
        sources = names.sources(path)
        used |= set(sources)
        absent = [name for name in sources if name not in names.shapes]
        originals = tuple(names.originals[name] for name in sources if name in names.shapes)
        optional = new_head and HEAD.match(path)
        if absent or not sources:
            if optional:
                rows.append(Row(path, (), shape, "re-initialised"))
            else:
                missing.append(f"{path} {shape}" + (f" ({', '.join(absent)})" if absent else ""))
            continue
        if uneven(names, path):
            parts = ", ".join(f"{names.originals[n]} {names.shapes[n]}" for n in sources)
            misfits.append(f"{path} takes queries, keys and values of one size, not {parts}")
            continue
        if wrong := other_heads(model, names, path):
            misfits.append(wrong)
            continue
        action, found, change = fit(model, names, path, shape, adapt_channels, method)
        if found != shape and optional:
            action, originals = "re-initialised", ()
            used -= set(sources)
        elif found != shape:
            misfits.append(f"{path} is {shape}, the file has {found} ({', '.join(originals)})")
        rows.append(Row(path, originals, shape, action))
        changes[path] = change or (lambda array: array)
    unused, extra = dict(names.checkpoint.skipped), []
    headless = new_head or not any(path.startswith("head") for path in variables)
    for name in sorted(names.shapes.keys() - used):
        original = names.originals[name]
        reasons = [why for pattern, why in names.scheme.unused if re.search(pattern, name)]
        if headless and is_head_of(names.scheme, name):
            reasons.append("of the head that the checkpoint was trained with")
        if reasons:
            unused[original] = reasons[0]
        else:
            extra.append(f"{original} {names.shapes[name]}")
    differences = {
        "variables for which the file has nothing": missing,
        "of another shape": misfits,
        "arrays for which the model has no place": extra,
    }
    if any(differences.values()):
        listed = "; ".join(
            f"{len(found)} {what}: {', '.join(found[:8])}" + (", ..." if len(found) > 8 else "")
            for what, found in differences.items()
            if found
        )
        raise ValueError(
            f"{names.checkpoint.source} ({names.scheme.name}) does not fit the model "
            f"{model.name!r}, nothing was loaded. {listed}.{hint(misfits)}"
        )
    return LoadReport(names.checkpoint.source, names.scheme.name, rows, unused), changes


def load_weights(model, source, new_head=False, adapt_channels=False, method="timm"):
    """Load a public checkpoint into a model, strictly.

    Args:
        model: a `ViT`, `DeiT` or `TNT`.
        source: a path or "hf:owner/name[@revision]", see `checkpoints.open_checkpoint`. Read are
            timm's, transformers' and torchvision's ViT and DeiT, timm's and the official TNT,
            Google's `.npz`, and our own `.keras` and `.weights.h5`.
        new_head: keep the model's own head where the file's has another number of classes, or
            none; what belongs to the file's head alone is then left out.
        adapt_channels: fit the patch projection to another number of channels, as timm does.
        method: how a position table of another grid is resampled, see `positions.resize`.

    Returns:
        A `LoadReport`: a row for each variable, and what the file holds beyond them.

    Raises:
        FileNotFoundError, ValueError: if the file cannot be read; if a variable would get no
            array or one of another shape, or an array would stay unused. Nothing has been
            assigned then.
        ImportError, ConnectionError: if "hf:" needs a package, or has no connection.

    Example:
        >>> model = ViT("B/16", weights="vit_base_patch16_224.safetensors")  # or
        >>> print(load_weights(model, "vit_base_patch16_224.safetensors"))
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.source.endswith(".weights.h5"):
        checkpoint = weights_h5(checkpoint, model)
    names = recognise(checkpoint)
    report, changes = plan(model, names, new_head, adapt_channels, method)
    assign(model, names, report, changes)
    return report


def assign(model, names, report, changes):
    """Do what was planned: read, lay out and assign one variable after another."""
    variables = {v.path: v for v in model.weights}
    # All blocks' arrays of one kind in a row: a scan holds them in one array.
    for row in sorted(report.rows, key=lambda row: re.sub(r"^block\d+/", "", row.variable)):
        if row.action != "re-initialised":
            array = changes[row.variable](read_ours(names, row.variable))
            array = array.reshape(row.shape)
            if array.ndim == 2 and array.flags.f_contiguous:
                # Backends transpose on all cores; NumPy, copying for them, on one and past caches.
                array = ops.transpose(array.T)
            variables[row.variable].assign(array)


def is_head_of(scheme, name):
    """Whether a name, in the table's spelling, belongs to the classifier."""
    heads = [
        theirs(scheme, f"{layer}/kernel") for layer in ("head", "head_distillation", "pre_logits")
    ]
    stems = [re.sub(r"[./](weight|kernel)$", "", found[0]) for found in heads if found]
    return re.sub(r"[./](weight|kernel|bias)$", "", name) in stems


def uneven(names, path):
    """Whether the parts of a fused projection have sizes that do not go together."""
    sources = names.sources(path)
    sizes = [names.part(path, name) for name in sources]
    return len({(*s[:-1], s[-1] / share) for s, share in zip(sizes, shares(sources))}) > 1


def other_heads(model, names, path):
    """What is wrong where Flax arrays, which keep the heads apart, have another number of them."""
    match = re.match(r"(block\d+|pool)/.*(qkv|key_value)/kernel$", path)
    shape = names.shapes[names.sources(path)[0]]
    if not match or names.scheme.leaves is not FLAX_LEAVES or len(shape) != 3:
        return None
    layer = model.get_layer(match[1])
    heads = getattr(layer, "attention", layer).num_heads
    if shape[1] == heads:
        return None
    return f"{path} has {heads} heads, the file has {shape[1]} ({names.sources(path)[0]})"


def shares(sources):
    """How many equal parts each name stands for: TNT holds queries and keys together."""
    return [2 if re.search(r"\.qk\.\w+$", name) else 1 for name in sources]


def hint(misfits):
    if any("/fold/norm1/" in misfit for misfit in misfits):
        return ' The file has TNT\'s other layout: layout="legacy", or "official".'
    if any(misfit.startswith("head") for misfit in misfits):
        return " For another number of classes, new_head=True keeps the model's own head."
    if any("projection/kernel" in misfit for misfit in misfits):
        return " For another number of channels, adapt_channels=True fits the projection."
    return ""


def read_ours(names, path):
    """A variable's numbers in our layout, float32."""
    parts = []
    for name in names.sources(path):
        array = names.checkpoint.read(names.originals[name])
        array = to_ours(names.scheme, path, array)
        parts.append(array if array.dtype == np.float32 else array.astype("float32"))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
