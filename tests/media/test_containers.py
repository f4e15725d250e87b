"""Truncation is detected from the sizes in a container, whatever its header claims."""

import struct

import numpy as np
import pytest
from PIL import Image

from dynfocus_jax.media.containers import is_truncated
from tests.media.videos import encode, numbered, write_kind

KINDS_WITH_SIZES = ["h264", "h264-index-first", "h264-mkv", "vp9", "mjpeg", "mjpeg-avi", "gif"]


def boxes(content):
    """Return the offsets of the boxes of an MP4 file, none for other files."""
    found, at = [], 0
    while content[4:8] in (b"ftyp", b"wide") and at < len(content):
        found.append(at)
        at += int.from_bytes(content[at : at + 4], "big")
    return found


@pytest.mark.parametrize("kind", KINDS_WITH_SIZES)
def test_truncation_is_detected_at_every_length(tmp_path, kind):
    path = write_kind(tmp_path, kind, count=8)
    content = path.read_bytes()
    assert is_truncated(path) is False
    # A cut between two boxes, or in the first 8 bytes of one, is not detected: the index or all frames are
    # missing then, which is found out later.
    undetected = {start + i for start in boxes(content) for i in range(8)}
    for length in {*range(64, len(content), max(1, len(content) // 97)), len(content) - 1} - undetected:
        path.write_bytes(content[:length])
        assert is_truncated(path) is True, length


@pytest.mark.parametrize("kind", KINDS_WITH_SIZES)
@pytest.mark.parametrize("junk", [b"\0" * 100, b"<html>not found</html>" * 20, b"\xff" * 7])
def test_appended_bytes_do_not_matter(tmp_path, kind, junk):
    path = write_kind(tmp_path, kind, count=4)
    path.write_bytes(path.read_bytes() + junk)
    assert is_truncated(path) is False


def test_boxes_with_64_bit_sizes_and_without_size(tmp_path):
    path = write_kind(tmp_path, "h264", count=4)
    content = path.read_bytes()
    at = content.index(b"mdat") - 4
    size = int.from_bytes(content[at : at + 4], "big")
    large = content[:at] + struct.pack(">I4sQ", 1, b"mdat", size + 8) + content[at + 8 :]
    path.write_bytes(large)
    assert is_truncated(path) is False
    path.write_bytes(large[: at + size])
    assert is_truncated(path) is True
    path.write_bytes(content[:at] + b"\0\0\0\0" + content[at + 4 : at + size])
    assert is_truncated(path) is None


def test_containers_without_sizes(tmp_path):
    class Pipe:
        """A file that cannot seek back to fill in sizes."""

        def __init__(self, path):
            self._file = path.open("wb")

        def write(self, data):
            return self._file.write(data)

    path = tmp_path / "live.webm"
    pipe = Pipe(path)
    encode(pipe, numbered(8), "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, format="webm")
    pipe._file.close()
    assert is_truncated(path) is None
    for kind in ("h264-ts", "flv", "wmv"):
        assert is_truncated(write_kind(tmp_path, kind, count=4)) is None
    for name, content in [("text.mp4", b"hello world, this is text"), ("empty.mp4", b"")]:
        (tmp_path / name).write_bytes(content)
        assert is_truncated(tmp_path / name) is None


def test_transport_stream_cut_within_a_packet(tmp_path):
    path = write_kind(tmp_path, "h264-ts", count=8)
    content = path.read_bytes()
    assert len(content) % 188 == 0
    path.write_bytes(content[:-1])
    assert is_truncated(path) is True
    path.write_bytes(b"".join(b"time" + content[at : at + 188] for at in range(0, len(content), 188)))
    assert is_truncated(path) is None
    path.write_bytes(path.read_bytes()[:-100])
    assert is_truncated(path) is True


def test_gif_with_a_palette_per_image(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    images = [Image.fromarray(each).quantize(16 * (i + 1)) for i, each in enumerate(noise)]
    images[0].save(tmp_path / "i.gif", save_all=True, append_images=images[1:], duration=50)
    content = (tmp_path / "i.gif").read_bytes()
    assert is_truncated(tmp_path / "i.gif") is False
    for length in range(13, len(content), 31):
        (tmp_path / "i.gif").write_bytes(content[:length])
        assert is_truncated(tmp_path / "i.gif") is True


def test_avi_with_several_chunks_and_without_size(tmp_path):
    path = write_kind(tmp_path, "mjpeg-avi", count=4)
    content = path.read_bytes()
    more = b"RIFF" + struct.pack("<I", 16) + b"AVIX" + bytes(12)
    path.write_bytes(content + more)
    assert is_truncated(path) is False
    path.write_bytes(content + more[:-1])
    assert is_truncated(path) is True
    path.write_bytes(content[:4] + bytes(4) + content[8:])
    assert is_truncated(path) is None
