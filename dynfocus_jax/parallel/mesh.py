"""The device mesh and the layout of batches and state on it."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dynfocus_jax.config import UserError


def data_axis_size(wanted: int) -> int:
    """Devices on the data axis: `wanted`, or all of them for -1."""
    available = jax.device_count()
    if wanted == -1:
        return available
    if wanted < 1 or available % wanted:
        raise UserError(
            f"config.mesh.data is {wanted}, but there are {available} devices; choose -1 or a divisor."
        )
    return wanted


def make_mesh(size: int) -> Mesh:
    """A mesh of `size` devices with the one axis "data"."""
    return jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of state: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The layout of a batch: rows dealt out over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def to_devices(batch, mesh: Mesh):
    """This process's rows of a batch as global arrays."""
    sharding = over_batch(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
