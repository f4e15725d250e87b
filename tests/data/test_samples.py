"""Samples that are too long, samples of single turns, and subtitles."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynfocus_jax.data.budget import Budget
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.data.skipped import ShortenedSamples, SkippedSamples
from dynfocus_jax.data.synthetic_frames import write_video
from dynfocus_jax.errors import SampleError, UserError
from dynfocus_jax.records.records import Record, RefusedEntry
from dynfocus_jax.text.conversation import TEMPLATES
from dynfocus_jax.text.tokenizers import WordTokenizer

TOKENIZER = WordTokenizer(["what", "?", "red", "disc", "why", "because"])  # ids 4 to 9
THREE = (("what ?", "red"), ("why ?", "because"), ("what why ?", "disc"))  # 5, 9 and 14 tokens with <bos>
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Twelve frames; frame i has grey level 20 * i."""
    path = tmp_path_factory.mktemp("media") / "v.mp4"
    write_video(path, np.repeat(20 * np.arange(12, dtype=np.uint8), 48 * 48 * 3).reshape(12, 48, 48, 3))
    return path


def make_loader(records, buckets=((8, 14),), max_length=None, on_overflow="error", max_subtitle=0, **options):
    budget = Budget.from_buckets(buckets, lambda frames: 2 * frames, max_length, on_overflow, max_subtitle)
    options = {"max_query": 12} | options
    return SampleLoader(records, TOKENIZER, TEMPLATES["plain"], MediaReader(8), budget, **options)


def expect_error(loader, number=0, bucket=0):
    with pytest.raises(SampleError) as error:
        loader(number, RNG, bucket)
    loaded = loader.load(number, RNG, bucket)
    assert loaded.reason == str(error.value)
    assert loaded.sample.index == -1
    assert loaded.record == loader.record_number(number)
    return loaded.reason


def test_text_ends():
    loader = make_loader([Record("t", None, THREE)])
    assert loader.text_ends(0) == (5, 9, 14)
    assert loader(0, RNG)[0].length == 14


def test_max_length_counts_visual_tokens(video):
    record = Record("v", video, THREE)
    sample, omissions = make_loader([record], max_length=30)(0, RNG)  # 14 + 2 * 8
    assert (int(sample.length), int(sample.frame_mask.sum()), omissions) == (14, 8, ())
    assert "14 text tokens and up to 16 visual tokens of 8 frames" in expect_error(
        make_loader([record], max_length=29)
    )
    assert make_loader([Record("t", None, THREE)], max_length=14)(0, RNG)[1] == ()
    assert "more than max_length = 13" in expect_error(make_loader([Record("t", None, THREE)], max_length=13))


def test_too_long_texts_are_not_decoded():
    record = Record("v", Path("/nowhere/v.mp4"), THREE)
    for options in ({"buckets": ((8, 13),)}, {"max_length": 15}):
        assert "text tokens" in expect_error(make_loader([record], **options))
    short = Record("v", Path("/nowhere/v.mp4"), THREE[:1])
    assert "no such file" in make_loader([short]).load(0, RNG).reason


