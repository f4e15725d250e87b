"""The train loop: runs one stage of a configuration from start, or from where it stopped."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from dynfocus_jax import trees
from dynfocus_jax.config import RunError, UserError, to_dict
from dynfocus_jax.data.conversation import TEMPLATES
from dynfocus_jax.data.pipeline import SampleLoader, Skipped, make_dataset
from dynfocus_jax.data.sources import read_records
from dynfocus_jax.models.dynfocus import DynFocus
from dynfocus_jax.parallel import mesh as mesh_lib
from dynfocus_jax.training import optimizer as optimizer_lib
from dynfocus_jax.training.checkpoints import StageCheckpoints
from dynfocus_jax.training.metrics import NotFinite, StageLog
from dynfocus_jax.training.step import TrainState, make_train_step
from dynfocus_jax.weights.model import belongs_to_connector, check_params


def build_model(config: ConfigDict, connector: str) -> DynFocus:
    """The model of a configuration with the connector of a stage."""
    model = config.model.copy_and_resolve_references()
    model.connector.kind = connector
    return DynFocus(FrozenConfigDict(model))


class StageRun:
    """One stage: its data, its optimizer, its checkpoints under `workdir/checkpoints/<name>`.

    Args:
      config: the validated configuration; index: which of its stages.
      tokenizer: of the data; data_root: folder of annotations and media.

    Attributes:
      shapes: {parameter path: shape and dtype}; is_trained: whether the stage trains a path.
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
        self.config, self.stage, self.workdir, self.mesh = config, config.stages[index], workdir, mesh
        self.model = build_model(config, self.stage.connector)
        data = config.data
        self.loader = SampleLoader(
            read_records(data_root / self.stage.annotations, data_root),
            tokenizer,
            TEMPLATES[data.template],
            num_frames=self.stage.num_frames,
            image_size=config.model.vision.image_size,
            max_text=self.stage.max_text,
            max_query=data.max_query,
            max_turns=self.stage.max_turns,
            cache_bytes=int(data.cache_gib * 2**30),
        )
        self.skipped = Skipped(workdir / "skipped.jsonl", max_share=data.max_skip_share)
        self.data = make_dataset(
            self.loader,
            batch_size=self.stage.batch_size // jax.process_count(),
            seed=config.seed + 1000 * index,
            shuffle=True,
            skipped=self.skipped,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=data.threads,
        )
        sample = jax.tree.map(lambda x: x[None], self.loader.padding())
        self._init = lambda key: trees.flatten(self.model.init(key, sample, train=False)["params"])
        self.shapes = jax.eval_shape(self._init, jax.random.key(0))  # {path: shape and dtype}
        self.is_trained = self._check_paths()
        self.checkpoints = StageCheckpoints(
            workdir / "checkpoints" / self.stage.name,
            settings={
                "seed": config.seed,
                "model": to_dict(config.model),
                "data": {key: value for key, value in to_dict(config.data).items() if key not in _SPEED},
                "stage": to_dict(self.stage),
            },
            every=config.checkpoint.every,
            keep=config.checkpoint.keep,
        )

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def finished(self) -> bool:
        """Whether the stage has been trained to its end."""
        return self.checkpoints.latest_step() == self.stage.steps

    def run(self, previous: dict | None, stop_at: int | None = None) -> tuple[dict, float]:
        """Train to the end (or to step `stop_at`, with a checkpoint there).

        Args:
          previous: parameters of the stage before, taken over path by path; None for the first stage.

        Returns:
          The parameters and the seconds spent in this stage, earlier runs of it included.
        """
        started = time.perf_counter()
        stage, key = self.stage, jax.random.key(self.config.seed)
        trained, frozen = trees.split(self._initial_params(key, previous), self.is_trained)
        optimizer = optimizer_lib.make_optimizer(stage, trained)
        state = TrainState(jnp.zeros((), jnp.int32), trained, frozen, optimizer.init(trained))
        state = jax.device_put(state, mesh_lib.replicated(self.mesh))

        batches = iter(self.data)
        before = 0.0
        if self.checkpoints.latest_step() is not None:
            state, before = self.checkpoints.restore(jax.tree.map(_abstract, state), batches)
        step = int(state.step)
        train_step = make_train_step(
            self.model,
            optimizer,
            optimizer_lib.schedule(stage),
            stage,
            jax.random.fold_in(key, 1),
            self.mesh,
        )
        _print_start(stage, state, len(self.loader.records), step)

        log = StageLog(self.workdir / "metrics.jsonl", stage.name, stage.steps, step, self.config.log_every)
        end = stage.steps if stop_at is None else min(stop_at, stage.steps)
        while step < end:
            batch = mesh_lib.to_devices(next(batches), self.mesh)
            state, metrics = train_step(state, batch)
            step += 1
            try:
                log.step(step, metrics, self.skipped.count)
                if self.checkpoints.is_due(step) or step == end:
                    log.check()
            except NotFinite:
                self.checkpoints.wait()
                good, where = self.checkpoints.latest_step(), self.checkpoints.directory
                saved = "no checkpoint" if good is None else f"a last good checkpoint, step {good} in {where}"
                raise RunError(
                    f"stage {stage.name!r}: the loss or gradient is not finite at step {step}; "
                    f"there is {saved}. Lower the learning rate, or look at the data of these steps."
                ) from None
            seconds = before + time.perf_counter() - started
            self.checkpoints.save(step, state, batches, seconds, last=step == end)
        log.close()
        if self.skipped.count:
            print(f"{self.skipped.count} samples could not be used; {self.workdir}/skipped.jsonl lists them")
        params = trees.merge(state.trained, state.frozen)
        jax.block_until_ready(params)
        self.checkpoints.wait()
        return params, before + time.perf_counter() - started

    def _check_paths(self) -> Callable[[str], bool]:
        """Whether the stage's patterns and copies fit its parameters; returns which of them are trained."""
        stage, shapes = self.stage, self.shapes
        where = f"stage {stage.name!r}"
        is_trained = trees.matcher(stage.trainable, list(shapes), f"{where}, trainable")
        trees.matcher([p for p, _ in stage.lr_scale], list(filter(is_trained, shapes)), f"{where}, lr_scale")
        for line in stage.copy:
            moves = _moves(line, shapes)
            wrong = [new for old, new in moves if new not in shapes or shapes[new].shape != shapes[old].shape]
            if not moves or wrong:
                raise UserError(
                    f"{where}: copy {line!r} does not fit the parameters: "
                    f"{', '.join(wrong) if wrong else 'its source does not exist'}."
                )
        return is_trained

    def _initial_params(self, key: jax.Array, previous: dict | None) -> dict:
        """The previous stage's parameters and fresh ones for the rest, overlaid with the stage's copies.

        Trained ones are taken over in the model's `param_dtype`; frozen ones keep what they come in.
        """
        source = {path: leaf for path, leaf in trees.flatten(previous or {}).items() if path in self.shapes}
        for path, leaf in source.items():
            if leaf.shape != self.shapes[path].shape:
                raise UserError(
                    f"stage {self.stage.name!r}: parameter {path} has shape {self.shapes[path].shape}, but "
                    f"{leaf.shape} in the stage before; the stages must share their model."
                )
        fresh = self.shapes.keys() - source.keys()
        init = jax.jit(lambda key: {path: leaf for path, leaf in self._init(key).items() if path in fresh})
        params = init(key) | source
        for line in self.stage.copy:
            params |= {new: params[old] for old, new in _moves(line, params)}
        if source and fresh:
            names = ", ".join(trees.prefixes(fresh, self.shapes))
            print(f"stage {self.stage.name}: not in what it starts from, so from scratch: {names}")
        # Copies own their memory: the state is donated, and `previous` may still be needed.
        return trees.unflatten(
            {
                path: jnp.array(leaf, self.shapes[path].dtype if self.is_trained(path) else leaf.dtype)
                for path, leaf in params.items()
            }
        )


