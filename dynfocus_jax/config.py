"""The configuration: every field with its default, allowed values and meaning.

A config file defines `get_config(arg="")` that starts from `default_config()`, changes fields and lists its
stages with `stage(...)`. Commands take it as `--config FILE[:variant]` and single fields as
`--config.model.connector.dpe.ratio=0.5` or `--config.stages[2].steps=100`; `--fields` lists all of them. The
fields of a connector are declared in its own file (`connectors/`), those of a source in `records/sources.py`.
"""

from typing import Any

from ml_collections.config_dict import ConfigDict

from dynfocus_jax.connectors.registry import connector
from dynfocus_jax.data.budget import ON_OVERFLOW
from dynfocus_jax.errors import UserError, suggest
from dynfocus_jax.media.images import CLIP_MEAN, CLIP_STD, LAYOUTS
from dynfocus_jax.models.layers import ACTIVATIONS, REMAT_POLICIES
from dynfocus_jax.models.llama import PROJECTIONS, ROPE_SCALINGS
from dynfocus_jax.parallel.processes import DISTRIBUTED
from dynfocus_jax.records.sources import source as source
from dynfocus_jax.sections import Field, Section, fill_section, new_section
from dynfocus_jax.serving.token_sampling import SAMPLING
from dynfocus_jax.text.conversation import GUIDANCE, TEMPLATES

_DTYPES = ("float32", "bfloat16")
_REMAT = Field("none", "what the backward pass recomputes of each layer", choices=tuple(REMAT_POLICIES))
_ATTENTION = Field(str, '"cudnn" for the fused kernel; None is XLA\'s', choices=("xla", "cudnn"))

VISION: Section = {
    "image_size": Field(224, "height and width of a frame, pixels", at_least=1),
    "patch_size": Field(14, "height and width of a patch, pixels", at_least=1),
    "width": Field(1408, "hidden width, C", at_least=1),
    "depth": Field(39, "number of blocks", at_least=1),
    "heads": Field(16, "number of attention heads", at_least=1),
    "mlp_dim": Field(6144, "hidden width of the MLP", at_least=1),
    "mean": Field(CLIP_MEAN, "mean of red, green and blue, for normalising pixels"),
    "std": Field(CLIP_STD, "standard deviation of red, green and blue, for normalising pixels"),
    "cls_token": Field(True, "whether there is a class token"),
    "patch_bias": Field(True, "whether the patch embedding has a bias"),
    "pre_norm": Field(False, "LayerNorm between embeddings and blocks (CLIP)"),
    "select_layer": Field(-1, "block whose output is used, counted from the end; -1: the last"),
    "final_norm": Field(False, "LayerNorm after the last block"),
    "activation": Field("gelu", "activation of the MLP", choices=tuple(ACTIVATIONS)),
    "eps": Field(1e-6, "epsilon of the LayerNorms", above=0),
    "remat": _REMAT,
    "attention": _ATTENTION,
}

TEXT_ENCODER: Section = {
    "vocab_size": Field(30523, "number of word embeddings", at_least=1),
    "max_text": Field(512, "number of position embeddings, text tokens", at_least=1),
    "num_queries": Field(32, "number of text queries per frame, Q", at_least=1),
    "width": Field(768, "hidden width", at_least=1),
    "depth": Field(12, "number of blocks", at_least=1),
    "heads": Field(12, "number of attention heads", at_least=1),
    "mlp_dim": Field(3072, "hidden width of the MLP", at_least=1),
    "cross_every": Field(2, "n: every n-th block attends to the frame", at_least=1),
    "eps": Field(1e-12, "epsilon of the LayerNorms", above=0),
    "vision_eps": Field(1e-5, "epsilon of the LayerNorm on the frame's features", above=0),
    "remat": _REMAT,
    "attention": _ATTENTION,
}

