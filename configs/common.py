"""What the configurations of published size share: backbones, the paper's connector and its two stages.

Published files are expected in the folder `published`, under their publishers' names (links will do); every
path is a field, so that each can lie elsewhere:

    published/eva_vit_g.pth                        EVA-CLIP ViT-g/14 of LAVIS (BLIP-2)
    published/instruct_blip_vicuna7b_trimmed.pth   InstructBLIP's Q-Former of LAVIS
    published/vicuna-7b-v1.5/                      lmsys/vicuna-7b-v1.5, with its tokenizer
    published/bert-base-uncased/vocab.txt          google-bert/bert-base-uncased, the Q-Former's vocabulary

The last two, and a replacement for the first two, come from the Hugging Face hub:

    hf download lmsys/vicuna-7b-v1.5 --local-dir published/vicuna-7b-v1.5
    hf download google-bert/bert-base-uncased vocab.txt --local-dir published/bert-base-uncased
    hf download Salesforce/instructblip-vicuna-7b --local-dir published/instructblip-vicuna-7b

With the last, name that folder as vision and as text_encoder, and set its LayerNorm's epsilon:
--config.weights.vision=DIR --config.weights.text_encoder=DIR --config.model.text_encoder.vision_eps=1e-6.
"""

from dynfocus_jax.config import default_config, stage
from dynfocus_jax.errors import UserError

# f, W_k, W_v and W_q: all that the first stage trains, and all that the second takes over from it.
PROJECTORS = ("connector/projector/.*", "connector/cce/context/.*", "text_encoder/query_projection/.*")


def eva_vicuna_7b():
    """The paper's system: the model of `default_config`, with what the paper says of it written out."""
    config = default_config()
    model = config.model
    model.connector.dpe.update(
        {"num_prototypes": 25, "ratio": 0.8, "samples": 500, "sigma": 0.1}
    )  # J = 20 (B.7)
    model.connector.cce.update(
        {"levels": ((16, 8), (8, 3)), "cones": "multi_grained"}
    )  # 16 + 16 + 8 = 40 tokens
    model.language.remat = "full"
    config.mesh.update({"data": 1, "fsdp": -1})  # parameters and moments split over all devices
    config.weights.update(
        {
            "vision": "published/eva_vit_g.pth",
            "text_encoder": "published/instruct_blip_vicuna7b_trimmed.pth",
            "language": "published/vicuna-7b-v1.5",
        }
    )
    config.data.update(
        {
            "tokenizer": "published/vicuna-7b-v1.5",
            "query_tokenizer": "published/bert-base-uncased",
            "max_query": 256,  # of which the left is cut off, as the published text encoder does
            "threads": 8,
        }
    )
    config.checkpoint.every = 1000
    config.evaluation.update({"media_frames": 64, "max_text": 512, "batch_size": 8, "max_new_tokens": 256})
    return config


def align(config, **changes):
    """The first stage (paper, C.1): captions; the towers and the score net stay as they are."""
    config.data.template = "plain_guided"
    config.stages = (
        _stage(
            name="align",
            batch_size=256,
            learning_rate=1e-3,
            num_frames=32,
            max_text=256,
            loss_chunk=32,
            **{
                "annotations": "align.json",
                # One epoch of 790 k images and videos with captions, as many as LLaMA-VID has; other data:
                # their number / 256. Of a sample without enough frames (an image has one) the rest is
                # padding.
                "steps": 3085,
                "trainable": PROJECTORS,
            }
            | changes,
        ),
    )
    return config


def instruct(config, **changes):
    """The second stage (paper, C.1): conversations; all but the vision tower and the Q-Former is trained."""
    config.data.template = "vicuna_v1"
    config.stages = (
        _stage(
            name="instruct",
            batch_size=32,
            max_text=2048,
            loss_chunk=256,
            **{
                "annotations": "instruct.json",
                # One epoch of 763 k conversations, as many as LLaMA-VID has (the paper names its sources, not
                # their sizes); other data: their number / 32.
                "steps": 23843,
                "num_frames": 64,
                "learning_rate": 2e-5,
                "trainable": ("language/.*", "connector/.*", PROJECTORS[2]),
            }
            | changes,
        ),
    )
    return config


def mixture(sources) -> dict:
    """Changes of a stage that is trained for one epoch of a mixture instead of one LLaVA file."""
    return {"annotations": None, "steps": None, "sources": sources, "epochs": 1.0}


def instruct_lora(config, **changes):
    """The second stage with low-rank updates in place of the language model itself, as LLaVA 1.5 does it."""
    every = ("query", "key", "value", "out", "gate", "up", "down")
    config.model.language.lora.update({"rank": 128, "alpha": 256.0, "targets": every})
    rest = ("connector/.*", PROJECTORS[2])
    lora = {
        "learning_rate": 2e-4,
        "lr_scale": tuple((pattern, 0.1) for pattern in rest),
        "trainable": ("language/.*lora_.*", *rest),
    }
    return instruct(config, **lora | changes)


def _stage(**fields):
    """AdamW with a cosine after 3 % of warm-up and no weight decay, one epoch, in both stages."""
    recipe = {"schedule": "cosine", "warmup": 0.03, "weight_decay": 0.0, "b2": 0.999, "clip": 1.0}
    return stage(**recipe, **fields)


def options(arg: str, file: str, **choices: tuple[str, ...]) -> dict[str, str]:
    """The options `name=value,...` of a config file, each one of its `choices`; the first is the default.

    Raises:
      UserError: an option or value that there is not.
    """
    chosen = {name: values[0] for name, values in choices.items()}
    for option in filter(None, arg.split(",")):
        name, _, value = option.partition("=")
        if value not in choices.get(name, ()):
            known = ", ".join(f"{name}={value}" for name, values in choices.items() for value in values)
            raise UserError(f"{file} has no option {option!r}; there is {known or 'none'}.")
        chosen[name] = value
    return chosen
