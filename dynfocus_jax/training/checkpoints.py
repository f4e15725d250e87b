"""Checkpoints of a training stage, and of parameters alone."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dynfocus_jax import trees
from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.parallel.processes import print_once
from dynfocus_jax.sections import differences
from dynfocus_jax.training.state import TrainState


class StageCheckpoints:
    """The checkpoints of one stage: state, settings and training time.

    A checkpoint of step s is saved after s batches, so its step is also the position in the data, for any
    number of processes. A checkpoint gets its name only when it is complete: a run that is killed, even while
    it saves, resumes from the checkpoint before.

    Args:
      directory: folder of the stage's checkpoints.
      settings: plain settings that must not change between runs.
      about: plain information that is kept with each checkpoint; "code" is the version of the code.
      every: steps between checkpoints.
      keep: number of newest checkpoints that are kept.
      keep_every: checkpoints at multiples of this number of steps are kept too.
      best: metric whose best checkpoint is kept too.
      best_mode: whether the smallest ("min") or the largest ("max") value of it is best.

    Raises:
      UserError: the newest checkpoint has other settings.
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
        policies: list[preservation_policy.PreservationPolicy] = [preservation_policy.LatestN(keep)]
        if keep_every is not None:
            policies.append(preservation_policy.EveryNSteps(keep_every))
        if best is not None:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics[best],
                    reverse=best_mode == "min",  # the last one in this order is kept
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                best_fn=None if best is None else lambda metrics: metrics[best],
                best_mode=best_mode,
                cleanup_tmp_directories=True,  # of saves that did not finish
            ),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )
        if self.latest_step() is not None:
            self._check_settings()

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Return the step of the complete checkpoint with the best metric, None if there is none."""
        return self._manager.best_step()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is saved at `step`, a multiple of `every`."""
        return step % self._every == 0

    def save(self, step: int, state: TrainState, seconds: float, metrics: dict[str, float]) -> None:
        """Save the state after `step` steps; return when it is copied, before the files are written.

        Args:
          step: completed steps.
          state: the state to save.
          seconds: training time so far.
          metrics: means over the steps since the last checkpoint.

        Raises:
          RunError: this checkpoint or the one before cannot be written.
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
        """Return the state of the newest checkpoint and its training time in seconds.

        The state gets the layout of `abstract`, on a mesh of any shape.

        Raises:
          UserError: the checkpoint has other leaves, shapes or dtypes.
        """
        step = self._require_step()
        wanted = abstract._asdict()
        changed = differences(_described(self._manager.item_metadata(step)["state"].tree), _described(wanted))
        if changed:
            raise UserError(
                f"the state in {self.directory / str(step)} does not fit the configuration "
                f"({'; '.join(sorted(changed)[:5])}); use the configuration that the run was started with, "
                "or another --workdir."
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
            print_once(
                f"note: the checkpoint is from another version of the code ({changed}); results may differ"
            )
        return TrainState(**restored["state"]), meta["seconds"]

    def restore_params(self, like: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> dict:
        """Return the parameters of the newest checkpoint, see `read_params`."""
        return restore_params(self.directory, self._require_step(), like)

    def seconds(self) -> float:
        """Return the training time up to the newest checkpoint, seconds."""
        return self._meta()["seconds"]

    def _meta(self) -> dict:
        meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(self._require_step(), args=meta)["meta"]

    def _require_step(self) -> int:
        step = self.latest_step()
        if step is None:
            raise ValueError(f"{self.directory} has no checkpoint")
        return step

    def _check_settings(self) -> None:
        changed = sorted(differences(self._meta()["settings"], self._settings))
        if changed:
            raise UserError(
                f"the checkpoints in {self.directory} were written with other settings "
                f"({'; '.join(changed[:5])}); restore these settings, or use another --workdir."
            )

    def wait(self) -> None:
        """Wait until all checkpoints are written; raise RunError if one cannot be."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:  # a full disk raises any of them
            good = self.latest_step()
            saved = "there is none yet" if good is None else f"the last one is of step {good}"
            raise RunError(
                f"cannot write a checkpoint to {self.directory} ({' '.join(str(error).split())[:300]}); "
                f"{saved}. Check free space and permissions, then rerun the same command to resume."
            ) from error


