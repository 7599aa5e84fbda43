"""A data set's name -> photos in memory, split and checked -> batches for `model.fit`.

Names: "embedded" (the hand signs in this package), "folder:PATH" and "tfds:NAME".
"""

import zipfile
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

from . import images

# Decoded photos of a part stay in memory up to this size; beyond it they are decoded each epoch.
CACHE_BYTES = 2 * 1024**3
VALIDATION_FOLDERS = ("validation", "val", "valid", "test")


class Photos(NamedTuple):
    """One part of a data set.

    Attributes:
        sources: list of what `images.decode` takes: paths, bytes or uint8 arrays.
        labels: int array, an index into the class names for each photo.
        names: list of str, where each photo came from.
    """

    sources: list
    labels: np.ndarray
    names: list

    def take(self, indices):
        return Photos(
            [self.sources[i] for i in indices],
            self.labels[indices],
            [self.names[i] for i in indices],
        )


def load_dataset(name="embedded", data_dir=None):
    """Read a data set.

    Args:
        name: "embedded": 2,062 photos of hands that sign the digits 0 to 9. "folder:PATH": a
            folder per class, either directly in PATH or in PATH/train (split 80/20, the same each
            time), or in PATH/train and PATH/validation (or val, valid, test). "tfds:NAME": a
            prepared TensorFlow Datasets set with one image and one label; its validation part is
            `validation`, else `test`, else a fifth of `train`.
        data_dir: where TensorFlow Datasets keeps its sets; None for its default.

    Returns:
        (train, validation, class names): two `Photos` and a list of str.

    Raises:
        FileNotFoundError, ValueError: for a missing or empty source, or fewer than two
            classes; nothing is downloaded.
        ModuleNotFoundError: if "tfds:" needs a package that is not installed.
    """
    kind, _, argument = str(name).partition(":")
    if kind == "embedded" and not argument:
        train, validation, classes = read_embedded()
    elif kind == "folder" and argument:
        train, validation, classes = read_folder(Path(argument).expanduser())
    elif kind == "tfds" and argument:
        train, validation, classes = read_tfds(argument, data_dir)
    else:
        raise ValueError(f"Unknown data {name!r}: expected embedded, folder:PATH or tfds:NAME.")
    if len(classes) < 2:
        raise ValueError(f"{name} has one class ({classes[0]}); a classifier needs two or more.")
    if validation is None:
        train, validation = split(train)
    return train, validation, classes


def split(photos):
    """Split photos in two, stratified, the same way each time: four fifths and one.

    What is no image stays in the first part: a few strange files shall not be all that a small
    class has in the second.
    """
    rng = np.random.default_rng(0)
    held_out = np.zeros(len(photos.labels), bool)
    for label in np.unique(photos.labels):
        members = rng.permutation(np.flatnonzero(photos.labels == label))
        readable = (i for i in members if images.is_image(photos.sources[i]))
        held_out[list(islice(readable, max(round(0.2 * len(members)), 1)))] = True
    return photos.take(np.flatnonzero(~held_out)), photos.take(np.flatnonzero(held_out))


def read_embedded():
    """The hand signs: Sign Language Digits, Mavi 2020, arXiv:2011.08927, Apache-2.0."""
    parts = {"train": [], "validation": []}
    with zipfile.ZipFile(Path(__file__).parent / "assets" / "signs.zip") as archive:
        for name in archive.namelist():
            part, _, rest = name.partition("/")
            if part in parts:
                parts[part].append((archive.read(name), int(rest[0]), name))
    photos = []
    for items in parts.values():
        sources, labels, names = zip(*items)
        photos.append(Photos(list(sources), np.array(labels), list(names)))
    return *photos, [str(digit) for digit in range(10)]


def read_folder(root):
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder at {root}.")
    names = [folder.name for folder in class_folders(root)]
    held_out = next((name for name in VALIDATION_FOLDERS if name in names), None)
    if "train" in names and held_out:
        say_unused(root, ("train", held_out))
        train, classes = read_class_folders(root / "train")
        validation, other = read_class_folders(root / held_out)
        if classes != other:
            raise ValueError(
                f"{root}/train has the classes {', '.join(classes)}; {held_out} has "
                f"{', '.join(other)}. Both need the same folders."
            )
        return train, validation, classes
    if names == ["train"]:
        say_unused(root, names)
        root = root / "train"
    train, classes = read_class_folders(root)
    return train, None, classes


def visible(folder):
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def class_folders(root):
    return [path for path in visible(root) if path.is_dir()]


def say_unused(root, used):
    """Count and name what stands beside the folders that are `used`."""
    left = [path.name for path in visible(root) if path.name not in used]
    if left:
        more = ", ..." if len(left) > 5 else ""
        print(f"Not used of {root}: {len(left)} ({', '.join(left[:5])}{more})")


def read_class_folders(root):
    classes = class_folders(root)
    say_unused(root, [folder.name for folder in classes])
    paths, labels = [], []
    for label, folder in enumerate(classes):
        files = visible(folder)  # folders and links to nowhere, too: `decode_all` names them
        if not files:
            raise ValueError(f"The class folder {folder} is empty.")
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise ValueError(f"{root} holds no class folders: expected {root}/CLASS/photo.jpg.")
    return Photos(paths, np.array(labels), [str(p) for p in paths]), [c.name for c in classes]


