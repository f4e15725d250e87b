"""The frozen vision tower on the mesh."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.errors import UserError
from dynfocus_jax.features.compatibility import VISION_PREFIX
from dynfocus_jax.models.vit import VisionTransformer
from dynfocus_jax.parallel.digest import params_digest
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.parallel.sharding import batch_sharding, local_rows, on_mesh, to_devices
from dynfocus_jax.parameters import sharded_shapes
from dynfocus_jax.training.checkpoints import read_params, saved_shapes
from dynfocus_jax.weights.conversion import check_params


def frame_parallel_mesh(axes: Mapping[str, int], num_devices: int) -> Mesh:
    """Return the mesh of `config.mesh` with its tensor and context axes merged into the data axis.

    The vision tower splits the batch of frames over all axes, so that no two processes hold the same frame.

    Raises:
      UserError: if the axes do not fit the number of devices, see `mesh_shape`.
    """
    shape = mesh_shape(axes, num_devices)
    data = shape["data"] * shape["tensor"] * shape["context"]
    return make_mesh(shape | {"data": data, "tensor": 1, "context": 1})


class VisionTower:
    """Encodes batches of frames on the mesh; all processes call it together.

    Attributes:
      weights_digest: digest of the parameters.
      frames_per_call: number of frames of this process in one call.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, frames_per_device: int):
        """Read the parameters of the vision tower from `config.initial`.

        Args:
          config: the configuration.
          mesh: the mesh that the frames are split over.
          frames_per_device: frames in one call on each device.

        Raises:
          UserError: if `config.initial` is not set, or holds no vision tower that fits `config.model.vision`.
        """
        if config.initial is None:
            raise UserError(
                "config.initial is not set, expected a checkpoint with the vision tower; convert published "
                "weights with python -m dynfocus_jax.convert, and set it to the output."
            )
        shapes = sharded_shapes(config, len(config.stages) - 1, mesh)
        shapes = {path: shape for path, shape in shapes.items() if path.startswith(VISION_PREFIX)}
        initial = Path(config.initial)
        held = {
            path: shape for path, shape in saved_shapes(initial).items() if path.startswith(VISION_PREFIX)
        }
        check_params(held, shapes, list(shapes), f"config.initial {config.initial!r}")
        params = trees.flatten(read_params(initial, shapes))
        self.weights_digest = params_digest(params, mesh)
        self._params = trees.unflatten(
            {path.removeprefix(VISION_PREFIX): leaf for path, leaf in params.items()}
        )
        self._mesh = mesh
        self.frames_per_call = len(local_rows(mesh, frames_per_device * mesh.size))
        size = config.model.vision.image_size
        self._blank = np.zeros((size, size, 3), np.uint8)
        types = {"dtype": config.model.dtype, "param_dtype": config.model.param_dtype}
        model = VisionTransformer(**config.model.vision, **types)

        def encode(
            params: dict, frames: jax.Array
        ) -> Any:  # `apply` is typed as if it could return variables
            with on_mesh(mesh):
                return model.apply({"params": params}, frames, keep_cls=True)

        self._encode = jax.jit(encode, out_shardings=batch_sharding(mesh))

    def start(self, frames: Sequence[np.ndarray]) -> jax.Array:
        """Start encoding frames, without waiting for the result.

        Args:
          frames: at most `frames_per_call` frames of this process, uint8 [H, W, 3] each.

        Returns:
          The features of the frames of all processes, [F, (1 +) N, C], for `fetch`.
        """
        padded = [*frames, *[self._blank] * (self.frames_per_call - len(frames))]
        return self._encode(self._params, to_devices(np.stack(padded), self._mesh))

    def fetch(self, features: jax.Array, count: int) -> np.ndarray:
        """Wait for a call and return the features of this process's first `count` frames.

        Returns:
          [count, (1 +) N, C] in the model's dtype.
        """
        shards = sorted(features.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards])[:count]
