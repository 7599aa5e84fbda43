"""Files are the model's numbers, or are not left; each was run in the runtime that users have."""

import collections
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import CASES, REFERENCE, converted, forward, numpy, weights_file
from test_cli import run
from test_datasets import write_photos
from test_models import OPTIONS, TNT, VIT, installed_backends, settle

from keras_vitnt import (
    checks,
    conversion,
    datasets,
    edge,
    edge_tnt,
    edge_vit,
    gate,
    images,
    load_weights,
    models,
    quantize,
)
from keras_vitnt.export import (
    export,
    export_all,
    folder_beside,
    put_in_place,
    real_photos,
    resized,
)
from keras_vitnt.positions import resize, sincos2d
from keras_vitnt.sources import Source, photos_of, recorded

SIGNS = Path(__file__).parent.parent / "saved_models" / "signs"


def numbers(path, photos, preprocessing):
    """A file's outputs for pixels."""
    model, shape, dtype = gate.open_model(path)
    assert shape == photos.shape[1:]
    return model(photos if dtype == "uint8" else images.normalize(photos, preprocessing))


@pytest.mark.parametrize(
    "case", ["timm_tnt", pytest.param("timm_deit_distilled", marks=pytest.mark.conversion)]
)
def test_every_backend_writes_the_references_numbers(case, tmp_path):
    """timm's weights and logits: whichever backend exports, the file has them."""
    builder, options = CASES[case]
    model = builder(**options)
    load_weights(model, weights_file(case))
    with np.load(REFERENCE / f"{case}.npz") as stored:
        image, expected = stored["image"], stored["logits"]
    export(model, tmp_path / "model.tflite", batch_size=len(image))
    found = gate.open_model(tmp_path / "model.tflite")[0](image)
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.conversion
def test_files_from_all_backends_are_equal(tmp_path):
    """From TensorFlow here, and from the others in processes of their own."""
    model = settle(models.TNT(**TNT))
    model.save(tmp_path / "model.keras")
    kinds = {"model.tflite": None, "int8.tflite": "int8", "saved_model": None}
    code = "import sys, keras; from pathlib import Path; from keras_vitnt.export import *\n"
    code += "model = keras.models.load_model(sys.argv[1], compile=False)\n"
    code += f"export_all(model, {{Path(sys.argv[2], n): k for n, k in {kinds}.items()}})"
    others = installed_backends() - {"tensorflow"}
    if not others:
        pytest.skip("only TensorFlow is installed")
    for backend in others:
        command = [sys.executable, "-c", code, tmp_path / "model.keras", tmp_path / backend]
        subprocess.run(command, env=dict(os.environ, KERAS_BACKEND=backend), check=True)
    export_all(model, {tmp_path / "tensorflow" / name: kind for name, kind in kinds.items()})
    photos, plain = real_photos((8, 12, 3)), images.Preprocessing((8, 12))
    for name in kinds:
        expected = numbers(tmp_path / "tensorflow" / name, photos, plain)
        for backend in others:
            found = numbers(tmp_path / backend / name, photos, plain)
            close = 1e-5 * max(1, np.abs(expected).max())
            np.testing.assert_allclose(found, expected, rtol=0, atol=close)


