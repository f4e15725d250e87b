"""The connector's parameters under their published names, and the corresponding paths in our tree."""

import math

import numpy as np

from dynfocus_jax import trees

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


def our_params(published: dict[str, np.ndarray]) -> dict:
    """Return our parameter tree from arrays by published name.

    The weight [out, in] of a Linear becomes a kernel [in, out].
    """
    flat = {}
    for name, value in published.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight":
            kind, value = "scale" if value.ndim == 1 else "kernel", np.ascontiguousarray(value.T)
        flat[f"{MODULES[module]}/{kind}"] = value
    return trees.unflatten(flat)


def random_published(
    vision_width: int, language_width: int, gates: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return random float32 parameters by published name.

    Linear layers are uniform within ±1 / sqrt(inputs); norms have weight 1 and bias 0.

    Args:
      vision_width: C.
      language_width: D.
      gates: prototypes of the last spatial level.
      seed: of the random numbers.
    """
    c, d = vision_width, language_width
    shapes = [(d, c), (d, d), (c, c), (d, c), (gates, gates), (2 * c,)]
    shapes += [(2 * c, 2 * c), (c, 2 * c), (c // 2, c), (1, c // 2)]
    rng, published = np.random.default_rng(seed), {}
    for module, shape in zip(MODULES, shapes, strict=True):
        if len(shape) == 1:
            weight, bias = np.ones(shape, np.float32), np.zeros(shape, np.float32)
        else:
            bound = 1 / math.sqrt(shape[1])
            weight, bias = (bound * (2 * rng.random(s, np.float32) - 1) for s in (shape, shape[:1]))
        published |= {f"{module}.weight": weight, f"{module}.bias": bias}
    return published
