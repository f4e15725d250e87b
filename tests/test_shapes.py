"""The run-time check of declared shapes and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynfocus_jax.batch import Batch
from dynfocus_jax.connectors.interface import VisualTokens
from tests.shapes import check_shapes
from tests.tiny import make_sample, stack


def visual(tokens=(2, 5, 3), mask=(2, 5), count=(2,), dtype=jnp.int32):
    return VisualTokens(jnp.zeros(tokens), jnp.zeros(mask, bool), jnp.zeros(count, dtype))


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"dtype": jnp.float32}, "count"),  # another dtype
        ({"mask": (2, 5, 1)}, "mask"),  # another rank
        ({"mask": (2, 4)}, "mask"),  # another L than the tokens
        ({"count": (3,)}, "count"),  # another B
    ],
)
def test_wrong_fields_raise_at_construction(wrong, field):
    check_shapes(visual())
    with pytest.raises(TypeError, match=rf"VisualTokens\.{field} is"):
        visual(**wrong)


def test_batches_are_checked_also_under_jit():
    batch = stack([make_sample(np.random.default_rng(0), 2, 4, 3)])
    with pytest.raises(TypeError, match=r"Batch\.frame_mask"):
        Batch(**batch._asdict() | {"frame_mask": batch.frame_mask[:, :1]})

    @jax.jit
    def shortened(batch):
        return Batch(**batch._asdict() | {"tokens": batch.tokens[:, 1:]})

    with pytest.raises(TypeError, match=r"Batch\.loss_mask"):
        shortened(batch)


def test_samples_and_abstract_batches_are_not_checked():
    sample = make_sample(np.random.default_rng(0), 2, 4, 3)
    sample._replace(length=np.int32(2))
    jax.eval_shape(lambda batch: batch.frames, stack([sample]))
