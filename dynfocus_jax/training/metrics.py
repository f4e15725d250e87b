"""Log of a run: a progress bar on a terminal, plain lines otherwise, and always metrics.jsonl.

Of several processes the first one tells; all of them see the same metrics, and stop at the same step.
"""

import math
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tqdm

from dynfocus_jax.json_lines import append_json_line, read_json_lines, write_json_lines
from dynfocus_jax.parallel.start import is_first, say


class NotFinite(Exception):
    """The loss or the gradient is no longer a number."""


class StageLog:
    """Collects step metrics on the device and reports every `every` steps.

    What the file holds of the stage after step `start`, where it goes on, is taken out.
    """

    def __init__(self, path: Path, stage: str, steps: int, start: int, every: int):
        self._path, self._stage, self._steps, self._every = path, stage, steps, every
        self._pending: list[dict[str, jax.Array]] = []
        self._unsaved: list[dict[str, jax.Array]] = []  # loss and gradient norm since `means`
        self._clock, self._waited = time.perf_counter(), 0.0
        has_bar = is_first() and sys.stderr.isatty()
        if is_first():
            entries = read_json_lines(path)
            kept = [entry for entry in entries if entry["stage"] != stage or entry["step"] <= start]
            if kept != entries:
                write_json_lines(path, kept)
        self._bar = tqdm.tqdm(total=steps, initial=start, desc=stage, unit="step", disable=not has_bar)

    def step(self, step: int, metrics: dict[str, jax.Array], skipped: int, waited: float) -> None:
        """Note the metrics of `step` (counted from 1); samples skipped and seconds waited for data so far."""
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
            "wait": (waited - self._waited) / seconds,  # share of the time
            "skipped": skipped,
        }
        self._pending, self._clock, self._waited = [], time.perf_counter(), waited
        if is_first():
            append_json_line(self._path, entry)
        brief = (
            f"loss {entry['loss']:.4f}  lr {entry['learning_rate']:.2e}  grad norm {entry['grad_norm']:.2f}  "
            f"{entry['steps_per_second']:.2f} steps/s  {entry['frames_per_second']:.0f} frames/s  "
            f"{entry['tokens_per_second']:.0f} tokens/s  wait {100 * entry['wait']:.0f} %"
        )
        if self._bar.disable:
            say(f"{self._stage} {step}/{self._steps}  {brief}")
        else:
            self._bar.set_postfix_str(brief)
        if not (math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"])):
            raise NotFinite

    def means(self) -> dict[str, float]:
        """Mean loss and gradient norm of the steps since the last call, which come with a checkpoint.

        Raises:
          NotFinite: one of them is not finite: the state must not be saved.
        """
        values, self._unsaved = jax.device_get(self._unsaved), []
        means = {name: float(np.mean([value[name] for value in values])) for name in values[0]}
        if not all(map(math.isfinite, means.values())):
            raise NotFinite
        return means

    def close(self) -> None:
        self._bar.close()
