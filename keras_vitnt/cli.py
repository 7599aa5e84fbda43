"""The command line: arguments in, one call each, tables and files out."""

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import keras
import numpy as np

from . import benchmark, datasets, explain, images, models, pretrained, report, training
from .conversion import size_of
from .export import export
from .quantize import KINDS
from .runs import finish
from .sources import open_function, recorded
from .weights import load_weights, save_weights

OPENED = (
    "run folder, .keras, .tflite, .onnx, SavedModel, or a checkpoint (hf:OWNER/NAME, "
    ".safetensors, ...)"
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
    new.add_argument("--epochs", type=positive, default=36, help="default: %(default)s")
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
        "convert a public checkpoint: to Keras, or to other names",
        [
            "convert tnt_s_81.5.pth.tar tnt_s.keras",
            "convert B_16.npz vit_b.safetensors --names huggingface",
        ],
    )
    checkpoint_options(new)
    new.add_argument("output", type=Path, help="x.keras or x.safetensors")
    new.add_argument(
        "--names",
        choices=("timm", "huggingface"),
        default="timm",
        help="of the arrays in .safetensors (default: %(default)s)",
    )
    new.add_argument("--overwrite", action="store_true", help="replace an existing output")

    new = command(
        "export",
        export_file,
        "write a LiteRT, ONNX or SavedModel file, run it and compare it with Keras",
        [
            "export saved_models/signs signs.tflite --quantize int8",
            "export saved_models/signs signs.tflite --quantize int8-static --max-drop 0.5",
            "export hf:google/vit-base-patch16-224 vit.tflite --quantize fp16 --input uint8",
            "export saved_models/signs signs.onnx --batch-size 8",
        ],
    )
    new.add_argument("model", help="run folder, .keras, checkpoint or hf:OWNER/NAME")
    new.add_argument(
        "output", type=Path, help="x.tflite, x.onnx, x.keras, or a SavedModel's folder"
    )
    new.add_argument("--quantize", choices=KINDS, help="of a .tflite (default: float32)")
    new.add_argument("--batch-size", type=positive, default=1, help="default: %(default)s")
    new.add_argument("--image-size", type=image_size, help="SIDE or HEIGHTxWIDTH")
    new.add_argument(
        "--input",
        choices=("float", "uint8"),
        default="float",
        help="normalised values, or pixels that the file normalises (default: %(default)s)",
    )
    new.add_argument(
        "--graph",
        choices=("lean", "plain"),
        default="lean",
        help="rewritten for runtimes that fuse nothing, or Keras' own (default: %(default)s)",
    )
    new.add_argument(
        "--photos",
        metavar="DATA",
        help="compare, and calibrate, on embedded, folder:PATH or tfds:NAME (default: the run's)",
    )
    new.add_argument("--data-dir", help="where TensorFlow Datasets keeps its sets")
    new.add_argument(
        "--min-agreement",
        type=float,
        metavar="SHARE",
        help="refuse less top-1 agreement, such as 0.99 (default: any)",
    )
    new.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="keep parts in float until no more accuracy is lost",
    )
    new.add_argument(
        "--keep-float",
        nargs="*",
        metavar="PART",
        help="such as block00/mlp; no PART quantises all (default: TNT's inner layers, if few)",
    )
    new.add_argument(
        "--sensitivity", action="store_true", help="what quantising each part alone does"
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
            return build, known.preprocessing._replace(size=size)
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
        "data_dir": arguments.data_dir,
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


def given(photos, source, dtype):
    """Photos as a function of `open_function` takes them."""
    pixels = np.stack([images.fit(images.decode(photo), source.preprocessing) for photo in photos])
    return pixels if dtype == "uint8" else images.normalize(pixels, source.preprocessing)


def predict(arguments):
    run, source, dtype = open_function(arguments.model)
    logits = run(given(arguments.images, source, dtype))
    names = source.names or [f"class {i}" for i in range(logits.shape[1])]
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
    if output.suffix not in (".keras", ".safetensors"):
        raise ValueError(
            f"Unknown format of {output}: expected .keras or .safetensors; `keras-vitnt export` "
            "writes LiteRT, ONNX and SavedModel."
        )
    if output.exists() and not arguments.overwrite:
        raise FileExistsError(f"{output} exists: pass --overwrite, or another name.")
    asked = overrides(arguments)
    with Console().status(f"Converting {arguments.source} ..."):
        facts, _ = pretrained.inspect(arguments.source, **asked)
        model, found = pretrained.from_checkpoint(arguments.source, report=True, **asked)
        output.parent.mkdir(parents=True, exist_ok=True)
        expected = images.Preprocessing(**facts["preprocessing"])
        if output.suffix == ".safetensors":
            save_weights(model, output, arguments.names, expected)
        else:
            export(model, output, preprocessing=expected, names=facts["names"])
    print_loaded(f"{arguments.source} ({found.scheme})", found)
    print("\n".join(found.notes))
    print(f"{output}: {model.count_params():,} parameters, {size_of(output) / 1e6:.2f} MB")


def evaluate(arguments):
    run, source, dtype = open_function(arguments.model)
    names = source.names
    rest, held_out, classes = datasets.load_dataset(arguments.data, arguments.data_dir)
    if names and names != classes:
        raise ValueError(
            f"{arguments.model} knows the classes {', '.join(names)}; {arguments.data} has "
            f"{', '.join(classes)}."
        )
    _, held_out = decode_photos(arguments, rest, held_out, classes, source.preprocessing)
    labels, size = held_out.labels, arguments.batch_size
    start = time.perf_counter()
    logits = np.concatenate(
        [
            run(given(held_out.sources[i : i + size], source, dtype))
            for i in range(0, len(labels), size)
        ]
    )
    seconds = time.perf_counter() - start
    if logits.shape[1:] != (len(classes),):
        raise ValueError(
            f"{arguments.model} gives {logits.shape[1:]} for each photo; {arguments.data} has "
            f"{len(classes)} classes."
        )
    right = (logits.argmax(-1) == labels).sum()
    top5 = (np.argsort(-logits)[:, :5] == labels[:, None]).any(axis=1).mean()
    print(f"{arguments.model}: {right} of {len(labels)} right")
    print(f"top-1 {right / len(labels):.2%}, top-5 {top5:.2%}, {seconds:.1f} s")


def export_file(arguments):
    output = arguments.output
    for path in (output, output.with_name(f"{output.name}.json")):
        if path.exists() and not arguments.overwrite:
            raise FileExistsError(f"{path} exists: pass --overwrite, or another name.")
    found = export(
        arguments.model,
        output,
        arguments.quantize,
        arguments.batch_size,
        arguments.image_size,
        arguments.input,
        arguments.graph,
        min_agreement=arguments.min_agreement,
        max_drop=arguments.max_drop,
        keep_float=arguments.keep_float,
        sensitivity=arguments.sensitivity,
        photos=arguments.photos,
        data_dir=arguments.data_dir,
    )
    if found.sensitivity:
        report.print_sensitivity(found.sensitivity, found.kept)
    compared = found.comparison
    title = str(output) if not compared else f"{output}, on {compared.photos} photos"
    report.print_exports([found], title)
    if found.structure:
        inner = ", ".join(f"{count} {name}" for name, count in found.structure["operators"].items())
        partitions = found.structure["partitions"]
        print(f"{partitions} XNNPACK partition{'s' * (partitions != 1)}; operators: {inner}")
    if found.kept:
        print(f"In float: {', '.join(found.kept)}")
    if compared and compared.accuracy is not None:
        print(f"Accuracy change: {0.0 - compared.drop:+.2f} points")
    print(f"The report stands in {output}.json.")


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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is as Ctrl-C
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
