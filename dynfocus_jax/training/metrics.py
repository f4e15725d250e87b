"""The log of a run: a progress bar on a terminal, plain lines otherwise, and metrics.jsonl in both cases.

Only process 0 prints and writes. All processes have the same metrics, so they stop at the same step.
"""

import math
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tqdm

from dynfocus_jax.json_lines import append_json_line, read_json_lines, write_json_lines
from dynfocus_jax.parallel.processes import is_process_zero, print_once


class NotFinite(Exception):
    """The loss or the gradient is infinite or not a number."""


class StageLog:
    """Collects the metrics of steps on the device, and reports them every `every` steps.

    Args:
      path: metrics.jsonl; entries of this stage after step `start` are removed.
      stage: name of the stage.
      steps: number of steps of the stage.
      start: step that the stage starts or resumes from.
      every: steps between reports.
    """

    def __init__(self, path: Path, stage: str, steps: int, start: int, every: int):
        self._path, self._stage, self._steps, self._every = path, stage, steps, every
        self._pending: list[dict[str, jax.Array]] = []
        self._unsaved: list[dict[str, jax.Array]] = []  # loss and gradient norm since `means`
        self._clock, self._waited = time.perf_counter(), 0.0
        has_bar = is_process_zero() and sys.stderr.isatty()
        if is_process_zero():
            entries = read_json_lines(path)
            kept = [entry for entry in entries if entry["stage"] != stage or entry["step"] <= start]
            if kept != entries:
                write_json_lines(path, kept)
        self._bar = tqdm.tqdm(total=steps, initial=start, desc=stage, unit="step", disable=not has_bar)

    def step(self, step: int, metrics: dict[str, jax.Array], skipped: int, waited: float) -> None:
        """Add the metrics of a step, and report if it is due.

        Args:
          step: number of the step, from 1.
          metrics: its metrics, on the device.
          skipped: samples skipped so far.
          waited: seconds that the devices have waited for data so far.

        Raises:
          NotFinite: the loss or the gradient of a reported step is not finite.
        """
        self._pending.append(metrics)
        self._unsaved.append({name: metrics[name] for name in ("loss", "grad_norm")})
        self._bar.update()
        if step % self._every and step != self._steps:
            return
        values = jax.device_get(self._pending)
        seconds = time.perf_counter() - self._clock
        count = len(values)
        entry = {
            "stage": self._stage,
            "step": step,
            "loss": sum(float(v["loss"]) for v in values) / count,
            "grad_norm": float(np.max([v["grad_norm"] for v in values])),  # NaN if one is
            "learning_rate": float(values[-1]["learning_rate"]),
            "steps_per_second": count / seconds,
            "frames_per_second": sum(float(v["frames"]) for v in values) / seconds,
            "tokens_per_second": sum(float(v["tokens"]) for v in values) / seconds,
            "wait": (waited - self._waited) / seconds,  # fraction of the time
            "skipped": skipped,
        }
        self._pending, self._clock, self._waited = [], time.perf_counter(), waited
        if is_process_zero():
            append_json_line(self._path, entry)
        line = (
            f"loss {entry['loss']:.4f}  lr {entry['learning_rate']:.2e}  grad norm {entry['grad_norm']:.2f}  "
            f"{entry['steps_per_second']:.2f} steps/s  {entry['frames_per_second']:.0f} frames/s  "
            f"{entry['tokens_per_second']:.0f} tokens/s  wait {100 * entry['wait']:.0f} %"
        )
        if self._bar.disable:
            print_once(f"{self._stage} {step}/{self._steps}  {line}")
        else:
            self._bar.set_postfix_str(line)
        if not (math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"])):
            raise NotFinite

    def means(self) -> dict[str, float]:
        """Return the mean loss and gradient norm of the steps since the last call, for a checkpoint.

        Raises:
          NotFinite: one of them is not finite, so the state must not be saved.
        """
        values, self._unsaved = jax.device_get(self._unsaved), []
        means = {name: float(np.mean([value[name] for value in values])) for name in values[0]}
        if not all(map(math.isfinite, means.values())):
            raise NotFinite
        return means

    def close(self) -> None:
        self._bar.close()
