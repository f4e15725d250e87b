"""Shared parts of the full-size configurations: the backbones, the paper's connector and its two stages.

Published weights are expected in the folder `published`, under their publishers' names. Symbolic links work,
and every path is a field of the configuration:

    published/eva_vit_g.pth                        EVA-CLIP ViT-g/14 of LAVIS (BLIP-2)
    published/instruct_blip_vicuna7b_trimmed.pth   InstructBLIP's Q-Former of LAVIS
    published/vicuna-7b-v1.5/                      lmsys/vicuna-7b-v1.5, with its tokenizer
    published/bert-base-uncased/vocab.txt          google-bert/bert-base-uncased, the Q-Former's vocabulary

The Hugging Face hub has the last two, and a replacement for the first two:

    hf download lmsys/vicuna-7b-v1.5 --local-dir published/vicuna-7b-v1.5
    hf download google-bert/bert-base-uncased vocab.txt --local-dir published/bert-base-uncased
    hf download Salesforce/instructblip-vicuna-7b --local-dir published/instructblip-vicuna-7b

To use the replacement (DIR is its folder), pass --config.weights.vision=DIR --config.weights.text_encoder=DIR
--config.model.text_encoder.vision_eps=1e-6; the last sets the epsilon of its LayerNorm.
"""

from collections.abc import Sequence
from typing import Any

from ml_collections.config_dict import ConfigDict

from dynfocus_jax.config import default_config, stage
from dynfocus_jax.errors import UserError

# f, W_k, W_v and W_q: the parameters that the first stage trains.
PROJECTORS = ("connector/projector/.*", "connector/cce/context/.*", "text_encoder/query_projection/.*")


def eva_vicuna_7b() -> ConfigDict:
    """Return the paper's system: `default_config` with the paper's settings spelled out, without stages."""
    config = default_config()
    model = config.model
    # J = 0.8 * 25 = 20 cones (B.7), each of 16 + 16 + 8 = 40 tokens
    model.connector.dpe.update({"num_prototypes": 25, "ratio": 0.8, "samples": 500, "sigma": 0.1})
    model.connector.cce.update({"levels": ((16, 8), (8, 3)), "cones": "multi_grained"})
    model.language.remat = "full"
    config.mesh.update({"data": 1, "fsdp": -1})  # parameters and moments sharded over all devices
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
            "max_query": 256,  # longer text is truncated on the left, as in the published text encoder
            "threads": 8,
        }
    )
    config.checkpoint.every = 1000
    config.evaluation.update({"media_frames": 64, "max_text": 512, "batch_size": 8, "max_new_tokens": 256})
    return config


def align(config: ConfigDict, **changes: Any) -> ConfigDict:
    """Set the first stage (paper, C.1): train the projectors on captions; all other parameters are frozen.

    Args:
      config: changed in place.
      changes: fields of the stage that differ from the paper's.

    Returns:
      `config`.
    """
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
                # One epoch of LLaMA-VID's 790 k captioned images and videos. For other data, set this to the
                # number of samples / 256. Samples with fewer frames, such as images, are padded.
                "steps": 3085,
                "trainable": PROJECTORS,
            }
            | changes,
        ),
    )
    return config


def instruct(config: ConfigDict, **changes: Any) -> ConfigDict:
    """Set the second stage (paper, C.1): train all but vision tower and Q-Former on conversations.

    Args:
      config: changed in place.
      changes: fields of the stage that differ from the paper's.

    Returns:
      `config`.
    """
    config.data.template = "vicuna_v1"
    config.stages = (
        _stage(
            name="instruct",
            batch_size=32,
            max_text=2048,
            loss_chunk=256,
            **{
                "annotations": "instruct.json",
                # One epoch of LLaMA-VID's 763 k conversations; the paper names its sources, but not their
                # sizes. For other data, set this to the number of conversations / 32.
                "steps": 23843,
                "num_frames": 64,
                "learning_rate": 2e-5,
                "trainable": ("language/.*", "connector/.*", PROJECTORS[2]),
            }
            | changes,
        ),
    )
    return config


def instruct_lora(config: ConfigDict, **changes: Any) -> ConfigDict:
    """Set the second stage with low-rank updates of the language model, with the settings of LLaVA 1.5.

    Arguments and result as for `instruct`.
    """
    targets = ("query", "key", "value", "out", "gate", "up", "down")
    config.model.language.lora.update({"rank": 128, "alpha": 256.0, "targets": targets})
    other_trained = ("connector/.*", PROJECTORS[2])
    lora_fields = {
        "learning_rate": 2e-4,
        "lr_scale": tuple((pattern, 0.1) for pattern in other_trained),
        "trainable": ("language/.*lora_.*", *other_trained),
    }
    return instruct(config, **lora_fields | changes)


def mixture_fields(sources: Sequence[ConfigDict]) -> dict[str, Any]:
    """Return the fields of a stage that trains one epoch of a mixture instead of steps on one LLaVA file."""
    return {"annotations": None, "steps": None, "sources": tuple(sources), "epochs": 1.0}


def _stage(**fields: Any) -> ConfigDict:
    """Return a stage with the recipe of both: AdamW, cosine after 3 % warm-up, no weight decay."""
    recipe = {"schedule": "cosine", "warmup": 0.03, "weight_decay": 0.0, "b2": 0.999, "clip": 1.0}
    return stage(**recipe, **fields)


def parse_options(arg: str, file: str, **choices: tuple[str, ...]) -> dict[str, str]:
    """Parse the options `name=value,...` of a configuration file.

    Args:
      arg: text after the colon of `--config FILE:arg`.
      file: name of the configuration file, for messages.
      choices: allowed values of each option; the first is the default.

    Returns:
      The value of each option.

    Raises:
      UserError: if an option or value is unknown.
    """
    values_by_name = {name: values[0] for name, values in choices.items()}
    for option in filter(None, arg.split(",")):
        name, _, value = option.partition("=")
        if value not in choices.get(name, ()):
            known = ", ".join(f"{name}={value}" for name, values in choices.items() for value in values)
            raise UserError(f"{file} has no option {option!r}, expected one of {known}.")
        values_by_name[name] = value
    return values_by_name
