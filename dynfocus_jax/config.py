"""Configuration: every field with its default, validation, and how a command reads it.

A config file defines `get_config(arg="")` that starts from `default_config()`, changes fields and lists its
stages with `stage(...)`. Commands take it as `--config FILE[:variant]` and single fields as
`--config.model.dpe.ratio=0.5` or `--config.stages[2].steps=100`.
"""

import difflib
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections.config_dict import ConfigDict, placeholder


class UserError(Exception):
    """A mistake of the user's, in one sentence: what, where, what was expected, what to do. Exit code 2."""


class RunError(Exception):
    """A run that cannot go on, in one or two sentences. Exit code 1."""


def default_config() -> ConfigDict:
    """All fields with their defaults: the paper's model and settings. Locked: unknown keys are errors."""
    config = ConfigDict()
    config.seed = 0  # initial parameters, data order, selection noise

    # Checkpoint to start from: WORKDIR/checkpoints/STAGE/STEP, or one that `convert` made
    config.initial = placeholder(str)

    config.model = model = ConfigDict()
    model.mode = "paper"  # "paper": the method as published; "released": what the authors' code computes
    model.dtype = "bfloat16"  # of the computation, and of the parameters that no stage trains
    model.param_dtype = "float32"  # of the parameters that some stage trains
    model.vision = ConfigDict(
        {
            "image_size": 224,
            "patch_size": 14,
            "width": 1408,  # C
            "depth": 39,
            "heads": 16,
            "mlp_dim": 6144,
            "mean": (0.48145466, 0.4578275, 0.40821073),
            "std": (0.26862954, 0.26130258, 0.27577711),
            "cls_token": True,
            "patch_bias": True,
            "pre_norm": False,  # LayerNorm between embeddings and blocks (CLIP)
            "select_layer": -1,  # the output of the last block; -2 of the last but one, ...
            "final_norm": False,
            "activation": "gelu",  # | "gelu_tanh" | "quick_gelu" | "silu"
            "eps": 1e-6,
            "remat": "none",
            "attention": placeholder(str),  # "cudnn" for the fused kernel; None is XLA
        }
    )
    model.text_encoder = ConfigDict(
        {
            "vocab_size": 30523,
            "max_text": 512,
            "num_queries": 32,  # Q
            "width": 768,
            "depth": 12,
            "heads": 12,
            "mlp_dim": 3072,
            "cross_every": 2,
            "eps": 1e-12,
            "vision_eps": 1e-5,  # of the LayerNorm on the frame's features
            "remat": "none",
            "attention": placeholder(str),
        }
    )
    model.connector = ConfigDict(
        {
            "kind": "dynfocus",  # "dynfocus" | "pooled"
            "pool": (4, 4),  # P = 16 pooled tokens of a frame
            "projector": "mlp",  # f: "mlp" (published) | "linear" | "residual"
        }
    )
    model.dpe = ConfigDict(
        {
            "num_prototypes": 25,  # K
            "neighbors": 5,  # k of the k nearest neighbours
            "ratio": 0.8,  # J = ceil(ratio * K) ...
            "num_selected": placeholder(int),  # ... or J itself
            "clustering": "dpc_knn",  # | "kmeans" | "weighted_kmeans" (Table 11)
            "kmeans_init": "spread",  # initial frames: "spread" evenly | "random"
            "selection": "learned",  # | "uniform" frames | "oracle" (frames named by the data)
            "samples": 500,  # S perturbations
            "sigma": 0.1,
            "jacobian": "full",  # | "diagonal" (what the released code computes)
            "question_conditioned": False,  # extension: the score net also sees the question
        }
    )
    model.cce = ConfigDict(
        {
            "levels": ((16, 8), (8, 3)),  # (M, k) of each level of spatial clustering
            "clustering": "dpc_knn",
            "cones": "multi_grained",  # | "single_grained" | "cross_attention" | "pair" | "patches" | "none"
            "rods": ("content", "context"),  # any of "content", "context", "coarse"; () drops other frames
        }
    )
    model.language = ConfigDict(
        {
            "vocab_size": 32000,
            "width": 4096,  # D
            "depth": 32,
            "heads": 32,
            "kv_heads": 32,
            "head_dim": 128,
            "mlp_dim": 11008,
            "qkv_bias": False,  # Qwen2
            "qk_norm": False,  # RMSNorm of every head's query and key (Qwen3)
            "rope_theta": 1e4,
            "rope_scaling": "none",  # | "linear" | "llama3": how longer contexts turn more slowly ...
            "rope_factor": 1.0,  # ... by how much; the rest is of "llama3":
            "rope_low_freq": 1.0,  # fewer turns than this in the original length: slowed by the factor
            "rope_high_freq": 4.0,  # more turns than this: kept
            "rope_original_length": 8192,  # positions
            "eps": 1e-5,
            "tied_embeddings": False,
            "remat": "none",
            "attention": placeholder(str),
            "lora": {
                "rank": 0,  # of the low-rank updates; 0 builds none
                "alpha": 16.0,  # an update counts alpha / rank
                "targets": ("query", "value"),  # any of query, key, value, out, gate, up, down
            },
        }
    )

    config.data = ConfigDict(
        {
            "root": placeholder(str),  # folder of annotations and media
            "generate": placeholder(str),  # "needles": make the toy benchmark below `root` first
            "vocabulary": "vocabulary.json",  # words of the tokenizer, relative to the root
            "tokenizer": placeholder(str),  # folder of a Hugging Face tokenizer instead of those words
            "query_tokenizer": placeholder(str),  # folder or vocab.txt of the text encoder's; None: the same
            "template": "plain",  # conversation form, see data/conversation.py
            "max_query": 32,  # text tokens for the text encoder
            "cache_gib": 0.5,  # decoded media kept in memory
            "threads": 2,  # decoding threads
            "max_skip_share": 0.05,  # the run stops when more samples than this cannot be read
            "workers": 2,  # processes that generate data
            "needles": {
                "seed": 0,
                "num_train": 1600,
                "num_validation": 64,
                "num_heldout": 128,
                "num_images": 8000,
                "num_sequences": 4000,
            },
        }
    )

    config.weights = ConfigDict(
        {
            # Published file or folder of each part, read by `python -m dynfocus_jax.convert`
            "vision": placeholder(str),
            "text_encoder": placeholder(str),
            "language": placeholder(str),
            "connector": placeholder(str),
            "skip": (),  # regular expressions of published names that are left out on purpose
        }
    )

    config.stages = ()
    config.mesh = ConfigDict(
        {
            # Devices on each axis; -1 takes what is left. Their product is the number of devices.
            "data": -1,  # copies of the parameters, each with its share of the batch
            "fsdp": 1,  # shares of the parameters, each with its share of the batch
            "tensor": 1,  # shares of the heads and hidden units
            "context": 1,  # shares of the language model's sequence
        }
    )
    config.distributed = ConfigDict(
        {
            "mode": "none",  # | "auto": as SLURM, GKE or the TPU says | "explicit": by the fields below
            "address": placeholder(str),  # host:port of process 0
            "num_processes": placeholder(int),
            "process_id": placeholder(int),  # 0 to num_processes - 1
            "timeout": 60,  # seconds to wait for the others at the start
        }
    )
    config.checkpoint = ConfigDict(
        {
            "every": 500,  # steps
            "keep": 1,  # the newest ones
            "keep_every": placeholder(int),  # of a multiple of so many steps all are kept for good
            "best": placeholder(str),  # metric of which the best checkpoint is kept too: "loss"
            "best_mode": "min",  # | "max"
        }
    )
    config.log_every = 50  # steps
    config.evaluation = ConfigDict(
        {
            "annotations": placeholder(str),  # relative to data.root
            "media_frames": 16,
            "max_text": 64,
            "batch_size": 64,
            "max_new_tokens": 8,
            "focus_videos": 2,  # rows of focus.png; 0 for no picture
        }
    )
    return config.lock()


