"""Hugging Face's config.json: checks against our model section, and the file that export writes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynfocus_jax.errors import UserError
from dynfocus_jax.weights.files import gguf_settings

# Hugging Face's field -> ours, for each part
_LANGUAGE = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "eps",
    "tie_word_embeddings": "tied_embeddings",
}
_VISION = {
    "hidden_size": "width",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layer_norm_eps": "eps",
}
_QFORMER = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "max_position_embeddings": "max_text",
    "cross_attention_frequency": "cross_every",
    "layer_norm_eps": "eps",
}
_ROPE = {
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_freq",
    "high_freq_factor": "rope_high_freq",
    "original_max_position_embeddings": "rope_original_length",
}
_ROPE_FIELDS = {"none": (), "linear": ("factor",), "llama3": tuple(_ROPE)}
_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
}
# Settings that the shapes of weights do not show: with a wrong one, weights fit but the output is wrong.
_NOT_IN_SHAPES = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "patch_size",
    "cross_attention_frequency",
    "rms_norm_eps",
    "layer_norm_eps",
    "tie_word_embeddings",
)

# Family -> Hugging Face's model class and model_type
_CLASSES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "clip": ("CLIPVisionModel", "clip_vision_model"),
    "siglip": ("SiglipVisionModel", "siglip_vision_model"),
    "instruct_blip_vision": ("InstructBlipVisionModel", "instructblip_vision_model"),
    "qformer_instruct_blip": ("InstructBlipQFormerModel", "instructblip_qformer"),
}
_FIELDS = {"language": _LANGUAGE, "vision": _VISION, "text_encoder": _QFORMER}


def read_config_json(weights: str | Path, part: str) -> tuple[Path, dict] | None:
    """Return the config.json beside published weights and its section for a part; None if there is none.

    For a GGUF file, return the file itself and the settings in it.

    Args:
      weights: file or folder.
      part: "language", "vision" or "text_encoder".

    Raises:
      UserError: config.json is not a JSON file.
    """
    path = Path(weights).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return (path, gguf_settings(path)) if part == "language" else None
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        raise UserError(f"{file}: not a JSON file. Download it again, or remove it.") from None
    if not isinstance(whole, dict):
        return None
    section = {"language": "text_config", "vision": "vision_config", "text_encoder": "qformer_config"}[part]
    if isinstance(whole.get(section), dict):
        return file, whole[section]
    kind = str(whole.get("model_type", ""))
    fits = {
        "language": "rms_norm_eps" in whole,
        "vision": "vision_model" in kind,
        "text_encoder": "qformer" in kind,
    }
    return (file, whole) if fits[part] else None


def check_config_json(weights: str | Path, part: str, section: Mapping) -> None:
    """Check our settings against the config.json beside published weights, where shapes do not show them.

    Args:
      weights: file or folder.
      part: "language", "vision" or "text_encoder".
      section: the section `config.model.<part>`.

    Raises:
      UserError: a list of all fields that differ.
    """
    found = read_config_json(weights, part)
    if found is None:
        return
    file, published = found
    theirs = {name: published[name] for name in _NOT_IN_SHAPES if published.get(name) is not None}
    theirs = {_FIELDS[part][name]: value for name, value in theirs.items() if name in _FIELDS[part]}
    if part == "language":
        theirs |= _rope_settings(published)
    elif "hidden_act" in published:
        theirs["activation"] = _ACTIVATIONS.get(published["hidden_act"], published["hidden_act"])
    wrong = [
        f"{name} is {section[name]!r}, expected {value!r}"
        for name, value in theirs.items()
        if name in section and not _equal(section[name], value)
    ]
    if wrong:
        raise UserError(
            f"config.model.{part} differs from {file}: {'; '.join(wrong)}. Use the values of the file."
        )


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs


def _rope_settings(published: Mapping) -> dict:
    """Return our RoPE fields from the new (`rope_parameters`) or old (`rope_scaling`) form of config.json."""
    rope = published.get("rope_parameters") or published.get("rope_scaling") or {}
    theta = rope.get("rope_theta", published.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    ours = {} if theta is None else {"rope_theta": theta}
    ours["rope_scaling"] = "none" if kind == "default" else kind
    return ours | {_ROPE[name]: rope[name] for name in _ROPE_FIELDS.get(kind, ()) if name in rope}


def make_config_json(family: str, part: str, section: Mapping, dtype: str, published: Mapping) -> dict:
    """Return the config.json of an exported part.

    Args:
      family: a name in `tables.FAMILIES`.
      part: "language", "vision" or "text_encoder".
      section: the section `config.model.<part>`.
      dtype: dtype of the weights.
      published: section of the source's config.json, for the fields that our configuration does not have.
    """
    architecture, kind = _CLASSES[family]
    settings = {
        "architectures": [architecture],
        "model_type": kind,
        "torch_dtype": dtype,
        **{name: section[ours] for name, ours in _FIELDS[part].items()},
    }
    if part == "language":
        rope = {name: section[_ROPE[name]] for name in _ROPE_FIELDS[section["rope_scaling"]]}
        scaling = section["rope_scaling"].replace("none", "default")
        length = int(section["rope_original_length"] * section["rope_factor"])
        kept = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
        settings |= {
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_theta": section["rope_theta"],
            "rope_scaling": {"rope_type": scaling, **rope} if rope else None,
            "rope_parameters": {"rope_type": scaling, "rope_theta": section["rope_theta"], **rope},
            "max_position_embeddings": length,
            **{name: published[name] for name in kept if name in published},
        }
    elif part == "vision":
        built = section["depth"] + 1 + section["select_layer"]
        names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
        settings |= {"num_hidden_layers": built, "hidden_act": names[section["activation"]]}
    return settings
