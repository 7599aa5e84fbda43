"""LiteRT, ONNX and SavedModel files from any backend, each one run and compared before it is left.

Conversion runs under TensorFlow in a process of its own (`conversion`): JAX cannot write LiteRT
files, and TensorFlow's converter never gives its memory back. That process writes into a hidden
folder beside the target; a file takes its final name only after it has passed the gate.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import keras
import numpy as np

from . import edge, gate, images, quantize, sources, weights
from .checks import (
    check_arrays,
    check_names,
    check_replaces,
    check_targets,
    fitted,
    report_of,
    sides,
)
from .conversion import ExportReport
from .gate import format_of
from .vit import PatchEncoder, check_divisible

PHOTOS = 500  # of the validation part, of which one is a fifth of a point
MANY = 2000  # where `max_drop` asks for less than that
CALIBRATION = 64  # of the training part
# What the conversion process runs: this package's, not another one that is installed.
START = """
import sys
work, here = sys.argv[1:]
if here not in sys.path:
    sys.path.insert(0, here)
from keras_vitnt.conversion import main
main(work)
"""


def export(
    model,
    path,
    quantize=None,
    batch_size=1,
    image_size=None,
    input="float",
    graph="lean",
    *,
    preprocessing=None,
    names=None,
    photos=None,
    data_dir=None,
    labels=None,
    calibration=None,
    min_agreement=None,
    max_drop=None,
    keep_float=None,
    sensitivity=False,
):
    """Write a model for use without this package; run what was written and compare.

    The file is refused, and nothing is left, if it has operators beyond the built-in ones, dynamic
    tensors, rank above 4 or more than one XNNPACK partition (LiteRT; `graph="plain"` and static
    int8 may have more partitions), if in float32 a logit differs by more than 1e-4 of the largest
    one (at least 1; not so for probabilities), if quantised the cosine of the logits is under 0.9
    or one differs by more than the largest, if it misses the level that you ask for, or if a run's
    photos show that labels are swapped.

    Args:
        model: a `keras.Model` with one input and one output, on any backend; or a run's folder, a
            `.keras` file, a checkpoint or `hf:OWNER/NAME`, which brings its preprocessing, class
            names and (a run) photos along.
        path: `x.tflite`, `x.onnx` (needs the extra `onnx`), `x.keras`, or a folder (SavedModel;
            its function is `serve`). Beside a file stands the report, `x.tflite.json`.
        quantize: of a `.tflite`: None, "fp16", "int8" (weights; activations as they come) or
            "int8-static" (activations in ranges seen in calibration).
        batch_size: B, of a `.tflite` or `.onnx`. A SavedModel takes any.
        image_size: (height, width) in place of the model's; positions are resampled.
        input: "float" for what the model takes, or "uint8" for pixels, which the file normalises.
        graph: of a `.tflite` or `.onnx`: "lean", the network rewritten for runtimes that fuse
            nothing (see `edge`), for a `ViT`, `DeiT` or `TNT`; or "plain", as Keras exports it, for
            any model of images that is made of Keras' layers and this package's.
        preprocessing: `images.Preprocessing`, or a dict of it; None for pixels in -1..1.
        names: of the classes, a list of str, for the report and messages.
        photos: uint8 (P, H, W, C) to compare on, or "embedded", "folder:PATH" or "tfds:NAME" for
            the validation photos there; None for those of a run, else for eight embedded ones. Of
            validation photos 500 are taken, with `max_drop` 2,000.
        data_dir: where TensorFlow Datasets keeps its sets.
        labels: int (P,), for the change of accuracy.
        calibration: uint8 (Q, H, W, C) of the training data, for "int8-static".
        min_agreement: refuse a file with a smaller share of equal top-1 classes.
        max_drop: in points of accuracy (of agreement without labels): keep as many parts in float
            as it takes to lose no more.
        keep_float: names of parts that stay float, of those that the sensitivity table lists; None
            for what costs time and saves nothing (see `quantize.float_by_default`).
        sensitivity: quantise each part alone, too, and report what that does.

    Returns:
        An `ExportReport`.

    Raises:
        ValueError: for arguments that do not fit each other or the model.
        FileNotFoundError: if there is no such model or data set.
        ModuleNotFoundError: if it needs a package that is not installed.
        OSError: if the target cannot be written.
        RuntimeError: if the conversion fails or the gate refuses the file.

    Example:
        >>> export(model, "model_int8.tflite", quantize="int8").comparison.agreement
        1.0
    """
    if not isinstance(model, keras.Model | str | os.PathLike):
        raise ValueError(f"A keras.Model or where one is stored is expected; got {type(model)}.")
    path = Path(path).expanduser()
    keep_float = keep_float if keep_float is None or isinstance(keep_float, str) else [*keep_float]
    targets = {path: quantize}
    job = dict(
        batch_size=batch_size,
        input=input,
        min_agreement=min_agreement,
        max_drop=max_drop,
        keep_float=keep_float,
        sensitivity=sensitivity,
    )
    check_targets(targets, graph, **job)
    if labels is not None and (photos is None or isinstance(photos, str)):
        raise ValueError(
            f"`labels` are those of `photos` in an array; photos={photos!r} bring their own."
        )
    if image_size is not None:
        image_size = sides(image_size)
    names = check_names(names)
    source = sources.Source(preprocessing, names)
    if not isinstance(model, keras.Model):
        model, source = sources.open_keras_model(model, image_size)
        source = source._replace(preprocessing=preprocessing or source.preprocessing)
        if names and sorted(names) == sorted(source.names or names):  # in this order, then
            source = source._replace(names=names)
    gate.check_model(model)
    if image_size is not None:
        model = resized(model, image_size)
    source = source._replace(preprocessing=fitted(source.preprocessing, model))
    if isinstance(photos, str):
        source = source._replace(data=photos, data_dir=data_dir or source.data_dir)
    limit = PHOTOS if max_drop is None else MANY
    wanted = CALIBRATION if quantize == "int8-static" and calibration is None else 0
    named = photos is None or isinstance(photos, str)
    if source.data and (named or wanted):
        found = photos_to_compare(model, source, limit, wanted, asked=isinstance(photos, str))
        if named:
            photos, labels = found[:2]
        calibration = found[2] if calibration is None else calibration
    return export_all(
        model,
        targets,
        graph,
        preprocessing=source.preprocessing,
        names=names or source.names,
        photos=photos,
        labels=labels,
        calibration=calibration,
        check_labels=True,
        **job,
    )[0]


def photos_to_compare(model, source, limit, wanted, asked):
    """Photos of a source's data: (photos, labels or None, `wanted` photos for calibration or None).

    At most `limit` to compare on. If nobody `asked` for this data and it has moved away, (None,
    None, None).

    Raises:
        FileNotFoundError, ModuleNotFoundError: if it cannot be read and was asked for.
        ValueError: if a run's own data has other classes than the run.
    """
    try:
        photos, labels, classes, samples, faults = sources.photos_of(source, limit, wanted)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        if wanted or asked:
            raise
        print(f"{error} The file is compared on embedded photos instead.")
        return None, None, None
    if faults:
        print(f"Left out {len(faults)} photos that cannot be read: {', '.join(faults)}")
    if labels is None:
        other = sources.other_classes(source.names, source.data, classes)
        if not asked:
            raise ValueError(other)
        print(f"{other} Compared without accuracy.")
    elif model.output_shape[1:] != (len(classes),):
        labels = None
        print(
            f"{source.data} has {len(classes)} classes, the model's output is "
            f"{model.output_shape[1:]}: compared without accuracy."
        )
    return photos, labels, samples


def export_all(
    model,
    targets,
    graph="lean",
    *,
    preprocessing=None,
    names=None,
    photos=None,
    labels=None,
    calibration=None,
    check_labels=False,
    **job,
):
    """Several exports of one model in one conversion process: {path: quantize} -> `ExportReport`s.

    The other arguments are those of `export`; `check_labels` refuses a model whose classes are
    taken for one another, which what has just been trained on these labels need not pass.
    """
    from rich.console import Console

    targets = {Path(path).expanduser(): kind for path, kind in targets.items()}
    check_targets(targets, graph, **job)
    gate.check_model(model)
    if graph == "lean" and {format_of(path) for path in targets} & {"litert", "onnx"}:
        edge.check(model)
    arrays = {"photos": photos, "labels": labels, "calibration": calibration}
    arrays = {name: np.asarray(x) for name, x in arrays.items() if x is not None}
    check_arrays(model, targets, names, **arrays)
    asked = [name for name in ("min_agreement", "max_drop") if job.get(name) is not None]
    if asked and model.output_shape[-1] < 2:
        raise ValueError(f"{asked[0]}: one logit has no top-1 class, so nothing can disagree.")
    preprocessing = fitted(preprocessing, model)
    if photos is None:
        arrays["photos"] = real_photos(model.input_shape[1:])
    places = [path.absolute() for path in targets]  # wherever the working directory goes
    with ExitStack() as stack:
        folders = []
        for path in places:
            try:
                folders.append(Path(stack.enter_context(folder_beside(path))))
            except OSError as error:
                raise OSError(f"Cannot write {path}: {error.strerror}.") from error
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        copy(model, "float32").save(work / "model.keras")
        np.savez(work / "arrays.npz", **arrays)
        files = [
            {"path": str(folder / path.name), "quantize": kind}
            for folder, path, kind in zip(folders, places, targets.values())
        ]
        job = {"batch_size": 1, "input": "float"} | job
        job |= {"graph": graph, "files": files, "preprocessing": preprocessing}
        job |= {"names": names, "check_labels": check_labels}
        (work / "job.json").write_text(json.dumps(job, default=as_list))
        with Console(stderr=True).status("Starting TensorFlow") as status:
            convert(work, status.update)
        reports = []
        written = json.loads((work / "reports.json").read_text())
        for found, path, place in zip(written, targets, places):
            compared = found["comparison"] and gate.Comparison(**found["comparison"])
            rows = [quantize.Sensitivity(**row) for row in found["sensitivity"]]
            report = ExportReport(
                **{**found, "path": path, "comparison": compared, "sensitivity": rows}
            )
            put_in_place(Path(found["path"]), place)
            with folder_beside(report_of(place)) as folder:  # elsewhere, if `place` is a link
                new = Path(folder) / report_of(place).name
                new.write_text(record(report, preprocessing, names))
                put_in_place(new, report_of(place))
            reports.append(report)
    return reports


def as_list(x):
    """What JSON does not know, NumPy's numbers and arrays and sets, as what it does."""
    return x.tolist() if hasattr(x, "tolist") else list(x)


