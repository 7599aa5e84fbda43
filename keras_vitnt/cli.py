"""The command line: arguments in, one call each, tables and files out."""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import keras
import numpy as np

from . import benchmark, datasets, explain, images, models, pretrained, report, training
from .checkpoints import is_checkpoint
from .export import FLOAT_TOLERANCE, compare, copy, export, export_all, format_of, open_model
from .weights import load_weights, save_weights

PICTURES = ("curves.png", "confusion.png", "attention.png")
OPENED = (
    "run folder, .keras, .tflite, SavedModel, or a checkpoint (hf:OWNER/NAME, .safetensors, ...)"
)


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
            "train --weights hf:timm/tnt_s_patch16_224.in1k --data folder:photos",
            "train --resume            # go on after Ctrl-C",
        ],
    )
    data_options(new)
    new.add_argument(
        "--model",
        help="FAMILY:SIZE/PATCH or timm's name (default: what --weights holds, else tnt:Nano/8)",
    )
    new.add_argument(
        "--weights", help="checkpoint or hf:OWNER/NAME to start from; its head may be another's"
    )
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
            "predict hf:timm/tnt_s_patch16_224.in1k cat.jpg",
        ],
    )
    new.add_argument("model", help=OPENED)
    new.add_argument("images", nargs="+", type=Path)
    new.add_argument("--top", type=positive, default=5, help="default: %(default)s")

    new = command(
        "evaluate",
        evaluate,
        "measure a model or file on a data set's validation part",
        ["evaluate saved_models/signs", "evaluate saved_models/signs/model_int8.tflite"],
    )
    new.add_argument("model", help=OPENED)
    data_options(new)

    def checkpoint_options(new):
        new.add_argument("source", help="checkpoint, folder with one, or hf:OWNER/NAME[@REVISION]")
        new.add_argument("--image-size", type=image_size, help="SIDE or HEIGHTxWIDTH")
        new.add_argument("--classes", type=positive, help="with a new head for so many classes")
        new.add_argument("--num-heads", type=positive, help="where the checkpoint does not say")
        new.add_argument("--inner-num-heads", type=positive, help="of TNT, likewise")

    new = command(
        "inspect",
        inspect,
        "tell what a checkpoint holds and what loading it would do",
        ["inspect vit_base.safetensors", "inspect hf:timm/tnt_s_patch16_224.in1k --variables"],
    )
    checkpoint_options(new)
    new.add_argument("--variables", action="store_true", help="a line for every variable")

    new = command(
        "convert",
        convert,
        "convert a public checkpoint: to Keras, LiteRT, SavedModel, or other names",
        [
            "convert tnt_s_81.5.pth.tar tnt_s.keras",
            "convert hf:google/vit-base-patch16-224 vit.tflite",
            "convert B_16.npz vit_b.safetensors --names huggingface",
        ],
    )
    checkpoint_options(new)
    new.add_argument(
        "output", type=Path, help="x.keras, x.tflite, x.safetensors, or a SavedModel's folder"
    )
    new.add_argument(
        "--names",
        choices=("timm", "huggingface"),
        default="timm",
        help="of the arrays in .safetensors (default: %(default)s)",
    )
    new.add_argument("--overwrite", action="store_true", help="replace an existing output")

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


def decode_photos(arguments, train, validation, classes, preprocessing):
    """Both parts decoded at a size, with a progress bar; faults are counted and named."""
    from rich.progress import Progress

    decoded, faults = [], []
    with Progress(transient=True) as bar:
        task = bar.add_task("Decoding photos", total=len(train.labels) + len(validation.labels))
        for part in (train, validation):
            good, bad = datasets.decode_all(part, preprocessing, lambda: bar.advance(task))
            decoded.append(good)
            faults += bad
    if faults:
        print(f"Left out {len(faults)} files that cannot be read as images:")
        print("\n".join(f"  {fault}" for fault in faults))
    counts = [len(part.labels) for part in decoded]
    print(f"Data: {arguments.data}, {len(classes)} classes, {counts[0]} + {counts[1]} photos")
    return decoded


