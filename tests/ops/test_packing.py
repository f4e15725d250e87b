"""Packing of tokens, compared with Python loops: order, padding, gradients, empty parts."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynfocus_jax.ops.packing import insert_visual, pack_frames

pack = jax.jit(pack_frames, static_argnums=5)
insert = jax.jit(insert_visual)


def numbered(*shape, start):
    """Return tokens [B, ..., D] whose entries all differ and are not zero."""
    return (np.arange(np.prod(shape)) + start).reshape(shape).astype(np.float32)


def slow_pack(rods, cones, cone_frames, rod_mask, cone_mask, words=(), word_frames=()):
    """Return the tokens of one video as a list in order."""
    tokens = []
    for frame in range(len(rods)):
        if rod_mask[frame]:
            tokens.extend(rods[frame])
        for slot in range(len(cones)):
            if cone_mask[slot] and cone_frames[slot] == frame:
                tokens.extend(cones[slot])
        tokens.extend(word for word, place in zip(words, word_frames, strict=True) if place == frame)
    return tokens


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_pack_frames(data):
    frames, per_rod, slots, per_cone = data.draw(
        st.sampled_from([(5, 2, 3, 4), (4, 0, 3, 2), (6, 2, 0, 3), (3, 1, 2, 0), (1, 2, 1, 3)])
    )
    rods, cones = numbered(2, frames, per_rod, 3, start=1), numbered(2, slots, per_cone, 3, start=1000)
    orders = [data.draw(st.permutations(range(max(frames, slots))))[:slots] for _ in range(2)]
    cone_frames = np.array(orders, np.int32).reshape(2, slots)
    rod_mask = data.draw(hnp.arrays(np.bool_, (2, frames)))
    cone_mask = data.draw(hnp.arrays(np.bool_, (2, slots)))
    length = frames * per_rod + slots * per_cone + data.draw(st.sampled_from([0, 3]))
    tokens, mask, count = pack(rods, cones, cone_frames, rod_mask, cone_mask, length)
    assert tokens.shape == (2, length, 3)
    for b in range(2):
        expected = slow_pack(rods[b], cones[b], cone_frames[b], rod_mask[b], cone_mask[b])
        assert count[b] == len(expected)
        np.testing.assert_array_equal(mask[b], np.arange(length) < len(expected))
        np.testing.assert_array_equal(tokens[b, : len(expected)], np.array(expected).reshape(-1, 3))
        assert not np.asarray(tokens[b, len(expected) :]).any()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_text_follows_its_frame(data):
    """A frame may have several text tokens or none, and no other token."""
    frames, room = data.draw(st.sampled_from([(5, 6), (1, 4), (3, 0)]))
    rods, cones = numbered(2, frames, 2, 3, start=1), numbered(2, 1, 3, 3, start=1000)
    words = numbered(2, room, 3, start=5000)
    cone_frames = data.draw(hnp.arrays(np.int32, (2, 1), elements=st.integers(0, frames - 1)))
    rod_mask, cone_mask = (data.draw(hnp.arrays(np.bool_, (2, n))) for n in (frames, 1))
    word_frames = np.full((2, room), -1, np.int32)
    for row in word_frames:
        places = sorted(data.draw(st.lists(st.integers(0, frames - 1), max_size=room)))
        row[: len(places)] = places
    parts = rods, cones, cone_frames, rod_mask, cone_mask
    length = 2 * frames + 3 + room
    tokens, mask, count = pack(*parts, length, (words, word_frames))
    for b in range(2):
        expected = slow_pack(*(part[b] for part in (*parts, words, word_frames)))
        assert count[b] == len(expected)
        np.testing.assert_array_equal(mask[b], np.arange(length) < len(expected))
        np.testing.assert_array_equal(tokens[b, : len(expected)], np.array(expected).reshape(-1, 3))
        assert not np.asarray(tokens[b, len(expected) :]).any()
    if room == 0:
        np.testing.assert_array_equal(tokens, pack(*parts, length)[0])


def test_pack_frames_without_any_token():
    tokens, mask, count = pack(
        np.ones((2, 3, 0, 4)),
        np.ones((2, 2, 0, 4)),
        np.zeros((2, 2), int),
        np.ones((2, 3), bool),
        np.ones((2, 2), bool),
        5,
    )
    assert not np.asarray(tokens).any()
    assert not mask.any()
    assert not count.any()


def test_count_exceeds_length_when_tokens_are_lost():
    rods, cones = numbered(1, 4, 2, 1, start=1), numbered(1, 1, 3, 1, start=100)
    tokens, mask, count = pack(rods, cones, np.array([[1]]), np.ones((1, 4), bool), np.ones((1, 1), bool), 6)
    assert count[0] == 11 > mask.shape[1]
    np.testing.assert_array_equal(tokens[0, :, 0], [1, 2, 3, 4, 100, 101])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pack_frames_gradient(dtype):
    """Packed tokens get the gradient of their position; other tokens, even NaN and inf, get none."""
    rods, cones = numbered(1, 4, 2, 3, start=1), numbered(1, 3, 2, 3, start=100)
    frames = np.array([[3, 0, 3]], np.int32)
    rod_mask, cone_mask = np.array([[True, False, True, True]]), np.array([[True, True, False]])
    rods[0, 1], cones[0, 2] = np.nan, np.inf
    upstream = np.random.default_rng(0).integers(1, 100, (1, 16, 3)).astype(np.float32)
    rods, cones = jnp.asarray(rods, dtype), jnp.asarray(cones, dtype)
    tokens, pull = jax.vjp(lambda r, c: pack_frames(r, c, frames, rod_mask, cone_mask, 16)[0], rods, cones)
    assert tokens.dtype == dtype
    assert np.isfinite(np.asarray(tokens, np.float32)).all()
    to_rods, to_cones = pull(jnp.asarray(upstream, dtype))
    order = [("r", 0), ("c", 1), ("r", 2), ("r", 3), ("c", 0)]
    expected = {"r": np.zeros((4, 2, 3)), "c": np.zeros((3, 2, 3))}
    for place, (kind, index) in enumerate(order):
        expected[kind][index] = upstream[0, 2 * place : 2 * place + 2]
    np.testing.assert_array_equal(np.asarray(to_rods[0], np.float32), expected["r"])
    np.testing.assert_array_equal(np.asarray(to_cones[0], np.float32), expected["c"])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_insert_visual(data):
    text_size, visual_size = data.draw(st.sampled_from([(6, 4), (1, 3), (5, 0)]))
    text, visual = numbered(3, text_size, 2, start=1), numbered(3, visual_size, 2, start=1000)
    length = data.draw(hnp.arrays(np.int32, 3, elements=st.integers(0, text_size)))
    count = data.draw(hnp.arrays(np.int32, 3, elements=st.integers(0, visual_size)))
    position = np.array([data.draw(st.integers(0, int(one))) for one in length], np.int32)
    total = text_size + visual_size
    tokens = insert(text, length, visual, count, position)
    assert tokens.shape == (3, total, 2)
    for b in range(3):
        at, end, some = position[b], length[b], count[b]
        expected = [*text[b, :at], *visual[b, :some], *text[b, at:end]]
        expected += [np.zeros(2)] * (total - len(expected))
        np.testing.assert_array_equal(tokens[b], np.array(expected))


def test_insert_visual_gradient():
    text, visual = numbered(1, 4, 2, start=1), numbered(1, 3, 2, start=50)
    text[0, 3], visual[0, 2] = np.nan, np.nan  # beyond the length and the count
    tokens, pull = jax.vjp(
        lambda t, v: insert_visual(t, jnp.array([3]), v, jnp.array([2]), jnp.array([1])), text, visual
    )
    upstream = numbered(1, 7, 2, start=1)
    assert np.isfinite(tokens).all()
    to_text, to_visual = pull(jnp.asarray(upstream))
    np.testing.assert_array_equal(to_text[0], [*upstream[0, :1], *upstream[0, 3:5], [0, 0]])
    np.testing.assert_array_equal(to_visual[0], [*upstream[0, 1:3], [0, 0]])