def stage(**fields) -> ConfigDict:
    """One stage of training. `name`, `annotations`, `steps` and `trainable` have no default."""
    defaults = ConfigDict(
        {
            "name": placeholder(str),
            "annotations": placeholder(str),  # relative to data.root
            "steps": placeholder(int),
            "batch_size": 32,
            "microbatches": 1,  # parts of a batch that are gone through in turn, their gradients summed
            "loss_chunk": 0,  # text tokens at a time whose logits are held for the loss; 0 for all at once
            "num_frames": 16,  # T of the stage's bucket
            "max_text": 64,  # text tokens, without the visual ones
            "max_turns": placeholder(int),  # turns drawn from a record; None takes all
            "connector": "dynfocus",
            "trainable": (),  # regular expressions over parameter paths, e.g. "language/.*"
            "copy": (),  # "destination <- source" parameter paths, once, when the stage starts
            "random_steps": 0,  # first steps that select prototypes at random
            "learning_rate": 1e-3,
            "lr_scale": (),  # (regular expression, factor) pairs
            "schedule": "cosine",  # | "linear_tail": constant, then linear to 0 over the last quarter
            "warmup": 0.03,  # share of the steps
            "weight_decay": 0.0,
            "b2": 0.999,
            "clip": 1.0,  # global gradient norm
        }
    )
    defaults.lock()
    for key, value in fields.items():
        if key not in defaults:
            raise UserError(f"stage(...) has no field {key!r}{_suggest(key, defaults)}.")
        defaults[key] = value
    return defaults


