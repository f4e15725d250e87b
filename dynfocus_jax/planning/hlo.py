"""Parser of HLO, the text of a compiled program: its computations, and how often each runs in a step."""

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
    """An array in HLO."""

    dtype: str  # in HLO's names: "f32", "bf16", "pred", ...
    dims: tuple[int, ...]
    in_hbm: bool  # False for other memory, such as a TPU's vector memory

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return math.ceil(self.size * _bits(self.dtype) / 8)


class Instruction(NamedTuple):
    """One instruction of a computation."""

    name: str
    opcode: str
    result: tuple[HloArray, ...]  # several arrays for a tuple
    operands: tuple[str, ...]  # names of instructions
    attributes: str  # the text after the operands; of a constant or parameter, the text in their place
    is_root: bool  # its result is that of the computation


Computations = dict[str, dict[str, Instruction]]  # computation -> instruction's name -> instruction


def find_required(pattern: str, text: str) -> re.Match[str]:
    """Return the first match of a pattern; raise ValueError if there is none."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"HLO has another form than expected: no {pattern!r} in {text[:200]!r}")
    return found


@functools.cache
def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    return int(find_required(r"\d+", dtype)[0])  # f32, bf16, s32, f8e4m3fn, ...


def _parse_arrays(text: str) -> tuple[HloArray, ...]:
    """Return all arrays of a shape. `S(n)` in a layout marks memory other than HBM."""
    return tuple(
        HloArray(dtype, tuple(int(d) for d in dims.split(",") if d), re.search(r"S\([1-9]", layout) is None)
        for dtype, dims, layout in _SHAPE.findall(text)
    )


def _end_of_group(text: str, start: int) -> int:
    """Return the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses in {text[:100]!r}")


def parse_hlo(text: str) -> tuple[Computations, str]:
    """Return the computations of an HLO text, and the name of the entry computation."""
    computations: Computations = {}
    entry, current = "", {}
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
        shape_end = _end_of_group(rest, 0) if rest.startswith("(") else rest.index(" ")
        opening = rest.index("(", shape_end)
        end = _end_of_group(rest, opening)
        opcode = rest[shape_end:opening].strip()
        current[name] = Instruction(
            name,
            opcode,
            _parse_arrays(rest[:shape_end]),
            tuple(re.findall(r"%([\w.-]+)", rest[opening:end])),
            # The value of a constant and the number of a parameter are in the place of operands.
            rest[opening:] if opcode in ("constant", "parameter") else rest[end:],
            line.startswith("  ROOT"),
        )
    return computations, entry


class Run(NamedTuple):
    """A computation that runs in a step, possibly several times."""

    name: str
    count: int  # how often it runs
    fused: bool  # it is part of a fusion, whose intermediate results stay on the chip


def iterate_runs(computations: Computations, name: str, count: int = 1, fused: bool = False) -> Iterator[Run]:
    """Yield a computation that runs `count` times, and all computations that it calls."""
    yield Run(name, count, fused)
    for instruction in computations[name].values():
        if instruction.opcode in ("async-done", "async-update"):
            continue
        is_loop = instruction.opcode == "while"
        iterations = _trip_count(instruction, computations[name], computations) if is_loop else 1
        parts = called_computations(instruction)
        if instruction.opcode == "conditional":  # one branch runs; assume the longest
            parts = [max(parts, key=lambda part: _num_instructions(computations, part))]
        for part in parts:
            inside_fusion = fused or instruction.opcode == "fusion"
            yield from iterate_runs(computations, part, count * iterations, inside_fusion)


def _num_instructions(computations: Computations, name: str) -> int:
    """Return the number of instructions that one run of a computation executes."""
    return sum(run.count * len(computations[run.name]) for run in iterate_runs(computations, name))


def called_computations(instruction: Instruction) -> list[str]:
    """Return the computations that an instruction runs, without those that it applies to each element."""
    if instruction.opcode not in ("fusion", "while", "call", "conditional", "async-start"):
        return []
    if instruction.opcode == "conditional":
        pair = re.findall(r"(?:true|false)_computation=%([\w.-]+)", instruction.attributes)
        if pair:
            return pair
    return [
        name for group in _CALLED.findall(instruction.attributes) for name in re.findall(r"%([\w.-]+)", group)
    ]


def _trip_count(loop: Instruction, outer: dict[str, Instruction], computations: Computations) -> int:
    """Return the number of iterations of a loop; 1 if it cannot be found.

    XLA may state it; otherwise it follows from the start, bound and step of the loop's counter. The step
    can be 2: on TPUs, matrix products that gather their weights piece by piece are loops of two pieces per
    iteration.

    outer: the computation that holds the loop.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = computations[find_required(r"condition=%([\w.-]+)", loop.attributes)[1]]
    body = computations[find_required(r"body=%([\w.-]+)", loop.attributes)[1]]
    bounds = [_constant(each, condition) for each in condition.values() if each.opcode == "constant"]
    bound = max((each for each in bounds if each is not None), default=1)
    counter = next((_tuple_index(each) for each in condition.values() if _is_counter(each)), None)
    if counter is None:
        return bound
    initial = outer[loop.operands[0]]
    start = _constant(outer[initial.operands[counter]], outer) if initial.opcode == "tuple" else None
    root = next(each for each in body.values() if each.is_root)
    added = body[root.operands[counter]] if root.opcode == "tuple" else root
    steps = [_constant(body[name], body) for name in added.operands] if added.opcode == "add" else []
    step = next((each for each in steps if each), 1)
    return max(math.ceil((bound - (start or 0)) / step), 0)


def _is_counter(instruction: Instruction) -> bool:
    array = instruction.result[0]
    return instruction.opcode == "get-tuple-element" and array.dtype in _COUNTERS and not array.dims


def _tuple_index(instruction: Instruction) -> int:
    """Return the index of a get-tuple-element."""
    return int(find_required(r"index=(\d+)", instruction.attributes)[1])


def _constant(instruction: Instruction, computation: dict[str, Instruction]) -> int | None:
    """Return the value of an integer constant or of a copy of one; None for anything else."""
    source = instruction
    while source.opcode == "copy":
        source = computation[source.operands[0]]
    array = source.result[0]
    if source.opcode != "constant" or array.dtype not in _COUNTERS or array.dims:
        return None
    return int(find_required(r"^\((-?\d+)\)", source.attributes)[1])


def dimension_list(instruction: Instruction, name: str) -> tuple[int, ...]:
    """Return the numbers of an attribute `name={0,1}`; () if it is absent."""
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", instruction.attributes)
    return tuple(int(d) for d in found[1].split(",") if d) if found else ()
