"""Smaller LiteRT files with ai-edge-quantizer, and which parts of a network bear it.

Parts are those of the lean graph (`edge.PARTS`): "stem", "block00/attention", ..., "head".
"""

import re
from typing import NamedTuple

import numpy as np

from .edge import PARTS

KINDS = ("fp16", "int8", "int8-static")
# TNT's inner layers are too narrow for int8 kernels to pay: they stay float where they are few.
INNER = r"block\d+/inner"
FEW = 0.01  # of the weights; in a published TNT 0.0035, in "Nano" 0.025


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
    """The parts of a float LiteRT file that have weights to quantise: {name: weights}, in order."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(str(path), experimental_op_resolver_type=plain)
    tensors = {t["index"]: t for t in interpreter.get_tensor_details()}
    found = {}
    for operator in interpreter._get_ops_details():
        if operator["op_name"] in ("FULLY_CONNECTED", "CONV_2D"):
            name = tensors[int(operator["outputs"][0])]["name"]
            part = re.search(PARTS, name)
            # What gives the output is named after it, not after its part.
            name = part.group() if part else "head"
            weights = int(np.prod(tensors[int(operator["inputs"][1])]["shape"]))
            found[name] = found.get(name, 0) + weights
    return found


def float_by_default(path):
    """The parts that int8 leaves out unless asked: TNT's inner ones, if they weigh little."""
    found = parts(path)
    inner = [name for name in found if re.match(INNER, name)]
    few = sum(found[name] for name in inner) <= FEW * sum(found.values())
    return inner if few else []


def pattern(part):
    """A part's operators for ai-edge-quantizer."""
    return rf"(^|;){part}/" if part != "head" else rf"^(?!.*({PARTS.removesuffix('|head')})/)"


def activation_ranges(path, samples):
    """The ranges of a float LiteRT file's activations, for "int8-static".

    They are the smallest and largest numbers: `Quantizer.calibrate` averages the photos' ranges, in
    which the first photo weighs most, and outputs beyond the average are cut off.

    Args:
        path: of the file.
        samples: list of what its input takes.
    """
    from ai_edge_quantizer import calibrator, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(quantizer_of(path, "int8-static").get_quantization_recipe())
    found = calibrator.Calibrator(str(path), qsv_update_func=qsv_utils.min_max_update)
    found.calibrate({"serving_default": [{"images": images} for images in samples]}, manager)
    return found.get_model_qsvs()


def quantizer_of(path, kind, keep=(), only=None):
    """ai-edge-quantizer's `Quantizer` of a file, told what to do; see `quantize`."""
    from ai_edge_quantizer import quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName

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
        for part in keep:
            tool.update_quantization_recipe(
                pattern(part), operation, algorithm_key=AlgorithmName.NO_QUANTIZE
            )
    return tool


def quantize(path, kind, keep=(), only=None, ranges=None):
    """A float LiteRT file with smaller weights: bytes.

    Args:
        path: of the float file.
        kind: "fp16": weights of 16 bits; "int8": weights of 8 bits per channel, activations
            quantised as they come; "int8-static": activations too, in `ranges`.
        keep: parts that stay float.
        only: the one part that shall not, or None for all.
        ranges: for "int8-static", see `activation_ranges`.
    """
    if set(parts(path)) <= set(keep):
        return path.read_bytes()
    tool = quantizer_of(path, kind, keep, only)
    found = tool.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    stem = "stem" not in keep and only in (None, "stem")
    return compact(bytes(found.quantized_model), kind if stem else None)


