"""From a compiled step to a report: memory by what holds it, work, traffic, and the speed at best."""

import re
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dynfocus_jax import trees
from dynfocus_jax.config import RunError
from dynfocus_jax.planning.flops import count_flops
from dynfocus_jax.planning.hlo import Collective, Program, read_program
from dynfocus_jax.planning.machines import Machine
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
    """Compiles for the machine; a TPU's compiler refuses what does not fit and says how much it needs."""
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
    """Compiles a step and reports on it, as plain dicts, lists, strings and numbers (for json)."""
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
        "gathered_stacks": _gathered_stacks(step, program.collectives),
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


def _gathered_stacks(step: Step, collectives: list[Collective]) -> list[str]:
    """Stacked parameters that some all-gather makes whole on a device, all layers at once: should be none.

    Known by their dimensions, in any order: those of the same shape are all named.
    """

    def key(dims: tuple[int, ...]) -> list[int]:
        return sorted(d for d in dims if d > 1)

    made = [key(array.dims) for each in collectives if each.kind == "all-gather" for array in each.gives]
    return sorted(
        path
        for name, tree in step.held.items()
        if name.endswith("parameters")
        for path, leaf in trees.flatten(tree).items()
        if "/blocks/" in path
        and leaf.shape[0] > 1
        and leaf.sharding.shard_shape(leaf.shape) != leaf.shape
        and key(leaf.shape) in made
    )


def format_step(report: dict, is_gpu: bool = False) -> str:
    """The report as a table."""
    gib = 2**30
    lines = [f"{report['step']} ({report['where']}): {report['rows']} rows, {report['tokens']} tokens a step"]

    def row(name, value):
        lines.append(f"  {name:<28}{value}")

    for name, size in report["memory"].items():
        row(name, f"{size / gib:9.3f} GiB")
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    row("total", f"{report['total'] / gib:9.3f} GiB of {report['usable'] / gib:.2f} usable: {verdict}")
    if "flops" not in report:
        return "\n".join(lines)
    if is_gpu and report["fits"] and report["memory_fraction"] > 0.75:
        row("", "with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: JAX takes 0.75 of a GPU unless told")
    row(
        "matrix products",
        f"{report['flops'] / 1e12:9.3f} TFLOP ({report['model_flops'] / 1e12:.3f} without remat)",
    )
    row("memory traffic", f"{report['hbm_bytes'] / gib:9.3f} GiB")
    row("over the links", f"{report['link_bytes'] / gib:9.3f} GiB")
    if report["network_bytes"]:
        row("  of it between hosts", f"{report['network_bytes'] / gib:9.3f} GiB")
    for kind, entry in sorted(report["collectives"].items()):
        row(f"  {kind}", f"{entry['bytes'] / gib:9.3f} GiB in {entry['count']}")
    for entry in report["largest_gathers"][:1]:
        row("largest all-gather", f"{entry['bytes'] / gib:9.3f} GiB, {entry['shape']}")
    if report["gathered_stacks"]:
        row("gathered as a whole", ", ".join(report["gathered_stacks"]))
    times = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in report["seconds"].items())
    row("roofline", f"{1e3 * report['roofline_seconds']:9.1f} ms, bound by {report['bound']} ({times})")
    row(
        "at best", f"{100 * report['mfu_bound']:9.1f} % MFU, {report['tokens_per_second_bound']:.0f} tokens/s"
    )
    return "\n".join(lines)


def misfit(report: dict) -> str:
    """The sentence on a step that does not fit: its largest part and what to change."""
    size = report["memory"][report["largest"]] / 2**30
    return (
        f"the {report['step']} step of {report['where']} needs {report['total'] / 2**30:.2f} GiB a device, "
        f"but {report['usable'] / 2**30:.2f} are usable; the largest part is {report['largest']}, "
        f"{size:.2f} GiB. Change {report['remedy']}."
    )
