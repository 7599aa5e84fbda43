"""Open an exported file, run it on photos, compare it with Keras, refuse it if a rule is broken."""

import os
import re
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

# What a float32 file may differ from Keras, relative to the largest logit (at least 1).
FLOAT_TOLERANCE = 1e-4
# Below this cosine of its logits with Keras' a quantised file is broken, not just less exact.
LEAST_COSINE = 0.9
# A class of fewer photos may be taken for another by chance.
LEAST_PHOTOS = 5


class Comparison(NamedTuple):
    """A file against the model it came from, on the same photos.

    Attributes:
        photos: how many.
        max_difference: largest absolute difference of a logit.
        largest_logit: largest absolute logit of the model, the scale of the former.
        cosine: between the two sets of logits, the mean over photos; of one logit over them all.
        agreement: share of photos with the same top-1 class.
        accuracy, keras_accuracy: share of photos that the file, and the model, get right; None
            without labels.
    """

    photos: int
    max_difference: float
    largest_logit: float
    cosine: float
    agreement: float
    accuracy: float | None = None
    keras_accuracy: float | None = None

    @property
    def drop(self):
        """What the file loses, in points: of accuracy, or without labels of agreement."""
        if self.accuracy is None:
            return 100 * (1 - self.agreement)
        return 100 * (self.keras_accuracy - self.accuracy)


def compare(actual, expected, labels=None):
    """Logits of a file and of its model (photos, ...) -> a `Comparison`."""
    a = actual.reshape(len(actual), -1).astype("float64")
    b = expected.reshape(len(expected), -1).astype("float64")
    photos = len(a)
    guessed, known = actual.argmax(-1), expected.argmax(-1)
    if b.shape[1] == 1:  # the cosine of two numbers is 1 or -1: that of all photos' says more
        a, b = a.T, b.T
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same = (a == b).all(axis=1)  # zeros, too, have the direction of zeros
    return Comparison(
        photos,
        float(np.abs(a - b).max()),
        float(np.abs(b).max()),
        float(np.where(same, 1, (a * b).sum(1) / np.maximum(norms, 1e-30)).mean()),
        float((guessed == known).mean()),
        None if labels is None else float((guessed == labels).mean()),
        None if labels is None else float((known == labels).mean()),
    )


def faults(found, quantize=None, min_agreement=None, floor=1.0):
    """The rules of numbers that a `Comparison` breaks: a list of str.

    A float32 file's differences are measured by the largest logit, or by `floor` if that is more;
    0 for probabilities, of which the largest may be small.
    """
    broken = []
    limit = FLOAT_TOLERANCE * max(floor, found.largest_logit)
    if quantize is None and not found.max_difference <= limit:
        broken.append(
            f"it differs from Keras by {found.max_difference:.1e}; {limit:.1e} is allowed"
        )
    if not found.cosine >= LEAST_COSINE:
        broken.append(f"the cosine of its logits with Keras' is {found.cosine:.3f}")
    elif not found.max_difference <= found.largest_logit:
        broken.append(
            f"a logit differs from Keras' by {found.max_difference:.1e}, more than the largest is"
        )
    if min_agreement is not None and not found.agreement >= min_agreement:
        broken.append(
            f"top-1 agreement is {found.agreement:.2%} of {found.photos} photos; "
            f"{min_agreement:.2%} was asked"
        )
    return broken


def swapped(logits, labels, names):
    """Whether names and photos are mixed up: a sentence, or None.

    They are if 7 of 10 photos of some classes, or more, are taken for one another's, in a ring.
    Classes of fewer than `LEAST_PHOTOS` photos prove nothing.
    """
    taken = {}
    for label in np.unique(labels):
        guesses = Counter(logits[labels == label].argmax(-1).tolist())
        guess, count = guesses.most_common(1)[0]
        if guesses.total() >= LEAST_PHOTOS and 10 * count >= 7 * guesses.total():
            taken[int(label)] = guess
    for label in taken:
        ring = [label]
        while taken.get(ring[-1]) not in (None, *ring):
            ring.append(taken[ring[-1]])
        if len(ring) > 1 and taken.get(ring[-1]) == label:
            called = ", ".join(repr(names[i]) for i in ring)
            return f"the classes {called} are taken for one another: are their labels swapped?"
    return None