def _suggest(key: str, known) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}" if close else f"; fields there: {', '.join(sorted(known))}"


def to_dict(config: ConfigDict) -> dict:
    """Plain dicts and lists, for json."""

    def plain(value):
        if isinstance(value, ConfigDict):
            return {key: plain(value[key]) for key in value}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(config)


def from_dict(fields: dict) -> ConfigDict:
    """The configuration that `to_dict` took apart."""

    def frozen(value):
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    def update(config, fields, where):
        for key, value in fields.items():
            if key not in config:
                raise UserError(f"{where}.{key} is not a field of the configuration{_suggest(key, config)}.")
            if isinstance(config[key], ConfigDict):
                update(config[key], value, f"{where}.{key}")
            else:
                config[key] = frozen(value)

    config = default_config()
    stages = tuple(stage(**{k: frozen(v) for k, v in s.items()}) for s in fields["stages"])
    update(config, {key: value for key, value in fields.items() if key != "stages"}, "config")
    config.stages = stages
    return config


# --- Validation ---------------------------------------------------------------------------------------


def _check_fields(config: ConfigDict, reference: ConfigDict, where: str) -> None:
    """Unknown, missing or mistyped fields (a config need not derive from `default_config`)."""
    for key in config:
        if key not in reference:
            raise UserError(f"{where}.{key} is not a field of the configuration{_suggest(key, reference)}.")
    for key in reference:
        if key not in config:
            raise UserError(f"{where}.{key} is missing; start the config from default_config().")
        expected, value = reference.get_type(key), config[key]
        if isinstance(reference[key], ConfigDict):
            if not isinstance(value, ConfigDict):
                raise UserError(f"{where}.{key} is {value!r}, expected a section of fields.")
            _check_fields(value, reference[key], f"{where}.{key}")
        elif value is not None and not (
            isinstance(value, expected) and not (expected is int and isinstance(value, bool))
        ):
            if expected is float and isinstance(value, int) and not isinstance(value, bool):
                continue
            if expected is tuple and isinstance(value, list):
                continue
            raise UserError(
                f"{where}.{key} is {value!r} of type {type(value).__name__}, expected {expected.__name__}."
            )


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def _one_of(where: str, value, choices) -> None:
    _require(value in choices, f"{where} is {value!r}, expected one of {', '.join(map(repr, choices))}.")


def _positive(section: ConfigDict, where: str, *keys: str) -> None:
    for key in keys:
        value = section[key]
        _require(
            value is not None and value > 0, f"{where}.{key} is {value}, expected a number greater than 0."
        )


