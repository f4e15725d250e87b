"""What every test runs under: the CPU, one cache of compiled programs, a tiny needles benchmark."""

import os
from pathlib import Path

import pytest

# Before JAX is imported, and inherited by the commands that tests start. The workers of pytest-xdist and
# later runs find each other's compiled programs in the cache.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# The programs are small and run a few times: to optimize them takes a third of all the time, and saves none.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()


def pytest_configure():
    """Eight virtual devices for the tests of meshes; the others use the first, commands have one."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    from tests import shapes

    shapes.install()


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A folder in which the tiny needles benchmark has been generated."""
    from dynfocus_jax.data.prepare import prepare
    from tests.tiny import tiny_config

    root = tmp_path_factory.mktemp("data")
    config = tiny_config()
    config.data.root = str(root)
    prepare(config.data)
    return root


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs():
    """Programs of one file are of no use to the next; kept, they make a worker grow to gigabytes."""
    yield
    import jax

    jax.clear_caches()
