"""The device mesh: its axes, and its shape from the configuration."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from dynfocus_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")


def mesh_shape(mesh: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """Return the number of devices on each axis, in the order of `AXES`.

    Args:
      mesh: the section `config.mesh`. One axis may be -1, which stands for all remaining devices.
      num_devices: devices of all processes.

    Raises:
      UserError: an axis is unknown, or the product of the axes is not the number of devices.
    """
    unknown = [axis for axis in mesh if axis not in AXES]
    if unknown:
        raise UserError(f"config.mesh: unknown axis {unknown[0]!r}, expected one of {', '.join(AXES)}.")
    shape = {axis: mesh.get(axis, 1) for axis in AXES}
    rest = [axis for axis, size in shape.items() if size == -1]
    if len(rest) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise UserError(f"config.mesh is {shape}, expected sizes of at least 1, and -1 for at most one axis.")
    given = math.prod(size for size in shape.values() if size != -1)
    product = " x ".join(f"{axis} {size}" for axis, size in shape.items() if size != -1)
    if rest and num_devices % given:
        raise UserError(
            f"config.mesh has {product} = {given}, which does not divide {num_devices} devices, so "
            f"{rest[0]} = -1 has no value; use sizes whose product divides {num_devices}."
        )
    if not rest and given != num_devices:
        raise UserError(
            f"config.mesh has {product} = {given} devices, expected {num_devices}; change an axis, or set "
            "one to -1 for all remaining devices."
        )
    return shape | {axis: num_devices // given for axis in rest}


def make_mesh(
    shape: Mapping[str, int],
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm] (jaxlib has no stubs)
) -> Mesh:
    """Return the mesh with a shape from `mesh_shape`.

    devices: devices of the mesh, possibly for compilation only; None means all devices.
    """
    sizes = tuple(shape[axis] for axis in AXES)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
