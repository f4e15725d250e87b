"""From a compiled step to a report: memory by what holds it, work, traffic, and the speed at best."""

import itertools
import math
import re
from collections import Counter
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dynfocus_jax import trees
from dynfocus_jax.errors import RunError
from dynfocus_jax.planning.flops import count_flops
from dynfocus_jax.planning.machines import Machine
from dynfocus_jax.planning.program import Collective, Program, read_program
from dynfocus_jax.planning.steps import Step

# For each part of the memory, the fields that make it smaller; STEP is the section of the step.
_REMEDIES = {
    "trained parameters": "config.mesh.fsdp and config.mesh.tensor (more shares), STEP.trainable (fewer), "
    "config.model.language.lora.rank (LoRA instead of all weights), or take more devices",
    "optimizer": "config.mesh.fsdp and config.mesh.tensor (more shares), STEP.trainable (fewer), "
    "config.model.language.lora.rank (LoRA instead of all weights), or take more devices",
    "frozen parameters": "config.mesh.fsdp and config.mesh.tensor (more shares), config.model.dtype",
    "parameters": "config.mesh.fsdp and config.mesh.tensor (more shares), config.model.param_dtype",
    "batch": "STEP.batch_size",
    "key-value cache": "STEP.batch_size, STEP.media_frames, STEP.max_text, STEP.max_new_tokens",
    "activations and temporaries": {
        "train": "STEP.microbatches (more), STEP.loss_chunk (a few hundred), config.model.language.remat "
        "('full'), config.mesh.context (the sequence in shares), STEP.batch_size, STEP.num_frames, "
        "STEP.max_text",
        "prefill": "STEP.batch_size, STEP.media_frames, STEP.max_text, config.mesh.tensor",
        "decode": "STEP.batch_size, config.mesh.tensor",
    },
}
_REMEDIES["outputs"] = _REMEDIES["program"] = _REMEDIES["layout padding"] = _REMEDIES[
    "activations and temporaries"
]

# XLA's programs for matrix products that it cannot time here: cuBLAS, which it nearly always takes there.
_OPTIONS = {"cuda": {"xla_gpu_enable_triton_gemm": False}, "tpu": {}}


class Compiled(NamedTuple):
    """Bytes a device: arguments, results that do not reuse them, temporaries, code; the program's work.

    program: None where the compiler gave up because it does not fit.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    program: Program | None


def compile_step(step: Step, machine: Machine) -> Compiled:
    """Compile for the machine; a TPU's compiler refuses what does not fit and says how much it needs."""
    try:
        compiled = step.function.lower(*step.arguments).compile(compiler_options=_OPTIONS[machine.platform])
    except jax.errors.JaxRuntimeError as error:
        return _refused(step, str(error))
    memory = compiled.memory_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        read_program(compiled.as_text()),
    )


def _refused(step: Step, message: str) -> Compiled:
    # Both wordings of the compiler give all that the program needs, its arguments included.
    used = re.search(r"(?:Used |total memory required [\w ]*\()([\d.]+)([KMGT])", message)
    if not used:
        text = " ".join(message.split())
        raise RunError(f"the {step.name} step of {step.where} does not compile: {text[:300]}.")
    total = int(float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[used[2]])
    arguments = sum(map(device_bytes, step.held.values()))
    return Compiled(arguments, 0, max(total - arguments, 0), 0, None)


def device_bytes(tree) -> int:
    """Bytes of a tree of abstract arrays on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def plan_step(step: Step, machine: Machine, mesh: Mesh) -> dict:
    """Compile a step and reports on it, as plain dicts, lists, strings and numbers (for json)."""
    compiled = compile_step(step, machine)
    memory = _memory(step, compiled)
    total = sum(memory.values())
    largest = max(memory, key=memory.get)
    report = {
        "step": step.name,
        "where": step.where,
        "rows": step.rows,
        "tokens": step.tokens,
        "memory": memory,
        "total": total,
        "usable": machine.usable_memory,
        "fits": compiled.program is not None and total <= machine.usable_memory,
        "memory_fraction": total / machine.chip.memory,
        "largest": largest,
        "remedy": _remedy(largest, step),
        "parameters": parameters_by_part(step),
    }
    if compiled.program is None:
        return report
    return report | _work(step, compiled.program, machine, mesh)


def _memory(step: Step, compiled: Compiled) -> dict[str, int]:
    held = {name: device_bytes(tree) for name, tree in step.held.items()}
    parts = {
        **held,
        "layout padding": compiled.arguments - sum(held.values()),
        "outputs": compiled.outputs,
        "activations and temporaries": compiled.temporaries,
        "program": compiled.code,
    }
    return {name: size for name, size in parts.items() if size > 0 or name in held}


def parameters_by_part(step: Step) -> dict[str, dict[str, int]]:
    """Numbers of parameters by part of the model: with moments in the optimizer's state, and without."""
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