def in_onnx_runtime(path):
    """{operator: how many} of what ONNX Runtime makes of a file."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return collections.Counter(node.op_type for node in nodes)


@pytest.mark.conversion
@pytest.mark.parametrize("graph", ["lean", "plain"])
def test_onnx_runtime_knows_the_gelus(graph, tmp_path):
    export(settle(models.TNT(**TNT)), tmp_path / "x.onnx", graph=graph)
    operators = in_onnx_runtime(tmp_path / "x.onnx")
    assert operators["Gelu"] + operators["BiasGelu"] == 2 * TNT["depth"] and not operators["Erf"]


@pytest.mark.conversion
def test_error_functions_outside_gelus_are_kept(tmp_path):
    x = keras.Input((8, 12, 3))
    y = keras.ops.concatenate([keras.ops.erf(x), keras.ops.erf(-3 * x)], axis=-1)
    model = keras.Model(x, keras.layers.GlobalAveragePooling2D()(y))
    found = export(model, tmp_path / "x.onnx", graph="plain")
    assert found.comparison.max_difference < 1e-6
    assert in_onnx_runtime(tmp_path / "x.onnx")["Erf"] == 2


@pytest.mark.conversion
def test_every_format_quantisation_and_input(tmp_path):
    model = settle(models.TNT(**TNT))
    preprocessing = images.Preprocessing((8, 12), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    photos = real_photos((8, 12, 3))
    expected = numpy(forward(model, images.normalize(photos, preprocessing)))
    files = {
        "float.tflite": None,
        "half.tflite": "fp16",
        "int8.tflite": "int8",
        "static.tflite": "int8-static",
        "model.onnx": None,
        "saved_model": None,
        "model.keras": None,
    }
    for given, graph in (("float", "lean"), ("uint8", "plain")):
        folder = tmp_path / given
        if given == "uint8":
            del files["model.keras"]
        found = export_all(
            model,
            {folder / name: kind for name, kind in files.items()},
            graph,
            batch_size=3,
            input=given,
            preprocessing=preprocessing,
            photos=photos,
            calibration=photos,
            names=list("abc"),
        )
        left = {*files, *(f"{name}.json" for name in files)}
        assert {path.name for path in folder.iterdir()} == left
        for report in found[:6]:
            exact = report.quantize is None
            close = 1e-5 if exact else 0.01 if report.quantize == "fp16" else 0.3
            outputs = numbers(report.path, photos, preprocessing)
            np.testing.assert_allclose(outputs, expected, atol=close * np.abs(expected).max())
            if report.format == "litert" and graph == "lean" and report.quantize != "int8-static":
                assert report.structure["partitions"] == 1 and report.structure["whole"]
            assert report.milliseconds > 0
            assert (report.float_milliseconds or 0) > 0 or not report.quantize
            record = json.loads((folder / f"{report.path.name}.json").read_text())
            assert record["comparison"]["max_difference"] == report.comparison.max_difference
            assert record["names"] == list("abc") and record["bytes"] == report.bytes
            assert record["preprocessing"]["mean"] == [0.4, 0.5, 0.6]
    opened = keras.models.load_model(tmp_path / "float" / "model.keras", compile=False)
    assert opened.count_params() == model.count_params()


@pytest.fixture
def passed_on(monkeypatch):
    """What `export` would convert: a list of [model, options]."""
    found = []

    def instead(model, targets, graph, **options):
        found.append((model, options))
        return [None]

    monkeypatch.setattr(sys.modules["keras_vitnt.export"], "export_all", instead)
    return found


@pytest.mark.parametrize("positions", ["learned", "sincos2d", "factorized2d", "none"])
def test_another_image_size(positions, tmp_path, passed_on):
    model = settle(models.ViT(**VIT, positions=positions))
    new = resized(model, (16, 12))
    assert new.input_shape == (None, 16, 12, 3)
    assert resized(new, (16, 12)) is new
    before, after = model.get_layer("encoder"), new.get_layer("encoder")
    table = resize(numpy(before.patch_positions(16)), before.grid, after.grid)
    if positions == "sincos2d":
        table = sincos2d(*after.grid, 16)
    np.testing.assert_allclose(numpy(after.patch_positions(16)), table, atol=1e-6)
    export(model, tmp_path / "model.tflite", image_size=(16, 12))
    ((given, options),) = passed_on
    assert options["preprocessing"] == images.Preprocessing((16, 12))
    x = images.normalize(real_photos((16, 12, 3)), options["preprocessing"])
    np.testing.assert_allclose(numpy(forward(given, x)), numpy(forward(new, x)), atol=1e-5)
    for size, message in [((15, 12), "15 x 12 pixels cannot be cut"), (16, "got 16")]:
        with pytest.raises(ValueError, match=message):
            export(model, tmp_path / "other.tflite", image_size=size)


def test_arguments_that_do_not_fit_leave_nothing(tmp_path):
    model = models.ViT(**VIT)
    by_hand = keras.Sequential([keras.Input((8, 12, 3)), keras.layers.Flatten()])
    mapped = models.ViT(**VIT, pooling="map", fc_norm=True)
    both = keras.Model(model.input, [model.output, model.get_layer("norm").output])
    unsized = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(4, 3)])
    photos = np.zeros((2, 8, 12, 3), "uint8")
    base = models.ViT(**VIT, include_top=False, pooling="token")
    vector, tokens = base.output, models.ViT(**VIT, include_top=False)
    named = dict(activation="softmax", name="head")
    mean = keras.layers.GlobalAveragePooling1D(name="pool")(tokens.output)
    one, gray = models.ViT(**dict(VIT, classes=1)), images.Preprocessing((8, 12), (0.5,), (0.5,))
    layered = models.ViT(**VIT, classifier_activation=keras.layers.Softmax())
    pixels = keras.Input((8, 12, 3), dtype="uint8")
    pixels = keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(pixels))
    loaded = models.ViT(**VIT)
    loaded.get_layer("block00").mlp.fc1.enable_lora(2)
    wrong = [
        (model.layers[1], "x.tflite", {}, "keras.Model or where .*got <class .*Patches'>"),
        (both, "saved_model", {}, "one input and one output.*has 1 and 2"),
        (keras.Sequential([keras.layers.Flatten()]), "saved_model", {}, "has 0 and 0"),
        (unsized, "saved_model", {}, r"of one size.*\(None, None, 3\)"),
        (keras.Model(base.input, keras.layers.Dense(5, **named)(vector)), "x.tflite", {}, "linear"),
        (
            keras.Model(base.input, keras.layers.Dense(5, name="predictions")(vector)),
            "x.tflite",
            {},
            "the layers predictions: pass",
        ),
        (keras.Model(tokens.input, mean), "x.tflite", {}, "the layers pool: pass"),
        (by_hand, "x.tflite", {}, 'pass graph="plain"'),
        (model, "x.tflite", {"graph": "fast"}, "graph.*got 'fast'"),
        (model, "x.tflite", {"input": "int4"}, "input.*got 'int4'"),
        (model, "x.tflite", {"batch_size": 0}, "batch_size.*got 0"),
        (model, "x.tflite", {"quantize": "int4"}, "quantize='int4'"),
        (model, "x.tflite", {"quantize": "int8-static"}, "needs photos of the training data"),
        (model, "x.tflite", {"max_drop": 0.1}, "of a quantised file"),
        (model, "x.tflite", {"quantize": "int8", "keep_float": [], "graph": "plain"}, "lean graph"),
        (model, "x.tflite", {"min_agreement": 99}, "a share.*got 99"),
        (model, "x.tflite", {"quantize": "int8", "max_drop": -1}, "0 or more.*got -1"),
        (model, "x.tflite", {"quantize": "int8", "keep_float": "head"}, "a list.*got 'head'"),
        (model, "x.tflite", {"quantize": "int8", "keep_float": ["hat"]}, "no part 'hat' to keep"),
        (model, "x.tflite", {"labels": [0, 1]}, "those of `photos` in an array; photos=None"),
        (model, "x.tflite", {"labels": [0], "photos": "embedded"}, "bring their own"),
        (tokens, "x.tflite", {"photos": photos, "labels": [0, 1]}, r"is \(7, 16\)"),
        (one, "x.tflite", {"min_agreement": 0.9}, "one logit has no top-1 class"),
        (one, "x.tflite", {"photos": photos, "labels": [0, 0]}, "two classes or more"),
        (model, "x.tflite", {"preprocessing": gray}, r"3 channels; got \(0.5,\)"),
        (model, "x.tflite", {"image_size": (0, 8)}, r"1 or more; got \(0, 8\)"),
        (layered, "x.tflite", {}, "ends in <Softmax"),
        (model, "x.tflite", {"photos": photos, "labels": [0, 9]}, r"0 to 2 for each.*\[0 9\]"),
        (model, "x.tflite", {"photos": photos, "labels": np.eye(2)}, r"got float64 \(2, 2\)"),
        (model, "x.tflite", {"photos": photos[:0]}, r"got uint8 \(0, 8, 12, 3\)"),
        (model, "x.tflite", {"photos": photos.tolist()}, "got int64"),
        (model, "x.tflite", {"names": ["a", "b"]}, "3 classes; got 2 names"),
        (model, "x.keras", {"input": "uint8"}, "x.keras is Keras' own"),
        (by_hand, "x.tflite", {"graph": "plain", "image_size": (9, 9)}, "only a ViT, DeiT or TNT"),
        (mapped, "x.tflite", {}, "fc_norm with pooling.*plain"),
        (models.ViT(**VIT, classifier_activation="mish"), "x.tflite", {}, "ends in mish"),
        (keras.Model(model.input, model.get_layer("block00").output), "x.tflite", {}, "whole ViT"),
        (model, "x.onnx", {"quantize": "int8"}, "quantize='int8' of .*x.onnx"),
        (model, "x.pb", {}, "Unknown format"),
        (model, "x.tflite", {"photos": np.zeros((1, 8, 8, 3), "uint8")}, "photos.*8, 12, 3"),
        ("absent", "x.tflite", {}, "no model at absent"),
        (model, "x.tflite", {"batch_size": True}, "batch_size.*got True"),
        (model, "x.tflite", {"names": "abc"}, "a list of str.*got 'abc'"),
        (model, "x.tflite", {"names": [0, 1, 2]}, r"a list of str.*got \[0, 1, 2\]"),
        (model, "x.tflite", {"names": {"a": 0, "b": 1, "c": 2}}, "a list of str"),
        (model, ".tflite", {}, "Unknown format of .*/.tflite"),
        (model, "new/..", {}, "Unknown format"),
        (model, "x.tflite", {"preprocessing": {"size": (8, 12), "mean": 0.5}}, "a mean and a std"),
        (model, "x.tflite", {"preprocessing": {"size": (8, 12), "crop": 0}}, "a crop above 0"),
        (model, "x.tflite", {"preprocessing": {"sizes": (8, 12)}}, "preprocessing.*'sizes'"),
        (model, "x.tflite", {"preprocessing": (8, 12)}, r"or a dict of one; got \(8, 12\)"),
        (pixels, "x.tflite", {"graph": "plain"}, "takes uint8: give it a float32 input"),
        (keras.Model(model.input, {"a": model.output}), "x.tflite", {}, "not a dict"),
        (loaded, "x.tflite", {}, "such as LoRA's"),
    ]
    for given, name, options, message in wrong:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            export(given, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())
    (tmp_path / "photos" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"photos is a folder of something else \(a\)"):
        export(model, tmp_path / "photos")
    (tmp_path / "photos" / "saved_model.pb").write_text("")
    (tmp_path / "photos" / "variables").mkdir()
    with pytest.raises(ValueError, match=r"photos is a folder of something else \(a\)"):
        export(model, tmp_path / "photos")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; a SavedModel"):
        export(model, tmp_path / "file")
    with pytest.raises(ValueError, match="Unknown format"):
        export(model, ".")
    with pytest.raises(OSError, match="Cannot write .*x.tflite"):
        export(model, tmp_path / "file" / "x.tflite")


def litert(path, function, shape, flex=False):
    """A LiteRT file of any function."""
    import tensorflow as tf

    traced = tf.function(function, [tf.TensorSpec(shape, tf.float32)])
    converter = tf.lite.TFLiteConverter.from_concrete_functions([traced.get_concrete_function()])
    if flex:
        converter.target_spec.supported_ops = [tf.lite.OpsSet.SELECT_TF_OPS]
    path.write_bytes(converter.convert())
    return gate.structure(path)


@pytest.mark.conversion
def test_the_gate_finds_planted_faults_of_structure(tmp_path):
    import tensorflow as tf

    square = np.eye(4, dtype="float32")
    path = tmp_path / "x.tflite"
    assert "Flex" in litert(path, tf.math.erf, (1, 4), flex=True)["faults"][0]
    found = litert(path, lambda x: x @ square, (None, 4))
    assert "dynamic tensors" in found["faults"][0]
    found = litert(
        path,
        lambda x: tf.transpose(tf.reshape(x, (2, 2, 2, 2, 2)), (4, 3, 2, 1, 0)),
        (1, 32),
    )
    assert "rank 5" in found["faults"][0]
    found = litert(
        path,
        lambda x: tf.nn.softmax(tf.cumsum(tf.nn.softmax(x @ square), 1) @ square) @ square,
        (1, 4),
    )
    assert found["faults"] == [] and found["partitions"] == 2
    for function, whole in [
        (lambda x: x @ square, True),
        (lambda x: tf.cumsum(x @ square, 1), False),
        (lambda x: tf.cumsum(x, 1) @ square, False),
    ]:
        found = litert(path, function, (1, 4))
        assert found["partitions"] == 1 and found["whole"] == whole


@pytest.mark.conversion
def test_the_gate_finds_a_wrong_weight(tmp_path):
    """The file of one model against the numbers of another, which differs in one bias."""
    model = settle(models.ViT(**VIT))
    photos, plain = real_photos((8, 12, 3)), images.Preprocessing((8, 12))
    (report,) = converted(model, [None], tmp_path, photos)
    outputs = numbers(report["path"], photos, plain)
    x = images.normalize(photos, plain)
    assert gate.faults(gate.compare(outputs, numpy(forward(model, x)))) == []
    bias = model.get_layer("block00").mlp.fc2.bias
    bias.assign(numpy(bias) + np.eye(1, 16, dtype="float32")[0])
    found = gate.compare(outputs, numpy(forward(model, x)))
    assert "it differs from Keras by" in gate.faults(found)[0]
    assert "top-1 agreement" in gate.faults(found, "int8", min_agreement=1.01)[0]
    upside_down = gate.compare(-outputs, outputs)
    assert "cosine" in gate.faults(upside_down, "int8")[0]
    assert gate.faults(found._replace(max_difference=float("nan")))  # no number is no pass
    assert "more than the largest is" in gate.faults(gate.compare(9 * outputs, outputs), "int8")[0]
    zero = gate.compare(0 * outputs, 0 * outputs)
    assert zero.cosine == 1 and not gate.faults(zero) and not gate.faults(zero, "int8")


@pytest.mark.conversion
def test_probabilities_are_measured_by_their_own_size(tmp_path, monkeypatch):
    """Of many classes the largest is small: two hundredths of it are a wrong weight."""
    model = models.ViT(**VIT | {"classes": 500}, classifier_activation="softmax")
    photos = real_photos((8, 12, 3))
    (report,) = converted(model, [None], tmp_path, photos)
    assert 0 < report["comparison"]["largest_logit"] < 0.01
    graph = edge.lean(model)
    monkeypatch.setattr(edge, "lean", lambda *given: lambda x: 1.005 * graph(x))
    with pytest.raises(conversion.Refused, match="it differs from Keras by"):
        converted(model, [None], tmp_path, photos)


@pytest.mark.conversion
@pytest.mark.parametrize("kind", [None, "int8"])
def test_the_conversion_refuses_a_wrong_graph(kind, tmp_path, monkeypatch):
    """A wrong number, whatever is made of it, and a second partition: nothing is reported."""
    model = settle(models.ViT(**VIT))
    lean = edge.lean

    def with_wrong_scale(*arguments):
        graph = lean(*arguments)
        return lambda x: graph(x * 1.001)

    def with_other_operators(*arguments):
        import tensorflow as tf

        graph = lean(*arguments)

        def call(x):
            y = graph(x)
            zero = 1e-9 * tf.cumsum(y, 1)
            return y + zero @ np.eye(zero.shape[1], dtype="float32")

        return call

    def with_another_end(*arguments):
        import tensorflow as tf

        graph = lean(*arguments)
        differences = np.linalg.inv(np.triu(np.ones((3, 3), "float32")))
        return lambda x: tf.cumsum(graph(x) @ differences, 1)

    for broken, message in (
        (with_wrong_scale, "float32 LiteRT file is refused: it differs from Keras by"),
        (with_other_operators, "tflite is refused: 2 XNNPACK partitions, not 1"),
        (with_another_end, "tflite is refused: XNNPACK leaves operators at its beginning or end"),
    ):
        monkeypatch.setattr(edge, "lean", broken)
        with pytest.raises(conversion.Refused, match=message):
            converted(model, [kind], tmp_path, real_photos((8, 12, 3)))


@pytest.fixture
def signs(tmp_path):
    """The kept run, without its large files."""
    folder = tmp_path / "signs"
    folder.mkdir()
    for name in ("model.keras", "metrics.json", "labels.txt"):
        (folder / name).write_bytes((SIGNS / name).read_bytes())
    return folder


@pytest.mark.conversion
def test_a_run_is_exported_on_its_own_photos(signs, tmp_path, monkeypatch, capsys):
    """int8 of the main job's model: 99 % of answers, 0.3 points; then with two labels swapped."""
    target = tmp_path / "signs.tflite"
    run(monkeypatch, "export", signs, target, "--quantize", "int8", "--min-agreement", 0.99)
    told = capsys.readouterr().out
    assert "1 XNNPACK partition;" in told and "Accuracy change:" in told
    assert target.stat().st_size <= 0.27 * (SIGNS / "model.tflite").stat().st_size
    found = json.loads((tmp_path / "signs.tflite.json").read_text())["comparison"]
    assert found["photos"] == 411 and found["agreement"] >= 0.99
    assert found["keras_accuracy"] - found["accuracy"] <= 0.003
    run(monkeypatch, "predict", target, SIGNS.parent.parent / "examples" / "hand.jpg")
    assert re.search(r"9\d\.\d+%  5", capsys.readouterr().out)

    names = (signs / "labels.txt").read_text().split()
    names[2], names[7] = names[7], names[2]
    (signs / "labels.txt").write_text("\n".join(names) + "\n")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "export", signs, tmp_path / "swapped.tflite")
    assert stop.value.code == 2
    assert "'7', '2' are taken for one another: are their labels" in capsys.readouterr().err
    assert not list(tmp_path.glob("swapped*")) and not list(tmp_path.glob(".export-*"))


