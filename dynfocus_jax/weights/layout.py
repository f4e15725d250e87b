"""Layouts of weights: einops patterns read in both directions, with every size known from our shape."""

import math
import re

import einops
import numpy as np


def published_shape(layout: str | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The published shape of a weight that has `shape` in our layout."""
    if layout is None:
        return shape
    published, ours = _sides(layout)
    sizes = _sizes(ours, shape)
    return tuple(math.prod(sizes[axis] for axis in axes) for axes in published)


def to_ours(layout: str | None, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A published weight in our layout (a view where possible), `shape` being ours."""
    if layout is None:
        return array
    published, ours = _sides(layout)
    used = {axis for axes in published for axis in axes} - {"1"}
    sizes = {axis: size for axis, size in _sizes(ours, shape).items() if axis in used}
    return einops.rearrange(array, layout, **sizes)


def to_published(layout: str | None, array: np.ndarray) -> np.ndarray:
    """One of our weights in the published layout (a view where possible)."""
    if layout is None:
        return array
    left, _, right = layout.partition("->")
    sizes = _sizes(_sides(layout)[1], array.shape)
    return einops.rearrange(array, f"{right} -> {left}", **{a: n for a, n in sizes.items() if a != "1"})


def _sides(layout: str) -> tuple[list[list[str]], list[list[str]]]:
    """ "(head dim) width -> width head dim" to [[head, dim], [width]] and [[width], [head], [dim]]."""
    left, _, right = layout.partition("->")

    def axes(side: str) -> list[list[str]]:
        return [(group or single).split() for group, single in re.findall(r"\(([^)]*)\)|(\S+)", side)]

    return axes(left), axes(right)


def _sizes(axes: list[list[str]], shape: tuple[int, ...]) -> dict[str, int]:
    """Size of every axis name; a group is the pixels of a square RGB patch."""
    sizes = {"1": 1}
    for group, size in zip(axes, shape, strict=True):
        if len(group) == 1:
            sizes[group[0]] = size
        else:
            side = math.isqrt(size // 3)
            sizes |= {"row": side, "column": side, "channel": 3}
    return sizes
