"""The errors that users see, and the words they are made of. A leaf: it imports nothing of the package."""

import difflib
import reprlib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input: one sentence that says what is wrong, where, and what to do. Exit code 2."""


class RunError(Exception):
    """A run that cannot continue, in one or two sentences. Exit code 1."""


class SampleError(Exception):
    """A sample or request that cannot be used, in one sentence. The sample is skipped, the run continues."""


class MediaError(Exception):
    """A media file that cannot be read, in one sentence: which file, what was found, what to do."""


class MediaTimeout(MediaError):
    """A media file that took longer to read than `config.data.timeout`."""


def suggest(key: str, known: Iterable[str]) -> str:
    """Return the rest of a clause about an unknown name: the closest known name, or a list of all."""
    known = list(known)
    if not known:
        return ""
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f", expected one of {', '.join(sorted(known))}"


def quoted(value: object) -> str:
    """Return a value read from a file for use in a message: at most 80 characters, on one line."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = 80
