"""Chosen frames, compared with independent definitions in exact fractions."""

import itertools
from fractions import Fraction
from math import ceil, floor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynfocus_jax.config import default_config
from dynfocus_jax.media.frame_sampling import (
    UNIFORM,
    Sampling,
    choose_frames,
    choose_times,
    count_frames,
    draw_positions,
    frames_shown_at,
    middle_indices,
)

RATES = st.sampled_from(
    [Fraction(1), Fraction(25), Fraction(30000, 1001), Fraction(24000, 1001), Fraction(60)]
)


def constant(total, rate, start=0.0):
    """Return the times of frames of a constant rate, and the end of the last one."""
    return start + np.arange(total) / float(rate), start + total / float(rate)


@settings(deadline=None, derandomize=True)
@given(total=st.integers(1, 10_000), num_frames=st.integers(1, 300))
def test_middle_indices(total, num_frames):
    count = min(total, num_frames)
    expected = [floor((i + Fraction(1, 2)) * total / count) for i in range(count)]
    assert middle_indices(total, num_frames).tolist() == expected
    assert all(a < b for a, b in itertools.pairwise(expected))


@settings(deadline=None, derandomize=True)
@given(total=st.integers(1, 5000), rate=RATES, limit=st.integers(1, 300), start=st.sampled_from([0.0, 7.3]))
def test_chosen_times_show_the_chosen_frames(total, rate, limit, start):
    times, end = constant(total, rate, start)
    chosen = choose_frames(times, end, UNIFORM, limit)
    assert chosen.tolist() == middle_indices(total, limit).tolist()
    shown = frames_shown_at(times, choose_times(start, end, total, UNIFORM, limit))
    parts = min(total, limit)
    for part, (number, frame) in enumerate(zip(chosen, shown, strict=True)):
        until_next = (number + 1 - (part + Fraction(1, 2)) * total / parts) / rate  # seconds
        assert frame == number or (frame == number + 1 and until_next < 1e-3)


@settings(deadline=None, derandomize=True)
@given(
    total=st.integers(1, 3000), rate=RATES, fps=st.sampled_from([Fraction(1, 2), Fraction(1), Fraction(4)])
)
def test_fps_chooses_the_frame_shown_at_each_step(total, rate, fps):
    times, end = constant(total, rate)
    clock = Fraction(6, 10_000)  # a frame that begins within this time counts as begun
    ticks = max(1, ceil((total / rate - clock) * fps))
    expected = {min(total - 1, floor((tick / fps + clock) * rate)) for tick in range(ticks)}
    chosen = choose_frames(times, end, Sampling("fps", float(fps), cap=99_999), limit=99_999).tolist()
    assert chosen == sorted(expected)


def test_above_the_cap_evenly_spaced_frames_are_kept():
    """The published rule: 1 frame per second, or 200 evenly spaced ones if these are more than 2000."""
    rule = Sampling("fps", fps=1.0, cap=2000, above=200)
    for seconds, expected in [(2000, range(2000)), (2001, middle_indices(2001, 200))]:
        times, end = constant(seconds * 2, 2)
        chosen = choose_frames(times, end, rule, limit=5000)
        assert chosen.tolist() == [2 * second for second in expected]
        moments = choose_times(0.0, end, len(times), rule, limit=5000)
        assert frames_shown_at(times, moments).tolist() == chosen.tolist()
    # With a lower limit, the middles of equal parts of the chosen frames are kept.
    times, end = constant(100, 2)
    assert choose_frames(times, end, rule, limit=5).tolist() == [2 * second for second in (5, 15, 25, 35, 45)]


def test_variable_frame_rate():
    times, end = np.array([0.0, 0.1, 0.2, 5.0, 5.04]), 9.0  # a slide show
    assert choose_frames(times, end, Sampling("fps"), 100).tolist() == [0, 2, 3, 4]  # at 1 to 4 s: frame 2
    assert choose_frames(times, end, UNIFORM, 3).tolist() == [0, 2, 4]
    moments = choose_times(0.0, end, len(times), UNIFORM, 3)
    assert moments.tolist() == [1.5, 4.5, 7.5]
    assert frames_shown_at(times, moments).tolist() == [2, 2, 4]


@settings(deadline=None, derandomize=True)
@given(total=st.integers(1, 500), limit=st.integers(1, 64), seed=st.integers(0, 5))
def test_random_frame_of_each_segment(total, limit, seed):
    times, end = constant(total, 25)
    rule = Sampling("segments", pick="random")
    draws = draw_positions(rule, limit, np.random.default_rng(seed))
    chosen = choose_frames(times, end, rule, limit, draws).tolist()
    parts = min(total, limit)
    edges = [part * total // parts for part in range(parts + 1)]
    for frame, number, (first, after) in zip(chosen, draws, itertools.pairwise(edges), strict=False):
        assert frame == first + floor(number * (after - first)) < after
    assert len(set(chosen)) == parts
    moments = choose_times(0.0, end, total, rule, limit, draws)
    for part, (moment, number) in enumerate(zip(moments, draws, strict=False)):
        assert moment == pytest.approx((part + number) * end / parts)
    assert (
        choose_frames(times, end, Sampling("segments"), limit).tolist()
        == middle_indices(total, limit).tolist()
    )


def test_random_frames_depend_only_on_the_generator():
    times, end = constant(1000, 25)
    rule = Sampling("segments", pick="random")

    def choose(seed):
        return choose_frames(
            times, end, rule, 8, draw_positions(rule, 8, np.random.default_rng(seed))
        ).tolist()

    assert choose(1) == choose(1) != choose(2)
    assert draw_positions(UNIFORM, 8, None) is None
    with pytest.raises(ValueError, match="pass a generator"):
        draw_positions(rule, 8, None)


@settings(deadline=None, derandomize=True)
@given(
    total=st.integers(1, 4000),
    rate=RATES,
    limit=st.integers(1, 300),
    kind=st.sampled_from(["uniform", "fps", "segments"]),
    fps=st.sampled_from([0.3, 1.0, 2.0]),
)
def test_count_equals_the_number_of_chosen_frames(total, rate, limit, kind, fps):
    times, end = constant(total, rate)
    rule = Sampling(kind, fps=fps, cap=50, above=20)
    info = SimpleNamespace(modality="video", frames=total, duration=end)
    assert count_frames(info, rule, limit) == len(choose_frames(times, end, rule, limit))


def test_count_with_a_span_and_of_an_image():
    info = SimpleNamespace(modality="video", frames=250, duration=10.0)
    assert count_frames(info, UNIFORM, 1000, span=(2.0, 4.0)) == 50
    assert count_frames(info, Sampling("fps"), 1000, span=(2.0, 40.0)) == 8
    assert count_frames(info, UNIFORM, 1000, span=(20.0, 40.0)) == 1
    assert count_frames(SimpleNamespace(modality="image", frames=1, duration=0.0), Sampling("fps"), 8) == 1


def test_from_config():
    section = default_config().data.sampling
    assert Sampling.from_config(section) == UNIFORM
    section.update({"kind": "fps", "fps": 2.0, "cap": 10, "above": 3})
    assert Sampling.from_config(section) == Sampling("fps", 2.0, 10, 3, "middle")
