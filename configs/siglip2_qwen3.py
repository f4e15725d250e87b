"""DynFocus on backbones of 2025, in two stages: `siglip2_qwen3.py:stage=align`, `:stage=instruct`.

    python -m dynfocus_jax.convert --config configs/siglip2_qwen3.py --output published/siglip2_qwen3
    python -m dynfocus_jax.train --config configs/siglip2_qwen3.py:stage=align \
        --config.initial=published/siglip2_qwen3 --config.data.root=DIR --workdir runs/siglip2_align

The backbones are google/siglip2-so400m-patch16-384 and Qwen/Qwen3-4B-Instruct-2507, in the folders

    published/siglip2-so400m-patch16-384
    published/Qwen3-4B-Instruct-2507
    published/bert-base-uncased                 only its vocab.txt

The vision tower has 24 x 24 patches, which pool to 4 x 4 (the patch14-384 model is not supported, because
384 is no multiple of 14). No Q-Former was published for it: a small text encoder over BERT's vocabulary is
trained from scratch in both stages. Conversations use Qwen's chat template.
"""

from ml_collections.config_dict import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Return the configuration; options in `arg`: stage=instruct (default) or stage=align."""
    options = common.parse_options(arg, "configs/siglip2_qwen3.py", stage=("instruct", "align"))
    config = common.eva_vicuna_7b()
    model = config.model
    model.vision.update(
        {
            "image_size": 384,
            "patch_size": 16,
            "width": 1152,
            "depth": 27,
            "heads": 16,
            "mlp_dim": 4304,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "cls_token": False,
            "final_norm": True,
            "activation": "gelu_tanh",
            "eps": 1e-6,
        }
    )
    model.text_encoder.update({"depth": 2, "cross_every": 1})
    model.language.update(
        {
            "vocab_size": 151936,
            "width": 2560,
            "depth": 36,
            "heads": 32,
            "kv_heads": 8,
            "head_dim": 128,
            "mlp_dim": 9728,
            "qk_norm": True,
            "rope_theta": 5e6,
            "eps": 1e-6,
            "tied_embeddings": True,
        }
    )
    config.weights.update(
        {
            "vision": "published/siglip2-so400m-patch16-384",
            "text_encoder": None,
            "language": "published/Qwen3-4B-Instruct-2507",
        }
    )
    config.data.tokenizer = "published/Qwen3-4B-Instruct-2507"
    config.data.image_layout = "stretch"  # as in SigLIP's preprocessing
    if options["stage"] == "align":
        return common.align(config, trainable=(*common.PROJECTORS[:2], "text_encoder/.*"))
    common.instruct(config, trainable=("language/.*", "connector/.*", "text_encoder/.*"))
    config.data.template = "chatml"
    return config