def convert(work, progress):
    """Run the conversion process on its folder; it ends when this one does."""
    from rich.markup import escape

    environment = dict(
        os.environ,
        KERAS_BACKEND="tensorflow",
        CUDA_VISIBLE_DEVICES="-1",
        TF_CPP_MIN_LOG_LEVEL="3",
        PYTHONIOENCODING="utf-8:replace",  # file names have characters that a locale may lack
        TMPDIR=str(work),  # a killed process cannot clear what it put elsewhere
    )
    command = [sys.executable, "-P", "-c", START, str(work), str(Path(__file__).parents[1])]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
    with (
        open(work / "log", "w") as log,
        subprocess.Popen(command, env=environment, stderr=log, **pipes) as process,
    ):
        try:
            for line in process.stdout:
                if line.startswith("* "):
                    progress(escape(line[2:].strip()))
            failed = process.wait()
        finally:
            process.kill()
    refused = work / "refused"
    if refused.exists():
        raise RuntimeError(refused.read_text("utf-8"))
    if failed < 0:
        name = signal.Signals(-failed).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        raise RuntimeError(f"The export under TensorFlow was ended by {name}{hint}.")
    if failed:
        text = (work / "log").read_text()
        last = (text.strip().splitlines() or ["no message"])[-1]
        error = RuntimeError(f"The export under TensorFlow failed: {last}")
        error.add_note(text)
        raise error


