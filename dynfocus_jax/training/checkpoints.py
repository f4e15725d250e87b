"""Checkpoints: of a stage (state, data position and settings), and of parameters alone."""

import json
from pathlib import Path

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from dynfocus_jax import trees
from dynfocus_jax.config import UserError
from dynfocus_jax.training.step import TrainState


class StageCheckpoints:
    """The checkpoints of one stage in `directory`. One at step s means that s batches were consumed.

    settings: JSON-able description of what must not change between runs; a checkpoint made under other
    settings is refused.
    """

    def __init__(self, directory: Path, settings: dict, *, every: int, keep: int):
        self.directory = directory.absolute()
        self._settings = json.loads(json.dumps(settings))
        self._every = every
        self._manager = ocp.CheckpointManager(
            self.directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )
        if self.latest_step() is not None:
            self._check_settings()

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def is_due(self, step: int) -> bool:
        """Whether `step` is one of those that are saved anyway."""
        return step % self._every == 0

    def save(self, step: int, state: TrainState, data: grain.DatasetIterator, seconds: float, *, last: bool):
        """Save when `step` is due (always when `last`); returns before the files are written."""
        if not (last or self.is_due(step)):
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                data=grain.checkpoint.CheckpointSave(data),
                meta=ocp.args.JsonSave({"settings": self._settings, "seconds": seconds}),
            ),
            force=True,
        )

    def restore(self, abstract: TrainState, data: grain.DatasetIterator) -> tuple[TrainState, float]:
        """The newest checkpoint's state (laid out as `abstract`) and training seconds; moves `data` there."""
        restored = self._manager.restore(
            self.latest_step(),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract._asdict()),
                data=grain.checkpoint.CheckpointRestore(data),
                meta=ocp.args.JsonRestore(),
            ),
        )
        return TrainState(**restored["state"]), restored["meta"]["seconds"]

    def restore_params(self) -> dict:
        """The newest checkpoint's parameters as host arrays."""
        return restore_params(self.directory, self.latest_step())

    def seconds(self) -> float:
        """Training seconds up to the newest checkpoint."""
        return self._meta()["seconds"]

    def _meta(self) -> dict:
        meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(self.latest_step(), args=meta)["meta"]

    def _check_settings(self) -> None:
        changed = sorted(_differences(self._meta()["settings"], self._settings))
        if changed:
            raise UserError(
                f"{self.directory} was made with other settings ({'; '.join(changed[:5])}); "
                "restore those, or choose another --workdir."
            )

    def wait(self) -> None:
        """Wait for files being written."""
        self._manager.wait_until_finished()


def restore_params(directory: Path, step: int) -> dict:
    """The parameters of the checkpoint at `step` in a stage's folder, as host arrays."""
    if not (directory / str(step)).is_dir():
        raise UserError(
            f"{directory} has no checkpoint of step {step}, the end of this stage; finish the training run."
        )
    handlers = {"state": ocp.PyTreeCheckpointHandler()}
    manager = ocp.CheckpointManager(directory.absolute(), item_handlers=handlers)
    saved = manager.item_metadata(step)["state"].tree
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        part: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved[part])
        for part in ("trained", "frozen")
    }
    restore = ocp.args.PyTreeRestore(
        wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    state = manager.restore(step, args=ocp.args.Composite(state=restore))["state"]
    return trees.merge(state["trained"], state["frozen"])


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


def read_params(folder: Path) -> dict:
    """The parameters of a checkpoint as host arrays: one of training, or one that `convert` made.

    Args:
      folder: `WORKDIR/checkpoints/STAGE/STEP`, or the `--output` of `dynfocus_jax.convert`.

    Raises:
      UserError: there is no checkpoint.
    """
    folder = folder.absolute()
    if (folder / "state").is_dir():
        return restore_params(folder.parent, int(folder.name))
    if not (folder / "params").is_dir():
        raise UserError(
            f"{folder} holds no checkpoint; expected WORKDIR/checkpoints/STAGE/STEP of a training run, or "
            "the --output of python -m dynfocus_jax.convert."
        )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = checkpointer.metadata(folder / "params").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        return checkpointer.restore(folder / "params", args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _differences(old, new, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in old.keys() | new.keys()
            for line in _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if old == new else [f"{where}: then {old!r}, now {new!r}"]
