"""Train a video language model, stage by stage, then evaluate it.

    python -m dynfocus_jax.train --config configs/toy.py --workdir runs/toy
    python -m dynfocus_jax.train --config configs/toy.py:variant=rods_only --config.seed=1 --workdir runs/rods

Started again with the same --workdir it goes on where it stopped, on other devices too; finished stages are
not repeated. SIGTERM makes it save, stop and exit with 0.
The workdir receives config.json, metrics.jsonl, checkpoints/, skipped.jsonl (samples that could not be used),
overflow.jsonl (those that lost something), lengths.jsonl, eval.json, predictions.jsonl and focus.png. Any
field is set by --config.FIELD=VALUE, for example --config.stages[3].steps=100.

Several processes train together when each is started with the same arguments and config.distributed says how
they find each other; launch/ has scripts for it. They share the workdir; the first of them prints and writes.
"""

import json
import shutil
import time
from pathlib import Path

import jax
from absl import flags

from dynfocus_jax.command import CONFIG_FLAG, run_command
from dynfocus_jax.data.prepare import check_weights, make_tokenizer, prepare
from dynfocus_jax.errors import UserError
from dynfocus_jax.evaluation.held_out import check_held_out_features, evaluate_held_out, format_held_out
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.parallel.sharding import row_shares
from dynfocus_jax.parallel.start import first_goes_ahead, is_first, say, start
from dynfocus_jax.sections import to_dict
from dynfocus_jax.training.loop import StageRun, check_initial
from dynfocus_jax.training.preemption import Preemption
from dynfocus_jax.validation import validate

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and results.")
_STOP_AT = flags.DEFINE_string("stop_at", None, "STAGE:STEP, save there and stop (to be resumed later).")


def main() -> None:
    if CONFIG_FLAG.value is None:
        raise UserError("--config is missing; name a config file such as configs/toy.py.")
    if _WORKDIR.value is None:
        raise UserError("--workdir is missing; name the folder that receives checkpoints and results.")
    config, workdir = CONFIG_FLAG.value, Path(_WORKDIR.value).expanduser()

    # --- Devices and settings -------------------------------------------------------------------------
    start(config.distributed)
    mesh = make_mesh(mesh_shape(config.mesh, jax.device_count()))
    validate(config, row_shares(mesh))
    check_weights(config)
    stop_at = _parse_stop(_STOP_AT.value, [stage.name for stage in config.stages])
    workdir.mkdir(parents=True, exist_ok=True)
    processes = "" if jax.process_count() == 1 else f" in {jax.process_count()} processes"
    say(f"{jax.device_count()} x {jax.devices()[0].device_kind}{processes}, jax {jax.__version__}")

    # --- Data -----------------------------------------------------------------------------------------
    started = time.perf_counter()
    with first_goes_ahead():
        data_root = prepare(config.data)
    tokenizer = make_tokenizer(config, data_root / config.data.vocabulary)
    held_out = config.evaluation.annotations
    if held_out is not None and not (data_root / held_out).is_file():
        raise UserError(f"config.evaluation.annotations is {held_out!r}, which is not a file in {data_root}.")
    if held_out is not None:
        check_held_out_features(config, data_root)
    seconds = {"data": time.perf_counter() - started}

    # --- Stages ---------------------------------------------------------------------------------------
    stages = [
        StageRun(config, index, workdir=workdir, data_root=data_root, tokenizer=tokenizer, mesh=mesh)
        for index in range(len(config.stages))
    ]
    config.stages = tuple(stage.stage for stage in stages)  # with their numbers of steps
    check_initial(config.initial, stages)
    # Only now that the stages accept what the workdir holds: a refused run leaves it as it was.
    if is_first():
        (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")
        if config.data.tokenizer is None:
            shutil.copyfile(data_root / config.data.vocabulary, workdir / "vocabulary.json")
    done = max((index for index, stage in enumerate(stages) if stage.finished), default=-1)
    params = {}
    with Preemption() as preemption:
        for index, stage in enumerate(stages):
            if index < done:
                seconds[stage.name] = stage.checkpoints.seconds()
            elif index == done:
                params = stage.checkpoints.restore_params(stage.shapes)
                seconds[stage.name] = stage.checkpoints.seconds()
                say(f"stage {stage.name}: finished before, its checkpoint is used")
            else:
                stop = stop_at[1] if stop_at and stop_at[0] == stage.name else None
                params, seconds[stage.name] = stage.run(params, stop, preemption)
                if stop is not None or preemption.agreed:
                    step = stage.checkpoints.latest_step()
                    say(f"stopped at step {step} of stage {stage.name}; run the same command to resume")
                    return

    # --- Evaluation -----------------------------------------------------------------------------------
    if config.evaluation.annotations is None:
        return
    started = time.perf_counter()
    results = evaluate_held_out(
        config, params, data_root=data_root, tokenizer=tokenizer, workdir=workdir, mesh=mesh
    )
    seconds["evaluation"] = time.perf_counter() - started
    results["seconds_by_stage"] = {name: round(value, 1) for name, value in seconds.items()}
    if is_first():
        (workdir / "eval.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    say(format_held_out(results))
    say(f"results in {workdir}/eval.json, picture in {workdir}/focus.png")


def _parse_stop(text: str | None, names: list[str]) -> tuple[str, int] | None:
    if text is None:
        return None
    name, _, step = text.partition(":")
    if name not in names or not step.isdigit() or int(step) < 1:
        raise UserError(f"--stop_at is {text!r}, expected STAGE:STEP with a stage of {', '.join(names)}.")
    return name, int(step)


if __name__ == "__main__":
    run_command(main)
