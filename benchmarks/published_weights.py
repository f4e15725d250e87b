"""The connector's parameters under their published names, and where each one stands in ours."""

import math

import numpy as np

from dynfocus_jax import trees

# Published module -> our path. A Linear's weight [out, in] is a kernel [in, out] here.
LINEAR = {
    "mm_projector.0": "projector/up",
    "mm_projector.2": "projector/down",
    "vlm_att_key_projector": "cce/context/key",
    "vlm_att_val_projector": "cce/context/value",
    "selective.score_network.in_conv.1": "dpe/score_net/in_dense",
    "selective.score_network.out_conv.0": "dpe/score_net/out_dense_0",
    "selective.score_network.out_conv.2": "dpe/score_net/out_dense_1",
    "selective.score_network.out_conv.4": "dpe/score_net/out_dense_2",
    "merge.score": "cce/spatial/gate",
}
NORM = {"selective.score_network.in_conv.0": "dpe/score_net/in_norm"}


def from_published(state: dict[str, np.ndarray]) -> dict:
    """Our parameter tree from arrays by published name.

    Raises:
      KeyError: for a name that is missing or unknown.
    """
    ours = {}
    for published, path in (LINEAR | NORM).items():
        weight, bias = np.asarray(state[f"{published}.weight"]), np.asarray(state[f"{published}.bias"])
        name, weight = ("kernel", weight.T) if published in LINEAR else ("scale", weight)
        ours |= {f"{path}/{name}": np.ascontiguousarray(weight), f"{path}/bias": bias}
    unknown = set(state) - {f"{module}.{kind}" for module in LINEAR | NORM for kind in ("weight", "bias")}
    if unknown:
        raise KeyError(f"no parameter of the published connector: {', '.join(sorted(unknown))}")
    return trees.unflatten(ours)


def random_published(
    vision_width: int, language_width: int, gates: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random float32 parameters by published name: uniform in +-1 / sqrt(inputs), norms at one and zero.

    Args:
      vision_width: C; language_width: D; gates: prototypes of the last spatial level.
    """
    c, d = vision_width, language_width
    shapes = [
        (d, c),
        (d, d),
        (c, c),
        (d, c),
        (2 * c, 2 * c),
        (c, 2 * c),
        (c // 2, c),
        (1, c // 2),
        (gates, gates),
    ]
    rng, state = np.random.default_rng(seed), {}
    for module, (outputs, inputs) in zip(LINEAR, shapes, strict=True):
        bound = 1 / math.sqrt(inputs)
        for kind, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            state[f"{module}.{kind}"] = bound * (2 * rng.random(shape, np.float32) - 1)
    for module in NORM:
        state |= {
            f"{module}.weight": np.ones(2 * c, np.float32),
            f"{module}.bias": np.zeros(2 * c, np.float32),
        }
    return state
