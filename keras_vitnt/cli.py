"""The command line: `commands` with the arguments, examples and errors that they have."""

import argparse
import importlib.util
import os
import signal
import sys
from pathlib import Path

import keras

from . import commands
from .quantize import KINDS

OPENED = (
    "run folder, .keras, .tflite, .onnx, SavedModel, or a checkpoint (hf:OWNER/NAME, "
    ".safetensors, ...)"
)
TRACEBACK = "show the traceback of an error"


def parser():
    main = argparse.ArgumentParser(
        prog="keras-vitnt",
        description="ViT and TNT for Keras 3: train on photos, ship SavedModel and LiteRT.",
    )
    main.add_argument("--traceback", action="store_true", help=TRACEBACK)
    kinds = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, function, help, examples):
        new = kinds.add_parser(
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
        new.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS, help=TRACEBACK
        )
        return new

    def data_options(new, default, described):
        new.add_argument(
            "--data",
            default=default,
            help="embedded, folder:PATH (a folder per class, or train/ and validation/ with "
            f"such folders) or tfds:NAME (default: {described})",
        )
        new.add_argument("--data-dir", help="where TensorFlow Datasets keeps its sets")
        new.add_argument("--batch-size", type=positive, default=32, help="default: %(default)s")

    new = command(
        "train",
        commands.train,
        "train a classifier, export it, compare the files, draw pictures",
        [
            "train",
            "train --data folder:photos --image-size 64 --epochs 100",
            "train --model vit:Nano/4 --data tfds:cifar10 --epochs 20 --output saved_models/cifar",
            "train --weights hf:timm/tnt_s_patch16_224.in1k --data folder:photos",
            "train --resume            # go on after Ctrl-C",
        ],
    )
    data_options(new, "embedded", "embedded, photos of hand signs")
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
        "--lr", type=amount, help="peak learning rate (default: 3e-3; 1e-4 with --weights)"
    )
    new.add_argument("--weight-decay", type=amount, default=0.1, help="default: %(default)s")
    new.add_argument("--drop-path", type=share, default=0.0, help="default: %(default)s")
    new.add_argument(
        "--augment", type=amount, default=1.0, help="strength, 0 for none (default: %(default)s)"
    )
    new.add_argument("--flip", action="store_true", help="mirror half of the photos")
    new.add_argument("--mixed-precision", action="store_true", help="compute in bfloat16")
    new.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    new.add_argument("--output", type=Path, help="folder (default: saved_models/MODEL-DATA)")
    new.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run in the output folder"
    )
    new.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run of these options"
    )

    new = command(
        "predict",
        commands.predict,
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
        commands.evaluate,
        "measure a model or file on a data set's validation part",
        ["evaluate saved_models/signs", "evaluate saved_models/signs/model_int8.tflite"],
    )
    new.add_argument("model", help=OPENED)
    data_options(new, None, "what a run was trained on, else embedded")

    def checkpoint_options(new):
        new.add_argument("source", help="checkpoint, folder with one, or hf:OWNER/NAME[@REVISION]")
        new.add_argument("--image-size", type=image_size, help="SIDE or HEIGHTxWIDTH")
        new.add_argument("--classes", type=positive, help="with a new head for so many classes")
        new.add_argument("--num-heads", type=positive, help="where the checkpoint does not say")
        new.add_argument("--inner-num-heads", type=positive, help="of TNT, likewise")

    new = command(
        "inspect",
        commands.inspect,
        "tell what a checkpoint holds and what loading it would do",
        ["inspect vit_base.safetensors", "inspect hf:timm/tnt_s_patch16_224.in1k --variables"],
    )
    checkpoint_options(new)
    new.add_argument("--variables", action="store_true", help="a line for every variable")

    new = command(
        "convert",
        commands.convert,
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
        commands.export_file,
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
        type=part_names,
        metavar="PART,...",
        help="such as stem,block00/mlp, or none (default: for int8 TNT's inner layers, if few)",
    )
    new.add_argument(
        "--sensitivity", action="store_true", help="what quantising each part alone does"
    )
    new.add_argument("--overwrite", action="store_true", help="replace an existing output")

    command(
        "models",
        commands.list_models,
        "list the variants with parameters and multiply-adds",
        ["models"],
    )

    new = command(
        "shapes",
        commands.shapes,
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


def amount(text, limit=float("inf")):
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < limit:
        below = "" if limit == float("inf") else f" and under {limit}"
        raise argparse.ArgumentTypeError(f"expected a number of at least 0{below}, got {text!r}")
    return found


def share(text):
    return amount(text, 1)


def part_names(text):
    return [] if text == "none" else text.split(",")


def image_size(text):
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"expected SIDE or HEIGHTxWIDTH in pixels, got {text!r}")
    return int(sides[0]), int(sides[-1])


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


def main():
    arguments = parser().parse_args()
    for name in ("SIGTERM", "SIGHUP"):  # a scheduler's stop, a closed terminal: as Ctrl-C
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, signal.default_int_handler)
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
