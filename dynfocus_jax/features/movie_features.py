"""LLaMA-VID's movie features: pickles, read without executing anything in them.

A file holds `{"feats": float16 [T, 257, 1408], "inputs": str}`: features of EVA-CLIP ViT-g (the class token
first) of a frame a second, and for each frame "<image>" with the subtitles spoken then behind it.

A pickle is a program. It is not given to Python's unpickler, but gone through operation by operation by
`_load`, which knows how to build texts, numbers, tuples, lists, dicts and arrays of floats, and stops at
everything else: names other than the four that arrays are pickled with are refused, and even those stand for
functions of this file. Arrays are views of the mapped file, so that of a long movie only the chosen frames
are read from the disk.
"""

import mmap
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynfocus_jax.errors import MediaError
from dynfocus_jax.media.images import check_exists
from dynfocus_jax.media.subtitles import Subtitle

SUFFIX = ".pkl"
_MARKER = "<image>"
_PAUSE = "..."  # stands for "nothing is said" in LLaMA-VID's texts
_DTYPES = ("f2", "f4")
_MOST_BYTES = 2**36  # of a file: 100,000 frames
_MOST_OPERATIONS = 10_000
_MOST_TEXT = 2**26  # bytes of a text
_MOST_SHORT = 2**10  # bytes of what is read at once and is no text or array


class Movie(NamedTuple):
    """A movie that comes as features."""

    features: np.ndarray  # float16 or float32 [T, 1 + N, C], a view of the file
    times: np.ndarray  # float64 [T], seconds
    subtitles: list[Subtitle]


class Refusal(ValueError):
    """The file contains something that movie features do not consist of."""


def read_movie(path: Path) -> Movie:
    """Read a file of movie features; other entries of its dict are ignored.

    Raises:
      MediaError: it is missing, is no pickle, is more than plain data, or its parts do not fit each other.
    """
    check_exists(path)
    try:
        content = _load(_mapped(path))
        return _movie(content)
    except (Refusal, OSError) as error:
        raise MediaError(f"{path}: not a movie-features file ({error}), replace or remove it") from None


def _mapped(path: Path) -> memoryview:
    size = path.stat().st_size
    if not 0 < size <= _MOST_BYTES:
        raise Refusal(f"it has {size} bytes, expected 1 to {_MOST_BYTES}")
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _movie(content: Any) -> Movie:
    if not isinstance(content, dict):
        raise Refusal(f"it holds a {type(content).__name__}, expected a dict")
    array, text = content.get("feats"), content.get("inputs")
    if not isinstance(array, _Array) or array.values is None or not isinstance(text, str):
        raise Refusal('expected an array under "feats" and a text under "inputs"')
    features = array.values
    if features.ndim != 3 or 0 in features.shape:
        raise Refusal(f'"feats" has the shape {features.shape}, expected [frames, tokens, width]')
    times = np.arange(len(features), dtype=np.float64)
    return Movie(features, times, _subtitles(text, len(features)))


def _subtitles(text: str, frames: int) -> list[Subtitle]:
    """Return the subtitles of the frames that have any; a frame lasts one second."""
    before, *spoken = text.split(_MARKER)
    if len(spoken) != frames:
        raise Refusal(f'"inputs" has {len(spoken)} times {_MARKER}, but there are {frames} frames')
    spoken[0] = f"{before} {spoken[0]}"
    cleaned = [re.sub(r"\s+", " ", each.replace(_PAUSE, " ")).strip() for each in spoken]
    return [Subtitle(float(i), float(i + 1), each) for i, each in enumerate(cleaned) if each]


# ---- The pickle -----------------------------------------------------------------------------------------


class _Bytes:
    """A file for `pickletools`: what is long comes as a view, without being copied."""

    def __init__(self, data: memoryview):
        self._data, self._at = data, 0

    def tell(self) -> int:
        return self._at

    def read(self, count: int) -> bytes | memoryview:
        part = self._data[self._at : self._at + count]
        self._at += len(part)
        return bytes(part) if count <= _MOST_SHORT else part

    def readline(self) -> bytes:
        line = bytes(self._data[self._at : self._at + _MOST_SHORT]).partition(b"\n")
        self._at += len(line[0]) + len(line[1])
        return line[0] + line[1]


@dataclass(eq=False)
class _Dtype:
    """A dtype in the making; its byte order comes later."""

    name: str

    def build(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) >= 2 and state[1] in ("<", "|", "=")):
            raise Refusal("its numbers are not little-endian")


