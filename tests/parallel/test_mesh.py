"""Shapes of meshes, and the rows of a batch that each process holds."""

import jax
import numpy as np
import pytest

from dynfocus_jax.config import default_config
from dynfocus_jax.errors import UserError
from dynfocus_jax.parallel.mesh import AXES, make_mesh, mesh_shape
from dynfocus_jax.parallel.sharding import batch_sharding, local_rows, num_row_shards, to_devices
from tests.tiny import mesh_of


@pytest.mark.parametrize(
    ("axes", "devices", "expected"),
    [
        ({}, 8, (8, 1, 1, 1)),
        ({"fsdp": 4}, 8, (2, 4, 1, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, 32, (1, 16, 2, 1)),
        ({"data": 2, "fsdp": 3, "tensor": 1, "context": 2}, 12, (2, 3, 1, 2)),
        ({"fsdp": 8}, 8, (1, 8, 1, 1)),
    ],
)
def test_shapes(axes, devices, expected):
    config = default_config()
    config.mesh.update(axes)
    shape = mesh_shape(config.mesh, devices)
    assert tuple(shape.items()) == tuple(zip(AXES, expected, strict=True))


@pytest.mark.parametrize(
    ("axes", "devices", "parts"),
    [
        ({"data": 2, "fsdp": 2}, 8, ("data 2 x fsdp 2 x tensor 1 x context 1 = 4", "expected 8", "-1")),
        ({"data": 4, "fsdp": 4}, 8, ("= 16 devices", "expected 8")),
        ({"fsdp": 3}, 8, ("= 3", "does not divide 8 devices", "data = -1")),
        ({"fsdp": 16}, 8, ("= 16", "does not divide 8 devices")),
        ({"data": -1, "fsdp": -1}, 8, ("-1 for at most one axis",)),
        ({"fsdp": 0}, 8, ("'fsdp': 0", "at least 1")),
        ({"data": 1, "fdsp": 8}, 8, ("unknown axis 'fdsp'", "data, fsdp, tensor, context")),
    ],
)
def test_invalid_shapes(axes, devices, parts):
    with pytest.raises(UserError) as error:
        mesh_shape({"data": -1} | axes, devices)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert all(part in sentence for part in parts), sentence


def test_mesh_of_all_devices():
    mesh = make_mesh(mesh_shape({"data": 2, "fsdp": -1}, 8))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}
    assert set(mesh.devices.flat) == set(jax.devices())
    assert num_row_shards(mesh) == 8


def test_rows_of_a_batch():
    """Rows are in order over data and fsdp; the other axes hold copies of them."""
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    assert local_rows(mesh, 12) == list(range(12))
    batch = to_devices({"x": np.arange(24).reshape(12, 2)}, mesh)["x"]
    np.testing.assert_array_equal(batch, np.arange(24).reshape(12, 2))
    for shard in batch.addressable_shards:
        data, fsdp = (int(place[0]) for place in np.where(mesh.devices == shard.device)[:2])
        first = 3 * (2 * data + fsdp)
        np.testing.assert_array_equal(np.asarray(shard.data)[:, 0] // 2, np.arange(first, first + 3))


class BatchShardingOfOneProcess:
    """The batch sharding of a mesh, as one of several processes sees it."""

    def __init__(self, mesh, devices):
        self.whole, self.devices = batch_sharding(mesh), devices

    def addressable_devices_indices_map(self, shape):
        every = self.whole.devices_indices_map(shape)
        return {device: every[device] for device in self.devices}


@pytest.mark.parametrize(
    ("axes", "processes", "expected"),
    [
        ({"data": 8}, 4, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]),
        ({"data": 2, "tensor": 4}, 2, [list(range(8)), list(range(8, 16))]),
        # Pairs of processes hold the same rows.
        ({"fsdp": 2, "tensor": 4}, 4, [list(range(8))] * 2 + [list(range(8, 16))] * 2),
        ({"context": 8}, 2, [list(range(16))] * 2),
    ],
)
def test_rows_of_each_process(axes, processes, expected, monkeypatch):
    mesh = mesh_of(**axes)
    devices = list(mesh.devices.flat)
    each = len(devices) // processes
    found = []
    for process in range(processes):
        part = BatchShardingOfOneProcess(mesh, devices[process * each : (process + 1) * each])
        with monkeypatch.context() as patch:
            patch.setattr("dynfocus_jax.parallel.sharding.batch_sharding", lambda mesh, part=part: part)
            found.append(local_rows(mesh, 16))
    assert found == expected
