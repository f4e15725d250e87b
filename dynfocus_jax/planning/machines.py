"""Machines by name: chips with their published figures, and their devices as compile-only topologies.

A machine is `CHIP:SHAPE`. GPUs: `a100-80gb:8` is one host of 8, `h100:4x8` are 4 hosts of 8. TPUs: the shape
of the slice in chips, `v5p:2x2x4`, `v5e:4x8`.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.planning.quiet import quiet

_INSTALL = "pip install -r requirements-plan.txt, or start the command by bash launch/local.sh --plan"


@dataclass(frozen=True)
class Chip:
    """Published figures of one device, dense and without sparsity.

    Attributes:
      memory: bytes of HBM; usable: the share of it that programs get.
      flops: peak bfloat16 FLOP/s; bandwidth: HBM bytes/s.
      link: bytes/s that it sends to its neighbours: over all of NVLink, or over one ICI link of a TPU.
      network: bytes/s of a device to other hosts (None where the links reach them: a TPU slice).
      wrap: a TPU slice's side in a multiple of which the links close to a ring (None for GPUs).
      dimensions: numbers in a TPU slice's shape.
      target: what XLA has to know of a GPU beyond `_GPU_TARGET`, and its compute capability.
    """

    memory: int
    usable: float
    flops: float
    bandwidth: float
    link: float
    network: float | None = None
    wrap: int | None = None
    dimensions: int = 0
    target: tuple[int, dict[str, float]] | None = None


def _tpu(memory: int, flops: float, bandwidth: float, link: float, wrap: int, dimensions: int) -> Chip:
    # The runtime keeps about 1.5 % of the HBM: the compiler gives 15.75 of v5e's 16 GiB.
    return Chip(memory * 2**30, 0.984, flops, bandwidth, link, wrap=wrap, dimensions=dimensions)


_A100 = {
    "core_count": 108,
    "fpus_per_core": 64,
    "clock_rate_ghz": 1.41,
    "l2_cache_size": 41943040,
    "shared_memory_per_core": 167936,
    "shared_memory_per_block_optin": 166912,
}
_H100 = {
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "l2_cache_size": 52428800,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
}

# NVIDIA's data sheets (SXM modules; NVLink one way; one 200 or 400 Gb/s adapter a GPU, as in DGX machines),
# Google's TPU documentation. 5 % of a GPU are left to the CUDA context and NCCL
# (XLA_PYTHON_CLIENT_MEM_FRACTION=0.95; JAX takes 0.75 unless told).
CHIPS: dict[str, Chip] = {
    "a100-40gb": Chip(42_285_268_992, 0.95, 312e12, 1.555e12, 300e9, 25e9, target=(8, _A100)),
    "a100-80gb": Chip(84_987_740_160, 0.95, 312e12, 2.039e12, 300e9, 25e9, target=(8, _A100)),
    "h100": Chip(84_978_434_048, 0.95, 989e12, 3.352e12, 450e9, 50e9, target=(9, _H100)),
    "h200": Chip(150_110_011_392, 0.95, 989e12, 4.8e12, 450e9, 50e9, target=(9, _H100)),
    "v4": _tpu(32, 275e12, 1.23e12, 45e9, 4, 3),
    "v5p": _tpu(95, 459e12, 2.765e12, 90e9, 4, 3),
    "v5e": _tpu(16, 197e12, 0.819e12, 45e9, 16, 2),
    "v6e": _tpu(32, 918e12, 1.638e12, 90e9, 16, 2),
}

_GPU_TARGET = {
    "shared_memory_per_block": 49152,
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
}


@dataclass(frozen=True)
class Machine:
    """A machine: `name` as given, its chip, and the shape of a TPU slice or (hosts, GPUs a host)."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def is_tpu(self) -> bool:
        return self.chip.target is None

    @property
    def platform(self) -> str:
        return "tpu" if self.is_tpu else "cuda"

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape)

    @property
    def usable_memory(self) -> int:
        """Bytes a device that programs get."""
        return int(self.chip.memory * self.chip.usable)

    def link_bandwidth(self) -> float:
        """Bytes/s that every device can send to its neighbours.

        A side of a TPU slice gives two links where it closes to a ring; else one, which is what the chips at
        its ends have.
        """
        if not self.is_tpu:
            return self.chip.link
        links = sum(2 if side % self.chip.wrap == 0 else 1 for side in self.shape if side > 1)
        return self.chip.link * max(links, 1)


