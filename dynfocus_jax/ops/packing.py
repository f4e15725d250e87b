"""Sequences of static length from parts of varying length: frames in time order, visual tokens within text.

Tokens are moved by one gather from an int32 index: their gradient is one scatter, and padding gets none.
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
    """Interleave rod and cone tokens in time order, packed left: paper Sec. 3.2.

    A frame gives its R rod tokens where `rod_mask` is True, then M cone tokens where a valid cone names it,
    then its text.
    The caller computes `length`; `count` is what there was to pack: `count > length` means that tokens were
    lost.

    Args:
      rods: [B, T, R, D] tokens of every frame, R may be 0.
      cones: [B, J, M, D] tokens of the important frames, in any order; J or M may be 0.
      cone_frames: [B, J] int32 frame of each cone; valid cones name distinct frames.
      rod_mask: [B, T] bool.
      cone_mask: [B, J] bool.
      length: L, static.
      text: tokens [B, S, D] and the frame of each, [B, S] int32: ascending, then -1 for none.

    Returns:
      tokens [B, L, D], zero beyond the last token; mask [B, L] bool; count [B] int32.
    """
    (batch, frames, per_rod, width), (_, _, per_cone, _) = rods.shape, cones.shape
    cone_mask = cone_mask & (cone_frames >= 0) & (cone_frames < frames)
    named = jnp.where(cone_mask, cone_frames, frames)  # [B, J], `frames` for none
    has_cone = (named[:, :, None] == jnp.arange(frames)).any(1)
    sizes = per_rod * rod_mask + per_cone * has_cone  # [B, T]
    if text is not None:
        words, word_frames = text
        texts = (word_frames[:, :, None] == jnp.arange(frames)).sum(1)  # [B, T] text tokens of each frame
        sizes += texts
    ends = jnp.cumsum(sizes, 1)
    starts = ends - sizes
    after_rods = jnp.take_along_axis(starts + per_rod * rod_mask, jnp.where(cone_mask, cone_frames, 0), 1)

    # Where each token goes in the sequence; absent ones go beyond any length, where the scatter drops them.
    nowhere = jnp.iinfo(jnp.int32).max
    rod_to = jnp.where(rod_mask, starts, nowhere - per_rod)[:, :, None] + jnp.arange(per_rod)
    cone_to = jnp.where(cone_mask, after_rods, nowhere - per_cone)[:, :, None] + jnp.arange(per_cone)
    targets = [rod_to.reshape(batch, -1), cone_to.reshape(batch, -1)]
    parts = [rods.reshape(batch, -1, width), cones.reshape(batch, -1, width)]
    if text is not None:
        # Token s of all text: `ends - text so far` is what there is besides text up to the end of its frame.
        behind = jnp.take_along_axis(ends - jnp.cumsum(texts, 1), jnp.maximum(word_frames, 0), 1)
        targets.append(jnp.where(word_frames >= 0, behind + jnp.arange(words.shape[1]), nowhere))
        parts.append(words)
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
    """text[:position], visual[:count], text[position:length] and zeros, sample by sample: [B, Lt + Lv, D].

    Args:
      text: [B, Lt, D] embedded text, right-padded.
      text_length: [B] int, at most Lt.
      visual: [B, Lv, D], left-packed.
      visual_count: [B] int, at most Lv.
      position: [B] int, where the visual tokens begin, at most text_length.
    """
    length = text.shape[1]
    from_text, from_visual = _insertion(length + visual.shape[1], text_length, visual_count, position)
    source = jnp.where(from_text >= 0, from_text, length + visual.shape[1])
    source = jnp.where(from_visual >= 0, length + from_visual, source)
    return _gather(jnp.concatenate([text, visual], 1), source)


def insert_gap(
    values: jax.Array,
    text_length: jax.Array,
    visual_count: jax.Array,
    position: jax.Array,
    total: int,
    fill: int,
) -> jax.Array:
    """What `insert_visual` does to text, done to its per-token values (labels, loss mask): [B, total].

    Args:
      values: [B, Lt].
      text_length: [B] int, at most Lt.
      visual_count: [B] int.
      position: [B] int, at most text_length.
      total: static length of the result; Lt + Lv to match `insert_visual`.
      fill: the value at visual positions and at padding.
    """
    from_text, _ = _insertion(total, text_length, visual_count, position)
    kept = jnp.take_along_axis(values, jnp.maximum(from_text, 0), 1)
    return jnp.where(from_text >= 0, kept, jnp.asarray(fill, values.dtype))


def _insertion(total, text_length, visual_count, position):
    """The text index and the visual index that each output position reads, -1 for none: 2 x [B, total]."""
    count, length = visual_count[:, None], text_length[:, None]
    begin = jnp.minimum(position[:, None], length)
    at = jnp.arange(total)
    end = begin + count
    from_visual = jnp.where((at >= begin) & (at < end), at - begin, -1)
    from_text = jnp.where(at < begin, at, jnp.where((at >= end) & (at < length + count), at - count, -1))
    return from_text, from_visual


def _gather(tokens: jax.Array, source: jax.Array) -> jax.Array:
    """tokens [B, S, D] at source [B, L]; zeros where the source is S or more."""
    return jnp.take_along_axis(tokens, source[..., None], 1, mode="fill", fill_value=0)
