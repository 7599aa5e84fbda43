"""SavedModel and LiteRT from any backend; then run the file and compare.

Conversion runs under TensorFlow in a process of its own: JAX cannot write LiteRT files, and
TensorFlow's converter never gives its memory back.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

from . import edge

# What a float32 file may differ from Keras, relative to the largest logit (at least 1).
FLOAT_TOLERANCE = 1e-4


class Comparison(NamedTuple):
    """A file against the model it came from, on the same images.

    Attributes:
        max_difference: largest absolute difference of a logit.
        largest_logit: largest absolute logit of the model, the scale of the former.
        agreement: share of images with the same top-1 class.
    """

    max_difference: float
    largest_logit: float
    agreement: float


def format_of(path):
    """ "litert", "keras" or "saved_model", from a path's suffix."""
    return {".tflite": "litert", ".keras": "keras", "": "saved_model"}.get(Path(path).suffix)


def export(model, path, quantize=None, graph="lean"):
    """Write a model for use without this package, in float32.

    A LiteRT file passes a gate first: built-in operators only, no dynamic tensor, rank 4 at most,
    one XNNPACK partition (of `graph="lean"`), and in float32 the model's numbers on real photos
    within 1e-4 of the largest logit (at least 1).

    Args:
        model: a `keras.Model` with one input and one output, on any backend.
        path: `x.tflite` (LiteRT, batch 1, built-in operators only), `x.keras`, or a folder
            (SavedModel, any batch; its function is `serve`).
        quantize: None, or "int8" for a `.tflite` with int8 weights and float activations.
        graph: of a `.tflite`: "lean", the network rewritten for XNNPACK (see `edge`), for a `ViT`,
            `DeiT` or `TNT`; or "plain", as Keras exports it, for any model.

    Returns:
        The path.

    Raises:
        ValueError: for an unknown format, quantisation or graph.
        RuntimeError: if the conversion fails or the gate refuses the file; no file is left then.

    Example:
        >>> export(model, "model_int8.tflite", quantize="int8")
    """
    return export_all(model, {path: quantize}, graph)[0]


def export_all(model, targets, graph="lean"):
    """Several exports of one model in one conversion process: {path: quantize} -> [path]."""
    if graph not in ("lean", "plain"):
        raise ValueError(f'`graph` must be "lean" or "plain"; got {graph!r}.')
    litert = any(format_of(path) == "litert" for path in targets)
    if litert and graph == "lean":
        edge.check(model)
    for path, quantize in targets.items():
        kind = format_of(path)
        if kind is None:
            raise ValueError(
                f"Unknown format of {path}: expected a name that ends in .tflite or .keras, or a "
                "folder's name without suffix for a SavedModel."
            )
        if quantize not in (None, "int8") or (quantize and kind != "litert"):
            raise ValueError(
                f'quantize={quantize!r} of {path}: expected None, or "int8" for a .tflite file.'
            )
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "model.keras"
        copy(model, "float32").save(plain)
        pairs = [f"{Path(path)}={quantize or ''}" for path, quantize in targets.items()]
        environment = dict(
            os.environ,
            KERAS_BACKEND="tensorflow",
            CUDA_VISIBLE_DEVICES="-1",
            TF_CPP_MIN_LOG_LEVEL="3",
        )
        result = subprocess.run(
            [sys.executable, "-m", "keras_vitnt.export", "--graph", graph, str(plain), *pairs],
            env=environment,
            capture_output=True,
            text=True,
        )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"The export under TensorFlow failed: {last}\n{result.stderr}")
    return [Path(path) for path in targets]


def copy(model, dtype=None):
    """The same layers and weights without optimizer and loss; under another policy if named."""

    def rename(value):
        if isinstance(value, dict):
            if value.get("class_name") == "DTypePolicy":
                return {**value, "config": {"name": dtype}}
            return {key: rename(item) for key, item in value.items()}
        return [rename(item) for item in value] if isinstance(value, list | tuple) else value

    config = model.get_config()
    clone = type(model).from_config(rename(config) if dtype else config)
    clone.set_weights(model.get_weights())
    return clone


