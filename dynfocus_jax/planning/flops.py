"""Arithmetic that a traced function asks for: the matrix products of a jaxpr, on all devices together."""

import math
from collections.abc import Iterator

import jax
from jax.extend import core


def count_flops(jaxpr: core.Jaxpr) -> float:
    """FLOPs of the matrix products, 2 a multiply-add; loops of unknown length count one turn.

    What is computed a second time for the backward pass (remat) is in the trace, so it counts as well.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(left[d] for d in contracted)
        elif name == "cond":
            total += max(count_flops(branch.jaxpr) for branch in parameters["branches"])
        else:
            times = parameters["length"] if name == "scan" else 1
            total += times * sum(map(count_flops, _inner(parameters)))
    return total


def _inner(parameters: dict) -> Iterator[core.Jaxpr]:
    for leaf in jax.tree.leaves(list(parameters.values()), is_leaf=_is_jaxpr):
        if isinstance(leaf, core.ClosedJaxpr):
            yield leaf.jaxpr
        elif isinstance(leaf, core.Jaxpr):
            yield leaf


def _is_jaxpr(value) -> bool:
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)
