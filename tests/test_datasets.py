"""Photos in, batches out: splits, faults, order and augmentation."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keras_vitnt import datasets, images, training


def write_photos(folder, names, size=(20, 16)):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 255, (*size, 3), "uint8")).save(folder / name)


def test_embedded_photos_are_split_and_stratified():
    train, validation, classes = datasets.load_dataset("embedded")
    assert (len(train.labels), len(validation.labels), len(classes)) == (1651, 411, 10)
    assert not set(train.names) & set(validation.names)
    assert set(np.bincount(validation.labels)) <= {41, 42}
    decoded, faults = datasets.decode_all(validation, images.Preprocessing((32, 24)))
    assert not faults and decoded.sources[0].shape == (32, 24, 3)


def test_folders_with_and_without_a_split(tmp_path):
    for label in ("cat", "dog"):
        write_photos(tmp_path / "flat" / label, [f"{i}.png" for i in range(10)])
        write_photos(tmp_path / "parts" / "train" / label, ["a.png", "b.png"])
        write_photos(tmp_path / "parts" / "val" / label, ["c.png"])
    train, validation, classes = datasets.load_dataset(f"folder:{tmp_path}/flat")
    assert (len(train.labels), len(validation.labels), classes) == (16, 4, ["cat", "dog"])
    again = datasets.load_dataset(f"folder:{tmp_path}/flat")[1]
    assert again.names == validation.names
    train, validation, _ = datasets.load_dataset(f"folder:{tmp_path}/parts")
    assert (len(train.labels), len(validation.labels)) == (4, 2)
    shutil.rmtree(tmp_path / "parts" / "val")
    train, validation, classes = datasets.load_dataset(f"folder:{tmp_path}/parts")
    assert (len(train.labels), len(validation.labels), classes) == (2, 2, ["cat", "dog"])


def test_unreadable_files_are_counted_and_named(tmp_path):
    for label in ("cat", "dog"):
        write_photos(tmp_path / label, [f"{i}.jpg" for i in range(10)])
    whole = (tmp_path / "cat" / "0.jpg").read_bytes()
    (tmp_path / "cat" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    photos, _ = datasets.read_class_folders(tmp_path)
    good, faults = datasets.decode_all(photos, images.Preprocessing((16, 16)))
    assert len(good.labels) == 19 and len(faults) == 2
    assert "0.jpg" in faults[0] and "truncated" in faults[0].lower()
    assert "notes.txt" in faults[1] and "not an image" in faults[1]
    for path in (tmp_path / "dog").glob("*.jpg"):
        path.write_text("no image")
    with pytest.raises(ValueError, match="12 of 21 files cannot be read"):
        datasets.decode_all(photos, images.Preprocessing((16, 16)))


def test_subfolders_and_links_are_followed_or_named(tmp_path):
    for label in ("cat", "dog"):
        write_photos(tmp_path / label, ["0.png", "1.png"])
    cat = tmp_path / "cat"
    write_photos(cat / "day", ["0.png"])
    write_photos(cat / ".cache", ["hidden.png"])
    (cat / "link.png").symlink_to(cat / "0.png")
    (cat / "lost.png").symlink_to("absent.png")
    photos, _ = datasets.read_class_folders(tmp_path)
    good, faults = datasets.decode_all(photos, images.Preprocessing((16, 16)))
    assert good.labels.tolist() == [0, 0, 0, 1, 1]
    at = "There is no image at"
    assert faults == [f"{at} {cat}/day: a folder.", f"{at} {cat}/lost.png."]
    (tmp_path / "bird" / "night").mkdir(parents=True)
    photos, _ = datasets.read_class_folders(tmp_path)
    with pytest.raises(ValueError, match="A class has no readable photo left.*night: a folder"):
        datasets.decode_all(photos, images.Preprocessing((16, 16)))


def test_what_stands_beside_the_folders_is_counted_and_named(tmp_path, capsys):
    for part in ("train", "val", "test"):
        for label in ("cat", "dog"):
            write_photos(tmp_path / part / label, ["a.png", "b.png"])
    for i in range(6):
        shutil.copy(tmp_path / "val" / "cat" / "a.png", tmp_path / "val" / f"{i}.png")
    (tmp_path / ".hidden").write_text("")
    datasets.load_dataset(f"folder:{tmp_path}")
    assert capsys.readouterr().out.splitlines() == [
        f"Not used of {tmp_path}: 1 (test)",
        f"Not used of {tmp_path}/val: 6 (0.png, 1.png, 2.png, 3.png, 4.png, ...)",
    ]
    for part in ("val", "test"):
        shutil.rmtree(tmp_path / part)
    (tmp_path / "labels.csv").write_text("")
    datasets.load_dataset(f"folder:{tmp_path}")
    assert capsys.readouterr().out == f"Not used of {tmp_path}: 1 (labels.csv)\n"


def test_strange_files_are_no_part_of_the_validation(tmp_path):
    for label in ("cat", "dog"):
        write_photos(tmp_path / label, ["a.png", "b.png"])
        for i in range(4):
            (tmp_path / label / f"notes{i}.txt").write_text("no image")
    train, validation, classes = datasets.load_dataset(f"folder:{tmp_path}")
    assert len(train.labels) == 10 and [Path(n).suffix for n in validation.names] == [".png"] * 2
    write_photos(tmp_path / "many" / "ant", [f"{i}.png" for i in range(8)])
    (tmp_path / "many" / "bee").mkdir()
    (tmp_path / "many" / "bee" / "notes.txt").write_text("no image")
    photos, _ = datasets.read_class_folders(tmp_path / "many")
    with pytest.raises(ValueError, match="no readable photo left: .*bee/notes.txt cannot be read"):
        datasets.decode_all(photos, images.Preprocessing((16, 16)))


def test_grey_models_get_grey_photos(tmp_path):
    write_photos(tmp_path / "cat", ["a.png", "b.png"])
    write_photos(tmp_path / "dog", ["a.png", "b.png"])
    preprocessing = images.symmetric((16, 24, 1))._replace(squash=True)
    photos, _ = datasets.decode_all(datasets.load_dataset(f"folder:{tmp_path}")[0], preprocessing)
    grey = Image.open(photos.names[0]).convert("L").resize((24, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(photos.sources[0], np.asarray(grey)[..., None])
    assert datasets.Batches(photos, preprocessing)[0][0].shape == (2, 16, 24, 1)
    larger = images.fit(images.decode(photos.sources[0]), images.symmetric((32, 48, 1)))
    assert larger.shape == (32, 48, 1)
    with pytest.raises(ValueError, match="1 channel .grey. or 3; the model takes 4"):
        images.load(photos.names[0], images.symmetric((16, 16, 4)))


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        datasets.load_dataset(f"folder:{tmp_path}/absent")
    with pytest.raises(ValueError, match="holds no class folders"):
        datasets.load_dataset(f"folder:{tmp_path}")
    write_photos(tmp_path / "cat", ["a.png"])
    with pytest.raises(ValueError, match=r"one class \(cat\)"):
        datasets.load_dataset(f"folder:{tmp_path}")
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match="dog is empty"):
        datasets.load_dataset(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match="expected embedded, folder:PATH or tfds:NAME"):
        datasets.load_dataset("imagenet")


def test_batches_repeat_under_a_seed_and_differ_by_epoch():
    photos = datasets.load_dataset("embedded")[1].take(np.arange(40))
    photos, _ = datasets.decode_all(photos, images.Preprocessing((16, 16)))

    def epoch(number, seed=0):
        batches = datasets.Batches(
            photos, images.Preprocessing((16, 16)), 16, training.augment, seed
        )
        batches.go_to(number)
        return [batches[i] for i in range(len(batches))]

    first, again, later, other = epoch(0), epoch(0), epoch(1), epoch(0, seed=1)
    assert [len(y) for _, y in first] == [16, 16, 8]
    for (x, y), (x2, y2) in zip(first, again):
        np.testing.assert_array_equal(x, x2)
        np.testing.assert_array_equal(y, y2)
    assert np.abs(first[0][0] - later[0][0]).max() > 0.1
    assert np.abs(first[0][0] - other[0][0]).max() > 0.1


def test_augmentation_without_strength_is_the_photo():
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), "uint8")
    same = training.augment(pixels, np.random.default_rng(0), strength=0, flip=False)
    np.testing.assert_array_equal(same, pixels)


@pytest.mark.parametrize(
    ("preprocessing", "resized", "box"),
    [  # of a photo of 90 x 60, as torchvision rounds
        (images.Preprocessing((30, 30)), (45, 30), (8, 0, 38, 30)),
        (images.Preprocessing((32, 32), crop=0.9), (52, 35), (10, 2, 42, 34)),
        (images.Preprocessing((32, 48), interpolation="bilinear"), (48, 32), (0, 0, 48, 32)),
        (images.Preprocessing((30, 30), crop=0.95, squash=True), (31, 31), (0, 0, 30, 30)),
    ],
)
def test_fit_is_resize_and_crop(preprocessing, resized, box):
    photo = images.decode(Path(__file__).parents[1] / "examples" / "hand.jpg").resize((90, 60))
    method = Image.Resampling[preprocessing.interpolation.upper()]
    expected = np.asarray(photo.resize(resized, method).crop(box))
    np.testing.assert_array_equal(images.fit(photo, preprocessing), expected)


@pytest.mark.parametrize("name", ["grey.png", "grey.tiff"])
def test_grey_of_sixteen_bits_is_that_of_eight(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16), "uint8")
    Image.fromarray(pixels.astype("uint16") * 257).save(tmp_path / name)
    for source in (tmp_path / name, pixels.astype("uint16") * 257):
        np.testing.assert_array_equal(np.asarray(images.decode(source))[..., 0], pixels)
    Image.fromarray(pixels.astype("float32")).save(tmp_path / "grey.tiff")
    with pytest.raises(ValueError, match="grey.tiff cannot be read: grey of 32 bits"):
        images.decode(tmp_path / "grey.tiff")


def test_load_equals_pil_resize_and_crop():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), "uint8"))
    pixels = images.fit(photo, images.Preprocessing((30, 30)))
    expected = photo.resize((45, 30), Image.Resampling.BICUBIC).crop((8, 0, 38, 30))
    np.testing.assert_array_equal(pixels, np.asarray(expected))
    loaded = images.load(photo, images.Preprocessing((30, 30)))
    np.testing.assert_allclose(loaded, pixels / 127.5 - 1, atol=1e-5)
