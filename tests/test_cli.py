"""The command line from end to end, and one clear line for every bad input."""

import json
import re
import shutil
import signal

import keras
import numpy as np
import pytest
from helpers import weights_file
from PIL import Image
from test_datasets import write_photos

from keras_vitnt import cli, commands, datasets, explain, images, models, names, runs, variants
from keras_vitnt.gate import open_model
from keras_vitnt.sources import Source


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["keras-vitnt", *map(str, arguments)])
    cli.main()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for label in ("cat", "dog"):
        write_photos(folder / label, [f"{i}.png" for i in range(10)])
    return folder


@pytest.fixture
def shallow(monkeypatch):
    """The default model with one block: the tests of the command need no more."""
    monkeypatch.setitem(variants.VARIANTS["TNT"]["Nano"], "depth", 1)


def test_train_leaves_every_file_and_predicts(photos, shallow, tmp_path, monkeypatch, capsys):
    photos = shutil.copytree(photos, tmp_path / "photos")
    odd = "[i] $_$ ü"  # to rich, matplotlib and TensorFlow more than a name
    (photos / "dog").rename(photos / odd)
    output = tmp_path / f"run {odd}"
    train = ["train", "--data", f"folder:{photos}", "--model", "tnt:Nano/8", "--epochs", 2]
    run(monkeypatch, *train, "--image-size", "16x24", "--batch-size", 8, "--output", output)
    expected = "attention.png confusion.png curves.png history.csv labels.txt metrics.json"
    files = "model.tflite model_int8.tflite saved_model"
    expected += f" model.keras {files} {files.replace(' ', '.json ')}.json"
    assert {path.name for path in output.iterdir()} == set(expected.split())
    record = json.loads((output / "metrics.json").read_text())
    for name in ("saved_model", "model.tflite"):
        found = record["files"][name]
        assert found["max_difference"] <= 1e-4 * max(1, found["largest_logit"])
    assert (output / "labels.txt").read_text("utf-8") == f"{odd}\ncat\n"
    assert "validation accuracy" in capsys.readouterr().out

    answers = []
    for name in ("", "model.keras", "model.tflite", "saved_model"):
        run(monkeypatch, "predict", output / name, photos / "cat" / "0.png")
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 1 and "cat" in answers[0]
    run(monkeypatch, "evaluate", output, "--data", f"folder:{photos}")
    accuracy = record["validation_accuracy"]
    assert f"top-1 {accuracy:.2%}" in capsys.readouterr().out

    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *train, "--output", output)
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err


