"""Choice of buckets, compared with exhaustive search."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynfocus_jax.data.budget import ON_OVERFLOW, Budget


def count_visual_tokens(frames):
    return 3 * frames + 5


def fits(budget, bucket, text, frames):
    most_frames, most_text = budget.buckets[bucket]
    tokens = text + (count_visual_tokens(frames) if frames else 0)
    return frames <= most_frames and text <= most_text and tokens <= (budget.max_length or 10**9)


buckets = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 60)), min_size=1, max_size=4, unique=True)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    buckets=buckets,
    max_length=st.none() | st.integers(1, 100),
    on_overflow=st.sampled_from(ON_OVERFLOW),
    turns=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    share=st.floats(0, 1),
)
def test_choose_bucket(buckets, max_length, on_overflow, turns, share):
    budget = Budget.from_buckets(buckets, count_visual_tokens, max_length, on_overflow)
    assert sorted(budget.buckets) == sorted(buckets)
    sizes = [count_visual_tokens(frames) + text for frames, text in budget.buckets]
    assert sizes == sorted(sizes)
    assert budget.max_frames == max(frames for frames, _ in buckets)
    ends = [sum(turns[: i + 1]) for i in range(len(turns))]
    frames, numbers = round(share * budget.max_frames), range(len(buckets))
    chosen = budget.choose_bucket(ends, frames)

    fitting = [bucket for bucket in numbers if fits(budget, bucket, ends[-1], frames)]
    if fitting:
        assert chosen == fitting[0], "the smallest bucket that fits"
        return
    kept = [sum(fits(budget, bucket, end, frames) for end in ends) for bucket in numbers]
    readable = [
        max((count for count in range(1, frames + 1) if fits(budget, bucket, ends[-1], count)), default=0)
        for bucket in numbers
    ]
    if on_overflow == "drop_turns" and max(kept):
        assert chosen == kept.index(max(kept))
    elif on_overflow == "fewer_frames" and max(readable):
        assert chosen == readable.index(max(readable))
        assert readable[chosen] == min(frames, budget.frame_room(ends[-1], chosen))
    else:
        assert budget.buckets[chosen][0] >= frames, "all frames fit"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    buckets=buckets,
    max_length=st.none() | st.integers(1, 100),
    text=st.integers(0, 80),
    frames=st.integers(0, 12),
)
def test_room(buckets, max_length, text, frames):
    budget = Budget.from_buckets(buckets, count_visual_tokens, max_length)
    for bucket, (most_frames, _) in enumerate(budget.buckets):
        if frames <= most_frames:
            assert (text <= budget.text_room(frames, bucket)) == fits(budget, bucket, text, frames)
        room = budget.frame_room(text, bucket)
        assert room == 0 or fits(budget, bucket, text, room)
        assert room == most_frames or not fits(budget, bucket, text, room + 1)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (70, ("70 text tokens, expected at most 60",)),
        (50, ("50 text tokens", "20 visual tokens of 5 frames")),
    ],
)
def test_overflow_error(text, parts):
    message = str(Budget.from_buckets([(8, 60)], count_visual_tokens, 65).overflow_error(text, 5, 0))
    assert "\n" not in message
    assert all(part in message for part in parts)