def test_labels_in_a_ring_are_found_and_a_bad_model_is_not_blamed():
    labels = np.repeat(np.arange(4), 10)
    logits = np.eye(4)[labels]
    assert gate.swapped(logits, labels, "abcd") is None
    assert "'b', 'd', 'c' are taken" in gate.swapped(logits, np.array([0, 2, 3, 1])[labels], "abcd")
    assert gate.swapped(np.eye(4)[0 * labels], labels, "abcd") is None  # all for one class
    assert gate.swapped(np.eye(3)[[1, 0]], np.array([0, 1]), "abc") is None  # too few to tell


def test_one_logit_is_compared_over_all_photos():
    logits = np.array([[1.0], [-2.0], [0.001]])
    near = gate.compare(logits - 0.002, logits)  # turns the sign of the last
    assert near.cosine > 0.999 and near.photos == 3
    assert gate.compare(-logits, logits).cosine == -1


@pytest.mark.conversion
def test_static_ranges_are_those_of_all_photos(tmp_path):
    """Whatever their order, and however dark the first one is."""
    model = settle(models.ViT(**VIT))
    photos = real_photos((8, 12, 3), 16)
    photos[0] = 0

    def compared(calibration):
        return converted(model, ["int8-static"], tmp_path, photos[1:], calibration)[0]["comparison"]

    found = compared(photos)
    assert found == compared(photos[::-1])
    assert found["max_difference"] < 0.05 * found["largest_logit"]
    with pytest.raises(conversion.Refused, match="cosine"):  # which shows that the ranges count
        compared(photos[:1])


