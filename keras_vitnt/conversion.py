"""The conversion process: one model into the files of a job, each run and compared.

`export` starts it under TensorFlow and passes a folder with `model.keras`, `job.json` and
`arrays.npz`; the process adds `reports.json`, or `refused` with the reason.
"""

import json
import os
import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

from . import edge, gate, images, quantize
from .gate import format_of


class ExportReport(NamedTuple):
    """What was written, and how it compares with the model.

    Attributes:
        path: of the file or folder.
        format: "litert", "onnx", "saved_model" or "keras".
        graph, quantize, input: as asked; a SavedModel's and a `.keras` file's graph is "plain".
        batch_size: as asked; None for any.
        bytes: its size.
        structure: of a LiteRT file, see `gate.structure`; else an empty dict.
        comparison: a `gate.Comparison`; None for a `.keras` file.
        milliseconds: median of one call of the file, in turns with those written at the same time;
            None for a `.keras` file.
        float_milliseconds: of the float32 file that a quantised one was made of, in the same turns.
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


def signature(model, job, panels=False):
    """(function of the file's input, its `tf.TensorSpec`) of the whole model; see `edge.lean`."""
    import tensorflow as tf

    pixels = job["input"] == "uint8"
    mean, std = job["preprocessing"][1:3]
    size = job["batch_size"]
    spec = tf.TensorSpec(
        (size, *model.input_shape[1:]), tf.uint8 if pixels else tf.float32, name="images"
    )
    if job["graph"] == "lean":
        return edge.lean(model, (mean, std) if pixels else None, panels), spec

    def plain(x):
        if pixels:
            scale = 1 / (255 * np.asarray(std, "float32"))
            x = (tf.cast(x, tf.float32) - 255 * np.asarray(mean, "float32")) * scale
        return model(x, training=False)

    return plain, spec


def write_litert(model, path, job, panels=False):
    import tensorflow as tf

    function, spec = signature(model, job, panels)
    with tempfile.TemporaryDirectory() as folder:
        archive(model, function, spec, folder)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        try:
            path.write_bytes(converter.convert())
        except Exception as error:  # the converter's own kind, with pages of its graph
            foreign = re.findall(r"(?:TF Select|Custom) ops: (.+)", str(error))
            if not foreign:
                raise
            raise Refused(
                "The LiteRT file is refused: operators beyond the built-in ones: "
                f"{', '.join(foreign)}."
            ) from None


def archive(model, function, spec, folder):
    """Write a SavedModel whose one function is `serve`, in which variables keep their values."""
    new = keras.export.ExportArchive()
    new.track(model)
    new.add_endpoint("serve", function, input_signature=[spec])
    new.write_out(str(folder), verbose=False)


def write_onnx(model, path, job):
    import tensorflow as tf
    import tf2onnx

    def error_function(context, node, name, arguments):
        """ONNX Runtime knows a GELU by 1 + erf(x / c); TensorFlow has erf(x * c) or erfc(-x * c).

        Besides, ONNX has no complement.
        """
        product, sign = node.inputs[0], "Sub"
        if product.type == "Mul" and product.inputs[1].is_const():
            x = product.input[0]
            if node.type == "Erfc" and product.inputs[0].type == "Neg":
                x, sign = product.inputs[0].input[0], "Add"
            divisor = 1 / product.inputs[1].get_tensor_value(as_list=False)
            divisor = context.make_const(f"{name}_divisor", divisor.astype("float32"))
            quotient = context.make_node("Div", [x, divisor.output[0]])
            context.replace_input(node, node.input[0], quotient.output[0], 0)
        if node.type == "Erfc":
            consumers = context.find_output_consumers(node.output[0])
            node.type = "Erf"
            one = context.make_const(f"{name}_one", np.array(1, "float32"))
            found = context.make_node(sign, [one.output[0], node.output[0]])
            context.replace_all_inputs(node.output[0], found.output[0], ops=consumers)

    function, spec = signature(model, job)
    tf2onnx.convert.from_function(
        tf.function(function, input_signature=[spec]),
        input_signature=[spec],
        opset=18,
        custom_op_handlers=dict.fromkeys(("Erf", "Erfc"), (error_function, [])),
        output_path=str(path),
    )


def write_saved_model(model, path, job):
    import tensorflow as tf

    function, spec = signature(model, dict(job, graph="plain"))
    whole = tf.TensorSpec((None, *spec.shape[1:]), spec.dtype, name="images")
    archive(model, function, whole, path)


class Refused(Exception):
    """A file broke a rule; the message names the file and the rules."""


def refuse(name, broken):
    if broken:
        raise Refused(f"{name} is refused: {'; '.join(broken)}.")


class Worker:
    """The conversion of one model into the files of a job."""

    def __init__(self, model, job, arrays):
        self.model = model
        self.job = job
        self.pixels = arrays["photos"]
        self.labels = arrays.get("labels")
        self.preprocessing = images.Preprocessing(*job["preprocessing"])
        self.calibration = arrays.get("calibration")
        self.runs = {}  # each file that was compared, open
        self.floats = {}  # see `write_floats`
        say(f"Running Keras on {len(self.pixels)} photos")
        x = images.normalize(self.pixels, self.preprocessing)
        self.expected = model.predict(x, batch_size=16, verbose=0)
        if not np.isfinite(self.expected).all():
            raise Refused(
                "The model is refused: its own outputs for the photos are not all finite."
            )
        probabilities = self.expected.min() >= 0 and self.expected.max() <= 1
        self.floor = 0.0 if probabilities else 1.0  # see `gate.faults`
        names = job.get("names") or [str(i) for i in range(self.expected.shape[-1])]
        if self.labels is not None and job.get("check_labels"):
            mixed = gate.swapped(self.expected, self.labels, names)
            if mixed:
                raise Refused(f"The model is refused: {mixed}")

    def given(self, pixels):
        """Photos as the file takes them."""
        if self.job["input"] == "uint8":
            return pixels
        return images.normalize(pixels, self.preprocessing)

    def compare(self, path):
        self.runs[str(path)] = run = gate.open_model(path)[0]
        return gate.compare(run(self.given(self.pixels)), self.expected, self.labels)

    def write_floats(self, folder):
        """The float32 LiteRT files of the job, `floats`: {whether quantised: (path, comparison)}.

        Both are one, unless float32 has panels: they are slower in int8, and the quantizer cannot
        make them fp16.
        """
        files = [file for file in self.job["files"] if format_of(file["path"]) == "litert"]
        wanted = {bool(file["quantize"]) for file in files}
        if wanted and self.job["graph"] == "lean" and edge.has_panels(self.model):
            for quantised in sorted(wanted):
                path = folder / ("dense.tflite" if quantised else "panels.tflite")
                self.floats[quantised] = self.write_float(path, panels=not quantised)
        elif wanted:
            self.floats = dict.fromkeys(wanted, self.write_float(folder / "dense.tflite", False))

    def write_float(self, path, panels):
        """Write a float32 LiteRT file, which must be exact: (path, comparison)."""
        say("Converting to LiteRT")
        write_litert(self.model, path, self.job, panels)
        name = "The float32 LiteRT file"
        refuse(name, gate.structure(path)["faults"])
        compared = self.compare(path)
        refuse(name, gate.faults(compared, floor=self.floor))
        return path, compared

    def quantized(self, whole, path, kind):
        """Write a quantised file; (parts kept in float, sensitivity)."""
        if not quantize.parts(whole):
            raise Refused(
                f"{path.name} is refused: there is no dense layer or convolution to quantise."
            )
        ranges = None
        if kind == "int8-static":
            say(f"Running the float32 file on {len(self.calibration)} photos of the training data")
            size = self.job["batch_size"]
            found = self.given(self.calibration)
            samples = [
                np.resize(found[i : i + size], (size, *found.shape[1:]))
                for i in range(0, len(found), size)
            ]
            ranges = quantize.activation_ranges(whole, samples)
        keep = self.job.get("keep_float")
        if keep is None:
            keep = [] if kind == "fp16" else quantize.float_by_default(whole)
        unknown = set(keep) - set(quantize.parts(whole))
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

        if self.job.get("sensitivity"):
            rows = quantize.sensitivity(whole, kind, logits, ranges, say)
        say(f"Quantising to {kind}")
        content = quantize.quantize(whole, kind, keep, ranges=ranges)
        if limit is not None and not drop(content) <= limit:
            rows = rows or quantize.sensitivity(whole, kind, logits, ranges, say)
            try:
                content, keep = quantize.within(whole, kind, rows, drop, limit, keep, ranges, say)
            except RuntimeError as error:
                raise Refused(f"{path.name} is refused: {error}") from None
        path.write_bytes(content)
        return keep, rows

    def write(self, path, kind):
        """Write one file and let it pass the gate: an `ExportReport` as a dict."""
        form, graph = format_of(path), self.job["graph"]
        kept, rows, found, compared = [], [], {}, None
        say(f"Writing {path.name}")
        if form == "keras":
            self.model.save(path)
        elif form == "saved_model":
            write_saved_model(self.model, path, self.job)
        elif form == "onnx":
            write_onnx(self.model, path, self.job)
        elif kind:
            kept, rows = self.quantized(self.floats[True][0], path, kind)
        else:
            shutil.copy(self.floats[False][0], path)
        if form == "litert":
            found = gate.structure(path)
            broken = found.pop("faults")
            if not broken and graph == "lean" and kind != "int8-static":
                if found["partitions"] != 1:
                    broken = [f"{found['partitions']} XNNPACK partitions, not 1"]
                elif not found["whole"]:
                    broken = ["XNNPACK leaves operators at its beginning or end to others"]
            refuse(path.name, broken)
        if form != "keras":
            say(f"Running {path.name} on {len(self.pixels)} photos")
            exact = form == "litert" and not kind
            compared = self.floats[False][1] if exact else self.compare(path)
            agreement = self.job.get("min_agreement")
            refuse(path.name, gate.faults(compared, kind, agreement, self.floor))
        return ExportReport(
            path=str(path),
            format=form,
            graph=graph if form in ("litert", "onnx") else "plain",
            quantize=kind,
            input=self.job["input"],
            batch_size=None if form in ("saved_model", "keras") else self.job["batch_size"],
            bytes=size_of(path),
            structure=found,
            comparison=compared and compared._asdict(),
            milliseconds=None,
            float_milliseconds=None,
            kept=kept,
            sensitivity=[row._asdict() for row in rows],
        )._asdict()

    def time(self, reports):
        """Add the latencies of all files, which take turns, to their reports."""
        say("Timing")
        x = self.given(self.pixels[: self.job["batch_size"]])
        times = gate.latencies({path: lambda run=run: run(x) for path, run in self.runs.items()})
        for report in reports:
            copied = report["format"] == "litert" and not report["quantize"]
            path = str(self.floats[False][0]) if copied else report["path"]
            report["milliseconds"] = times.get(path)
            if report["quantize"]:
                report["float_milliseconds"] = times[str(self.floats[True][0])]


def size_of(path):
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def say(text):
    print(f"* {text}", flush=True)


def write_all(model, job, arrays, folder):
    """The job's files: a list of `ExportReport`s as dicts. `folder`: for what lies between them."""
    worker = Worker(model, job, arrays)
    worker.write_floats(folder)
    reports = [worker.write(Path(file["path"]), file["quantize"]) for file in job["files"]]
    worker.time(reports)
    return reports


def end_with_parent():
    """Wait for the end of the input, which is the parent's end, however it came."""
    os.read(0, 1)
    os._exit(1)


def main(work):
    """The whole process, on its folder."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    work = Path(work)

    def refused(message):
        (work / "refused").write_text(message, "utf-8")
        return SystemExit(1)

    try:
        model = keras.models.load_model(work / "model.keras", compile=False)
    except TypeError as error:
        cause = re.search(r"Could not locate class '\w+'", str(error))
        cause = cause.group() if cause else gate.first_line(error)
        raise refused(
            "The conversion process, which has Keras' layers and this package's, cannot open the "
            f"model: {cause}."
        ) from None
    job = json.loads((work / "job.json").read_text())
    with np.load(work / "arrays.npz") as found:
        arrays = dict(found)
    try:
        reports = write_all(model, job, arrays, work)
    except Refused as error:
        raise refused(str(error)) from None
    (work / "reports.json").write_text(json.dumps(reports))
