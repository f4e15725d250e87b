"""Conversion of weights between the published layout and ours.

A layout is an einops pattern from the published axes to ours, such as "output input -> input output", or
None for weights that have the same axes in both. Our shape determines the size of every axis.
"""

import math
import re

import einops
import numpy as np


def published_shape(layout: str | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the published shape of a weight that has `shape` in our layout."""
    if layout is None:
        return shape
    published, ours = _sides(layout)
    sizes = _sizes(ours, shape)
    return tuple(math.prod(sizes[axis] for axis in axes) for axes in published)


def from_published(layout: str | None, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a published weight in our layout, where it has `shape`; a view where possible."""
    if layout is None:
        return array
    published, ours = _sides(layout)
    used = {axis for axes in published for axis in axes} - {"1"}
    sizes = {axis: size for axis, size in _sizes(ours, shape).items() if axis in used}
    return einops.rearrange(array, layout, **sizes)


def to_published(layout: str | None, array: np.ndarray) -> np.ndarray:
    """Return one of our weights in the published layout; a view where possible."""
    if layout is None:
        return array
    left, _, right = layout.partition("->")
    sizes = _sizes(_sides(layout)[1], array.shape)
    return einops.rearrange(array, f"{right} -> {left}", **{a: n for a, n in sizes.items() if a != "1"})


def _sides(layout: str) -> tuple[list[list[str]], list[list[str]]]:
    """Return the axes of both sides of a layout; an axis that combines several is a longer list.

    "(head dim) width -> width head dim" gives [[head, dim], [width]] and [[width], [head], [dim]].
    """
    left, _, right = layout.partition("->")

    def axes(side: str) -> list[list[str]]:
        return [(group or single).split() for group, single in re.findall(r"\(([^)]*)\)|(\S+)", side)]

    return axes(left), axes(right)


def _sizes(axes: list[list[str]], shape: tuple[int, ...]) -> dict[str, int]:
    """Return the size of every named axis of our shape.

    The only combined axis on our side is (row column channel), the values of a square RGB patch.
    """
    sizes = {"1": 1}
    for group, size in zip(axes, shape, strict=True):
        if len(group) == 1:
            sizes[group[0]] = size
        else:
            side = math.isqrt(size // 3)
            sizes |= {"row": side, "column": side, "channel": 3}
    return sizes