def _validate_model(model: ConfigDict) -> None:
    from dynfocus_jax.models.connectors import KINDS
    from dynfocus_jax.models.cooperative import CONES, PROJECTORS, RODS
    from dynfocus_jax.models.event_prototype import SELECTIONS
    from dynfocus_jax.models.layers import ACTIVATIONS, REMAT_POLICIES
    from dynfocus_jax.ops.clustering import METHODS

    where = "config.model"
    vision, language, text = model.vision, model.language, model.text_encoder
    dpe, cce = model.dpe, model.cce
    _one_of(f"{where}.mode", model.mode, ("paper", "released"))
    for key in ("dtype", "param_dtype"):
        _one_of(f"{where}.{key}", model[key], ("float32", "bfloat16"))
    _one_of(f"{where}.vision.activation", vision.activation, ACTIVATIONS)
    for name in ("vision", "language", "text_encoder"):
        _one_of(f"{where}.{name}.remat", model[name].remat, REMAT_POLICIES)
    for name in ("vision", "language", "text_encoder"):
        _one_of(f"{where}.{name}.attention", model[name].attention, (None, "xla", "cudnn"))
    _positive(vision, f"{where}.vision", "image_size", "patch_size", "width", "depth", "heads", "mlp_dim")
    _positive(
        language,
        f"{where}.language",
        *("vocab_size", "width", "depth", "heads", "kv_heads", "head_dim", "mlp_dim"),
    )
    _positive(
        text,
        f"{where}.text_encoder",
        *("vocab_size", "max_text", "num_queries", "width", "depth", "heads", "mlp_dim", "cross_every"),
    )
    for key in ("mean", "std"):
        _require(
            len(vision[key]) == 3 and all(isinstance(value, int | float) for value in vision[key]),
            f"{where}.vision.{key} is {tuple(vision[key])}, expected three numbers: red, green, blue.",
        )
    for name in ("vision", "text_encoder"):
        section = model[name]
        _require(
            section.width % section.heads == 0,
            f"{where}.{name}.width is {section.width}, which its {section.heads} heads do not divide; "
            "change one of them.",
        )
    _require(
        language.heads % language.kv_heads == 0,
        f"{where}.language.heads is {language.heads}, not a multiple of kv_heads = {language.kv_heads}.",
    )
    _validate_lora(language.lora, f"{where}.language.lora")
    _require(language.head_dim % 2 == 0, f"{where}.language.head_dim is {language.head_dim}, expected even.")
    _validate_rope(language, f"{where}.language")
    _require(
        -vision.depth <= vision.select_layer <= -1,
        f"{where}.vision.select_layer is {vision.select_layer}, expected -1 (the last of the {vision.depth} "
        f"blocks) to -{vision.depth} (the first).",
    )
    _require(
        vision.select_layer == -1 or not vision.final_norm,
        f"{where}.vision.final_norm follows the last block, but select_layer is {vision.select_layer}; "
        "set final_norm to False, or select_layer to -1.",
    )
    for name, key in (
        ("vision", "eps"),
        ("language", "eps"),
        ("text_encoder", "eps"),
        ("text_encoder", "vision_eps"),
    ):
        _positive(model[name], f"{where}.{name}", key)
    _require(
        vision.image_size % vision.patch_size == 0,
        f"{where}.vision.image_size is {vision.image_size}, not a multiple of patch_size = "
        f"{vision.patch_size}.",
    )

    grid = vision.image_size // vision.patch_size
    _one_of(f"{where}.connector.kind", model.connector.kind, KINDS)
    _one_of(f"{where}.connector.projector", model.connector.projector, PROJECTORS)
    _require(
        len(model.connector.pool) == 2 and all(p > 0 and grid % p == 0 for p in model.connector.pool),
        f"{where}.connector.pool is {tuple(model.connector.pool)}, expected two divisors of the {grid} "
        "patches a side.",
    )

    _positive(dpe, f"{where}.dpe", "num_prototypes", "neighbors", "samples")
    _require(0 < dpe.ratio <= 1, f"{where}.dpe.ratio is {dpe.ratio}, expected a number in (0, 1].")
    _require(dpe.sigma >= 0, f"{where}.dpe.sigma is {dpe.sigma}, expected at least 0.")
    if dpe.num_selected is not None:
        _require(
            dpe.num_selected >= 1 and (dpe.num_selected <= dpe.num_prototypes or dpe.selection != "learned"),
            f"{where}.dpe.num_selected (J) is {dpe.num_selected}, expected 1 to num_prototypes (K) = "
            f"{dpe.num_prototypes}; lower J or raise K.",
        )
    _one_of(f"{where}.dpe.clustering", dpe.clustering, METHODS)
    _one_of(f"{where}.dpe.kmeans_init", dpe.kmeans_init, ("spread", "random"))
    _one_of(f"{where}.dpe.selection", dpe.selection, SELECTIONS)
    _one_of(f"{where}.dpe.jacobian", dpe.jacobian, ("full", "diagonal"))

    _one_of(f"{where}.cce.clustering", cce.clustering, METHODS)
    _one_of(f"{where}.cce.cones", cce.cones, CONES)
    for part in cce.rods:
        _one_of(f"an entry of {where}.cce.rods", part, RODS)
    _require(
        len(cce.levels) > 0, f"{where}.cce.levels is empty, expected (M, k) pairs such as ((16, 8), (8, 3))."
    )
    finer = grid * grid
    for index, level in enumerate(cce.levels):
        _require(
            isinstance(level, tuple | list) and len(level) == 2 and 1 <= level[0] <= finer and level[1] >= 1,
            f"{where}.cce.levels[{index}] is {level}, expected (M, k) with 1 <= M <= {finer} "
            "(the tokens of the level before) and k >= 1.",
        )
        finer = level[0]
    _require(
        model.mode == "paper" or len(cce.levels) == 2,
        f"{where}.cce.levels has {len(cce.levels)} levels, but mode 'released' groups exactly 2.",
    )
    for name, parts in (("single_grained", (cce.cones,)), ("coarse", cce.rods)):
        _require(
            model.mode == "paper" or name not in parts,
            f"{where}.cce asks for {name!r}, but mode 'released' merges the levels into one; "
            "leave it out, or choose mode 'paper'.",
        )
    _require(
        cce.cones != "none" or len(cce.rods) > 0,
        f"{where}.cce has neither cones nor rods; keep at least one of them.",
    )


