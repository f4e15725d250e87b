"""Paths that annotation files name, kept inside the folder of their media."""

import os
import stat
from pathlib import Path

from dynfocus_jax.errors import quoted

_MOST_BYTES = 4096  # of a path
_MOST_NAME_BYTES = 255  # of one part of it

_FILE, _FOLDER, _LINK, _SPECIAL = "a file", "a folder", "a link", "a device or pipe"


class MediaFolder:
    """Checks many paths against one folder; every folder below it is listed once and then remembered.

    What a path leads to is that of the moment at which its folder was listed.
    """

    def __init__(self, root: str | Path):
        # Absolute: a name such as "file:x" must not be taken for an address by what opens it.
        self.path = Path(os.path.abspath(root))
        self._real = os.path.realpath(root)
        self._folders: dict[str, dict[str, str] | None] = {}  # None: it lies outside

    def file(self, relative: str) -> Path:
        """The path of a file below the folder, which need not be there.

        Raises ValueError, in one sentence, for what is empty or too long, has a NUL character or "..", is
        absolute, goes through a link that leads out of the folder, or names a folder, device or pipe.
        """
        parent, name = self._split(relative)
        names = self._names(parent)
        if names is None:
            raise ValueError(f"path {quoted(relative)} goes through a link that leaves the media folder")
        path = Path(f"{self.path}/{parent}/{name}" if parent else f"{self.path}/{name}")
        kind = names.get(name, _FILE)
        if kind is _LINK:
            target = os.path.realpath(path)
            if not self._holds(target):
                raise ValueError(f"path {quoted(relative)} is a link that leaves the media folder")
            kind = _kind_of(target)
        if kind is not _FILE:
            raise ValueError(f"path {quoted(relative)} is {kind}, expected a file")
        return path

    def has(self, relative: str) -> bool:
        """Whether something of that name is there; False too for what `file` refuses by its name."""
        try:
            parent, name = self._split(relative)
        except ValueError:
            return False
        return name in (self._names(parent) or ())

    def _split(self, relative: str) -> tuple[str, str]:
        """(folder, name) without "." parts and doubled slashes; raises ValueError."""
        if not relative or relative.isspace():
            raise ValueError("the path is empty")
        if "\0" in relative:
            raise ValueError("the path has a NUL character")
        if relative.startswith("/"):
            raise ValueError(f"path {quoted(relative)} is absolute, expected one inside the media folder")
        parts = [part for part in relative.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise ValueError(f'path {quoted(relative)} has "..", which could leave the media folder')
        if not parts:
            raise ValueError(f"path {quoted(relative)} names no file")
        if (
            len(os.fsencode(relative)) > _MOST_BYTES
            or len(os.fsencode(max(parts, key=len))) > _MOST_NAME_BYTES
        ):
            raise ValueError(f"path {quoted(relative)} is too long")
        return "/".join(parts[:-1]), parts[-1]

    def _names(self, parent: str) -> dict[str, str] | None:
        """{name: kind} of a folder, empty if it cannot be read; None if it lies outside."""
        if parent not in self._folders:
            folder = os.path.realpath(self.path / parent)
            self._folders[parent] = _listing(folder) if self._holds(folder) else None
        return self._folders[parent]

    def _holds(self, real: str) -> bool:
        return real == self._real or real.startswith(self._real.rstrip("/") + "/")


def inside(root: str | Path, relative: str) -> Path:
    """`MediaFolder(root).file(relative)`, for a single path."""
    return MediaFolder(root).file(relative)


def _listing(folder: str) -> dict[str, str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name: _kind_of_entry(entry) for entry in entries}
    except OSError:
        return {}


def _kind_of_entry(entry: os.DirEntry) -> str:
    if entry.is_symlink():
        return _LINK
    if entry.is_file(follow_symlinks=False):
        return _FILE
    return _FOLDER if entry.is_dir(follow_symlinks=False) else _SPECIAL


def _kind_of(path: str) -> str:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return _FILE  # missing: shows when it is read
    if stat.S_ISREG(mode):
        return _FILE
    return _FOLDER if stat.S_ISDIR(mode) else _SPECIAL
