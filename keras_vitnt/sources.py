"""A run's folder, a file, a checkpoint or a hub name -> what is needed to run or export it."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import datasets, images, pretrained
from .checkpoints import is_checkpoint
from .gate import check_model, load_keras, open_model, opened


class Source(NamedTuple):
    """What a name stands for.

    Attributes:
        preprocessing: an `images.Preprocessing`.
        names: of the classes, a list of str; None if nothing tells them.
        data, data_dir: of the data set that it was trained on, see `datasets.load_dataset`; None
            if nothing tells them.
    """

    preprocessing: images.Preprocessing
    names: list | None = None
    data: str | None = None
    data_dir: str | None = None


def recorded(file):
    """The `Source` that stands beside a file of ours; None if nothing does.

    `x.tflite.json` stands beside `x.tflite`, and a run's `metrics.json` beside all of its files.
    """
    own, run = file.with_name(f"{file.name}.json"), file.parent / "metrics.json"
    record = own if own.is_file() else run
    if not record.is_file():
        return None
    try:
        found = json.loads(record.read_text())
        preprocessing = images.check(images.Preprocessing(**found["preprocessing"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{record}, which stands beside {file.name}, is not what this package writes there "
            f"({error}): move one of them."
        ) from None
    if record == own:
        metrics = metrics_of(file.parent)
        if file.name not in metrics.get("files", ()):  # another one's, or exported later
            metrics = {}
        data, data_dir = metrics.get("data"), metrics.get("data_dir")
        return Source(preprocessing, found.get("names"), data, data_dir)
    labels = file.parent / "labels.txt"
    names = labels.read_text("utf-8").rstrip("\n").splitlines() if labels.is_file() else None
    return Source(preprocessing, names, found.get("data"), found.get("data_dir"))


def metrics_of(folder):
    """What a run's `metrics.json` says; {} if a folder has none, or another one's."""
    try:
        found = json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "validation_accuracy" in found else {}


def file_of(name):
    """A run's folder stands for its model."""
    path = Path(name).expanduser()
    return path / "model.keras" if (path / "model.keras").is_file() else path


def open_function(name):
    """Anything that classifies -> (function of normalised images or, if it asks, pixels; `Source`;
    "float32" or "uint8")."""
    if is_checkpoint(name):
        model, source = open_keras_model(name)
        return (lambda x: model.predict(x, verbose=0)), source, "float32"
    file = file_of(name)
    run, shape, dtype = open_model(file)
    source = recorded(file) or Source(images.symmetric(shape))
    fitted = source.preprocessing._replace(size=shape[:2])
    return run, source._replace(preprocessing=fitted), dtype


def open_keras_model(name, image_size=None):
    """A run's folder, `.keras` file, checkpoint or `hf:` name -> (`keras.Model`, `Source`).

    Args:
        name: str or path.
        image_size: (height, width) to build a checkpoint at; None for its own.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it cannot be read.
    """
    if is_checkpoint(name):
        asked = {"input_shape": (*image_size, 3)} if image_size else {}
        model, facts, _ = pretrained.load(name, **asked)
        if facts.get("include_top") is False:
            raise ValueError(f"{name} has no classes: it holds a network without a head.")
        return model, Source(images.Preprocessing(**facts["preprocessing"]), facts["names"])
    file = file_of(name)
    if not file.exists():
        raise FileNotFoundError(f"There is no model at {file}.")
    if file.suffix != ".keras":
        raise ValueError(
            f"{file}: expected a run's folder, a .keras file, a checkpoint or hf:OWNER/NAME."
        )
    model = opened(load_keras, file)
    check_model(model)
    return model, recorded(file) or Source(images.symmetric(model.input_shape[1:]))


def evenly(total, count):
    """At most `count` of the indices below `total`, spread evenly."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(int))


def relabelled(labels, classes, names):
    """Labels that index a data set's `classes`, as a model's `names` (None: the same) count them.

    None if these are other classes.
    """
    if names is None:
        return labels
    if sorted(names) != sorted(classes):
        return None
    return np.array([names.index(classes[label]) for label in labels], int)


def other_classes(names, data, classes):
    """That a model knows other classes than a data set has, as a sentence."""

    def some(names):
        return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")

    return f"The model knows the classes {some(names)}; {data} has {some(classes)}."


def photos_of(source, limit, calibration=0):
    """Photos of a source's data, as the model's size has them.

    Args:
        source: a `Source` with data.
        limit: at most so many of the validation part; `calibration`: of the training part.

    Returns:
        (uint8 (P, H, W, C), labels (P,) as the model counts them or None (see `relabelled`), the
        data's classes, uint8 (Q, H, W, C) or None, list of str that names photos which cannot be
        read).
    """
    train, validation, classes = datasets.load_dataset(source.data, source.data_dir)
    if calibration and not len(train.labels):
        raise ValueError(f"{source.data} leaves no photos for training: none to calibrate on.")

    def decoded(part, count):
        chosen = part.take(evenly(len(part.labels), count))
        good, faults = datasets.decode_all(chosen, source.preprocessing, whole=False)
        batches = datasets.Batches(good, source.preprocessing)
        return np.stack([batches.pixels(i) for i in range(len(good.labels))]), good.labels, faults

    pixels, labels, faults = decoded(validation, limit)
    labels = relabelled(labels, classes, source.names)
    if not calibration:
        return pixels, labels, classes, None, faults
    samples, _, more = decoded(train, calibration)
    return pixels, labels, classes, samples, faults + more