@contextmanager
def folder_beside(path):
    """A temporary folder in that of `path`, or of what it links to: there it can be moved in place.

    Parents are made, and removed if they are empty in the end.
    """
    parent = path.resolve().parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".export-") as folder:
            yield folder
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def put_in_place(new, path):
    """Give a finished file or folder its final name, in place of what stands there."""
    path = path.resolve()  # where a link to a SavedModel's folder leads
    while True:
        old = Path(tempfile.mkdtemp(dir=new.parent))
        try:
            if path.is_dir():  # no folder can be replaced in one step: the old one goes aside
                with suppress(FileNotFoundError):
                    check_replaces(path, format_of(new))  # again: by now it may hold something
                    os.replace(path, old)
            return os.replace(new, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR):
                raise  # and not because another export put its folder there just now
        finally:
            if not path.exists() and any(old.iterdir()):  # interrupted in between
                with suppress(OSError):  # another export was faster
                    os.replace(old, path)


def record(report, preprocessing, names):
    """The report as JSON, with what a user of the file must know."""
    found = report._asdict() | {"path": report.path.name, "names": names}
    found["comparison"] = report.comparison and report.comparison._asdict()
    found["sensitivity"] = [row._asdict() for row in report.sensitivity]
    found["preprocessing"] = preprocessing._asdict()
    return json.dumps(found, indent=2, default=as_list) + "\n"