class _Manager(ocp.CheckpointManager):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        # Otherwise a thread may print a traceback when a run is refused and the process exits at once
        self._maybe_await_cleanup_tmp_directory()

    def reached_preemption(self, step: int) -> bool:
        """Return False: `training.preemption` asks; the service accepts only one count of steps."""
        return False


def _described(tree) -> dict[str, str]:
    """Return {path: "shape dtype"} of the leaves of a tree of any containers."""
    return {
        "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path): (
            f"{tuple(leaf.shape)} {jnp.dtype(leaf.dtype).name}"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def restore_params(
    directory: Path, step: int, like: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> dict:
    """Return the parameters of the checkpoint of a step in a stage's folder, see `read_params`."""
    if not (directory / str(step)).is_dir():
        raise UserError(
            f"{directory} has no checkpoint of step {step}, the last of this stage; finish the training run."
        )
    return read_params(directory / str(step), like)


class _Unchanging(np.ndarray):
    """An array that Orbax need not copy before it writes, as nothing changes it meanwhile."""

    def __deepcopy__(self, memo):
        return self


def save_params(folder: Path, params: dict) -> None:
    """Write parameters, nested dicts of numpy arrays, to a folder that `read_params` reads.

    They are not compressed, so that writing needs no memory besides the parameters.
    """
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        tree = jax.tree.map(lambda leaf: leaf.view(_Unchanging), params)
        checkpointer.save((folder / "params").absolute(), args=ocp.args.PyTreeSave(tree))


def read_params(folder: Path, like: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> dict:
    """Return the parameters of a checkpoint of training or of `convert`, as nested dicts.

    Args:
      folder: WORKDIR/checkpoints/STAGE/STEP, or the --output of `dynfocus_jax.convert`.
      like: shape, dtype and layout of the parameters to read, {path: shape}; each process reads only the
        parts that its devices hold, and parameters that the checkpoint lacks are left out. None reads all
        parameters, as numpy arrays in their saved dtypes.

    Raises:
      UserError: the folder has no checkpoint.
    """
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        item, saved = _saved(checkpointer, folder)
        restore_args = {}
        for path, (place, _) in saved.items():
            if like is None:
                restore_args[place] = ocp.RestoreArgs(restore_type=np.ndarray)
            elif path in like:
                restore_args[place] = ocp.ArrayRestoreArgs(
                    sharding=like[path].sharding, dtype=like[path].dtype
                )
        if not restore_args:
            return {}
        wanted = {place: leaf for place, leaf in saved.values() if place in restore_args}
        args = ocp.args.PyTreeRestore(
            trees.unflatten(wanted), restore_args=trees.unflatten(restore_args), partial_restore=True
        )
        restored = trees.flatten(checkpointer.restore(item, args=args))
    return trees.unflatten({path: restored[place] for path, (place, _) in saved.items() if place in restored})


def saved_shapes(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of the parameters of a checkpoint, {path: shape}; see `read_params`."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        _, saved = _saved(checkpointer, folder)
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, (_, leaf) in saved.items()}


def _saved(checkpointer: ocp.Checkpointer, folder: Path) -> tuple[Path, dict[str, tuple]]:
    """Return the Orbax item with a checkpoint's parameters, and {path: (path in the item, metadata)}."""
    folder = folder.expanduser().absolute()
    training, converted = folder / "state", folder / "params"
    if training.is_dir():
        leaves = _leaf_metadata(checkpointer, training)
        split = {place: place.partition("/") for place in leaves}
        return training, {
            path: (place, leaves[place])
            for place, (part, _, path) in split.items()
            if part in ("trained", "frozen")
        }
    if not converted.is_dir():
        raise UserError(
            f"{folder} has no checkpoint; use WORKDIR/checkpoints/STAGE/STEP of a training run, or the "
            "--output of python -m dynfocus_jax.convert."
        )
    return converted, {path: (path, leaf) for path, leaf in _leaf_metadata(checkpointer, converted).items()}


def _leaf_metadata(checkpointer: ocp.Checkpointer, item: Path) -> dict[str, Any]:
    metadata: Any = checkpointer.metadata(item).item_metadata
    return trees.flatten(metadata.tree)