def stem(source):
    """The last part of a path or hub name, without suffix or revision."""
    return source.split("@")[0].strip("/").split("/")[-1].split(".safetensors")[0]


def architecture(arguments, label):
    """(function of the last options -> model, preprocessing) that `train` was asked for."""
    if arguments.weights and not arguments.model:
        if arguments.weights.endswith((".keras", ".weights.h5")):
            raise ValueError(
                f"--weights {arguments.weights} needs --model too: the model it was trained as."
            )
        asked = {"input_shape": (*arguments.image_size, 3)} if arguments.image_size else {}
        facts, _ = pretrained.inspect(arguments.weights, **asked)

        def build(**options):
            model, found = pretrained.from_checkpoint(
                arguments.weights, report=True, **asked, **options
            )
            print_loaded(arguments.weights, found)
            return model

        return build, images.Preprocessing(**facts["preprocessing"])
    shape = shaped(label, arguments.image_size, (32, 32))
    family = models.parse_name(label)[0]
    size = models.blueprint(models.create_model, label, **shape).input_shape[1:3]

    def build(**options):
        model = models.create_model(label, **shape, **options)
        if arguments.weights:
            print_loaded(arguments.weights, load_weights(model, arguments.weights, new_head=True))
        return model

    if arguments.weights:
        own = arguments.weights.endswith((".keras", ".weights.h5"))
        known = recorded(Path(arguments.weights)) if own else None
        if known:
            return build, known[0]._replace(size=size)
        if not own:
            return build, pretrained.preprocessing(arguments.weights, size)
    return build, images.Preprocessing(size, *pretrained.normalization(family.__name__))


def print_loaded(source, found):
    new = [row.variable for row in found.rows if row.action == "re-initialised"]
    print(f"Weights: {source}" + (f"; new: {', '.join(new)}" if new else ""))


def train(arguments):
    label = arguments.model or (arguments.weights and stem(arguments.weights)) or "tnt:Nano/8"
    name = f"{label}-{arguments.data.split(':')[-1].strip('/').split('/')[-1]}"
    folder = arguments.output or Path("saved_models") / name.translate(str.maketrans(":/", "__"))
    resumes = arguments.resume and (folder / "backup").is_dir()
    if arguments.resume and not resumes:
        raise FileNotFoundError(f"There is no interrupted run in {folder} to resume.")
    if folder.exists() and not (arguments.overwrite or resumes):
        raise FileExistsError(f"{folder} exists: pass --overwrite, or another --output.")

    # Model, data and weights are checked before anything slow, or written, begins.
    build, preprocessing = architecture(arguments, label)
    photos, held_out, classes = datasets.load_dataset(arguments.data, arguments.data_dir)
    keras.utils.set_random_seed(arguments.seed)
    options = {"classes": len(classes), "drop_path": arguments.drop_path}
    if arguments.mixed_precision:
        options["dtype"] = "mixed_bfloat16"
    model = build(**options)
    size = preprocessing.size
    originals = dict(zip(held_out.names, held_out.sources))
    photos, held_out = decode_photos(arguments, photos, held_out, classes, preprocessing)
    print(f"Model: {label}, {model.count_params():,} parameters, {size[0]} x {size[1]}")

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
        "model": label,
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


def recorded(file):
    """(preprocessing, class names) that stand beside a file of ours; None if nothing does."""
    converted, record = file.with_name(f"{file.name}.json"), file.parent / "metrics.json"
    if converted.is_file():
        found = json.loads(converted.read_text())
        return images.Preprocessing(**found["preprocessing"]), found["names"]
    if not record.is_file():
        return None
    found = json.loads(record.read_text())["preprocessing"]
    labels = file.parent / "labels.txt"
    names = labels.read_text().splitlines() if labels.is_file() else None
    return images.Preprocessing(**found), names


