"""Work of a compiled program: FLOPs, memory traffic and collectives of one device in one step.

XLA's own cost analysis counts the body of a loop once, and does not exist for GPUs. Here a body counts once
per iteration, because the loop over the stacked layers does nearly all of a model's work.
"""

import itertools
import math
import re
from typing import NamedTuple

import numpy as np

from dynfocus_jax.planning.hlo import (
    Computations,
    HloArray,
    Instruction,
    called_computations,
    dimension_list,
    find_required,
    iterate_runs,
    parse_hlo,
)

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Instructions without memory traffic: they name parts of buffers, or end an operation counted at its start.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"),
    *("while", "conditional", "call", "optimization-barrier", "replica-id", "async-update", "async-done"),
    *("copy-done", "slice-done", "send-done", "recv-done", "domain", "add-dependency"),
    *(f"{kind}-done" for kind in COLLECTIVES),
}
_SLICES = ("slice", "dynamic-slice", "gather")
_PASSED_ON = ("parameter", *COLLECTIVES)


class Collective(NamedTuple):
    """A collective of a compiled program."""

    kind: str  # one of `COLLECTIVES`
    outputs: tuple[HloArray, ...]  # on one device
    inputs: tuple[HloArray, ...]  # on one device
    groups: np.ndarray  # int [groups, size]: devices that communicate with each other
    count: int  # runs per step
    op_name: str  # the traced operation that it comes from

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all runs of a step, with the ring algorithm."""
        size = self.groups.shape[1]
        whole = max(sum(a.bytes for a in self.outputs), sum(a.bytes for a in self.inputs))
        if self.kind == "collective-permute":
            return float(whole * self.count)
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * whole * (size - 1) / size * self.count


class ProgramWork(NamedTuple):
    """Work of one device in one step."""

    flops: float  # of matrix products
    hbm_bytes: float  # read and written
    collectives: list[Collective]


def analyze_program(text: str) -> ProgramWork:
    """Return the work of one device in one step, from the text of `compiled.as_text()`."""
    computations, entry = parse_hlo(text)
    partitions = re.search(r"num_partitions=(\d+)", text)
    num_devices = int(partitions[1]) if partitions else 1
    flops, hbm_bytes, collectives = 0.0, 0.0, {}
    for name, count, fused in iterate_runs(computations, entry):
        computation = computations[name]
        for instruction in computation.values():
            flops += count * _flops(instruction, computation)
            if not fused:
                hbm_bytes += count * _traffic(instruction, computation, computations)
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            # On TPUs an asynchronous collective appears in the fusion that starts it, in the one that waits
            # for it, and in every fusion that runs in between, also in the body of a loop. All have the same
            # channel; the smallest count is the number of its runs.
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            key = channel[0] if fused and channel else len(collectives)
            if key not in collectives or count < collectives[key].count:
                collectives[key] = _collective(kind, instruction, name, computation, count, num_devices)
    return ProgramWork(flops, hbm_bytes, list(collectives.values()))


# --- FLOPs --------------------------------------------------------------------------------------------


def _flops(instruction: Instruction, computation: dict[str, Instruction]) -> float:
    """Return the FLOPs of a matrix product, 2 per multiply-add; 0 for all else, which is cheap beside it."""
    if instruction.opcode == "dot":
        left = computation[instruction.operands[0]].result[0]
        contracted = math.prod(left.dims[d] for d in dimension_list(instruction, "lhs_contracting_dims"))
        return 2.0 * instruction.result[0].size * contracted
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.opcode == "custom-call" and 'custom_call_target="__cublas' in instruction.attributes:
        left = computation[instruction.operands[0]].result[0]
        listed = find_required(r'"lhs_contracting_dimensions":\[([\d",]*)\]', instruction.attributes)[1]
        contracted = math.prod(left.dims[int(d)] for d in re.findall(r"\d+", listed))
        return 2.0 * instruction.result[0].size * contracted
    return 0.0


def _convolution_flops(instruction: Instruction, computation: dict[str, Instruction]) -> float:
    """Return the FLOPs of a convolution.

    TPUs express matrix products as convolutions, with batch dimensions as dilated windows of one element.
    """
    left, right = (computation[name].result[0] for name in instruction.operands[:2])
    labels = find_required(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    described = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", described[1])) if described else {}
    spatial = sorted(label for label in labels[1] if label.isdigit())
    valid = 1  # pairs of an output position and a window position that meet an element of the input
    for axis, label in enumerate(spatial):

        def entry(key: str, default: str, axis: int = axis) -> str:
            return window[key].split("x")[axis] if key in window else default

        size, stride = int(entry("size", "1")), int(entry("stride", "1"))
        lhs_dilate, rhs_dilate = int(entry("lhs_dilate", "1")), int(entry("rhs_dilate", "1"))
        low = int(entry("pad", "0_0").split("_")[0])
        outputs = instruction.result[0].dims[labels[3].index(label)]
        inputs = left.dims[labels[1].index(label)]
        positions = np.arange(outputs)[:, None] * stride - low + np.arange(size) * rhs_dilate
        inside = (positions >= 0) & (positions <= (inputs - 1) * lhs_dilate) & (positions % lhs_dilate == 0)
        valid *= int(inside.sum())
    features = right.dims[labels[2].index("i")] * right.dims[labels[2].index("o")]
    batch = left.dims[labels[1].index("b")]
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return 2.0 * valid * features * batch / (int(groups[1]) if groups else 1)


# --- Memory traffic -----------------------------------------------------------------------------------


def _bytes_in_hbm(arrays: tuple[HloArray, ...]) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _traffic(
    instruction: Instruction, computation: dict[str, Instruction], computations: Computations
) -> float:
    """Return the bytes that an instruction reads and writes in HBM: its operands and its result.

    If it takes a slice of a stack of layers, or writes one in place, only the slice counts.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode in ("async-start", "send", "recv"):
        return 0.0
    operands = [computation[name].result for name in instruction.operands if name in computation]
    if opcode == "copy-start":  # the result is (copy, source, ...)
        return float(_bytes_in_hbm(instruction.result[:2]))
    if opcode == "slice-start":  # the result is (source, slice, ...)
        source, part = instruction.result[:2]
        return float(part.bytes * source.in_hbm + _bytes_in_hbm((part,)))
    if opcode in _SLICES:
        (part,) = instruction.result
        return float(part.bytes * operands[0][0].in_hbm + _bytes_in_hbm((part,)))
    if opcode == "dynamic-update-slice":
        (part,) = operands[1]
        return float(part.bytes * instruction.result[0].in_hbm + _bytes_in_hbm((part,)))
    if opcode.removesuffix("-start") in COLLECTIVES:
        kind = opcode.removesuffix("-start")
        inputs = tuple(array for each in operands for array in each)
        return _bytes_in_hbm(inputs) + _bytes_in_hbm(_outputs(kind, opcode, instruction.result, len(inputs)))
    if opcode == "fusion":
        return _fusion_traffic(instruction, operands, computations)
    return sum(map(_bytes_in_hbm, operands)) + _bytes_in_hbm(instruction.result)


