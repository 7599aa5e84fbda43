"""Smaller LiteRT files with ai-edge-quantizer, and which parts of a network bear it.

Parts are those of the lean graph (`edge.PARTS`): "stem", "block00/attention", ..., "head".
"""

import re
from typing import NamedTuple

import numpy as np

from .edge import PARTS

KINDS = ("fp16", "int8", "int8-static")
# TNT's inner layers are a hundredth of the weights, and too narrow for int8 kernels to pay.
FLOAT_BY_DEFAULT = r"block\d+/inner"


class Sensitivity(NamedTuple):
    """What quantising one part alone does.

    Attributes:
        part: its name.
        saved: bytes that the file becomes smaller.
        decibels: signal-to-noise ratio of the logits.
        agreement: share of photos with the same top-1 class.
    """

    part: str
    saved: int
    decibels: float
    agreement: float


def parts(path):
    """The names of the parts in a float LiteRT file that have weights to quantise, in order."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(str(path), experimental_op_resolver_type=plain)
    names = {t["index"]: t["name"] for t in interpreter.get_tensor_details()}
    found = []
    for operator in interpreter._get_ops_details():
        if operator["op_name"] in ("FULLY_CONNECTED", "CONV_2D"):
            name = names[int(operator["outputs"][0])]
            part = re.search(PARTS, name)
            # What gives the output is named after it, not after its part.
            found.append(part.group() if part else "head")
    return list(dict.fromkeys(found))


def quantisable(path):
    return [name for name in parts(path) if not re.match(FLOAT_BY_DEFAULT, name)]


def pattern(part):
    """A part's operators for ai-edge-quantizer."""
    return rf"(^|;){part}/" if part != "head" else rf"^(?!.*({PARTS.removesuffix('|head')})/)"


def quantize(path, kind, keep=(), only=None, calibration=None):
    """A float LiteRT file with smaller weights: bytes.

    Args:
        path: of the float file.
        kind: "fp16": weights of 16 bits; "int8": weights of 8 bits per channel, activations
            quantised as they come; "int8-static": activations too, in ranges seen before.
        keep: parts that stay float.
        only: the one part that shall not, or None for all.
        calibration: for "int8-static", list of what the file's input takes.
    """
    from ai_edge_quantizer import quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName

    if set(quantisable(path)) <= set(keep):
        return path.read_bytes()
    tool = quantizer.Quantizer(str(path))
    where = ".*" if only is None else pattern(only)
    for operation in (TFLOperationName.FULLY_CONNECTED, TFLOperationName.CONV_2D):
        if kind == "fp16":
            tool.add_weight_only_config(
                where, operation, num_bits=16, algorithm_key=AlgorithmName.FLOAT_CASTING
            )
        elif kind == "int8":
            tool.add_dynamic_config(where, operation, num_bits=8)
        else:
            tool.add_static_config(where, operation, activation_num_bits=8, weight_num_bits=8)
        floats = [pattern(part) for part in keep]
        if only is None and kind != "fp16":
            floats.append(FLOAT_BY_DEFAULT)
        for part in floats:
            tool.update_quantization_recipe(
                part, operation, algorithm_key=AlgorithmName.NO_QUANTIZE
            )
    ranges = None
    if kind == "int8-static":
        samples = [{"images": images} for images in calibration]
        ranges = tool.calibrate({"serving_default": samples})
    found = tool.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(found.quantized_model)


def sensitivity(path, kind, evaluate, calibration=None, progress=lambda text: None):
    """Quantise each part alone: a list of `Sensitivity`, the most harmful one first.

    Args:
        path, kind, calibration: as in `quantize`.
        evaluate: function of a LiteRT file's bytes -> its logits (photos, classes).
        progress: called with a line before each part.
    """
    whole = path.read_bytes()
    expected = evaluate(whole)
    rows = []
    names = quantisable(path)
    for i, part in enumerate(names):
        progress(f"Quantising {part} alone, {i + 1} of {len(names)}")
        new = quantize(path, kind, only=part, calibration=calibration)
        logits = evaluate(new)
        noise = max(float(((logits - expected) ** 2).sum()), 1e-30)
        rows.append(
            Sensitivity(
                part,
                len(whole) - len(new),
                10 * float(np.log10(float((expected**2).sum()) / noise)),
                float((logits.argmax(-1) == expected.argmax(-1)).mean()),
            )
        )
    return sorted(rows, key=lambda row: row.decibels)


def within(path, kind, rows, drop, limit, keep=(), calibration=None, progress=lambda text: None):
    """The smallest file that loses no more than `limit` points: (bytes, parts kept in float).

    The parts are set free from quantisation in the order of the noise they make for the bytes
    they save, as few as it takes, by bisection.

    Args:
        path, kind, keep, calibration: as in `quantize`.
        rows: of `sensitivity`.
        drop: function of a file's bytes -> points it loses.
        limit: of these points.
        progress: called with a line before each file.
    """

    def harm(row):
        return 10 ** (-row.decibels / 10) / max(row.saved, 1)

    order = [row.part for row in sorted(rows, key=harm, reverse=True) if row.part not in keep]
    good, low, high = None, 0, len(order)
    while low <= high:
        count = 0 if low == 0 and good is None and high == len(order) else (low + high) // 2
        progress(f"Keeping {count} of {len(order)} parts in float")
        kept = [*keep, *order[:count]]
        new = quantize(path, kind, keep=kept, calibration=calibration)
        if drop(new) <= limit:
            good, high = (new, kept), count - 1
        else:
            low = count + 1
    if good is None:  # all float and still over: the photos were decided by rounding
        raise RuntimeError(f"no {kind} file loses at most {limit} points.")
    return good