def read_tfds(name, data_dir):
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"tfds:{name} needs TensorFlow Datasets: pip install 'keras-vitnt[tfds]'."
        ) from error
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        keys = builder.info.supervised_keys
        prepared = builder.info.splits
    except Exception as error:  # unknown name, missing files: TFDS has many kinds
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"TensorFlow Datasets has no {name!r} in {data_dir or 'its folder'}: {first_line}"
        ) from error
    if not prepared:
        raise FileNotFoundError(
            f"tfds:{name} is not prepared in {builder.data_dir}. Prepare it once with "
            f"tensorflow_datasets.load({name!r}), or point --data-dir to where it stands."
        )
    if not keys or "train" not in prepared:
        raise ValueError(f"tfds:{name} is no set of (image, label) pairs with a train split.")
    image_key, label_key = keys

    def read(part):
        raw = builder.as_dataset(split=part, decoders={image_key: tfds.decode.SkipDecoding()})
        items = [(e[image_key], e[label_key]) for e in tfds.as_numpy(raw)]
        sources, labels = zip(*items)
        return Photos(
            list(sources), np.array(labels, int), [f"{name} {part} {i}" for i in range(len(items))]
        )

    held_out = next((part for part in VALIDATION_FOLDERS if part in prepared), None)
    classes = getattr(builder.info.features[label_key], "names", None)
    if not classes:
        raise ValueError(f"tfds:{name}: its {label_key!r} is no class label.")
    return read("train"), read(held_out) if held_out else None, list(classes)


def decode_all(photos, preprocessing, progress=None, whole=True):
    """Decode every photo once, as the model sees it; leave out those that cannot be read.

    Args:
        photos: a `Photos`.
        preprocessing: an `images.Preprocessing`.
        progress: called after each photo, or None.
        whole: False if these are a few of the photos, of which a class may lose all.

    Returns:
        (photos, faults): the readable photos, decoded to uint8 arrays as far as
        `CACHE_BYTES` reaches, and a list of str that names the others.

    Raises:
        ValueError: if there are none, half of them or more cannot be read, or a class lost all.
    """
    if not len(photos.labels):
        raise ValueError("There are no photos to decode.")
    keep = CACHE_BYTES // (preprocessing.size[0] * preprocessing.size[1] * 3)

    def read(i):
        try:
            source = photos.sources[i]
            pixels = images.fit(images.decode(source), preprocessing)
            return (pixels if i < keep or isinstance(source, np.ndarray) else source), None
        except (ValueError, OSError) as error:
            return None, str(error).replace("the image", photos.names[i])
        finally:
            if progress:
                progress()

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(read, range(len(photos.labels))))
    faults = [fault for _, fault in results if fault]
    good = np.array([i for i, (_, fault) in enumerate(results) if not fault], int)
    if 2 * len(faults) >= len(results):
        raise ValueError(
            f"{len(faults)} of {len(results)} files cannot be read as images, such as: {faults[0]}"
        )
    for label in set(photos.labels) - set(photos.labels[good]) if whole else ():
        fault = results[np.flatnonzero(photos.labels == label)[0]][1]
        raise ValueError(f"A class has no readable photo left: {fault}")
    return photos._replace(sources=[source for source, _ in results]).take(good), faults


class Batches(keras.utils.PyDataset):
    """Photos as (images, labels) batches for `fit`, `evaluate` and `predict` on any backend.

    The order and each photo's augmentation follow from (seed, epoch, position) alone, so a
    run can be repeated, and resumed, exactly.

    Args:
        photos: a `Photos`.
        preprocessing: an `images.Preprocessing`.
        batch_size: photos per batch; the last one may be smaller.
        augment: function (uint8 (H, W, 3), numpy Generator) -> uint8 (H, W, 3); with it the
            order is shuffled anew each epoch. None for the photos as they are, in order.
        seed: of order and augmentation.
    """

    def __init__(self, photos, preprocessing, batch_size=64, augment=None, seed=0):
        super().__init__()
        self.photos = photos
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.augment = augment
        self.seed = seed
        self.go_to(0)

    def __len__(self):
        return -(-len(self.photos.labels) // self.batch_size)

    def go_to(self, epoch):
        """Make this epoch, counted from 0, the next to begin."""
        self.next_epoch = epoch
        self.on_epoch_begin()
        self.next_epoch = epoch

    def on_epoch_begin(self):
        """Shuffle for the next epoch; Keras calls this."""
        self.epoch = self.next_epoch
        self.next_epoch += 1
        self.order = np.arange(len(self.photos.labels))
        if self.augment:
            np.random.default_rng((self.seed, self.epoch)).shuffle(self.order)

    def pixels(self, i):
        """Photo i as the model's size has it, uint8 (H, W, C)."""
        source = self.photos.sources[i]
        if isinstance(source, np.ndarray) and source.shape[:2] == tuple(self.preprocessing.size):
            return source
        return images.fit(images.decode(source), self.preprocessing)

    def __getitem__(self, index):
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        pixels = [self.pixels(i) for i in chosen]
        if self.augment:
            rng = np.random.default_rng((self.seed, self.epoch, index))
            pixels = [self.augment(photo, rng) for photo in pixels]
        x = images.normalize(np.stack(pixels), self.preprocessing)
        return x, self.photos.labels[chosen].astype("int32")

    def tf_dataset(self):
        """These batches as a `tf.data.Dataset`, on which TensorFlow trains faster.

        Keras' own way from a PyDataset is `Dataset.from_generator`; after it glibc gives the
        memory of every step back to the system (Keras 3.15, TensorFlow 2.21; see
        `benchmarks/input_pipeline.py`).
        """
        import tensorflow as tf

        def read(index):
            x, y = tf.numpy_function(self.__getitem__, [index], [tf.float32, tf.int32])
            shape = (None, *self.preprocessing.size, len(self.preprocessing.mean))
            return tf.ensure_shape(x, shape), tf.ensure_shape(y, (None,))

        return tf.data.Dataset.range(len(self)).map(read).prefetch(2)