def _fusion_traffic(
    instruction: Instruction, operands: list[tuple[HloArray, ...]], computations: Computations
) -> float:
    """Return the bytes that a fusion reads and writes in HBM; intermediate results do not count."""
    inside = computations[called_computations(instruction)[0]]
    root = next(each for each in inside.values() if each.is_root)
    if '"AsyncCollectiveDone"' in root.attributes:
        return 0.0
    parameters = {
        int(find_required(r"^\((\d+)\)", each.attributes)[1]): each
        for each in inside.values()
        if each.opcode == "parameter"
    }
    users: dict[str, list[Instruction]] = {}
    for each in inside.values():
        for name in each.operands:
            users.setdefault(name, []).append(each)
    # Results that are passed on unchanged: buffers of a TPU's collective that continues during the fusion.
    results = root.operands if root.opcode == "tuple" else ()
    passed_on = {name for name in results if inside[name].opcode in _PASSED_ON}
    total = 0.0
    for number, arrays in enumerate(operands):
        whole = _bytes_in_hbm(arrays)
        sliced = _sliced_bytes(parameters[number], users, root, passed_on) if number in parameters else None
        total += whole if sliced is None else min(sliced, whole)
    written = [
        array.bytes
        for array, name in itertools.zip_longest(instruction.result, results)
        if array.in_hbm and name not in passed_on
    ]
    # For a slice written in place, the result has the size of the whole array.
    for each in inside.values():
        if each.opcode == "dynamic-update-slice" and each.result[0].bytes in written:
            written.remove(each.result[0].bytes)
            total += inside[each.operands[1]].result[0].bytes
    return total + sum(written)


