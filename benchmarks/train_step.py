"""Measure the train step of a configuration on this machine, with random weights: memory, time and MFU.

    python benchmarks/train_step.py --config configs/align_7b.py --config.stages[0].batch_size=32
    python benchmarks/train_step.py --config configs/instruct_7b.py:train=lora \
        --config.stages[0].batch_size=4 --plan PLAN.json --output train_step_h200.json

State and batch are as in training: frozen towers in the compute dtype, and a batch that uses all frames and
tokens of its bucket. The script reports the peak memory that the devices measure (GPU, TPU), that which this
machine's compiler predicts, and that which `plan` predicted for the same configuration (--plan). FLOPs are
those of the matrix products, without recomputation by remat.
"""

import datetime
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs in any folder

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks.reporting import processor
from dynfocus_jax import trees
from dynfocus_jax.batch import Batch, padding_sample
from dynfocus_jax.command import CONFIG_FLAG, run_command
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

_STAGE = flags.DEFINE_integer("stage", 0, "Index of the stage in config.stages.")
_STEPS = flags.DEFINE_integer("steps", 10, "Number of timed steps, after two warm-up steps.")
_PLAN = flags.DEFINE_string(
    "plan", None, "File written by `plan --output` for the same configuration, to compare with."
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "JSON file to which the result is appended. Default: print only."
)


def random_batch(config: ConfigDict, rows: int) -> Batch:
    """Return a random batch in host memory that uses every frame and token of the stage's bucket."""
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


def initial_state(config: ConfigDict, state: TrainState, mesh: Mesh) -> TrainState:
    """Return a state with random parameters and zero moments, created with the shardings of `state`."""
    stage = config.stages[_STAGE.value]
    params = trees.flatten(trees.merge(state.trained, state.frozen))
    initial = init_params(build_model(config, _STAGE.value), jax.random.key(0), params)
    trained = trees.unflatten({path: initial[path] for path in trees.flatten(state.trained)})
    frozen = trees.unflatten({path: initial[path] for path in trees.flatten(state.frozen)})
    optimizer = make_optimizer(stage, trained)
    moments = jax.jit(optimizer.init, out_shardings=state_shardings(state).opt_state)(trained)
    step = jax.device_put(np.zeros((), np.int32), replicated(mesh))
    return TrainState(step, trained, frozen, moments)


def read_plan(config: ConfigDict) -> dict | None:
    """Return the report on this stage in the file of --plan; None if --plan is not set.

    Raises:
      UserError: if the file has no such report.
    """
    if _PLAN.value is None:
        return None
    reports = json.loads(Path(_PLAN.value).read_text(encoding="utf-8"))["steps"]
    where, rows = f"config.stages[{_STAGE.value}]", config.stages[_STAGE.value].batch_size
    for report in reports:
        if report["step"] == "train" and report["where"] == where and report["rows"] == rows:
            return report
    raise UserError(
        f"--plan {_PLAN.value} has no train step of {where} with {rows} rows. Run `plan` with the same "
        "configuration."
    )


def chip_flops(device: jax.Device) -> float | None:  # pyright: ignore[reportInvalidTypeForm] (no stubs)
    """Return the peak bfloat16 FLOP/s of a device that `plan` knows, else None."""
    kind = device.device_kind.lower().replace(" ", "-")
    return next((chip.flops for name, chip in CHIPS.items() if name.split("-")[0] in kind), None)


def main() -> None:
    config = CONFIG_FLAG.require("configs/align_7b.py")
    devices = jax.devices()
    mesh = make_mesh(mesh_shape(config.mesh, len(devices)))
    stage, plan = config.stages[_STAGE.value], read_plan(config)
    if stage.batch_size % num_row_shards(mesh):
        raise UserError(
            f"config.stages[{_STAGE.value}].batch_size is {stage.batch_size}, expected a multiple of "
            f"{num_row_shards(mesh)}, the number of devices that share its rows."
        )

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
        raise RunError("train_step: the loss is not finite, so the measurements are not valid.")
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
