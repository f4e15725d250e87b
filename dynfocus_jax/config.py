"""Configuration: every field with its default. `dynfocus_jax.validation` checks it.

A config file defines `get_config(arg="")` that starts from `default_config()`, changes fields and lists its
stages with `stage(...)`. Commands take it as `--config FILE[:variant]` and single fields as
`--config.model.dpe.ratio=0.5` or `--config.stages[2].steps=100`.
"""

from ml_collections.config_dict import ConfigDict, placeholder

from dynfocus_jax.errors import UserError, suggest


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
            "template": "plain",  # conversation form, see text/conversation.py
            "max_query": 32,  # text tokens for the text encoder
            # What the text encoder reads of several questions: all "joined" | the "first_turn"'s only |
            # "each_turn"'s own: a record of n turns is n samples then, the turns before are its history
            "text_guidance": "joined",
            "sampling": {
                # "uniform": as many frames as the bucket has, evenly spread | "segments": one of each of so
                # many equal parts | "fps": `fps` a second; of more than `cap` frames `above` uniform ones
                "kind": "uniform",
                "fps": 1.0,
                "cap": 2000,
                "above": 200,
                "pick": "middle",  # of each segment | "random"
            },
            "image_layout": "crop",  # the centre, as CLIP | "pad" with the mean colour | "stretch"
            "features": placeholder(str),  # folder that `extract` wrote, read in place of pixels
            "lengths": placeholder(str),  # file of known lengths; None: WORKDIR/lengths.jsonl
            "cache_gib": 0.5,  # decoded media kept in memory
            "threads": 2,  # decoding threads of a process
            "processes": 0,  # processes that read samples; 0: threads of this one
            "timeout": 60.0,  # seconds; a sample that takes longer is skipped
            "max_skip_share": 0.05,  # the run stops when more samples than this cannot be used
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
            "max_subtitle": 0,
            "batch_size": 64,
            "max_new_tokens": 8,
            "focus_videos": 2,  # rows of focus.png; 0 for no picture
        }
    )
    config.generation = ConfigDict(
        {
            "num_frames": placeholder(int),  # of a video; None: evaluation.media_frames
            "max_new_tokens": 256,  # of an answer
            "max_length": placeholder(int),  # visual and text tokens, answer included; None: no limit
            "temperature": 0.0,  # 0: greedy
            "top_k": 0,  # candidates; 0: all
            "top_p": 1.0,
            "end_tokens": (),  # special tokens that end an answer, beside the tokenizer's eos_token
            # Sizes that programs are compiled for; what is smaller is padded to the next one
            "frames": (),  # frames of a clip; (): 1 and num_frames
            "text": (32, 48, 64, 96, 128, 256, 512, 1024, 2048),  # of a prompt; more: a multiple of the last
            "batch": (1, 4, 16),  # answers that are decoded together; the last is the most
            "cache": 128,  # positions of the key-value cache: a multiple of this
            "read": 4096,  # tokens of prompts that a share of the devices reads at a time, if one is no more
            "looks": 16,  # (video, prompt) pairs whose visual tokens are kept for later questions
        }
    )
    return config.lock()


def stage(**fields) -> ConfigDict:
    """One stage of training.

    `name` and `trainable` have no default; nor have `annotations` or `sources`, and `steps` or `epochs`, of
    which one is given.
    """
    defaults = ConfigDict(
        {
            "name": placeholder(str),
            "annotations": placeholder(str),  # a LLaVA file, relative to data.root ...
            "sources": (),  # ... or a mixture of source(...)
            "steps": placeholder(int),
            "epochs": placeholder(float),  # passes over the records, instead of steps
            "batch_size": 32,
            "microbatches": 1,  # parts of a batch that are gone through in turn, their gradients summed
            "loss_chunk": 0,  # text tokens at a time whose logits are held for the loss; 0 for all at once
            # A batch has the shape of a bucket: T frames, and so many text tokens (no visual ones)
            "num_frames": 16,
            "max_text": 64,
            "buckets": (),  # (num_frames, max_text) pairs, instead of these two
            "max_length": placeholder(int),  # visual and text tokens of a sample
            # A sample of more tokens: "error": skipped, with that reason | "drop_turns": without its last
            # turns | "fewer_frames": with fewer frames
            "on_overflow": "error",
            "max_subtitle": 0,  # text tokens of a video's subtitles, between its frames; 0 leaves them out
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
    return _filled(defaults, fields, "stage")


def source(**fields) -> ConfigDict:
    """One source of a stage's mixture. `name` and `annotations` have no default."""
    defaults = ConfigDict(
        {
            "name": placeholder(str),
            "annotations": placeholder(str),  # a file, relative to data.root, or absolute
            "format": "llava",  # of the file, see records/formats.py
            "media": placeholder(str),  # folder of its media; None: data.root
            "modality": "auto",  # as each record says | "image" | "video" | "text"
            "select": "all",  # | "first:N" | "first:N%" | "random:N" | "random:N%" of the records
            "repeat": 1,  # times an epoch
            # Share of an epoch, relative to the other sources' weights; None: as many records as it has
            "weight": placeholder(float),
        }
    )
    return _filled(defaults, fields, "source")


def _filled(defaults: ConfigDict, fields: dict, function: str) -> ConfigDict:
    defaults.lock()
    for key, value in fields.items():
        if key not in defaults:
            raise UserError(f"{function}(...) has no field {key!r}{suggest(key, defaults)}.")
        defaults[key] = value
    return defaults


def stage_buckets(stage_config: ConfigDict) -> tuple[tuple[int, int], ...]:
    """The shapes of a stage's batches: (num_frames, max_text)."""
    return tuple(map(tuple, stage_config.buckets)) or ((stage_config.num_frames, stage_config.max_text),)


def with_steps(config: ConfigDict, index: int, steps: int) -> ConfigDict:
    """A copy in which stage `index` has so many steps, in place of its epochs."""
    config = config.copy_and_resolve_references()
    stages = [one.copy_and_resolve_references() for one in config.stages]
    stages[index].update({"steps": steps, "epochs": None})
    config.stages = tuple(stages)
    return config


def to_dict(config: ConfigDict) -> dict:
    """Plain dicts and lists, for json."""

    def plain(value):
        if isinstance(value, ConfigDict):
            return {key: plain(value[key]) for key in value}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(config)


def differences(old, new, words: tuple[str, str] = ("then", "now"), where: str = "") -> list[str]:
    """Where two plain configurations (`to_dict`) differ: "FIELD: then OLD, now NEW", in their order."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in old | new
            for line in differences(old.get(key), new.get(key), words, f"{where}.{key}" if where else key)
        ]
    return [] if old == new else [f"{where}: {words[0]} {old!r}, {words[1]} {new!r}"]


def from_dict(fields: dict) -> ConfigDict:
    """The configuration that `to_dict` took apart."""

    def frozen(value):
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    def update(config, fields, where):
        for key, value in fields.items():
            if key not in config:
                raise UserError(f"{where}.{key} is not a field of the configuration{suggest(key, config)}.")
            if isinstance(config[key], ConfigDict):
                update(config[key], value, f"{where}.{key}")
            else:
                config[key] = frozen(value)

    def read_stage(fields):
        sources = tuple(source(**{k: frozen(v) for k, v in s.items()}) for s in fields.get("sources", ()))
        return stage(**{key: frozen(value) for key, value in fields.items()} | {"sources": sources})

    config = default_config()
    stages = tuple(map(read_stage, fields["stages"]))
    update(config, {key: value for key, value in fields.items() if key != "stages"}, "config")
    config.stages = stages
    return config
