"""Conversion of the whole model from the files in `config.weights`, and export to published files."""

from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from dynfocus_jax import trees
from dynfocus_jax.connectors.registry import find_connector
from dynfocus_jax.errors import UserError
from dynfocus_jax.video_language_model import build_model, make_init, stage_section
from dynfocus_jax.weights.export import export_part, merge_lora
from dynfocus_jax.weights.files import open_weights
from dynfocus_jax.weights.merge import MergedPart, merge_part
from dynfocus_jax.weights.settings import check_config_json
from dynfocus_jax.weights.tables import FAMILIES


def abstract_params(config: ConfigDict) -> dict:
    """Return the shapes and dtypes of all parameters, nested dicts; the connector is the last stage's."""
    init = make_init(build_model(config))
    return trees.unflatten(jax.eval_shape(init, jax.random.key(0)))


def _without_lora(config: ConfigDict) -> ConfigDict:
    """Return the configuration without low-rank updates, which published files never hold."""
    plain = config.copy_and_resolve_references()
    plain.model.language.lora.rank = 0
    return plain


def belongs_to_connector(path: str) -> bool:
    """Whether a parameter belongs to the connector. W_q does, although the text encoder's tree holds it."""
    return path.startswith(("connector/", "text_encoder/query_projection/"))


def check_params(
    held: Mapping, shapes: Mapping[str, jax.ShapeDtypeStruct], needed: Collection[str], where: str
) -> None:
    """Check that parameters fit a model.

    A connector may have more or fewer parameters than the model's, as its modules differ between stages and
    variants; only their shapes must agree.

    Args:
      held: {path: array or shape} of the checkpoint, possibly of some parts only.
      shapes: {path: shape} of the model.
      needed: paths that the checkpoint must hold.
      where: name of the checkpoint, for the error.

    Raises:
      UserError: a needed parameter is missing, a backbone has an unknown parameter, or a shape differs.
    """
    parts = {path.split("/")[0] for path in shapes}
    extra = [
        path
        for path in held.keys() - shapes.keys()
        if path.split("/")[0] in parts and not belongs_to_connector(path)
    ]
    groups = {
        "missing": [path for path in needed if path not in held],
        "not in the model": extra,
        "of another shape": [p for p in held.keys() & shapes.keys() if held[p].shape != shapes[p].shape],
    }
    wrong = [
        f"{kind}: {', '.join(trees.prefixes(paths, {*held, *shapes}))}"
        for kind, paths in groups.items()
        if paths
    ]
    if wrong:
        raise UserError(
            f"{where} does not fit config.model ({'; '.join(wrong)}); use another checkpoint, or change "
            "config.model."
        )


# --- Published files to parameters --------------------------------------------------------------------


def read_model(config: ConfigDict, dtype: str | None) -> dict:
    """Return the parameters in the files of `config.weights`, nested numpy arrays, and print all decisions.

    dtype: dtype to cast to; None keeps the dtype in which each part is published.

    Raises:
      UserError: a file cannot be read, or does not fit the model exactly.
    """
    named = {part: path for part, path in config.weights.items() if part != "skip" and path}
    if not named:
        raise UserError(
            "config.weights: no file is set; set at least one of "
            f"{', '.join(f'--config.weights.{part}' for part in config.weights if part != 'skip')}."
        )
    missing = [f"{part}={path}" for part, path in named.items() if not Path(path).expanduser().exists()]
    if missing:
        raise UserError(
            f"config.weights: these files do not exist: {', '.join(missing)}. Download them (the config file "
            "or configs/common.py has their URLs), or set other paths with --config.weights.PART=PATH."
        )
    shapes = abstract_params(_without_lora(config))
    params, used = {}, set()
    for part, path in named.items():
        try:
            merged = _read_file(part, path, shapes, config, dtype)
        except UserError as error:
            raise UserError(f"config.weights.{part}: {error}") from None
        for name, merged_part in merged.items():
            leaves = {f"{name}/{leaf}": array for leaf, array in trees.flatten(merged_part.params).items()}
            params |= leaves
            used |= merged_part.used_skips
            print(f"{name}: {path}, {_describe_size(leaves)}")
            print("".join(f"  {line}\n" for line in merged_part.notes), end="", flush=True)

    unused = [pattern for pattern in config.weights.skip if pattern not in used]
    if unused:
        raise UserError(
            f"config.weights.skip: {', '.join(map(repr, unused))} matches no published name; remove it."
        )
    paths = trees.flatten(shapes).keys()
    rest = paths - params.keys()
    needed = [path for path in rest if path.split("/")[0] in named and not belongs_to_connector(path)]
    if needed:
        raise UserError(
            "config.weights.skip leaves out parameters that the model needs: "
            f"{', '.join(trees.prefixes(needed, paths))}; skip fewer names."
        )
    if rest:
        names = ", ".join(trees.prefixes(rest, paths))
        print(f"not in the checkpoint, so training initialises them randomly: {names}")
    return trees.unflatten(params)


