"""Replies of a judge, and the file that keeps them between runs."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dynfocus_jax.errors import UserError


class Reply(NamedTuple):
    """A judge's reply. text: the judge's words; model: the model's name, as reported by the endpoint."""

    text: str
    model: str


NO_REPLY = Reply("", "")


class NoReply(Exception):
    """The reason why one question got no reply. Other questions may still get theirs."""


class ReplyCache:
    """Replies by the digest of their request, in memory and, given a path, in a file.

    Replies are appended to the file, one JSON value per line. An unreadable line, left by a process that was
    killed, is ignored; its question is asked again.

    Raises:
      UserError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._replies: dict[str, Reply] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                lines = file.read().split(b"\n")
                if lines[-1]:
                    file.write(b"\n")
        except OSError as error:
            raise UserError(
                f"the judge's cache {path} cannot be used ({error.strerror}); use a folder that can be "
                "written to."
            ) from None
        self._replies.update(_parse_entries(lines))

    def get(self, key: str) -> Reply:
        """Return the reply to a request; NO_REPLY if there is none."""
        return self._replies.get(key, NO_REPLY)

    def add(self, key: str, reply: Reply) -> None:
        """Add a reply; when this returns, it is in the file."""
        self._replies[key] = reply
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(json.dumps({"key": key, **reply._asdict()}).encode() + b"\n")


def _parse_entries(lines: Iterable[bytes]) -> Iterable[tuple[str, Reply]]:
    for line in lines:
        try:
            entry = json.loads(line)
            yield entry["key"], Reply(str(entry["text"]), str(entry["model"]))
        except (ValueError, KeyError, TypeError):
            continue