def parse_machine(name: str) -> Machine:
    """The machine of a name such as `a100-80gb:8` or `v5p:2x2x4`.

    Raises:
      UserError: an unknown chip, or a shape that is none of that chip's.
    """
    chip_name, _, shape_text = name.partition(":")
    chip = CHIPS.get(chip_name)
    if chip is None:
        raise UserError(f"machine {name!r} has the unknown chip {chip_name!r}; there are {', '.join(CHIPS)}.")
    shape = tuple(map(int, re.findall(r"\d+", shape_text)))
    valid = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape_text) is not None
    if chip.target is None:
        example = "x".join("224"[-chip.dimensions :])
        if not valid or len(shape) != chip.dimensions:
            raise UserError(
                f"machine {name!r}: the shape of a {chip_name} slice has {chip.dimensions} sides; write for "
                f"example {chip_name}:{example}."
            )
        return Machine(name, chip, shape)
    if not valid or len(shape) > 2:
        raise UserError(
            f"machine {name!r}: write the GPUs of one host, {chip_name}:8, or hosts x GPUs, {chip_name}:2x8."
        )
    return Machine(name, chip, shape if len(shape) == 2 else (1, *shape))


def devices(machine: Machine) -> Sequence[jax.Device]:
    """The machine's devices, for compilation only; no such hardware is needed.

    Raises:
      UserError: there is no slice of that shape.
      RunError: the plugin of the platform is not installed, or does not fit JAX.
    """
    # libtpu keeps a lock for the chips of a machine; only its compiler is used.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        with quiet():
            jax.devices()  # the first that is asked of JAX starts its search for plugins
            found = topologies.get_topology_desc(
                platform=machine.platform, topology_name=machine.name, **_topology(machine)
            ).devices
    except NotImplementedError as error:
        raise RunError(_absent(machine, error)) from None
    except RuntimeError as error:
        if "not installed" in str(error) or "nknown platform" in str(error):
            raise RunError(_absent(machine, error)) from None
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"machine {machine.name!r} is refused by its compiler ({reason}); a slice has whole hosts of 2x2 "
            "chips, or one chip."
        ) from None
    if len(found) != machine.num_devices:
        raise UserError(
            f"machine {machine.name!r} has {len(found)} devices for its compiler, expected "
            f"{machine.num_devices}; choose another shape."
        )
    return found


def _topology(machine: Machine) -> dict:
    """Return the options that the platform's compiler needs."""
    if machine.is_tpu:
        # v4's two cores work as one device, as its runtime has it; later chips have no other way.
        cores = {"chip_config_name": "megacore"} if machine.name.startswith("v4:") else {}
        return cores | ({"chips_per_host_bounds": (1, 1, 1)} if machine.num_devices == 1 else {})
    hosts, gpus = machine.shape
    return {"topology": f"1x{hosts}x{gpus}", "target_config": _target_config(machine.chip)}


def _absent(machine: Machine, error: Exception) -> str:
    what = "libtpu" if machine.is_tpu else "jax-cuda12-plugin"
    reason = " ".join(str(error).split())[:120].rstrip(".")
    return (
        f"machine {machine.name!r} needs the compiler of {what} of the version that goes with jax "
        f"{jax.__version__} ({reason}); {_INSTALL} (neither needs the hardware or a driver)."
    )


def _target_config(chip: Chip) -> str:
    """XLA's GpuTargetConfig as a text proto."""
    major, fields = chip.target
    fields = {
        **_GPU_TARGET,
        **fields,
        "memory_bandwidth": int(chip.bandwidth),
        "device_memory_size": chip.memory,
    }
    lines = "\n".join(f"  {key}: {value}" for key, value in fields.items())
    return (
        f"gpu_device_info {{\n  cuda_compute_capability {{ major: {major} }}\n{lines}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 8 }\n'
    )