def _validate_lora(lora: ConfigDict, where: str) -> None:
    from dynfocus_jax.models.llama import PROJECTIONS

    _require(lora.rank >= 0, f"{where}.rank is {lora.rank}, expected at least 0.")
    _positive(lora, where, "alpha")
    for target in lora.targets:
        _one_of(f"an entry of {where}.targets", target, PROJECTIONS)
    _require(
        lora.rank == 0 or len(lora.targets) > 0,
        f"{where}.targets is empty, but rank is {lora.rank}; name projections, or set rank to 0.",
    )


def _validate_rope(language: ConfigDict, where: str) -> None:
    from dynfocus_jax.models.llama import ROPE_SCALINGS

    _one_of(f"{where}.rope_scaling", language.rope_scaling, ROPE_SCALINGS)
    _positive(language, where, "rope_theta", "rope_factor", "rope_low_freq", "rope_original_length")
    _require(
        language.rope_scaling != "none" or language.rope_factor == 1,
        f"{where}.rope_factor is {language.rope_factor}, but rope_scaling is 'none'; choose 'linear' or "
        "'llama3', or leave the factor 1.",
    )
    _require(
        language.rope_low_freq < language.rope_high_freq,
        f"{where}.rope_low_freq is {language.rope_low_freq}, expected less than rope_high_freq = "
        f"{language.rope_high_freq}.",
    )


def _regular_expressions(where: str, patterns) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}.") from None


def _validate_stage(stage_config: ConfigDict, where: str, devices: int) -> None:
    from dynfocus_jax.models.connectors import KINDS

    for key in ("name", "annotations", "steps"):
        _require(stage_config[key] is not None, f"{where}.{key} is not set; it has no default.")
    _require(
        re.fullmatch(r"[\w-]+", stage_config.name) is not None,
        f"{where}.name is {stage_config.name!r}, expected letters, digits, '_' or '-': it names a folder.",
    )
    _positive(stage_config, where, "steps", "batch_size", "microbatches", "num_frames", "max_text")
    _positive(stage_config, where, "learning_rate", "clip")
    _one_of(f"{where}.connector", stage_config.connector, KINDS)
    _one_of(f"{where}.schedule", stage_config.schedule, ("cosine", "linear_tail"))
    if stage_config.max_turns is not None:
        _positive(stage_config, where, "max_turns")
    for key in ("random_steps", "weight_decay", "loss_chunk"):
        _require(stage_config[key] >= 0, f"{where}.{key} is {stage_config[key]}, expected at least 0.")
    _require(
        all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in stage_config.lr_scale),
        f"{where}.lr_scale is {stage_config.lr_scale}, expected pairs: ((regular expression, factor), ...).",
    )
    _require(
        0 <= stage_config.warmup < 1, f"{where}.warmup is {stage_config.warmup}, expected a share in [0, 1)."
    )
    _require(len(stage_config.trainable) > 0, f"{where}.trainable is empty: nothing would be trained.")
    parts = stage_config.microbatches * devices
    each = "" if stage_config.microbatches == 1 else f"{stage_config.microbatches} microbatches on "
    _require(
        stage_config.batch_size % parts == 0,
        f"{where}.batch_size is {stage_config.batch_size}, which {each}the {devices} devices of the mesh's "
        f"data and fsdp axes do not divide; choose a multiple of {parts}.",
    )
    _regular_expressions(where, (*stage_config.trainable, *(pair[0] for pair in stage_config.lr_scale)))


