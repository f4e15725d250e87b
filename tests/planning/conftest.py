"""Fixtures of the planning tests."""

import os
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# The compilers for other machines may be installed outside of the environment (launch/local.sh --test). JAX
# searches for plugins at the first use of devices, after all tests have been collected.
PLAN_SITE = os.environ.get("DYNFOCUS_PLAN_SITE")
if PLAN_SITE:
    sys.path.append(PLAN_SITE)


@pytest.fixture(scope="module")
def no_cache():
    """Disable the compilation cache, which stores programs for other machines but cannot load them."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the setting at the first compilation only
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
