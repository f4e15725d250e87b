"""The whole model: its parts from the files that a configuration names, and back to published files."""

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
from dynfocus_jax.weights.merge import Merged, read_part
from dynfocus_jax.weights.settings import check_settings
from dynfocus_jax.weights.tables import FAMILIES


def abstract_params(config: ConfigDict) -> dict:
    """Shapes of all parameters of the model, with the connector of its last stage."""
    init = make_init(build_model(config))
    return trees.unflatten(jax.eval_shape(init, jax.random.key(0)))


def _without_lora(config: ConfigDict) -> ConfigDict:
    """The configuration of the model that published files hold."""
    config = config.copy_and_resolve_references()
    config.model.language.lora.rank = 0
    return config


def belongs_to_connector(path: str) -> bool:
    """Whether a parameter is the connector's; W_q is, though it stands in the text encoder's tree."""
    return path.startswith(("connector/", "text_encoder/query_projection/"))


def check_params(
    held: Mapping, shapes: Mapping[str, jax.ShapeDtypeStruct], needed: Collection[str], where: str
) -> None:
    """Check that parameters fit a model; raise UserError otherwise.

    Which parts a connector has differs between stages and variants: of them only the shapes must fit.

    Args:
      held: {path: array or shape}, possibly of some parts only; shapes: {path: shape} of the model.
      needed: paths that must be there; where: names the checkpoint in the error.

    Raises:
      UserError: a backbone lacks a needed parameter, or holds another one; or a shape differs.
    """
    parts = {path.split("/")[0] for path in shapes}
    extra = [
        path
        for path in held.keys() - shapes.keys()
        if path.split("/")[0] in parts and not belongs_to_connector(path)
    ]
    groups = {
        "it lacks": [path for path in needed if path not in held],
        "the model has no": extra,
        "of another shape are": [p for p in held.keys() & shapes.keys() if held[p].shape != shapes[p].shape],
    }
    wrong = [
        f"{what} {', '.join(trees.prefixes(paths, {*held, *shapes}))}"
        for what, paths in groups.items()
        if paths
    ]
    if wrong:
        raise UserError(f"{where} does not fit config.model: {'; '.join(wrong)}.")


# --- Published files to parameters --------------------------------------------------------------------


def read_model(config: ConfigDict, dtype: str | None) -> dict:
    """The parameters in the files of `config.weights`, nested numpy arrays; prints what was decided.

    dtype: what to cast to; None keeps what every part is published in.

    Raises:
      UserError: a file cannot be read, or does not fit the model exactly.
    """
    named = {part: path for part, path in config.weights.items() if part != "skip" and path}
    if not named:
        raise UserError(
            "config.weights names nothing to convert; add --config.weights.PART=FILE with PART one of "
            f"{', '.join(part for part in config.weights if part != 'skip')}."
        )
    missing = [f"{part} = {path}" for part, path in named.items() if not Path(path).expanduser().exists()]
    if missing:
        raise UserError(
            f"config.weights names files that do not exist: {', '.join(missing)}; download them (the config "
            "or configs/common.py says what they are), or name others with --config.weights.PART=PATH."
        )
    shapes = abstract_params(_without_lora(config))
    params, used = {}, set()
    for part, path in named.items():
        try:
            merged = _read_part(part, path, shapes, config, dtype)
        except UserError as error:
            raise UserError(f"config.weights.{part}: {error}") from None
        for name, read_in in merged.items():
            leaves = {f"{name}/{leaf}": array for leaf, array in trees.flatten(read_in.params).items()}
            params |= leaves
            used |= read_in.skipped
            print(f"{name}: {path}, {_size(leaves)}")
            print("".join(f"  {line}\n" for line in read_in.notes), end="", flush=True)

    unused = [pattern for pattern in config.weights.skip if pattern not in used]
    if unused:
        raise UserError(f"config.weights.skip: {', '.join(map(repr, unused))} matches no published name.")
    every = trees.flatten(shapes).keys()
    rest = every - params.keys()
    lost = [path for path in rest if path.split("/")[0] in named and not belongs_to_connector(path)]
    if lost:
        raise UserError(
            "config.weights.skip leaves out what the model needs: "
            f"{', '.join(trees.prefixes(lost, every))}; skip less."
        )
    if rest:
        names = ", ".join(trees.prefixes(rest, every))
        print(f"not in the checkpoint, so training will initialise them randomly: {names}")
    return trees.unflatten(params)


def _read_part(
    part: str, path: str, shapes: dict, config: ConfigDict, dtype: str | None
) -> dict[str, Merged]:
    """Read a part from a file; with the connector also the text encoder's projection."""
    if part not in shapes:
        raise UserError(
            f"{path!r} is named, but the model has no {part}: its connector reads no text. Leave "
            f"config.weights.{part} out, or choose a connector that does."
        )
    source = open_weights(path)
    if part != "connector":
        check_settings(path, part, config.model[part])
    families: dict[str, tuple[str | None, dict]] = {part: (None, shapes[part])}
    connector = find_connector(stage_section(config).connector.kind)
    own = connector.families(trees.flatten(shapes["connector"]))
    if part == "connector" and "text_encoder" in shapes:
        projection = "query_projection"
        if any(FAMILIES[projection].match(name) for name in source.names()):
            families[f"text_encoder/{projection}"] = (projection, shapes["text_encoder"][projection])
    merged = {}
    for name, (family, target) in families.items():
        with tqdm(unit=" weights", disable=None, leave=False) as bar:

            def progress(total, bar=bar):
                bar.total = total
                bar.update()

            merged[name] = read_part(
                *(source, family, target),
                dtype=dtype,
                skip=config.weights.skip,
                depth=config.model.vision.depth if part == "vision" else None,
                families=own if name == "connector" else FAMILIES,
                progress=progress,
            )
    return merged


def _size(leaves: dict[str, np.ndarray]) -> str:
    kinds = sorted({leaf.dtype.name for leaf in leaves.values()})
    return f"{sum(leaf.size for leaf in leaves.values()) / 1e6:.3f} M parameters, {' and '.join(kinds)}"


# --- Parameters to published files --------------------------------------------------------------------


def export_model(folder: Path, params: dict, config: ConfigDict, shard_bytes: int) -> None:
    """Write a folder a part below `folder`, in files of at most `shard_bytes`; low-rank updates are merged.

    Raises:
      UserError: the parameters are not those of the configuration's model.
    """
    lora, config = config.model.language.lora, _without_lora(config)
    if lora.rank:
        params = merge_lora(params, lora)
    shapes = trees.flatten(abstract_params(config))
    held = {path.split("/")[0] for path in trees.flatten(params) if not belongs_to_connector(path)}
    needed = [path for path in shapes if path.split("/")[0] in held and not belongs_to_connector(path)]
    check_params(trees.flatten(params), shapes, needed, "the checkpoint")
    if "connector" in params or "query_projection" in params.get("text_encoder", {}):
        held.add("connector")
    for part in sorted(held):
        table, count = export_part(folder / part, part, params, config, shard_bytes)
        print(f"{part}: {count} weights as {table.title}", flush=True)