def _sliced_bytes(
    value: Instruction, users: dict[str, list[Instruction]], root: Instruction, passed_on: set[str]
) -> int | None:
    """Return the bytes that a fusion reads of a value if it uses only slices of it; None if it uses all.

    Args:
      value: an instruction of the fusion.
      users: name of an instruction -> instructions that it is an operand of.
      root: the fusion's result.
      passed_on: names of results that are passed on unchanged.
    """
    total = 0
    for user in users.get(value.name, []):
        is_source = user.operands[0] == value.name
        if user.opcode == "bitcast":
            part = _sliced_bytes(user, users, root, passed_on)
        elif user.opcode in _SLICES and is_source:
            part = user.result[0].bytes
        elif (
            (user.opcode == "dynamic-update-slice" and is_source)
            or user.name in passed_on
            or (user is root and value.name in passed_on)
        ):
            part = 0
        else:
            part = None
        if part is None:
            return None
        total += part
    return total


# --- Collectives --------------------------------------------------------------------------------------


def _outputs(kind: str, opcode: str, result: tuple[HloArray, ...], num_inputs: int) -> tuple[HloArray, ...]:
    """Return the outputs of a collective; the result of an asynchronous one lists its inputs first."""
    if opcode.endswith("-start") and kind != "all-reduce" and len(result) > num_inputs:
        return result[num_inputs : 2 * num_inputs]
    return result


def _collective(
    opcode_kind: str,
    instruction: Instruction,
    name: str,
    computation: dict[str, Instruction],
    count: int,
    num_devices: int,
) -> Collective:
    """Return the collective of an instruction in the computation `name`, which runs `count` times."""
    inputs = tuple(array for operand in instruction.operands for array in computation[operand].result)
    outputs = _outputs(opcode_kind, instruction.opcode, instruction.result, len(inputs))
    # A TPU's reduce-scatter is an all-reduce that is fused with the slice taken of its result.
    is_scatter = opcode_kind == "all-reduce" and "all-reduce-scatter" in name
    op_name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(
        kind="reduce-scatter" if is_scatter else opcode_kind,
        outputs=outputs,
        inputs=inputs,
        groups=replica_groups(instruction.attributes, num_devices),
        count=count,
        op_name=op_name[1] if op_name else "",
    )


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """Return the groups of devices in a collective's attributes, int [groups, size].

    Forms: `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, `mesh['a'=4,'b'=2] {'a'}`, and source_target_pairs, which
    give groups of two. Without any, all devices are one group.
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
    """Return the groups along some axes of a mesh, int [groups, size].

    Args:
      axes: all axes of the mesh with their sizes: "'a'=4,'b'=2".
      along: the axes of the collective: "'a'", or a part of one: "'a':(2)2" has size 2 after a factor of 2.
    """
    names, sizes = zip(*((name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)), strict=True)
    dims, chosen = [], []
    parts = {name: (before, size) for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)}
    for name, size in zip(names, sizes, strict=True):
        if name not in parts:
            dims.append(size)
            continue
        before = int(parts[name][0] or 1)
        part = int(parts[name][1] or size)
        chosen.append(len(dims) + 1)
        dims += [before, part, size // before // part]
    ids = np.arange(math.prod(sizes)).reshape(dims)
    group_size = math.prod(dims[axis] for axis in chosen)
    return np.moveaxis(ids, chosen, range(-len(chosen), 0)).reshape(-1, group_size)
