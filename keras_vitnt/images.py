"""A photo -> a model's input: one way for training, prediction, calibration and export.

decode -> resize (PIL's, antialiased) and crop the centre -> normalise.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAX_PIXELS = 64_000_000  # a decompression bomb is refused before it is decoded
MODES = {1: "L", 3: "RGB"}  # PIL's name for what has so many channels


class Preprocessing(NamedTuple):
    """What a model expects of its images.

    Attributes:
        size: (height, width) in pixels.
        mean, std: per channel, for pixels in 0..1: (x / 255 - mean) / std; one channel is grey.
        crop: the centre part of the resized image that is kept (timm: `crop_pct`).
        interpolation: "bicubic" or "bilinear", both antialiased.
        squash: resize to the size whatever the proportions, instead of covering it.
    """

    size: tuple
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)
    crop: float = 1.0
    interpolation: str = "bicubic"
    squash: bool = False


def check(preprocessing):
    """Refuse a `Preprocessing` that is none; it is returned with tuples in place of lists.

    Raises:
        ValueError: if `size` is no two numbers, `mean` and `std` are not equally many, a std is 0,
            `crop` is no share or the interpolation is unknown.
    """
    size, mean, std, crop, interpolation, _ = preprocessing
    try:
        size, mean, std = tuple(map(int, size)), tuple(map(float, mean)), tuple(map(float, std))
        valid = len(size) == 2 and len(mean) == len(std) > 0 and 0 < crop <= 1 and all(std)
    except (TypeError, ValueError):
        valid = False
    if not valid or interpolation not in ("bicubic", "bilinear"):
        raise ValueError(
            "Expected a size (height, width), a mean and a std, not 0, for each channel, a crop "
            f'above 0 and up to 1, and "bicubic" or "bilinear"; got {preprocessing}.'
        )
    return preprocessing._replace(size=size, mean=mean, std=std)


def symmetric(shape):
    """The `Preprocessing` of pixels in -1..1, for images of a shape (H, W, C)."""
    half = (0.5,) * shape[2]
    return Preprocessing(tuple(shape[:2]), half, half)


def decode(source):
    """Decode a photo fully, upright, as an RGB `PIL.Image`.

    Args:
        source: path, encoded bytes, `PIL.Image`, or uint8 array (H, W, 3), (H, W, 1) or (H, W).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image, is truncated, is grey of 32 bits or has over 64 million
            pixels.
    """
    from PIL import Image, ImageOps

    name = "the image"
    if isinstance(source, np.ndarray):
        grey = source.ndim == 3 and source.shape[2] == 1
        return eight_bits(Image.fromarray(source[..., 0] if grey else source)).convert("RGB")
    if isinstance(source, str | Path):
        name = str(source)
        if not Path(source).is_file():
            found = ": a folder." if Path(source).is_dir() else "."
            raise FileNotFoundError(f"There is no image at {name}{found}")
        source = Path(source).read_bytes()
    try:
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS}")
        return eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except Exception as error:  # PIL's decoders raise a dozen kinds
        reason = "not an image" if "cannot identify" in str(error) else error
        raise ValueError(f"{name} cannot be read: {reason}") from error


def eight_bits(image):
    """Grey of 16 bits as grey of 8: PIL's own conversion makes white of all above 255.

    Raises:
        ValueError: for grey of 32 bits, of which nobody knows the number that is white.
    """
    from PIL import Image

    if image.mode in ("I", "F"):
        raise ValueError("grey of 32 bits, whose range is unknown; save it in 8 or 16")
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) / 257).round().astype("uint8"))


def is_image(source):
    """Whether what `decode` takes begins as an image does; the rest may be missing."""
    from PIL import Image

    if not isinstance(source, str | Path | bytes):
        return True
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source):
            return True
    except Exception:  # as in `decode`
        return False


def fit(image, preprocessing):
    """Resize a PIL image as `preprocessing` says and cut the centre: uint8 (H, W, 3) or (H, W, 1).

    Sides and offsets are rounded as torchvision rounds them, which timm uses.

    Raises:
        ValueError: if the model takes neither grey nor coloured photos.
    """
    from PIL import Image

    channels = len(preprocessing.mean)
    if channels not in MODES:
        raise ValueError(f"Photos have 1 channel (grey) or 3; the model takes {channels}.")
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    height, width = preprocessing.size
    rows, columns = (int(side / preprocessing.crop) for side in preprocessing.size)
    if not preprocessing.squash:  # one side fits, the other exceeds
        if rows * image.width >= columns * image.height:
            columns = int(rows * image.width / image.height)
        else:
            rows = int(columns * image.height / image.width)
    if (columns, rows) != image.size:
        image = image.resize((columns, rows), Image.Resampling[preprocessing.interpolation.upper()])
    left, top = round((columns - width) / 2), round((rows - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return pixels.reshape(height, width, channels)


def normalize(pixels, preprocessing):
    """uint8 pixels (..., C) -> float32, normalised per channel."""
    mean = 255 * np.asarray(preprocessing.mean, "float32")
    scale = 1 / (255 * np.asarray(preprocessing.std, "float32"))
    return (np.asarray(pixels, "float32") - mean) * scale


def load(source, preprocessing):
    """A photo as a model's input: float32 (H, W, 3), or (H, W, 1) in grey.

    Args:
        source: as in `decode`.
        preprocessing: a `Preprocessing`.

    Example:
        >>> load("photo.jpg", Preprocessing((224, 224))).shape
        (224, 224, 3)
    """
    return normalize(fit(decode(source), preprocessing), preprocessing)
