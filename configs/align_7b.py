"""Stage 1 of the paper at full size: EVA-CLIP ViT-g/14, InstructBLIP's Q-Former, Vicuna-7B v1.5; projectors.

    python -m dynfocus_jax.convert --config configs/align_7b.py --dtype=bfloat16 \
        --output published/eva_vicuna_7b
    python -m dynfocus_jax.train --config configs/align_7b.py --config.initial=published/eva_vicuna_7b \
        --config.data.root=DIR --workdir runs/align_7b

The first command reads the published files that configs/common.py lists; DIR holds align.json (LLaVA format)
and its media. With align_7b.py:mixture=paper it holds the paper's data sets instead, see configs/mixtures.py.
31 M parameters are trained; the others take 15 GiB, split over all devices.
"""

from configs import common, mixtures


def get_config(arg: str = ""):
    chosen = common.options(arg, "configs/align_7b.py", mixture=("none", *mixtures.ROWS))
    sources = {} if chosen["mixture"] == "none" else common.mixture(mixtures.align(chosen["mixture"]))
    return common.align(common.eva_vicuna_7b(), **sources)