def structure(path):
    """What a LiteRT file consists of: a dict.

    Keys: "operators" {name: count}, "partitions" (of XNNPACK), "whole" (whether the first of these
    is all there is, but for the cast of pixels to float32), "faults" (the rules of structure that
    are broken: list of str); only the last if the interpreter refuses the file.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    def opened(**options):
        interpreter = Interpreter(str(path), **options)
        interpreter.allocate_tensors()
        return interpreter, interpreter._get_ops_details()

    try:
        delegated, nodes = opened()
        plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        interpreter, operators = opened(experimental_op_resolver_type=plain)
    except (RuntimeError, ValueError) as error:  # an operator that the runtime does not have
        first = first_line(error)
        return {"faults": [f"the interpreter refuses it: {first}"]}
    operators = Counter(node["op_name"] for node in operators)
    partitions = [node for node in nodes if node["op_name"] == "DELEGATE"]
    broken = []
    foreign = sorted(name for name in operators if name not in vars(schema.BuiltinOperator))
    if foreign:
        broken.append(f"operators beyond the built-in ones: {', '.join(foreign)}")
    tensors = [t for t in interpreter.get_tensor_details() if t["name"]]
    dynamic = [t["name"] for t in tensors if -1 in t["shape_signature"]]
    if dynamic:
        broken.append(f"dynamic tensors: {', '.join(dynamic[:3])}")
    high = [t["name"] for t in tensors if len(t["shape"]) > 4]
    if high:
        broken.append(f"tensors of rank 5 or more: {', '.join(high[:3])}")
    return {
        "operators": dict(operators.most_common()),
        "partitions": len(partitions),
        "whole": bool(partitions) and is_whole(delegated, nodes, partitions[0]),
        "faults": broken,
    }


def is_whole(interpreter, nodes, partition):
    """Whether a partition gives the output, from the input or its cast."""

    def indices(details):
        return {int(detail["index"]) for detail in details}

    def ends(node, name):
        return {int(i) for i in node[name]}

    given = indices(interpreter.get_input_details())
    casts = [node for node in nodes if node["op_name"] == "CAST" and ends(node, "inputs") <= given]
    given |= {i for node in casts for i in ends(node, "outputs")}
    computed = {i for node in nodes for i in ends(node, "outputs")}
    return (
        indices(interpreter.get_output_details()) <= ends(partition, "outputs")
        and ends(partition, "inputs") & computed <= given
    )


def open_model(path):
    """Open an exported or saved model as a function: images (B, H, W, C) -> outputs.

    Args:
        path: a `.keras` file (opened in Keras' safe mode), a `.tflite` or `.onnx` file or a
            SavedModel.

    Returns:
        (function of a float32 array, or uint8 for a file that takes pixels; input shape (H, W, C);
        "float32" or "uint8", which of them).

    Raises:
        FileNotFoundError, ValueError: if there is none, or it cannot be read.
        ModuleNotFoundError: if it needs a package that is not installed.
    """
    path = Path(path)
    kind = format_of(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no model at {path}.")
    if kind is None or (kind == "saved_model" and not (path / "saved_model.pb").is_file()):
        raise ValueError(
            f"{path}: expected a .keras, .tflite or .onnx file, or a SavedModel folder."
        )
    openers = {
        "keras": open_keras,
        "litert": open_litert,
        "onnx": open_onnx,
        "saved_model": open_saved_model,
    }
    run, shape, dtype = opened(openers[kind], path)
    if len(shape) != 3 or not all(isinstance(side, int) for side in shape):
        raise ValueError(f"{path}: images (H, W, C) of one size are expected; it takes {shape}.")
    if dtype not in ("float32", "uint8"):
        raise ValueError(f"{path}: float32 or uint8 is expected; it takes {dtype}.")
    return run, shape, dtype


def opened(opener, path):
    """What `opener` makes of a path; an error of any kind becomes one line."""
    try:
        return opener(path)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # readers of four formats, each with its own kinds
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error


def first_line(error):
    return (str(error).strip() or repr(error)).splitlines()[0]


def format_of(path):
    """ "litert", "onnx", "keras" or "saved_model", from a path's suffix; None for another one."""
    known = {".tflite": "litert", ".onnx": "onnx", ".keras": "keras", "": "saved_model"}
    return known.get(Path(path).suffix)


def load_keras(path):
    """The model of a `.keras` file, opened in Keras' safe mode."""
    if not zipfile.is_zipfile(path):  # of which Keras would say that it is not there
        raise ValueError("damaged, or no .keras file: those are zip archives.")
    return keras.models.load_model(path, compile=False)


def check_model(model):
    """Refuse a model that does not map one batch of images to one tensor.

    Raises:
        ValueError: if it has more inputs or outputs, other inputs or reads whole numbers.
    """
    inputs, outputs = (getattr(model, name, None) or [] for name in ("inputs", "outputs"))
    if len(inputs) != 1 or len(outputs) != 1:
        raise ValueError(
            f"A built model with one input and one output is expected; {model.name!r} has "
            f"{len(inputs)} and {len(outputs)}."
        )
    if isinstance(model.compute_output_spec(inputs[0]), dict):
        raise ValueError(f"A tensor is expected as output, not a dict as of {model.name!r}.")
    shape = tuple(inputs[0].shape[1:])
    if len(shape) != 3 or None in shape:
        raise ValueError(
            f"A model of images of one size (H, W, C) is expected; {model.name!r} takes {shape}."
        )
    if not keras.backend.is_float_dtype(inputs[0].dtype):
        raise ValueError(
            f"A model of normalised images is expected; {model.name!r} takes {inputs[0].dtype}: "
            "give it a float32 input."
        )


def open_keras(path):
    model = load_keras(path)
    check_model(model)
    return (lambda x: model.predict(x, verbose=0)), tuple(model.input_shape[1:]), "float32"


def open_saved_model(path):
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        if re.search(r"[*?[]", str(path)):  # TensorFlow would read its name as a pattern
            link = Path(folder) / "model"
            link.symlink_to(path.absolute())
            path = link
        loaded = tf.saved_model.load(str(path))
    serve = loaded.signatures["serving_default"]
    arguments, outputs = serve.structured_input_signature[1], serve.structured_outputs
    if len(arguments) != 1 or len(outputs) != 1:
        raise ValueError(f"it has {len(arguments)} inputs and {len(outputs)} outputs, not one each")
    ((name, given),) = arguments.items()

    def run(images):  # through `loaded`, which keeps the variables alive
        (output,) = loaded.signatures["serving_default"](**{name: tf.constant(images)}).values()
        return output.numpy()

    return (lambda images: in_batches(run, images)), tuple(given.shape[1:]), given.dtype.name


def in_batches(run, images, size=None):
    """A function on any number of images, as many at once as memory bears.

    If it takes batches of one `size` only, the last one is filled up.
    """
    outputs = []
    for start in range(0, len(images), size or 16):
        batch = images[start : start + (size or 16)]
        whole = np.resize(batch, (size, *batch.shape[1:])) if size else batch
        outputs.append(run(whole)[: len(batch)])
    return np.concatenate(outputs)


def open_onnx(path):
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs ONNX Runtime: pip install 'keras-vitnt[onnx]'."
        ) from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]

    def run(images):
        return session.run(None, {given.name: images})[0]

    size = given.shape[0] if isinstance(given.shape[0], int) else None
    dtype = "uint8" if given.type == "tensor(uint8)" else "float32"
    return (lambda images: in_batches(run, images, size)), tuple(given.shape[1:]), dtype


def open_litert(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=os.cpu_count())
    interpreter.allocate_tensors()
    given = interpreter.get_input_details()[0]
    result = interpreter.get_output_details()[0]["index"]
    size, *shape = (int(side) for side in given["shape"])

    def run(images):
        interpreter.set_tensor(given["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(result)

    dtype = np.dtype(given["dtype"]).name
    return (lambda images: in_batches(run, images, size)), tuple(shape), dtype


def latencies(functions, rounds=30, seconds=4.0):
    """Median milliseconds of each function, which take turns: {name: function} -> {name: float}.

    A timed call follows an untimed one, because some runtimes' threads spin on after a call.
    """
    times = {name: [] for name in functions}
    started = time.perf_counter()
    for i in range(rounds):
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
        if i >= 4 and time.perf_counter() - started > seconds:
            break
    return {name: 1e3 * float(np.median(found)) for name, found in times.items()}
