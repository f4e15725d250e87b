"""Strict merge of published weights into our parameter trees, one shard at a time, and the way back."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from dynfocus_jax import trees
from dynfocus_jax.errors import UserError
from dynfocus_jax.models.vit import resize_positions
from dynfocus_jax.published_names import Family
from dynfocus_jax.weights.files import WeightSource, open_weights
from dynfocus_jax.weights.layout import from_published, to_published
from dynfocus_jax.weights.matching import (
    Matching,
    Mismatches,
    Slot,
    collapse_numbers,
    describe_contents,
    detect_families,
    find_family,
    find_slot,
    match_names,
    num_layers,
)
from dynfocus_jax.weights.tables import FAMILIES

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def load_part(
    source: str | Path | WeightSource,
    target: Mapping,
    family: str | None = None,
    *,
    dtype: str | None = None,
    skip: Sequence[str] = (),
    depth: int | None = None,
    families: Mapping[str, Family] = FAMILIES,
    say: Callable[[str], None] = print,
) -> dict:
    """Load the parameters of one part of the model from published weights.

    Args:
      source: a file, a folder or `open_weights(...)`.
      target: the part's parameters, nested dicts of anything with a shape.
      family: a name in `families`; None takes the one that fits the names best.
      dtype: one of `DTYPES` to cast to; None keeps the file's dtype, which must then be the same for all.
      skip: regular expressions of published names to leave out, matched in full.
      depth: layers of the published network, if the target leaves out its last ones.
      families: tables of names; the default has all backbones and connectors of the package.
      say: receives a line for each decision: names that are left out, resized positions, parameters that
        such files never hold.

    Returns:
      Nested dicts of numpy arrays, without parameters that such files never hold or that were skipped.

    Raises:
      UserError: a list of every missing, unexpected and mis-shaped weight.
    """
    merged = merge_part(source, target, family, dtype=dtype, skip=skip, depth=depth, families=families)
    for line in merged.notes:
        say(line)
    return merged.params


@dataclass
class MergedPart:
    """One part of the model, read from published weights.

    Attributes:
      params: nested dicts of numpy arrays.
      family: name of the family that the weights were read as.
      absent: our paths that the source does not hold.
      notes: decisions, as lines for the user.
      used_skips: patterns of `skip` that matched a name.
    """

    params: dict
    family: str
    absent: list[str]
    notes: list[str]
    used_skips: set[str]


def merge_part(
    source: str | Path | WeightSource,
    target: Mapping,
    family: str | None = None,
    *,
    dtype: str | None = None,
    skip: Sequence[str] = (),
    depth: int | None = None,
    families: Mapping[str, Family] = FAMILIES,
    progress: Callable[[int], None] = lambda total: None,
) -> MergedPart:
    """Do the work of `load_part`, and return its decisions as well.

    progress: called with the number of all weights whenever one of them is read.
    """
    weights = source if isinstance(source, WeightSource) else open_weights(source)
    shapes = {path: tuple(leaf.shape) for path, leaf in trees.flatten(target).items()}
    names = weights.names()
    family = family or find_family(weights.where, names, shapes, families)
    table = families[family]
    matching = match_names(table, names, shapes, skip, depth)
    mismatches = matching.mismatches

    arrays: dict[str, np.ndarray] = {}
    dtypes: dict[str, list[str]] = {}  # dtype -> published names
    resized: list[str] = []
    head = None
    for shard in weights.shards():
        for name in shard:
            if name == matching.tied_head:
                head = shard[name]
            if name not in matching.slots:
                continue
            progress(len(matching.slots))
            slot, array = matching.slots[name], shard[name]
            dtypes.setdefault(array.dtype.name, []).append(name)
            if slot.paths == ("position",):
                array = _fit_positions(array, slot, "cls" in shapes, resized)
            if array.shape != slot.published_shape:
                mismatches.shapes.append(f"{name} has {array.shape}, expected {slot.published_shape}")
            if mismatches or array.dtype.name not in DTYPES or (dtype is None and len(dtypes) > 1):
                continue  # the merge will fail; the rest is only read to list all mismatches
            kept = array.dtype if dtype is None else DTYPES[dtype]
            pieces = from_published(slot.rule.layout, array, slot.shape)
            for path, piece in zip(slot.paths, pieces if slot.is_fused else [pieces], strict=True):
                if path not in arrays:
                    arrays[path] = np.empty(shapes[path], kept)
                place = arrays[path] if slot.layer is None else arrays[path][slot.layer]
                np.copyto(place, piece, casting="unsafe")

    _check_dtypes(dtypes, dtype, mismatches)
    if head is not None and not mismatches:
        embedding = arrays["embedding/embedding"]
        if not np.array_equal(head.astype(embedding.dtype), embedding):
            mismatches.others.append(f"{matching.tied_head} differs from the embedding.")
            mismatches.hints.append("Set config.model.language.tied_embeddings to False.")
    if mismatches:
        if table not in detect_families(names):
            mismatches.hints.append(f"{describe_contents(names)}.")
        first = f"{weights.where} does not fit the model as {table.title}:"
        raise UserError("\n  ".join([first, *mismatches.lines()]))
    for path in matching.zeros:
        arrays[path] = np.zeros(shapes[path], next(iter(arrays.values())).dtype)
    notes = _notes(table, matching, resized)
    return MergedPart(trees.unflatten(arrays), family, matching.absent, notes, matching.used_skips)


def _fit_positions(array: np.ndarray, slot: Slot, cls_token: bool, resized: list[str]) -> np.ndarray:
    """Resize position embeddings of another square grid to ours, and add a line about it to `resized`.

    Any other array is returned unchanged.
    """
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


def _check_dtypes(dtypes: Mapping[str, list[str]], dtype: str | None, mismatches: Mismatches) -> None:
    """Add unsupported or mixed dtypes to the mismatches."""
    examples = ", ".join(f"{kind} ({len(names)}, such as {names[0]})" for kind, names in dtypes.items())
    if not dtypes.keys() <= DTYPES.keys():
        mismatches.others.append(
            f"Unsupported dtypes: {examples}, expected {', '.join(DTYPES)} without quantisation."
        )
    elif dtype is None and len(dtypes) > 1:
        mismatches.others.append(f"Several dtypes: {examples}, expected one. Cast all weights with --dtype.")


def _notes(family: Family, matching: Matching, resized: list[str]) -> list[str]:
    """Return the decisions of a merge, as lines for the user."""
    return [
        f"{len(matching.slots)} weights read as {family.title}",
        *resized,
        *(
            f"left out, {reason}: {', '.join(collapse_numbers(names))}"
            for reason, names in matching.left_out.items()
        ),
        *([f"parameters without weights: {', '.join(matching.absent)}"] if matching.absent else []),
    ]


def published_arrays(params: Mapping, table: Family) -> dict[str, np.ndarray]:
    """Return the parameters of one part under the published names of a table, the inverse of `load_part`.

    Arrays share the memory of the parameters where the layout allows it, and may not be contiguous.

    Raises:
      UserError: the table has no name for a parameter.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in trees.flatten(dict(params)).items()}
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    published, covered = {}, set()
    for rule in table.rules:
        layers = range(num_layers(shapes)) if "{layer}" in rule.name else [None]
        for layer in layers:
            slot = find_slot(rule, layer, shapes)
            if slot is None:
                continue
            pieces = [leaves[path] if slot.layer is None else leaves[path][slot.layer] for path in slot.paths]
            array = np.stack(pieces) if slot.is_fused else pieces[0]
            published[rule.name.replace("{layer}", str(layer))] = to_published(rule.layout, array)
            covered |= set(slot.paths)
    rest = [path for path in leaves if path not in covered and not table.is_lacking(path)]
    unnamed = [path for path in rest if path not in table.zeros or np.any(leaves[path])]
    if unnamed:
        raise UserError(f"{table.title} has no published name for {', '.join(unnamed)}.")
    return published
