"""Reading a compiled program's HLO text: work, memory traffic and collectives of one device and one step.

XLA's own cost analysis counts the body of a loop once and is absent for GPUs; here bodies count as often as
their loops turn, which is where a model of stacked layers does nearly all of its work.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.-]+) = (.*)$")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|branch_computations|called_computations)=\{?(%[\w.-]+(?:, %[\w.-]+)*)"
)
_COUNTERS = ("s32", "u32", "s64", "u64")
# Instructions that move no memory: names for parts of buffers, or the ends of what was counted at its start.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"),
    *("while", "conditional", "call", "optimization-barrier", "replica-id", "async-update", "async-done"),
    *("copy-done", "send-done", "recv-done", "domain", "add-dependency"),
    *(f"{kind}-done" for kind in COLLECTIVES),
}


class Array(NamedTuple):
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
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


class Collective(NamedTuple):
    """A collective: its kind, the arrays that it gives and takes on a device, group, and times a step.

    groups: which partitions talk to each other `[groups, size]`; op_name: where the program asked for it.
    """

    kind: str
    gives: tuple[Array, ...]
    takes: tuple[Array, ...]
    groups: np.ndarray
    count: int
    op_name: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all its repetitions, by the ring algorithm."""
        size = self.groups.shape[1]
        whole = max(sum(a.bytes for a in self.gives), sum(a.bytes for a in self.takes))
        if self.kind == "collective-permute":
            return float(whole * self.count)
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * whole * (size - 1) / size * self.count


class Program(NamedTuple):
    """One device's step: FLOPs of matrix products, bytes read and written in HBM, collectives."""

    flops: float
    hbm_bytes: float
    collectives: list[Collective]


@functools.cache
def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    return int(re.search(r"\d+", dtype)[0])  # f32, bf16, s32, f8e4m3fn, ...


