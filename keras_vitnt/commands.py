"""What each command does with its arguments: one call, then tables and files."""

import json
import re
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

import keras
import numpy as np

from . import benchmark, datasets, explain, images, models, pretrained, report, runs, training
from .checkpoints import on_hub
from .conversion import size_of
from .export import export
from .names import create_model, listed, parse_name, timm_names
from .saving import save_weights
from .sources import metrics_of, open_function, other_classes, recorded, relabelled
from .weights import load_weights

# What a resumed training must have in common with its beginning.
OPTIONS = (
    *("data", "data_dir", "batch_size", "model", "weights", "epochs", "image_size", "lr"),
    *("weight_decay", "drop_path", "augment", "flip", "mixed_precision", "seed"),
)


def shaped(name, size, default=None):
    """The `input_shape` option for a model: the asked size, the name's own, or the default."""
    size = size or (None if "input_shape" in parse_name(name)[2] else default)
    return {"input_shape": (*size, 3)} if size else {}


def decode_photos(parts, preprocessing):
    """Each of several `Photos` decoded, with a progress bar; faults are counted and named."""
    from rich.progress import Progress

    decoded, faults = [], []
    with Progress(transient=True) as bar:
        task = bar.add_task("Decoding photos", total=sum(len(part.labels) for part in parts))
        for part in parts:
            good, bad = datasets.decode_all(part, preprocessing, lambda: bar.advance(task))
            decoded.append(good)
            faults += bad
    if faults:
        print(f"Left out {len(faults)} files that cannot be read as images:")
        print("\n".join(f"  {fault}" for fault in faults))
    return decoded


def stem(source):
    """The last part of a path or hub name, without a file's suffix or the revision."""
    path = source.split("@")[0] if on_hub(source) else source
    last = path.strip("/").split("/")[-1]
    return re.sub(r"\.(safetensors|npz|pth|pth\.tar|bin|keras|weights\.h5)$", "", last)


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
    family = parse_name(label)[0]
    size = models.blueprint(create_model, label, **shape).input_shape[1:3]

    def build(**options):
        model = create_model(label, **shape, **options)
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
    backup = folder / "backup"
    resumes = arguments.resume and backup.is_dir()
    if arguments.resume and not resumes:
        raise FileNotFoundError(f"There is no interrupted run in {folder} to resume.")
    if resumes:
        check_same(arguments, backup / "options.json")
    if folder.exists() and not resumes:
        if not arguments.overwrite:
            raise FileExistsError(f"{folder} exists: pass --overwrite, or another --output.")
        runs.check_replaces(folder)

    # Model, data and weights are checked before anything slow, or written, begins.
    build, preprocessing = architecture(arguments, label)
    photos, held_out, classes = datasets.load_dataset(arguments.data, arguments.data_dir)
    for label in set(held_out.labels) - set(photos.labels):
        raise ValueError(
            f"{arguments.data} has no photo of {classes[label]} to train on: training and "
            "validation need one each."
        )
    keras.utils.set_random_seed(arguments.seed)
    options = {"classes": len(classes), "drop_path": arguments.drop_path}
    if arguments.mixed_precision:
        options["dtype"] = "mixed_bfloat16"
    model = build(**options)
    size = preprocessing.size
    originals = dict(zip(held_out.names, held_out.sources))
    photos, held_out = decode_photos([photos, held_out], preprocessing)
    counts = f"{len(photos.labels)} + {len(held_out.labels)}"
    print(f"Data: {arguments.data}, {len(classes)} classes, {counts} photos")
    print(f"Model: {label}, {model.count_params():,} parameters, {size[0]} x {size[1]}")

    def augment(pixels, rng):
        return training.augment(pixels, rng, arguments.augment, arguments.flip)

    batches = datasets.Batches(photos, preprocessing, arguments.batch_size, augment, arguments.seed)
    validation = datasets.Batches(held_out, preprocessing, 4 * arguments.batch_size)
    usual = 1e-4 if arguments.weights else 3e-3
    training.compile_model(
        model,
        arguments.epochs * len(batches),
        usual if arguments.lr is None else arguments.lr,
        arguments.weight_decay,
    )
    if not resumes:
        runs.clear(folder)
    backup.mkdir(parents=True, exist_ok=True)  # Keras removes it when the training is complete
    (backup / "options.json").write_text(json.dumps(options_of(arguments), indent=2) + "\n")
    print(f"Training {arguments.epochs} epochs on {keras.backend.backend()}; Ctrl-C stops early")
    before = metrics_of(folder).get("training_seconds", 0)  # of the part that was stopped
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
    seconds = before + time.perf_counter() - start
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
    runs.finish(model, validation, originals, classes, folder, record)


