"""LLaMA-VID's movie features: pickle files, read without executing anything in them.

A file holds `{"feats": float16 [T, 257, 1408], "inputs": str}`: the features of EVA-CLIP ViT-g (class token
first) for one frame per second, and for each frame the marker "<image>" followed by the subtitles spoken
during it.

Loading a pickle executes the calls that it contains, so the file is never given to an unpickler. `_load`
walks through its operations instead. It can build strings, numbers, tuples, lists, dicts and float arrays,
and rejects every other operation. Of the names that a pickle may refer to, it accepts only those that numpy
arrays are pickled with, and even these call functions of this module.

No library is used for this, for lack of one that fits: `pickle.load` and `numpy.load(allow_pickle=True)`
execute the file; a `pickle.Unpickler` limited to numpy's functions still calls these with arguments from the
file; `torch.load(weights_only=True)` needs PyTorch, which is no dependency of the package; all of them copy
the arrays into memory. Here, arrays are views of the memory-mapped file, so that only the chosen frames of a
long movie are read from the disk.
"""

import mmap
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dynfocus_jax.errors import MediaError
from dynfocus_jax.media.images import check_exists
from dynfocus_jax.media.subtitles import Subtitle

SUFFIX = ".pkl"
_MARKER = "<image>"
_PAUSE = "..."  # stands for silence in LLaMA-VID's texts
_DTYPES = ("f2", "f4")
_MAX_FILE_BYTES = 2**36  # 100,000 frames
_MAX_OPERATIONS = 10_000
_MAX_TEXT = 2**26  # characters of a string
_MAX_COPIED = 2**10  # bytes; longer strings and arrays are views of the file


class MovieFeatures(NamedTuple):
    """The frames of a movie as features."""

    features: np.ndarray  # float16 or float32 [T, 1 + N, C], a view of the file
    times: np.ndarray  # float64 [T], seconds
    subtitles: list[Subtitle]


class _InvalidFile(ValueError):
    """The file contains something that movie features do not consist of."""


def read_movie_features(path: Path) -> MovieFeatures:
    """Read a file of movie features; other entries of its dict are ignored.

    Raises:
      MediaError: if the file is missing, is not a pickle, holds anything but plain data and arrays, or if its
        parts do not fit each other.
    """
    check_exists(path)
    try:
        return _as_movie(_load(_map_file(path)))
    except (_InvalidFile, OSError) as error:
        raise MediaError(
            f"{path}: not a file of movie features ({error}); download it again, or remove it."
        ) from None


def _map_file(path: Path) -> memoryview:
    size = path.stat().st_size
    if not 0 < size <= _MAX_FILE_BYTES:
        raise _InvalidFile(f"it has {size} bytes, expected 1 to {_MAX_FILE_BYTES}")
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _as_movie(content: Any) -> MovieFeatures:
    """Check the content of a pickle, and return it as movie features."""
    if not isinstance(content, dict):
        raise _InvalidFile(f"it holds a {type(content).__name__}, expected a dict")
    array, text = content.get("feats"), content.get("inputs")
    if not isinstance(array, _Array) or array.values is None or not isinstance(text, str):
        raise _InvalidFile('expected an array under "feats" and a string under "inputs"')
    features = array.values
    if features.ndim != 3 or 0 in features.shape:
        raise _InvalidFile(f'"feats" has the shape {features.shape}, expected [frames, tokens, width]')
    times = np.arange(len(features), dtype=np.float64)
    return MovieFeatures(features, times, _subtitles(text, len(features)))


def _subtitles(text: str, frames: int) -> list[Subtitle]:
    """Return the subtitles of the frames that have any; a frame lasts one second."""
    before, *spoken = text.split(_MARKER)
    if len(spoken) != frames:
        raise _InvalidFile(f'"inputs" has {len(spoken)} markers {_MARKER}, expected {frames}, one per frame')
    spoken[0] = f"{before} {spoken[0]}"
    cleaned = [re.sub(r"\s+", " ", each.replace(_PAUSE, " ")).strip() for each in spoken]
    return [Subtitle(float(i), float(i + 1), each) for i, each in enumerate(cleaned) if each]


# ---- The pickle -----------------------------------------------------------------------------------------


class _MappedFile(BinaryIO):
    """The part of a binary file's interface that `pickletools` uses, over memory; long reads return views."""

    def __init__(self, data: memoryview):
        self._data, self._at = data, 0

    def tell(self) -> int:
        return self._at

    def read(self, count: int) -> bytes | memoryview:
        part = self._data[self._at : self._at + count]
        self._at += len(part)
        return bytes(part) if count <= _MAX_COPIED else part

    def readline(self) -> bytes:
        content, newline, _ = bytes(self._data[self._at : self._at + _MAX_COPIED]).partition(b"\n")
        self._at += len(content) + len(newline)
        return content + newline


@dataclass(eq=False)
class _Dtype:
    """A dtype under construction; `build` receives its byte order."""

    name: str

    def build(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) >= 2 and state[1] in ("<", "|", "=")):
            raise _InvalidFile("its arrays are not little-endian")


