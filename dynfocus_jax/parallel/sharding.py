"""Sharding of parameters, batches and activations on the mesh.

Parameters are split over `fsdp` (and gathered one layer at a time where they are used) and over `tensor`
(heads and hidden units). Batches are split over `data` and `fsdp`. The language model's activations are also
split over `context`, along the sequence.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dynfocus_jax.errors import UserError

_Tree = TypeVar("_Tree")

# Regular expression of a whole parameter path -> mesh axes of its last dimensions. The dimensions before them
# (the axis of stacked layers) are never split. Exactly one rule matches a path.
RULES: tuple[tuple[str, PartitionSpec], ...] = tuple(
    (pattern, PartitionSpec(*spec))
    for pattern, spec in (
        (r".*norm/scale|.*/bias", ()),
        # Language model
        (r"language/embedding/embedding", ("tensor", "fsdp")),  # [V, D]
        (r"language/head/kernel", ("fsdp", "tensor")),  # [D, V]
        (r"language/blocks/(query|key|value)/kernel", ("fsdp", "tensor", None)),  # [D, H, h]
        (r"language/blocks/out/kernel", ("tensor", None, "fsdp")),  # [H, h, D]
        (r"language/blocks/(gate|up)/kernel", ("fsdp", "tensor")),
        (r"language/blocks/down/kernel", ("tensor", "fsdp")),
        (r"language/blocks/(query|key|value|gate|up)/lora_a", ("fsdp", None)),  # [D, rank]
        (r"language/blocks/(query|key|value)/lora_b", (None, "tensor", None)),  # [rank, H, h]
        (r"language/blocks/(gate|up)/lora_b", (None, "tensor")),
        (r"language/blocks/out/lora_a", ("tensor", None, None)),  # [H, h, rank]
        (r"language/blocks/down/lora_a", ("tensor", None)),
        (r"language/blocks/(out|down)/lora_b", (None, "fsdp")),  # [rank, D]
        # Vision tower
        (r"vision/(cls|position)", ()),
        (r"vision/patch_embedding/kernel", (None, "fsdp")),  # [p * p * 3, C]
        (r"vision/blocks/attention/(query|key|value)/kernel", ("fsdp", "tensor", None)),  # [C, H, h]
        (r"vision/blocks/attention/out/kernel", ("tensor", None, "fsdp")),
        (r"vision/blocks/mlp/up/kernel", ("fsdp", "tensor")),
        (r"vision/blocks/mlp/down/kernel", ("tensor", "fsdp")),
        # Text encoder; it has too few heads to split them
        (r"text_encoder/queries", ()),
        (r"text_encoder/(word|position)_embedding/embedding", (None, "fsdp")),
        (r"text_encoder/blocks_\d+/(cross_)?attention/(query|key|value)/kernel", ("fsdp", None, None)),
        (r"text_encoder/blocks_\d+/(cross_)?attention/out/kernel", (None, None, "fsdp")),
        (r"text_encoder/blocks_\d+/(query|text)_mlp/up/kernel", ("fsdp", None)),
        (r"text_encoder/blocks_\d+/(query|text)_mlp/down/kernel", (None, "fsdp")),
        (r"text_encoder/query_projection/kernel", ("fsdp", None)),
    )
)

# Name of an activation's dimension -> the mesh axes that split it
LOGICAL_AXES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "batch": ("data", "fsdp"),
    "frames": ("data", "fsdp"),  # of all samples, one after the other
    "sequence": ("context",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
}


# --- Parameters ---------------------------------------------------------------------------------------


def param_shardings(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
    connector_rules: Sequence[tuple[str, tuple[str | None, ...]]] = (),
) -> dict[str, NamedSharding]:
    """Return the sharding of every parameter.

    Args:
      shapes: {path: shape}.
      mesh: the device mesh.
      connector_rules: rules of a connector (`Connector.SHARDING`); its other parameters are replicated.

    Raises:
      UserError: no rule in `RULES` matches a path, or a mesh axis does not divide a dimension that it splits.
    """
    own = tuple((f"connector/{pattern}", PartitionSpec(*spec)) for pattern, spec in connector_rules)
    rules = (*RULES, *own, ("connector/.*", PartitionSpec()))
    return {path: NamedSharding(mesh, _spec(path, leaf.shape, mesh, rules)) for path, leaf in shapes.items()}


def _spec(
    path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]]
) -> PartitionSpec:
    """Return the mesh axes of all dimensions of a parameter, by the first rule that matches its path."""
    rule = next((spec for pattern, spec in rules if re.fullmatch(pattern, path)), None)
    if rule is None or len(rule) > len(shape):
        raise UserError(
            f"parameter {path} of shape {shape} has no sharding rule; add one to RULES in "
            "dynfocus_jax/parallel/sharding.py."
        )
    if not rule:
        return rule
    spec = (None,) * (len(shape) - len(rule)) + tuple(rule)
    for size, axis in zip(shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"config.mesh.{axis} is {mesh.shape[axis]}, which does not divide {size}, a dimension of "
                f"parameter {path} of shape {shape}; use a divisor of {size}."
            )
    return PartitionSpec(*spec)


def place_like(leaf: np.ndarray | jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Return a copy of an array with the dtype and sharding of `like`; no device ever holds all of it."""
    if isinstance(leaf, jax.Array) and leaf.sharding.device_set == like.sharding.device_set:
        return jax.device_put(jnp.array(leaf, like.dtype), like.sharding)
    return jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: np.array(leaf[index], like.dtype)
    )


# --- Batches ------------------------------------------------------------------------------------------


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding with a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_AXES["batch"]))


def num_row_shards(mesh: Mesh) -> int:
    """Return the number of shards that the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Return the rows of a global batch that the devices of this process hold, in ascending order."""
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted(
        {row for index in held if index for rows in index for row in range(*rows.indices(batch_size))}
    )


def to_devices(batch: _Tree, mesh: Mesh) -> _Tree:
    """Return a global batch, given the rows that this process holds (`local_rows`)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


# --- Activations --------------------------------------------------------------------------------------


def on_mesh(mesh: Mesh) -> AbstractContextManager:
    """Return the context in which `shard` uses this mesh; enter it inside the function that jit traces."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def num_shards(name: str | None) -> int:
    """Return the number of shards of an activation's dimension with this name; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return int(np.prod([shape.get(axis, 1) for axis in _axes(name)], dtype=int))


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain the sharding of an activation by the names of its dimensions.

    A dimension that its mesh axes do not divide is not split, such as the sequence of a single decoded token.
    Without a mesh of several devices, `x` is returned unchanged.

    Args:
      x: the activation.
      *names: a key of `LOGICAL_AXES` for each dimension; None for one that is not split.

    Raises:
      ValueError: a name is unknown, or the number of names is not the number of dimensions.
    """
    axes = [_axes(name) for name in names]
    if len(names) != x.ndim:
        raise ValueError(f"shard: {len(names)} names {names} for an array of shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = [
        axes or None if size % num_shards(name) == 0 else None
        for size, name, axes in zip(x.shape, names, axes, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _axes(name: str | None) -> tuple[str, ...]:
    if name not in LOGICAL_AXES:
        known = ", ".join(repr(key) for key in LOGICAL_AXES if key)
        raise ValueError(f"shard: the name {name!r} is unknown; expected one of {known}, or None")
    return LOGICAL_AXES[name]
