"""Train a video language model stage by stage, then evaluate it.

    python -m dynfocus_jax.train --config configs/toy.py --workdir runs/toy
    python -m dynfocus_jax.train --config configs/toy.py:variant=rods_only --config.seed=1 --workdir runs/rods

Set any field of the configuration with --config.FIELD=VALUE, for example --config.stages[3].steps=100; list
the fields with --fields=config.

To resume a run, rerun the same command, on the same devices or on others; finished stages are not repeated.
On SIGTERM the run saves a checkpoint and exits with code 0.

The workdir receives config.json, checkpoints/, metrics.jsonl, skipped.jsonl (samples that could not be used),
overflow.jsonl (samples that were shortened), lengths.jsonl (lengths of the samples), and, if
config.evaluation.annotations is set, eval.json, predictions.jsonl and focus.png.

To train with several processes, set config.distributed and start each process with the same arguments;
launch/ has scripts for this. The processes share the workdir; process 0 prints and writes.
"""

import json
import shutil
import time
from pathlib import Path

import jax
from absl import flags

from dynfocus_jax.command import CONFIG_FLAG, run_command
from dynfocus_jax.data.prepare import check_initial_checkpoint, make_tokenizer, prepare_data_root
from dynfocus_jax.errors import UserError
from dynfocus_jax.evaluation.held_out import check_held_out_features, evaluate_held_out, format_held_out
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.parallel.processes import connect_processes, is_process_zero, print_once, process_zero_first
from dynfocus_jax.parallel.sharding import num_row_shards
from dynfocus_jax.sections import to_dict
from dynfocus_jax.training.initial_params import check_initial
from dynfocus_jax.training.loop import StageRun
from dynfocus_jax.training.preemption import Preemption
from dynfocus_jax.validation import validate

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and results.")
_STOP_AT = flags.DEFINE_string(
    "stop_at", None, "STAGE:STEP at which to save a checkpoint and stop; run again without it to resume."
)


def main() -> None:
    config = CONFIG_FLAG.require("configs/toy.py")
    if _WORKDIR.value is None:
        raise UserError("--workdir is missing; set it to a folder for checkpoints and results.")
    workdir = Path(_WORKDIR.value).expanduser()

    # --- Devices and settings -------------------------------------------------------------------------
    connect_processes(config.distributed)
    mesh = make_mesh(mesh_shape(config.mesh, jax.device_count()))
    validate(config, num_row_shards(mesh))
    check_initial_checkpoint(config)
    stop_at = _parse_stop(_STOP_AT.value, [stage.name for stage in config.stages])
    workdir.mkdir(parents=True, exist_ok=True)
    processes = "" if jax.process_count() == 1 else f" in {jax.process_count()} processes"
    print_once(f"{jax.device_count()} x {jax.devices()[0].device_kind}{processes}, jax {jax.__version__}")

    # --- Data -----------------------------------------------------------------------------------------
    started = time.perf_counter()
    with process_zero_first():
        data_root = prepare_data_root(config.data)
    tokenizer = make_tokenizer(config, data_root / config.data.vocabulary)
    held_out = config.evaluation.annotations
    if held_out is not None and not (data_root / held_out).is_file():
        raise UserError(
            f"config.evaluation.annotations is {held_out!r}, which is not a file in {data_root}; check "
            "the path."
        )
    if held_out is not None:
        check_held_out_features(config, data_root)
    seconds = {"data": time.perf_counter() - started}

    # --- Stages ---------------------------------------------------------------------------------------
    stages = [
        StageRun(config, index, workdir=workdir, data_root=data_root, tokenizer=tokenizer, mesh=mesh)
        for index in range(len(config.stages))
    ]
    config.stages = tuple(stage.stage for stage in stages)  # epochs are resolved to steps
    check_initial(config.initial, stages)
    # Not earlier: a run that the existing checkpoints refuse must not change the workdir
    if is_process_zero():
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
                print_once(f"stage {stage.name}: already finished, using its checkpoint")
            else:
                stop = stop_at[1] if stop_at and stop_at[0] == stage.name else None
                params, seconds[stage.name] = stage.run(params, stop, preemption)
                if stop is not None or preemption.agreed:
                    step = stage.checkpoints.latest_step()
                    change = "" if stop is None else " without --stop_at"
                    print_once(
                        f"stopped at step {step} of stage {stage.name}; rerun the same command{change} to "
                        "resume"
                    )
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
    if is_process_zero():
        (workdir / "eval.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print_once(format_held_out(results))
    picture = ", focus.png" if (workdir / "focus.png").is_file() else ""
    print_once(f"results are in {workdir}: eval.json, predictions.jsonl{picture}")


def _parse_stop(text: str | None, names: list[str]) -> tuple[str, int] | None:
    """Return the stage and the step of --stop_at."""
    if text is None:
        return None
    name, _, step = text.partition(":")
    if name not in names or not step.isdigit() or int(step) < 1:
        raise UserError(
            f"--stop_at is {text!r}, expected STAGE:STEP, where STAGE is one of {', '.join(names)}."
        )
    return name, int(step)


if __name__ == "__main__":
    run_command(main)
