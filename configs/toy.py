"""The toy run: DynFocus end to end on two CPU cores, on the "needles" benchmark that it generates.

`configs/toy.py:variant=NAME` runs one of the comparisons in README; `VARIANTS` lists them.
"""

from dynfocus_jax.config import UserError, default_config, stage

VARIANTS = {}


def variant(function):
    """Registers a function that turns the toy config into a variant."""
    VARIANTS[function.__name__] = function
    return function


def get_config(arg: str = ""):
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
    model.dpe.update({"num_prototypes": 8, "neighbors": 4, "num_selected": 3, "samples": 100})
    model.cce.levels = ((4, 5), (2, 2))

    # Pretraining stands in for the published vision tower and language model. It ends in a plain linear
    # projector over a few pooled tokens a frame, from which f and W_v start.
    pretrain = {
        "connector": "pooled",
        "trainable": ("vision/.*", "language/.*", "connector/projector/linear/.*"),
        "learning_rate": 3e-3,
        "schedule": "linear_tail",
        "weight_decay": 0.01,
        "b2": 0.98,
    }
    config.stages = (
        stage(
            name="pretrain_images",
            annotations="images.json",
            steps=900,
            num_frames=1,
            max_text=64,
            max_turns=6,
            batch_size=32,
            **pretrain,
        ),
        stage(
            name="pretrain_sequences",
            annotations="sequences.json",
            steps=1200,
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
            max_text=16,
            trainable=("connector/projector/.*", "connector/cce/context/.*", "text_encoder/.*"),
            copy=("connector/cce/context/value <- connector/projector/linear",),
            random_steps=80,
            learning_rate=1e-3,
            weight_decay=0.01,
            b2=0.98,
        ),
        stage(
            name="instruct",
            annotations="train.json",
            steps=650,
            max_text=16,
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

    if arg:
        name = arg.removeprefix("variant=")
        if name not in VARIANTS:
            raise UserError(f"configs/toy.py has no variant {name!r}; there are {', '.join(VARIANTS)}.")
        VARIANTS[name](config)
    return config