def _remedy(largest: str, step: Step) -> str:
    remedy = _REMEDIES[largest]
    return (remedy if isinstance(remedy, str) else remedy[step.name]).replace("STEP", step.where)


def _work(step: Step, program: Program, machine: Machine, mesh: Mesh) -> dict:
    """FLOPs, traffic, and the time that the slowest of arithmetic, memory and links takes at its peak."""
    chip, devices = machine.chip, mesh.devices.size
    model_flops = count_flops(step.plain.trace(*step.arguments).jaxpr.jaxpr) / devices
    # Products that a compiler writes in a form unknown here must not make the bound too fast.
    flops = max(program.flops, model_flops)
    hosts = np.array([device.process_index for device in mesh.devices.flat])
    near, far = 0.0, 0.0  # bytes a device sends over links and over the network between hosts
    kinds: dict[str, dict] = {}
    for each in program.collectives:
        entry = kinds.setdefault(each.kind, {"count": 0, "bytes": 0.0})
        entry["count"] += each.count
        entry["bytes"] += each.sent
        near += each.sent
        far += _over_network(each, hosts) if chip.network else 0.0
    seconds = {
        "arithmetic": flops / chip.flops,
        "memory": program.hbm_bytes / chip.bandwidth,
        "links": near / machine.link_bandwidth() + (far / chip.network if chip.network else 0.0),
    }
    bound = max(seconds, key=seconds.get)
    time = seconds[bound]
    return {
        "flops": flops,
        "model_flops": model_flops,
        "hbm_bytes": program.hbm_bytes,
        "link_bytes": near,
        "network_bytes": far,
        "collectives": kinds,
        "largest_gathers": _largest_gathers(program.collectives),
        "gathered_stacks": gathered_stacks(step, program.collectives),
        "seconds": seconds,
        "bound": bound,
        "roofline_seconds": time,
        "mfu_bound": model_flops / chip.flops / time,
        "tokens_per_second_bound": step.tokens / time,
    }


def _over_network(collective: Collective, hosts: np.ndarray) -> float:
    """Bytes a device sends to other hosts: rings run through every host once, its adapters share them."""
    members = hosts[collective.groups[0]]
    away = len(np.unique(members))
    return collective.sent * away / len(members) if away > 1 else 0.0


def _largest_gathers(collectives: list[Collective], count: int = 5) -> list[dict]:
    """The all-gathers with the largest results, which is what a device must hold at once."""
    found = {}
    for each in collectives:
        if each.kind == "all-gather":
            array = max(each.gives, key=lambda array: array.bytes)
            key = f"{array.dtype}{list(array.dims)}"
            entry = found.setdefault(key, {"shape": key, "bytes": array.bytes, "count": 0})
            entry["count"] += each.count
    return sorted(found.values(), key=lambda entry: -entry["bytes"])[:count]


def gathered_stacks(step: Step, collectives: list[Collective]) -> list[str]:
    """Stacked parameters of which some all-gather holds all layers at once on a device: should be none.

    Known by what it takes, which is a device's share (or more, where two axes of the mesh split a parameter
    and one has been gathered), and by the size of what it gives. One layer's share of a kernel may have the
    dimensions of a stack of smaller ones; what every turn of a loop over the layers gathers is such a share.
    """
    stacks = {
        path: (leaf.sharding.shard_shape(leaf.shape), leaf.shape)
        for name, tree in step.held.items()
        if name.endswith("parameters")
        for path, leaf in trees.flatten(tree).items()
        if "/blocks/" in path and leaf.shape[0] > 1
    }
    turns: dict[tuple, set[int]] = {}
    for part, shape in stacks.values():
        for dims in _between(part[1:], shape[1:]):
            turns.setdefault(dims, set()).add(shape[0])
    gathers = {
        (_key(taken.dims), given.size)
        for each in collectives
        if each.kind == "all-gather"
        for taken, given in zip(each.takes, each.gives, strict=False)
        if all(each.count % depth for depth in turns.get(_key(taken.dims), ()))
    }

    def whole(part, shape) -> bool:
        forms = _between(part, shape)
        sizes = {math.prod(dims) for dims in forms}
        return any(taken in forms and given in sizes for taken, given in gathers)

    return sorted(path for path, (part, shape) in stacks.items() if whole(part, shape))


def _between(part: tuple[int, ...], shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The dimensions, in one order, of an array of which none, some or all of the split axes are whole."""
    return {_key(dims) for dims in itertools.product(*zip(part, shape, strict=True))}


def _key(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(d for d in dims if d > 1))
