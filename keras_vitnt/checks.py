"""What an export is asked for, checked before anything slow, or written, begins."""

import json
import operator
import re
from importlib.util import find_spec
from numbers import Integral

import numpy as np

from . import edge, images, quantize
from .gate import format_of

ONNX = ("onnxruntime", "tf2onnx")
SUFFIXES = (".tflite", ".onnx", ".keras")
# What TensorFlow and Keras write into a SavedModel's folder.
SAVED_MODEL_FILES = {
    *("saved_model.pb", "fingerprint.pb", "keras_metadata.pb"),
    *("variables", "assets", "assets.extra", "debug"),
}


def check_targets(
    targets,
    graph,
    *,
    batch_size=1,
    input="float",
    min_agreement=None,
    max_drop=None,
    keep_float=None,
    sensitivity=False,
):
    """Refuse what fits no model before anything slow, or written, begins."""
    if graph not in ("lean", "plain"):
        raise ValueError(f'`graph` must be "lean" or "plain"; got {graph!r}.')
    if input not in ("float", "uint8"):
        raise ValueError(f'`input` must be "float" or "uint8"; got {input!r}.')
    valid = isinstance(batch_size, Integral) and not isinstance(batch_size, bool)
    if not valid or batch_size < 1:
        raise ValueError(f"`batch_size` must be a positive whole number; got {batch_size!r}.")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise ValueError(f"`min_agreement` is a share, 0 to 1, such as 0.99; got {min_agreement}.")
    if max_drop is not None and not max_drop >= 0:
        raise ValueError(f"`max_drop` is in points, 0 or more, such as 0.5; got {max_drop}.")
    if isinstance(keep_float, str):
        raise ValueError(f"`keep_float` is a list of parts, such as ['stem']; got {keep_float!r}.")
    for part in keep_float or []:
        if not re.fullmatch(edge.PARTS, part):
            raise ValueError(
                f"There is no part {part!r} to keep in float; parts are stem, head and, of block "
                "00 on, block00/attention, block00/mlp, block00/inner, block00/fold."
            )
    by_part = max_drop is not None or keep_float is not None or sensitivity
    for path, kind in targets.items():
        form = format_of(path)
        if form is None or path.name in ("", "..", *SUFFIXES):
            raise ValueError(
                f"Unknown format of {path}: expected a name that ends in .tflite, .onnx or .keras, "
                "or a folder's name without suffix for a SavedModel."
            )
        absent = [name for name in ONNX if form == "onnx" and find_spec(name) is None]
        if absent:
            raise ModuleNotFoundError(f"{path} needs {absent[0]}: pip install 'keras-vitnt[onnx]'.")
        if path.is_dir():
            check_replaces(path, form)
        if path.is_file() and form == "saved_model":
            raise ValueError(f"{path} is a file; a SavedModel's folder does not replace it.")
        beside = report_of(path)
        if beside.exists() and not is_report(beside):
            raise ValueError(f"{beside}, where the report goes, is something else: it stays.")
        if kind not in (None, *quantize.KINDS) or (kind and form != "litert"):
            raise ValueError(
                f"quantize={kind!r} of {path}: expected None, or one of "
                f"{', '.join(quantize.KINDS)} for a .tflite file."
            )
        if by_part and not (kind and graph == "lean"):
            raise ValueError(
                "max_drop, keep_float and sensitivity are of a quantised file with the lean graph; "
                f"{path} is not one."
            )
        if form == "keras" and (input == "uint8" or min_agreement is not None):
            raise ValueError(
                f'input="uint8" and min_agreement are of exported files; {path} is Keras\' own.'
            )


def report_of(path):
    """Where the report of a file stands."""
    return path.with_name(f"{path.name}.json")


def check_replaces(folder, form):
    """Refuse to replace a folder, but by a SavedModel if it is one or empty.

    Raises:
        ValueError: if the folder holds something else, or the `gate.format_of` is a file's.
    """
    names = {path.name for path in folder.iterdir()}
    foreign = sorted(names - SAVED_MODEL_FILES if "saved_model.pb" in names else names)
    if form != "saved_model" or foreign:
        holds = f" ({', '.join(foreign[:3])})" if foreign else ""
        raise ValueError(f"{folder} is a folder of something else{holds}; it is not replaced.")


def is_report(path):
    """Whether a file is a report that an earlier export left."""
    try:
        return "comparison" in json.loads(path.read_text())
    except (OSError, ValueError, TypeError):
        return False


def check_arrays(model, targets, names, photos=None, labels=None, calibration=None):
    """Refuse photos, labels and names that do not fit the model or each other."""
    shape, classes = model.input_shape[1:], model.output_shape[-1]
    for name, pixels in (("photos", photos), ("calibration", calibration)):
        if pixels is not None and (
            pixels.dtype != np.uint8 or pixels.shape[1:] != shape or not len(pixels)
        ):
            raise ValueError(
                f"`{name}` must be uint8 (P, {', '.join(map(str, shape))}), one or more; got "
                f"{pixels.dtype} {pixels.shape}."
            )
    if labels is not None:
        if len(model.output_shape) != 2 or classes < 2:
            raise ValueError(
                "`labels` are of a model with logits of two classes or more; the output of "
                f"{model.name!r} is {model.output_shape[1:]}."
            )
        count = 0 if photos is None else len(photos)
        valid = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
        if not valid or len(labels) != count or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"`labels` are a whole number of 0 to {classes - 1} for each of `photos`; got "
                f"{labels.dtype} {labels.shape} for {count} photos: {np.unique(labels)[:8]}."
            )
    if names is not None and len(names) != classes:
        raise ValueError(f"The model has {classes} classes; got {len(names)} names.")
    if calibration is None and "int8-static" in targets.values():
        raise ValueError(
            "int8-static needs photos of the training data: name them by photos (--photos "
            "folder:PATH), pass calibration=..., or export a run's folder."
        )


def fitted(preprocessing, model):
    """The `images.Preprocessing` at a model's size; pixels in -1..1 if none is given."""
    *size, channels = model.input_shape[1:]
    if isinstance(preprocessing, dict):  # as the report beside a file has it
        try:
            preprocessing = images.Preprocessing(**preprocessing)
        except TypeError as error:
            raise ValueError(f"`preprocessing`: {error}") from None
    if not isinstance(preprocessing, images.Preprocessing | None):
        raise ValueError(
            f"`preprocessing` is an images.Preprocessing or a dict of one; got {preprocessing!r}."
        )
    found = images.check(preprocessing or images.symmetric(model.input_shape[1:]))
    if len(found.mean) != channels:
        raise ValueError(
            f"`preprocessing` needs a mean and a std for each of the model's {channels} channels; "
            f"got {found.mean} and {found.std}."
        )
    return found._replace(size=tuple(size))


def check_names(names):
    """Names of classes as a list of str; None for None."""
    if names is None:
        return None
    valid = not isinstance(names, str | dict | set) and hasattr(names, "__len__")
    if not valid or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`names` is a list of str, one for each class; got {names!r}.")
    return [str(name) for name in names]


def sides(image_size):
    """(height, width) of an `image_size`, which is checked."""
    try:
        height, width = map(operator.index, image_size)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise ValueError(f"`image_size` is (height, width), 1 or more; got {image_size!r}.")
    return height, width