def validate_distributed(distributed: ConfigDict) -> None:
    """Check the section `config.distributed`, which is needed before there are devices.

    Raises:
      UserError: one sentence that names the field, its value and the remedy.
    """
    where = "config.distributed"
    _one_of(f"{where}.mode", distributed.mode, ("none", "auto", "explicit"))
    _positive(distributed, where, "timeout")
    fields = ("address", "num_processes", "process_id")
    if distributed.mode != "explicit":
        for key in fields:
            _require(
                distributed[key] is None,
                f"{where}.{key} is {distributed[key]!r}, but mode is {distributed.mode!r}; set mode to "
                "'explicit', or leave it out.",
            )
        return
    for key in fields:
        _require(distributed[key] is not None, f"{where}.{key} is not set, which mode 'explicit' needs.")
    _require(
        re.fullmatch(r"\S+:\d+", distributed.address) is not None,
        f"{where}.address is {distributed.address!r}, expected host:port of process 0.",
    )
    _positive(distributed, where, "num_processes")
    _require(
        0 <= distributed.process_id < distributed.num_processes,
        f"{where}.process_id is {distributed.process_id}, expected 0 to {distributed.num_processes - 1}, as "
        f"num_processes is {distributed.num_processes}.",
    )


def _validate_mesh(mesh: ConfigDict) -> None:
    for axis, size in mesh.items():
        _require(
            size == -1 or size >= 1, f"config.mesh.{axis} is {size}, expected at least 1, or -1 for the rest."
        )
    rest = [axis for axis, size in mesh.items() if size == -1]
    _require(
        len(rest) <= 1,
        f"config.mesh has -1 for {' and '.join(rest)}, expected one such axis at most; set the others.",
    )


def _validate_checkpoint(checkpoint: ConfigDict) -> None:
    where = "config.checkpoint"
    _positive(checkpoint, where, "every", "keep")
    if checkpoint.keep_every is not None:
        _positive(checkpoint, where, "keep_every")
        _require(
            checkpoint.keep_every % checkpoint.every == 0,
            f"{where}.keep_every is {checkpoint.keep_every}, expected a multiple of every = "
            f"{checkpoint.every}: only those steps are saved.",
        )
    _one_of(f"{where}.best", checkpoint.best, (None, "loss", "grad_norm"))
    _one_of(f"{where}.best_mode", checkpoint.best_mode, ("min", "max"))


def validate_model(config: ConfigDict) -> None:
    """Check that all fields exist, and those that the model and its published weights are described by.

    Raises:
      UserError: one sentence that names the field, its value and the remedy.
    """
    _check_fields(config, default_config(), "config")
    for index, stage_config in enumerate(config.stages):
        _check_fields(stage_config, stage(), f"config.stages[{index}]")
    _validate_model(config.model)
    _regular_expressions("config.weights.skip", config.weights.skip)


