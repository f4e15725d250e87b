"""Stage 2 of the paper at full size: train language model, DPE, CCE and projectors after stage 1.

    python -m dynfocus_jax.train --config configs/instruct_7b.py --config.data.root=DIR \
        --config.initial=runs/align_7b/checkpoints/align/3085 --workdir runs/instruct_7b

DIR holds instruct.json (LLaVA format) and its media. The visual tokens replace the <image> of a record, which
may stand before or after the first question.

Options (configs/instruct_7b.py:NAME=VALUE, joined by commas):

    train=full       train 6.8 B parameters (default). With their gradients and moments they take 101 GiB,
                     sharded over all devices (config.mesh.fsdp).
    train=lora       train 0.4 B parameters: low-rank updates of the language model, and the connector
    mixture=paper    train on the paper's data sets; configs/mixtures.py lists the files that DIR must hold
"""

from ml_collections.config_dict import ConfigDict

from configs import common, mixtures


def get_config(arg: str = "") -> ConfigDict:
    """Return the configuration; options in `arg`: train=full or lora, mixture=ROW of `mixtures.ROWS`."""
    options = common.parse_options(
        arg, "configs/instruct_7b.py", train=("full", "lora"), mixture=("none", *mixtures.ROWS)
    )
    config = common.eva_vicuna_7b()
    changes = {}
    if options["mixture"] != "none":
        changes = common.mixture_fields(mixtures.instruct_sources(options["mixture"]))
    if options["train"] == "lora":
        return common.instruct_lora(config, **changes)
    return common.instruct(config, **changes)
