"""Average pooling and the projector: the same few tokens for every frame."""

from typing import ClassVar

from ml_collections import ConfigDict

from dynfocus_jax.connectors.interface import Connector, ConnectorInputs, VisualTokens
from dynfocus_jax.errors import UserError
from dynfocus_jax.models.projector import PROJECTOR_FIELD, Projector
from dynfocus_jax.ops.pooling import pool_grid
from dynfocus_jax.published_names import Family, Rule, linear
from dynfocus_jax.sections import Field

POOL_FIELD = Field((4, 4), "rows and columns that a frame's patches are average-pooled to, P tokens in all")
PROJECTOR_SHARDING = (
    (r"projector/up/kernel", ("fsdp", "tensor")),  # [C, D]
    (r"projector/down/kernel", ("tensor", "fsdp")),  # [D, D]
    (r"projector/linear/kernel", ("fsdp", None)),  # [C, D]
)
PROJECTOR_NAMES: tuple[Rule, ...] = (  # as in LLaVA
    *linear("model.mm_projector.0", "projector/up"),
    *linear("model.mm_projector.2", "projector/down"),
    *linear("model.mm_projector.linear", "projector/linear"),
)


def check_pool(settings: ConfigDict, model: ConfigDict, where: str) -> None:
    """Check that `pool` divides the grid of patches; raise UserError if not."""
    side = model.vision.image_size // model.vision.patch_size
    pool = tuple(settings.pool)
    if len(pool) != 2 or not all(type(size) is int and size > 0 and side % size == 0 for size in pool):
        raise UserError(
            f"{where}.pool is {pool}, expected two divisors of {side}, the number of patches per side."
        )


class PooledConnector(Connector):
    """P pooled and projected tokens of every frame."""

    FIELDS: ClassVar = {"pool": POOL_FIELD, "projector": PROJECTOR_FIELD}
    SHARDING = PROJECTOR_SHARDING
    PUBLISHED: ClassVar = {
        "mm_projector": Family("connector", "projector (model.mm_projector.*)", r"model\.", PROJECTOR_NAMES)
    }

    @classmethod
    def check(cls, settings: ConfigDict, model: ConfigDict, where: str) -> None:
        check_pool(settings, model, where)

    def setup(self):
        width = self.dimensions.language_width
        self.projector = Projector(self.settings.projector, width, self.dtype, self.param_dtype)

    def length(self, frames: int) -> int:
        return frames * self.settings.pool[0] * self.settings.pool[1]

    def __call__(self, inputs: ConnectorInputs, *, train: bool = False) -> VisualTokens:
        pooled = pool_grid(inputs.features, self.dimensions.grid, self.settings.pool)  # [B, T, P, C]
        return self.pack(self.projector(pooled), inputs)


CONNECTOR = PooledConnector
