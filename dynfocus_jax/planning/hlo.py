"""HLO, the text of a compiled program: its computations, and how often each of them runs in a step."""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.-]+) = (.*)$")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|branch_computations|called_computations)=\{?(%[\w.-]+(?:, %[\w.-]+)*)"
)
_COUNTERS = ("s32", "u32", "s64", "u64")


class HloArray(NamedTuple):
    """An array of HLO: its element type, dimensions, and whether it lies in HBM."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return math.ceil(self.size * _bits(self.dtype) / 8)


class Instruction(NamedTuple):
    """One line: name, opcode, arrays of its result (more than one for a tuple), operands, the text behind."""

    name: str
    opcode: str
    result: tuple[HloArray, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


@functools.cache
def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    return int(re.search(r"\d+", dtype)[0])  # f32, bf16, s32, f8e4m3fn, ...


def _arrays(text: str) -> tuple[HloArray, ...]:
    """All arrays in a shape; `S(n)` in a layout is memory other than HBM (a TPU's vector memory)."""
    return tuple(
        HloArray(dtype, tuple(int(d) for d in dims.split(",") if d), re.search(r"S\([1-9]", layout) is None)
        for dtype, dims, layout in _SHAPE.findall(text)
    )


def _closing(text: str, start: int) -> int:
    """Index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses in {text[:100]!r}")


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """HLO text -> {computation: {name: instruction}} and the name of the entry computation."""
    computations, entry, current = {}, "", {}
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
            continue
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, rest = match.groups()
        end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
        opening = rest.index("(", end)
        close = _closing(rest, opening)
        current[name] = Instruction(
            name,
            rest[end:opening].strip(),
            _arrays(rest[:end]),
            tuple(re.findall(r"%([\w.-]+)", rest[opening:close])),
            # A constant's or parameter's value or number stands where others have their operands.
            rest[opening:] if rest[end:opening].strip() in ("constant", "parameter") else rest[close:],
            line.startswith("  ROOT"),
        )
    return computations, entry


def visits(computations: dict, name: str, times: int, fused: bool) -> Iterator[tuple[str, int, bool]]:
    """Every computation that runs: how often a step, and whether inside of a fusion."""
    yield name, times, fused
    for instruction in computations[name].values():
        if instruction.opcode in ("async-done", "async-update"):
            continue
        inner = fused or instruction.opcode == "fusion"
        turns = _turns(instruction, computations[name], computations) if instruction.opcode == "while" else 1
        parts = called(instruction)
        if instruction.opcode == "conditional":  # one branch runs; the longest stands for it
            parts = [max(parts, key=lambda part: _length(computations, part))]
        for part in parts:
            yield from visits(computations, part, times * turns, inner)


def _length(computations: dict, name: str) -> int:
    """Instructions that run in a computation."""
    return sum(times * len(computations[part]) for part, times, _ in visits(computations, name, 1, False))


def called(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs as a part of the program (not those applied to each element)."""
    if instruction.opcode not in ("fusion", "while", "call", "conditional", "async-start"):
        return []
    if instruction.opcode == "conditional":
        pair = re.findall(r"(?:true|false)_computation=%([\w.-]+)", instruction.attributes)
        if pair:
            return pair
    return [
        name for group in _CALLED.findall(instruction.attributes) for name in re.findall(r"%([\w.-]+)", group)
    ]


def _turns(loop: Instruction, body: dict[str, Instruction], computations: dict) -> int:
    """Iterations of the loop `body`: as XLA knows them, or from its counter's bound, step and start; else 1.

    Matrix products that gather their weights piece by piece (TPU) are loops that count two pieces a turn.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition, turn = (
        computations[re.search(rf"{part}=%([\w.-]+)", loop.attributes)[1]] for part in ("condition", "body")
    )
    bounds = [_constant(each, condition) for each in condition.values() if each.opcode == "constant"]
    bound = max((each for each in bounds if each is not None), default=1)
    counter = next((_index(each) for each in condition.values() if _is_counter(each)), None)
    if counter is None:
        return bound
    first = body[loop.operands[0]]
    start = _constant(body[first.operands[counter]], body) if first.opcode == "tuple" else None
    root = next(each for each in turn.values() if each.is_root)
    added = turn[root.operands[counter]] if root.opcode == "tuple" else root
    steps = [_constant(turn[name], turn) for name in added.operands] if added.opcode == "add" else []
    step = next((each for each in steps if each), 1)
    return max(math.ceil((bound - (start or 0)) / step), 0)


def _is_counter(instruction: Instruction) -> bool:
    array = instruction.result[0]
    return instruction.opcode == "get-tuple-element" and array.dtype in _COUNTERS and not array.dims


def _index(instruction: Instruction) -> int:
    return int(re.search(r"index=(\d+)", instruction.attributes)[1])


def _constant(instruction: Instruction, body: dict[str, Instruction]) -> int | None:
    """The value of an integer constant, or of a copy of one; None of anything else."""
    while instruction.opcode == "copy":
        instruction = body[instruction.operands[0]]
    array = instruction.result[0]
    if instruction.opcode != "constant" or array.dtype not in _COUNTERS or array.dims:
        return None
    return int(re.match(r"\((-?\d+)\)", instruction.attributes)[1])


def attribute(instruction: Instruction, name: str) -> tuple[int, ...]:
    """The numbers of an attribute `name={0,1}`."""
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", instruction.attributes)
    return tuple(int(d) for d in found[1].split(",") if d) if found else ()