def validate(config: ConfigDict, devices: int = 1) -> None:
    """Check every field before anything is built.

    Args:
      config: as from a config file.
      devices: those on the mesh's data and fsdp axes, which share the rows of a batch.

    Raises:
      UserError: one sentence that names the field, its value and the remedy.
    """
    from dynfocus_jax.data.conversation import TEMPLATES

    validate_model(config)
    _require(len(config.stages) > 0, "config.stages is empty, expected at least one stage(...).")
    for index, stage_config in enumerate(config.stages):
        _validate_stage(stage_config, f"config.stages[{index}]", devices)
    if config.initial is not None:
        folder = Path(config.initial).expanduser()
        _require(
            (folder / "params").is_dir() or (folder.name.isdigit() and folder.is_dir()),
            f"config.initial is {config.initial!r}, expected WORKDIR/checkpoints/STAGE/STEP of a training "
            "run, or the --output of python -m dynfocus_jax.convert.",
        )
    names = [stage_config.name for stage_config in config.stages]
    _require(len(set(names)) == len(names), f"config.stages has two stages of one name: {', '.join(names)}.")
    _require(config.data.root is not None, "config.data.root is not set; name the folder of the data.")
    _one_of("config.data.generate", config.data.generate, (None, "needles"))
    _one_of("config.data.template", config.data.template, TEMPLATES)
    share = config.data.max_skip_share
    _require(0 <= share < 1, f"config.data.max_skip_share is {share}, expected at least 0 and below 1.")
    _positive(config.data, "config.data", "max_query", "threads", "workers")
    _require(
        config.data.max_query <= config.model.text_encoder.max_text,
        f"config.data.max_query is {config.data.max_query}, more than the text encoder's "
        f"max_text = {config.model.text_encoder.max_text}.",
    )
    validate_distributed(config.distributed)
    _validate_mesh(config.mesh)
    _validate_checkpoint(config.checkpoint)
    _positive(config, "config", "log_every")
    evaluation = config.evaluation
    if evaluation.annotations is not None:
        _positive(
            evaluation,
            "config.evaluation",
            *("media_frames", "max_text", "batch_size", "max_new_tokens"),
        )
        _require(
            evaluation.batch_size % devices == 0,
            f"config.evaluation.batch_size is {evaluation.batch_size}, which the {devices} devices of the "
            f"mesh's data and fsdp axes do not divide; choose a multiple of {devices}.",
        )


# --- Commands -----------------------------------------------------------------------------------------


def run_command(main: Callable[[], None]) -> None:
    """Run a command: parse the flags, turn `UserError` into one sentence on stderr and exit code 2."""
    from dynfocus_jax.parallel.start import leave

    def guarded(_argv: list[str]) -> None:
        logging.set_verbosity(logging.ERROR)  # the libraries' chatter would bury the run's own lines
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            leave(2)
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            leave(1)
        except Exception:
            traceback.print_exc()
            leave(1)

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        _check_overrides(argv)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"argument {rest[1]!r} is not understood; arguments have the form --name=value.")
        return rest
    except SystemExit:  # absl prints --help and exits with 1
        sys.exit(0)
    except UserError as error:
        sentence = str(error)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        sentence = _one_sentence(error)
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _one_sentence(error: Exception) -> str:
    """What ml_collections or absl complained of, without the dump of the whole config."""
    text = " ".join(str(error).split()).strip("\"'")
    unknown = re.search(r'Key "(\w+)" does not exist', text)
    if unknown:
        others = re.findall(r"'(\w+)': ", text.replace("\\", ""))
        return f"the config file sets the unknown field {unknown[1]!r}{_suggest(unknown[1], others)}."
    return text if text.endswith((".", "?")) else f"{text}."


def _check_overrides(argv: list[str]) -> None:
    """Whether the config file exists and holds every field that the command line overrides."""
    named = [i for i, a in enumerate(argv) if re.match(r"--?config(=|$)", a)]
    if not named:
        return
    argument = argv[named[-1]].partition("=")[2] or [*argv, ""][named[-1] + 1]
    path, _, variant = argument.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config names {path!r}, which is not a file; try configs/toy.py.")
    config = runpy.run_path(path)["get_config"](*([variant] if variant else []))
    for flag in argv:
        if not re.match(r"--?config\.", flag):
            continue
        node, where = config, "config"
        for part in flag.lstrip("-").partition("=")[0].split(".")[1:]:
            name, *indices = re.findall(r"\w+", part)
            if not isinstance(node, ConfigDict) or name not in node:
                known = node if isinstance(node, ConfigDict) else ()
                raise UserError(f"{where}.{name} is not a field of the configuration{_suggest(name, known)}.")
            node, where = node[name], f"{where}.{name}"
            for index in map(int, indices):
                if index >= len(node):
                    raise UserError(f"{where} has {len(node)} entries, so there is no {where}[{index}].")
                node, where = node[index], f"{where}[{index}]"
