"""Weights of the published connector under the names of this project."""

import numpy as np
import torch
from flax.traverse_util import unflatten_dict

# Published module -> our path
MODULES = {
    "mm_projector.0": "projector/up",
    "mm_projector.2": "projector/down",
    "vlm_att_key_projector": "cce/context/key",
    "vlm_att_val_projector": "cce/context/value",
    "merge.score": "cce/spatial/gate",
    "selective.score_network.in_conv.0": "dpe/score_net/in_norm",
    "selective.score_network.in_conv.1": "dpe/score_net/in_dense",
    "selective.score_network.out_conv.0": "dpe/score_net/out_dense_0",
    "selective.score_network.out_conv.2": "dpe/score_net/out_dense_1",
    "selective.score_network.out_conv.4": "dpe/score_net/out_dense_2",
}


def our_params(published: dict[str, torch.Tensor], inside: str = "", prefix: str = "") -> dict:
    """Return published weights (or gradients) as the parameter tree of the module at path `inside`.

    prefix: added to the given names, for example "selective.score_network.".
    """
    flat = {}
    for name, value in published.items():
        module, _, kind = f"{prefix}{name}".rpartition(".")
        path = MODULES[module]
        value = np.asarray(value.detach())
        if kind == "weight":
            kind = "scale" if value.ndim == 1 else "kernel"
            value = value.T  # [out, in] in PyTorch; a norm's weight has one axis
        flat[tuple(f"{path}/{kind}".removeprefix(inside).strip("/").split("/"))] = value
    return unflatten_dict(flat)
