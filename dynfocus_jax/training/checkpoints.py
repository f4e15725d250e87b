"""Checkpoints: of a stage (state, data position and settings), and of parameters alone."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dynfocus_jax import trees
from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.parallel.start import say
from dynfocus_jax.sections import differences
from dynfocus_jax.training.state import TrainState


class StageCheckpoints:
    """The checkpoints of one stage in `directory`. One at step s means that s batches were consumed.

    So its step is the position in the data, with any number of processes. A checkpoint appears under its name
    only when all of it is written: a run that is killed, inside a save too, goes on from the one before.

    settings: JSON-able description of what must not change between runs; a checkpoint made under other
    settings is refused. about: JSON-able and kept with each checkpoint; "code" is the version of the code.
    every: steps between checkpoints; keep: so many of the newest stay; keep_every: and all at multiples of so
    many steps; best: and the one of the smallest ("min") or largest ("max") value of this metric.
    """

    def __init__(
        self,
        directory: Path,
        settings: dict,
        about: dict,
        *,
        every: int,
        keep: int,
        keep_every: int | None = None,
        best: str | None = None,
        best_mode: str = "min",
    ):
        self.directory = directory.absolute()
        self._settings = json.loads(json.dumps(settings))
        self._about = about
        self._every = every
        policies = [preservation_policy.LatestN(keep)]
        if keep_every is not None:
            policies.append(preservation_policy.EveryNSteps(keep_every))
        if best is not None:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics[best],
                    reverse=best_mode == "min",  # the last one of the order is kept
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                best_fn=best and (lambda metrics: metrics[best]),
                best_mode=best_mode,
                cleanup_tmp_directories=True,  # of saves that were killed
            ),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )
        if self.latest_step() is not None:
            self._check_settings()

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the complete checkpoint with the best value of the metric `best`."""
        return self._manager.best_step()

    def is_due(self, step: int) -> bool:
        """Whether `step` is one of those that are saved anyway."""
        return step % self._every == 0

    def save(self, step: int, state: TrainState, seconds: float, metrics: dict[str, float]):
        """Save the state after `step` steps; returns as soon as it is copied, the files are written later.

        seconds: training time so far; metrics: means over the steps since the checkpoint before.

        Raises:
          RunError: this checkpoint, or the one before, cannot be written.
        """
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state._asdict()),
                    meta=ocp.args.JsonSave({"settings": self._settings, "seconds": seconds} | self._about),
                ),
                metrics=metrics,
                force=True,
            )

    def restore(self, abstract: TrainState) -> tuple[TrainState, float]:
        """The newest checkpoint's state, laid out as `abstract` on whatever mesh, and its training seconds.

        Raises:
          UserError: it holds other leaves, shapes or dtypes.
        """
        step = self.latest_step()
        wanted = abstract._asdict()
        changed = differences(_described(self._manager.item_metadata(step)["state"].tree), _described(wanted))
        if changed:
            raise UserError(
                f"{self.directory / str(step)} holds another state ({'; '.join(sorted(changed)[:5])}); "
                "use the configuration that it was started with, or choose another --workdir."
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(wanted),
                meta=ocp.args.JsonRestore(),
            ),
        )
        meta = restored["meta"]
        if meta["code"] != self._about["code"]:
            changed = "; ".join(sorted(differences(meta["code"], self._about["code"])))
            say(f"note: the checkpoint was made by other code ({changed}); results may differ")
        return TrainState(**restored["state"]), meta["seconds"]

    def restore_params(self, like: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> dict:
        """The newest checkpoint's parameters, see `read_params`."""
        return restore_params(self.directory, self.latest_step(), like)

    def seconds(self) -> float:
        """Training seconds up to the newest checkpoint."""
        return self._meta()["seconds"]

    def _meta(self) -> dict:
        meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(self.latest_step(), args=meta)["meta"]

    def _check_settings(self) -> None:
        changed = sorted(differences(self._meta()["settings"], self._settings))
        if changed:
            raise UserError(
                f"{self.directory} was made with other settings ({'; '.join(changed[:5])}); "
                "restore those, or choose another --workdir."
            )

    def wait(self) -> None:
        """Wait for files being written.

        Raises:
          RunError: they cannot be.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:  # a full disk comes as any of them
            good = self.latest_step()
            saved = "there is no complete one" if good is None else f"the last complete one is of step {good}"
            raise RunError(
                f"a checkpoint cannot be written to {self.directory} ({' '.join(str(error).split())[:300]}); "
                f"{saved}. Check free space and permissions, then start again."
            ) from error


class _Manager(ocp.CheckpointManager):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        # Its thread would complain, behind the sentence of a run that is refused and ends at once.
        self._maybe_await_cleanup_tmp_directory()

    def reached_preemption(self, step: int) -> bool:
        """No: `training.preemption` asks, and the service behind it takes one count of steps only."""
        return False


def _described(tree) -> dict[str, str]:
    """{path: "shape dtype"} of the leaves, whatever containers hold them."""
    return {
        "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path): (
            f"{tuple(leaf.shape)} {jnp.dtype(leaf.dtype).name}"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def restore_params(
    directory: Path, step: int, like: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> dict:
    """The parameters of the checkpoint at `step` in a stage's folder, see `read_params`."""
    if not (directory / str(step)).is_dir():
        raise UserError(
            f"{directory} has no checkpoint of step {step}, the end of this stage; finish the training run."
        )
    return read_params(directory / str(step), like)


class _Unchanging(np.ndarray):
    """An array that is not copied before it is written: nothing changes it meanwhile."""

    def __deepcopy__(self, memo):
        return self


def save_params(folder: Path, params: dict) -> None:
    """Write parameters (nested numpy arrays) into a folder, as a checkpoint that `read_params` reads.

    Uncompressed: then writing takes no memory beside the parameters.
    """
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        tree = jax.tree.map(lambda leaf: leaf.view(_Unchanging), params)
        checkpointer.save((folder / "params").absolute(), args=ocp.args.PyTreeSave(tree))


def read_params(folder: Path, like: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> dict:
    """The parameters of a checkpoint: one of training, or one that `convert` made.

    Args:
      folder: `WORKDIR/checkpoints/STAGE/STEP`, or the `--output` of `dynfocus_jax.convert`.
      like: {path: shape, dtype and layout} of those that are wanted; each process reads its share of them.
        What the checkpoint does not hold is left out. None: all, as host arrays, in the dtypes saved.

    Raises:
      UserError: there is no checkpoint.
    """

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        item, saved = _saved(checkpointer, folder)
        how = {}
        for path, (place, _) in saved.items():
            if like is None:
                how[place] = ocp.RestoreArgs(restore_type=np.ndarray)
            elif path in like:
                how[place] = ocp.ArrayRestoreArgs(sharding=like[path].sharding, dtype=like[path].dtype)
        if not how:
            return {}
        wanted = {place: leaf for place, leaf in saved.values() if place in how}
        args = ocp.args.PyTreeRestore(
            trees.unflatten(wanted), restore_args=trees.unflatten(how), partial_restore=True
        )
        restored = trees.flatten(checkpointer.restore(item, args=args))
    return trees.unflatten({path: restored[place] for path, (place, _) in saved.items() if place in restored})


def saved_shapes(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of what `read_params` reads."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        _, saved = _saved(checkpointer, folder)
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, (_, leaf) in saved.items()}


def _saved(checkpointer: ocp.Checkpointer, folder: Path) -> tuple[Path, dict[str, tuple]]:
    """The item that holds a checkpoint's parameters, and {path: (its place in the item, metadata)}."""
    folder = folder.expanduser().absolute()
    training, converted = folder / "state", folder / "params"
    if training.is_dir():
        leaves = trees.flatten(checkpointer.metadata(training).item_metadata.tree)
        split = {place: place.partition("/") for place in leaves}
        return training, {
            path: (place, leaves[place])
            for place, (part, _, path) in split.items()
            if part in ("trained", "frozen")
        }
    if not converted.is_dir():
        raise UserError(
            f"{folder} contains no checkpoint; expected WORKDIR/checkpoints/STAGE/STEP of a training run, or "
            "the --output of python -m dynfocus_jax.convert."
        )
    leaves = trees.flatten(checkpointer.metadata(converted).item_metadata.tree)
    return converted, {path: (path, leaf) for path, leaf in leaves.items()}