@pytest.mark.conversion
def test_other_networks_may_have_layers_of_our_names(tmp_path):
    layers = [keras.Input((8, 12, 3)), keras.layers.Conv2D(4, 3, name="block1_conv1")]
    model = keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D()])
    (tmp_path / "saved_model").mkdir()  # an empty folder is as good as none
    export_all(model, {tmp_path / "saved_model": None, tmp_path / "x.keras": None})
    (found,) = export_all(model, {tmp_path / "x.tflite": None}, "plain")
    assert found.comparison.max_difference < 1e-5


@pytest.mark.conversion
def test_what_has_nothing_to_quantise_is_refused(tmp_path):
    layers = [keras.Input((8, 12, 3)), keras.layers.GlobalAveragePooling2D()]
    with pytest.raises(RuntimeError, match="no dense layer or convolution to quantise"):
        export(keras.Sequential(layers), tmp_path / "x.tflite", "int8", graph="plain")
    assert not list(tmp_path.iterdir())


@pytest.mark.conversion
def test_a_model_with_its_own_training_is_exported(tmp_path, monkeypatch):
    """From a folder with a file that looks like a module, over a link to a SavedModel's folder."""

    class Own(keras.Model):
        def train_step(self, data):
            return super().train_step(data)

    model = settle(models.ViT(**VIT))
    (tmp_path / "calendar.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    export(model, "first")
    (tmp_path / "current").symlink_to("first")
    report = export(Own(model.input, model.output), "current")
    assert report.path == Path("current") and (tmp_path / "current").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("calendar.py", "current", "current.json", "first", "first.json")
    ]


