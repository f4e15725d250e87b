"""Paths from annotation files, confined to the folder of their media."""

import os
import stat
from pathlib import Path

from dynfocus_jax.errors import quoted

_MAX_PATH_BYTES = 4096
_MAX_NAME_BYTES = 255  # of one part of a path

_FILE, _FOLDER, _LINK, _SPECIAL = "a file", "a folder", "a link", "a device or pipe"


class MediaFolder:
    """A folder of media files, against which many paths are checked.

    Each folder below it is listed once and the listing is cached, so later changes of links are not seen.
    """

    def __init__(self, root: str | Path):
        # Absolute, so that a name such as "file:x" is not taken for a URL when it is opened.
        self.path = Path(os.path.abspath(root))
        self._real = os.path.realpath(root)
        self._listings: dict[str, dict[str, str] | None] = {}  # None for a folder outside

    def file(self, relative: str) -> Path:
        """Return the absolute path of a file below the folder; the file need not exist.

        Raises:
          ValueError: if the path is empty, too long or absolute, contains a NUL character or "..", leaves the
            folder through a link, or names a folder, device or pipe.
        """
        parent, name = self._split(relative)
        listing = self._listing(parent)
        if listing is None:
            raise ValueError(f"path {quoted(relative)} goes through a link that leaves the media folder")
        path = Path(f"{self.path}/{parent}/{name}" if parent else f"{self.path}/{name}")
        kind = listing.get(name, _FILE)
        if kind is _LINK:
            target = os.path.realpath(path)
            if not self._contains(target):
                raise ValueError(f"path {quoted(relative)} is a link that leaves the media folder")
            kind = _kind_of_target(target)
        if kind is not _FILE:
            raise ValueError(f"path {quoted(relative)} is {kind}, expected a file")
        return path

    def has(self, relative: str) -> bool:
        """Return whether the folder has an entry at a path; False for a path that is not allowed."""
        try:
            parent, name = self._split(relative)
        except ValueError:
            return False
        return name in (self._listing(parent) or ())

    def _split(self, relative: str) -> tuple[str, str]:
        """Split a path into (folder, name), without "." and empty parts.

        Raises:
          ValueError: if the path is not allowed.
        """
        if not relative or relative.isspace():
            raise ValueError("the path is empty")
        if "\0" in relative:
            raise ValueError("the path contains a NUL character")
        if relative.startswith("/"):
            raise ValueError(f"path {quoted(relative)} is absolute, expected one inside the media folder")
        parts = [part for part in relative.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise ValueError(f'path {quoted(relative)} contains "..", which could leave the media folder')
        if not parts:
            raise ValueError(f"path {quoted(relative)} is not the path of a file")
        longest_name = max(len(os.fsencode(part)) for part in parts)
        if len(os.fsencode(relative)) > _MAX_PATH_BYTES or longest_name > _MAX_NAME_BYTES:
            raise ValueError(f"path {quoted(relative)} is too long")
        return "/".join(parts[:-1]), parts[-1]

    def _listing(self, parent: str) -> dict[str, str] | None:
        """Return {name: kind} of a folder, empty if it cannot be read; None if it lies outside."""
        if parent not in self._listings:
            folder = os.path.realpath(self.path / parent)
            self._listings[parent] = _list_folder(folder) if self._contains(folder) else None
        return self._listings[parent]

    def _contains(self, real: str) -> bool:
        return real == self._real or real.startswith(self._real.rstrip("/") + "/")


def _list_folder(folder: str) -> dict[str, str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name: _kind_of_entry(entry) for entry in entries}
    except OSError:
        return {}


def _kind_of_entry(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return _LINK
    if entry.is_file(follow_symlinks=False):
        return _FILE
    return _FOLDER if entry.is_dir(follow_symlinks=False) else _SPECIAL


def _kind_of_target(path: str) -> str:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return _FILE  # a missing file is reported when it is read
    if stat.S_ISREG(mode):
        return _FILE
    return _FOLDER if stat.S_ISDIR(mode) else _SPECIAL
