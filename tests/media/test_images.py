"""Images of every mode become RGB, upright and square; other files are refused."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dynfocus_jax.errors import MediaError
from dynfocus_jax.media.images import LAYOUTS, fit_to_square, read_image, read_image_header

SIZE = 48


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def smooth(width, height):
    small = Image.fromarray(noise(height // 8 + 2, width // 8 + 2, 3))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def save(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_images_are_turned_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"i.{suffix}", smooth(60, 48), exif=exif, **options)
    with Image.open(path) as stored:
        assert stored.getexif()[0x0112] == orientation
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    assert read_image_header(path).size == expected.size == ((60, 48) if orientation < 5 else (48, 60))
    np.testing.assert_array_equal(read_image(path, size=SIZE), np.asarray(fit_to_square(expected, SIZE)))


@pytest.mark.parametrize(
    "damage", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01", b"Exif\0\0"]
)
def test_damaged_exif_is_ignored(tmp_path, damage):
    image = Image.fromarray(noise(SIZE, SIZE, 3))
    path = save(tmp_path / "i.jpg", image, quality=95, exif=damage)
    plain = save(tmp_path / "plain.jpg", image, quality=95)
    np.testing.assert_array_equal(read_image(path, size=SIZE), read_image(plain, size=SIZE))


def modes():
    """Return {mode: (image, expected RGB values [H, W, 3], tolerance)}."""
    grey, rgb, alpha = noise(SIZE, SIZE), noise(SIZE, SIZE, 3, seed=1), noise(SIZE, SIZE, seed=2)
    as_grey = np.repeat(grey[..., None], 3, -1)
    palette = Image.fromarray(rgb).quantize(32)
    cmyk = noise(SIZE, SIZE, 4, seed=3)
    paper = 1 - cmyk.astype(float) / 255
    return {
        "grey": (Image.fromarray(grey), as_grey, 0),
        "bits": (Image.fromarray(grey > 127), np.where(as_grey > 127, 255, 0), 0),
        "alpha": (Image.fromarray(np.dstack([rgb, alpha])), rgb, 0),
        "grey alpha": (Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), as_grey, 0),
        "palette": (palette, np.asarray(palette.convert("RGB")), 0),
        "cmyk": (Image.fromarray(cmyk, "CMYK"), 255 * paper[..., :3] * paper[..., 3:], 1.01),
    }


@pytest.mark.parametrize("mode", modes())
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    image, expected, tolerance = modes()[mode]
    if mode == "cmyk" and suffix == "png":
        suffix = "tiff"
    path = save(tmp_path / f"i.{suffix}", image)
    with Image.open(path) as stored:
        assert stored.mode == image.mode
    np.testing.assert_allclose(read_image(path, size=SIZE), expected, rtol=0, atol=tolerance)


def test_transparent_palette_keeps_its_colours(tmp_path):
    palette = Image.fromarray(noise(SIZE, SIZE, 3)).quantize(32)
    path = save(tmp_path / "i.png", palette, transparency=3)
    np.testing.assert_array_equal(read_image(path, size=SIZE), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_upper_8_of_16_bits_are_kept(tmp_path, suffix):
    deep = noise(SIZE, SIZE, dtype=np.uint16)
    path = save(tmp_path / f"i.{suffix}", Image.fromarray(deep))
    expected = np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, -1)
    np.testing.assert_array_equal(read_image(path, size=SIZE), expected)


def test_16_bit_rgb(tmp_path):
    deep = noise(SIZE, SIZE, 3, dtype=np.uint16)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 16, 2, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "i.png").write_bytes(content)
    np.testing.assert_array_equal(read_image(tmp_path / "i.png", size=SIZE), deep >> 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.random.default_rng(0).random((SIZE, SIZE), np.float32), "floating-point"),
        (np.full((SIZE, SIZE), 70_000, np.int32), "expected 16 bits"),
        (np.full((SIZE, SIZE), -1, np.int32), "expected 16 bits"),
    ],
)
def test_values_of_unknown_scale_are_refused(tmp_path, values, message):
    path = save(tmp_path / "i.tif", Image.fromarray(values))
    with pytest.raises(MediaError, match=rf"i\.tif: .*{message}"):
        read_image(path, size=SIZE)


# ---- The square ------------------------------------------------------------------------------------------

ODD_SIZES = [
    (224, 224),
    (640, 427),
    (427, 640),
    (225, 223),
    (1, 1),
    (1, 9),
    (37, 500),
    (1001, 337),
    (3000, 47),
]


@pytest.mark.parametrize(("width", "height"), ODD_SIZES)
def test_pad_equals_llava(width, height):
    """expand2square of LLaVA's mm_utils in NumPy, then CLIP's scaling."""
    image, mean = smooth(width, height), (0.48145466, 0.4578275, 0.40821073)
    side = max(width, height)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(255 * value) for value in mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = np.asarray(image)
    expected = Image.fromarray(square).resize((64, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(fit_to_square(image, 64, "pad", mean)), np.asarray(expected))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_square_of_the_right_size_is_unchanged(layout):
    image = Image.fromarray(noise(SIZE, SIZE, 3))
    np.testing.assert_array_equal(np.asarray(fit_to_square(image, SIZE, layout)), np.asarray(image))


@pytest.mark.parametrize(("width", "height"), [(40_000, 4), (4, 40_000)])
def test_only_the_kept_part_of_a_strip_is_scaled(width, height):
    """The whole strip, scaled, would have 2.24 million x 224 pixels. A piece of it has the same centre."""
    strip = smooth(width, height)
    left, top = max(0, width // 2 - 8), max(0, height // 2 - 8)
    piece = strip.crop((left, top, min(width, left + 16), min(height, top + 16)))
    expected = np.asarray(fit_to_square(piece, 224)).astype(int)
    difference = np.abs(np.asarray(fit_to_square(strip, 224)) - expected)
    assert difference[40:-40, 40:-40].max() <= 2
    assert expected.std() > 1


def test_too_many_pixels_are_refused(tmp_path):
    strip = save(tmp_path / "i.png", Image.new("RGB", (20_000, 4)))
    assert read_image(strip, size=SIZE).shape == (SIZE, SIZE, 3)
    with pytest.raises(MediaError, match="20000 x 20000 pixels after padding, expected at most"):
        read_image(strip, size=SIZE, layout="pad")
    bomb = save(tmp_path / "bomb.png", Image.new("1", (20_000, 20_000)))
    with pytest.raises(MediaError, match=r"bomb\.png: not a readable image"):
        read_image(bomb, size=SIZE)


# ---- Unreadable files ------------------------------------------------------------------------------------


def test_missing_and_unreadable_files(tmp_path):
    (tmp_path / "text.png").write_bytes(b"not an image\n" * 50)
    (tmp_path / "empty.png").write_bytes(b"")
    for read in (lambda path: read_image(path, size=SIZE), read_image_header):
        for name, message in [
            ("none.png", "no such file"),
            ("text.png", "not a readable"),
            ("empty.png", ""),
        ]:
            with pytest.raises(MediaError, match=rf"{name}: {message}") as error:
                read(tmp_path / name)
            assert "\n" not in str(error.value)
    with pytest.raises(MediaError, match="no such file"):
        read_image(tmp_path, size=SIZE)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif"])
def test_truncated_images_are_refused(tmp_path, suffix):
    path = save(tmp_path / f"i.{suffix}", Image.fromarray(noise(SIZE, SIZE, 3)))
    content = path.read_bytes()
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(MediaError, match=rf"i\.{suffix}: not a readable image"):
            read_image(path, size=SIZE)


def stored(kind):
    buffer = io.BytesIO()
    Image.fromarray(noise(32, 32, 3)).save(buffer, kind)
    return buffer.getvalue()


FILES = {kind: stored(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")}


@settings(deadline=None, derandomize=True, max_examples=300)
@given(kind=st.sampled_from(sorted(FILES)), data=st.data())
def test_any_bytes_are_read_or_refused(tmp_path_factory, kind, data):
    content = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "fuzzed.png"
    path.write_bytes(bytes(content))
    with contextlib.suppress(MediaError):
        assert read_image(path, size=16).shape == (16, 16, 3)