@pytest.mark.conversion
def test_a_killed_conversion_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys.modules[export.__module__], "START", "import os; os.kill(os.getpid(), 9)"
    )
    with pytest.raises(RuntimeError, match="was ended by SIGKILL .out of memory"):
        export(models.ViT(**VIT), tmp_path / "x.tflite")
    assert not list(tmp_path.iterdir())


@pytest.mark.conversion
def test_arguments_may_be_of_numpy(tmp_path):
    half = np.full(3, 0.5, "float32")
    found = export(
        settle(models.ViT(**VIT)),
        tmp_path / "x.tflite",
        "int8",
        batch_size=np.int64(2),
        preprocessing=images.Preprocessing((8, 12), half, half),
        names=np.array(["a", "b", "c"]),
        min_agreement=np.float32(0.1),
        keep_float=(part for part in ["stem"]),
    )
    record = json.loads((tmp_path / "x.tflite.json").read_text())
    assert record["names"] == ["a", "b", "c"] and record["preprocessing"]["mean"] == [0.5] * 3
    assert record["batch_size"] == 2 and found.kept == ["stem"]


@pytest.mark.conversion
def test_what_the_runtime_lacks_is_named(tmp_path):
    layers = [keras.Input((8, 12, 3)), keras.layers.GlobalAveragePooling2D()]
    model = keras.Sequential(layers)
    model = keras.Model(model.inputs, keras.ops.erfinv(0.1 * model.outputs[0]))
    with pytest.raises(RuntimeError, match="operators beyond the built-in ones: Erfinv"):
        export(model, tmp_path / "x.tflite", graph="plain")
    model = settle(models.ViT(**VIT))
    bias = model.get_layer("head").bias
    bias.assign(numpy(bias) * np.nan)
    with pytest.raises(RuntimeError, match="its own outputs .* are not all finite"):
        export(model, tmp_path / "x.tflite")
    assert not list(tmp_path.iterdir())


