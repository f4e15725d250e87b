"""A compiled program's work: matrix products, memory traffic and collectives of one device and one step.

XLA's own cost analysis counts the body of a loop once and is absent for GPUs; here bodies count as often as
their loops turn, which is where a model of stacked layers does nearly all of its work.
"""

import itertools
import math
import re
from typing import NamedTuple

import numpy as np

from dynfocus_jax.planning.hlo import HloArray, Instruction, attribute, called, parse, visits

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Instructions that move no memory: names for parts of buffers, or the ends of what was counted at its start.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"),
    *("while", "conditional", "call", "optimization-barrier", "replica-id", "async-update", "async-done"),
    *("copy-done", "slice-done", "send-done", "recv-done", "domain", "add-dependency"),
    *(f"{kind}-done" for kind in COLLECTIVES),
}
_SLICES = ("slice", "dynamic-slice", "gather")
_PASSED = ("parameter", *COLLECTIVES)


class Collective(NamedTuple):
    """A collective: its kind, the arrays that it gives and takes on a device, group, and times a step.

    groups: which partitions talk to each other `[groups, size]`; op_name: where the program asked for it.
    """

    kind: str
    gives: tuple[HloArray, ...]
    takes: tuple[HloArray, ...]
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


def read_program(text: str) -> Program:
    """The work of one device in one step, from `compiled.as_text()`."""
    computations, entry = parse(text)
    partitions = re.search(r"num_partitions=(\d+)", text)
    num_devices = int(partitions[1]) if partitions else 1
    flops, hbm_bytes, collectives = 0.0, 0.0, {}
    for name, times, fused in visits(computations, entry, 1, False):
        body = computations[name]
        for instruction in body.values():
            flops += times * _flops(instruction, body)
            if not fused:
                hbm_bytes += times * _traffic(instruction, body, computations)
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            # A TPU's asynchronous one stands in the fusion that starts it, in all that it runs beside (the
            # turns of a loop, too) and in the one that awaits it, every time with the same channel.
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            key = channel[0] if fused and channel else len(collectives)
            if key not in collectives or times < collectives[key].count:
                collectives[key] = _collective(kind, instruction, name, body, times, num_devices)
    return Program(flops, hbm_bytes, list(collectives.values()))


def _flops(instruction: Instruction, body: dict[str, Instruction]) -> float:
    """FLOPs of a matrix product, 2 a multiply-add; everything else is cheap beside these and counts 0."""
    if instruction.opcode == "dot":
        left = body[instruction.operands[0]].result[0]
        contracted = math.prod(left.dims[d] for d in attribute(instruction, "lhs_contracting_dims"))
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


def _hbm(arrays: tuple[HloArray, ...]) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _traffic(instruction: Instruction, body: dict[str, Instruction], computations: dict) -> float:
    """Bytes that an instruction reads and writes in HBM: its operands and its result.

    Of a stack of layers from which a slice is taken, or into which one is written in place, the slice counts.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode in ("async-start", "send", "recv"):
        return 0.0
    operands = [body[name].result for name in instruction.operands if name in body]
    if opcode == "copy-start":  # the copy, then what it is of
        return float(_hbm(instruction.result[:2]))
    if opcode == "slice-start":  # what it is of, then the slice
        source, part = instruction.result[:2]
        return float(part.bytes * source.in_hbm + _hbm((part,)))
    if opcode in _SLICES:
        (part,) = instruction.result
        return float(part.bytes * operands[0][0].in_hbm + _hbm((part,)))
    if opcode == "dynamic-update-slice":
        (part,) = operands[1]
        return float(part.bytes * instruction.result[0].in_hbm + _hbm((part,)))
    if opcode.removesuffix("-start") in COLLECTIVES:
        kind = opcode.removesuffix("-start")
        takes = tuple(array for each in operands for array in each)
        return _hbm(takes) + _hbm(_given(kind, opcode, instruction.result, len(takes)))
    if opcode == "fusion":
        return _fusion_traffic(instruction, operands, computations)
    return sum(map(_hbm, operands)) + _hbm(instruction.result)


def _fusion_traffic(instruction: Instruction, operands: list, computations: dict) -> float:
    inside = computations[called(instruction)[0]]
    root = next(each for each in inside.values() if each.is_root)
    if '"AsyncCollectiveDone"' in root.attributes:
        return 0.0
    users: dict[str, list[Instruction]] = {}
    for each in inside.values():
        for name in each.operands:
            users.setdefault(name, []).append(each)
    parameters = {
        int(re.match(r"\((\d+)\)", each.attributes)[1]): each
        for each in inside.values()
        if each.opcode == "parameter"
    }
    # Results that are passed on as they came: the buffers of a TPU's collective that goes on beside this.
    made = root.operands if root.opcode == "tuple" else ()
    passed = [name for name in made if inside[name].opcode in _PASSED]

    def read(value: Instruction) -> int | None:
        """Bytes read of a value of which only slices are used; None when all of it is."""
        total = 0
        for user in users.get(value.name, []):
            written = user.opcode == "dynamic-update-slice" and user.operands[0] == value.name
            if user.opcode == "bitcast":
                part = read(user)
            elif user.opcode in _SLICES and user.operands[0] == value.name:
                part = user.result[0].bytes
            elif written or user.name in passed or (user is root and value.name in passed):
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
    result = [
        array.bytes
        for array, name in itertools.zip_longest(instruction.result, made)
        if array.in_hbm and name not in passed
    ]
    # Slices written in place: the fusion's result has the size of the whole.
    for each in inside.values():
        if each.opcode == "dynamic-update-slice" and each.result[0].bytes in result:
            result.remove(each.result[0].bytes)
            total += inside[each.operands[1]].result[0].bytes
    return total + sum(result)


def _given(kind: str, opcode: str, result: tuple[HloArray, ...], taken: int) -> tuple[HloArray, ...]:
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
    """Partition that talk to each other, int `[groups, size]`, from a collective's attributes.

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
