"""LiteRT, ONNX and SavedModel files from any backend, each one run and compared before it is left.

Conversion runs under TensorFlow in a process of its own: JAX cannot write LiteRT files, and
TensorFlow's converter never gives its memory back. That process writes into a hidden folder beside
the target; a file takes its final name only after it has passed the gate.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

from . import edge, gate, images, quantize, sources, weights
from .gate import format_of

PHOTOS = 500  # of the validation part; enough to see a fifth of a point
CALIBRATION = 64  # of the training part


class Report(NamedTuple):
    """What was written, and how it compares with the model.

    Attributes:
        path: of the file or folder.
        format: "litert", "onnx", "saved_model" or "keras".
        graph, quantize, input, batch_size: as asked.
        bytes: its size.
        structure: of a LiteRT file, see `gate.structure`; else an empty dict.
        comparison: a `gate.Comparison`; None for a `.keras` file.
        milliseconds: median of one call of the file; `float_milliseconds`: of the float32 file
            beside it, in turns in the same process. None for a `.keras` file.
        kept: parts that stayed float though the others were quantised.
        sensitivity: list of `quantize.Sensitivity`, if it was asked for.
    """

    path: Path
    format: str
    graph: str
    quantize: str | None
    input: str
    batch_size: int | None
    bytes: int
    structure: dict
    comparison: gate.Comparison | None
    milliseconds: float | None
    float_milliseconds: float | None
    kept: list
    sensitivity: list


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
    labels=None,
    calibration=None,
    min_agreement=None,
    max_drop=None,
    keep_float=(),
    sensitivity=False,
):
    """Write a model for use without this package; run what was written and compare.

    The file is refused, and nothing is left, if it has operators beyond the built-in ones, dynamic
    tensors, rank above 4 or more than one XNNPACK partition (LiteRT; `graph="plain"` and static
    int8 may have more partitions), if in float32 a logit differs by more than 1e-4 of the largest
    one (at least 1), or if it misses the level that you ask for.

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
            nothing (see `edge`), for a `ViT`, `DeiT` or `TNT`; or "plain", as Keras exports it.
        preprocessing: `images.Preprocessing`; None for a model's pixels in -1..1.
        names: of the classes, for the report and messages.
        photos: uint8 (P, H, W, C) to compare on; None for some of the embedded photos.
        labels: int (P,), for the change of accuracy.
        calibration: uint8 (Q, H, W, C) of the training data, for "int8-static".
        min_agreement: refuse a file with a smaller share of equal top-1 classes.
        max_drop: in points of accuracy (of agreement without labels): keep as many parts in float
            as it takes to lose no more.
        keep_float: names of parts that stay float, of those that the sensitivity table lists.
        sensitivity: quantise each part alone, too, and report what that does.

    Returns:
        A `Report`.

    Raises:
        ValueError: for arguments that do not fit each other or the model.
        RuntimeError: if the conversion fails or the gate refuses the file.

    Example:
        >>> export(model, "model_int8.tflite", quantize="int8").comparison.agreement
        1.0
    """
    if not isinstance(model, keras.Model):
        name = model
        model, source = sources.open_keras_model(name, image_size)
        names = names or source.names
        preprocessing = preprocessing or source.preprocessing
        if image_size:
            preprocessing = preprocessing._replace(size=tuple(image_size))
        if photos is None and source.data:
            source = source._replace(preprocessing=preprocessing)
            wanted = CALIBRATION if quantize == "int8-static" and calibration is None else 0
            try:
                photos, labels, samples, faults = sources.photos_of(source, PHOTOS, wanted)
            except (FileNotFoundError, ModuleNotFoundError) as error:  # the data moved away
                if wanted:
                    raise
                print(f"{error} The file is compared on embedded photos instead.")
            else:
                calibration = samples if calibration is None else calibration
                if faults:
                    print(f"Left out {len(faults)} photos that cannot be read: {', '.join(faults)}")
    if image_size:
        model = resized(model, image_size)
    return export_all(
        model,
        {path: quantize},
        graph,
        batch_size=batch_size,
        input=input,
        preprocessing=preprocessing,
        names=names,
        photos=photos,
        labels=labels,
        calibration=calibration,
        min_agreement=min_agreement,
        max_drop=max_drop,
        keep_float=list(keep_float),
        sensitivity=sensitivity,
        check_labels=True,
    )[0]


def export_all(model, targets, graph="lean", *, preprocessing=None, photos=None, **job):
    """Several exports of one model in one conversion process: {path: quantize} -> [`Report`].

    The other arguments are those of `export`.
    """
    from rich.console import Console

    targets = {Path(path): kind for path, kind in targets.items()}
    check_arguments(model, targets, graph, photos, job)
    *size, channels = model.input_shape[1:]
    half = (0.5,) * channels
    preprocessing = preprocessing or images.Preprocessing(tuple(size), half, half)
    if photos is None:
        photos = real_photos(model.input_shape[1:])
    arrays = {"photos": photos, "labels": job.pop("labels", None)}
    arrays["calibration"] = job.pop("calibration", None)
    with ExitStack() as stack:
        folders = []
        for path in targets:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                new = tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-")
                folders.append(Path(stack.enter_context(new)))
            except OSError as error:
                raise OSError(f"Cannot write {path}: {error.strerror}.") from error
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        copy(model, "float32").save(work / "model.keras")
        np.savez(work / "arrays.npz", **{k: v for k, v in arrays.items() if v is not None})
        files = [
            {"path": str(folder / path.name), "quantize": kind}
            for folder, (path, kind) in zip(folders, targets.items())
        ]
        job |= {"graph": graph, "files": files, "preprocessing": preprocessing}
        (work / "job.json").write_text(json.dumps(job))
        with Console(stderr=True).status("Starting TensorFlow") as status:
            convert(work, status.update)
        reports = []
        for found, path in zip(json.loads((work / "reports.json").read_text()), targets):
            compared = found["comparison"] and gate.Comparison(**found["comparison"])
            rows = [quantize.Sensitivity(**row) for row in found["sensitivity"]]
            report = Report(**{**found, "path": path, "comparison": compared, "sensitivity": rows})
            put_in_place(Path(found["path"]), path)
            beside = path.with_name(f"{path.name}.json")
            new = Path(found["path"]).with_name(beside.name)
            new.write_text(record(report, preprocessing, job.get("names")))
            put_in_place(new, beside)
            reports.append(report)
    return reports


def check_arguments(model, targets, graph, photos, job):
    """Refuse what cannot be exported before anything slow, or written, begins."""
    if graph not in ("lean", "plain"):
        raise ValueError(f'`graph` must be "lean" or "plain"; got {graph!r}.')
    if job.get("input", "float") not in ("float", "uint8"):
        raise ValueError(f'`input` must be "float" or "uint8"; got {job["input"]!r}.')
    size = job.get("batch_size", 1)
    if not (isinstance(size, int) and size > 0):
        raise ValueError(f"`batch_size` must be a positive whole number; got {size!r}.")
    kinds = {format_of(path) for path in targets}
    if kinds & {"litert", "onnx"} and graph == "lean":
        edge.check(model)
    for path, kind in targets.items():
        if format_of(path) is None:
            raise ValueError(
                f"Unknown format of {path}: expected a name that ends in .tflite, .onnx or .keras, "
                "or a folder's name without suffix for a SavedModel."
            )
        folder = format_of(path) == "saved_model"
        if path.is_dir() and not (folder and (path / "saved_model.pb").is_file()):
            raise ValueError(f"{path} is a folder of something else; it is not replaced.")
        if kind not in (None, *quantize.KINDS) or (kind and format_of(path) != "litert"):
            raise ValueError(
                f"quantize={kind!r} of {path}: expected None, or one of "
                f"{', '.join(quantize.KINDS)} for a .tflite file."
            )
        if kind == "int8-static" and job.get("calibration") is None:
            raise ValueError(
                "int8-static needs photos of the training data: pass calibration=..., or export a "
                "run's folder."
            )
        if not kind and (
            job.get("max_drop") is not None or job.get("sensitivity") or job.get("keep_float")
        ):
            raise ValueError(
                f"max_drop, keep_float and sensitivity are of a quantised file; {path} is not one."
            )
    if photos is not None and (
        photos.dtype != np.uint8 or photos.shape[1:] != tuple(model.input_shape[1:])
    ):
        raise ValueError(
            f"`photos` must be uint8 (P, {', '.join(map(str, model.input_shape[1:]))}); got "
            f"{photos.dtype} {photos.shape}."
        )


def convert(work, progress):
    """Run the conversion process on its folder; it dies with this one."""
    environment = dict(
        os.environ,
        KERAS_BACKEND="tensorflow",
        CUDA_VISIBLE_DEVICES="-1",
        TF_CPP_MIN_LOG_LEVEL="3",
    )
    command = [sys.executable, "-m", "keras_vitnt.export", str(work)]
    with open(work / "log", "w+") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            for line in process.stdout:
                if line.startswith("* "):
                    progress(line[2:].strip())
            failed = process.wait()
        finally:
            process.kill()
            process.wait()
    refused = work / "refused"
    if refused.exists():
        raise RuntimeError(refused.read_text())
    if failed:
        text = (work / "log").read_text()
        last = (text.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"The export under TensorFlow failed: {last}\n{text}")


def put_in_place(new, path):
    """Give a finished file or folder its final name, in place of what stands there."""
    while True:
        if path.is_dir():  # no folder can be replaced in one step: the old one goes aside
            with suppress(FileNotFoundError):
                os.replace(path, tempfile.mkdtemp(dir=new.parent))
        try:
            return os.replace(new, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR):
                raise  # and not because another export put its folder there just now


def record(report, preprocessing, names):
    """The report as JSON, with what a user of the file must know."""
    found = report._asdict() | {"path": report.path.name, "names": names}
    found["comparison"] = report.comparison and report.comparison._asdict()
    found["sensitivity"] = [row._asdict() for row in report.sensitivity]
    found["preprocessing"] = preprocessing._asdict()
    return json.dumps(found, indent=2) + "\n"


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


def resized(model, image_size):
    """A `ViT`, `DeiT` or `TNT` for other images (height, width), its positions resampled."""
    edge.check(model)
    if tuple(model.input_shape[1:3]) == tuple(image_size):
        return model
    height, width = image_size
    config = model.get_config()
    side = next(
        item["config"]["patch_size"] for item in config["layers"] if "patch_size" in item["config"]
    )
    if height % side or width % side:
        raise ValueError(
            f"image_size {height} x {width} cannot be cut into patches of {side} x {side}: both "
            f"sides must be divisible by {side}."
        )
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


# What follows runs in the conversion process, under TensorFlow.


def signature(model, job):
    """(function of the file's input, its `tf.TensorSpec`) of the whole model."""
    import tensorflow as tf

    pixels = job.get("input", "float") == "uint8"
    mean, std = job["preprocessing"][1:3]
    size = job.get("batch_size", 1)
    spec = tf.TensorSpec(
        (size, *model.input_shape[1:]), tf.uint8 if pixels else tf.float32, name="images"
    )
    if job["graph"] == "lean":
        return edge.lean(model, size, (mean, std) if pixels else None), spec

    def plain(x):
        if pixels:
            scale = 1 / (255 * np.asarray(std, "float32"))
            x = (tf.cast(x, tf.float32) - 255 * np.asarray(mean, "float32")) * scale
        return model(x, training=False)

    return plain, spec


def write_litert(model, path, job):
    import tensorflow as tf

    function, spec = signature(model, job)
    with tempfile.TemporaryDirectory() as folder:
        archive(model, function, spec, folder)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        path.write_bytes(converter.convert())


def archive(model, function, spec, folder):
    """Write a SavedModel whose one function is `serve`, in which variables keep their values."""
    new = keras.export.ExportArchive()
    new.track(model)
    new.add_endpoint("serve", function, input_signature=[spec])
    new.write_out(str(folder), verbose=False)


def write_onnx(model, path, job):
    try:
        import onnxruntime  # noqa: F401  to find out before the work
        import tf2onnx
    except ModuleNotFoundError as error:
        raise Refused(f"{path.name} needs {error.name}: pip install 'keras-vitnt[onnx]'.") from None
    import tensorflow as tf

    def complement(context, node, name, arguments):
        """ONNX has the error function, but not its complement, which Keras' GELU uses."""
        consumers = context.find_output_consumers(node.output[0])
        node.type = "Erf"
        one = context.make_const(f"{name}_one", np.array(1, "float32"))
        found = context.make_node("Sub", [one.output[0], node.output[0]])
        context.replace_all_inputs(node.output[0], found.output[0], ops=consumers)

    function, spec = signature(model, job)
    tf2onnx.convert.from_function(
        tf.function(function, input_signature=[spec]),
        input_signature=[spec],
        opset=18,
        custom_op_handlers={"Erfc": (complement, [])},
        output_path=str(path),
    )


def write_saved_model(model, path, job):
    import tensorflow as tf

    function, spec = signature(model, dict(job, graph="plain"))
    whole = tf.TensorSpec((None, *spec.shape[1:]), spec.dtype, name="images")
    archive(model, function, whole, path)


class Refused(Exception):
    """A file broke a rule; the message names the file and the rules."""


class Worker:
    """The conversion of one model into the files of a job."""

    def __init__(self, model, job, arrays):
        self.model = model
        self.job = job
        self.pixels = arrays["photos"]
        self.labels = arrays.get("labels")
        self.preprocessing = images.Preprocessing(*job["preprocessing"])
        self.calibration = arrays.get("calibration")
        say(f"Running Keras on {len(self.pixels)} photos")
        x = images.normalize(self.pixels, self.preprocessing)
        self.expected = model.predict(x, batch_size=16, verbose=0)
        names = job.get("names") or [str(i) for i in range(self.expected.shape[-1])]
        if self.labels is not None and job.get("check_labels"):
            mixed = gate.swapped(self.expected, self.labels, names)
            if mixed:
                raise Refused(f"The model is refused: {mixed}")

    def given(self, pixels):
        """Photos as the file takes them."""
        if self.job.get("input", "float") == "uint8":
            return pixels
        return images.normalize(pixels, self.preprocessing)

    def compare(self, path):
        run = gate.open_model(path)[0]
        return gate.compare(run(self.given(self.pixels)), self.expected, self.labels)

    def refuse(self, path, broken):
        if broken:
            raise Refused(f"{path.name} is refused: {'; '.join(broken)}.")

    def quantized(self, whole, path, kind):
        """Write a quantised file; (parts kept in float, sensitivity)."""
        calibration = None
        if kind == "int8-static":
            size = self.job.get("batch_size", 1)
            found = self.given(self.calibration)
            calibration = [
                np.resize(found[i : i + size], (size, *found.shape[1:]))
                for i in range(0, len(found), size)
            ]
        keep = self.job.get("keep_float") or []
        unknown = set(keep) - set(quantize.parts(whole)) if keep else ()
        if unknown:
            raise Refused(
                f"There is no part {sorted(unknown)[0]!r} to keep in float; there are: "
                f"{', '.join(quantize.parts(whole))}."
            )
        limit, rows = self.job.get("max_drop"), []

        def logits(content):
            path.write_bytes(content)
            return gate.open_model(path)[0](self.given(self.pixels))

        def drop(content):
            return gate.compare(logits(content), self.expected, self.labels).drop

        if self.job.get("sensitivity") or limit is not None:
            rows = quantize.sensitivity(whole, kind, logits, calibration, say)
        say(f"Quantising to {kind}")
        content = quantize.quantize(whole, kind, keep, calibration=calibration)
        if limit is not None and not drop(content) <= limit:
            try:
                content, keep = quantize.within(
                    whole, kind, rows, drop, limit, keep, calibration, say
                )
            except RuntimeError as error:
                raise Refused(f"{path.name} is refused: {error}") from None
        path.write_bytes(content)
        return keep, rows

    def write(self, path, kind, whole):
        """Write one file and let it pass the gate: a `Report` as a dict."""
        form, graph = format_of(path), self.job["graph"]
        kept, rows, found, compared, times = [], [], {}, None, {}
        say(f"Writing {path.name}")
        if form == "keras":
            self.model.save(path)
        elif form == "saved_model":
            write_saved_model(self.model, path, self.job)
        elif form == "onnx":
            write_onnx(self.model, path, self.job)
        elif kind:
            kept, rows = self.quantized(whole, path, kind)
        else:
            shutil.copy(whole, path)
        if form == "litert":
            found = gate.structure(path)
            broken = found.pop("faults")
            if not broken and graph == "lean" and kind != "int8-static":
                if found["partitions"] != 1:
                    broken = [f"{found['partitions']} XNNPACK partitions, not 1"]
            self.refuse(path, broken)
        if form != "keras":
            say(f"Running {path.name} on {len(self.pixels)} photos")
            compared = self.compare(path)
            self.refuse(path, gate.faults(compared, kind, self.job.get("min_agreement")))
            runs = {"file": gate.open_model(path)[0]}
            if kind:
                runs["float"] = gate.open_model(whole)[0]
            x = self.given(self.pixels[: self.job.get("batch_size", 1)])
            times = gate.latencies({name: lambda run=run: run(x) for name, run in runs.items()})
        return Report(
            path=str(path),
            format=form,
            graph=graph if form in ("litert", "onnx") else "plain",
            quantize=kind,
            input=self.job.get("input", "float"),
            batch_size=None if form in ("saved_model", "keras") else self.job.get("batch_size", 1),
            bytes=size_of(path),
            structure=found,
            comparison=compared and compared._asdict(),
            milliseconds=times.get("file"),
            float_milliseconds=times.get("float"),
            kept=kept,
            sensitivity=[row._asdict() for row in rows],
        )._asdict()


def size_of(path):
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def say(text):
    print(f"* {text}", flush=True)


def main(work):
    """The conversion process: `python -m keras_vitnt.export FOLDER`, with the job in the folder."""
    from . import tnt, vit  # noqa: F401  registers the layers that the file names

    model = keras.models.load_model(work / "model.keras", compile=False)
    job = json.loads((work / "job.json").read_text())
    with np.load(work / "arrays.npz") as found:
        arrays = dict(found)
    files = [(Path(file["path"]), file["quantize"]) for file in job["files"]]
    whole = work / "whole.tflite"
    try:
        worker = Worker(model, job, arrays)
        if any(format_of(path) == "litert" for path, _ in files):
            say("Converting to LiteRT")
            write_litert(model, whole, job)
        reports = [worker.write(path, kind, whole) for path, kind in files]
    except Refused as error:
        (work / "refused").write_text(str(error))
        raise SystemExit(1) from None
    (work / "reports.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
