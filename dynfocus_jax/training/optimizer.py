"""AdamW with a learning rate schedule, gradient clipping and learning rate factors by parameter path."""

import jax
import optax
from ml_collections import ConfigDict

from dynfocus_jax import trees


def make_schedule(stage: ConfigDict) -> optax.Schedule:
    """Return the learning rate by step: a linear warm-up, then a cosine, or a constant with a linear tail."""
    steps, peak = stage.steps, stage.learning_rate
    warmup = round(stage.warmup * steps)
    rise = optax.linear_schedule(0 if warmup else peak, peak, warmup)
    if stage.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    else:
        tail = max(steps // 4, 1)
        fall = optax.schedules.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, 0, tail)], [steps - warmup - tail]
        )
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(stage: ConfigDict, trained: dict) -> optax.GradientTransformation:
    """Return the optimizer of a stage's trained parameters, nested dicts of arrays or shapes.

    Raises:
      UserError: a pattern of `stage.lr_scale` matches no trained parameter.
    """
    paths = list(trees.flatten(trained))
    factors = dict.fromkeys(paths, 1.0)
    for pattern, factor in stage.lr_scale:
        matches = trees.matcher([pattern], paths, f"stage {stage.name!r}, lr_scale")
        factors |= {path: factor for path in paths if matches(path)}
    factors = trees.unflatten(factors)
    return optax.chain(
        optax.clip_by_global_norm(stage.clip),
        optax.adamw(make_schedule(stage), b2=stage.b2, weight_decay=stage.weight_decay),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors)),
    )
