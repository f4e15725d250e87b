"""Samples that are too long, and samples of single turns: what is left of them, and what is said about it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynfocus_jax.data.budget import Budget
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.data.skipped import Shortened, Skipped
from dynfocus_jax.data.synthetic import write_video
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


def loader(records, buckets=((8, 14),), max_length=None, on_overflow="error", max_subtitle=0, **options):
    budget = Budget.of(buckets, lambda frames: 2 * frames, max_length, on_overflow, max_subtitle)
    options = {"max_query": 12} | options
    return SampleLoader(records, TOKENIZER, TEMPLATES["plain"], MediaReader(8), budget, **options)


def refused(load, number=0, bucket=0):
    with pytest.raises(SampleError) as error:
        load(number, RNG, bucket)
    loaded = load.load(number, RNG, bucket)
    assert loaded.reason == str(error.value)
    assert loaded.sample.index == -1
    assert loaded.record == load.record_of(number)
    return loaded.reason


def test_the_lengths_of_a_text():
    load = loader([Record("t", None, THREE)])
    assert load.text_ends(0) == (5, 9, 14)
    assert load(0, RNG)[0].length == 14


def test_max_length_counts_visual_tokens(video):
    record = Record("v", video, THREE)
    sample, changes = loader([record], max_length=30)(0, RNG)  # 14 + 2 * 8
    assert (int(sample.length), int(sample.frame_mask.sum()), changes) == (14, 8, ())
    assert "14 text tokens and up to 16 visual ones of 8 frames" in refused(loader([record], max_length=29))
    assert loader([Record("t", None, THREE)], max_length=14)(0, RNG)[1] == ()
    assert "over the max_length of 13" in refused(loader([Record("t", None, THREE)], max_length=13))


def test_what_is_too_long_without_any_frame_is_not_decoded():
    record = Record("v", Path("/nowhere/v.mp4"), THREE)
    for options in ({"buckets": ((8, 13),)}, {"max_length": 15}):
        assert "text tokens" in refused(loader([record], **options))
    short = Record("v", Path("/nowhere/v.mp4"), THREE[:1])
    assert "no such file" in loader([short]).load(0, RNG).reason


@pytest.mark.parametrize(("max_length", "kept"), [(29, 2), (25, 2), (24, 1), (21, 1)])
def test_last_turns_are_dropped(video, max_length, kept):
    """With the frames' 16 tokens; what is left is the record with fewer turns."""
    record = Record("v", video, THREE, needle_frames=((1,), (4,), (10,)))
    sample, changes = loader([record], max_length=max_length, on_overflow="drop_turns")(0, RNG)
    assert changes == (("turns", f"dropped {3 - kept} of 3 turns"),)
    expected, _ = loader([Record("v", video, THREE[:kept], needle_frames=record.needle_frames[:kept])])(
        0, RNG
    )
    for name, got, want in zip(sample._fields, sample, expected, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_turns_of_a_text_are_dropped():
    record = Record("t", None, THREE)
    sample, (change,) = loader([record], buckets=((1, 9),), on_overflow="drop_turns")(0, RNG)
    assert (int(sample.length), change.action) == (9, "dropped 1 of 3 turns")
    assert "over the limit of 4" in refused(loader([record], buckets=((1, 4),), on_overflow="drop_turns"))


def test_a_first_turn_that_does_not_fit_is_a_reason(video):
    load = loader([Record("v", video, THREE)], max_length=20, on_overflow="drop_turns")
    assert "16 visual ones of 8 frames are over the max_length of 20" in refused(load)


@pytest.mark.parametrize(("max_length", "read"), [(29, 7), (28, 7), (16, 1)])
def test_fewer_frames_are_read(video, max_length, read):
    record = Record("v", video, THREE)
    sample, changes = loader([record], max_length=max_length, on_overflow="fewer_frames")(0, RNG)
    assert changes == (("frames", f"read {read} of 8 frames"),)
    assert sample.frame_mask.astype(int).tolist() == [1] * read + [0] * (8 - read)
    middles = [20 * (((2 * i + 1) * 12) // (2 * read)) for i in range(read)]
    np.testing.assert_allclose(sample.frames[:read].mean((1, 2, 3)), middles, atol=2)
    assert (int(sample.length), int(sample.index)) == (14, 0)


def test_fewer_frames_do_not_help_against_a_long_text(video):
    load = loader([Record("v", video, THREE)], max_length=15, on_overflow="fewer_frames")
    assert "up to 2 visual ones of 1 frames" in refused(load)
    load = loader([Record("v", video, THREE)], buckets=((8, 13),), on_overflow="fewer_frames")
    assert "over the limit of 13" in refused(load)


def test_nothing_is_said_of_a_video_that_has_no_more_frames(video, tmp_path):
    write_video(tmp_path / "s.mp4", np.zeros((3, 48, 48, 3), np.uint8))
    Image.new("RGB", (9, 9)).save(tmp_path / "i.png")
    records = [
        Record("s", tmp_path / "s.mp4", THREE),
        Record("i", tmp_path / "i.png", THREE, modality="image"),
    ]
    load = loader(records, max_length=20, on_overflow="fewer_frames")  # room for three frames
    assert [(int(load(i, RNG)[0].frame_mask.sum()), load(i, RNG)[1]) for i in (0, 1)] == [
        (3, ()),
        (1, ()),
    ]


def test_a_bucket_of_few_frames(video):
    """The long text went to the bucket that is made for it."""
    load = loader([Record("v", video, THREE)], buckets=((8, 6), (2, 14)), on_overflow="fewer_frames")
    bucket = load.budget.choose(load.text_ends(0), 8)
    assert load.budget.buckets[bucket] == (2, 14)
    sample, (change,) = load(0, RNG, bucket)
    assert sample.frames.shape[0] == 2
    assert change.action == "read 2 of 8 frames"


# --- A sample a turn ----------------------------------------------------------------------------------


def test_each_turn_is_a_sample(video):
    records = [Record("a", None, THREE), Record("b", video, THREE[:1]), Record("c", None, THREE[1:])]
    load = loader(records, guidance="each_turn")
    assert len(load) == 6
    assert [load.record_of(number) for number in range(6)] == [0, 0, 0, 1, 2, 2]
    assert load.samples_of(np.array([2, 0, 2])).tolist() == [4, 5, 0, 1, 2, 4, 5]
    whole, _ = loader(records)(0, RNG)
    for turn, (length, begin) in enumerate(((5, 0), (9, 5), (14, 9))):
        sample, _ = load(turn, RNG)
        assert sample.tokens[:length].tolist() == whole.tokens[:length].tolist()
        assert int(sample.length) == length
        learned = whole.loss_mask.copy()
        learned[:begin] = learned[length:] = False
        assert sample.loss_mask.tolist() == learned.tolist()
        question = TOKENIZER.encode(THREE[turn][0])
        assert sample.query_tokens[: sample.query_length].tolist() == question
        assert sample.index == 0
    assert load(3, RNG)[0].frame_mask.sum() == 8


def test_a_turn_that_does_not_fit_is_one_sample_less():
    load = loader([Record("a", None, THREE)], ((1, 9),), guidance="each_turn", on_overflow="drop_turns")
    assert [load.load(turn, RNG).reason is None for turn in range(3)] == [True, True, False]


def test_questions_are_asked_as_they_are_learned():
    """Evaluation, and chat: one sample a record, its last question, in the same tokens."""
    records = [Record("a", None, THREE)]
    asked, _ = loader(records, guidance="each_turn", prompt_only=True)(0, RNG)
    learned, _ = loader(records, guidance="each_turn")(2, RNG)
    begin = int(np.flatnonzero(learned.loss_mask)[0])
    assert asked.tokens[: asked.length].tolist() == learned.tokens[:begin].tolist()
    assert asked.query_tokens.tolist() == learned.query_tokens.tolist()
    first, _ = loader(records, guidance="first_turn", prompt_only=True)(0, RNG)
    assert first.query_tokens[: first.query_length].tolist() == TOKENIZER.encode("what ?")


# --- Subtitles ----------------------------------------------------------------------------------------


def srt(path, *lines):
    """Each line shown for a tenth of a second; (seconds, words)."""
    cues = (
        f"{i}\n00:00:{start:06.3f} --> 00:00:{start + 0.1:06.3f}\n{words}\n".replace(".", ",")
        for i, (start, words) in enumerate(lines)
    )
    path.write_text("\n".join(cues))
    return path


@pytest.fixture
def spoken(video, tmp_path):
    """A record whose frames 1, 4, 7 and 10 of 12, at four frames a second, are read; four subtitles."""
    path = srt(tmp_path / "v.srt", (0.0, "red disc"), (1.7, "why ?"), (1.9, "because"), (2.5, "disc"))
    return Record("v", video, THREE, subtitles=path)


def words(sample):
    """The subtitles of each frame."""
    return {
        int(frame): [TOKENIZER.decode([token]) for token in sample.subtitles[sample.subtitle_frames == frame]]
        for frame in np.unique(sample.subtitle_frames)
        if frame >= 0
    }


def test_subtitles_belong_to_the_frames_that_are_read(spoken):
    load = loader([spoken], buckets=((4, 14),), max_subtitle=8)
    sample, changes = load(0, RNG)
    assert words(sample) == {0: ["red", "disc"], 2: ["why", "?", "because"], 3: ["disc"]}
    assert sample.subtitle_frames.tolist() == [0, 0, 2, 2, 2, 3, -1, -1]
    assert sample.subtitles[6:].tolist() == [TOKENIZER.pad_id] * 2
    assert changes == ()
    without, _ = loader([spoken], buckets=((4, 14),))(0, RNG)
    assert without.subtitles.shape == without.subtitle_frames.shape == (0,)
    for name in set(sample._fields) - {"subtitles", "subtitle_frames"}:
        np.testing.assert_array_equal(getattr(sample, name), getattr(without, name), err_msg=name)


def test_subtitles_count_as_visual_tokens(spoken):
    """14 text tokens, 2 of each of the four frames, and 8 that the subtitles may have."""
    fits = loader([spoken], ((4, 14),), max_length=30, max_subtitle=8)
    assert fits.load(0, RNG).reason is None
    reason = refused(loader([spoken], ((4, 14),), max_length=29, max_subtitle=8))
    assert "up to 16 visual ones of 4 frames" in reason
    text = loader([Record("t", None, THREE)], ((4, 14),), max_length=14, max_subtitle=8)
    assert text.load(0, RNG).reason is None  # there is no video


def test_subtitles_that_are_too_long(spoken):
    assert "the 4 subtitles have more than the 5 text tokens of max_subtitle" in refused(
        loader([spoken], ((4, 14),), max_subtitle=5)
    )
    load = loader([spoken], ((4, 9),), max_subtitle=5, on_overflow="drop_turns")
    loaded = load.load(0, RNG)
    assert loaded.changes == (
        ("turns", "dropped 1 of 3 turns"),
        ("subtitles", "kept 3 of 4 subtitles"),
    )
    assert sum(map(len, words(loaded.sample).values())) <= 5


def test_subtitles_that_cannot_be_used(spoken, tmp_path):
    load = loader([spoken], ((4, 14),), max_subtitle=8)
    srt(spoken.subtitles, (0.0, "red <eos>"))  # reads as the end of an answer, and is no tag
    spoken.subtitles.write_text(spoken.subtitles.read_text().replace("<eos>", "&lt;eos&gt;"))
    assert "the subtitles contain a special token" in refused(load)
    spoken.subtitles.write_text("red disc")
    assert "has no timing" in load.load(0, RNG).reason
    spoken.subtitles.unlink()
    assert f"{spoken.subtitles}: no such file" in load.load(0, RNG).reason
    assert loader([spoken], ((4, 14),)).load(0, RNG).reason is None  # they are not read


def test_subtitles_of_a_span(spoken):
    record = dataclasses.replace(spoken, span=(1.0, 2.0))
    sample, _ = loader([record], ((4, 14),), max_subtitle=8)(0, RNG)
    assert words(sample) == {3: ["why", "?", "because"]}  # 1.75 s, the last of the four frames


# --- What is written down -----------------------------------------------------------------------------


def test_shortened_samples_are_counted_and_listed_once(tmp_path):
    record, path = Record("a", None, THREE, source="s"), tmp_path / "overflow.jsonl"
    shortened = Shortened(path)
    for _ in range(2):
        shortened.note(record, [("turns", "dropped 1 of 3 turns")])
    both = [("frames", "read 1 of 2 frames"), ("subtitles", "kept 1 of 2 subtitles")]
    shortened.note(Record("a", None, THREE, source="other"), both)
    assert shortened.counts == {"turns": 2, "frames": 1, "subtitles": 1}
    assert shortened.records == [
        {"id": "a", "source": "s", "action": "dropped 1 of 3 turns"},
        {"id": "a", "source": "other", "action": "read 1 of 2 frames, kept 1 of 2 subtitles"},
    ]
    again = Shortened(path)
    again.note(record, [("turns", "dropped 1 of 3 turns")])
    assert again.records == shortened.records
    assert len(path.read_text().splitlines()) == 2


def test_refused_records_are_listed_and_may_be_too_many(tmp_path):
    refused = [("s", RefusedEntry(number, "same", f"reason {number}")) for number in (3, 8)]
    skipped = Skipped(tmp_path / "skipped.jsonl", max_share=0.01)
    with pytest.raises(
        UserError, match=r"2 of 199 records .* share of 0.01; the last: record same of s: reason 8"
    ):
        skipped.refuse(refused, 199)
    skipped = Skipped(tmp_path / "skipped.jsonl", max_share=0.01)
    skipped.refuse(refused, 200)
    assert [(entry["number"], entry["reason"]) for entry in skipped.records] == [
        (3, "reason 3"),
        (8, "reason 8"),
    ]
    skipped.note(Record("same", None, THREE, source="s"), "it cannot be read")
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 3
