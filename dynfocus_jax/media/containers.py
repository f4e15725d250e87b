"""Detection of truncated files: the size that a container declares, compared with the size of the file."""

from pathlib import Path
from typing import BinaryIO

_BOXES = frozenset({b"ftyp", b"styp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"pnot", b"uuid"})
_PACKET, _TIMED_PACKET = 188, 192  # bytes of an MPEG-TS packet, without and with a timestamp before it
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def is_truncated(path: str | Path) -> bool | None:
    """Return whether bytes are missing at the end of a file, from the sizes in its container.

    Supports MP4, QuickTime, Matroska, WebM, AVI and GIF, and MPEG-TS files that end within a packet. Only
    headers are read, not the contents.

    Durations and frame counts in headers are not used: they are often wrong in complete files. Sizes are
    reliable because players depend on them.

    Returns:
      True if bytes are missing, False if none are, None if the container does not tell.
    """
    with Path(path).open("rb") as file:
        start = file.read(2 * _TIMED_PACKET)
        file.seek(0)
        if start[4:8] in _BOXES:
            return _is_truncated_mp4(file)
        if start[:4] == _EBML:
            return _is_truncated_matroska(file)
        if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
            return _is_truncated_avi(file)
        if start[:6] in (b"GIF87a", b"GIF89a"):
            return _is_truncated_gif(file)
        for packet, sync in ((_PACKET, 0), (_TIMED_PACKET, 4)):
            if start[sync::packet][:2] == b"GG":
                return True if _size(file) % packet else None
    return None


def _size(file: BinaryIO) -> int:
    position = file.tell()
    end = file.seek(0, 2)
    file.seek(position)
    return end


def _is_truncated_mp4(file: BinaryIO) -> bool | None:
    """Check a sequence of boxes.

    A box is its size (4 bytes; if that is 1, another 8 bytes after the type), its type and its content.
    """
    end, position = _size(file), 0
    while position + 8 <= end:
        file.seek(position)
        header = file.read(16)
        size = int.from_bytes(header[:4], "big")
        if not header[4:8].isalnum():  # not a box: something was appended to a complete file
            return False
        if size == 0:  # the box extends to the end of the file
            return None
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        if size < 8:
            return None
        position += size
    return position > end


def _is_truncated_matroska(file: BinaryIO) -> bool | None:
    """Check an EBML header followed by one segment that contains the rest of the file."""
    end = _size(file)
    file.seek(len(_EBML))
    header = _read_ebml_size(file)
    if header is None or file.seek(header, 1) >= end or file.read(4) != _SEGMENT:
        return None
    size = _read_ebml_size(file)
    return None if size is None else file.tell() + size > end


def _read_ebml_size(file: BinaryIO) -> int | None:
    """Read a size of one to eight bytes: one more than the first byte has leading zero bits.

    Returns:
      The size; None for the value that means "unknown" (all ones), or if there is no size.
    """
    first = file.read(1)
    length = 9 - first[0].bit_length() if first else 9
    if length > 8:
        return None
    bits = 7 * length
    size = int.from_bytes(first + file.read(length - 1), "big") & (2**bits - 1)
    return None if size == 2**bits - 1 else size


def _is_truncated_avi(file: BinaryIO) -> bool | None:
    """Check one RIFF chunk, or several of about a gigabyte each."""
    end, position, size = _size(file), 0, 0
    while position + 8 <= end:
        file.seek(position)
        header = file.read(8)
        size = int.from_bytes(header[4:], "little")
        if header[:4] != b"RIFF":  # something was appended to a complete file
            return False
        if size in (0, 2**32 - 1):  # the writer never filled in the size
            return None
        position += 8 + size + size % 2
    return position - size % 2 > end


def _is_truncated_gif(file: BinaryIO) -> bool:
    """Check a palette and blocks of images and extensions, each a chain of pieces, up to a semicolon."""

    def skip_palette(flags: int) -> None:
        if flags & 0x80:
            file.seek(3 << (flags & 7) + 1, 1)

    def byte_at(header: bytes, index: int) -> int:
        return header[index] if len(header) > index else 0

    skip_palette(byte_at(file.read(13), 10))
    while (kind := file.read(1)) in (b",", b"!"):
        if kind == b",":
            skip_palette(byte_at(file.read(9), 8))
        file.seek(1, 1)  # the label of the extension, or the code size of the image
        while length := file.read(1):
            if length == b"\0":
                break
            file.seek(length[0], 1)
    return kind == b""
