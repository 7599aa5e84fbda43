"""The command line: arguments in, one call each, tables and files out."""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import keras
import numpy as np

from . import benchmark, datasets, explain, images, models, report, training
from .export import compare, copy, export_all, open_model
from .weights import load_weights

PICTURES = ("curves.png", "confusion.png", "attention.png")
# What a float32 file may differ from Keras, relative to the largest logit (at least 1).
FLOAT_TOLERANCE = 1e-4


def parser():
    main = argparse.ArgumentParser(
        prog="keras-vitnt",
        description="ViT and TNT for Keras 3: train on photos, ship SavedModel and LiteRT.",
    )
    main.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, function, help, examples):
        new = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  keras-vitnt {line}" for line in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        new.set_defaults(function=function)
        new.add_argument(
            "--backend",
            choices=("tensorflow", "jax", "torch"),
            help="run on this backend (default: KERAS_BACKEND, else Keras' own choice)",
        )
        return new

    def data_options(new):
        new.add_argument(
            "--data",
            default="embedded",
            help="embedded, folder:PATH (a folder per class, or train/ and validation/ with "
            "such folders) or tfds:NAME (default: %(default)s, photos of hand signs)",
        )
        new.add_argument("--data-dir", help="where TensorFlow Datasets keeps its sets")
        new.add_argument("--batch-size", type=positive, default=32, help="default: %(default)s")

    new = command(
        "train",
        train,
        "train a classifier, export it, compare the files, draw pictures",
        [
            "train",
            "train --data folder:photos --image-size 64 --epochs 100",
            "train --model vit:Nano/4 --data tfds:cifar10 --epochs 20 --output saved_models/cifar",
            "train --resume            # go on after Ctrl-C",
        ],
    )
    data_options(new)
    new.add_argument("--model", default="tnt:Nano/8", help="FAMILY:SIZE/PATCH or timm's name")
    new.add_argument("--weights", help="checkpoint to start from; its head may be another's")
    new.add_argument("--epochs", type=positive, default=28, help="default: %(default)s")
    new.add_argument(
        "--image-size", type=image_size, help="SIDE or HEIGHTxWIDTH (default: the model's, or 32)"
    )
    new.add_argument(
        "--lr", type=float, help="peak learning rate (default: 3e-3; 1e-4 with --weights)"
    )
    new.add_argument("--weight-decay", type=float, default=0.1, help="default: %(default)s")
    new.add_argument("--drop-path", type=float, default=0.0, help="default: %(default)s")
    new.add_argument(
        "--augment", type=float, default=1.0, help="strength of augmentation, 0 for none: 1.0"
    )
    new.add_argument("--flip", action="store_true", help="mirror half of the photos")
    new.add_argument("--mixed-precision", action="store_true", help="compute in bfloat16")
    new.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    new.add_argument("--output", type=Path, help="folder (default: saved_models/MODEL-DATA)")
    new.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    new.add_argument("--resume", action="store_true", help="go on with an interrupted run")

    new = command(
        "predict",
        predict,
        "name what photos show: the five most probable classes of each",
        [
            "predict saved_models/signs hand.jpg",
            "predict saved_models/signs/model_int8.tflite a.jpg b.jpg",
        ],
    )
    new.add_argument("model", type=Path, help="run folder, .keras, .tflite or SavedModel")
    new.add_argument("images", nargs="+", type=Path)
    new.add_argument("--top", type=positive, default=5, help="default: %(default)s")

    new = command(
        "evaluate",
        evaluate,
        "measure a model or file on a data set's validation part",
        ["evaluate saved_models/signs", "evaluate saved_models/signs/model_int8.tflite"],
    )
    new.add_argument("model", type=Path, help="run folder, .keras, .tflite or SavedModel")
    data_options(new)

    command(
        "models", list_models, "list the variants with parameters and multiply-adds", ["models"]
    )

    new = command(
        "shapes",
        shapes,
        "walk images through a network and print each stage's shape",
        ["shapes vit:B/16 --batch 16 --classes 10", "shapes tnt:S/16"],
    )
    new.add_argument("model", help="FAMILY:SIZE/PATCH or timm's name")
    new.add_argument("--batch", type=positive, default=1, help="default: %(default)s")
    new.add_argument("--classes", type=positive, default=1000, help="default: %(default)s")
    new.add_argument("--image-size", type=image_size, help="SIDE or HEIGHTxWIDTH")
    return main


