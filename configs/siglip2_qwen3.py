"""DynFocus on backbones of 2025, in two stages: `siglip2_qwen3.py:stage=align`, `:stage=instruct`.

SigLIP 2 so400m (google/siglip2-so400m-patch16-384: 24 x 24 patches, which pool to 4 x 4; the 384 pixels of
patch14-384 are no multiple of 14) and Qwen3-4B (Qwen/Qwen3-4B-Instruct-2507), in the folders

    published/siglip2-so400m-patch16-384
    published/Qwen3-4B-Instruct-2507
    published/bert-base-uncased                 its vocab.txt

No Q-Former was published for this vision tower: a small text encoder over BERT's vocabulary is trained from
scratch in both stages. The conversations have Qwen's form.

    python -m dynfocus_jax.convert --config configs/siglip2_qwen3.py --output published/siglip2_qwen3
    python -m dynfocus_jax.train --config configs/siglip2_qwen3.py:stage=align \
        --config.initial=published/siglip2_qwen3 --config.data.root=DIR --workdir runs/siglip2_align
"""

from configs import common


def get_config(arg: str = ""):
    chosen = common.options(arg, "configs/siglip2_qwen3.py", stage=("instruct", "align"))
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
    config.data.image_layout = "stretch"  # as SigLIP's own preprocessing
    if chosen["stage"] == "align":
        return common.align(config, trainable=(*common.PROJECTORS[:2], "text_encoder/.*"))
    common.instruct(config, trainable=("language/.*", "connector/.*", "text_encoder/.*"))
    config.data.template = "chatml"
    return config