@pytest.mark.conversion
def test_max_drop_keeps_the_fewest_harmful_parts(tmp_path):
    """Random logits agree by luck, so that int8 loses some; all kept in float loses none."""
    model = settle(models.ViT(**VIT))
    photos = np.random.default_rng(0).integers(0, 256, (60, 8, 12, 3), dtype="uint8")

    def files(**asked):
        return converted(model, ["int8-static"], tmp_path, photos, photos[:8], **asked)[0]

    free = files(sensitivity=True)
    parts = {f"block0{i}/{part}" for i in range(2) for part in ("attention", "mlp")}
    assert {row["part"] for row in free["sensitivity"]} == parts | {"stem", "head"}
    noise = [row["decibels"] for row in free["sensitivity"]]
    assert noise == sorted(noise) and free["kept"] == []
    assert free["comparison"]["agreement"] < 1
    assert files(max_drop=0)["comparison"]["agreement"] == 1
    lost = 1 - free["comparison"]["agreement"]
    held = files(max_drop=100 * lost / 2)
    assert (
        1 - held["comparison"]["agreement"] <= lost / 2 and 0 < len(held["kept"]) < len(parts) + 2
    )
    assert files(keep_float=["block00/mlp"])["kept"] == ["block00/mlp"]
    with pytest.raises(conversion.Refused, match="no part 'block07/mlp' to keep in float; there "):
        files(keep_float=["block07/mlp"])
    options = dict(photos=photos, calibration=photos[:8], quantize="int8-static")
    with pytest.raises(RuntimeError, match="agreement is .* of 60 photos; 100.00% was asked"):
        export(model, tmp_path / "out" / "none.tflite", min_agreement=1, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.conversion
@pytest.mark.parametrize(
    "kind, case, batch",
    [(None, "tnt", 2), ("fp16", "tnt", 2), ("int8", "tnt", 2), ("int8", "vit-avg-sincos", 1)],
)
def test_a_compact_file_rounds_positions_and_nothing_else(kind, case, batch, tmp_path, monkeypatch):
    """With XNNPACK and with the kernels of other builds."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    def rounded(table):
        if kind == "fp16":
            return table.astype("float16").astype("float32")
        step = np.abs(table).max(axis=1, keepdims=True) / 127
        return np.round(table / step) * step if kind else table

    builder, options = OPTIONS[case]
    model = settle(builder(**options))
    job = {"graph": "lean", "batch_size": batch, "input": "float"}
    job["preprocessing"] = [(8, 12), [0.5] * 3, [0.5] * 3]
    conversion.write_litert(model, tmp_path / "whole", job)
    content = quantize.compact((tmp_path / "whole").read_bytes(), kind)
    (tmp_path / "compact").write_bytes(content)
    assert len(content) < (tmp_path / "whole").stat().st_size
    table = edge_vit.table
    for module in (edge_vit, edge_tnt):
        monkeypatch.setattr(module, "table", lambda *options: rounded(table(*options)))
    conversion.write_litert(model, tmp_path / "rounded", job)
    x = np.random.default_rng(0).normal(size=(batch, 8, 12, 3)).astype("float32")

    def outputs(name, kernels):
        opened = Interpreter(str(tmp_path / name), experimental_op_resolver_type=kernels)
        opened.allocate_tensors()
        opened.set_tensor(opened.get_input_details()[0]["index"], x)
        opened.invoke()
        return opened.get_tensor(opened.get_output_details()[0]["index"])

    expected = outputs("rounded", OpResolverType.AUTO)
    for kernels in (OpResolverType.AUTO, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES):
        found = outputs("compact", kernels)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    shift = np.abs(outputs("whole", OpResolverType.AUTO) - expected).max()
    assert (shift > 1e-5) == bool(kind)


@pytest.mark.conversion
def test_positions_are_narrowed_with_the_stem_of_a_lean_graph(tmp_path):
    model = settle(models.ViT(**VIT))
    job = {"batch_size": 1, "input": "float", "preprocessing": [(8, 12), [0.5] * 3, [0.5] * 3]}
    for graph in ("lean", "plain"):
        conversion.write_litert(model, tmp_path / graph, job | {"graph": graph})

    def dequantized(graph, **how):
        (tmp_path / "int8").write_bytes(quantize.quantize(tmp_path / graph, "int8", **how))
        return gate.structure(tmp_path / "int8")["operators"].get("DEQUANTIZE", 0)

    assert dequantized("lean") == dequantized("lean", only="stem") == 1
    assert dequantized("lean", keep=["stem"]) == dequantized("lean", only="head") == 0
    assert dequantized("plain") == 0


@pytest.mark.conversion
@pytest.mark.parametrize(("few", "kept"), [(0.0, []), (1.0, ["block00/inner", "block01/inner"])])
def test_inner_layers_stay_float_where_they_are_few(few, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "FEW", few)
    model = settle(models.TNT(**TNT))
    (report,) = converted(model, ["int8"], tmp_path, real_photos((8, 12, 3)))
    assert report["kept"] == kept


@pytest.mark.conversion
def test_bisection_finds_the_smallest_file(monkeypatch):
    """Parts whose quantisation loses points: those, and no others, are kept."""
    rows = [quantize.Sensitivity(part, 100, noise, 1.0) for part, noise in zip("abcdef", range(6))]
    rows[5] = quantize.Sensitivity("f", 1000, -3.0, 1.0)  # loudest, but loud for many bytes
    monkeypatch.setattr(quantize, "quantize", lambda path, kind, keep, ranges: keep)
    for harmful in ("a", "abc", "abcdef"):

        def drop(kept, harmful=harmful):
            return len(set(harmful) - set(kept))

        content, kept = quantize.within(None, "int8", rows, drop, 0)
        assert "".join(kept) == harmful and content == kept


@pytest.mark.conversion
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_an_interrupted_export_leaves_nothing(name, signs, tmp_path):
    """After the files are written, and before they have passed, which takes seconds."""
    folder, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "keras_vitnt", "export", signs, folder / "saved_model"],
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, TMPDIR=str(temporary)),
        # Tests that run in a shell's background inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not list(folder.glob(".export-*/saved_model/saved_model.pb")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    listed = subprocess.check_output(["ps", "-A", "-o", "pid=,ppid="], text=True).splitlines()
    (child,) = [int(a) for a, b in map(str.split, listed) if int(b) == process.pid]
    process.send_signal(getattr(signal, name))
    _, told = process.communicate()
    if name == "SIGKILL":  # which nothing can catch: hidden folders stay
        assert not list(folder.glob("[!.]*"))
        end = time.monotonic() + 30
        while running(child):
            assert time.monotonic() < end, "the conversion goes on without who started it"
            time.sleep(0.1)
    else:
        assert process.returncode == 1 and told.strip().endswith("keras-vitnt: stopped")
        assert not folder.exists() and not running(child)
        assert not list(temporary.iterdir())


def running(pid):
    """Whether there is such a process, not counting one that only waits to be noticed."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return found.stdout.strip()[:1] not in ("", "Z")


@keras.saving.register_keras_serializable("tests")
class Double(keras.layers.Layer):
    def call(self, x):
        return 2 * x


@pytest.mark.conversion
def test_a_layer_that_the_conversion_does_not_know_is_named(tmp_path):
    layers = [keras.Input((8, 12, 3)), Double(), keras.layers.GlobalAveragePooling2D()]
    with pytest.raises(
        RuntimeError, match="Keras' layers and this package's, cannot .* class 'Double'"
    ):
        export(keras.Sequential(layers), tmp_path / "model.tflite", graph="plain")
    assert not list(tmp_path.iterdir())


@pytest.mark.conversion
def test_two_exports_at_once_do_not_collide(tmp_path):
    model = settle(models.ViT(**VIT))
    targets = {tmp_path / "model.tflite": None, tmp_path / "saved_model": None}
    with ThreadPoolExecutor() as pool:
        for found in [pool.submit(export_all, model, targets) for _ in range(2)]:
            assert len(found.result()) == 2
    photos, plain = real_photos((8, 12, 3)), images.Preprocessing((8, 12))
    one, other = (numbers(path, photos, plain) for path in targets)
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.conversion
def test_folders_replace_each_other_whoever_comes_first(tmp_path):
    """Many processes' worth of replacing one folder: one whole folder stays."""
    target = tmp_path / "model"

    def put(i):
        new = tmp_path / f"work{i}" / "model"
        new.mkdir(parents=True)
        for name in ("saved_model.pb", "variables"):
            (new / name).write_text(str(i))
        put_in_place(new, target)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(64)))
    assert (target / "saved_model.pb").read_text() == (target / "variables").read_text()
    assert sorted(os.listdir(target)) == ["saved_model.pb", "variables"]
    target = tmp_path / "photos"  # empty when the export began
    (target / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="photos is a folder of something else"):
        put(64)
    assert os.listdir(target) == ["cat"]


