"""Checks that stored features match the vision tower of a run, and that the run does not train this tower."""

from collections.abc import Callable, Iterable, Mapping

import jax
from jax.sharding import Mesh

from dynfocus_jax.errors import UserError
from dynfocus_jax.features.store import FeatureStore
from dynfocus_jax.parallel.digest import params_digest
from dynfocus_jax.parallel.processes import print_once
from dynfocus_jax.version import code_version

VISION_PREFIX = "vision/"  # of the parameter paths of the vision tower


def check_vision_frozen(stage: str, paths: Iterable[str], is_trained: Callable[[str], bool]) -> None:
    """Check that a stage does not train the vision tower.

    Args:
      stage: name of the stage, for the error.
      paths: paths of all parameters of the stage.
      is_trained: whether the stage trains the parameter at a path.

    Raises:
      UserError: if the stage trains a parameter of the vision tower.
    """
    trained = [path for path in paths if path.startswith(VISION_PREFIX) and is_trained(path)]
    if trained:
        raise UserError(
            f"stage {stage!r} trains the vision tower ({trained[0]} and {len(trained) - 1} more parameters), "
            "so stored features would be outdated; extract the other stages only, or remove 'vision/.*' from "
            "the trainable of this stage."
        )


def check_vision_weights(features: FeatureStore | None, params: Mapping[str, jax.Array], mesh: Mesh) -> None:
    """Check that stored features were computed by the vision tower of a run.

    Args:
      features: the stored features, or None if the run reads pixels; then there is nothing to check.
      params: parameters by path, on the mesh; those of the vision tower are compared.
      mesh: the mesh of the run.

    Raises:
      UserError: if the features were computed with other weights.
    """
    if features is None or features.weights_digest is None:
        return
    found = params_digest(
        {path: leaf for path, leaf in params.items() if path.startswith(VISION_PREFIX)}, mesh
    )
    if found != features.weights_digest:
        raise UserError(
            f"the features in {features.folder} were computed by another vision tower: the digest of its "
            f"weights is {features.weights_digest}, expected {found}; set config.initial to the checkpoint "
            "that the features were extracted with, or extract again into another folder."
        )
    if features.code != code_version():
        print_once("note: the features were extracted by another version of the code; results may differ")
