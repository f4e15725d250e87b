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
    "depth": Field(39, "blocks", at_least=1),
    "heads": Field(16, "attention heads", at_least=1),
    "mlp_dim": Field(6144, "hidden width of the MLP", at_least=1),
    "mean": Field(CLIP_MEAN, "mean of red, green and blue that pixels are normalised with"),
    "std": Field(CLIP_STD, "standard deviation that pixels are normalised with"),
    "cls_token": Field(True, "whether there is a class token"),
    "patch_bias": Field(True, "whether the patch embedding has a bias"),
    "pre_norm": Field(False, "LayerNorm between embeddings and blocks (CLIP)"),
    "select_layer": Field(-1, "block whose output is taken, counted from the end: -1 is the last"),
    "final_norm": Field(False, "LayerNorm after the last block"),
    "activation": Field("gelu", "activation of the MLP", choices=tuple(ACTIVATIONS)),
    "eps": Field(1e-6, "epsilon of the LayerNorms", above=0),
    "remat": _REMAT,
    "attention": _ATTENTION,
}

TEXT_ENCODER: Section = {
    "vocab_size": Field(30523, "word embeddings", at_least=1),
    "max_text": Field(512, "position embeddings, text tokens", at_least=1),
    "num_queries": Field(32, "text queries of a frame, Q", at_least=1),
    "width": Field(768, "hidden width", at_least=1),
    "depth": Field(12, "blocks", at_least=1),
    "heads": Field(12, "attention heads", at_least=1),
    "mlp_dim": Field(3072, "hidden width of the MLP", at_least=1),
    "cross_every": Field(2, "every n-th block attends to the frame", at_least=1),
    "eps": Field(1e-12, "epsilon of the LayerNorms", above=0),
    "vision_eps": Field(1e-5, "epsilon of the LayerNorm on the frame's features", above=0),
    "remat": _REMAT,
    "attention": _ATTENTION,
}