def test_an_interrupted_replacement_leaves_the_old_folder(tmp_path, monkeypatch):
    target, new = tmp_path / "model", tmp_path / "work" / "model"
    for folder, text in ((target, "old"), (new, "new")):
        folder.mkdir(parents=True)
        (folder / "saved_model.pb").write_text(text)
    replace = os.replace

    def interrupted(old, path):
        if old == new:
            raise KeyboardInterrupt
        replace(old, path)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put_in_place(new, target)
    assert (target / "saved_model.pb").read_text() == "old"


def test_a_folder_beside_a_file_leaves_no_parents_and_follows_links(tmp_path):
    with pytest.raises(ValueError), folder_beside(tmp_path / "a" / "b" / "x.tflite") as folder:
        assert Path(folder).parent == tmp_path / "a" / "b"
        raise ValueError
    assert not list(tmp_path.iterdir())
    with folder_beside(tmp_path / "a" / "x.tflite"):
        (tmp_path / "a" / "x.tflite").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "x.tflite"]
    (tmp_path / "link.tflite").symlink_to(tmp_path / "a" / "x.tflite")
    with folder_beside(tmp_path / "link.tflite") as folder:  # maybe on another file system
        assert Path(folder).parent == tmp_path / "a"


def test_the_runs_own_files_know_its_data(signs):
    for name in ("model_int8.tflite.json", "other.tflite.json"):
        (signs / name).write_bytes((SIGNS / "model_int8.tflite.json").read_bytes())
    own, other = (recorded(signs / name) for name in ("model_int8.tflite", "other.tflite"))
    assert own.data == "embedded" and own.names == [str(digit) for digit in range(10)]
    assert other == own._replace(data=None)