def copy(model, dtype=None):
    """The same layers and weights without optimizer and loss; under another policy if named."""

    def rename(value):
        if isinstance(value, dict):
            if value.get("class_name") == "DTypePolicy":
                return {**value, "config": {"name": dtype}}
            return {key: rename(item) for key, item in value.items()}
        return [rename(item) for item in value] if isinstance(value, list | tuple) else value

    config = model.get_config()
    kind = keras.Sequential if isinstance(model, keras.Sequential) else keras.Model
    clone = kind.from_config(rename(config) if dtype else config)
    try:
        clone.set_weights(model.get_weights())
    except ValueError as error:
        raise ValueError(
            f"{model.name!r} has weights that its layers' configurations do not tell of, such as "
            f"LoRA's or those of Keras' own quantize(): {error}"
        ) from error
    return clone


def resized(model, image_size):
    """A `ViT`, `DeiT` or `TNT` for other images (height, width), its positions resampled."""
    height, width = image_size
    if not any(isinstance(layer, PatchEncoder) for layer in model.layers):
        raise ValueError(
            f"image_size: only a ViT, DeiT or TNT of this package takes another; {model.name!r} "
            f"is for {model.input_shape[1:3]}."
        )
    if model.input_shape[1:3] == (height, width):
        return model
    config = model.get_config()
    side = next(
        item["config"]["patch_size"] for item in config["layers"] if "patch_size" in item["config"]
    )
    check_divisible(height, width, side)
    for item in config["layers"]:
        item.pop("build_config", None)
        if item["class_name"] == "InputLayer":
            item["config"]["batch_shape"] = (None, height, width, model.input_shape[3])
        elif item["class_name"] == "PatchEncoder":
            item["config"]["num_patches"] = (height // side, width // side)
    new = type(model).from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        copy(model).save(Path(folder) / "model.keras")
        weights.load_weights(new, Path(folder) / "model.keras")
    return new


def real_photos(shape, count=8):
    """Some of the embedded photos as pixels: uint8 (count, H, W, C)."""
    from . import datasets

    found = datasets.load_dataset("embedded")[1].sources
    chosen = [found[i] for i in sources.evenly(len(found), count)]
    height, width, channels = shape
    size = images.Preprocessing((height, width))
    photos = np.stack([images.fit(images.decode(photo), size) for photo in chosen])
    return photos[..., np.arange(channels) % 3]