def options_of(arguments):
    """What decides a training, as JSON has it."""
    return json.loads(json.dumps({name: getattr(arguments, name) for name in OPTIONS}))


def check_same(arguments, file):
    """Refuse to go on with a training that was begun with other options."""
    begun, now = json.loads(file.read_text()), options_of(arguments)
    other = [
        f"--{name.replace('_', '-')} was {begun[name]}, is {now[name]}"
        for name in OPTIONS
        if begun[name] != now[name]
    ]
    if other:
        raise ValueError(
            f"{file.parent.parent} was begun with other options ({'; '.join(other)}): resume it "
            "with the same ones, or pass --overwrite in place of --resume."
        )


def given(pixels, source, dtype):
    """Pixels at a model's size, uint8 (B, H, W, C), as a function of `open_function` takes them."""
    return pixels if dtype == "uint8" else images.normalize(pixels, source.preprocessing)


def predict(arguments):
    run, source, dtype = open_function(arguments.model)
    fitted = [images.fit(images.decode(path), source.preprocessing) for path in arguments.images]
    logits = run(given(np.stack(fitted), source, dtype))
    if logits.shape[1:] == (1,):  # no classes to choose from
        for path, (output,) in zip(arguments.images, logits):
            print(f"{path}\n  output {output:.4f}")
        return
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
    Console(markup=False).print(table)
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
    from rich.markup import escape

    output = arguments.output
    if output.suffix not in (".keras", ".safetensors"):
        raise ValueError(
            f"Unknown format of {output}: expected .keras or .safetensors; `keras-vitnt export` "
            "writes LiteRT, ONNX and SavedModel."
        )
    if output.exists() and not arguments.overwrite:
        raise FileExistsError(f"{output} exists: pass --overwrite, or another name.")
    asked = overrides(arguments)
    with Console().status(f"Converting {escape(arguments.source)} ..."):
        model, facts, found = pretrained.load(arguments.source, **asked)
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
    data = arguments.data or source.data or "embedded"
    folder = arguments.data_dir or source.data_dir
    _, held_out, classes = datasets.load_dataset(data, folder)
    labels = relabelled(held_out.labels, classes, source.names)
    if labels is None:
        raise ValueError(other_classes(source.names, data, classes))
    (held_out,) = decode_photos([held_out._replace(labels=labels)], source.preprocessing)
    labels, size = held_out.labels, arguments.batch_size
    print(f"Data: {data}, {len(classes)} classes, {len(labels)} photos")
    batches = datasets.Batches(held_out, source.preprocessing, size)
    start, logits = time.perf_counter(), []
    for first in range(0, len(labels), size):
        pixels = [batches.pixels(i) for i in range(first, min(first + size, len(labels)))]
        logits.append(run(given(np.stack(pixels), source, dtype)))
    logits = np.concatenate(logits)
    seconds = time.perf_counter() - start
    if logits.shape[1:] != (len(classes),):
        raise ValueError(
            f"{arguments.model} gives {logits.shape[1:]} for each photo; {data} has "
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
    for name in timm_names():
        builder, variant, options = parse_name(name)
        options.pop("input_shape")
        timm[builder, variant, *options.items()] = name
    for name in listed():
        builder, variant, options = parse_name(name)
        shape = {"input_shape": (32, 32, 3), "classes": 10} if "Nano" in variant else {}
        model = models.blueprint(builder, variant, **options, **shape)  # G/14 would take 7 GB
        table.add_row(
            name,
            timm.get((builder, variant, *options.items()), ""),
            f"{model.count_params():,}",
            f"{benchmark.multiply_adds(model) / 1e9:.3g}",
        )
    Console().print(table)


def shapes(arguments):
    from rich.console import Console
    from rich.table import Table

    model = create_model(
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