@pytest.mark.parametrize(("max_length", "kept"), [(29, 2), (25, 2), (24, 1), (21, 1)])
def test_last_turns_are_dropped(video, max_length, kept):
    """With 16 visual tokens. The sample equals that of a record with fewer turns."""
    record = Record("v", video, THREE, needle_frames=((1,), (4,), (10,)))
    sample, omissions = make_loader([record], max_length=max_length, on_overflow="drop_turns")(0, RNG)
    assert omissions == (("turns", f"dropped {3 - kept} of 3 turns"),)
    expected, _ = make_loader([Record("v", video, THREE[:kept], needle_frames=record.needle_frames[:kept])])(
        0, RNG
    )
    for name, got, want in zip(sample._fields, sample, expected, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_last_turns_of_a_text_are_dropped():
    record = Record("t", None, THREE)
    sample, (omission,) = make_loader([record], buckets=((1, 9),), on_overflow="drop_turns")(0, RNG)
    assert (int(sample.length), omission.action) == (9, "dropped 1 of 3 turns")
    assert "text tokens, expected at most 4" in expect_error(
        make_loader([record], buckets=((1, 4),), on_overflow="drop_turns")
    )


def test_first_turn_does_not_fit(video):
    loader = make_loader([Record("v", video, THREE)], max_length=20, on_overflow="drop_turns")
    assert "16 visual tokens of 8 frames are more than max_length = 20" in expect_error(loader)


@pytest.mark.parametrize(("max_length", "read"), [(29, 7), (28, 7), (16, 1)])
def test_fewer_frames_are_read(video, max_length, read):
    record = Record("v", video, THREE)
    sample, omissions = make_loader([record], max_length=max_length, on_overflow="fewer_frames")(0, RNG)
    assert omissions == (("frames", f"read {read} of 8 frames"),)
    assert sample.frame_mask.astype(int).tolist() == [1] * read + [0] * (8 - read)
    middles = [20 * (((2 * i + 1) * 12) // (2 * read)) for i in range(read)]
    np.testing.assert_allclose(sample.frames[:read].mean((1, 2, 3)), middles, atol=2)
    assert (int(sample.length), int(sample.index)) == (14, 0)


def test_text_too_long_for_any_frame(video):
    loader = make_loader([Record("v", video, THREE)], max_length=15, on_overflow="fewer_frames")
    assert "up to 2 visual tokens of 1 frames" in expect_error(loader)
    loader = make_loader([Record("v", video, THREE)], buckets=((8, 13),), on_overflow="fewer_frames")
    assert "text tokens, expected at most 13" in expect_error(loader)


def test_short_videos_lose_no_frames(video, tmp_path):
    write_video(tmp_path / "s.mp4", np.zeros((3, 48, 48, 3), np.uint8))
    Image.new("RGB", (9, 9)).save(tmp_path / "i.png")
    records = [
        Record("s", tmp_path / "s.mp4", THREE),
        Record("i", tmp_path / "i.png", THREE, modality="image"),
    ]
    loader = make_loader(records, max_length=20, on_overflow="fewer_frames")  # room for three frames
    assert [(int(loader(i, RNG)[0].frame_mask.sum()), loader(i, RNG)[1]) for i in (0, 1)] == [
        (3, ()),
        (1, ()),
    ]


def test_fewer_frames_in_a_bucket_for_long_texts(video):
    """The text fits only into the bucket with fewer frames."""
    loader = make_loader([Record("v", video, THREE)], buckets=((8, 6), (2, 14)), on_overflow="fewer_frames")
    bucket = loader.budget.choose_bucket(loader.text_ends(0), 8)
    assert loader.budget.buckets[bucket] == (2, 14)
    sample, (omission,) = loader(0, RNG, bucket)
    assert sample.frames.shape[0] == 2
    assert omission.action == "read 2 of 8 frames"


# --- One sample per turn ------------------------------------------------------------------------------


def test_each_turn_is_a_sample(video):
    records = [Record("a", None, THREE), Record("b", video, THREE[:1]), Record("c", None, THREE[1:])]
    loader = make_loader(records, guidance="each_turn")
    assert len(loader) == 6
    assert [loader.record_number(number) for number in range(6)] == [0, 0, 0, 1, 2, 2]
    assert loader.sample_numbers(np.array([2, 0, 2])).tolist() == [4, 5, 0, 1, 2, 4, 5]
    whole, _ = make_loader(records)(0, RNG)
    for turn, (length, begin) in enumerate(((5, 0), (9, 5), (14, 9))):
        sample, _ = loader(turn, RNG)
        assert sample.tokens[:length].tolist() == whole.tokens[:length].tolist()
        assert int(sample.length) == length
        expected_mask = whole.loss_mask.copy()
        expected_mask[:begin] = expected_mask[length:] = False
        assert sample.loss_mask.tolist() == expected_mask.tolist()
        question = TOKENIZER.encode(THREE[turn][0])
        assert sample.query_tokens[: sample.query_length].tolist() == question
        assert sample.index == 0
    assert loader(3, RNG)[0].frame_mask.sum() == 8


def test_turn_that_does_not_fit_is_skipped():
    loader = make_loader(
        [Record("a", None, THREE)], ((1, 9),), guidance="each_turn", on_overflow="drop_turns"
    )
    assert [loader.load(turn, RNG).reason is None for turn in range(3)] == [True, True, False]


def test_prompts_have_the_tokens_of_training():
    """With `prompt_only`, a record is one sample, which ends with its last question."""
    records = [Record("a", None, THREE)]
    prompt, _ = make_loader(records, guidance="each_turn", prompt_only=True)(0, RNG)
    trained, _ = make_loader(records, guidance="each_turn")(2, RNG)
    begin = int(np.flatnonzero(trained.loss_mask)[0])
    assert prompt.tokens[: prompt.length].tolist() == trained.tokens[:begin].tolist()
    assert prompt.query_tokens.tolist() == trained.query_tokens.tolist()
    first, _ = make_loader(records, guidance="first_turn", prompt_only=True)(0, RNG)
    assert first.query_tokens[: first.query_length].tolist() == TOKENIZER.encode("what ?")


# --- Subtitles ----------------------------------------------------------------------------------------


def write_srt(path, *lines):
    """Write subtitles, given as (seconds, words), that are shown for a tenth of a second each."""
    cues = (
        f"{i}\n00:00:{start:06.3f} --> 00:00:{start + 0.1:06.3f}\n{words}\n".replace(".", ",")
        for i, (start, words) in enumerate(lines)
    )
    path.write_text("\n".join(cues))
    return path


@pytest.fixture
def subtitled(video, tmp_path):
    """A record with four subtitles, of whose 12 frames, at 4 per second, frames 1, 4, 7 and 10 are read."""
    path = write_srt(tmp_path / "v.srt", (0.0, "red disc"), (1.7, "why ?"), (1.9, "because"), (2.5, "disc"))
    return Record("v", video, THREE, subtitles=path)


def words(sample):
    """Return the subtitle words by frame."""
    return {
        int(frame): [TOKENIZER.decode([token]) for token in sample.subtitles[sample.subtitle_frames == frame]]
        for frame in np.unique(sample.subtitle_frames)
        if frame >= 0
    }


def test_subtitles_are_assigned_to_the_sampled_frames(subtitled):
    loader = make_loader([subtitled], buckets=((4, 14),), max_subtitle=8)
    sample, omissions = loader(0, RNG)
    assert words(sample) == {0: ["red", "disc"], 2: ["why", "?", "because"], 3: ["disc"]}
    assert sample.subtitle_frames.tolist() == [0, 0, 2, 2, 2, 3, -1, -1]
    assert sample.subtitles[6:].tolist() == [TOKENIZER.pad_id] * 2
    assert omissions == ()
    without, _ = make_loader([subtitled], buckets=((4, 14),))(0, RNG)
    assert without.subtitles.shape == without.subtitle_frames.shape == (0,)
    for name in set(sample._fields) - {"subtitles", "subtitle_frames"}:
        np.testing.assert_array_equal(getattr(sample, name), getattr(without, name), err_msg=name)


def test_subtitles_count_as_visual_tokens(subtitled):
    """14 text tokens, 2 visual tokens for each of the four frames, and at most 8 subtitle tokens."""
    fits = make_loader([subtitled], ((4, 14),), max_length=30, max_subtitle=8)
    assert fits.load(0, RNG).reason is None
    reason = expect_error(make_loader([subtitled], ((4, 14),), max_length=29, max_subtitle=8))
    assert "up to 16 visual tokens of 4 frames" in reason
    text = make_loader([Record("t", None, THREE)], ((4, 14),), max_length=14, max_subtitle=8)
    assert text.load(0, RNG).reason is None  # there is no video


def test_too_long_subtitles(subtitled):
    assert "the 4 subtitles have more than the 5 text tokens of max_subtitle" in expect_error(
        make_loader([subtitled], ((4, 14),), max_subtitle=5)
    )
    loader = make_loader([subtitled], ((4, 9),), max_subtitle=5, on_overflow="drop_turns")
    loaded = loader.load(0, RNG)
    assert loaded.omissions == (
        ("turns", "dropped 1 of 3 turns"),
        ("subtitles", "kept 3 of 4 subtitles"),
    )
    assert sum(map(len, words(loaded.sample).values())) <= 5


def test_unusable_subtitles(subtitled, tmp_path):
    loader = make_loader([subtitled], ((4, 14),), max_subtitle=8)
    write_srt(subtitled.subtitles, (0.0, "red <eos>"))  # would end an answer; not a tag of the file format
    subtitled.subtitles.write_text(subtitled.subtitles.read_text().replace("<eos>", "&lt;eos&gt;"))
    assert "the subtitles contain a special token" in expect_error(loader)
    subtitled.subtitles.write_text("red disc")
    assert "has no timing" in loader.load(0, RNG).reason
    subtitled.subtitles.unlink()
    assert f"{subtitled.subtitles}: no such file" in loader.load(0, RNG).reason
    assert make_loader([subtitled], ((4, 14),)).load(0, RNG).reason is None  # subtitles are not read


def test_subtitles_of_a_span(subtitled):
    record = dataclasses.replace(subtitled, span=(1.0, 2.0))
    sample, _ = make_loader([record], ((4, 14),), max_subtitle=8)(0, RNG)
    assert words(sample) == {3: ["why", "?", "because"]}  # the last of the four frames, at 1.75 s


# --- Lists of samples ---------------------------------------------------------------------------------


def test_shortened_samples_are_listed_once(tmp_path):
    record, path = Record("a", None, THREE, source="s"), tmp_path / "overflow.jsonl"
    shortened = ShortenedSamples(path)
    for _ in range(2):
        shortened.note(record, [("turns", "dropped 1 of 3 turns")])
    two_omissions = [("frames", "read 1 of 2 frames"), ("subtitles", "kept 1 of 2 subtitles")]
    shortened.note(Record("a", None, THREE, source="other"), two_omissions)
    assert shortened.counts == {"turns": 2, "frames": 1, "subtitles": 1}
    assert shortened.entries == [
        {"id": "a", "source": "s", "action": "dropped 1 of 3 turns"},
        {"id": "a", "source": "other", "action": "read 1 of 2 frames, kept 1 of 2 subtitles"},
    ]
    resumed = ShortenedSamples(path)
    resumed.note(record, [("turns", "dropped 1 of 3 turns")])
    assert resumed.entries == shortened.entries
    assert len(path.read_text().splitlines()) == 2


def test_refused_records_are_listed(tmp_path):
    refused = [("s", RefusedEntry(number, "same", f"reason {number}")) for number in (3, 8)]
    skipped = SkippedSamples(tmp_path / "skipped.jsonl", max_share=0.01)
    with pytest.raises(
        UserError,
        match=r"2 of 199 records .*max_skip_share = 0.01 .*The last is record same of s: reason 8",
    ):
        skipped.note_refused(refused, 199)
    skipped = SkippedSamples(tmp_path / "skipped.jsonl", max_share=0.01)
    skipped.note_refused(refused, 200)
    assert [(entry["number"], entry["reason"]) for entry in skipped.entries] == [
        (3, "reason 3"),
        (8, "reason 8"),
    ]
    skipped.note(Record("same", None, THREE, source="s"), "it cannot be read")
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 3
