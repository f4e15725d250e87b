"""Reading images, and making any picture the square that a vision tower takes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dynfocus_jax.errors import MediaError, MediaTimeout

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
LAYOUTS = ("crop", "pad", "stretch")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_PIXELS = 2**28  # of a picture, also when padded: 0.8 GB

# What EXIF's orientation asks for, from 2 on.
_TURNS = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
_ORIENTATION = 0x0112
_STRIP = 8  # times as long as wide


def timed_out(path: str | Path, seconds: float) -> MediaTimeout:
    """The error of a file that was not read in so many seconds."""
    return MediaTimeout(
        f"{path}: reading it takes more than {seconds:g} s, replace or remove it, or raise "
        "config.data.timeout"
    )


def check_exists(path: str | Path) -> None:
    """Raise MediaError unless `path` is a file (or leads to one): no folder, pipe or device is opened."""
    if not Path(path).is_file():
        raise MediaError(f"{path}: no such file, check the path and the media folder")


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    check_exists(path)
    try:
        yield
    except Exception as error:  # Pillow's readers raise whatever bytes that make no sense lead to
        reason = str(error) or type(error).__name__
        raise MediaError(f"{path}: not a readable image ({reason}), replace or remove it") from error


def read_image(
    path: str | Path, *, size: int, layout: str = "crop", mean: Sequence[float] = CLIP_MEAN
) -> np.ndarray:
    """Read an image, or the first one of several in a file: uint8 [size, size, 3], RGB.

    It is turned upright by its EXIF orientation; transparency is dropped, as Hugging Face's image processors
    do it; of 16 bits the upper 8 are kept. layout, mean: see `fit`.

    Raises MediaError when the file is missing, is not an image or is truncated.
    """
    with _reading(path), Image.open(path) as image:
        upright = _upright(_to_rgb(image), _orientation(image))
        return np.asarray(fit(upright, size, layout, mean))


class ImageHeader(NamedTuple):
    """Header of an image file."""

    size: tuple[int, int]  # width and height in pixels, upright
    is_animated: bool


def image_header(path: str | Path) -> ImageHeader:
    """Look at an image without decoding it. Raises MediaError when it is missing or not an image."""
    with _reading(path), Image.open(path) as image:
        turned = _orientation(image) >= 5 and image.format != "TIFF"  # of which Pillow gives the upright size
        return ImageHeader(image.size[:: -1 if turned else 1], getattr(image, "is_animated", False))


def fit(
    image: Image.Image, size: int, layout: str = "crop", mean: Sequence[float] = CLIP_MEAN
) -> Image.Image:
    """Make an RGB picture a square of `size` pixels, scaled bicubically with antialiasing.

    layout: "crop" scales the shorter side to `size` and cuts out the centre (CLIPImageProcessor); "pad" first
      makes it a square with borders of the mean colour (LLaVA's expand2square, then CLIPImageProcessor);
      "stretch" scales both sides to `size` (SiglipImageProcessor).
    mean: the vision tower's mean colour, three values in [0, 1], used by "pad".
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
    if max(scaled) <= _STRIP * size:
        box = (left, top, left + size, top + size)
        return image.resize(scaled, Image.Resampling.BICUBIC).crop(box)
    # Of a long strip only what stays is computed, for the whole would be a huge picture.
    scale = [side / full for side, full in zip(image.size, scaled, strict=True)]
    box = (left * scale[0], top * scale[1], (left + size) * scale[0], (top + size) * scale[1])
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _pad(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    if image.width == image.height:
        return image
    if side * side > _MAX_PIXELS:
        raise ValueError(f"padded to a square it has {side} x {side} pixels, more than {_MAX_PIXELS}")
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than {_MAX_PIXELS}")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2**16:
            raise ValueError("its values are not those of 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its values are fractions, of which it is not known which one is white")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # EXIF is often damaged where the picture is not
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation - 2]) if 2 <= orientation <= 8 else image
