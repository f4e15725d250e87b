"""The train loop: trains one stage of a configuration, from its start or from its newest checkpoint."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.batch import Batch
from dynfocus_jax.errors import RunError
from dynfocus_jax.features.compatibility import check_vision_frozen, check_vision_weights
from dynfocus_jax.parallel.processes import print_once
from dynfocus_jax.parallel.sharding import local_rows, place_like, to_devices
from dynfocus_jax.parameters import trained_paths
from dynfocus_jax.sections import to_dict
from dynfocus_jax.text.tokenizers import Tokenizer
from dynfocus_jax.training.checkpoints import StageCheckpoints
from dynfocus_jax.training.initial_params import check_copies, initial_params
from dynfocus_jax.training.metrics import NotFinite, StageLog
from dynfocus_jax.training.optimizer import make_optimizer, make_schedule
from dynfocus_jax.training.preemption import Preemption
from dynfocus_jax.training.stage_data import StageData
from dynfocus_jax.training.state import TrainState, abstract_state, state_shardings
from dynfocus_jax.training.step import make_train_step
from dynfocus_jax.version import code_version
from dynfocus_jax.video_language_model import build_model

# Settings that change speed and memory but no result, except by rounding: a run may be resumed with others
_SPEED_SETTINGS = (
    *("root", "features", "lengths", "cache_gib", "threads", "processes", "timeout", "workers"),
    *("microbatches", "loss_chunk", "remat", "attention"),
)


class StageRun:
    """A stage with its data, its model, and its checkpoints in `workdir/checkpoints/<name>`.

    Args:
      config: the validated configuration.
      index: number of the stage.
      workdir: folder of checkpoints, metrics and lists of skipped samples.
      data_root: folder of annotations and media.
      tokenizer: the tokenizer of the model.
      mesh: the devices to train on.

    Attributes:
      config: the configuration, in which the stage has a number of steps.
      stage: the section of the stage.
      shapes: shape, dtype and layout of each parameter, {path: shape}.
      is_trained: predicate of the parameter paths that the stage trains.

    Raises:
      UserError: the data, the stage's patterns or an existing checkpoint do not fit the configuration.
    """

    def __init__(
        self,
        config: ConfigDict,
        index: int,
        *,
        workdir: Path,
        data_root: Path,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
    ):
        self.data = StageData(config, index, workdir=workdir, data_root=data_root, tokenizer=tokenizer)
        self.config, self.stage = self.data.config, self.data.stage
        self.workdir, self.mesh = workdir, mesh
        self.model = build_model(self.config, index)
        self._abstract = abstract_state(self.config, index, mesh)
        self.shapes = trees.flatten(trees.merge(self._abstract.trained, self._abstract.frozen))
        self.is_trained = trained_paths(self.config, index, self.shapes)
        check_copies(self.stage, self.shapes)
        if self.config.data.features is not None:
            check_vision_frozen(self.name, self.shapes, self.is_trained)
        self.checkpoints = StageCheckpoints(
            workdir / "checkpoints" / self.name,
            settings={
                "seed": self.config.seed,
                "model": _persistent_settings(to_dict(self.config.model)),
                "data": _persistent_settings(to_dict(self.config.data)),
                "stage": _persistent_settings(to_dict(self.stage)),
                "records": self.data.digest(),
            },
            about={"config": to_dict(self.config), "code": code_version()},
            **self.config.checkpoint,
        )

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def finished(self) -> bool:
        """Whether the stage has a checkpoint of its last step."""
        return self.checkpoints.latest_step() == self.stage.steps

    def run(
        self, previous: dict | None, stop_at: int | None = None, preemption: Preemption | None = None
    ) -> tuple[dict, float]:
        """Train to the last step, or to step `stop_at`, or until a preemption; save a checkpoint there.

        Args:
          previous: parameters of the stage before, None for the first stage; see `initial_params`.
          stop_at: step to stop at.
          preemption: asked before every step; the caller enters its context.

        Returns:
          The parameters, and the seconds spent in this stage, including earlier runs of it.

        Raises:
          RunError: the loss or the gradient is not finite, or a checkpoint cannot be written.
        """
        started = time.perf_counter()
        key = jax.random.key(self.config.seed)
        optimizer = make_optimizer(self.stage, self._abstract.trained)
        earlier_seconds = 0.0
        if self.checkpoints.latest_step() is None:
            state = self._initial_state(key, previous, optimizer)
        else:
            state, earlier_seconds = self.checkpoints.restore(self._abstract)
        check_vision_weights(self.data.loader.media.features, trees.flatten(state.frozen), self.mesh)
        first_step = int(state.step)
        _print_start(self.data, state, first_step)
        train_step = make_train_step(
            self.model,
            optimizer,
            make_schedule(self.stage),
            self.stage,
            jax.random.fold_in(key, 1),
            state_shardings(self._abstract),
        )

        def seconds() -> float:
            return earlier_seconds + time.perf_counter() - started

        last_step = self.stage.steps if stop_at is None else min(stop_at, self.stage.steps)
        state = self._train(state, first_step, last_step, train_step, preemption, seconds)
        params = trees.merge(state.trained, state.frozen)
        jax.block_until_ready(params)
        self.checkpoints.wait()
        self._print_best()
        return params, seconds()

    def _train(
        self,
        state: TrainState,
        step: int,
        last_step: int,
        train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]],
        preemption: Preemption | None,
        seconds: Callable[[], float],
    ) -> TrainState:
        """Run the steps from `step` to `last_step`, logging and saving; return the last state."""
        stage, rows = self.stage, local_rows(self.mesh, self.stage.batch_size)
        log = StageLog(self.workdir / "metrics.jsonl", stage.name, stage.steps, step, self.config.log_every)
        feed = self.data.feed(step, last_step, rows, lambda batch: to_devices(batch, self.mesh))
        compiled_shapes: set[tuple[int, int]] = set()
        dispatched: deque[dict[str, jax.Array]] = deque()  # metrics of the two newest steps
        stopping = False
        with contextlib.closing(log), contextlib.closing(feed):
            while step < last_step and not stopping:
                batch, num_skipped = feed.take(dispatched[-1]["loss"] if dispatched else None)
                if len(dispatched) == 2:  # one step may wait behind the one that runs, no more
                    jax.block_until_ready(dispatched.popleft())
                with _print_compilation(stage.name, batch, compiled_shapes):
                    state, metrics = train_step(state, batch)
                dispatched.append(metrics)
                step += 1
                stopping = preemption is not None and preemption.requested()
                saving = self.checkpoints.is_due(step) or step == last_step or stopping
                try:
                    log.step(step, metrics, num_skipped, feed.waited)
                    means = log.means() if saving else {}
                except NotFinite:
                    raise self._not_finite(step) from None
                if saving:
                    self.checkpoints.save(step, state, seconds(), means)
        self._print_end(len(compiled_shapes))
        return state

    def _initial_state(
        self, key: jax.Array, previous: dict | None, optimizer: optax.GradientTransformation
    ) -> TrainState:
        params = initial_params(self.config, self.stage, self.model, key, self.shapes, previous)
        trained, frozen = trees.split(trees.unflatten(params), self.is_trained)
        layout = state_shardings(self._abstract).opt_state
        opt_state = jax.jit(optimizer.init, out_shardings=layout)(trained)
        return TrainState(place_like(np.zeros((), np.int32), self._abstract.step), trained, frozen, opt_state)

    def _not_finite(self, step: int) -> RunError:
        self.checkpoints.wait()
        good, folder = self.checkpoints.latest_step(), self.checkpoints.directory
        saved = (
            "there is no checkpoint" if good is None else f"the last checkpoint is step {good} in {folder}"
        )
        return RunError(
            f"stage {self.name!r}: the loss or the gradient is not finite at step {step}; {saved}. Reduce "
            "the learning rate, or check the data of these steps."
        )

    def _print_end(self, num_compiled: int) -> None:
        """Print the numbers of compiled steps and of skipped and shortened samples."""
        if num_compiled:
            buckets = len(self.data.buckets)
            print_once(f"stage {self.name}: the step was compiled for {num_compiled} of {buckets} buckets")
        if self.data.skipped.count:
            print_once(
                f"{self.data.skipped.count} samples were skipped; see {self.workdir / 'skipped.jsonl'}"
            )
        for what, count in self.data.shortened.counts.items():
            print_once(
                f"{count} samples were too long and lost {what}; see {self.workdir / 'overflow.jsonl'}"
            )

    def _print_best(self) -> None:
        best = self.checkpoints.best_step()
        if self.config.checkpoint.best is not None and best is not None:
            folder = self.checkpoints.directory / str(best)
            print_once(
                f"stage {self.name}: best {self.config.checkpoint.best} at step {best}, kept in {folder}"
            )


def _persistent_settings(settings: Any) -> Any:
    """Return a part of a plain configuration without the settings that change only speed and memory."""
    if not isinstance(settings, dict):
        return settings
    return {key: _persistent_settings(value) for key, value in settings.items() if key not in _SPEED_SETTINGS}


def _print_start(data: StageData, state: TrainState, step: int) -> None:
    def millions(tree):
        return sum(x.size for x in jax.tree.leaves(tree)) / 1e6

    stage, refused = data.stage, len(data.refused)
    print_once(
        f"stage {stage.name}: {len(data.loader.records)} records"
        + (f" ({refused} unusable)" if refused else "")
        + f", {stage.steps} steps of {stage.batch_size} ({data.epochs:.2f} epochs), "
        f"{millions(state.trained):.3f} M parameters trained, {millions(state.frozen):.3f} M frozen"
        + (f", resumed at step {step}" if step else "")
    )


@contextlib.contextmanager
def _print_compilation(stage: str, batch: Batch, compiled: set[tuple[int, int]]) -> Iterator[None]:
    """Print the time of the block if it compiles the step, that is, if the batch has a new shape."""
    shape, started = (batch.frames.shape[1], batch.tokens.shape[1]), time.perf_counter()
    yield
    if shape not in compiled:
        compiled.add(shape)
        frames, text = shape
        seconds = time.perf_counter() - started
        print_once(
            f"stage {stage}: step for {frames} frames and {text} text tokens compiled in {seconds:.1f} s"
        )
