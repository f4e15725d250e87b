"""Packing parts of varying length into sequences of static length: tokens of frames, visual tokens in text.

Tokens are moved by a single gather with int32 indices, so their gradient is a single scatter.
"""

import jax
import jax.numpy as jnp


def pack_frames(
    rods: jax.Array,
    cones: jax.Array,
    cone_frames: jax.Array,
    rod_mask: jax.Array,
    cone_mask: jax.Array,
    length: int,
    text: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Interleave rod, cone and text tokens in time order, packed to the left.

    The tokens of a frame are its R rod tokens if `rod_mask` is True, then M cone tokens if a valid cone
    belongs to it, then its text.

    Args:
      rods: [B, T, R, D], tokens of every frame; R may be 0.
      cones: [B, J, M, D], tokens of the important frames, in any order; J or M may be 0.
      cone_frames: int32 [B, J], frame of each cone; valid cones have distinct frames.
      rod_mask: bool [B, T], frames whose rod tokens are packed.
      cone_mask: bool [B, J], valid cones.
      length: L, static length of the result, which the caller computes.
      text: tokens [B, S, D] and their frames, int32 [B, S], ascending and then -1 for padding.

    Returns:
      tokens [B, L, D], zero after the last token; mask bool [B, L]; count int32 [B], the number of tokens
      before truncation: tokens were lost if count > length.

    Source: paper Sec. 3.2.
    """
    (batch, frames, per_rod, width), (_, _, per_cone, _) = rods.shape, cones.shape
    cone_mask = cone_mask & (cone_frames >= 0) & (cone_frames < frames)
    frame_or_none = jnp.where(cone_mask, cone_frames, frames)  # [B, J], T for invalid cones
    has_cone = (frame_or_none[:, :, None] == jnp.arange(frames)).any(1)  # [B, T]
    sizes = per_rod * rod_mask + per_cone * has_cone  # [B, T]
    if text is not None:
        text_tokens, text_frames = text
        text_sizes = (text_frames[:, :, None] == jnp.arange(frames)).sum(
            1
        )  # [B, T] text tokens of each frame
        sizes += text_sizes
    ends = jnp.cumsum(sizes, 1)
    starts = ends - sizes
    after_rods = jnp.take_along_axis(starts + per_rod * rod_mask, jnp.where(cone_mask, cone_frames, 0), 1)

    # Position of each token in the sequence. That of absent tokens is out of range: the scatter drops them.
    dropped = jnp.iinfo(jnp.int32).max
    rod_targets = jnp.where(rod_mask, starts, dropped - per_rod)[:, :, None] + jnp.arange(per_rod)
    cone_targets = jnp.where(cone_mask, after_rods, dropped - per_cone)[:, :, None] + jnp.arange(per_cone)
    targets = [rod_targets.reshape(batch, -1), cone_targets.reshape(batch, -1)]
    parts = [rods.reshape(batch, -1, width), cones.reshape(batch, -1, width)]
    if text is not None:
        # Text token s follows s text tokens and all other tokens up to the end of its frame.
        others = jnp.take_along_axis(ends - jnp.cumsum(text_sizes, 1), jnp.maximum(text_frames, 0), 1)
        targets.append(jnp.where(text_frames >= 0, others + jnp.arange(text_tokens.shape[1]), dropped))
        parts.append(text_tokens)
    target = jnp.concatenate(targets, 1).astype(jnp.int32)

    total = target.shape[1]
    source = jnp.full((batch, length), total, jnp.int32)
    row = jnp.arange(batch)[:, None]
    source = source.at[row, target].set(jnp.arange(total, dtype=jnp.int32), mode="drop")
    count = sizes.sum(1).astype(jnp.int32)
    return _gather(jnp.concatenate(parts, 1), source), jnp.arange(length) < count[:, None], count


def insert_visual(
    text: jax.Array,
    text_length: jax.Array,
    visual: jax.Array,
    visual_count: jax.Array,
    position: jax.Array,
) -> jax.Array:
    """Insert each sample's visual tokens into its text: text[:position], visual, text[position:], zeros.

    Args:
      text: [B, Lt, D], embedded text, right-padded.
      text_length: int [B], valid text tokens, at most Lt.
      visual: [B, Lv, D], right-padded.
      visual_count: int [B], valid visual tokens, at most Lv.
      position: int [B], index of the first visual token, at most text_length.

    Returns:
      [B, Lt + Lv, D], right-padded with zeros.
    """
    size = text.shape[1]
    total = size + visual.shape[1]
    count, length = visual_count[:, None], text_length[:, None]
    begin = jnp.minimum(position[:, None], length)
    end = begin + count
    index = jnp.arange(total)
    # Index into [text, visual] of each output position; `total` gives zeros.
    source = jnp.where((index >= end) & (index < length + count), index - count, total)
    source = jnp.where(index < begin, index, source)
    source = jnp.where((index >= begin) & (index < end), size + index - begin, source)
    return _gather(jnp.concatenate([text, visual], 1), source)


def _gather(tokens: jax.Array, source: jax.Array) -> jax.Array:
    """Return tokens [B, S, D] at indices `source` [B, L], and zeros where the index is S or more."""
    return jnp.take_along_axis(tokens, source[..., None], 1, mode="fill", fill_value=0)
