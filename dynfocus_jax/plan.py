"""Plan a configuration for a machine that is not here: memory, FLOPs, traffic and best-case time.

    python -m dynfocus_jax.plan --config configs/instruct_7b.py --machine a100-80gb:8
    python -m dynfocus_jax.plan --config configs/instruct_7b.py:train=lora --machine h200:1 --steps train
    python -m dynfocus_jax.plan --config configs/align_7b.py --machine v5p:2x2x4 --config.mesh.tensor=2 --json

Compiles the train step of every stage, prefill and decode as that machine would run them, on any CPU and in
minutes; the compilers come with `pip install -r requirements-plan.txt`. Machines, NAME:SHAPE:

    a100-40gb:8  a100-80gb:8  h100:8  h200:8     GPUs of one host; of several: hosts x GPUs, h100:4x8
    v4:2x2x2  v5p:2x2x4  v5e:4x8  v6e:8x8        TPU slices by their sides in chips, whole hosts of 2x2

All figures are for one device and one step. Temporaries hold gradients too. FLOPs are those of matrix
products; the MFU bound is what these would reach of the chip's bfloat16 peak without computing anything twice
(remat) if the slowest of arithmetic, memory and links hid all the others.
Any field is set by --config.FIELD=VALUE, for example --config.mesh.data=1 --config.mesh.fsdp=-1.
Exit code 1 when a step does not fit, with what fills the memory and the fields to change.
"""

import json
import time
from pathlib import Path

from absl import flags

from dynfocus_jax.planning.quiet import quiet

with quiet():
    import jax

from dynfocus_jax.command import CONFIG_FLAG, run_command
from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.parallel.sharding import row_shares
from dynfocus_jax.planning.machines import devices, parse_machine
from dynfocus_jax.planning.report_table import format_step, misfit
from dynfocus_jax.planning.step_report import plan_step
from dynfocus_jax.planning.steps import serving_steps, train_step
from dynfocus_jax.validation import validate

STEPS = ("train", "prefill", "decode")

_MACHINE = flags.DEFINE_string("machine", None, "NAME:SHAPE, see above.")
_STEPS = flags.DEFINE_list("steps", list(STEPS), "Which to plan, separated by commas.")
_JSON = flags.DEFINE_boolean("json", False, "Print one json object instead of tables.")
_OUTPUT = flags.DEFINE_string("output", None, "File that receives the json object, whatever is printed.")


def main() -> None:
    if CONFIG_FLAG.value is None or _MACHINE.value is None:
        missing = "--config" if CONFIG_FLAG.value is None else "--machine"
        raise UserError(f"{missing} is missing; try --config configs/instruct_7b.py --machine a100-80gb:8.")
    unknown = [name for name in _STEPS.value if name not in STEPS]
    if unknown:
        raise UserError(f"--steps has {unknown[0]!r}, expected some of {','.join(STEPS)}.")
    output = None if _OUTPUT.value is None else Path(_OUTPUT.value).expanduser()
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output names {_OUTPUT.value!r} in a folder that does not exist; make it first.")

    # --- Machine --------------------------------------------------------------------------------------
    jax.config.update("jax_platforms", "cpu")  # compiling for other machines needs none of this one's
    jax.config.update("jax_enable_compilation_cache", False)  # programs for others cannot be read from it
    machine = parse_machine(_MACHINE.value)
    mesh = make_mesh(mesh_shape(CONFIG_FLAG.value.mesh, machine.num_devices), devices(machine))

    # --- Configuration --------------------------------------------------------------------------------
    config = CONFIG_FLAG.value.copy_and_resolve_references()
    config.initial = None  # neither weights nor data are read
    config.data.root = "."
    validate(config, row_shares(mesh))

    # --- Steps ----------------------------------------------------------------------------------------
    steps = []
    if "train" in _STEPS.value:
        steps += [train_step(config, index, mesh) for index in range(len(config.stages))]
    if {"prefill", "decode"} & set(_STEPS.value):
        steps += [step for step in serving_steps(config, mesh) if step.name in _STEPS.value]
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    if not _JSON.value:
        print(
            f"{machine.name}: {machine.num_devices} devices, mesh {shape}; figures of one device and one step"
        )
    reports = []
    for step in steps:
        started = time.perf_counter()
        reports.append(plan_step(step, machine, mesh) | {"compile_seconds": time.perf_counter() - started})
        if not _JSON.value:
            print(format_step(reports[-1], not machine.is_tpu), flush=True)
    about = {"machine": machine.name, "devices": machine.num_devices, "mesh": dict(mesh.shape)}
    text = json.dumps(about | {"jax": jax.__version__, "steps": reports}, indent=2)
    if _JSON.value:
        print(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    misfits = [misfit(report) for report in reports if not report["fits"]]
    if misfits:
        raise RunError(" ".join(misfits))


if __name__ == "__main__":
    run_command(main)
