"""Machines: their names, devices and link bandwidth."""

import pytest

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.planning import machines
from dynfocus_jax.planning.machines import CHIPS, compile_only_devices, parse_machine


def test_gpus():
    one, many = parse_machine("a100-80gb:8"), parse_machine("h100:4x8")
    assert (one.shape, one.num_devices, one.platform) == ((1, 8), 8, "cuda")
    assert (many.shape, many.num_devices) == ((4, 8), 32)
    assert one.link_bandwidth() == 300e9
    assert one.usable_memory == int(0.95 * CHIPS["a100-80gb"].memory)


@pytest.mark.parametrize(
    ("name", "devices", "links"),
    [
        ("v4:2x2x2", 8, 3),  # no side forms a ring: one link each
        ("v5p:2x2x4", 16, 4),  # the side of 4 forms a ring
        ("v5p:4x4x4", 64, 6),
        ("v5p:1x1x4", 4, 2),
        ("v5e:4x8", 32, 2),  # rings only at 16
        ("v5e:16x16", 256, 4),
        ("v6e:8x8", 64, 2),
    ],
)
def test_tpu_slices(name, devices, links):
    machine = parse_machine(name)
    assert (machine.num_devices, machine.platform) == (devices, "tpu")
    assert machine.link_bandwidth() == links * machine.chip.link


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("a100:8", "unknown chip 'a100', expected one of a100-40gb"),
        ("h100", "invalid shape '', expected a number of GPUs, such as h100:8"),
        ("h100:0", "invalid shape '0', expected a number of GPUs"),
        ("h100:2x2x2", "or hosts x GPUs, such as h100:2x8"),
        ("v5p:16", "'16' of a v5p slice, expected 3 sides in chips, such as v5p:2x2x4"),
        ("v5e:2x2x4", "'2x2x4' of a v5e slice, expected 2 sides in chips, such as v5e:2x4"),
        ("v5e:4x", "'4x' of a v5e slice, expected 2 sides"),
    ],
)
def test_invalid_machines(name, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_machine(name)


@pytest.mark.parametrize("name", ["v4:2x2x2", "v5p:2x2x4", "v5e:1x1", "v6e:8x8", "h200:1", "a100-40gb:2x8"])
def test_devices(name):
    """Each chip is one device, also v4 with its two cores; hosts have eight GPUs."""
    machine = parse_machine(name)
    found = compile_only_devices(machine)
    assert len(found) == machine.num_devices
    if not machine.is_tpu:
        assert {device.process_index for device in found} == set(range(machine.shape[0]))


@pytest.mark.parametrize(
    ("name", "error", "package"),
    [
        ("v5e:4x8", RuntimeError("JAX TPU support not installed; cannot generate TPU topology."), "libtpu"),
        ("h100:8", NotImplementedError("topology not implemented for cuda"), "jax-cuda12-plugin"),
    ],
)
def test_a_missing_plugin(monkeypatch, name, error, package):
    """The errors are those that JAX raises without the packages."""

    def absent(**_):
        raise error

    monkeypatch.setattr(machines.topologies, "get_topology_desc", absent)
    with pytest.raises(
        RunError, match=f"the compiler in {package}, .* is missing .* -r requirements-plan.txt"
    ):
        compile_only_devices(parse_machine(name))
