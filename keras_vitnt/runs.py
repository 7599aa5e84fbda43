"""What a training leaves in its folder: files, comparisons, pictures, figures."""

import csv
import json
import shutil

import numpy as np

from . import explain, images, report, sources
from .export import copy, export_all

PICTURES = ("curves.png", "confusion.png", "attention.png")
EXPORTS = {"saved_model": None, "model.tflite": None, "model_int8.tflite": "int8"}
# All that a run leaves in its folder; `backup` until the training is complete.
RUN_FILES = (
    *("backup", "history.csv", "labels.txt", "metrics.json", "model.keras", *PICTURES),
    *(*EXPORTS, *(f"{name}.json" for name in EXPORTS)),
)
COMPARED = 2000  # photos that the files are run on, at most


def check_replaces(folder):
    """Refuse to train in place of anything but a run's folder or an empty one.

    Raises:
        FileExistsError: if something else stands there.
    """
    backup = folder / "backup"
    if backup.exists():  # another one's: Keras would take it for its own and remove it
        ours = (backup / "options.json").is_file()
    else:
        empty = folder.is_dir() and not any(folder.iterdir())
        ours = empty or bool(sources.metrics_of(folder))
    if not ours:
        raise FileExistsError(f"{folder} is no run's folder and is not replaced: name another one.")


def clear(folder):
    """Remove what a run left in its folder, and nothing else."""
    for path in (folder / name for name in RUN_FILES):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def finish(model, validation, originals, classes, folder, record):
    """Everything after the training: files, comparisons, pictures, metrics, summary.

    `originals` has the validation photos at full size, for the pictures: {name: source}.
    """
    labels = validation.photos.labels
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in classes), "utf-8")
    predicted = model.predict(validation, verbose=0).argmax(-1)
    record["validation_accuracy"] = float((predicted == labels).mean())
    copy(model).save(folder / "model.keras")

    def write():
        (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")

    write()  # before the files: what was trained is kept even if one of them is refused
    draw(model, validation, originals, classes, predicted, folder)
    shown = sources.evenly(len(labels), COMPARED)
    found = export_all(
        model,
        {folder / name: kind for name, kind in EXPORTS.items()},
        preprocessing=validation.preprocessing,
        names=classes,
        photos=np.stack([validation.pixels(i) for i in shown]),
        labels=labels[shown],
    )
    record["files"] = {
        file.path.name: {"bytes": file.bytes, **file.comparison._asdict()} for file in found
    }
    write()
    title = f"{folder}: validation accuracy {record['validation_accuracy']:.2%}"
    report.print_exports(found, title)
    pictures = ", ".join(name for name in PICTURES if (folder / name).exists())
    print(f"Trained in {record['training_seconds']:.0f} s. Look at {pictures} there.")
    print(f"Next: keras-vitnt predict {folder} PHOTO...")


def draw(model, validation, originals, classes, predicted, folder):
    with open(folder / "history.csv") as file:
        rows = list(csv.DictReader(file))
    labels = validation.photos.labels
    if rows:
        history = {name: [float(row[name]) for row in rows] for name in rows[0]}
        report.picture_curves(history).savefig(folder / PICTURES[0], dpi=120)
    matrix = report.confusion(labels, predicted, len(classes))
    report.picture_confusion(matrix, classes).savefig(folder / PICTURES[1], dpi=120)
    shown = [np.flatnonzero(labels == label)[0] for label in np.unique(labels)[:8]]
    height, width = validation.preprocessing.size
    larger = max(1, 160 // min(height, width))  # people see more than a small model does
    sharp = validation.preprocessing._replace(size=(larger * height, larger * width))
    pixels = [
        images.fit(images.decode(originals[name]), sharp)
        for name in (validation.photos.names[i] for i in shown)
    ]
    titles = [
        classes[labels[i]]
        if labels[i] == predicted[i]
        else f"{classes[labels[i]]}\ntaken for {classes[predicted[i]]}"
        for i in shown
    ]
    x = np.stack([validation.pixels(i) for i in shown])
    x = images.normalize(x, validation.preprocessing)
    explain.picture_attention(model, x, pixels, titles).savefig(folder / PICTURES[2], dpi=120)
