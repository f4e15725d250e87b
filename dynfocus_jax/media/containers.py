"""Truncation of files: compare the size that a container declares with the file's, without reading it."""

from pathlib import Path
from typing import BinaryIO

_BOXES = frozenset({b"ftyp", b"styp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"pnot", b"uuid"})
_PACKET, _LONG_PACKET = 188, 192  # bytes of an MPEG-TS packet, without and with a time before it
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def is_cut(path: str | Path) -> bool | None:
    """True when bytes are missing at the end, False when none are, None when the container does not say.

    Knows MP4 and QuickTime, Matroska and WebM, AVI, and GIF; of MPEG-TS it knows what was cut off within a
    packet. Headers also claim durations and numbers of frames, which are often wrong in files that are
    whole; these sizes are not, for players rely on them.
    """
    with Path(path).open("rb") as file:
        start = file.read(2 * _LONG_PACKET)
        file.seek(0)
        if start[4:8] in _BOXES:
            return _is_cut_mp4(file)
        if start[:4] == _EBML:
            return _is_cut_matroska(file)
        if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
            return _is_cut_avi(file)
        if start[:6] in (b"GIF87a", b"GIF89a"):
            return _is_cut_gif(file)
        for packet, sync in ((_PACKET, 0), (_LONG_PACKET, 4)):
            if start[sync::packet][:2] == b"GG":
                return True if _size(file) % packet else None
    return None


def _size(file: BinaryIO) -> int:
    position = file.tell()
    end = file.seek(0, 2)
    file.seek(position)
    return end


def _is_cut_mp4(file: BinaryIO) -> bool | None:
    """Boxes: a size (of four bytes, or 1 and another of eight), a type, the content."""
    end, position = _size(file), 0
    while position + 8 <= end:
        file.seek(position)
        header = file.read(16)
        size = int.from_bytes(header[:4], "big")
        if not header[4:8].isalnum():  # no box: something was appended to a whole file
            return False
        if size == 0:  # up to the end, wherever that is
            return None
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        if size < 8:
            return None
        position += size
    return position > end


def _is_cut_matroska(file: BinaryIO) -> bool | None:
    """An EBML header, then one segment that holds all the rest."""
    end = _size(file)
    file.seek(len(_EBML))
    header = _ebml_size(file)
    if header is None or file.seek(header, 1) >= end or file.read(4) != _SEGMENT:
        return None
    size = _ebml_size(file)
    return None if size is None else file.tell() + size > end


def _ebml_size(file: BinaryIO) -> int | None:
    """A size of one to eight bytes, as many as the first has leading zeros; None for "unknown" (all ones)."""
    first = file.read(1)
    length = 9 - first[0].bit_length() if first else 9
    if length > 8:
        return None
    bits = 7 * length
    size = int.from_bytes(first + file.read(length - 1), "big") & (2**bits - 1)
    return None if size == 2**bits - 1 else size


def _is_cut_avi(file: BinaryIO) -> bool | None:
    """One RIFF chunk, or several of about a gigabyte each."""
    end, position = _size(file), 0
    while position + 8 <= end:
        file.seek(position)
        header = file.read(8)
        size = int.from_bytes(header[4:], "little")
        if header[:4] != b"RIFF":  # something was appended to a whole file
            return False
        if size in (0, 2**32 - 1):  # the writer did not come back to fill it in
            return None
        position += 8 + size + size % 2
    return position - size % 2 > end


def _is_cut_gif(file: BinaryIO) -> bool:
    """Palette, then blocks of images and extensions, each a chain of pieces, up to a closing semicolon."""

    def skip_palette(flags: int) -> None:
        if flags & 0x80:
            file.seek(3 << (flags & 7) + 1, 1)

    def at(header: bytes, index: int) -> int:
        return header[index] if len(header) > index else 0

    skip_palette(at(file.read(13), 10))
    while (kind := file.read(1)) in (b",", b"!"):
        if kind == b",":
            skip_palette(at(file.read(9), 8))
        file.seek(1, 1)  # the extension's label, or the width of the image's codes
        while length := file.read(1):
            if length == b"\0":
                break
            file.seek(length[0], 1)
    return kind == b""
