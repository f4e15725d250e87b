"""The real train step of a configuration with random weights on this machine's devices: memory, time, MFU.

    python benchmarks/train_step.py --config configs/align_7b.py --config.stages[0].batch_size=32
    python benchmarks/train_step.py --config configs/instruct_7b.py:train=lora \
        --config.stages[0].batch_size=4 --plan PLAN.json --output benchmarks/results/train_step_h200.json

State and batch are those that training has: frozen towers in the dtype of the computation, all frames and
tokens of the bucket in use. Peak memory is what the devices report (GPU, TPU), beside what `plan` has
predicted for the same configuration (`--plan`) and what this machine's compiler says. FLOPs are those of the
matrix products without remat. Results are added to the output file, one entry a run.
"""

import datetime
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script: that folder holds both packages

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from benchmarks.connector import processor
from dynfocus_jax import trees
from dynfocus_jax.batch import padding_sample
from dynfocus_jax.command import run_command
from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.parallel.sharding import num_row_shards, replicated, to_devices
from dynfocus_jax.parameters import init_params
from dynfocus_jax.planning.flops import count_flops
from dynfocus_jax.planning.machines import CHIPS
from dynfocus_jax.planning.planned_steps import planned_train_step
from dynfocus_jax.training.optimizer import make_optimizer
from dynfocus_jax.training.state import TrainState, state_shardings
from dynfocus_jax.video_language_model import build_model

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with :variant=NAME where it has any.")
_STAGE = flags.DEFINE_integer("stage", 0, "Number of the stage.")
_STEPS = flags.DEFINE_integer("steps", 10, "Steps that are timed, after two others.")
_PLAN = flags.DEFINE_string("plan", None, "What `plan --output` wrote for the same configuration.")
_OUTPUT = flags.DEFINE_string("output", None, "json file to which the result is added.")


def random_batch(config, rows: int):
    """A host batch in which every frame and token of the stage's bucket is used."""
    stage, model, rng = config.stages[_STAGE.value], config.model, np.random.default_rng(0)
    sample = padding_sample(stage.num_frames, model.vision.image_size, stage.max_text, config.data.max_query)
    batch = jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], rows, axis=0), sample)
    return batch._replace(
        frames=rng.integers(256, size=batch.frames.shape, dtype=np.uint8),
        frame_mask=np.ones_like(batch.frame_mask),
        query_tokens=rng.integers(1, model.text_encoder.vocab_size, batch.query_tokens.shape, dtype=np.int32),
        query_length=np.full(rows, config.data.max_query, np.int32),
        tokens=rng.integers(1, model.language.vocab_size, batch.tokens.shape, dtype=np.int32),
        length=np.full(rows, stage.max_text, np.int32),
        visual_position=np.ones(rows, np.int32),
        loss_mask=np.broadcast_to(np.arange(stage.max_text) >= stage.max_text // 2, batch.tokens.shape),
        index=np.arange(rows, dtype=np.int32),
    )


def initial_state(config, state: TrainState, mesh) -> TrainState:
    """Random parameters and zero moments, made where they lie."""
    stage = config.stages[_STAGE.value]
    params = trees.flatten(trees.merge(state.trained, state.frozen))
    made = init_params(build_model(config, _STAGE.value), jax.random.key(0), params)
    trained = trees.unflatten({path: made[path] for path in trees.flatten(state.trained)})
    frozen = trees.unflatten({path: made[path] for path in trees.flatten(state.frozen)})
    optimizer = make_optimizer(stage, trained)
    moments = jax.jit(optimizer.init, out_shardings=state_shardings(state).opt_state)(trained)
    step = jax.device_put(np.zeros((), np.int32), replicated(mesh))
    return TrainState(step, trained, frozen, moments)


def planned(config) -> dict | None:
    """The report on this stage in the plan's file."""
    if _PLAN.value is None:
        return None
    reports = json.loads(Path(_PLAN.value).read_text(encoding="utf-8"))["steps"]
    where, rows = f"config.stages[{_STAGE.value}]", config.stages[_STAGE.value].batch_size
    for report in reports:
        if report["step"] == "train" and report["where"] == where and report["rows"] == rows:
            return report
    raise UserError(f"{_PLAN.value} has no train step of {where} with {rows} rows; plan this configuration.")


def chip_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 FLOP/s of a chip that `plan` knows."""
    kind = device.device_kind.lower().replace(" ", "-")
    return next((chip.flops for name, chip in CHIPS.items() if name.split("-")[0] in kind), None)


def main() -> None:
    if _CONFIG.value is None:
        raise UserError("--config is missing; try --config configs/align_7b.py.")
    config = _CONFIG.value.copy_and_resolve_references()
    devices = jax.devices()
    mesh = make_mesh(mesh_shape(config.mesh, len(devices)))
    stage, plan = config.stages[_STAGE.value], planned(config)
    if stage.batch_size % num_row_shards(mesh):
        raise UserError(f"a batch of {stage.batch_size} cannot be shared by {num_row_shards(mesh)} devices.")

    step = planned_train_step(config, _STAGE.value, mesh)
    state = initial_state(config, step.arguments[0], mesh)
    batch = to_devices(random_batch(config, stage.batch_size), mesh)
    jax.block_until_ready((state, batch))

    started = time.perf_counter()
    program = step.function.lower(*step.arguments).compile()
    compile_seconds = time.perf_counter() - started
    analysis = program.memory_analysis()

    times = []
    for _ in range(_STEPS.value + 2):
        started = time.perf_counter()
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - started)
    if not np.isfinite(float(metrics["loss"])):
        raise RunError("the loss is not finite, so what was measured means nothing.")
    seconds = statistics.median(times[2:])

    memory = devices[0].memory_stats() or {}
    flops = count_flops(step.without_recomputation.trace(*step.arguments).jaxpr.jaxpr)
    peak = chip_flops(devices[0])
    result = {
        "date": datetime.date.today().isoformat(),
        "device": processor() if devices[0].platform == "cpu" else devices[0].device_kind,
        "devices": len(devices),
        "jax": version("jax"),
        "config": sys.argv[1:],
        "rows": step.rows,
        "tokens": step.tokens,
        "parameters_trained": sum(leaf.size for leaf in jax.tree.leaves(state.trained)),
        "parameters_frozen": sum(leaf.size for leaf in jax.tree.leaves(state.frozen)),
        "compile_seconds": compile_seconds,
        "step_seconds": seconds,
        "tokens_per_second": step.tokens / seconds,
        "frames_per_second": step.rows * stage.num_frames / seconds,
        "model_tflop": flops / 1e12,
        "mfu": flops / len(devices) / seconds / peak if peak else None,
        "peak_gib": memory["peak_bytes_in_use"] / 2**30 if memory else None,
        "compiler_gib": (
            analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
            - analysis.alias_size_in_bytes
        ) / 2**30,
        "plan_gib": plan["total"] / 2**30 if plan else None,
        "plan_roofline_seconds": plan["roofline_seconds"] if plan else None,
        "loss": float(metrics["loss"]),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if _OUTPUT.value is not None:
        output = Path(_OUTPUT.value)
        runs = json.loads(output.read_text(encoding="utf-8")) if output.exists() else []
        output.write_text(json.dumps([*runs, result], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
