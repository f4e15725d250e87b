"""Image files, and conversion of any image to the square input of a vision tower."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dynfocus_jax.errors import MediaError

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
LAYOUTS = ("crop", "pad", "stretch")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_PIXELS = 2**28  # of an image, also after padding: 0.8 GB

_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSES = (  # for the orientations 2 to 8
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
_MAX_ASPECT = 8  # long side over short side of an image that is scaled as a whole


def check_exists(path: str | Path) -> None:
    """Check that `path` is a file or a link to one, not a folder, pipe or device; raise MediaError if not."""
    if not Path(path).is_file():
        raise MediaError(f"{path}: no such file; check the path and the media folder.")


@contextmanager
def _open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image; turn every error, also within the context, into a MediaError."""
    check_exists(path)
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow raises exceptions of any type for invalid bytes
        reason = str(error) or type(error).__name__
        raise MediaError(f"{path}: not a readable image ({reason}); replace or remove it.") from error


def read_image(
    path: str | Path, *, size: int, layout: str = "crop", mean: Sequence[float] = CLIP_MEAN
) -> np.ndarray:
    """Read an image file, or the first image of a file with several.

    The image is turned upright by its EXIF orientation. Transparency is dropped, as in Hugging Face's image
    processors. Of 16-bit values the upper 8 bits are kept.

    Args:
      path: the file.
      size: height and width of the result.
      layout: see `fit_to_square`.
      mean: see `fit_to_square`.

    Returns:
      uint8 [size, size, 3], RGB.

    Raises:
      MediaError: if the file is missing, truncated or not an image.
    """
    with _open_image(path) as image:
        upright = _turn_upright(_to_rgb(image), _orientation(image))
        return np.asarray(fit_to_square(upright, size, layout, mean))


class ImageHeader(NamedTuple):
    """Header of an image file."""

    size: tuple[int, int]  # width and height in pixels, upright
    is_animated: bool


def read_image_header(path: str | Path) -> ImageHeader:
    """Read the header of an image without decoding it.

    Raises:
      MediaError: if the file is missing or not an image.
    """
    with _open_image(path) as image:
        width, height = image.size
        if _orientation(image) >= 5 and image.format != "TIFF":  # Pillow's size of a TIFF is already upright
            width, height = height, width
        return ImageHeader((width, height), getattr(image, "is_animated", False))


def fit_to_square(
    image: Image.Image, size: int, layout: str = "crop", mean: Sequence[float] = CLIP_MEAN
) -> Image.Image:
    """Convert an RGB image to a square, scaled bicubically with antialiasing.

    Args:
      image: an RGB image. One that has the right size is returned unchanged.
      size: height and width of the result in pixels.
      layout: "crop" scales the shorter side to `size` and crops the centre (CLIPImageProcessor); "pad" first
        pads the image to a square with the mean colour (LLaVA's expand2square, then CLIPImageProcessor);
        "stretch" scales both sides to `size` (SiglipImageProcessor).
      mean: mean colour of the vision tower, three values in [0, 1]. Used by "pad".
    """
    if layout == "pad":
        image = _pad(image, tuple(int(255 * value) for value in mean))
    elif layout == "crop":
        return _crop(image, size)
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    short = min(image.size)
    scaled = [size if side == short else int(size * side / short) for side in image.size]
    left, top = ((side - size) // 2 for side in scaled)
    if max(scaled) <= _MAX_ASPECT * size:
        box = (left, top, left + size, top + size)
        return image.resize(scaled, Image.Resampling.BICUBIC).crop(box)
    # Scale only the part of a long strip that is kept, because the whole strip would be a huge image.
    scale = [side / full for side, full in zip(image.size, scaled, strict=True)]
    box = (left * scale[0], top * scale[1], (left + size) * scale[0], (top + size) * scale[1])
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _pad(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    if image.width == image.height:
        return image
    if side * side > _MAX_PIXELS:
        raise ValueError(f"{side} x {side} pixels after padding, expected at most {_MAX_PIXELS}")
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, expected at most {_MAX_PIXELS}")
    if image.mode.startswith("I"):  # 16 bits; Pillow's conversion would clip the values at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2**16:
            raise ValueError(f"values from {values.min()} to {values.max()}, expected 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # EXIF data is often damaged in images that are not
        return 1


def _turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSES[orientation - 2]) if 2 <= orientation <= 8 else image
