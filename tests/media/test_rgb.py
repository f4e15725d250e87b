"""Colours of decoded frames, compared with the formulas of the standards, and the display matrix."""

import struct

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynfocus_jax.data.synthetic_frames import write_video
from dynfocus_jax.media.rgb import RgbConverter
from dynfocus_jax.media.video import read_video
from tests.media.videos import encode

# Kr and Kb of the matrices, by their number in ITU-T H.273 (2: unspecified, taken for BT.601)
MATRICES = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114)}
UNSPECIFIED, LIMITED, FULL = 0, 1, 2


def frame(format, y, u, v, matrix=2, scale=UNSPECIFIED, size=(48, 48)):
    """Return a frame of one colour, given in 8 bits."""
    result = av.VideoFrame(*size, format)
    deep = "10le" in format
    for plane, value in zip(result.planes, (y, u, v), strict=True):
        values = np.full(
            plane.buffer_size // (1 + deep), value << (2 * deep), np.uint16 if deep else np.uint8
        )
        plane.update(values.tobytes())
    result.colorspace, result.color_range = matrix, scale
    return result


def to_rgb(y, u, v, matrix, full):
    """Convert a colour by the formulas of BT.601 and BT.709."""
    kr, kb = MATRICES[matrix]
    if full:
        luma, blue, red = y, u - 128, v - 128
    else:
        luma, blue, red = (y - 16) * 255 / 219, (u - 128) * 255 / 224, (v - 128) * 255 / 224
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    return np.clip([r, (luma - kr * r - kb * b) / (1 - kr - kb), b], 0, 255)


@pytest.mark.parametrize(
    "format", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv444p10le", "yuvj420p"]
)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("scale", [UNSPECIFIED, LIMITED, FULL])
@pytest.mark.parametrize(
    "color", [(120, 90, 200), (60, 160, 110), (200, 120, 130), (16, 128, 128), (235, 128, 128)]
)
def test_colours_follow_the_tags_of_a_frame(format, matrix, scale, color):
    full = scale == FULL or format.startswith("yuvj")
    got = RgbConverter()(frame(format, *color, matrix, scale))
    assert got.shape == (48, 48, 3)
    assert got.min((0, 1)).tolist() == got.max((0, 1)).tolist()
    # libswscale computes with few bits: its error is up to 3.2 levels
    np.testing.assert_allclose(got[0, 0], to_rgb(*color, matrix, full), rtol=0, atol=3.5)


def test_tags_may_change_within_a_file():
    """A reformatter of PyAV before 17 keeps the matrix of its first frame."""
    convert, color = RgbConverter(), (120, 90, 200)
    for matrix, scale in [(1, LIMITED), (5, LIMITED), (1, FULL), (2, UNSPECIFIED), (1, LIMITED), (5, FULL)]:
        got = convert(frame("yuv420p", *color, matrix, scale))[0, 0]
        np.testing.assert_allclose(got, to_rgb(*color, matrix, scale == FULL), rtol=0, atol=3.5)


def test_size_may_change_within_a_file():
    convert = RgbConverter()
    for size in [(48, 48), (32, 64), (48, 48), (47, 33)]:
        assert convert(frame("yuv420p", 120, 90, 200, size=size)).shape == (size[1], size[0], 3)


@pytest.mark.parametrize(("matrix", "full"), [(1, False), (1, True), (5, False), (2, False)])
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv420p10le"])
def test_colours_follow_the_tags_of_a_file(tmp_path, matrix, full, pixels):
    color = (120, 90, 200)
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"crf": "1"})
        stream.width = stream.height = 48
        stream.pix_fmt = pixels
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, FULL if full else LIMITED
        for _ in range(3):
            container.mux(stream.encode(frame(pixels, *color, matrix, FULL if full else LIMITED)))
        container.mux(stream.encode())
    clip = read_video(tmp_path / "v.mp4", 3, size=48)
    expected = np.broadcast_to(to_rgb(*color, matrix, full), clip.frames.shape)
    np.testing.assert_allclose(clip.frames, expected, rtol=0, atol=4.5)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(width=st.integers(1, 90), height=st.integers(1, 90))
def test_odd_sizes(width, height):
    """Planes have padded rows and chroma sizes rounded up; the padding must not be visible."""
    got = RgbConverter()(frame("yuv420p", 120, 90, 200, size=(width, height)))
    assert got.shape == (height, width, 3)
    np.testing.assert_allclose(
        got, np.broadcast_to(to_rgb(120, 90, 200, 2, False), got.shape), rtol=0, atol=3.5
    )


@pytest.mark.parametrize(("width", "height"), [(47, 33), (33, 47), (2, 2), (18, 2)])
def test_files_of_odd_sizes(tmp_path, width, height):
    colors = np.array([(200, 30, 40), (30, 60, 200)], np.uint8)
    frames = np.broadcast_to(colors[:, None, None], (2, height, width, 3))
    pixels = "yuv444p" if width % 2 or height % 2 else "yuv420p"  # H.264 needs 4:4:4 for odd sizes
    encode(tmp_path / "v.mp4", frames, options={"crf": "1"}, pixels=pixels)
    clip = read_video(tmp_path / "v.mp4", 2, size=24)
    np.testing.assert_allclose(clip.frames, np.broadcast_to(colors[:, None, None], clip.frames.shape), atol=6)


# ---- Display matrix --------------------------------------------------------------------------------------

# a, b, c, d of (x, y) -> (a x + c y, b x + d y), with y pointing down, and the same as a function of images
ROTATIONS = {
    "none": ((1, 0, 0, 1), lambda x: x),
    "quarter clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "half": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "quarter counterclockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "mirrored and a quarter": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    "mirrored and another": ((0, -1, -1, 0), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
}


def set_matrix(path, a, b, c, d):
    """Write the display matrix into the header of the first track (ISO 14496-12, tkhd)."""
    content = bytearray(path.read_bytes())
    # type; version and flags; times, track id and duration; other fields
    start = content.index(b"tkhd") + 4 + 4 + 20 + 16
    fixed = [round(each * 2**16) for each in (a, b)] + [0] + [round(each * 2**16) for each in (c, d)]
    content[start : start + 36] = struct.pack(">9i", *fixed, 0, 0, 0, 2**30)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_videos_are_rotated_upright(tmp_path, rotation):
    matrix, function = ROTATIONS[rotation]
    image = np.zeros((48, 48, 3), np.uint8)
    image[:24, :24], image[:24, 24:], image[24:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    write_video(tmp_path / "v.mp4", np.stack([image] * 3))
    plain = read_video(tmp_path / "v.mp4", 3, size=48).frames
    set_matrix(tmp_path / "v.mp4", *matrix)
    rotated = read_video(tmp_path / "v.mp4", 3, size=48).frames
    np.testing.assert_array_equal(rotated, [function(each) for each in plain])


def test_frames_are_cropped_after_rotation(tmp_path):
    image = np.zeros((48, 96, 3), np.uint8)
    image[:, 24:72] = 255  # the part that a centre crop keeps, rotated or not
    image[24:, :24] = (0, 0, 250)
    write_video(tmp_path / "v.mp4", np.stack([image] * 2))
    set_matrix(tmp_path / "v.mp4", 0, 1, -1, 0)
    clip = read_video(tmp_path / "v.mp4", 2, size=96, layout="pad", mean=(0, 0, 0))
    # The bottom left corner is now at the top.
    assert clip.frames[0, :24, 24:48].mean((0, 1)).round(-1).tolist() == [0, 0, 250]
    assert read_video(tmp_path / "v.mp4", 2, size=48).frames[:, 2:-2].min() > 240
