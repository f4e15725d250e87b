"""Report on a planned step: memory by what it holds, work, traffic, and the best-case time."""

import itertools
import math
import re
from collections import Counter
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dynfocus_jax import trees
from dynfocus_jax.errors import RunError
from dynfocus_jax.planning.flops import count_flops
from dynfocus_jax.planning.machines import Machine
from dynfocus_jax.planning.planned_steps import PlannedStep
from dynfocus_jax.planning.program_work import Collective, ProgramWork, analyze_program

# The fields that reduce each part of the memory; STEP stands for the section of the step.
_MORE_SHARDS = "config.mesh.fsdp and config.mesh.tensor (more shards)"
_TRAIN_LESS = (
    f"{_MORE_SHARDS}, STEP.trainable (fewer parameters), config.model.language.lora.rank (LoRA instead of "
    "all weights), or use more devices"
)
_SMALLER_STEP = {
    "train": "STEP.microbatches (more), STEP.loss_chunk (a few hundred), config.model.language.remat "
    "('full'), config.mesh.context (shards of the sequence), STEP.batch_size, STEP.num_frames, STEP.max_text",
    "prefill": "STEP.batch_size, STEP.media_frames, STEP.max_text, config.mesh.tensor",
    "decode": "STEP.batch_size, config.mesh.tensor",
}
_REMEDIES: dict[str, str | dict[str, str]] = {
    "trained parameters": _TRAIN_LESS,
    "optimizer": _TRAIN_LESS,
    "frozen parameters": f"{_MORE_SHARDS}, config.model.dtype",
    "parameters": f"{_MORE_SHARDS}, config.model.param_dtype",
    "batch": "STEP.batch_size",
    "key-value cache": "STEP.batch_size, STEP.media_frames, STEP.max_text, STEP.max_new_tokens",
    "activations and temporaries": _SMALLER_STEP,
    "outputs": _SMALLER_STEP,
    "program": _SMALLER_STEP,
    "layout padding": _SMALLER_STEP,
}

# XLA compares its own kernels for matrix products with cuBLAS by timing them, which needs the GPU. There it
# nearly always chooses cuBLAS.
_OPTIONS = {"cuda": {"xla_gpu_enable_triton_gemm": False}, "tpu": {}}


class CompiledStep(NamedTuple):
    """Memory of a compiled step, bytes per device, and its work."""

    arguments: int
    outputs: int  # without results that reuse the memory of arguments
    temporaries: int
    code: int
    work: ProgramWork | None  # None if the compiler rejects the step because it does not fit


def compile_step(step: PlannedStep, machine: Machine) -> CompiledStep:
    """Compile a step for a machine.

    A TPU's compiler rejects a step that does not fit; its message names the memory that the step needs.

    Raises:
      RunError: the step does not compile for another reason.
    """
    jitted: Any = step.function
    try:
        compiled = jitted.lower(*step.arguments).compile(compiler_options=_OPTIONS[machine.platform])
    except jax.errors.JaxRuntimeError as error:
        return _rejected_step(step, str(error))
    memory = compiled.memory_analysis()
    return CompiledStep(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        work=analyze_program(compiled.as_text()),
    )


def _rejected_step(step: PlannedStep, message: str) -> CompiledStep:
    """Return the memory that a step needs, as the compiler's message names it.

    Raises:
      RunError: the message is about another error.
    """
    # Both forms of the message name the whole memory of the program, including its arguments.
    used = re.search(r"(?:Used |total memory required [\w ]*\()([\d.]+)([KMGT])", message)
    if not used:
        text = " ".join(message.split())
        raise RunError(f"the {step.name} step of {step.where} does not compile: {text[:300]}.")
    total = int(float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[used[2]])
    arguments = sum(map(device_bytes, step.held.values()))
    return CompiledStep(arguments, 0, max(total - arguments, 0), 0, None)