def resolve(source):
    """What is to be opened -> (function, preprocessing, class names), from what lies beside it."""
    if is_checkpoint(source):
        facts, _ = pretrained.inspect(source)
        if facts.get("include_top") is False:
            raise ValueError(f"{source} has no classes: it holds a network without a head.")
        model = pretrained.from_checkpoint(source)
        return (
            lambda x: model.predict(x, verbose=0),
            images.Preprocessing(**facts["preprocessing"]),
            facts["names"],
        )
    path = Path(source)
    file = path / "model.keras" if (path / "model.keras").is_file() else path
    run, shape = open_model(file)
    preprocessing, names = recorded(file) or (images.Preprocessing(shape[:2]), None)
    return run, preprocessing._replace(size=shape[:2]), names


def predict(arguments):
    run, preprocessing, names = resolve(arguments.model)
    inputs = np.stack([images.load(path, preprocessing) for path in arguments.images])
    logits = run(inputs)
    names = names or [f"class {i}" for i in range(logits.shape[1])]
    for path, best in zip(
        arguments.images, pretrained.decode_predictions(logits, arguments.top, names)
    ):
        print(path)
        for name, share in best:
            print(f"  {share:7.2%}  {name}")


def overrides(arguments):
    """The options of `inspect` and `convert` for `from_checkpoint`."""
    asked = {name: getattr(arguments, name) for name in ("classes", "num_heads", "inner_num_heads")}
    asked = {name: value for name, value in asked.items() if value}
    if arguments.image_size:
        asked["input_shape"] = (*arguments.image_size, 3)
    return asked


def inspect(arguments):
    from rich.console import Console
    from rich.table import Table

    facts, found = pretrained.inspect(arguments.source, **overrides(arguments))
    names = facts.pop("names")
    table = Table(title=f"{arguments.source}: {found.scheme}", show_header=False)
    for name, value in facts.items():
        table.add_row(name, f"{value:,}" if name == "parameters" else str(value))
    if names:
        table.add_row("names", ", ".join(names[:4]) + (", ..." if len(names) > 4 else ""))
    Console().print(table)
    actions = Counter(row.action for row in found.rows)
    print(f"{len(found.rows)} variables: {', '.join(f'{n} {a}' for a, n in actions.items())}")
    if arguments.variables:
        print(found)
        return
    for name, reason in found.unused.items():
        print(f"unused: {name} ({reason})")
    print("\n".join(found.notes))


def convert(arguments):
    from rich.console import Console

    output = arguments.output
    if output.suffix != ".safetensors" and format_of(output) is None:
        raise ValueError(
            f"Unknown format of {output}: expected .keras, .tflite, .safetensors, or a folder's "
            "name without suffix for a SavedModel."
        )
    if output.exists() and not arguments.overwrite:
        raise FileExistsError(f"{output} exists: pass --overwrite, or another name.")
    asked = overrides(arguments)
    with Console().status(f"Converting {arguments.source} ..."):
        facts, _ = pretrained.inspect(arguments.source, **asked)
        model, found = pretrained.from_checkpoint(arguments.source, report=True, **asked)
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".safetensors":
            expected = images.Preprocessing(**facts["preprocessing"])
            save_weights(model, output, arguments.names, expected)
        else:
            export(model, output)
            beside = {key: facts[key] for key in ("preprocessing", "names")}
            record = {"source": arguments.source, **beside}
            output.with_name(f"{output.name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print_loaded(f"{arguments.source} ({found.scheme})", found)
    print("\n".join(found.notes))
    print(f"{output}: {model.count_params():,} parameters, {size_of(output) / 1e6:.2f} MB")


def evaluate(arguments):
    run, preprocessing, names = resolve(arguments.model)
    rest, held_out, classes = datasets.load_dataset(arguments.data, arguments.data_dir)
    if names and names != classes:
        raise ValueError(
            f"{arguments.model} knows the classes {', '.join(names)}; {arguments.data} has "
            f"{', '.join(classes)}."
        )
    _, held_out = decode_photos(arguments, rest, held_out, classes, preprocessing)
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
