"""Train a video language model, stage by stage, then evaluate it.

    python -m dynfocus_jax.train --config configs/toy.py --workdir runs/toy
    python -m dynfocus_jax.train --config configs/toy.py:variant=rods_only --config.seed=1 --workdir runs/rods

Started again with the same --workdir it goes on where it stopped; finished stages are not repeated.
The workdir receives config.json, metrics.jsonl, checkpoints/, skipped.jsonl, eval.json, predictions.jsonl
and focus.png. Any field is set by --config.FIELD=VALUE, for example --config.stages[3].steps=100.
"""

import json
import shutil
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from dynfocus_jax import trees
from dynfocus_jax.config import UserError, run_command, to_dict, validate
from dynfocus_jax.data.prepare import check_weights, make_tokenizer, prepare
from dynfocus_jax.evaluation.run import evaluate_run, format_table
from dynfocus_jax.parallel.mesh import data_axis_size, make_mesh
from dynfocus_jax.training.checkpoints import read_params
from dynfocus_jax.training.loop import StageRun, check_initial

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with :variant=NAME where it has any.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and results.")
_STOP_AT = flags.DEFINE_string("stop_at", None, "STAGE:STEP, save there and stop (to be resumed later).")


def main() -> None:
    if _CONFIG.value is None:
        raise UserError("--config is missing; name a config file such as configs/toy.py.")
    if _WORKDIR.value is None:
        raise UserError("--workdir is missing; name the folder that receives checkpoints and results.")
    config, workdir = _CONFIG.value, Path(_WORKDIR.value).expanduser()

    # --- Devices and settings -------------------------------------------------------------------------
    data_axis = data_axis_size(config.mesh.data)
    validate(config, data_axis)
    check_weights(config)
    stop_at = _parse_stop(_STOP_AT.value, [stage.name for stage in config.stages])
    mesh = make_mesh(data_axis)
    workdir.mkdir(parents=True, exist_ok=True)
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)

    # --- Data -----------------------------------------------------------------------------------------
    started = time.perf_counter()
    data_root = prepare(config.data)
    tokenizer = make_tokenizer(config, data_root / config.data.vocabulary)
    held_out = config.evaluation.annotations
    if held_out is not None and not (data_root / held_out).is_file():
        raise UserError(f"config.evaluation.annotations is {held_out!r}, which is not a file in {data_root}.")
    seconds = {"data": time.perf_counter() - started}

    initial = {} if config.initial is None else read_params(Path(config.initial).expanduser())

    # --- Stages ---------------------------------------------------------------------------------------
    stages = [
        StageRun(config, index, workdir=workdir, data_root=data_root, tokenizer=tokenizer, mesh=mesh)
        for index in range(len(config.stages))
    ]
    check_initial(config.initial, initial, stages)
    # Only now that the stages accept what the workdir holds: a refused run leaves it as it was.
    (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")
    if config.data.tokenizer is None:
        shutil.copyfile(data_root / config.data.vocabulary, workdir / "vocabulary.json")
    done = max((index for index, stage in enumerate(stages) if stage.finished), default=-1)
    params = {}
    for index, stage in enumerate(stages):
        if index < done:
            seconds[stage.name] = stage.checkpoints.seconds()
        elif index == done:
            params, seconds[stage.name] = stage.checkpoints.restore_params(), stage.checkpoints.seconds()
            print(f"stage {stage.name}: finished before, its checkpoint is used", flush=True)
        else:
            stop = stop_at[1] if stop_at and stop_at[0] == stage.name else None
            # With what `initial` holds for this stage and the one before had no use for.
            params, seconds[stage.name] = stage.run(trees.merge(initial, params), stop)
            if stop is not None:
                print(f"stopped at step {stop} of stage {stage.name}; run again to go on", flush=True)
                return

    # --- Evaluation -----------------------------------------------------------------------------------
    if config.evaluation.annotations is None:
        return
    started = time.perf_counter()
    results = evaluate_run(config, params, data_root=data_root, tokenizer=tokenizer, workdir=workdir)
    seconds["evaluation"] = time.perf_counter() - started
    results["seconds_by_stage"] = {name: round(value, 1) for name, value in seconds.items()}
    (workdir / "eval.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(format_table(results))
    print(f"results in {workdir}/eval.json, picture in {workdir}/focus.png")


def _parse_stop(text: str | None, names: list[str]) -> tuple[str, int] | None:
    if text is None:
        return None
    name, _, step = text.partition(":")
    if name not in names or not step.isdigit() or int(step) < 1:
        raise UserError(f"--stop_at is {text!r}, expected STAGE:STEP with a stage of {', '.join(names)}.")
    return name, int(step)


if __name__ == "__main__":
    run_command(main)
