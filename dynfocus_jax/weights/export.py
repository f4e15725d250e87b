"""Our parameters as published files: a folder a part, with safetensors and config.json."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from dynfocus_jax import trees
from dynfocus_jax.connectors.registry import find_connector
from dynfocus_jax.errors import UserError
from dynfocus_jax.published_names import Family
from dynfocus_jax.sections import to_dict
from dynfocus_jax.video_language_model import stage_section
from dynfocus_jax.weights import merge
from dynfocus_jax.weights.settings import make_settings, read_settings
from dynfocus_jax.weights.tables import FAMILIES


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `target` when the block is through, and else is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def export_part(
    folder: Path, part: str, params: Mapping, config: ConfigDict, shard_bytes: int
) -> tuple[Family, int]:
    """Write one part of the model into a new folder.

    Args:
      folder: to be made; part: top-level name in `params`, which is the whole tree (the text encoder's
        projection goes with the connector); config: the whole configuration.
      shard_bytes: weights beyond this size are split into several files with an index.

    Returns:
      The table of the names that it was written under, and the number of weights.
    """
    tree = dict(params.get(part, {}))
    projection = dict(params.get("text_encoder", {})).get("query_projection")
    if part == "text_encoder":
        tree.pop("query_projection", None)
    name = None if part == "connector" else family_of(part, tree)
    table = connector_table(config, tree) if name is None else FAMILIES[name]
    arrays = merge.export(tree, table)
    if part == "connector" and projection is not None:
        arrays |= merge.export(projection, FAMILIES["query_projection"])
    dtype = next(iter(arrays.values())).dtype.name
    if name is None:
        section, model = stage_section(config).connector, config.model
        settings = {"model_type": "dynfocus_jax_connector", "torch_dtype": dtype}
        settings |= {"connector": to_dict(section)}
        settings |= {"mm_hidden_size": model.vision.width, "hidden_size": model.language.width}
    else:
        source = config.weights[part]
        found = source and read_settings(source, part)
        settings = make_settings(name, part, config.model[part], dtype, found[1] if found else {})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder, arrays, shard_bytes)
    return table, len(arrays)


def merge_lora(params: Mapping, lora: ConfigDict) -> dict:
    """The language model with its low-rank updates added to the kernels, and no updates beside them.

    Args:
      params: the whole tree, numpy arrays; lora: the section `config.model.language.lora`.

    Returns:
      A tree that computes the same without LoRA, to the rounding of the kernels' dtype.
    """
    flat = trees.flatten(dict(params))
    for path in [path for path in flat if path.endswith("/lora_a")]:
        place = path.removesuffix("/lora_a")
        down, up, kernel = flat.pop(path), flat.pop(f"{place}/lora_b"), flat[f"{place}/kernel"]
        merged = np.empty_like(kernel)
        for layer, (a, b, base) in enumerate(zip(down, up, kernel, strict=True)):
            update = np.tensordot(a.astype(np.float32), b.astype(np.float32), 1) * (lora.alpha / lora.rank)
            merged[layer] = base.astype(np.float32) + update
        flat[f"{place}/kernel"] = merged
    return trees.unflatten(flat)


def connector_table(config: ConfigDict, tree: Mapping) -> Family:
    """Return the table of the names that the last stage's connector is written under: its last one."""
    kind = stage_section(config).connector.kind
    return list(find_connector(kind).families(trees.flatten(dict(tree))).values())[-1]


def family_of(part: str, tree: Mapping) -> str:
    """The family under whose names a part is written.

    Raises:
      UserError: no published family has such parameters.
    """
    paths = trees.flatten(dict(tree)).keys()
    if part == "text_encoder":
        return "qformer_instruct_blip"
    if part == "vision":
        return "clip" if "pre_norm/scale" in paths else "instruct_blip_vision" if "cls" in paths else "siglip"
    bias, norm = "blocks/query/bias" in paths, "blocks/query_norm/scale" in paths
    if bias and norm:
        raise UserError("A language model with both qkv_bias and qk_norm matches no published family.")
    return "qwen2" if bias else "qwen3" if norm else "llama"


def write_safetensors(folder: Path, arrays: Mapping[str, np.ndarray], shard_bytes: int) -> None:
    """Write `model.safetensors`, or shards of at most `shard_bytes` (or one array) and their index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in arrays.items():
        if size + array.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = (
            f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        # One copy of one shard at a time: the arrays may be views, the file wants them whole.
        save_file(
            {name: np.ascontiguousarray(array) for name, array in shard.items()},
            folder / file,
            metadata={"format": "pt"},
        )
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(array.nbytes for array in arrays.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