LANGUAGE: Section = {
    "vocab_size": Field(32000, "number of token embeddings, V", at_least=1),
    "width": Field(4096, "hidden width, D", at_least=1),
    "depth": Field(32, "number of blocks", at_least=1),
    "heads": Field(32, "number of query heads", at_least=1),
    "kv_heads": Field(32, "number of key and value heads", at_least=1),
    "head_dim": Field(128, "width of a head", at_least=1),
    "mlp_dim": Field(11008, "hidden width of the MLP", at_least=1),
    "qkv_bias": Field(False, "whether the query, key and value projections have a bias (Qwen2)"),
    "qk_norm": Field(False, "RMSNorm of every head's query and key (Qwen3)"),
    "rope_theta": Field(1e4, "base of the rotary position embedding", above=0),
    "rope_scaling": Field(
        "none", "how rotary frequencies are scaled for longer contexts", choices=ROPE_SCALINGS
    ),
    "rope_factor": Field(1.0, "factor that rotary frequencies are divided by", above=0),
    "rope_low_freq": Field(
        1.0,
        '"llama3": frequencies with fewer rotations in the original length are divided by the whole factor',
        above=0,
    ),
    "rope_high_freq": Field(4.0, '"llama3": frequencies with more rotations than this are not scaled'),
    "rope_original_length": Field(8192, '"llama3": context length before scaling, tokens', at_least=1),
    "eps": Field(1e-5, "epsilon of the RMSNorms", above=0),
    "tied_embeddings": Field(False, "whether the head is the transposed embedding"),
    "remat": _REMAT,
    "attention": _ATTENTION,
    "lora": {
        "rank": Field(0, "rank of the low-rank updates; 0: no updates", at_least=0),
        "alpha": Field(16.0, "scale of the updates: each is multiplied by alpha / rank", above=0),
        "targets": Field(("query", "value"), "projections that get an update", choices=PROJECTIONS),
    },
}

MODEL: Section = {
    "dtype": Field(
        "bfloat16", "dtype of the computation and of parameters that no stage trains", choices=_DTYPES
    ),
    "param_dtype": Field("float32", "dtype of parameters that some stage trains", choices=_DTYPES),
    "vision": VISION,
    "text_encoder": TEXT_ENCODER,
    "connector": Field(
        ConfigDict, "method that turns frame features into language tokens: connector(KIND, ...)"
    ),
    "language": LANGUAGE,
}

DATA: Section = {
    "root": Field(str, "folder of annotations and media"),
    "generate": Field(str, "benchmark to generate below `root` before training", choices=("needles",)),
    "vocabulary": Field("vocabulary.json", "word list of the tokenizer, relative to the root"),
    "tokenizer": Field(str, "folder of a Hugging Face tokenizer, instead of the word list"),
    "query_tokenizer": Field(
        str, "folder or vocab.txt of the text encoder's tokenizer; None: the same tokenizer"
    ),
    "template": Field("plain", "chat template", choices=tuple(TEMPLATES)),
    "max_query": Field(32, "number of text tokens that the text encoder reads", at_least=1),
    "text_guidance": Field(
        "joined",
        'questions that the text encoder reads: "joined", all of the conversation; "first_turn", the first '
        'one; "each_turn", one at a time: each turn becomes a sample, with the earlier turns as its history',
        choices=GUIDANCE,
    ),
    "sampling": {
        "kind": Field(
            "uniform",
            'how frames are sampled: "uniform", evenly spaced, as many as the bucket holds; "segments", one '
            'from each of that many equal segments; "fps", at a constant rate',
            choices=("uniform", "fps", "segments"),
        ),
        "fps": Field(1.0, 'frames per second of "fps"', above=0),
        "cap": Field(2000, 'largest number of frames of "fps"', at_least=1),
        "above": Field(
            200, "number of evenly spaced frames of a video with more frames than cap", at_least=1
        ),
        "pick": Field("middle", "frame to take from each segment", choices=("middle", "random")),
    },
    "image_layout": Field(
        "crop",
        'how frames become square: "crop" to the centre (CLIP), "pad" with the mean colour, or "stretch"',
        choices=LAYOUTS,
    ),
    "features": Field(str, "folder written by `extract`, to read features from instead of pixels"),
    "lengths": Field(str, "file of known sample lengths; None: WORKDIR/lengths.jsonl"),
    "cache_gib": Field(0.5, "size of the cache of decoded media in memory, GiB", at_least=0),
    "threads": Field(2, "number of threads per process that decode media", at_least=1),
    "processes": Field(0, "number of worker processes that read samples; 0: threads read them", at_least=0),
    "timeout": Field(60.0, "seconds after which a sample that is still being read is skipped", above=0),
    "max_skip_share": Field(
        0.05, "fraction of samples that may be unusable before the run stops", at_least=0, below=1
    ),
    "workers": Field(2, "number of processes that generate data", at_least=1),
    "needles": {
        "seed": Field(0, "seed of the generated benchmark"),
        "num_train": Field(1600, "number of training videos", at_least=1),
        "num_validation": Field(64, "number of validation videos", at_least=1),
        "num_heldout": Field(128, "number of held-out videos", at_least=1),
        "num_images": Field(8000, "number of images for pretraining", at_least=1),
        "num_sequences": Field(4000, "number of short videos for pretraining", at_least=1),
    },
}

WEIGHTS: Section = {
    "vision": Field(str, "published file or folder of the vision tower, read by `convert`"),
    "text_encoder": Field(str, "published file or folder of the text encoder"),
    "language": Field(str, "published file or folder of the language model"),
    "connector": Field(str, "published file or folder of the connector"),
    "skip": Field((), "regular expressions of published names to ignore"),
}