@dataclass(eq=False)
class _Array:
    """An array in the making; its values come later."""

    values: np.ndarray | None = None

    def build(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise Refusal("an array's state has not five parts")
        _, shape, dtype, fortran, data = state
        self.values = _values(data, dtype, shape, "F" if fortran is True else "C")


def _values(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """A view of bytes as an array, all of whose properties were read from a file."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray | memoryview):
        raise Refusal("an array is not made of bytes and a dtype")
    if not (isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 2**40 for size in shape)):
        raise Refusal("an array's shape is not made of sizes")
    items = 1
    for size in shape:
        items *= size
    kind = np.dtype("<" + dtype.name)
    if len(shape) > 4 or items * kind.itemsize != len(data):
        raise Refusal(f"an array of shape {shape[:5]} and type {dtype.name} cannot have {len(data)} bytes")
    return np.frombuffer(data, kind).reshape(shape, order="F" if order == "F" else "C")


def _new_dtype(name: Any, *_align_and_copy: Any) -> _Dtype:
    if type(name) is not str or name not in _DTYPES:
        found = f" of type {name[:40]!r}" if type(name) is str else ""
        raise Refusal(f"it has an array{found}, expected types {', '.join(_DTYPES)}")
    return _Dtype(name)


def _new_array(*_class_shape_and_typecode: Any) -> _Array:
    return _Array()


def _array_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _Array(_values(data, dtype, shape, order))


@dataclass(frozen=True)
class _Name:
    """A name that a pickle may mention, and what stands for it when it is called."""

    call: Callable | None = None
    least: int = 0  # arguments
    most: int = 0


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
    """Return the content of the pickle (protocol 3 to 5) in `data`.

    Raises:
      Refusal: it is no whole pickle, or has anything but plain data and arrays of floats in it.
    """
    machine = _Machine()
    try:
        for number, (operation, argument, _) in enumerate(pickletools.genops(_Bytes(data))):
            if number == _MOST_OPERATIONS:
                raise Refusal(f"its pickle has more than {_MOST_OPERATIONS} operations")
            machine.do(operation.name, argument)
        (content,) = machine.stack
    except Refusal:
        raise
    except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise Refusal(f"it is no whole pickle: {str(error)[:100] or type(error).__name__}") from None
    return content


class _Machine:
    """Interpreter of a pickle's opcodes: a stack, the stacks below its marks, and a memo."""

    def __init__(self):
        self.stack: list = []
        self._outer: list[list] = []
        self._memo: dict[int, Any] = {}

    def do(self, operation: str, argument: Any) -> None:
        """One operation, by its name in `pickletools`."""
        stack = self.stack
        match operation:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                if len(argument) > _MOST_TEXT:
                    raise Refusal(f"it has a text of {len(argument)} characters")
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
                stack.append(_known(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_known(module, name))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_called(function, arguments))
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], _Dtype | _Array):
                    raise Refusal("its pickle changes something that is no array")
                stack[-1].build(state)
            case _:
                raise Refusal(f"its pickle has the operation {operation}, which plain data does not need")

    def _collect(self, operation: str, items: list) -> None:
        """End the operations that take several items from the stack."""
        stack = self.stack
        if operation == "TUPLE":
            stack.append(tuple(items))
        elif operation == "APPENDS" and type(stack[-1]) is list:
            stack[-1].extend(items)
        elif operation == "SETITEMS" and type(stack[-1]) is dict and all(type(k) is str for k in items[::2]):
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        else:
            raise Refusal("its pickle adds to something that is no list, or no dict of texts")


def _known(module: Any, name: Any) -> _Name:
    # Nothing but texts is shown: of tuples of tuples of tuples ... str() would never end.
    if not (type(module) is str and type(name) is str):
        raise Refusal("its pickle asks for a name that is no text")
    if (module, name) not in _NAMES:
        raise Refusal(f"its pickle asks for {f'{module} {name}'[:80]!r}, which plain data does not need")
    return _NAMES[module, name]


def _called(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Name) or function.call is None or type(arguments) is not tuple:
        raise Refusal("its pickle calls something that is no function")
    if not function.least <= len(arguments) <= function.most:
        raise Refusal("its pickle calls a function with other arguments than arrays need")
    return function.call(*arguments)
