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


def export(model, path, quantize=None):
    """Write a model for use without this package, in float32.

    Args:
        model: a `keras.Model` with one input and one output, on any backend.
        path: `x.tflite` (LiteRT, batch 1, built-in operators only), `x.keras`, or a folder
            (SavedModel, any batch; its function is `serve`).
        quantize: None, or "int8" for a `.tflite` with int8 weights and float activations.

    Returns:
        The path.

    Raises:
        ValueError: for an unknown format or quantisation.
        RuntimeError: if the conversion fails; no file is left then.

    Example:
        >>> export(model, "model_int8.tflite", quantize="int8")
    """
    return export_all(model, {path: quantize})[0]


def export_all(model, targets):
    """Several exports of one model in one conversion process: {path: quantize} -> [path]."""
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
            [sys.executable, "-m", "keras_vitnt.export", str(plain), *pairs],
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


def write_litert(model, path, quantize):
    import tensorflow as tf

    signature = [keras.InputSpec(shape=(1, *model.input_shape[1:]), dtype="float32")]
    builtins = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}
    with tempfile.TemporaryDirectory() as folder:
        plain = str(Path(folder) / "model.tflite")
        model.export(
            plain, format="litert", input_signature=signature, target_spec=builtins, verbose=False
        )
        if quantize:
            from ai_edge_quantizer import quantizer, recipe

            tool = quantizer.Quantizer(plain, recipe.dynamic_wi8_afp32())
            Path(plain).write_bytes(bytes(tool.quantize().quantized_model))
        shutil.move(plain, path)


def write(model, path, quantize):
    """Write one file under a temporary name beside the target, then put it in place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        new = Path(folder) / path.name
        if format_of(path) == "litert":
            write_litert(model, new, quantize)
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
    parser.add_argument("model")
    parser.add_argument("targets", nargs="+")
    arguments = parser.parse_args()
    from . import tnt, vit  # noqa: F401  registers the layers that the file names

    model = keras.models.load_model(arguments.model, compile=False)
    for target in arguments.targets:
        path, _, quantize = target.rpartition("=")
        write(model, path, quantize or None)


if __name__ == "__main__":
    main()
