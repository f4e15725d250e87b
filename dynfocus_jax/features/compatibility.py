"""The vision tower behind features on disk: it must be the one that a run holds, and nobody may train it."""

from collections.abc import Callable, Iterable, Mapping

import jax
from jax.sharding import Mesh

from dynfocus_jax.errors import UserError
from dynfocus_jax.features.store import FeatureStore
from dynfocus_jax.parallel.digest import digest
from dynfocus_jax.parallel.start import say
from dynfocus_jax.version import code_version

TOWER = "vision/"  # how the paths of its parameters begin


def check_frozen(name: str, paths: Iterable[str], is_trained: Callable[[str], bool]) -> None:
    """Check that a stage does not train the vision tower. paths: all parameters of the stage.

    Raises:
      UserError: it does not.
    """
    trained = [path for path in paths if path.startswith(TOWER) and is_trained(path)]
    if trained:
        raise UserError(
            f"stage {name!r} trains the vision tower ({trained[0]} and {len(trained) - 1} more), so stored "
            "features would be outdated; leave this stage out, or remove 'vision/.*' from its trainable."
        )


def check_tower(features: FeatureStore | None, params: Mapping[str, jax.Array], mesh: Mesh) -> None:
    """Check that features come from the vision tower in the parameters {path: array}; None: no features.

    Raises:
      UserError: they were not.
    """
    if features is None or features.weights is None:
        return
    found = digest({path: leaf for path, leaf in params.items() if path.startswith(TOWER)}, mesh)
    if found != features.weights:
        raise UserError(
            f"the features in {features.folder} were computed by another vision tower (its weights have the "
            f"digest {features.weights}, this run's {found}); set config.initial to what they were extracted "
            "with, or extract again into another folder."
        )
    if features.code != code_version():
        say("note: the features were extracted by other code; results may differ")
