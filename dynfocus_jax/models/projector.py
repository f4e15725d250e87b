"""The projector: features of the vision tower to embeddings of the language model."""

import flax.linen as nn
import jax

from dynfocus_jax.models.layers import Dtype
from dynfocus_jax.sections import Field

PROJECTORS = ("mlp", "linear", "residual")
PROJECTOR_FIELD = Field(
    "mlp",
    'projector f from vision to language width: "mlp" as published, "linear", or "residual", a '
    "linear map plus "
    "an MLP branch that starts at zero",
    choices=PROJECTORS,
)


class Projector(nn.Module):
    """The paper's f: vision width C -> language width D.

    kind: "mlp" Linear(C, D) GELU Linear(D, D), as published; "linear" Linear(C, D); "residual" that linear
    map plus an MLP branch that starts at zero (so that a linearly aligned model can be continued).
    """

    kind: str
    width: int
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(name, **kwargs):
            return nn.Dense(self.width, name=name, dtype=self.dtype, param_dtype=self.param_dtype, **kwargs)

        def mlp(x, **kwargs):
            return dense("down", **kwargs)(jax.nn.gelu(dense("up")(x), approximate=False))

        if self.kind == "mlp":
            return mlp(x)
        out = dense("linear")(x)
        if self.kind == "residual":
            out += mlp(x, kernel_init=nn.initializers.zeros)
        return out
