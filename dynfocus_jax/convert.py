r"""Convert published weights to a checkpoint that training can start from, or export a checkpoint.

    python -m dynfocus_jax.convert --config configs/align_7b.py --output published/eva_vicuna_7b
    python -m dynfocus_jax.convert --config configs/toy.py --config.weights.language=DIR --output params
    python -m dynfocus_jax.convert --config configs/instruct_7b.py --export published/dynfocus \
        --checkpoint runs/instruct_7b/checkpoints/instruct/23843

--output reads the files in config.weights and writes their parameters to a new folder; set config.initial to
that folder to train from it. Each field of config.weights is a file (.safetensors, .bin, .pth, .pt, .gguf),
an index of shards, or a Hugging Face folder. If a file holds several parts of the model, set the field of
each part to it. An empty field (--config.weights.vision=) leaves the part out. Every weight must match a
parameter, and every parameter a weight; config.weights.skip lists published names to ignore. --dtype casts
all weights; bfloat16 halves the memory of frozen ones.

--export writes the parts of --checkpoint under their published names, each to a folder of its own: language
(for AutoModelForCausalLM), vision and text_encoder (Hugging Face names), and connector. Converting them back
gives the same parameters, bit for bit.
"""

import json
from pathlib import Path

from absl import flags

from dynfocus_jax.command import CONFIG_FLAG, run_command
from dynfocus_jax.errors import UserError
from dynfocus_jax.sections import to_dict
from dynfocus_jax.training.checkpoints import read_params, save_params
from dynfocus_jax.validation import validate_model
from dynfocus_jax.weights.conversion import export_model, read_model
from dynfocus_jax.weights.export import atomic_folder

_OUTPUT = flags.DEFINE_string("output", None, "New folder for the converted checkpoint.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Dtype to cast all weights to; by default, the published dtype."
)
_EXPORT = flags.DEFINE_string("export", None, "New folder for the published files of --checkpoint.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Checkpoint to export: WORKDIR/checkpoints/STAGE/STEP, or an earlier --output."
)
_SHARD_GIB = flags.DEFINE_float("shard_gib", 2.0, "Largest size of an exported file, GiB.", lower_bound=1e-9)


def main() -> None:
    if CONFIG_FLAG.value is None:
        raise UserError("--config is missing; set it to a config file such as configs/align_7b.py.")
    if (_OUTPUT.value is None) == (_EXPORT.value is None):
        raise UserError(
            "expected one of --output and --export; use --output to convert published files, or --export to "
            "export a checkpoint."
        )
    if (_EXPORT.value is None) != (_CHECKPOINT.value is None):
        raise UserError("use --export (the folder to write) and --checkpoint (what to export) together.")
    config = CONFIG_FLAG.value
    validate_model(config)
    target = Path(_OUTPUT.value or _EXPORT.value or "").expanduser()
    if target.exists():
        raise UserError(f"{target} already exists; use another folder, or remove this one.")
    if _OUTPUT.value:
        params = read_model(config, _DTYPE.value)
        described = {"weights": to_dict(config.weights), "model": to_dict(config.model)}
        with atomic_folder(target) as folder:
            save_params(folder, params)
            (folder / "convert.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    else:
        params = read_params(Path(_CHECKPOINT.value or "").expanduser())
        with atomic_folder(target) as folder:
            export_model(folder, params, config, int(_SHARD_GIB.value * 2**30))
    print(f"written to {target}")


if __name__ == "__main__":
    run_command(main)
