"""A small model of odd sizes and its parameters."""

import pytest

from dynfocus_jax.weights.parts import abstract_params
from tests.tiny import tiny_config
from tests.weights.published import random_params


def small_config(**fields):
    """The tiny toy as the paper's system: EVA's tower, a Q-Former, grouped-query Llama; `section__field`."""
    config = tiny_config()
    model = config.model
    model.connector.projector = "mlp"
    model.vision.update({"patch_size": 4, "width": 18, "depth": 3, "heads": 3, "mlp_dim": 22})
    model.vision.update({"cls_token": True, "final_norm": False})
    model.text_encoder.update({"width": 10, "depth": 3, "num_queries": 3})
    model.language.update({"depth": 5, "width": 24, "heads": 6, "kv_heads": 3, "head_dim": 6})
    model.dtype = "float32"
    for name, value in fields.items():
        section, field = name.split("__")
        (model.connector if section in model.connector else model)[section][field] = value
    for stage in config.stages:
        stage.copy = ()
    return config


@pytest.fixture(scope="session")
def config():
    return small_config()


@pytest.fixture(scope="session")
def shapes(config):
    """Abstract parameters of the small model."""
    return abstract_params(config)


@pytest.fixture(scope="session")
def params(shapes):
    """Random ones."""
    return random_params(shapes)