def _arrays(text: str) -> tuple[Array, ...]:
    """All arrays in a shape; `S(n)` in a layout is memory other than HBM (a TPU's vector memory)."""
    return tuple(
        Array(dtype, tuple(int(d) for d in dims.split(",") if d), re.search(r"S\([1-9]", layout) is None)
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


def read_program(text: str) -> Program:
    """The work of one device in one step, from `compiled.as_text()`."""
    computations, entry = parse(text)
    partitions = re.search(r"num_partitions=(\d+)", text)
    num_devices = int(partitions[1]) if partitions else 1
    flops, hbm_bytes, collectives, seen = 0.0, 0.0, [], set()
    for name, times, fused in _visits(computations, entry, 1, False):
        body = computations[name]
        for instruction in body.values():
            flops += times * _flops(instruction, body)
            if not fused:
                hbm_bytes += times * _traffic(instruction, body, computations)
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            # A TPU's asynchronous one stands in the fusion that starts it, in those that it runs beside and
            # in the one that awaits it, every time with the same channel.
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            if fused and channel:
                if channel[1] in seen:
                    continue
                seen.add(channel[1])
            collectives.append(_collective(kind, instruction, name, body, times, num_devices))
    return Program(flops, hbm_bytes, collectives)


def _visits(computations: dict, name: str, times: int, fused: bool) -> Iterator[tuple[str, int, bool]]:
    """Every computation that runs: how often a step, and whether inside of a fusion."""
    yield name, times, fused
    for instruction in computations[name].values():
        if instruction.opcode in ("async-done", "async-update"):
            continue
        inner = fused or instruction.opcode == "fusion"
        turns = _trip_count(instruction, computations) if instruction.opcode == "while" else 1
        called = _called(instruction)
        if instruction.opcode == "conditional":
            # One branch runs; the dearest stands for it.
            called = called[:1]
        for each in called:
            yield from _visits(computations, each, times * turns, inner)


def _called(instruction: Instruction) -> list[str]:
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


def _trip_count(loop: Instruction, computations: dict) -> int:
    """Turns of a loop: as XLA knows them, or the bound that its counter is compared with; else 1."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = computations[re.search(r"condition=%([\w.-]+)", loop.attributes)[1]]
    bounds = [
        int(re.match(r"\((-?\d+)\)", each.attributes)[1])
        for each in condition.values()
        if each.opcode == "constant" and each.result[0].dtype in _COUNTERS and not each.result[0].dims
    ]
    return max(bounds, default=1)


def _attribute(instruction: Instruction, name: str) -> tuple[int, ...]:
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", instruction.attributes)
    return tuple(int(d) for d in found[1].split(",") if d) if found else ()


def _flops(instruction: Instruction, body: dict[str, Instruction]) -> float:
    """FLOPs of a matrix product, 2 a multiply-add; everything else is cheap beside these and counts 0."""
    if instruction.opcode == "dot":
        left = body[instruction.operands[0]].result[0]
        contracted = math.prod(left.dims[d] for d in _attribute(instruction, "lhs_contracting_dims"))
        return 2.0 * instruction.result[0].size * contracted
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, body)
    if instruction.opcode == "custom-call" and re.search(
        r'custom_call_target="__cublas', instruction.attributes
    ):
        left = body[instruction.operands[0]].result[0]
        contracting = re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', instruction.attributes)
        contracted = math.prod(left.dims[int(d)] for d in re.findall(r"\d+", contracting[1]))
        return 2.0 * instruction.result[0].size * contracted
    return 0.0


def _convolution_flops(instruction: Instruction, body: dict[str, Instruction]) -> float:
    """TPUs write matrix products as convolutions, batch dimensions as dilated windows of one element."""
    left, right = (body[name].result[0] for name in instruction.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    described = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", described[1])) if described else {}
    spatial = sorted(c for c in labels[1] if c.isdigit())
    valid = 1
    for axis, label in enumerate(spatial):

        def part(key, default, axis=axis):
            return window[key].split("x")[axis] if key in window else default

        size, stride = int(part("size", "1")), int(part("stride", "1"))
        lhs_dilate, rhs_dilate = int(part("lhs_dilate", "1")), int(part("rhs_dilate", "1"))
        low = int(part("pad", "0_0").split("_")[0])
        outputs = instruction.result[0].dims[labels[3].index(label)]
        inputs = left.dims[labels[1].index(label)]
        place = np.arange(outputs)[:, None] * stride - low + np.arange(size) * rhs_dilate
        hit = (place >= 0) & (place <= (inputs - 1) * lhs_dilate) & (place % lhs_dilate == 0)
        valid *= int(hit.sum())
    features = right.dims[labels[2].index("i")] * right.dims[labels[2].index("o")]
    batch = left.dims[labels[1].index("b")]
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return 2.0 * valid * features * batch / (int(groups[1]) if groups else 1)


def _hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _traffic(instruction: Instruction, body: dict[str, Instruction], computations: dict) -> float:
    """Bytes that an instruction reads and writes in HBM: its operands and its result.

    Of a stack of layers from which a slice is taken, or into which one is written in place, the slice counts.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode in ("async-start", "send", "recv"):
        return 0.0
    operands = [body[name].result for name in instruction.operands if name in body]
    if opcode == "copy-start":
        return 2.0 * max(map(_hbm, operands), default=0)
    if opcode in ("dynamic-slice", "gather"):
        return 2.0 * _hbm(instruction.result)
    if opcode == "dynamic-update-slice":
        return 2.0 * _hbm(operands[1])
    if opcode.removesuffix("-start") in COLLECTIVES:
        kind = opcode.removesuffix("-start")
        takes = tuple(array for each in operands for array in each)
        return _hbm(takes) + _hbm(_given(kind, opcode, instruction.result, len(takes)))
    if opcode == "fusion":
        return _fusion_traffic(instruction, operands, computations)
    return sum(map(_hbm, operands)) + _hbm(instruction.result)


def _fusion_traffic(instruction: Instruction, operands: list, computations: dict) -> float:
    inside = computations[_called(instruction)[0]]
    users: dict[str, list[Instruction]] = {}
    for each in inside.values():
        for name in each.operands:
            users.setdefault(name, []).append(each)
    parameters = {
        int(re.match(r"\((\d+)\)", each.attributes)[1]): each
        for each in inside.values()
        if each.opcode == "parameter"
    }

    def read(value: Instruction) -> int | None:
        """Bytes read of a value of which only slices are used; None when all of it is."""
        total = 0
        for user in users.get(value.name, []):
            if user.opcode == "bitcast":
                part = read(user)
            elif user.opcode in ("dynamic-slice", "gather") and user.operands[0] == value.name:
                part = user.result[0].bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                part = 0
            else:
                part = None
            if part is None:
                return None
            total += part
        return total

    total = 0.0
    for number, arrays in enumerate(operands):
        part = read(parameters[number]) if number in parameters else None
        total += _hbm(arrays) if part is None or not _hbm(arrays) else min(part, _hbm(arrays))
    # Slices written in place: the fusion's result has the size of the whole.
    result = [array.bytes for array in instruction.result if array.in_hbm]
    for each in inside.values():
        if each.opcode == "dynamic-update-slice" and each.result[0].bytes in result:
            result.remove(each.result[0].bytes)
            total += inside[each.operands[1]].result[0].bytes
    return total + sum(result)


def _given(kind: str, opcode: str, result: tuple[Array, ...], taken: int) -> tuple[Array, ...]:
    """The arrays that a collective gives: a started one lists what it takes before them."""
    if opcode.endswith("-start") and kind != "all-reduce" and len(result) > taken:
        return result[taken : 2 * taken]
    return result


def _collective(
    kind: str, instruction: Instruction, computation: str, body: dict, times: int, num_devices: int
) -> Collective:
    takes = tuple(array for name in instruction.operands for array in body[name].result)
    gives = _given(kind, instruction.opcode, instruction.result, len(takes))
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        # A TPU's reduce-scatter: an all-reduce fused with the slice that is taken of it.
        kind = "reduce-scatter"
    op_name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    groups = replica_groups(instruction.attributes, num_devices)
    return Collective(kind, gives, takes, groups, times, op_name[1] if op_name else "")


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """Partitions that talk to each other, int `[groups, size]`, from a collective's attributes.

    Forms: `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, `mesh['a'=4,'b'=2] {'a'}`; source_target_pairs give pairs.
    """
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes)
    listed = pairs or re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if listed:
        return np.array([[int(d) for d in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed[1])])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, dims, order = ([int(d) for d in (part or "").split(",") if d] for part in iota.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape[0], -1)
    mesh = re.search(r"replica_groups=@?\w*mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh:
        return _mesh_groups(mesh[1], mesh[2])
    return np.arange(num_devices)[None]


def _mesh_groups(axes: str, along: str) -> np.ndarray:
    """`'a'=4,'b'=2` and `'a'` (or a part of it, `'a':(2)2`: of size 2 behind a factor of 2) -> groups."""
    names, sizes = zip(*((name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)), strict=True)
    dims, chosen = [], []
    parts = {name: (pre, size) for name, pre, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)}
    for name, size in zip(names, sizes, strict=True):
        if name not in parts:
            dims.append(size)
            continue
        pre = int(parts[name][0] or 1)
        part = int(parts[name][1] or size)
        chosen.append(len(dims) + 1)
        dims += [pre, part, size // pre // part]
    ids = np.arange(math.prod(sizes)).reshape(dims)
    size = math.prod(dims[axis] for axis in chosen)
    return np.moveaxis(ids, chosen, range(-len(chosen), 0)).reshape(-1, size)