def positive(text):
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def image_size(text):
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"expected SIDE or HEIGHTxWIDTH in pixels, got {text!r}")
    return int(sides[0]), int(sides[-1])


def shaped(name, size, default=None):
    """The `input_shape` option for a model: the asked size, the name's own, or the default."""
    size = size or (None if "input_shape" in models.parse_name(name)[2] else default)
    return {"input_shape": (*size, 3)} if size else {}


def check_backend(name):
    """Run again under another backend: Keras reads its choice once, when it is imported."""
    if not name or name == keras.backend.backend():
        return
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(
            f"--backend {name} needs {name}: pip install 'keras-vitnt[{name}]'."
        )
    sys.stdout.flush()
    command = [sys.executable, "-m", "keras_vitnt", *sys.argv[1:]]
    os.execve(sys.executable, command, dict(os.environ, KERAS_BACKEND=name))


def decode_photos(arguments, train, validation, classes, size):
    """Both parts decoded at a size, with a progress bar; faults are counted and named."""
    from rich.progress import Progress

    decoded, faults = [], []
    with Progress(transient=True) as bar:
        task = bar.add_task("Decoding photos", total=len(train.labels) + len(validation.labels))
        for part in (train, validation):
            good, bad = datasets.decode_all(part, size, lambda: bar.advance(task))
            decoded.append(good)
            faults += bad
    if faults:
        print(f"Left out {len(faults)} files that cannot be read as images:")
        print("\n".join(f"  {fault}" for fault in faults))
    counts = [len(part.labels) for part in decoded]
    print(f"Data: {arguments.data}, {len(classes)} classes, {counts[0]} + {counts[1]} photos")
    return decoded


def train(arguments):
    name = f"{arguments.model}-{arguments.data.split(':')[-1].strip('/').split('/')[-1]}"
    folder = arguments.output or Path("saved_models") / name.translate(str.maketrans(":/", "__"))
    resumes = arguments.resume and (folder / "backup").is_dir()
    if arguments.resume and not resumes:
        raise FileNotFoundError(f"There is no interrupted run in {folder} to resume.")
    if folder.exists() and not (arguments.overwrite or resumes):
        raise FileExistsError(f"{folder} exists: pass --overwrite, or another --output.")

    options = shaped(arguments.model, arguments.image_size, (32, 32))
    if arguments.mixed_precision:
        options["dtype"] = "mixed_bfloat16"
    family = models.parse_name(arguments.model)[0].__name__.lower()
    # Model, data and weights are checked before anything slow, or written, begins.
    size = models.blueprint(models.create_model, arguments.model, **options).input_shape[1:3]
    preprocessing = images.Preprocessing(size, *images.NORMALIZATION[family])
    photos, held_out, classes = datasets.load_dataset(arguments.data, arguments.data_dir)
    keras.utils.set_random_seed(arguments.seed)
    model = models.create_model(
        arguments.model, classes=len(classes), drop_path=arguments.drop_path, **options
    )
    if arguments.weights:
        loaded = load_weights(model, arguments.weights, new_head=True)
        new = [row.variable for row in loaded.rows if row.action == "re-initialised"]
        print(f"Weights: {arguments.weights}" + (f"; new: {', '.join(new)}" if new else ""))
    originals = dict(zip(held_out.names, held_out.sources))
    photos, held_out = decode_photos(arguments, photos, held_out, classes, size)
    print(f"Model: {arguments.model}, {model.count_params():,} parameters, {size[0]} x {size[1]}")

    def augment(pixels, rng):
        return training.augment(pixels, rng, arguments.augment, arguments.flip)

    batches = datasets.Batches(
        photos,
        preprocessing,
        arguments.batch_size,
        augment if arguments.augment else shuffled,
        arguments.seed,
    )
    validation = datasets.Batches(held_out, preprocessing, 4 * arguments.batch_size)
    training.compile_model(
        model,
        arguments.epochs * len(batches),
        arguments.lr or (1e-4 if arguments.weights else 3e-3),
        arguments.weight_decay,
    )
    if folder.exists() and not resumes:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Training {arguments.epochs} epochs on {keras.backend.backend()}; Ctrl-C stops early")
    start = time.perf_counter()
    whole = training.fit(
        model,
        batches,
        validation,
        arguments.epochs,
        folder,
        arguments.seed,
        verbose=1 if sys.stdout.isatty() else 2,
    )
    seconds = time.perf_counter() - start
    if not whole:
        print("\nStopped. Keeping what was learned; `--resume` goes on from the last whole epoch.")
    record = {
        "command": shlex.join(["keras-vitnt", *sys.argv[1:]]),
        "model": arguments.model,
        "parameters": model.count_params(),
        "multiply_adds": benchmark.multiply_adds(model),
        "data": arguments.data,
        "photos": {"train": len(photos.labels), "validation": len(held_out.labels)},
        "preprocessing": preprocessing._asdict(),
        "seed": arguments.seed,
        "backend": f"{keras.backend.backend()}, Keras {keras.version()}",
        "interrupted": not whole,
        "training_seconds": round(seconds, 1),
    }
    finish(model, validation, originals, classes, folder, record)


