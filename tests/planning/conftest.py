"""What the tests of plans run under."""

import jax
import pytest


@pytest.fixture(scope="module")
def no_cache():
    """Programs for other machines are written to the compilation cache, but cannot be read from it."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