LANGUAGE: Section = {
    "vocab_size": Field(32000, "token embeddings, V", at_least=1),
    "width": Field(4096, "hidden width, D", at_least=1),
    "depth": Field(32, "blocks", at_least=1),
    "heads": Field(32, "query heads", at_least=1),
    "kv_heads": Field(32, "key and value heads", at_least=1),
    "head_dim": Field(128, "width of a head", at_least=1),
    "mlp_dim": Field(11008, "hidden width of the MLP", at_least=1),
    "qkv_bias": Field(False, "bias of the query, key and value projections (Qwen2)"),
    "qk_norm": Field(False, "RMSNorm of every head's query and key (Qwen3)"),
    "rope_theta": Field(1e4, "base of the rotary position embedding", above=0),
    "rope_scaling": Field(
        "none", "how rotary frequencies are lowered for longer contexts", choices=ROPE_SCALINGS
    ),
    "rope_factor": Field(1.0, "factor by which they are lowered", above=0),
    "rope_low_freq": Field(
        1.0,
        '"llama3": frequencies with fewer turns in the original length are lowered by the whole factor',
        above=0,
    ),
    "rope_high_freq": Field(4.0, '"llama3": frequencies with more turns than this are kept'),
    "rope_original_length": Field(8192, '"llama3": context length before scaling, tokens', at_least=1),
    "eps": Field(1e-5, "epsilon of the RMSNorms", above=0),
    "tied_embeddings": Field(False, "whether the head is the transposed embedding"),
    "remat": _REMAT,
    "attention": _ATTENTION,
    "lora": {
        "rank": Field(0, "rank of the low-rank updates; 0 builds none", at_least=0),
        "alpha": Field(16.0, "scale: an update counts alpha / rank", above=0),
        "targets": Field(("query", "value"), "projections with an update", choices=PROJECTIONS),
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
    "generate": Field(str, "benchmark that is generated below `root` first", choices=("needles",)),
    "vocabulary": Field("vocabulary.json", "word list of the tokenizer, relative to the root"),
    "tokenizer": Field(str, "folder of a Hugging Face tokenizer, instead of the word list"),
    "query_tokenizer": Field(
        str, "folder or vocab.txt of the text encoder's tokenizer; None: the same tokenizer"
    ),
    "template": Field("plain", "form of a conversation", choices=tuple(TEMPLATES)),
    "max_query": Field(32, "text tokens that the text encoder reads", at_least=1),
    "text_guidance": Field(
        "joined",
        'questions of a conversation that the text encoder reads: all "joined", the one of the "first_turn", '
        'or with "each_turn" its own: each turn is then a sample, with the turns before as its history',
        choices=GUIDANCE,
    ),
    "sampling": {
        "kind": Field(
            "uniform",
            'frames of a video: "uniform", evenly spaced to fill the bucket; "segments", one of each of as '
            'many equal parts; "fps", at a constant rate',
            choices=("uniform", "fps", "segments"),
        ),
        "fps": Field(1.0, 'frames per second of "fps"', above=0),
        "cap": Field(2000, 'most frames of "fps" ...', at_least=1),
        "above": Field(200, "... evenly spaced frames of a video that has more", at_least=1),
        "pick": Field("middle", "frame taken of each segment", choices=("middle", "random")),
    },
    "image_layout": Field(
        "crop",
        'how frames become square: "crop" to the centre (CLIP), "pad" with the mean colour, or "stretch"',
        choices=LAYOUTS,
    ),
    "features": Field(str, "folder written by `extract`; its features are read instead of pixels"),
    "lengths": Field(str, "file of known sample lengths; None: WORKDIR/lengths.jsonl"),
    "cache_gib": Field(0.5, "decoded media kept in memory, GiB", at_least=0),
    "threads": Field(2, "threads of each process that decode media", at_least=1),
    "processes": Field(0, "worker processes that read samples; 0 reads them in threads", at_least=0),
    "timeout": Field(60.0, "seconds to read a sample, after which it is skipped", above=0),
    "max_skip_share": Field(
        0.05, "fraction of samples that may be unusable before the run stops", at_least=0, below=1
    ),
    "workers": Field(2, "processes that generate data", at_least=1),
    "needles": {
        "seed": Field(0, "seed of the generated benchmark"),
        "num_train": Field(1600, "training videos", at_least=1),
        "num_validation": Field(64, "validation videos", at_least=1),
        "num_heldout": Field(128, "held-out videos", at_least=1),
        "num_images": Field(8000, "images for pretraining", at_least=1),
        "num_sequences": Field(4000, "short videos for pretraining", at_least=1),
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
    "data": Field(-1, "replicas of the parameters; splits the batch; -1: all remaining devices"),
    "fsdp": Field(1, "shards of the parameters; splits the batch too"),
    "tensor": Field(1, "shards of the heads and hidden units"),
    "context": Field(1, "shards of the language model's sequence"),
}

CHECKPOINT: Section = {
    "every": Field(500, "steps between checkpoints", at_least=1),
    "keep": Field(1, "newest checkpoints that are kept", at_least=1),
    "keep_every": Field(int, "steps; checkpoints at multiples of this are kept too", at_least=1),
    "best": Field(str, "metric whose best checkpoint is kept too", choices=("loss", "grad_norm")),
    "best_mode": Field("min", "whether the smallest or the largest value is best", choices=("min", "max")),
}

EVALUATION: Section = {
    "annotations": Field(str, "LLaVA file of held-out questions, relative to data.root; None: no evaluation"),
    "media_frames": Field(16, "frames of a video", at_least=1),
    "max_text": Field(64, "text tokens of a prompt", at_least=1),
    "max_subtitle": Field(0, "text tokens of a video's subtitles", at_least=0),
    "batch_size": Field(64, "questions answered together", at_least=1),
    "max_new_tokens": Field(8, "most tokens of an answer", at_least=1),
    "focus_videos": Field(2, "videos in focus.png; 0 draws no picture", at_least=0),
}

GENERATION: Section = {
    "num_frames": Field(int, "frames of a video; None: evaluation.media_frames", at_least=1),
    "max_new_tokens": Field(256, "most tokens of an answer", at_least=1),
    "max_length": Field(int, "most visual and text tokens, including the answer; None: no limit", at_least=1),
    **SAMPLING,
    "end_tokens": Field((), "special tokens that end an answer, besides the tokenizer's eos_token"),
    # Sizes that programs are compiled for; inputs are padded to the next one
    "frames": Field((), "compiled clip lengths, frames; (): 1 and num_frames"),
    "text": Field(
        (32, 48, 64, 96, 128, 256, 512, 1024, 2048),
        "compiled prompt lengths, tokens; longer prompts: multiples of the last",
    ),
    "batch": Field((1, 4, 16), "compiled batch sizes of decoding; the last is the largest"),
    "cache": Field(128, "positions of the KV cache are a multiple of this", at_least=1),
    "prefill": Field(
        4096, "prompt tokens prefilled per device at a time, unless one prompt has more", at_least=1
    ),
    "cached_clips": Field(16, "encoded clips whose visual tokens are kept for later questions", at_least=0),
}

CONFIG: Section = {
    "seed": Field(0, "seed of initial parameters, data order and selection noise"),
    "initial": Field(
        str, "checkpoint to start from: WORKDIR/checkpoints/STAGE/STEP, or the output of `convert`"
    ),
    "model": MODEL,
    "data": DATA,
    "weights": WEIGHTS,
    "stages": Field((), "stages of training in their order: stage(...)"),
    "mesh": MESH,
    "distributed": DISTRIBUTED,
    "checkpoint": CHECKPOINT,
    "log_every": Field(50, "steps between lines of the log", at_least=1),
    "evaluation": EVALUATION,
    "generation": GENERATION,
}

STAGE: Section = {
    "name": Field(str, "name of the stage and of its folder of checkpoints"),
    "annotations": Field(str, "LLaVA file, relative to data.root ..."),
    "sources": Field((), "... or a mixture of source(...)"),
    "steps": Field(int, "steps, or ...", at_least=1),
    "epochs": Field(float, "... epochs: passes over the records", above=0),
    "batch_size": Field(32, "samples per step, over all devices", at_least=1),
    "microbatches": Field(1, "microbatches per step, whose gradients are accumulated", at_least=1),
    "loss_chunk": Field(0, "text tokens per sample whose logits are in memory at a time; 0: all", at_least=0),
    "num_frames": Field(16, "frames of a sample, after padding", at_least=1),
    "max_text": Field(64, "text tokens of a sample, after padding", at_least=1),
    "buckets": Field((), "(num_frames, max_text) pairs of the batches, instead of these two"),
    "max_length": Field(int, "most visual and text tokens of a sample", at_least=1),
    "on_overflow": Field(
        "error",
        'what happens to a longer sample: "error" skips it; "drop_turns" drops its last turns; '
        '"fewer_frames" samples fewer frames',
        choices=ON_OVERFLOW,
    ),
    "max_subtitle": Field(
        0, "most text tokens of a video's subtitles, placed between its frames; 0: none", at_least=0
    ),
    "max_turns": Field(int, "turns that are drawn from a record; None: all", at_least=1),
    "connector": Field(ConfigDict, "connector of this stage, connector(...); None: config.model.connector"),
    "trainable": Field(
        tuple, 'regular expressions over parameter paths, "language/.*"; None: the connector\'s own'
    ),
    "copy": Field((), '"destination <- source" parameter paths, copied once when the stage starts'),
    "random_steps": Field(0, "first steps, in which the connector selects frames at random", at_least=0),
    "learning_rate": Field(1e-3, "peak learning rate of AdamW", above=0),
    "lr_scale": Field((), "(regular expression, factor) pairs that scale the learning rate"),
    "schedule": Field(
        "cosine",
        'learning rate after the warm-up: "cosine" to 0, or "linear_tail": constant, then linear to 0 over '
        "the last quarter",
        choices=("cosine", "linear_tail"),
    ),
    "warmup": Field(0.03, "fraction of the steps with a linear warm-up", at_least=0, below=1),
    "weight_decay": Field(0.0, "decoupled weight decay", at_least=0),
    "b2": Field(0.999, "decay of AdamW's second moment", above=0, below=1),
    "clip": Field(1.0, "largest global gradient norm", above=0),
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