def test_samples_may_lack_a_class_and_photos_may_stay_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "CACHE_BYTES", 0)
    for label in ("cat", "dog", "emu"):
        write_photos(tmp_path / label, [f"{i}.png" for i in range(10)])
    source = Source(images.Preprocessing((8, 12)), None, f"folder:{tmp_path}")
    for name in datasets.load_dataset(source.data)[1].names:
        if "cat" in name:  # it still begins as an image does
            Path(name).write_bytes(Path(name).read_bytes()[:200])
    pixels, labels, *_, faults = photos_of(source, 6)
    assert pixels.shape == (4, 8, 12, 3) and labels.tolist() == [1, 1, 2, 2] and len(faults) == 2


@pytest.mark.conversion
def test_foreign_files_are_opened_or_refused_in_a_line(tmp_path):
    import tensorflow as tf

    def saved(name, shape, function):
        module = tf.Module()
        module.scale = tf.Variable(2.0)
        spec = tf.TensorSpec(shape, tf.float32)
        given = tf.function(lambda x: function(module.scale * x), input_signature=[spec])
        tf.saved_model.save(module, str(tmp_path / name), signatures=given)
        return tmp_path / name

    mean = saved("mean", (None, 8, 12, 3), lambda x: {"y": tf.reduce_mean(x, (1, 2))})
    found, shape, dtype = gate.open_model(mean)
    assert (shape, dtype) == ((8, 12, 3), "float32")
    np.testing.assert_allclose(found(np.ones((20, 8, 12, 3), "float32")), 2)
    both = saved("both", (None, 8, 12, 3), lambda x: {"y": x, "z": x})
    with pytest.raises(ValueError, match="both cannot be read: it has 1 inputs and 2 outputs"):
        gate.open_model(both)
    flat = saved("flat", (None, 4), lambda x: {"y": x})
    with pytest.raises(ValueError, match=r"flat: images \(H, W, C\).*it takes \(4,\)"):
        gate.open_model(flat)


def test_a_missing_extra_is_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"onnxruntime: pip install 'keras-vitnt\[onnx"):
        export(models.ViT(**VIT), tmp_path / "x.onnx")


def test_photos_come_from_a_data_set_and_faults_are_named(signs, tmp_path, passed_on, capsys):
    for part in ("train", "validation"):
        for label in range(10):
            write_photos(tmp_path / "photos" / part / str(label), ["0.png", "1.png"])
    (tmp_path / "photos" / "validation" / "3" / "bad.png").write_text("no image")
    data = f"folder:{tmp_path / 'photos'}"
    export(signs, tmp_path / "model.tflite", "int8-static", photos=data)
    told = capsys.readouterr().out
    assert "Left out 1 photos" in told and "bad.png" in told
    options = passed_on[-1][1]
    assert options["photos"].shape == options["calibration"].shape == (20, 32, 32, 3)
    assert options["labels"].tolist() == [label for label in range(10) for _ in range(2)]

    record = json.loads((signs / "metrics.json").read_text())
    (signs / "metrics.json").write_text(json.dumps(dict(record, data="folder:moved")))
    export(signs, tmp_path / "other.tflite")
    told = capsys.readouterr().out
    assert "no folder at moved" in told and "embedded photos instead" in told
    assert passed_on[-1][1]["photos"] is None
    export(models.ViT(**dict(VIT, classes=3)), tmp_path / "other.tflite", photos="embedded")
    assert "10 classes, the model's output is (3,): compared without" in capsys.readouterr().out
    assert passed_on[-1][1]["labels"] is None and len(passed_on[-1][1]["photos"]) > 100
    with pytest.raises(FileNotFoundError, match="no folder at elsewhere"):
        export(signs, tmp_path / "other.tflite", photos="folder:elsewhere")
