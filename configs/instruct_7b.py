"""Stage 2 of the paper at full size, from the checkpoint of stage 1: language model, DPE, CCE and projectors.

    python -m dynfocus_jax.train --config configs/instruct_7b.py --config.data.root=DIR \
        --config.initial=runs/align_7b/checkpoints/align/3085 --workdir runs/instruct_7b

DIR holds instruct.json (LLaVA format) and its media; the visual tokens stand where a record has its <image>,
before or after the first question. 6.8 B parameters are trained: with their gradients and moments they take
101 GiB, split over all devices (config.mesh.fsdp). instruct_7b.py:train=lora trains 0.4 B instead: low-rank
updates of the language model, and the connector as ever.
"""

from configs import common


def get_config(arg: str = ""):
    chosen = common.options(arg, "configs/instruct_7b.py", train=("full", "lora"))
    config = common.eva_vicuna_7b()
    return common.instruct_lora(config) if chosen["train"] == "lora" else common.instruct(config)
