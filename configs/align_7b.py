"""Stage 1 of the paper at full size: train the projectors of EVA-CLIP ViT-g/14, Q-Former and Vicuna-7B v1.5.

    python -m dynfocus_jax.convert --config configs/align_7b.py --dtype=bfloat16 \
        --output published/eva_vicuna_7b
    python -m dynfocus_jax.train --config configs/align_7b.py --config.initial=published/eva_vicuna_7b \
        --config.data.root=DIR --workdir runs/align_7b

The first command reads the published weights listed in configs/common.py. DIR holds align.json (LLaVA
format) and its media. `configs/align_7b.py:mixture=paper` trains on the paper's data sets instead;
configs/mixtures.py lists the files that DIR must then hold.

31 M parameters are trained. The frozen ones take 15 GiB, sharded over all devices.
"""

from ml_collections.config_dict import ConfigDict

from configs import common, mixtures


def get_config(arg: str = "") -> ConfigDict:
    """Return the configuration; options in `arg`: mixture=ROW, a name in `mixtures.ROWS`."""
    options = common.parse_options(arg, "configs/align_7b.py", mixture=("none", *mixtures.ROWS))
    config = common.eva_vicuna_7b()
    if options["mixture"] == "none":
        return common.align(config)
    return common.align(config, **common.mixture_fields(mixtures.align_sources(options["mixture"])))