def compact(content, kind=None):
    """The same LiteRT file in fewer bytes.

    Zero points, shapes, options and names that repeat at every operator are written once: in a
    small network an eighth of the file.

    Args:
        content: bytes of the file.
        kind: how a lean graph's table of positions is narrowed, see `narrowed`; None not at all.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    if len(content) > 1 << 30:  # a flatbuffer ends at 2 GiB, and here nothing would show
        return content
    model = flatbuffer_utils.read_model_from_bytearray(content)
    if kind:
        narrowed(model, model.subgraphs[0], kind)
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            shared = re.match(rf"(?:{PARTS})(?=/)|arith\.constant", tensor.name.decode())
            if shared:
                tensor.name = shared.group()
    return packed(model)


def narrowed(model, graph, kind):
    """Make the table of positions int8, a scale for each row, or, with "fp16", float16.

    It is what the stem of a lean graph adds. A DEQUANTIZE comes before the operator that does so;
    XNNPACK carries it out once, on opening.
    """
    from ai_edge_litert import schema_py_generated as schema

    codes = [code.builtinCode for code in model.operatorCodes]
    added = [
        (adding, i)
        for adding in graph.operators
        if codes[adding.opcodeIndex] == schema.BuiltinOperator.ADD
        for i in adding.inputs
    ]
    for adding, i in added:
        table = graph.tensors[i]
        buffer = model.buffers[table.buffer]
        rows = table.shape[0] if len(table.shape) == 2 else 1
        if not table.name.startswith(b"stem/") or buffer.data is None or rows == 1:
            continue
        numbers = np.frombuffer(bytes(buffer.data), "float32").reshape(table.shape)
        small, code, operator = schema.TensorT(), schema.OperatorCodeT(), schema.OperatorT()
        small.name, small.shape, small.buffer = table.name, table.shape, table.buffer
        if kind == "fp16":
            small.type = schema.TensorType.FLOAT16
            numbers = numbers.astype("float16")
        else:
            small.type = schema.TensorType.INT8
            scale = np.maximum(np.abs(numbers).max(axis=1), 1e-30) / 127
            numbers = np.round(numbers / scale[:, None]).astype("int8")
            small.quantization = schema.QuantizationParametersT()
            small.quantization.scale, small.quantization.zeroPoint = scale, np.zeros(len(scale))
        buffer.data = numbers.tobytes()
        table.buffer = 0  # that of tensors which are computed
        code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.DEQUANTIZE
        code.version = 3 if kind == "fp16" else 5  # the first with a scale for each row
        operator.opcodeIndex = len(model.operatorCodes)
        operator.inputs, operator.outputs = [len(graph.tensors)], [i]
        model.operatorCodes.append(code)
        graph.tensors.append(small)
        graph.operators.insert(graph.operators.index(adding), operator)


def packed(model):
    """A model's flatbuffer with equal vectors, strings and options written once: bytes."""
    import flatbuffers

    class Builder(flatbuffers.Builder):
        def CreateNumpyVector(self, x):
            key = x.dtype.str, x.tobytes()
            if key not in known:
                if x.dtype == np.uint8:  # kernels read weights in place, in steps of 16 bytes
                    self.Prep(16, x.nbytes)
                known[key] = super().CreateNumpyVector(x)
            return known[key]

        def CreateString(self, s, *how):
            if s not in known:
                known[s] = super().CreateString(s, *how)
            return known[s]

    class Once(NamedTuple):
        options: object

        def Pack(self, builder):
            key = type(self.options), repr(sorted(vars(self.options).items()))
            if key not in known:
                known[key] = self.options.Pack(builder)
            return known[key]

    known = {}
    for buffer in model.buffers:
        if buffer.data is not None:
            buffer.data = np.frombuffer(bytes(buffer.data), "uint8")
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            tensor.shape = np.array(tensor.shape, "int32")
            numbers = tensor.quantization
            if numbers is not None and numbers.scale is not None:
                numbers.scale = np.array(numbers.scale, "float32")
                numbers.zeroPoint = np.array(numbers.zeroPoint, "int64")
            else:
                tensor.quantization = None
        for operator in graph.operators:
            operator.inputs = np.array(operator.inputs, "int32")
            operator.outputs = np.array(operator.outputs, "int32")
            if operator.builtinOptions is not None:
                operator.builtinOptions = Once(operator.builtinOptions)
    builder = Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def sensitivity(path, kind, evaluate, ranges=None, progress=lambda text: None):
    """Quantise each part alone: a list of `Sensitivity`, the most harmful one first.

    Args:
        path, kind, ranges: as in `quantize`.
        evaluate: function of a LiteRT file's bytes -> its logits (photos, classes).
        progress: called with a line before each part.
    """
    whole = compact(path.read_bytes())
    expected = evaluate(whole)
    rows = []
    names = parts(path)
    for i, part in enumerate(names):
        progress(f"Quantising {part} alone, {i + 1} of {len(names)}")
        new = quantize(path, kind, only=part, ranges=ranges)
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


def within(path, kind, rows, drop, limit, keep=(), ranges=None, progress=lambda text: None):
    """A small file that loses no more than `limit` points: (bytes, parts kept in float).

    For a network that loses more with all parts quantised. Parts return to float, those with most
    noise for each byte saved first, as few as it takes, which bisection finds.

    Args:
        path, kind, keep, ranges: as in `quantize`.
        rows: of `sensitivity`.
        drop: function of a file's bytes -> points it loses.
        limit: of these points.
        progress: called with a line before each file.
    """

    def harm(row):
        return 10 ** (-row.decibels / 10) / max(row.saved, 1)

    order = [row.part for row in sorted(rows, key=harm, reverse=True) if row.part not in keep]
    good, low, high = None, 1, len(order)
    while low <= high:
        count = (low + high) // 2
        progress(f"Keeping {count} of {len(order)} parts in float")
        kept = [*keep, *order[:count]]
        new = quantize(path, kind, keep=kept, ranges=ranges)
        if drop(new) <= limit:
            good, high = (new, kept), count - 1
        else:
            low = count + 1
    if good is None:  # all float and still over: the photos were decided by rounding
        raise RuntimeError(f"no {kind} file loses at most {limit} points.")
    return good
