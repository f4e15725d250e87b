"""Plan a configuration for a machine that is not available: memory, FLOPs, traffic and best-case time.

    python -m dynfocus_jax.plan --config configs/instruct_7b.py --machine a100-80gb:8
    python -m dynfocus_jax.plan --config configs/instruct_7b.py:train=lora --machine h200:1 --steps train
    python -m dynfocus_jax.plan --config configs/align_7b.py --machine v5p:2x2x4 --config.mesh.tensor=2 --json

The command compiles the train step of every stage, prefill and the decode step for that machine. It runs on
any CPU and takes minutes. Install the compilers with `pip install -r requirements-plan.txt`.
Machines, NAME:SHAPE:

    a100-40gb:8  a100-80gb:8  h100:8  h200:8     GPUs of one host; for several hosts, hosts x GPUs: h100:4x8
    v4:2x2x2  v5p:2x2x4  v5e:4x8  v6e:8x8        TPU slices: sides in chips; each host has 2x2 chips

All figures are per device and step. Temporaries include gradients. FLOPs count matrix products only. The
best-case time assumes that arithmetic, memory traffic and communication all run at peak rate and overlap
fully, so it is the time of the slowest of the three. The best-case MFU divides the model's own FLOPs, without
recomputation (remat), by what the chip can do in bfloat16 in that time.

Set any field with --config.FIELD=VALUE, for example --config.mesh.data=1 --config.mesh.fsdp=-1.
The exit code is 1 if a step does not fit in memory; the error names the largest part and fields to change.
"""

import json
import time
from pathlib import Path

from absl import flags

from dynfocus_jax.planning.plugin_messages import suppress_plugin_messages

with suppress_plugin_messages():
    import jax

from dynfocus_jax.command import CONFIG_FLAG, run_command
from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.parallel.sharding import num_row_shards
from dynfocus_jax.planning.machines import compile_only_devices, parse_machine
from dynfocus_jax.planning.planned_steps import planned_serving_steps, planned_train_step
from dynfocus_jax.planning.report_table import describe_misfit, format_report
from dynfocus_jax.planning.step_report import report_step
from dynfocus_jax.validation import validate

STEPS = ("train", "prefill", "decode")

_MACHINE = flags.DEFINE_string("machine", None, "Machine to plan for, NAME:SHAPE (see above).")
_STEPS = flags.DEFINE_list("steps", list(STEPS), "Steps to plan, separated by commas.")
_JSON = flags.DEFINE_boolean("json", False, "Print one JSON object instead of tables.")
_OUTPUT = flags.DEFINE_string("output", None, "File to write the JSON object to, with or without --json.")


def main() -> None:
    if CONFIG_FLAG.value is None or _MACHINE.value is None:
        missing = "--config" if CONFIG_FLAG.value is None else "--machine"
        raise UserError(f"{missing} is missing; try --config configs/instruct_7b.py --machine a100-80gb:8.")
    unknown = [name for name in _STEPS.value if name not in STEPS]
    if unknown:
        raise UserError(f"--steps: unknown step {unknown[0]!r}, expected any of {', '.join(STEPS)}.")
    output = None if _OUTPUT.value is None else Path(_OUTPUT.value).expanduser()
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output: the folder of {_OUTPUT.value!r} does not exist; create it first.")

    # --- Machine --------------------------------------------------------------------------------------
    jax.config.update("jax_platforms", "cpu")  # local accelerators are not used
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot load programs for other machines
    machine = parse_machine(_MACHINE.value)
    devices = compile_only_devices(machine)
    mesh = make_mesh(mesh_shape(CONFIG_FLAG.value.mesh, machine.num_devices), devices)

    # --- Configuration --------------------------------------------------------------------------------
    config = CONFIG_FLAG.value.copy_and_resolve_references()
    config.initial = None  # planning reads neither weights nor data
    config.data.root = "."
    validate(config, num_row_shards(mesh))

    # --- Steps ----------------------------------------------------------------------------------------
    steps = []
    if "train" in _STEPS.value:
        steps += [planned_train_step(config, index, mesh) for index in range(len(config.stages))]
    if {"prefill", "decode"} & set(_STEPS.value):
        steps += [step for step in planned_serving_steps(config, mesh) if step.name in _STEPS.value]
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    if not _JSON.value:
        print(f"{machine.name}: {machine.num_devices} devices, mesh {shape}; figures per device and step")
    reports = []
    for step in steps:
        started = time.perf_counter()
        report = report_step(step, machine, mesh)
        reports.append(report | {"compile_seconds": time.perf_counter() - started})
        if not _JSON.value:
            print(format_report(report, not machine.is_tpu), flush=True)
    about = {"machine": machine.name, "devices": machine.num_devices, "mesh": dict(mesh.shape)}
    text = json.dumps(about | {"jax": jax.__version__, "steps": reports}, indent=2)
    if _JSON.value:
        print(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    misfits = [describe_misfit(report) for report in reports if not report["fits"]]
    if misfits:
        raise RunError("\n".join(misfits))


if __name__ == "__main__":
    run_command(main)
