"""Machines that programs can be compiled for: chips with their published figures, and their devices.

A machine's name is `CHIP:SHAPE`. The shape of GPUs is their number (`a100-80gb:8`: one host of 8), or hosts x
GPUs of a host (`h100:4x8`: 4 hosts of 8). The shape of TPUs is that of the slice in chips: `v5p:2x2x4`,
`v5e:4x8`.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.planning.plugin_messages import suppress_plugin_messages

_INSTALL = "pip install -r requirements-plan.txt, or start the command with bash launch/local.sh --plan"


@dataclass(frozen=True)
class GpuTarget:
    """Properties of a GPU that XLA's compiler needs, besides `_GPU_TARGET`."""

    compute_capability: int  # its major number
    fields: dict[str, float]


@dataclass(frozen=True)
class Chip:
    """Published figures of one device, without sparsity.

    Attributes:
      memory: HBM, bytes.
      usable: share of the HBM that programs can use.
      flops: peak bfloat16 FLOP/s.
      bandwidth: of the HBM, bytes/s.
      link: bytes/s to its neighbours: over all NVLink links of a GPU, or over one ICI link of a TPU.
      network: bytes/s to other hosts; None for TPUs, whose links connect the whole slice.
      wrap: TPU links form a ring along each side of the slice that is a multiple of this; unused for GPUs.
      dimensions: number of sides of a TPU slice; 0 for GPUs.
      target: compiler target of a GPU; None for TPUs.
    """

    memory: int
    usable: float
    flops: float
    bandwidth: float
    link: float
    network: float | None = None
    wrap: int = 1
    dimensions: int = 0
    target: GpuTarget | None = None


def _tpu(memory: int, flops: float, bandwidth: float, link: float, wrap: int, dimensions: int) -> Chip:
    """Return a TPU; `memory` in GiB."""
    # The runtime reserves about 1.5 % of the HBM: the compiler can use 15.75 of v5e's 16 GiB.
    return Chip(memory * 2**30, 0.984, flops, bandwidth, link, wrap=wrap, dimensions=dimensions)


_A100 = GpuTarget(
    8,
    {
        "core_count": 108,
        "fpus_per_core": 64,
        "clock_rate_ghz": 1.41,
        "l2_cache_size": 41943040,
        "shared_memory_per_core": 167936,
        "shared_memory_per_block_optin": 166912,
    },
)
_H100 = GpuTarget(
    9,
    {
        "core_count": 132,
        "fpus_per_core": 128,
        "clock_rate_ghz": 1.98,
        "l2_cache_size": 52428800,
        "shared_memory_per_core": 233472,
        "shared_memory_per_block_optin": 232448,
    },
)

# Sources: NVIDIA's data sheets (SXM modules; NVLink in one direction; one network adapter of 200 or 400 Gb/s
# per GPU, as in DGX machines) and Google's TPU documentation. 5 % of a GPU's memory is left to the CUDA
# context and NCCL (XLA_PYTHON_CLIENT_MEM_FRACTION=0.95; JAX uses 0.75 by default).
CHIPS: dict[str, Chip] = {
    "a100-40gb": Chip(42_285_268_992, 0.95, 312e12, 1.555e12, 300e9, 25e9, target=_A100),
    "a100-80gb": Chip(84_987_740_160, 0.95, 312e12, 2.039e12, 300e9, 25e9, target=_A100),
    "h100": Chip(84_978_434_048, 0.95, 989e12, 3.352e12, 450e9, 50e9, target=_H100),
    "h200": Chip(150_110_011_392, 0.95, 989e12, 4.8e12, 450e9, 50e9, target=_H100),
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
    """A machine of one or several hosts."""

    name: str  # as the user gave it
    chip: Chip
    shape: tuple[int, ...]  # sides of a TPU slice in chips, or (hosts, GPUs of a host)

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
        """Memory of a device that programs can use, bytes."""
        return int(self.chip.memory * self.chip.usable)

    def link_bandwidth(self) -> float:
        """Return the bytes/s that every device can send to its neighbours.

        Along a side of a TPU slice that forms a ring, every chip has two links. Along any other side it
        counts as one, because the chips at the ends have only one.
        """
        if not self.is_tpu:
            return self.chip.link
        links = sum(2 if side % self.chip.wrap == 0 else 1 for side in self.shape if side > 1)
        return self.chip.link * max(links, 1)


def parse_machine(name: str) -> Machine:
    """Return the machine with a name such as `a100-80gb:8` or `v5p:2x2x4`.

    Raises:
      UserError: the chip is unknown, or the shape does not fit it.
    """
    chip_name, _, shape_text = name.partition(":")
    chip = CHIPS.get(chip_name)
    if chip is None:
        raise UserError(f"machine {name!r}: unknown chip {chip_name!r}, expected one of {', '.join(CHIPS)}.")
    shape = tuple(map(int, re.findall(r"\d+", shape_text)))
    valid = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape_text) is not None
    if chip.target is None:
        example = "x".join("224"[-chip.dimensions :])
        if not valid or len(shape) != chip.dimensions:
            raise UserError(
                f"machine {name!r}: invalid shape {shape_text!r} of a {chip_name} slice, expected "
                f"{chip.dimensions} sides in chips, such as {chip_name}:{example}."
            )
        return Machine(name, chip, shape)
    if not valid or len(shape) > 2:
        raise UserError(
            f"machine {name!r}: invalid shape {shape_text!r}, expected a number of GPUs, such as "
            f"{chip_name}:8, or hosts x GPUs, such as {chip_name}:2x8."
        )
    return Machine(name, chip, shape if len(shape) == 2 else (1, *shape))


