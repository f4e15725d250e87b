"""The frozen vision tower on the mesh."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.errors import UserError
from dynfocus_jax.features.compatibility import TOWER
from dynfocus_jax.models.vit import VisionTransformer
from dynfocus_jax.parallel.digest import digest
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.parallel.sharding import batch_sharding, local_rows, on_mesh, to_devices
from dynfocus_jax.parameters import sharded_shapes
from dynfocus_jax.training.checkpoints import read_params, saved_shapes
from dynfocus_jax.weights.conversion import check_params


def frames_mesh(mesh: Mapping[str, int], num_devices: int) -> Mesh:
    """The mesh of `config.mesh`, but the axes that share a frame's work share frames instead.

    So no two processes have the same frames. Raises UserError as `mesh_shape`.
    """
    shape = mesh_shape(mesh, num_devices)
    data = shape["data"] * shape["tensor"] * shape["context"]
    return make_mesh(shape | {"data": data, "tensor": 1, "context": 1})


class Tower:
    """Turns frames into features, so many at a time on each device; all processes must call it together.

    Attributes:
      weights: digest of the parameters; rows: frames of one call in this process.

    Raises:
      UserError: `config.initial` holds no tower that fits `config.model.vision`.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, frames_per_device: int):
        if config.initial is None:
            raise UserError(
                "config.initial is not set; name the checkpoint whose vision tower is to be run (python -m "
                "dynfocus_jax.convert makes one of published weights)."
            )
        shapes = sharded_shapes(config, len(config.stages) - 1, mesh)
        shapes = {path: shape for path, shape in shapes.items() if path.startswith(TOWER)}
        initial = Path(config.initial)
        held = {path: shape for path, shape in saved_shapes(initial).items() if path.startswith(TOWER)}
        check_params(held, shapes, list(shapes), f"config.initial {config.initial!r}")
        params = trees.flatten(read_params(initial, shapes))
        self.weights = digest(params, mesh)
        self._params = trees.unflatten({path.removeprefix(TOWER): leaf for path, leaf in params.items()})
        self._mesh = mesh
        self.rows = len(local_rows(mesh, frames_per_device * mesh.size))
        size = config.model.vision.image_size
        self._blank = np.zeros((size, size, 3), np.uint8)
        types = {"dtype": config.model.dtype, "param_dtype": config.model.param_dtype}
        tower = VisionTransformer(**config.model.vision, **types)

        def encode(params: dict, frames: jax.Array) -> jax.Array:
            with on_mesh(mesh):
                return tower.apply({"params": params}, frames, keep_cls=True)

        self._encode = jax.jit(encode, out_shardings=batch_sharding(mesh))

    def start(self, frames: Sequence[np.ndarray]) -> jax.Array:
        """Begin to compute the features of at most `rows` frames, uint8 [H, W, 3] each."""
        padded = [*frames, *[self._blank] * (self.rows - len(frames))]
        return self._encode(self._params, to_devices(np.stack(padded), self._mesh))

    def finish(self, features: jax.Array, count: int) -> np.ndarray:
        """Wait for the computation: features [count, (1 +) N, C] in the model's dtype."""
        shards = sorted(features.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards])[:count]
