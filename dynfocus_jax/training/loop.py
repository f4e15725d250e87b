"""The train loop: runs one stage of a configuration from start, or from where it stopped."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.batch import Batch
from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.features.compatibility import check_vision_frozen, check_vision_weights
from dynfocus_jax.parallel import sharding as sharding_lib
from dynfocus_jax.parallel.start import say
from dynfocus_jax.parameters import init_params, trained_paths
from dynfocus_jax.sections import to_dict
from dynfocus_jax.training import optimizer as optimizer_lib
from dynfocus_jax.training import state as state_lib
from dynfocus_jax.training.checkpoints import StageCheckpoints, read_params, saved_shapes
from dynfocus_jax.training.metrics import NotFinite, StageLog
from dynfocus_jax.training.preemption import Preemption
from dynfocus_jax.training.stage_data import StageData
from dynfocus_jax.training.state import TrainState
from dynfocus_jax.training.step import make_train_step
from dynfocus_jax.version import code_version
from dynfocus_jax.video_language_model import build_model
from dynfocus_jax.weights.conversion import belongs_to_connector, check_params


class StageRun:
    """One stage: its data, its optimizer, its checkpoints under `workdir/checkpoints/<name>`.

    Args:
      config: the validated configuration; index: which of its stages.
      tokenizer: of the data; data_root: folder of annotations and media.

    Attributes:
      shapes: {parameter path: shape, dtype and layout}; is_trained: whether the stage trains a path.
    """

    def __init__(
        self,
        config: ConfigDict,
        index: int,
        *,
        workdir: Path,
        data_root: Path,
        tokenizer,
        mesh: jax.sharding.Mesh,
    ):
        self.data = StageData(config, index, workdir=workdir, data_root=data_root, tokenizer=tokenizer)
        config = self.data.config
        self.config, self.stage, self.workdir, self.mesh = config, config.stages[index], workdir, mesh
        self.model = build_model(config, index)
        self._abstract = state_lib.abstract_state(config, index, mesh)
        self.shapes = trees.flatten(trees.merge(self._abstract.trained, self._abstract.frozen))
        self.is_trained = trained_paths(config, index, self.shapes)
        self._check_copies()
        if config.data.features is not None:
            check_vision_frozen(self.name, self.shapes, self.is_trained)
        self.checkpoints = StageCheckpoints(
            workdir / "checkpoints" / self.stage.name,
            settings={
                "seed": config.seed,
                "model": _lasting(to_dict(config.model)),
                "data": _lasting(to_dict(config.data)),
                "stage": _lasting(to_dict(self.stage)),
                "records": self.data.digest(),
            },
            about={"config": to_dict(config), "code": code_version()},
            **config.checkpoint,
        )

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def finished(self) -> bool:
        """Whether the stage has been trained to its end."""
        return self.checkpoints.latest_step() == self.stage.steps

    def run(
        self, previous: dict | None, stop_at: int | None = None, preemption: Preemption | None = None
    ) -> tuple[dict, float]:
        """Train to the end, with a checkpoint there (or at step `stop_at`, or where preemption asks to stop).

        Args:
          previous: parameters of the stage before, taken over path by path; None for the first stage. What
            they lack comes from `config.initial`, as far as that has it.
          preemption: entered by the caller, asked before every step.

        Returns:
          The parameters and the seconds spent in this stage, earlier runs of it included.
        """
        started = time.perf_counter()
        stage, key = self.stage, jax.random.key(self.config.seed)
        optimizer = optimizer_lib.make_optimizer(stage, self._abstract.trained)
        if self.checkpoints.latest_step() is None:
            state, before = self._initial_state(key, previous, optimizer), 0.0
        else:
            state, before = self.checkpoints.restore(self._abstract)
        check_vision_weights(self.data.loader.media.features, trees.flatten(state.frozen), self.mesh)
        step = int(state.step)
        train_step = make_train_step(
            self.model,
            optimizer,
            optimizer_lib.schedule(stage),
            stage,
            jax.random.fold_in(key, 1),
            state_lib.state_shardings(self._abstract),
        )
        _print_start(self.data, state, step)

        log = StageLog(self.workdir / "metrics.jsonl", stage.name, stage.steps, step, self.config.log_every)
        end = stage.steps if stop_at is None else min(stop_at, stage.steps)
        rows = sharding_lib.local_rows(self.mesh, stage.batch_size)
        feed = self.data.feed(step, end, rows, lambda batch: sharding_lib.to_devices(batch, self.mesh))
        stopping, previous, metrics, shapes = False, {}, {}, set()
        with contextlib.closing(log), contextlib.closing(feed):
            while step < end and not stopping:
                batch, skipped = feed.take(metrics.get("loss"))
                jax.block_until_ready(previous)  # one step may wait behind the one that runs, not more
                previous = metrics
                with _compile_told(stage.name, batch, shapes):
                    state, metrics = train_step(state, batch)
                step += 1
                stopping = preemption is not None and preemption.requested()
                saving = self.checkpoints.is_due(step) or step == end or stopping
                try:
                    log.step(step, metrics, skipped, feed.waited)
                    means = log.means() if saving else {}
                except NotFinite:
                    raise self._not_finite(step) from None
                if saving:
                    self.checkpoints.save(step, state, before + time.perf_counter() - started, means)
        self._say_end(len(shapes))
        params = trees.merge(state.trained, state.frozen)
        jax.block_until_ready(params)
        self.checkpoints.wait()
        best = self.checkpoints.best_step()
        if self.config.checkpoint.best is not None and best is not None:
            where = self.checkpoints.directory / str(best)
            say(f"best {self.config.checkpoint.best} at step {best} of stage {stage.name}, kept in {where}")
        return params, before + time.perf_counter() - started

    def _not_finite(self, step: int) -> RunError:
        self.checkpoints.wait()
        good, where = self.checkpoints.latest_step(), self.checkpoints.directory
        saved = "no checkpoint" if good is None else f"a last good checkpoint, step {good} in {where}"
        return RunError(
            f"stage {self.name!r}: the loss or gradient is not finite at step {step}; "
            f"there is {saved}. Lower the learning rate, or look at the data of these steps."
        )

    def _say_end(self, compiled: int) -> None:
        """Print the numbers of compiled steps, and of skipped and shortened samples."""
        if compiled:
            buckets = len(self.data.buckets)
            say(f"stage {self.name}: the step was compiled for {compiled} of {buckets} buckets")
        if self.data.skipped.count:
            file = self.workdir / "skipped.jsonl"
            say(f"{self.data.skipped.count} samples could not be used; {file} lists them")
        for what, count in self.data.shortened.counts.items():
            say(f"{count} samples were too long and lost {what}; {self.workdir}/overflow.jsonl lists them")

    def _initial_state(self, key: jax.Array, previous: dict | None, optimizer) -> TrainState:
        params = trees.unflatten(self._initial_params(key, previous))
        trained, frozen = trees.split(params, self.is_trained)
        layout = state_lib.state_shardings(self._abstract).opt_state
        opt_state = jax.jit(optimizer.init, out_shardings=layout)(trained)
        return TrainState(
            sharding_lib.place(np.zeros((), np.int32), self._abstract.step), trained, frozen, opt_state
        )

    def _check_copies(self) -> None:
        shapes = self.shapes
        for line in self.stage.copy:
            moves = _moves(line, shapes)
            wrong = [new for old, new in moves if new not in shapes or shapes[new].shape != shapes[old].shape]
            if not moves or wrong:
                raise UserError(
                    f"stage {self.name!r}: copy {line!r} does not fit the parameters: "
                    f"{', '.join(wrong) if wrong else 'its source does not exist'}."
                )

    def _initial_params(self, key: jax.Array, previous: dict | None) -> dict[str, jax.Array]:
        """The previous stage's, else the initial checkpoint's, else fresh ones; then the stage's copies.

        All in the dtypes and the layout of `shapes`; no device ever holds one of them whole.
        """
        source = {path: leaf for path, leaf in trees.flatten(previous or {}).items() if path in self.shapes}
        for path, leaf in source.items():
            if leaf.shape != self.shapes[path].shape:
                raise UserError(
                    f"stage {self.stage.name!r}: parameter {path} has shape {self.shapes[path].shape}, but "
                    f"{leaf.shape} in the stage before; the stages must share their model."
                )
        taken = set(source)
        if self.config.initial is not None:
            lacking = {path: shape for path, shape in self.shapes.items() if path not in source}
            source |= trees.flatten(read_params(Path(self.config.initial), lacking))
        fresh = self.shapes.keys() - source.keys()
        params = init_params(self.model, key, {path: self.shapes[path] for path in fresh}) | source
        for line in self.stage.copy:
            moves = _moves(line, params)
            params |= {new: params[old] for old, new in moves}
            taken |= {new for _, new in moves}
        if source and fresh:
            names = ", ".join(trees.prefixes(fresh, self.shapes))
            say(f"stage {self.stage.name}: new parameters, randomly initialised: {names}")
        # Copies own their memory: the state is donated, and `previous` may still be needed.
        return {
            path: sharding_lib.place(leaf, self.shapes[path]) if path in taken else leaf
            for path, leaf in params.items()
        }


def check_initial(folder: str | None, stages: Sequence[StageRun]) -> None:
    """Check that the initial checkpoint fits, and that no frozen backbone stays randomly initialised.

    Raises:
      UserError: see `check_params`; needed is what no stage trains, apart from the connector.
    """
    shapes = {path: shape for stage in stages for path, shape in stage.shapes.items()}
    trained = {path for stage in stages for path in stage.shapes if stage.is_trained(path)}
    needed = [path for path in shapes if path not in trained and not belongs_to_connector(path)]
    if folder is None and needed:
        raise UserError(
            f"{', '.join(trees.prefixes(needed, shapes))} would stay random, as no stage trains it. "
            "Set config.initial to a checkpoint that holds it (python -m dynfocus_jax.convert makes one)."
        )
    if folder is not None:
        check_params(saved_shapes(Path(folder)), shapes, needed, f"config.initial {folder!r}")


def _moves(line: str, paths) -> list[tuple[str, str]]:
    """(old, new) parameter paths of a copy "destination <- source"."""
    destination, _, source = (part.strip() for part in line.partition("<-"))
    return [(p, destination + p.removeprefix(source)) for p in paths if p.startswith(source + "/")]


# Settings that do not change what is trained, but by rounding: other devices may need others
_SPEED = (
    *("root", "features", "lengths", "cache_gib", "threads", "processes", "timeout", "workers"),
    *("microbatches", "loss_chunk", "remat", "attention"),
)


def _lasting(settings):
    """A part of the configuration without what only concerns speed and memory."""
    if not isinstance(settings, dict):
        return settings
    return {key: _lasting(value) for key, value in settings.items() if key not in _SPEED}


def _print_start(data: StageData, state: TrainState, step: int) -> None:
    def millions(tree):
        return sum(x.size for x in jax.tree.leaves(tree)) / 1e6

    stage, refused = data.stage, len(data.refused)
    say(
        f"stage {stage.name}: {len(data.loader.records)} records"
        + (f" ({refused} refused)" if refused else "")
        + f", {stage.steps} steps of {stage.batch_size} ({data.epochs:.2f} epochs), "
        f"{millions(state.trained):.3f} M parameters trained, {millions(state.frozen):.3f} M frozen"
        + (f", resumed at step {step}" if step else "")
    )


@contextlib.contextmanager
def _compile_told(stage: str, batch: Batch, shapes: set[tuple[int, int]]) -> Iterator[None]:
    """Print how long the block took, which runs a step, when the shape of its batch is new to `shapes`."""
    shape, began = (batch.frames.shape[1], batch.tokens.shape[1]), time.perf_counter()
    yield
    if shape not in shapes:
        shapes.add(shape)
        frames, text = shape
        seconds = time.perf_counter() - began
        say(f"stage {stage}: step for {frames} frames and {text} text tokens compiled in {seconds:.1f} s")
