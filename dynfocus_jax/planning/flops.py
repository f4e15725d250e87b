"""FLOPs of the matrix products in a traced function, over all devices together."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core


def count_flops(jaxpr: core.Jaxpr) -> float:
    """Return the FLOPs of all matrix products, 2 per multiply-add.

    A `while` loop counts as one iteration, because its trip count is not in the trace. Values that are
    recomputed in the backward pass (remat) are traced twice, so they count twice.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
            total += 2.0 * math.prod(result) * math.prod(left[d] for d in contracted)
        elif name == "cond":
            total += max(count_flops(branch.jaxpr) for branch in parameters["branches"])
        else:
            iterations = parameters["length"] if name == "scan" else 1
            total += iterations * sum(map(count_flops, _inner_jaxprs(parameters)))
    return total


def _shape(variable: core.Var | core.Literal) -> tuple[int, ...]:
    array: Any = variable.aval  # a ShapedArray, which AbstractValue does not say
    return array.shape


def _inner_jaxprs(parameters: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """Yield the jaxprs among an equation's parameters, such as the body of a loop."""
    for leaf in jax.tree.leaves(list(parameters.values()), is_leaf=_is_jaxpr):
        if isinstance(leaf, core.ClosedJaxpr):
            yield leaf.jaxpr
        elif isinstance(leaf, core.Jaxpr):
            yield leaf


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)
