"""Differentiable top-k: hard at inference, perturbed in training (paper Eqs. 8 and 9).

Source: Berthet et al. 2020, "Learning with Differentiable Perturbed Optimizers"; Cordonnier et al. 2021,
"Differentiable Patch Selection".
"""

from functools import partial

import jax
import jax.numpy as jnp

from dynfocus_jax.errors import UserError


def hard_topk(
    scores: jax.Array, k: int, *, mask: jax.Array | None = None, count: jax.Array | None = None
) -> jax.Array:
    """Select the k highest scores, ties by index.

    Args:
      scores: [..., N].
      k: static number of slots, 1..N.
      mask: bool [..., N], entries that may be selected; None means all.
      count: int [...], number of entries to select, at most k; None means k.

    Returns:
      Indices int32 [..., k], ascending; N (no entry) in slots beyond `count` or the number of valid entries.

    Raises:
      UserError: if k is outside 1..N.
    """
    num = scores.shape[-1]
    if not 1 <= k <= num:
        raise UserError(f"top-k: k is {k} for {num} scores, expected 1 to {num}.")
    key = scores.astype(jnp.float32)
    available = jnp.full(scores.shape[:-1], num)
    if mask is not None:
        key = jnp.where(mask, jnp.maximum(key, jnp.finfo(jnp.float32).min), -jnp.inf)
        available = mask.sum(-1)
    if count is not None:
        available = jnp.minimum(available, count)
    best = jax.lax.top_k(key, k)[1]
    return jnp.sort(jnp.where(jnp.arange(k) < available[..., None], best, num), axis=-1)


def perturbed_topk(
    scores: jax.Array,
    noise: jax.Array,
    k: int,
    sigma: float,
    jacobian: str = "full",
    *,
    mask: jax.Array | None = None,
    count: jax.Array | None = None,
) -> jax.Array:
    """Compute the mean over noise samples of the one-hot sorted top-k of `scores + sigma * noise`.

    The gradient with respect to the scores, for an upstream gradient G, sample indicators Y_s and noise z_s,
    is mean_s(<G, Y_s> z_s) / sigma ("full", the paper's Eq. 9), or for each entry d
    sum_j G_jd mean_s(Y_s[j, d] z_s[d]) / sigma ("diagonal", the released code: the Jacobian's diagonal only).
    It is zero for masked entries and if sigma <= 1e-20. Noise, mask and count have no gradient.

    Args:
      scores: [B, N].
      noise: [B, S, N], standard normal.
      k: static number of slots, 1..N.
      sigma: static standard deviation of the perturbation, in the scores' units.
      jacobian: "full" or "diagonal".
      mask: bool [B, N], entries that may be selected; None means all.
      count: int [B], number of entries to select; None means k.

    Returns:
      float32 [B, k, N]; slots from `count` on are zero.

    Raises:
      UserError: if the jacobian is unknown or k is outside 1..N.
    """
    if jacobian not in ("full", "diagonal"):
        raise UserError(f'perturbed_topk: jacobian is {jacobian!r}, expected "full" or "diagonal".')
    mask = jnp.ones(scores.shape, bool) if mask is None else mask
    count = jnp.full(scores.shape[:-1], k, jnp.int32) if count is None else count
    return _perturbed(scores.astype(jnp.float32), noise.astype(jnp.float32), mask, count, k, sigma, jacobian)


def distinct_argmax(
    indicators: jax.Array, *, mask: jax.Array | None = None, count: jax.Array | None = None
) -> jax.Array:
    """Take for each slot in order the arg-max over the entries that no earlier slot took, ties by index.

    Args:
      indicators: [B, k, N], the result of `perturbed_topk`.
      mask: bool [B, N], entries that may be taken; None means all.
      count: int [B], number of entries to take; None means k.

    Returns:
      Indices int32 [B, k]; N (no entry) in slots beyond `count` or the number of valid entries.
    """
    batch, k, num = indicators.shape
    free = jnp.ones((batch, num), bool) if mask is None else mask
    wanted = jnp.full((batch,), k) if count is None else count

    def take(free, slot_and_row):
        slot, row = slot_and_row
        best = jnp.argmax(jnp.where(free, row, -jnp.inf), -1)
        best = jnp.where((slot < wanted) & free.any(-1), best, num)
        return free & (best[:, None] != jnp.arange(num)), best

    rows = jnp.moveaxis(indicators.astype(jnp.float32), 1, 0)
    _, taken = jax.lax.scan(take, free, (jnp.arange(k), rows))
    return taken.T.astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _perturbed(scores, noise, mask, count, k, sigma, jacobian):
    return _forward(scores, noise, mask, count, k, sigma, jacobian)[0]


def _forward(scores, noise, mask, count, k, sigma, jacobian):
    perturbed = scores[:, None] + sigma * noise
    chosen = hard_topk(perturbed, k, mask=jnp.broadcast_to(mask[:, None], noise.shape), count=count[:, None])
    return _one_hot(chosen, noise.shape[-1]).mean(1, dtype=jnp.float32), (chosen, noise, mask)


def _backward(k, sigma, jacobian, residuals, grad):
    chosen, noise, mask = residuals  # [B, S, k], [B, S, N], [B, N]
    if sigma <= 1e-20:
        return jnp.zeros(mask.shape, jnp.float32), None, None, None
    samples = noise.shape[1] * sigma
    if jacobian == "full":
        # <G, Y_s> sums the entries of G that sample s chose; a slot without an entry (index N) adds 0.
        rows = jnp.swapaxes(chosen, 1, 2)  # [B, k, S]
        inner = jnp.take_along_axis(grad, rows, -1, mode="fill", fill_value=0.0).sum(1)  # [B, S]
        grad_scores = jnp.einsum("bs,bsn->bn", inner, noise, precision=jax.lax.Precision.HIGHEST) / samples
    else:
        moment = jnp.where(_one_hot(chosen, noise.shape[-1]), noise[:, :, None], 0.0).sum(1)  # [B, k, N]
        grad_scores = (grad * moment).sum(1) / samples
    return jnp.where(mask, grad_scores, 0.0), None, None, None


def _one_hot(chosen, num):
    return chosen[..., None] == jnp.arange(num)  # [B, S, k, N]; XLA fuses it into the sum over S


_perturbed.defvjp(_forward, _backward)