def compile_only_devices(
    machine: Machine,
) -> Sequence[jax.Device]:  # pyright: ignore[reportInvalidTypeForm] (jaxlib has no stubs)
    """Return the devices of a machine, for compilation only; the hardware need not be present.

    Raises:
      UserError: there is no TPU slice of that shape.
      RunError: the compiler plugin of the platform is not installed, or does not fit JAX.
    """
    # libtpu locks the chips of a host for one process; only its compiler is used here.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        with suppress_plugin_messages():
            jax.devices()  # the first call makes JAX search for plugins
            found = topologies.get_topology_desc(
                platform=machine.platform, topology_name=machine.name, **_topology(machine)
            ).devices
    except NotImplementedError as error:
        raise RunError(_missing_compiler(machine, error)) from None
    except RuntimeError as error:
        if "not installed" in str(error) or "nknown platform" in str(error):
            raise RunError(_missing_compiler(machine, error)) from None
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"machine {machine.name!r}: the compiler rejects the shape ({reason}); use one chip, or whole "
            "hosts of 2x2 chips."
        ) from None
    if len(found) != machine.num_devices:
        raise UserError(
            f"machine {machine.name!r}: the compiler finds {len(found)} devices, expected "
            f"{machine.num_devices}; use another shape."
        )
    return found


def _topology(machine: Machine) -> dict[str, Any]:
    """Return the options that the platform's compiler needs."""
    target = machine.chip.target
    if target is None:
        # The two cores of a v4 chip are used as one device, as its runtime does; later chips always are.
        cores = {"chip_config_name": "megacore"} if machine.name.startswith("v4:") else {}
        return cores | ({"chips_per_host_bounds": (1, 1, 1)} if machine.num_devices == 1 else {})
    hosts, gpus = machine.shape
    return {"topology": f"1x{hosts}x{gpus}", "target_config": _target_config(machine.chip, target)}


def _missing_compiler(machine: Machine, error: Exception) -> str:
    """Return the sentence about a compiler plugin that is missing or does not fit JAX."""
    package = "libtpu" if machine.is_tpu else "jax-cuda12-plugin"
    reason = " ".join(str(error).split())[:120].rstrip(".")
    return (
        f"machine {machine.name!r}: the compiler in {package}, in the version for jax {jax.__version__}, is "
        f"missing ({reason}). Install it with {_INSTALL}; it needs neither the hardware nor a driver."
    )


def _target_config(chip: Chip, target: GpuTarget) -> str:
    """Return XLA's GpuTargetConfig as a text proto."""
    fields = {
        **_GPU_TARGET,
        **target.fields,
        "memory_bandwidth": int(chip.bandwidth),
        "device_memory_size": chip.memory,
    }
    lines = "\n".join(f"  {key}: {value}" for key, value in fields.items())
    major = target.compute_capability
    return (
        f"gpu_device_info {{\n  cuda_compute_capability {{ major: {major} }}\n{lines}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 8 }\n'
    )
