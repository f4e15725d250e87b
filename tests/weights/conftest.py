"""A small model with unusual sizes, and its parameters."""

import pytest

from dynfocus_jax.weights.conversion import abstract_params
from tests.tiny import tiny_config
from tests.weights.published import random_params


def small_config(**fields):
    """Return a tiny configuration of the paper's system: EVA's tower, a Q-Former and a grouped-query Llama.

    fields: values of `config.model.SECTION.FIELD`, with the keys SECTION__FIELD.
    """
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
    """Shapes of the small model's parameters, nested dicts."""
    return abstract_params(config)


@pytest.fixture(scope="session")
def params(shapes):
    """Random parameters of the small model."""
    return random_params(shapes)
