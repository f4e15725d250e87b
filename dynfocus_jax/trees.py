"""Parameter trees by path: nested dicts whose leaves are named "language/blocks/mlp/up/kernel"."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

from flax.traverse_util import flatten_dict, unflatten_dict

from dynfocus_jax.errors import UserError


def flatten(tree: Mapping) -> dict[str, Any]:
    """Convert nested dicts to {"a/b/c": leaf}."""
    return cast(dict[str, Any], flatten_dict(tree, sep="/"))


def unflatten(flat: Mapping[str, Any]) -> dict:
    """Convert {"a/b/c": leaf} to nested dicts."""
    return unflatten_dict(flat, sep="/")


def matcher(patterns: Sequence[str], paths: Sequence[str], where: str) -> Callable[[str], bool]:
    """Return the predicate of the paths that one of the regular expressions matches in full.

    Raises:
      UserError: a pattern matches none of `paths`; the message begins with `where`.
    """
    compiled = [re.compile(pattern) for pattern in patterns]
    for pattern in compiled:
        if not any(pattern.fullmatch(path) for path in paths):
            tops = sorted({"/".join(path.split("/")[:2]) for path in paths})
            raise UserError(
                f"{where}: {pattern.pattern!r} matches no parameter, expected a regular expression over "
                f"paths such as {', '.join(tops)}."
            )
    return lambda path: any(pattern.fullmatch(path) for pattern in compiled)


def prefixes(chosen: Collection[str], paths: Collection[str]) -> list[str]:
    """Return the shortest prefixes that cover all chosen paths and no other of `paths`, sorted."""
    others = {
        path.rsplit("/", n)[0] for path in paths if path not in chosen for n in range(path.count("/") + 1)
    }
    steps = [path.split("/") for path in chosen]
    starts = [["/".join(names[:n]) for n in range(1, len(names) + 1)] for names in steps]
    return sorted({next(start for start in each if start not in others) for each in starts})


def split(tree: Mapping, chosen: Callable[[str], bool]) -> tuple[dict, dict]:
    """Split a tree into the leaves whose paths are chosen, and all others."""
    flat = flatten(tree)
    return (
        unflatten({path: leaf for path, leaf in flat.items() if chosen(path)}),
        unflatten({path: leaf for path, leaf in flat.items() if not chosen(path)}),
    )


def merge(one: Mapping, other: Mapping) -> dict:
    """Merge the two parts that `split` returned."""
    return unflatten(flatten(one) | flatten(other))
