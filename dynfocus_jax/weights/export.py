"""Export of parameters as published files: one folder per part, with safetensors and config.json."""

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
from dynfocus_jax.weights.merge import published_arrays
from dynfocus_jax.weights.settings import make_config_json, read_config_json
from dynfocus_jax.weights.tables import FAMILIES


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Create a temporary folder, which is renamed to `target` after the block, or removed if it fails."""
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
      folder: folder to create.
      part: top-level name in `params`. The text encoder's query projection is written with the connector.
      params: the whole parameter tree.
      config: the whole configuration.
      shard_bytes: largest size of a file; more weights are split into several files with an index.

    Returns:
      The table whose published names were used, and the number of weights.
    """
    tree = dict(params.get(part, {}))
    projection = dict(params.get("text_encoder", {})).get("query_projection")
    if part == "text_encoder":
        tree.pop("query_projection", None)
    family = None if part == "connector" else export_family(part, tree)
    table = connector_table(config, tree) if family is None else FAMILIES[family]
    arrays = published_arrays(tree, table)
    if part == "connector" and projection is not None:
        arrays |= published_arrays(projection, FAMILIES["query_projection"])
    dtype = next(iter(arrays.values())).dtype.name
    if family is None:
        section, model = stage_section(config).connector, config.model
        settings = {"model_type": "dynfocus_jax_connector", "torch_dtype": dtype}
        settings |= {"connector": to_dict(section)}
        settings |= {"mm_hidden_size": model.vision.width, "hidden_size": model.language.width}
    else:
        source = config.weights[part]
        found = source and read_config_json(source, part)
        settings = make_config_json(family, part, config.model[part], dtype, found[1] if found else {})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder, arrays, shard_bytes)
    return table, len(arrays)


def merge_lora(params: Mapping, lora: ConfigDict) -> dict:
    """Add the low-rank updates of the language model to its kernels, and remove them from the tree.

    Args:
      params: the whole parameter tree, numpy arrays.
      lora: the section `config.model.language.lora`.

    Returns:
      The tree of a model without LoRA with the same outputs, up to rounding in the kernels' dtype.
    """
    flat = trees.flatten(dict(params))
    for path in [path for path in flat if path.endswith("/lora_a")]:
        layer_path = path.removesuffix("/lora_a")
        down, up, kernel = flat.pop(path), flat.pop(f"{layer_path}/lora_b"), flat[f"{layer_path}/kernel"]
        merged = np.empty_like(kernel)
        for layer, (a, b, base) in enumerate(zip(down, up, kernel, strict=True)):
            update = np.tensordot(a.astype(np.float32), b.astype(np.float32), 1) * (lora.alpha / lora.rank)
            merged[layer] = base.astype(np.float32) + update
        flat[f"{layer_path}/kernel"] = merged
    return trees.unflatten(flat)


def connector_table(config: ConfigDict, tree: Mapping) -> Family:
    """Return the table for exporting the connector of the last stage: the last one that it declares.

    tree: the connector's parameters.
    """
    kind = stage_section(config).connector.kind
    return list(find_connector(kind).families(trees.flatten(dict(tree))).values())[-1]


def export_family(part: str, tree: Mapping) -> str:
    """Return the name of the family whose published names a backbone is exported under.

    Args:
      part: "vision", "text_encoder" or "language".
      tree: the part's parameters.

    Raises:
      UserError: no published family has these parameters.
    """
    paths = trees.flatten(dict(tree)).keys()
    if part == "text_encoder":
        return "qformer_instruct_blip"
    if part == "vision":
        return "clip" if "pre_norm/scale" in paths else "instruct_blip_vision" if "cls" in paths else "siglip"
    bias, norm = "blocks/query/bias" in paths, "blocks/query_norm/scale" in paths
    if bias and norm:
        raise UserError(
            "config.model.language: qkv_bias and qk_norm are both True, but no published family has both; "
            "set one of them to False."
        )
    return "qwen2" if bias else "qwen3" if norm else "llama"


def write_safetensors(folder: Path, arrays: Mapping[str, np.ndarray], shard_bytes: int) -> None:
    """Write `model.safetensors`, or several shards and their index.

    shard_bytes: largest size of a file, unless a single array is larger.
    """
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
        # safetensors needs contiguous arrays; copying one shard at a time keeps the memory low.
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