def test_nohup_is_kept(monkeypatch, capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(monkeypatch, "shapes", "vit:Nano/4", "--image-size", 8)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_what_a_run_left_is_replaced(photos, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    train = ["train", "--data", f"folder:{photos}", "--epochs", 1, "--image-size", 16]
    train += ["--model", "vit:Nano/8", "--overwrite", "--output", output]
    monkeypatch.setattr(runs, "export_all", lambda *args, **options: [])
    monkeypatch.setattr(runs.report, "print_exports", lambda *args: None)
    output.mkdir()
    run(monkeypatch, *train)  # an empty folder is as good as none
    (output / "notes.txt").write_text("mine")
    (output / "saved_model").mkdir()
    first = (output / "metrics.json").read_text()
    run(monkeypatch, *train, "--seed", 1)
    assert (output / "metrics.json").read_text() != first
    assert (output / "notes.txt").read_text() == "mine" and not (output / "saved_model").exists()
    (output / "backup").mkdir()
    (tmp_path / "file").write_text("mine")
    capsys.readouterr()
    for other in (output, tmp_path, tmp_path / "file"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *train[:-1], other)
        assert stop.value.code == 2
        assert "no run's folder and is not replaced" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before


def test_a_grey_model_is_exported_and_used(photos, tmp_path, monkeypatch, capsys):
    model = models.ViT("Nano/8", input_shape=(16, 16, 1), classes=2, depth=1)
    model.save(tmp_path / "grey.keras")
    data = f"folder:{photos}"
    run(monkeypatch, "export", tmp_path / "grey.keras", tmp_path / "grey.tflite", "--photos", data)
    answers = []
    for name in ("grey.keras", "grey.tflite"):
        capsys.readouterr()
        run(monkeypatch, "predict", tmp_path / name, photos / "cat" / "0.png")
        run(monkeypatch, "evaluate", tmp_path / name, "--data", data)
        answers.append(re.sub(r"\S+grey\S+|[\d.]+ s", "", capsys.readouterr().out))
    assert answers[0] == answers[1] and "top-1" in answers[0]


BAD = {
    "absent folder": (["train", "--data", "folder:absent"], "no folder at absent"),
    "unknown data": (["train", "--data", "mnist"], "Unknown data"),
    "unknown model": (["train", "--model", "vit:XL/16"], "Unknown ViT variant"),
    "unknown name": (["train", "--model", "resnet50"], "Unknown model 'resnet50'"),
    "indivisible": (["train", "--image-size", "30"], "30 x 30 .* patches of 8 x 8"),
    "nothing to resume": (["train", "--resume", "--output", "absent"], "no interrupted run"),
    "absent weights": (["train", "--weights", "absent.npz"], "no checkpoint at absent.npz"),
    "absent model": (["predict", "absent.keras", "x.png"], "no model at absent.keras"),
    "no option": (["shapes", "vit:B/16", "--batch", "0"], "positive whole number"),
    "negative rate": (["train", "--lr", "-1"], "number of at least 0, got '-1'"),
    "no number": (["train", "--augment", "nan"], "number of at least 0, got 'nan'"),
    "no share": (["train", "--drop-path", "1"], "at least 0 and under 1, got '1'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(case, tmp_path, monkeypatch, capsys):
    arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in last
    assert re.search(message, last), last
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_shape_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "train", "--model", "tnt:Nano/8", "--weights", weights_file("timm_tnt"))
    assert stop.value.code == 2
    assert "does not fit the model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_inspected_and_converted(tmp_path, monkeypatch, capsys):
    """What is converted keeps its preprocessing, and answers as the checkpoint itself does."""
    write_photos(tmp_path / "photos", ["photo.png"])
    photo = tmp_path / "photos" / "photo.png"
    source = weights_file("hf_vit")
    run(monkeypatch, "inspect", source, "--classes", 3)
    told = capsys.readouterr().out
    assert "Hugging Face ViT or DeiT" in told and "2 re-initialised" in told
    assert "unused: classifier.bias (of the head" in told
    run(monkeypatch, "inspect", source, "--variables")
    told = " ".join(capsys.readouterr().out.split())
    assert "block00/attention/qkv/kernel 36 x 108 transposed: vit.encoder.layer.0." in told
    run(monkeypatch, "predict", source, photo)
    expected = capsys.readouterr().out
    for name in ("vit.keras", "vit.safetensors"):
        run(monkeypatch, "convert", source, tmp_path / name)
        assert f"{name}: 34,999 parameters" in capsys.readouterr().out
        run(monkeypatch, "predict", tmp_path / name, photo)
        assert capsys.readouterr().out == expected
    left = {"photos", "vit.keras", "vit.keras.json", "vit.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == left
    for name, message in (("vit.keras", "--overwrite"), ("vit.tflite", "keras-vitnt export")):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, "convert", source, tmp_path / name)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == left


def test_training_starts_from_a_checkpoint(photos, tmp_path, monkeypatch, capsys):
    """Without --model the checkpoint says which; size and preprocessing are its own."""
    kept = []
    monkeypatch.setattr(runs, "finish", lambda model, batches, *rest: kept.append((model, batches)))
    source = weights_file("timm_deit_distilled")
    train = ["train", "--weights", source, "--data", f"folder:{photos}", "--epochs", 1]
    run(monkeypatch, *train, "--output", tmp_path / "run")
    told = capsys.readouterr().out
    assert "new: head/kernel, head/bias, head_distillation/kernel" in told
    model, batches = kept[0]
    assert model.input_shape == (None, 32, 48, 3) and model.output_shape == (None, 2)
    assert batches.preprocessing.mean == (0.485, 0.456, 0.406)


def test_a_missing_extra_is_named(monkeypatch, capsys):
    other = "jax" if keras.backend.backend() != "jax" else "torch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "models", "--backend", other)
    assert stop.value.code == 2
    assert f"keras-vitnt[{other}]" in capsys.readouterr().err


def test_interrupted_training_keeps_a_state_to_resume(
    photos, shallow, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "run"
    train = ["train", "--data", f"folder:{photos}", "--epochs", 3, "--image-size", 16]
    train += ["--batch-size", 8, "--output", output]
    seen = []

    def finish(model, validation, originals, classes, folder, record):
        seen.append((record["interrupted"], record["training_seconds"]))
        (folder / "metrics.json").write_text(
            json.dumps({"validation_accuracy": 0.5, "training_seconds": 100.0})
        )

    def stop_in_second_epoch(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "finish", finish)
    with monkeypatch.context() as patch:
        patch.setattr(keras.callbacks.CSVLogger, "on_epoch_begin", stop_in_second_epoch)
        run(monkeypatch, *train)
    assert "--resume" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(monkeypatch, *train, "--resume", "--lr", 0.5)
    assert "--lr was None, is 0.5" in capsys.readouterr().err
    run(monkeypatch, *train, "--resume")
    run(monkeypatch, *train[:-1], tmp_path / "whole")  # the same without a stop
    interrupted, seconds = zip(*seen)
    assert interrupted == (True, False, False) and not (output / "backup").exists()
    assert seconds[1] > 100 > max(seconds[0], seconds[2])  # with the interrupted part's
    resumed, whole = (
        np.genfromtxt(folder / "history.csv", delimiter=",", skip_header=1)
        for folder in (output, tmp_path / "whole")
    )
    assert resumed[:, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(resumed, whole, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        (
            "vit:Ti/16",
            {
                "images": (2, 224, 224, 3),
                "patches": (2, 196, 768),
                "projected patches": (2, 196, 192),
                "tokens with positions": (2, 197, 192),
                "queries, keys, values of the heads": (2, 3, 197, 64),
                "attention scores": (2, 3, 197, 197),
                "MLP hidden": (2, 197, 768),
                "pooled": (2, 192),
                "head": (2, 5),
            },
        ),
        (
            "tnt:Ti/16",
            {
                "pixel stream: words of each patch": (2, 196, 16, 12),
                "pixels: attention scores": (392, 2, 16, 16),
                "patches: attention scores": (2, 3, 197, 197),
                "pixels": (2, 196, 16, 12),
                "patches": (2, 197, 192),
                "head": (2, 5),
            },
        ),
    ],
)
def test_shape_walk_shows_run_time_shapes(name, stages):
    model = names.create_model(name, classes=5, depth=1)
    rows = explain.shape_walk(model, np.zeros((2, 224, 224, 3), "float32"))
    found = {stage: shape for _, stage, shape in rows}
    assert {stage: found.get(stage) for stage in stages} == stages


def test_attention_maps_are_distributions_over_tokens():
    model = models.TNT("Nano/8", input_shape=(16, 24, 3), classes=2)
    images = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype("float32")
    maps = explain.attention_maps(model, images)
    assert [m.shape for m in maps] == [(2, 3, 7, 7)] * 2
    inner = explain.inner_attention_maps(model, images)
    assert [m.shape for m in inner] == [(2, 6, 4, 4, 4)] * 2
    for scores in [*maps, *inner, explain.rollout(maps)]:
        np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-5)
    assert explain.attention_overlay(model, images).shape == (2, 16, 24)


def test_a_file_that_is_cut_short_is_named(tmp_path):
    (tmp_path / "cut.tflite").write_bytes(b"TFL3")
    with pytest.raises(ValueError, match="cut.tflite cannot be read"):
        open_model(tmp_path / "cut.tflite")


def test_a_photo_that_is_none_is_named(tmp_path, monkeypatch, capsys):
    model = models.ViT("Nano/8", input_shape=(8, 8, 3), classes=2)
    model.save(tmp_path / "model.keras")
    (tmp_path / "x.jpg").write_text("no image")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "predict", tmp_path / "model.keras", tmp_path / "x.jpg")
    assert stop.value.code == 2
    assert "x.jpg cannot be read: not an image" in capsys.readouterr().err
    Image.new("RGB", (9, 9)).save(tmp_path / "y.png")
    run(monkeypatch, "predict", tmp_path / "model.keras", tmp_path / "y.png")
    assert "class 0" in capsys.readouterr().out


DAMAGED = {
    "a text": ("model.keras", "no model", "damaged, or no .keras file"),
    "foreign metrics": ("metrics.json", '{"loss": 0.3}', "metrics.json, which stands beside"),
    "a cut record": ("model.keras.json", '{"names": [', "model.keras.json, which stands beside"),
    "no interpolation": (
        "model.keras.json",
        '{"preprocessing": {"size": [8, 8], "interpolation": "lanczos9"}}',
        "is not what this package writes there (Expected a size",
    ),
    "another record": ("model.keras.json", "[1, 2]", "is not what this package writes there"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_run_is_named(case, photos, tmp_path, monkeypatch, capsys):
    name, text, message = DAMAGED[case]
    models.ViT("Nano/8", input_shape=(8, 8, 3), classes=2).save(tmp_path / "model.keras")
    (tmp_path / name).write_text(text)
    for command in (["predict", tmp_path, "x.jpg"], ["export", tmp_path, tmp_path / "x.tflite"]):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *command)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "x.tflite").exists()


def test_evaluation_sees_photos_as_prediction_does(photos, tmp_path, monkeypatch, capsys):
    """Cropped once, in whatever order the data has the classes; a run's own data by itself."""
    model = models.ViT("Nano/8", input_shape=(16, 16, 3), classes=2, depth=1)
    model.get_layer("head").bias.assign([0, 0.01])
    model.save(tmp_path / "model.keras")
    preprocessing = images.Preprocessing((16, 16), crop=0.6)._asdict()
    record = {"preprocessing": preprocessing, "data": f"folder:{photos}", "data_dir": None}
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    held_out = datasets.load_dataset(f"folder:{photos}")[1]
    guesses = []
    for path in held_out.sources:
        run(monkeypatch, "predict", tmp_path, path)
        guesses.append(re.findall("class (.)", capsys.readouterr().out)[0] == "1")
    right = sum(np.equal(guesses, held_out.labels))
    run(monkeypatch, "evaluate", tmp_path)
    assert f"{right} of 4 right" in capsys.readouterr().out
    (tmp_path / "labels.txt").write_text("dog\ncat\n")
    run(monkeypatch, "evaluate", tmp_path)
    assert f"{4 - right} of 4 right" in capsys.readouterr().out


def test_evaluation_does_not_crop_twice(photos, tmp_path, monkeypatch):
    preprocessing = images.Preprocessing((8, 8), crop=0.5)
    seen = []

    def open_function(name):
        return lambda x: seen.append(x) or np.zeros((len(x), 2)), Source(preprocessing), "uint8"

    monkeypatch.setattr(commands, "open_function", open_function)
    run(monkeypatch, "evaluate", "any", "--data", f"folder:{photos}")
    sources = datasets.load_dataset(f"folder:{photos}")[1].sources
    expected = [images.fit(images.decode(source), preprocessing) for source in sources]
    np.testing.assert_array_equal(np.concatenate(seen), expected)


@pytest.mark.parametrize("command", ["predict", "evaluate", "export"])
def test_models_of_other_things_are_refused(command, photos, tmp_path, monkeypatch, capsys):
    one, two = keras.Input((8, 8, 3)), keras.Input((None, None, 3))
    pooled = keras.layers.GlobalAveragePooling2D()
    for model, message in [
        (keras.Model([one, two], pooled(one)), "one input and one output"),
        (keras.Model(one, [pooled(one), one]), "one input and one output"),
        (keras.Model(two, pooled(two)), "images of one size"),
    ]:
        model.save(tmp_path / "x.keras")
        last = {"predict": [photos / "cat" / "0.png"], "export": [tmp_path / "x.tflite"]}
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, command, tmp_path / "x.keras", *last.get(command, []))
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_one_output_is_printed_as_it_is(photos, tmp_path, monkeypatch, capsys):
    models.ViT("Nano/8", input_shape=(8, 8, 3), classes=1).save(tmp_path / "one.keras")
    run(monkeypatch, "predict", tmp_path / "one.keras", photos / "cat" / "0.png")
    assert re.search(r"output -?\d+\.\d{4}\n$", capsys.readouterr().out)


def test_other_classes_are_not_scored(photos, tmp_path, monkeypatch, capsys):
    models.ViT("Nano/8", input_shape=(8, 8, 3), classes=3).save(tmp_path / "model.keras")
    with pytest.raises(SystemExit):
        run(monkeypatch, "evaluate", tmp_path, "--data", f"folder:{photos}")
    assert "gives (3,) for each photo" in capsys.readouterr().err
    models.ViT("Nano/8", input_shape=(8, 8, 3), classes=7, depth=1).save(tmp_path / "model.keras")
    (tmp_path / "model.keras.json").write_text(
        json.dumps({"preprocessing": {"size": [8, 8]}, "names": list("abcdefg")})
    )
    with pytest.raises(SystemExit):
        run(monkeypatch, "evaluate", tmp_path, "--data", f"folder:{photos}")
    expected = "The model knows the classes a, b, c, d, e, ... (7); "
    assert expected in capsys.readouterr().err
    data = ["--photos", f"folder:{photos}"]
    run(monkeypatch, "export", tmp_path, tmp_path / "x.tflite", *data, "--quantize", "int8-static")
    found = capsys.readouterr().out
    assert expected in found and "Compared without accuracy" in found


def test_no_option_swallows_the_paths_behind_it():
    """Usage lines name options first."""
    for given, parts in (("stem,head", ["stem", "head"]), ("none", [])):
        line = ["export", "--keep-float", given, "run", "x.tflite"]
        found = cli.parser().parse_args(line)
        assert (found.keep_float, found.model, found.output.name) == (parts, "run", "x.tflite")


def test_training_and_calibration_need_photos_of_the_training_part(tmp_path, monkeypatch, capsys):
    models.ViT("Nano/8", input_shape=(8, 8, 3), classes=2).save(tmp_path / "model.keras")
    for label in "ab":
        write_photos(tmp_path / "few" / label, ["0.png"])
    data = f"folder:{tmp_path / 'few'}"
    options = ["--quantize", "int8-static", "--photos", data]
    with pytest.raises(SystemExit):
        run(monkeypatch, "export", tmp_path, tmp_path / "x.tflite", *options)
    assert "leaves no photos for training" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, "train", "--data", data, "--output", tmp_path / "run")
    assert "few has no photo of a to train on" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
