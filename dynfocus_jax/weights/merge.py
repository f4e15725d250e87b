"""Published weights into our parameter tree and back: strict, one shard at a time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np

from dynfocus_jax import trees
from dynfocus_jax.errors import UserError
from dynfocus_jax.models.vit import resize_positions
from dynfocus_jax.published_names import Family
from dynfocus_jax.weights.files import Source, open_weights
from dynfocus_jax.weights.layout import to_ours, to_published
from dynfocus_jax.weights.matching import (
    Plan,
    Slot,
    collapse,
    find_family,
    held_families,
    looks_like,
    make_plan,
    make_slot,
    num_layers,
)
from dynfocus_jax.weights.tables import FAMILIES

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def load(
    source: str | Path | Source,
    family: str | None = None,
    target: Mapping = MappingProxyType({}),
    dtype: str | None = None,
    skip: Sequence[str] = (),
    depth: int | None = None,
    say: Callable[[str], None] = print,
) -> dict:
    """The parameters of one part of the model from published weights.

    Args:
      source: file, folder or `open_weights(...)`.
      family: a name of `tables.FAMILIES`; None finds the one that fits the names.
      target: the part's parameters, nested dicts of anything with a shape.
      dtype: one of `DTYPES` to cast to; None keeps the file's, which must be one.
      skip: regular expressions of published names to leave out (matched in full).
      depth: layers of the published network, where the target leaves out its last ones.
      say: takes a line for each decision: what was left out, resized, or is never in such files.

    Returns:
      Nested dicts of numpy arrays, without the parameters that such files never hold or that were skipped.

    Raises:
      UserError: every missing, unexpected and mis-shaped weight, all at once.
    """
    merged = read_part(source, family, target, dtype=dtype, skip=skip, depth=depth)
    for line in merged.notes:
        say(line)
    return merged.params


@dataclass
class Merged:
    """A part that was read.

    params: nested arrays; family: what it was read as; absent: our paths that the source does not hold;
    notes: decisions, as lines for the user; skipped: the patterns of `skip` that matched a name.
    """

    params: dict
    family: str
    absent: list[str]
    notes: list[str]
    skipped: set[str]


def read_part(
    source: str | Path | Source,
    family: str | None,
    target: Mapping,
    *,
    dtype: str | None = None,
    skip: Sequence[str] = (),
    depth: int | None = None,
    families: Mapping[str, Family] = FAMILIES,
    progress: Callable[[int], None] = lambda total: None,
) -> Merged:
    """Like `load`, with what was decided; `progress(total)` is called for each of the `total` weights."""
    source = source if isinstance(source, Source) else open_weights(source)
    shapes = {path: tuple(leaf.shape) for path, leaf in trees.flatten(target).items()}
    names = source.names()
    family = family or find_family(source.where, names, shapes, families)
    plan = make_plan(families[family], names, shapes, skip, depth)
    problems = plan.problems

    arrays: dict[str, np.ndarray] = {}
    dtypes: dict[str, list[str]] = {}  # dtype -> published names
    resized: list[str] = []
    head = None
    for shard in source.shards():
        for name in shard:
            if name == plan.tied:
                head = shard[name]
            if name not in plan.slots:
                continue
            progress(len(plan.slots))
            slot, array = plan.slots[name], shard[name]
            dtypes.setdefault(array.dtype.name, []).append(name)
            if slot.paths == ("position",):
                array = _fit_positions(array, slot, "cls" in shapes, resized)
            if array.shape != slot.published_shape:
                problems.shapes.append(f"{name} has {array.shape}, expected {slot.published_shape}")
            if problems or array.dtype.name not in DTYPES or (dtype is None and len(dtypes) > 1):
                continue  # an error in the end; the rest is looked at only
            kept = array.dtype if dtype is None else DTYPES[dtype]
            pieces = to_ours(slot.rule.layout, array, slot.shape)
            for path, piece in zip(slot.paths, pieces if slot.is_fused else [pieces], strict=True):
                if path not in arrays:
                    arrays[path] = np.empty(shapes[path], kept)
                place = arrays[path] if slot.layer is None else arrays[path][slot.layer]
                np.copyto(place, piece, casting="unsafe")

    _check_dtypes(dtypes, dtype, problems.others)
    if head is not None and not problems:
        embedding = arrays["embedding/embedding"]
        if not np.array_equal(head.astype(embedding.dtype), embedding):
            problems.others.append(f"{plan.tied} differs from the embedding.")
            problems.hints.append("Set config.model.language.tied_embeddings to False.")
    if problems:
        table = families[family]
        other = "" if table in held_families(names) else f"; {looks_like(names)}"
        first = f"{source.where} does not fit the model as {table.title}{other}:"
        raise UserError("\n  ".join([first, *problems.lines()]))
    for path in plan.zeros:
        arrays[path] = np.zeros(shapes[path], next(iter(arrays.values())).dtype)
    return Merged(
        trees.unflatten(arrays), family, plan.absent, _notes(families[family], plan, resized), plan.skipped
    )


def _fit_positions(array: np.ndarray, slot: Slot, cls_token: bool, resized: list[str]) -> np.ndarray:
    """A table of positions for our grid, when it is one of another square grid."""
    expected = slot.published_shape
    if array.ndim != len(expected) or array.shape[-1] != expected[-1] or array.shape == expected:
        return array
    table, grid = array.reshape(array.shape[-2:]), math.isqrt(expected[-2] - cls_token)
    try:
        fitted = resize_positions(table, grid, cls_token)
    except ValueError:
        return array
    source = math.isqrt(len(table) - cls_token)
    resized.append(f"positions resized (bicubic) from {source} x {source} to {grid} x {grid} patches")
    return fitted.reshape(expected)


def _check_dtypes(dtypes: Mapping[str, list[str]], dtype: str | None, others: list[str]) -> None:
    examples = ", ".join(f"{kind}: {len(names)} like {names[0]}" for kind, names in dtypes.items())
    if not dtypes.keys() <= DTYPES.keys():
        others.append(f"Weights must be float32, float16 or bfloat16, not quantised: {examples}.")
    elif dtype is None and len(dtypes) > 1:
        others.append(f"Several dtypes ({examples}): choose the one to keep with --dtype.")


def _notes(family: Family, plan: Plan, resized: list[str]) -> list[str]:
    return [
        f"{len(plan.slots)} weights read as {family.title}",
        *resized,
        *(f"left out, {why}: {', '.join(collapse(names))}" for why, names in plan.left_out.items()),
        *([f"not in such files: {', '.join(plan.absent)}"] if plan.absent else []),
    ]


def export(params: Mapping, table: Family) -> dict[str, np.ndarray]:
    """One part's parameters under the published names of a table: what `load` takes apart again.

    Arrays share our memory where the layout allows it (they may then not be contiguous).

    Raises:
      UserError: the table has no place for a parameter.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in trees.flatten(dict(params)).items()}
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    published, covered = {}, set()
    for rule in table.rules:
        layers = range(num_layers(shapes)) if "{layer}" in rule.name else [None]
        for layer in layers:
            slot = make_slot(rule, layer, shapes)
            if slot is None:
                continue
            pieces = [leaves[path] if slot.layer is None else leaves[path][slot.layer] for path in slot.paths]
            array = np.stack(pieces) if slot.is_fused else pieces[0]
            published[rule.name.replace("{layer}", str(layer))] = to_published(rule.layout, array)
            covered |= set(slot.paths)
    rest = [path for path in leaves if path not in covered and not table.is_lacking(path)]
    lost = [path for path in rest if path not in table.zeros or np.any(leaves[path])]
    if lost:
        raise UserError(f"{table.title} has no place for {', '.join(lost)}; choose another family.")
    return published
