"""Run-time checks of the declared shapes and dtypes of structures of arrays."""

import typing

import jax
import numpy as np
from beartype.door import is_bearable
from jaxtyping import jaxtyped

from dynfocus_jax.batch import Batch
from dynfocus_jax.connectors.interface import ConnectorInputs, Focus, QuestionWords, Subtitles, VisualTokens
from dynfocus_jax.models.llama import Cache
from dynfocus_jax.serving.programs import ClipSummary, DecodeState
from dynfocus_jax.serving.token_sampling import RowSampling

STRUCTURES = (
    *(Batch, ConnectorInputs, QuestionWords, Subtitles, VisualTokens, Focus),
    *(Cache, DecodeState, ClipSummary, RowSampling),
)


@jaxtyped(typechecker=None)
def check_shapes(structure) -> None:
    """Check every field of a NamedTuple of arrays against its annotation; dimensions must agree.

    Raises:
      TypeError: if a field has another dtype or rank, or two fields disagree on a dimension.
    """
    for name, hint in typing.get_type_hints(type(structure)).items():
        value = getattr(structure, name)
        if not is_bearable(value, hint):
            found = f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else repr(value)
            raise TypeError(f"{type(structure).__name__}.{name} is {found}, expected {hint}")


def install() -> None:
    """Check all STRUCTURES whenever they are constructed from arrays, also while tracing."""
    for structure in STRUCTURES:
        structure.__new__ = _checked(structure.__new__)


def _checked(new):
    def checked(cls, *args, **kwargs):
        structure = new(cls, *args, **kwargs)
        if _is_batch(structure):
            check_shapes(structure)
        return structure

    return checked


def _is_batch(structure) -> bool:
    """Return whether a structure holds arrays with one batch axis.

    JAX also constructs structures of shapes and layouts. Samples have no batch axis; scans add an axis.
    """
    array = np.ndarray if isinstance(structure, Batch) else jax.Array
    leaves = jax.tree.leaves(tuple(structure))
    if not leaves or not all(isinstance(leaf, jax.Array | array) for leaf in leaves):
        return False
    extra_axes = [_extra_axes(value, hint) for value, hint in _annotated_fields(structure)]
    return 0 in set().union(*extra_axes)


def _annotated_fields(structure):
    hints = typing.get_type_hints(type(structure))
    return [(value, hints[name]) for name, value in structure._asdict().items() if hasattr(value, "ndim")]


def _extra_axes(value, hint) -> set[int]:
    alternatives = typing.get_args(hint) or (hint,)
    return {value.ndim - len(each.dims) for each in alternatives if hasattr(each, "dims")}