def shuffled(pixels, rng):
    return pixels


def finish(model, validation, originals, classes, folder, record):
    """Everything after the training: files, comparisons, pictures, metrics, summary.

    `originals` has the validation photos at full size, for the pictures: {name: source}.
    """
    from rich.console import Console

    labels = validation.photos.labels
    x = np.concatenate([validation[i][0] for i in range(len(validation))])
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in classes))
    logits = model.predict(x, batch_size=validation.batch_size, verbose=0)
    predicted = logits.argmax(-1)
    record["validation_accuracy"] = float((predicted == labels).mean())
    copy(model).save(folder / "model.keras")

    files = {
        folder / "saved_model": None,
        folder / "model.tflite": None,
        folder / "model_int8.tflite": "int8",
    }
    with Console().status("Exporting SavedModel and LiteRT, running them on the photos ..."):
        export_all(model, files)
        if any(layer.compute_dtype != "float32" for layer in model.layers):
            logits = copy(model, "float32").predict(x, verbose=0)  # as the files compute
        compared = {path.name: compare(logits, path, x) for path in files}
    record["files"] = {
        name: {"bytes": size_of(folder / name), **found._asdict()}
        for name, found in compared.items()
    }
    draw(model, validation, originals, classes, predicted, folder)
    (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    print_summary(folder, record)
    for name in ("saved_model", "model.tflite"):
        found = compared[name]
        if not found.max_difference <= FLOAT_TOLERANCE * max(1.0, found.largest_logit):
            raise SystemExit(
                f"keras-vitnt: error: {folder / name} differs from Keras by "
                f"{found.max_difference:.1e}: do not ship it."
            )


def size_of(path):
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def draw(model, validation, originals, classes, predicted, folder):
    import csv

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
    pixels = [
        images.fit(images.decode(originals[name]), (larger * height, larger * width))
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


def print_summary(folder, record):
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{folder}: validation accuracy {record['validation_accuracy']:.2%}")
    for column in ("file", "size", "largest difference", "top-1 agreement"):
        table.add_column(column, justify="left" if column == "file" else "right")
    table.add_row("model.keras", f"{size_of(folder / 'model.keras') / 1e6:.2f} MB", "", "")
    for name, found in record["files"].items():
        table.add_row(
            name,
            f"{found['bytes'] / 1e6:.2f} MB",
            f"{found['max_difference']:.1e}",
            f"{found['agreement']:.2%}",
        )
    Console().print(table)
    print(f"Trained in {record['training_seconds']:.0f} s. Look at {', '.join(PICTURES)} there.")
    print(f"Next: keras-vitnt predict {folder} PHOTO...")


def resolve(path):
    """A run folder or file -> (function, preprocessing, class names) from what lies beside it."""
    file = path / "model.keras" if (path / "model.keras").is_file() else path
    run, shape = open_model(file)
    beside = file.parent
    preprocessing = images.Preprocessing(shape[:2])
    if (beside / "metrics.json").is_file():
        record = json.loads((beside / "metrics.json").read_text())["preprocessing"]
        preprocessing = images.Preprocessing(**{**record, "size": shape[:2]})
    labels = beside / "labels.txt"
    names = labels.read_text().splitlines() if labels.is_file() else None
    return run, preprocessing, names


def predict(arguments):
    run, preprocessing, names = resolve(arguments.model)
    inputs = np.stack([images.load(path, preprocessing) for path in arguments.images])
    for path, logits in zip(arguments.images, run(inputs)):
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        print(path)
        for i in np.argsort(-shares)[: arguments.top]:
            print(f"  {shares[i]:7.2%}  {names[i] if names else f'class {i}'}")


def evaluate(arguments):
    run, preprocessing, names = resolve(arguments.model)
    rest, held_out, classes = datasets.load_dataset(arguments.data, arguments.data_dir)
    if names and names != classes:
        raise ValueError(
            f"{arguments.model} knows the classes {', '.join(names)}; {arguments.data} has "
            f"{', '.join(classes)}."
        )
    _, held_out = decode_photos(arguments, rest, held_out, classes, preprocessing.size)
    batches = datasets.Batches(held_out, preprocessing, arguments.batch_size)
    start = time.perf_counter()
    logits = np.concatenate([run(batches[i][0]) for i in range(len(batches))])
    seconds = time.perf_counter() - start
    labels = held_out.labels
    right = (logits.argmax(-1) == labels).sum()
    top5 = (np.argsort(-logits)[:, :5] == labels[:, None]).any(axis=1).mean()
    print(f"{arguments.model}: {right} of {len(labels)} right")
    print(f"top-1 {right / len(labels):.2%}, top-5 {top5:.2%}, {seconds:.1f} s")


def list_models(arguments):
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    title = "Variants at 224 x 224, 1000 classes (Nano: 32 x 32, 10 classes)"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # 80 columns hold it
    for column in ("name", "timm's name", "parameters", "GMACs"):
        table.add_column(column, justify="left" if "name" in column else "right", no_wrap=True)
    timm = {}
    for name in models.timm_names():
        builder, variant, options = models.parse_name(name)
        options.pop("input_shape")
        timm[builder, variant, *options.items()] = name
    for builder, variant, options in models.listed():
        shape = {"input_shape": (32, 32, 3), "classes": 10} if "Nano" in variant else {}
        model = models.blueprint(builder, variant, **options, **shape)  # G/14 would take 7 GB
        words = "".join(" distilled" if key == "distilled" else " legacy" for key in options)
        table.add_row(
            f"{builder.__name__.lower()}:{variant}{words}",
            timm.get((builder, variant, *options.items()), ""),
            f"{model.count_params():,}",
            f"{benchmark.multiply_adds(model) / 1e9:.3g}",
        )
    Console().print(table)


def shapes(arguments):
    from rich.console import Console
    from rich.table import Table

    model = models.create_model(
        arguments.model,
        classes=arguments.classes,
        **shaped(arguments.model, arguments.image_size),
    )
    photos = np.random.default_rng(0).random((arguments.batch, *model.input_shape[1:]), "float32")
    table = Table(title=f"{arguments.model}, {model.count_params():,} parameters")
    for column in ("layer", "stage", "shape"):
        table.add_column(column, justify="right" if column == "shape" else "left")
    last = None
    for layer, stage, shape in explain.shape_walk(model, photos):
        table.add_row(layer if layer != last else "", stage, " x ".join(map(str, shape)))
        last = layer
    Console().print(table)


def main():
    arguments = parser().parse_args()
    try:
        check_backend(arguments.backend)
        arguments.function(arguments)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if arguments.traceback:
            raise
        print(f"keras-vitnt: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit("keras-vitnt: stopped") from None