def _read_file(
    part: str, path: str, shapes: dict, config: ConfigDict, dtype: str | None
) -> dict[str, MergedPart]:
    """Read a part from a file; a connector's file may hold the text encoder's query projection as well.

    Returns:
      {path of a subtree: what was read into it}.
    """
    if part not in shapes:
        raise UserError(
            f"{path!r} is set, but the model has no {part}, because its connector uses no text; remove "
            f"config.weights.{part}, or use a connector that uses text."
        )
    source = open_weights(path)
    if part != "connector":
        check_config_json(path, part, config.model[part])
    targets: dict[str, tuple[dict, str | None]] = {part: (shapes[part], None)}  # subtree -> shapes, family
    connector = find_connector(stage_section(config).connector.kind)
    own = connector.families(trees.flatten(shapes["connector"]))
    if part == "connector" and "text_encoder" in shapes:
        projection = "query_projection"
        if any(FAMILIES[projection].match(name) for name in source.names()):
            targets[f"text_encoder/{projection}"] = (shapes["text_encoder"][projection], projection)
    merged = {}
    for name, (target, family) in targets.items():
        with tqdm(unit=" weights", disable=None, leave=False) as bar:

            def progress(total, bar=bar):
                bar.total = total
                bar.update()

            merged[name] = merge_part(
                source,
                target,
                family,
                dtype=dtype,
                skip=config.weights.skip,
                depth=config.model.vision.depth if part == "vision" else None,
                families=own if name == "connector" else FAMILIES,
                progress=progress,
            )
    return merged


def _describe_size(leaves: dict[str, np.ndarray]) -> str:
    dtypes = sorted({leaf.dtype.name for leaf in leaves.values()})
    return f"{sum(leaf.size for leaf in leaves.values()) / 1e6:.3f} M parameters, {' and '.join(dtypes)}"


# --- Parameters to published files --------------------------------------------------------------------


def export_model(folder: Path, params: dict, config: ConfigDict, shard_bytes: int) -> None:
    """Write every part of the model to a folder of its own below `folder`; low-rank updates are merged.

    shard_bytes: largest size of a file.

    Raises:
      UserError: the parameters are not those of the configuration's model.
    """
    lora, plain = config.model.language.lora, _without_lora(config)
    merged = merge_lora(params, lora) if lora.rank else params
    shapes = trees.flatten(abstract_params(plain))
    parts = {path.split("/")[0] for path in trees.flatten(merged) if not belongs_to_connector(path)}
    needed = [path for path in shapes if path.split("/")[0] in parts and not belongs_to_connector(path)]
    check_params(trees.flatten(merged), shapes, needed, "the checkpoint")
    if "connector" in merged or "query_projection" in merged.get("text_encoder", {}):
        parts.add("connector")
    for part in sorted(parts):
        table, count = export_part(folder / part, part, merged, plain, shard_bytes)
        print(f"{part}: {count} weights as {table.title}", flush=True)
