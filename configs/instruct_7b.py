"""Stage 2 of the paper at full size, from the checkpoint of stage 1: language model, DPE, CCE and projectors.

    python -m dynfocus_jax.train --config configs/instruct_7b.py --config.data.root=DIR \
        --config.initial=runs/align_7b/checkpoints/align/3085 --workdir runs/instruct_7b

DIR holds instruct.json (LLaVA format) and its media; the visual tokens stand where a record has its <image>,
before or after the first question. With instruct_7b.py:mixture=paper (joined to other options by a comma) it
holds the paper's data sets instead, see configs/mixtures.py. 6.8 B parameters are trained: with their
gradients and moments they take 101 GiB, split over all devices (config.mesh.fsdp). instruct_7b.py:train=lora
trains 0.4 B instead: low-rank updates of the language model, and the connector as ever.
"""

from configs import common, mixtures


def get_config(arg: str = ""):
    choices = {"train": ("full", "lora"), "mixture": ("none", *mixtures.ROWS)}
    chosen = common.options(arg, "configs/instruct_7b.py", **choices)
    sources = {} if chosen["mixture"] == "none" else common.mixture(mixtures.instruct(chosen["mixture"]))
    instruct = common.instruct_lora if chosen["train"] == "lora" else common.instruct
    return instruct(common.eva_vicuna_7b(), **sources)