def check_initial(folder: str | None, initial: dict, stages: Sequence[StageRun]) -> None:
    """Whether what training starts from fits the model, and leaves no backbone at random for good.

    Raises:
      UserError: see `check_params`; needed is what no stage trains, apart from the connector.
    """
    shapes = {path: shape for stage in stages for path, shape in stage.shapes.items()}
    trained = {path for stage in stages for path in stage.shapes if stage.is_trained(path)}
    needed = [path for path in shapes if path not in trained and not belongs_to_connector(path)]
    if folder is None and needed:
        raise UserError(
            f"{', '.join(trees.prefixes(needed, shapes))} would stay at random, as no stage trains it; set "
            "config.initial to a checkpoint that holds it (python -m dynfocus_jax.convert makes one)."
        )
    check_params(initial, shapes, needed, f"config.initial {folder!r}")


def _moves(line: str, paths) -> list[tuple[str, str]]:
    """(old, new) parameter paths of a copy "destination <- source"."""
    destination, _, source = (part.strip() for part in line.partition("<-"))
    return [(p, destination + p.removeprefix(source)) for p in paths if p.startswith(source + "/")]


_SPEED = ("cache_gib", "threads", "workers", "root")  # settings of data that do not change what is trained


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _print_start(stage: ConfigDict, state: TrainState, records: int, step: int) -> None:
    def millions(tree):
        return sum(x.size for x in jax.tree.leaves(tree)) / 1e6

    print(
        f"stage {stage.name}: {records} records, {stage.steps} steps of {stage.batch_size}, "
        f"{millions(state.trained):.3f} M parameters trained, {millions(state.frozen):.3f} M frozen"
        + (f", resumed at step {step}" if step else ""),
        flush=True,
    )
