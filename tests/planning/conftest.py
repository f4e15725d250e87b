"""What the tests of plans run under."""

import os
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# What compiles for other machines may lie apart from the environment (launch/local.sh --test); JAX looks for
# plugins when it is first asked for devices, which is after all tests are collected.
PLAN_SITE = os.environ.get("DYNFOCUS_PLAN_SITE")
if PLAN_SITE:
    sys.path.append(PLAN_SITE)


@pytest.fixture(scope="module")
def no_cache():
    """Programs for other machines are written to the compilation cache, but cannot be read from it."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # what the setting was is remembered from the first compilation on
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