MESH: dict[str, Field] = {
    "data": Field(
        -1, "number of replicas of the parameters, which split the batch; -1: all remaining devices"
    ),
    "fsdp": Field(1, "number of shards of the parameters, which also split the batch"),
    "tensor": Field(1, "number of shards of the heads and hidden units"),
    "context": Field(1, "number of shards of the language model's sequence"),
}

CHECKPOINT: Section = {
    "every": Field(500, "steps between checkpoints", at_least=1),
    "keep": Field(1, "number of newest checkpoints to keep", at_least=1),
    "keep_every": Field(int, "also keep checkpoints at multiples of this number of steps", at_least=1),
    "best": Field(
        str, "also keep the checkpoint with the best value of this metric", choices=("loss", "grad_norm")
    ),
    "best_mode": Field("min", "whether the smallest or the largest value is best", choices=("min", "max")),
}

EVALUATION: Section = {
    "annotations": Field(str, "LLaVA file of held-out questions, relative to data.root; None: no evaluation"),
    "media_frames": Field(16, "number of frames of a video", at_least=1),
    "max_text": Field(64, "maximum number of text tokens in a prompt", at_least=1),
    "max_subtitle": Field(0, "maximum number of text tokens in a video's subtitles; 0: none", at_least=0),
    "batch_size": Field(64, "questions per batch", at_least=1),
    "max_new_tokens": Field(8, "maximum number of tokens in an answer", at_least=1),
    "focus_videos": Field(2, "number of videos in focus.png; 0: no picture", at_least=0),
}

GENERATION: Section = {
    "num_frames": Field(int, "number of frames of a video; None: evaluation.media_frames", at_least=1),
    "max_new_tokens": Field(256, "maximum number of tokens in an answer", at_least=1),
    "max_length": Field(
        int, "maximum number of visual and text tokens, including the answer; None: no limit", at_least=1
    ),
    **SAMPLING,
    "end_tokens": Field((), "special tokens that end an answer, in addition to the tokenizer's eos_token"),
    # Sizes that programs are compiled for; inputs are padded to the next one
    "frames": Field((), "clip lengths to compile for, frames; (): 1 and num_frames"),
    "text": Field(
        (32, 48, 64, 96, 128, 256, 512, 1024, 2048),
        "prompt lengths to compile for, tokens; for longer prompts, multiples of the last",
    ),
    "batch": Field((1, 4, 16), "batch sizes to compile decoding for, in ascending order"),
    "cache": Field(128, "the length of the KV cache is a multiple of this", at_least=1),
    "prefill": Field(
        4096,
        "maximum number of prompt tokens that a device prefills at a time, unless one prompt is longer",
        at_least=1,
    ),
    "cached_clips": Field(
        16, "number of clips whose visual tokens are cached for later questions", at_least=0
    ),
}

CONFIG: Section = {
    "seed": Field(0, "seed of initial parameters, data order and selection noise"),
    "initial": Field(
        str, "checkpoint to start from: WORKDIR/checkpoints/STAGE/STEP, or the output of `convert`"
    ),
    "model": MODEL,
    "data": DATA,
    "weights": WEIGHTS,
    "stages": Field((), "training stages in order: stage(...)"),
    "mesh": MESH,
    "distributed": DISTRIBUTED,
    "checkpoint": CHECKPOINT,
    "log_every": Field(50, "steps between log lines", at_least=1),
    "evaluation": EVALUATION,
    "generation": GENERATION,
}

