"""A small needles benchmark, generated once for all data tests."""

import pytest

from dynfocus_jax.data.synthetic import generate_needles

COUNTS = {"num_train": 6, "num_validation": 2, "num_heldout": 4, "num_images": 40, "num_sequences": 20}


@pytest.fixture(scope="session")
def needles(tmp_path_factory):
    return generate_needles(tmp_path_factory.mktemp("needles"), workers=1, **COUNTS)