@dataclass(eq=False)
class _Array:
    """An array under construction; `build` receives its values if the constructor did not."""

    values: np.ndarray | None = None

    def build(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise _InvalidFile("the state of an array does not have 5 fields")
        _, shape, dtype, fortran, data = state
        self.values = _view_as_array(data, dtype, shape, "F" if fortran is True else "C")


def _view_as_array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """Return a view of bytes as an array, after checking the arguments, which were all read from a file."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray | memoryview):
        raise _InvalidFile("an array is not built from bytes and a dtype")
    if not (isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 2**40 for size in shape)):
        raise _InvalidFile("the shape of an array is not a tuple of sizes")
    items = 1
    for size in shape:
        items *= size
    kind = np.dtype("<" + dtype.name)
    if len(shape) > 4 or items * kind.itemsize != len(data):
        raise _InvalidFile(
            f"an array of shape {shape[:5]} and type {dtype.name} cannot have {len(data)} bytes"
        )
    return np.frombuffer(data, kind).reshape(shape, order="F" if order == "F" else "C")


def _new_dtype(name: Any, *_align_and_copy: Any) -> _Dtype:
    if type(name) is not str or name not in _DTYPES:
        found = f" of type {name[:40]!r}" if type(name) is str else ""
        raise _InvalidFile(f"it has an array{found}, expected {' or '.join(map(repr, _DTYPES))}")
    return _Dtype(name)


def _new_array(*_class_shape_and_typecode: Any) -> _Array:
    return _Array()


def _array_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _Array(_view_as_array(data, dtype, shape, order))


@dataclass(frozen=True)
class _Name:
    """A name that a pickle may refer to, and the function of this module that is called in its place."""

    call: Callable[..., _Dtype | _Array] | None = None
    min_arguments: int = 0
    max_arguments: int = 0


_RECONSTRUCT, _FROMBUFFER = _Name(_new_array, 3, 3), _Name(_array_from_buffer, 4, 4)
_NAMES = {
    ("numpy", "ndarray"): _Name(),
    ("numpy", "dtype"): _Name(_new_dtype, 1, 3),
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _FROMBUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROMBUFFER,
}


def _load(data: memoryview) -> Any:
    """Return the content of a pickle of protocol 3 to 5.

    Raises:
      _InvalidFile: if the pickle is incomplete, or holds anything but plain data and float arrays.
    """
    interpreter = _Interpreter()
    try:
        for number, (operation, argument, _) in enumerate(pickletools.genops(_MappedFile(data))):
            if number == _MAX_OPERATIONS:
                raise _InvalidFile(f"its pickle has more than {_MAX_OPERATIONS} operations")
            interpreter.execute(operation.name, argument)
        (content,) = interpreter.stack
    except _InvalidFile:
        raise
    except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = str(error)[:100] or type(error).__name__
        raise _InvalidFile(f"its pickle is incomplete or damaged: {reason}") from None
    return content


class _Interpreter:
    """State of a pickle's execution: a stack, the stacks below its marks, and a memo."""

    def __init__(self):
        self.stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def execute(self, operation: str, argument: Any) -> None:
        """Execute an operation, by its name in `pickletools`."""
        stack = self.stack
        match operation:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                if len(argument) > _MAX_TEXT:
                    raise _InvalidFile(
                        f"it has a string of {len(argument)} characters, expected at most {_MAX_TEXT}"
                    )
                stack.append(argument)
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(argument)
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[operation])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[operation]())
            case "MARK":
                self._outer.append(stack)
                self.stack = []
            case "TUPLE" | "APPENDS" | "SETITEMS":
                self.stack = self._outer.pop()
                self._collect(operation, stack)
            case "TUPLE1" | "TUPLE2" | "TUPLE3" | "APPEND" | "SETITEM":
                count = {"APPEND": 1, "SETITEM": 2}.get(operation) or int(operation[-1])
                items = [stack.pop() for _ in range(count)][::-1]
                self._collect({"APPEND": "APPENDS", "SETITEM": "SETITEMS"}.get(operation, "TUPLE"), items)
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(_find_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_find_name(module, name))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], _Dtype | _Array):
                    raise _InvalidFile("its pickle sets the state of something other than an array")
                stack[-1].build(state)
            case _:
                raise _InvalidFile(f"its pickle has the operation {operation}, which plain data never has")

    def _collect(self, operation: str, items: list[Any]) -> None:
        """Finish an operation that takes several items from the stack."""
        stack = self.stack
        if operation == "TUPLE":
            stack.append(tuple(items))
        elif operation == "APPENDS" and type(stack[-1]) is list:
            stack[-1].extend(items)
        elif operation == "SETITEMS" and type(stack[-1]) is dict and all(type(k) is str for k in items[::2]):
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        else:
            raise _InvalidFile(
                "its pickle adds items to something other than a list or a dict with string keys"
            )


def _find_name(module: Any, name: Any) -> _Name:
    """Return what stands for a name that the pickle refers to."""
    # The message shows strings only: str() of deeply nested tuples would not end.
    if not (type(module) is str and type(name) is str):
        raise _InvalidFile("its pickle refers to a name that is not a string")
    if (module, name) not in _NAMES:
        found = f"{module} {name}"[:80]
        raise _InvalidFile(f"its pickle refers to {found!r}, which plain data never does")
    return _NAMES[module, name]


def _call(function: Any, arguments: Any) -> _Dtype | _Array:
    """Call a function of this module, as the pickle asks."""
    if not isinstance(function, _Name) or function.call is None or type(arguments) is not tuple:
        raise _InvalidFile("its pickle calls something other than a function that arrays need")
    if not function.min_arguments <= len(arguments) <= function.max_arguments:
        raise _InvalidFile(
            f"its pickle calls a function with {len(arguments)} arguments, expected "
            f"{function.min_arguments} to {function.max_arguments}"
        )
    return function.call(*arguments)