STAGE: Section = {
    "name": Field(str, "name of the stage and of its folder of checkpoints"),
    "annotations": Field(str, "LLaVA file, relative to data.root; set this or sources"),
    "sources": Field((), "mixture of source(...); set this or annotations"),
    "steps": Field(int, "number of steps; set this or epochs", at_least=1),
    "epochs": Field(float, "number of passes over the records; set this or steps", above=0),
    "batch_size": Field(32, "samples per step, over all devices", at_least=1),
    "microbatches": Field(1, "microbatches per step; their gradients are accumulated", at_least=1),
    "loss_chunk": Field(0, "text tokens per sample whose logits are in memory at a time; 0: all", at_least=0),
    "num_frames": Field(16, "number of frames of a sample, after padding", at_least=1),
    "max_text": Field(64, "number of text tokens of a sample, after padding", at_least=1),
    "buckets": Field(
        (), "(num_frames, max_text) pairs, the shapes of the batches, instead of these two fields"
    ),
    "max_length": Field(
        int, "maximum number of visual and text tokens of a sample; None: no limit", at_least=1
    ),
    "on_overflow": Field(
        "error",
        'what to do with a longer sample: "error" skips it, "drop_turns" drops its last turns, '
        '"fewer_frames" samples fewer frames',
        choices=ON_OVERFLOW,
    ),
    "max_subtitle": Field(
        0,
        "maximum number of text tokens in a video's subtitles, placed between its frames; 0: none",
        at_least=0,
    ),
    "max_turns": Field(int, "number of turns drawn at random from a record; None: all turns", at_least=1),
    "connector": Field(ConfigDict, "connector of this stage, connector(...); None: config.model.connector"),
    "trainable": Field(
        tuple,
        'regular expressions over the paths of the parameters to train, such as "language/.*"; None: those '
        "that the connector declares",
    ),
    "copy": Field((), '"destination <- source" parameter paths, copied once when the stage starts'),
    "random_steps": Field(
        0, "number of steps at the start in which the connector selects frames at random", at_least=0
    ),
    "learning_rate": Field(1e-3, "peak learning rate of AdamW", above=0),
    "lr_scale": Field((), "(regular expression, factor) pairs that scale the learning rate"),
    "schedule": Field(
        "cosine",
        'learning rate after the warm-up: "cosine", to 0; "linear_tail", constant, then linear to 0 over the '
        "last quarter",
        choices=("cosine", "linear_tail"),
    ),
    "warmup": Field(0.03, "fraction of the steps used for a linear warm-up", at_least=0, below=1),
    "weight_decay": Field(0.0, "decoupled weight decay", at_least=0),
    "b2": Field(0.999, "decay of AdamW's second moment", above=0, below=1),
    "clip": Field(1.0, "maximum global gradient norm; larger gradients are scaled down to it", above=0),
}


def default_config() -> ConfigDict:
    """Return all fields with their defaults, the paper's model and settings; unknown fields are errors."""
    config = new_section(CONFIG)
    del config.model["connector"]  # a placeholder, in which a section would not be locked with the others
    config.model.connector = connector("dynfocus")
    return config.lock()


def stage(**fields: Any) -> ConfigDict:
    """Return one stage of training.

    `name` has to be given, and of each of these pairs one: `annotations` or `sources`, `steps` or `epochs`.
    """
    return fill_section(STAGE, fields, "stage(...)")


def from_dict(fields: dict) -> ConfigDict:
    """Return the configuration that `sections.to_dict` made plain.

    Raises:
      UserError: it has a field that does not exist.
    """
    fields = upgraded(fields)
    config = default_config()
    config.model.connector = _connector_from(fields["model"]["connector"])
    config.stages = tuple(map(_stage_from, fields["stages"]))
    _update(config, {name: value for name, value in fields.items() if name != "stages"}, "config")
    return config


def upgraded(fields: dict) -> dict:
    """Return the plain fields of a configuration of version 0.1.0 under today's names; others unchanged.

    The parameters' own paths are the same in both. Renamed: `model.mode`, `model.dpe` and `model.cce` are
    fields of `model.connector`, a stage's connector is a section, and `generation.read` and `.looks` are
    `.prefill` and `.cached_clips`.
    """
    if "dpe" not in fields["model"]:
        return fields
    model, generation = dict(fields["model"]), dict(fields["generation"])
    own = {name: model.pop(name) for name in ("mode", "dpe", "cce")}
    both = model["connector"]

    def connector_of(kind: str) -> dict:
        return both | {"kind": kind} | (own if kind == "dynfocus" else {})

    model["connector"] = connector_of(both["kind"])
    generation["prefill"], generation["cached_clips"] = generation.pop("read"), generation.pop("looks")
    stages = [one | {"connector": connector_of(one["connector"])} for one in fields["stages"]]
    return fields | {"model": model, "generation": generation, "stages": stages}


def _connector_from(fields: dict) -> ConfigDict:
    section = connector(fields["kind"])
    _update(section, fields, f"connector {fields['kind']!r}")
    return section


def _stage_from(fields: dict) -> ConfigDict:
    values = {name: _tuples(value) for name, value in fields.items()}
    values["sources"] = tuple(
        source(**{name: _tuples(value) for name, value in one.items()}) for one in fields.get("sources", ())
    )
    if fields.get("connector") is not None:
        values["connector"] = _connector_from(fields["connector"])
    return stage(**values)


def _update(config: ConfigDict, fields: dict, where: str) -> None:
    for name, value in fields.items():
        if name not in config:
            raise UserError(f"{where}.{name} is not a field of the configuration{suggest(name, config)}.")
        if isinstance(config[name], ConfigDict):
            _update(config[name], value, f"{where}.{name}")
        else:
            config[name] = _tuples(value)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