def write_litert(model, path, quantize, graph):
    import tensorflow as tf

    shape = (1, *model.input_shape[1:])
    if graph == "plain":
        model.export(
            str(path),
            format="litert",
            input_signature=[keras.InputSpec(shape=shape, dtype="float32")],
            target_spec={"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]},
            verbose=False,
        )
    else:
        run = tf.function(edge.lean(model), [tf.TensorSpec(shape, tf.float32, name="images")])
        with tempfile.TemporaryDirectory() as folder:
            signatures = {"serving_default": run.get_concrete_function()}
            tf.saved_model.save(tf.Module(), folder, signatures)
            converter = tf.lite.TFLiteConverter.from_saved_model(folder)
            path.write_bytes(converter.convert())
    if quantize:
        from ai_edge_quantizer import quantizer, recipe

        tool = quantizer.Quantizer(str(path), recipe.dynamic_wi8_afp32())
        path.write_bytes(bytes(tool.quantize().quantized_model))


def faults(path, partitions=1):
    """What a LiteRT file has that phones and boards may not run, or not fast: a list of str.

    Args:
        path: of the file.
        partitions: how many XNNPACK partitions it may have; None for any number.
    """
    from ai_edge_litert.interpreter import Interpreter

    found = []
    try:
        interpreter = Interpreter(str(path))
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:  # an operator that the runtime does not have
        return [f"the interpreter refuses it: {str(error).strip().splitlines()[0]}"]
    names = [operator["op_name"] for operator in interpreter._get_ops_details()]
    foreign = sorted({name for name in names if name.startswith("Flex") or name == "CUSTOM"})
    if foreign:
        found.append(f"operators beyond the built-in ones: {', '.join(foreign)}")
    tensors = [t for t in interpreter.get_tensor_details() if t["name"]]
    dynamic = [t["name"] for t in tensors if -1 in t["shape_signature"]]
    if dynamic:
        found.append(f"dynamic tensors: {', '.join(dynamic[:3])}")
    high = [t["name"] for t in tensors if len(t["shape"]) > 4]
    if high:
        found.append(f"tensors of rank 5 or more: {', '.join(high[:3])}")
    if partitions is not None and names.count("DELEGATE") != partitions:
        found.append(f"{names.count('DELEGATE')} XNNPACK partitions, not {partitions}")
    return found


def gate(model, path, quantize, graph):
    """Refuse a LiteRT file that breaks a rule or does not compute what its model does.

    Raises:
        RuntimeError: with the rules that are broken.
    """
    broken = faults(path, 1 if graph == "lean" else None)
    if not broken and not quantize:
        photos = real_photos(model.input_shape[1:])
        expected = np.concatenate([model(photo[None]) for photo in photos])
        found = compare(expected, path, photos)
        if not found.max_difference <= FLOAT_TOLERANCE * max(1.0, found.largest_logit):
            broken = [f"it differs from Keras by {found.max_difference:.1e}"]
    if broken:
        raise RuntimeError(f"{Path(path).name} is refused: {'; '.join(broken)}.")


def real_photos(shape, count=4):
    """Some of the embedded photos as images (count, H, W, C) in -1..1."""
    from . import datasets, images

    sources = datasets.load_dataset("embedded")[1].sources
    height, width, channels = shape
    chosen = sources[:: len(sources) // count][:count]
    photos = np.stack([images.load(x, images.Preprocessing((height, width))) for x in chosen])
    return np.resize(photos.transpose(3, 0, 1, 2), (channels, *photos.shape[:3])).transpose(
        1, 2, 3, 0
    )


def write(model, path, quantize, graph):
    """Write one file under a temporary name beside the target, then put it in place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        new = Path(folder) / path.name
        if format_of(path) == "litert":
            write_litert(model, new, quantize, graph)
            gate(model, new, quantize, graph)
        elif format_of(path) == "keras":
            model.save(new)
        else:
            model.export(str(new), format="tf_saved_model", verbose=False)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(new, path)


def open_model(path):
    """Open an exported or saved model as a function: images (B, H, W, C) -> outputs.

    Args:
        path: a `.keras` file (opened in Keras' safe mode), a `.tflite` file or a SavedModel.

    Returns:
        (function of a float32 array, input shape (H, W, C)).

    Raises:
        FileNotFoundError, ValueError: if there is none, or it cannot be read.
    """
    path = Path(path)
    kind = format_of(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no model at {path}.")
    if kind is None or (kind == "saved_model" and not (path / "saved_model.pb").is_file()):
        raise ValueError(f"{path}: expected a .keras or .tflite file, or a SavedModel folder.")
    try:
        return {"keras": open_keras, "litert": open_litert, "saved_model": open_saved_model}[kind](
            path
        )
    except Exception as error:  # readers of three formats, each with its own kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"{path} cannot be read: {first}") from error


def open_keras(path):
    from . import tnt, vit  # noqa: F401  registers the layers that the file names

    model = keras.models.load_model(path, compile=False)
    return (lambda images: model.predict(images, verbose=0)), tuple(model.input_shape[1:])


def open_saved_model(path):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    _, arguments = loaded.signatures["serving_default"].structured_input_signature
    shape = tuple(next(iter(arguments.values())).shape[1:])
    return (lambda images: loaded.serve(tf.convert_to_tensor(images)).numpy()), shape


def open_litert(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=os.cpu_count())
    interpreter.allocate_tensors()
    given = interpreter.get_input_details()[0]
    result = interpreter.get_output_details()[0]["index"]

    def run(images):
        outputs = []
        for image in images:
            interpreter.set_tensor(given["index"], image[None])
            interpreter.invoke()
            outputs.append(interpreter.get_tensor(result)[0])
        return np.stack(outputs)

    return run, tuple(int(side) for side in given["shape"][1:])


def compare(expected, path, images):
    """Run a file on images and compare with the outputs expected of it: a `Comparison`."""
    actual = open_model(path)[0](images)
    return Comparison(
        float(np.abs(actual - expected).max()),
        float(np.abs(expected).max()),
        float((actual.argmax(-1) == expected.argmax(-1)).mean()),
    )


def main():
    """The conversion process: `python -m keras_vitnt.export MODEL.keras PATH=QUANTIZE ...`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--graph", default="lean")
    parser.add_argument("model")
    parser.add_argument("targets", nargs="+")
    arguments = parser.parse_args()
    from . import tnt, vit  # noqa: F401  registers the layers that the file names

    model = keras.models.load_model(arguments.model, compile=False)
    for target in arguments.targets:
        path, _, quantize = target.rpartition("=")
        write(model, path, quantize or None, arguments.graph)


if __name__ == "__main__":
    main()
