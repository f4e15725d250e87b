r"""Published weights to a checkpoint that training starts from, and back.

    python -m dynfocus_jax.convert --config configs/align_7b.py --output published/eva_vicuna_7b
    python -m dynfocus_jax.convert --config configs/toy.py --config.weights.language=DIR --output params
    python -m dynfocus_jax.convert --config configs/instruct_7b.py --export published/dynfocus \
        --checkpoint runs/instruct_7b/checkpoints/instruct/23843

The first form reads the files that config.weights names and writes their parameters to --output, for
config.initial. Each of them may be a file (.safetensors, .bin, .pth, .pt, .gguf), an index of shards, or a
Hugging Face folder; one that holds several parts of the model may be named for each, and an empty name
(--config.weights.vision=) leaves a part out. Every weight must have its place and every parameter its weight;
config.weights.skip lists published names to leave out. --dtype casts them (bfloat16 halves the memory of what
is not trained).

The last form writes the parts of a checkpoint with published names below --export: language (a folder for
AutoModelForCausalLM), vision and text_encoder (Hugging Face names), connector. They convert back bit for bit.
"""

import json
from pathlib import Path

from absl import flags

from dynfocus_jax.command import CONFIG_FLAG, run_command
from dynfocus_jax.errors import UserError
from dynfocus_jax.sections import to_dict
from dynfocus_jax.training.checkpoints import read_params, save_params
from dynfocus_jax.validation import validate_model
from dynfocus_jax.weights.export import new_folder
from dynfocus_jax.weights.parts import export_model, read_model

_OUTPUT = flags.DEFINE_string("output", None, "Folder to make for the converted checkpoint.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Cast to this; without it, as published.")
_EXPORT = flags.DEFINE_string("export", None, "Folder to make for published files of --checkpoint.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "WORKDIR/checkpoints/STAGE/STEP, or an earlier --output."
)
_SHARD_GIB = flags.DEFINE_float("shard_gib", 2.0, "Largest exported file; more is split.", lower_bound=1e-9)


def main() -> None:
    if CONFIG_FLAG.value is None:
        raise UserError("--config is missing; name a config file such as configs/align_7b.py.")
    if (_OUTPUT.value is None) == (_EXPORT.value is None):
        raise UserError(
            "give either --output (convert published files to a checkpoint) or --export (the reverse)."
        )
    if (_EXPORT.value is None) != (_CHECKPOINT.value is None):
        raise UserError(
            "--export (the folder to write) and --checkpoint (what to export) must be given together."
        )
    config = CONFIG_FLAG.value
    validate_model(config)
    target = Path(_OUTPUT.value or _EXPORT.value or "").expanduser()
    if target.exists():
        raise UserError(f"{target} exists; name a folder that does not, or remove it.")
    if _OUTPUT.value:
        params = read_model(config, _DTYPE.value)
        described = {"weights": to_dict(config.weights), "model": to_dict(config.model)}
        with new_folder(target) as folder:
            save_params(folder, params)
            (folder / "convert.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    else:
        params = read_params(Path(_CHECKPOINT.value or "").expanduser())
        with new_folder(target) as folder:
            export_model(folder, params, config, int(_SHARD_GIB.value * 2**30))
    print(f"written to {target}")


if __name__ == "__main__":
    run_command(main)