def device_bytes(tree: Any) -> int:
    """Return the bytes of a tree of abstract arrays on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def report_step(step: PlannedStep, machine: Machine, mesh: Mesh) -> dict[str, Any]:
    """Compile a step, and return a report on it that can be written as JSON.

    All figures are for one device, bytes and seconds, unless the key says otherwise.

    Returns:
      A dict with these keys:
        step, where, rows, tokens: as in `PlannedStep`.
        memory: {part: bytes}; total: their sum; usable: memory that programs can use; fits.
        memory_fraction: the total as a share of all memory.
        largest, remedy: the largest part, and the fields that reduce it.
        parameters: `parameters_by_part`.
      If the step compiles, also:
        flops: FLOPs of matrix products; model_flops: those without recomputation.
        hbm_bytes: bytes read and written in HBM.
        link_bytes, network_bytes: bytes sent over links, and the part of them sent to other hosts.
        collectives: {kind: {"count", "bytes"}}, with runs per step and bytes sent.
        largest_gathers: the all-gathers with the largest results.
        gathered_stacks: `gathered_stacks`.
        seconds: best-case time of arithmetic, memory and links; bound: the slowest of them.
        roofline_seconds: time of the slowest.
        mfu_bound, tokens_per_second_bound: MFU of the model's own FLOPs, and tokens/s on all devices, in that
          time.
    """
    compiled = compile_step(step, machine)
    memory = _memory_by_part(step, compiled)
    total = sum(memory.values())
    largest = max(memory, key=lambda part: memory[part])
    report = {
        "step": step.name,
        "where": step.where,
        "rows": step.rows,
        "tokens": step.tokens,
        "memory": memory,
        "total": total,
        "usable": machine.usable_memory,
        "fits": compiled.work is not None and total <= machine.usable_memory,
        "memory_fraction": total / machine.chip.memory,
        "largest": largest,
        "remedy": _remedy(largest, step),
        "parameters": parameters_by_part(step),
    }
    if compiled.work is None:
        return report
    return report | _report_work(step, compiled.work, machine, mesh)


def _memory_by_part(step: PlannedStep, compiled: CompiledStep) -> dict[str, int]:
    held = {name: device_bytes(tree) for name, tree in step.held.items()}
    parts = {
        **held,
        "layout padding": compiled.arguments - sum(held.values()),
        "outputs": compiled.outputs,
        "activations and temporaries": compiled.temporaries,
        "program": compiled.code,
    }
    return {name: size for name, size in parts.items() if size > 0 or name in held}


def parameters_by_part(step: PlannedStep) -> dict[str, dict[str, int]]:
    """Return the numbers of parameters by part of the model.

    Returns:
      {"optimized": {part: number}, "frozen": {part: number}}: those with and without moments in the
      optimizer state.
    """
    held = {}
    for name, tree in step.held.items():
        if name.endswith("parameters"):
            held |= trees.flatten(tree)
    moments = {
        "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        for path, _ in jax.tree_util.tree_leaves_with_path(step.held.get("optimizer"))
    }
    counts = {"optimized": Counter(), "frozen": Counter()}
    for path, leaf in held.items():
        counts["optimized" if path in moments else "frozen"][path.split("/")[0]] += leaf.size
    return {name: dict(sorted(each.items())) for name, each in counts.items()}


def _remedy(largest: str, step: PlannedStep) -> str:
    """Return the fields that reduce the largest part of the memory."""
    remedy = _REMEDIES[largest]
    return (remedy if isinstance(remedy, str) else remedy[step.name]).replace("STEP", step.where)


# --- Work ---------------------------------------------------------------------------------------------


def _report_work(step: PlannedStep, work: ProgramWork, machine: Machine, mesh: Mesh) -> dict[str, Any]:
    """Return the part of the report on work, traffic and the best-case time."""
    chip, num_devices = machine.chip, mesh.devices.size
    jitted: Any = step.without_recomputation
    model_flops = count_flops(jitted.trace(*step.arguments).jaxpr.jaxpr) / num_devices
    # A compiler may write matrix products in an unknown form; the best-case time must still include them.
    flops = max(work.flops, model_flops)
    hosts = np.array([device.process_index for device in mesh.devices.flat])
    link_bytes, network_bytes = 0.0, 0.0
    kinds: dict[str, dict[str, float]] = {}
    for each in work.collectives:
        entry = kinds.setdefault(each.kind, {"count": 0, "bytes": 0.0})
        entry["count"] += each.count
        entry["bytes"] += each.sent
        link_bytes += each.sent
        network_bytes += _sent_to_other_hosts(each, hosts) if chip.network else 0.0
    seconds = {
        "arithmetic": flops / chip.flops,
        "memory": work.hbm_bytes / chip.bandwidth,
        "links": link_bytes / machine.link_bandwidth()
        + (network_bytes / chip.network if chip.network else 0.0),
    }
    bottleneck = max(seconds, key=lambda name: seconds[name])
    time = seconds[bottleneck]
    return {
        "flops": flops,
        "model_flops": model_flops,
        "hbm_bytes": work.hbm_bytes,
        "link_bytes": link_bytes,
        "network_bytes": network_bytes,
        "collectives": kinds,
        "largest_gathers": _largest_gathers(work.collectives),
        "gathered_stacks": gathered_stacks(step, work.collectives),
        "seconds": seconds,
        "bound": bottleneck,
        "roofline_seconds": time,
        "mfu_bound": model_flops / chip.flops / time,
        "tokens_per_second_bound": step.tokens / time,
    }


def _sent_to_other_hosts(collective: Collective, hosts: np.ndarray) -> float:
    """Return the bytes that a device sends to other hosts.

    A ring passes once through every host, and the host's network adapters share the traffic.

    hosts: int [devices], the host of each device.
    """
    members = hosts[collective.groups[0]]
    num_hosts = len(np.unique(members))
    return collective.sent * num_hosts / len(members) if num_hosts > 1 else 0.0


def _largest_gathers(collectives: list[Collective], count: int = 5) -> list[dict[str, Any]]:
    """Return the all-gathers with the largest results, which a device holds at once."""
    found = {}
    for each in collectives:
        if each.kind == "all-gather":
            array = max(each.outputs, key=lambda array: array.bytes)
            key = f"{array.dtype}{list(array.dims)}"
            entry = found.setdefault(key, {"shape": key, "bytes": array.bytes, "count": 0})
            entry["count"] += each.count
    return sorted(found.values(), key=lambda entry: -entry["bytes"])[:count]


def gathered_stacks(step: PlannedStep, collectives: list[Collective]) -> list[str]:
    """Return the stacked parameters of which an all-gather gives a device all layers at once; should be none.

    An all-gather is recognised by its input, a device's shard of the stack (or more, if two axes of the mesh
    split the parameter and one has been gathered before), and by the size of its output. One layer's shard
    of a kernel may have the dimensions of a stack of smaller ones; an all-gather that runs once per layer is
    taken for such a shard.
    """
    stacks = {
        path: (leaf.sharding.shard_shape(leaf.shape), leaf.shape)
        for name, tree in step.held.items()
        if name.endswith("parameters")
        for path, leaf in trees.flatten(tree).items()
        if "/blocks/" in path and leaf.shape[0] > 1
    }
    depths: dict[tuple[int, ...], set[int]] = {}  # dimensions of one layer -> depths of stacks of such layers
    for shard, shape in stacks.values():
        for dims in _partly_gathered(shard[1:], shape[1:]):
            depths.setdefault(dims, set()).add(shape[0])
    gathers = {
        (_sorted_dims(taken.dims), given.size)
        for each in collectives
        if each.kind == "all-gather"
        for taken, given in zip(each.inputs, each.outputs, strict=False)
        if all(each.count % depth for depth in depths.get(_sorted_dims(taken.dims), ()))
    }

    def is_gathered(shard: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        forms = _partly_gathered(shard, shape)
        sizes = {math.prod(dims) for dims in forms}
        return any(taken in forms and given in sizes for taken, given in gathers)

    return sorted(path for path, (shard, shape) in stacks.items() if is_gathered(shard, shape))


def _partly_gathered(shard: tuple[int, ...], shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Return the sorted dimensions of an array with none, some or all of its split axes gathered."""
    return {_sorted_dims(dims) for dims in itertools.product(*zip(shard, shape, strict=True))}


def _sorted_dims(dims: tuple[int, ...]) -> tuple[int, ...]:
    """Return the dimensions without those of size 1, in ascending order: compilers transpose arrays."""
    return tuple(sorted(d for d in dims if d > 1))
