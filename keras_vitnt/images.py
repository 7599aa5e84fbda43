"""A photo -> a model's input: one way for training, prediction, calibration and export.

decode -> resize to cover and crop the centre (PIL's bicubic, antialiased) -> normalise.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAX_PIXELS = 64_000_000  # a decompression bomb is refused before it is decoded

# (mean, std) that each family's public checkpoints were trained with.
NORMALIZATION = {
    "vit": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "deit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "tnt": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class Preprocessing(NamedTuple):
    """What a model expects of its images.

    Attributes:
        size: (height, width) in pixels.
        mean, std: per channel, for pixels in 0..1: (x / 255 - mean) / std.
        crop: the centre part of the covering resize that is kept (timm: `crop_pct`).
    """

    size: tuple
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)
    crop: float = 1.0


def decode(source):
    """Decode a photo fully, upright, as an RGB `PIL.Image`.

    Args:
        source: path, encoded bytes, `PIL.Image`, or uint8 array (H, W, 3) or (H, W).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image, is truncated or has over 64 million pixels.
    """
    from PIL import Image, ImageOps

    name = "the image"
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    if isinstance(source, str | Path):
        name = str(source)
        if not Path(source).is_file():
            raise FileNotFoundError(f"There is no image at {name}.")
        source = Path(source).read_bytes()
    try:
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS}")
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # PIL's decoders raise a dozen kinds
        reason = "not an image" if "cannot identify" in str(error) else error
        raise ValueError(f"{name} cannot be read: {reason}") from error


def fit(image, size, crop=1.0):
    """Resize a PIL image to cover `size` / `crop` and cut the centre: uint8 (H, W, 3)."""
    from PIL import Image

    height, width = size
    scale = max(height / image.height, width / image.width) / crop
    resized = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def normalize(pixels, preprocessing):
    """uint8 pixels (..., 3) -> float32, normalised per channel."""
    mean = 255 * np.asarray(preprocessing.mean, "float32")
    scale = 1 / (255 * np.asarray(preprocessing.std, "float32"))
    return (np.asarray(pixels, "float32") - mean) * scale


def load(source, preprocessing):
    """A photo as a model's input: float32 (H, W, 3).

    Args:
        source: as in `decode`.
        preprocessing: a `Preprocessing`.

    Example:
        >>> load("photo.jpg", Preprocessing((224, 224))).shape
        (224, 224, 3)
    """
    return normalize(fit(decode(source), preprocessing.size, preprocessing.crop), preprocessing)
