"""What a run tells: a progress bar on a terminal, plain lines otherwise, and always metrics.jsonl."""

import json
import math
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tqdm


class NotFinite(Exception):
    """The loss or the gradient is no longer a number."""


class StageLog:
    """Collects step metrics on the device and reports every `every` steps."""

    def __init__(self, path: Path, stage: str, steps: int, start: int, every: int):
        self._path, self._stage, self._steps, self._every = path, stage, steps, every
        self._pending: list[dict[str, jax.Array]] = []
        self._clock = time.perf_counter()
        self._bar = tqdm.tqdm(
            total=steps, initial=start, desc=stage, unit="step", disable=not sys.stderr.isatty()
        )

    def step(self, step: int, metrics: dict[str, jax.Array], skipped: int) -> None:
        """Note the metrics of `step` (counted from 1)."""
        self._pending.append(metrics)
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
            "skipped": skipped,
        }
        self._pending, self._clock = [], time.perf_counter()
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        brief = (
            f"loss {entry['loss']:.4f}  lr {entry['learning_rate']:.2e}  grad norm {entry['grad_norm']:.2f}  "
            f"{entry['steps_per_second']:.2f} steps/s  {entry['frames_per_second']:.0f} frames/s  "
            f"{entry['tokens_per_second']:.0f} tokens/s"
        )
        if self._bar.disable:
            print(f"{self._stage} {step}/{self._steps}  {brief}", flush=True)
        else:
            self._bar.set_postfix_str(brief)
        if not (math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"])):
            raise NotFinite

    def check(self) -> None:
        """Raises NotFinite when a step since the last report is not finite: its state must not be saved."""
        values = jax.device_get([(metrics["loss"], metrics["grad_norm"]) for metrics in self._pending])
        if not np.isfinite(values).all():
            raise NotFinite

    def close(self) -> None:
        self._bar.close()
