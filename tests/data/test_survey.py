"""What a survey finds in sources whose every fault is known."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from dynfocus_jax.config import source, stage
from dynfocus_jax.data.budget import Budget
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.data.survey import Surveyor, distribution
from dynfocus_jax.records.mixture import Mixture
from dynfocus_jax.text.conversation import TEMPLATES
from dynfocus_jax.text.tokenizers import WordTokenizer

WORDS = ["why", "?", "so", "because"]


def talk(*texts, media=True):
    texts = [("<image>\n" if media and i == 0 else "") + text for i, text in enumerate(texts)]
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def entry(name, image=None, texts=("why ?", "so"), **fields):
    media = {} if image is None else {"image": image}
    return {"id": name, "conversations": talk(*texts, media=image is not None)} | media | fields


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("survey")
    for i in range(8):
        Image.new("RGB", (20, 16), (i, 0, 0)).save(root / f"{i}.png")
    (root / "broken.png").write_text("no image")
    (root / "folder.png").mkdir()
    entries = {
        "good": [entry(f"g{i}", f"{i % 4}.png") for i in range(6)]
        + [entry("t", texts=("why why ?", "so so"))],
        "bad": [
            entry("fine", "0.png"),
            entry("backwards", "1.png", ("so", "why ?")) | {"conversations": talk("why ?", "so")[::-1]},
            entry("gone", "gone.png"),
            entry("gone too", "gone.png", ("unknown ?", "so")),
            entry("no subtitles", "2.png", subtitles="none.srt"),
            entry("broken", "broken.png"),
            entry("again", "broken.png", ("why ?", "because")),
            entry("long", "3.png", ("why ?", "so " * 20)),
            entry("two", "4.png", ("why ?", "so", "why ?", "so " * 20)),
            entry("strange", texts=("unknown ?", "so")),
            entry("special", texts=("why ? <eos>", "so")),
        ],
    }
    for name, each in entries.items():
        (root / f"{name}.json").write_text(json.dumps(each))
    return root


def look(root, *names, budget=None, tokens=True, guidance="joined", features=None, **options):
    mixture = Mixture(stage(sources=tuple(source(name=n, annotations=f"{n}.json") for n in names)), root, 0)
    budget = budget or Budget.from_buckets([(4, 16)], max_subtitle=3)
    media = MediaReader(16, features=features)
    loader = SampleLoader(
        mixture.records,
        WordTokenizer(WORDS),
        TEMPLATES["plain"],
        media,
        budget,
        max_query=8,
        guidance=guidance,
    )
    return list(Surveyor(mixture, budget, media, loader if tokens else None, **options).sources())


def faults(survey):
    return {problem.id: problem.fault for problem in survey.problems}


def test_sound_data(root):
    (survey,) = look(root, "good")
    assert (survey.name, survey.entries, survey.refused, survey.records, survey.epoch) == ("good", 7, 0, 7, 7)
    assert survey.modalities == {"image": 6, "text": 1}
    assert survey.problems == []
    assert sorted(survey.tokens) == [5] * 6 + [7]  # <bos> why ? so <eos>; <bos> why why ? so so <eos>
    assert survey.frames == [1] * 4  # each file once
    assert survey.unusable == 0


def test_every_fault_once(root):
    good, bad = look(root, "good", "bad")
    assert good.problems == []
    assert faults(bad) == {
        "backwards": "turns",
        "gone": "missing",
        "gone too": "missing",
        "no subtitles": "missing",
        "again": "unreadable",  # one record of each file is read
        "long": "too long",
        "two": "too long",
        "strange": "words",
        "special": "conversation",
    }
    assert bad.faults["missing"] == 3
    assert (bad.entries, bad.refused, bad.records) == (11, 1, 10)
    assert sorted(bad.tokens) == [5] * 5 + [24, 28]
    assert bad.frames == [1]
    # 8 that are known, and one of the two files that were read stands for half of the records with a file.
    assert bad.unreadable == 0.5
    assert math.isclose(bad.unusable, 8 + 0.5 * (8 - 3))
    by_id = {problem.id: problem for problem in bad.problems}
    assert by_id["gone"].reason == f"{root / 'gone.png'}: no such file"
    assert by_id["no subtitles"].reason == f"{root / 'none.srt'}: no such file"
    assert by_id["long"].reason.startswith("the conversation has 24 text tokens, over the limit of 16")
    assert "'unknown' is not in the vocabulary" in by_id["strange"].reason
    assert str(root / "broken.png") in by_id["again"].reason
    assert by_id["again"].media == str(root / "broken.png")


def test_without_a_tokenizer(root):
    (survey,) = look(root, "bad", tokens=False)
    assert survey.tokens == []
    assert set(survey.faults) == {"turns", "missing", "unreadable"}


def test_features_stand_in_for_files(root):
    """The files that they were made of need not be there any more."""
    (survey,) = look(root, "bad", features=object(), samples=0)
    assert [problem.id for problem in survey.problems if problem.fault == "missing"] == ["no subtitles"]


def test_subtitles_of_the_files_that_are_decoded(root):
    said = {"fine": "why ?", "long": "so so so so", "special": "&lt;eos&gt;", "strange": "unknown"}
    for name, words in said.items():
        (root / f"{name}.srt").write_text(f"00:00:00,000 --> 00:00:01,000\n{words}\n")
    (root / "broken.srt").write_text("why ?")
    names = [*said, "broken"]
    entries = [entry(name, f"{i}.png", subtitles=f"{name}.srt") for i, name in enumerate(names)]
    (root / "said.json").write_text(json.dumps(entries))
    (survey,) = look(root, "said")
    assert faults(survey) == dict.fromkeys(names[1:], "subtitles")
    reasons = {problem.id: problem.reason for problem in survey.problems}
    assert "more than the 3 text tokens of max_subtitle" in reasons["long"]
    assert "'unknown' is not in the vocabulary" in reasons["strange"]
    assert survey.frames == [1] * 5
    assert (survey.unreadable, survey.unusable) == (0.0, 4)
    (survey,) = look(root, "said", budget=Budget.from_buckets([(4, 16)]))  # subtitles are left out
    assert survey.problems == []


def test_how_many_files_are_decoded(root):
    for samples, count in ((0, 0), (1, 1), (3, 3), (100, 4)):
        (survey,) = look(root, "good", samples=samples)
        assert len(survey.frames) == count
        assert survey.unreadable == 0.0
    chosen = {tuple(look(root, "bad", samples=1, seed=seed)[0].frames) for seed in range(8)}
    assert chosen == {(), (1,)}  # by the seed: a broken file, or one of the others


VISUAL = 10  # tokens of a frame


def visual_tokens(frames):
    return VISUAL * frames


@pytest.mark.parametrize(
    ("on_overflow", "long", "two", "shortened"),
    [
        ("error", "too long", "too long", 0),
        ("drop_turns", "too long", None, 1),  # the long turn of "two" goes
        ("fewer_frames", "too long", "too long", 0),  # an image is one frame
    ],
)
def test_what_becomes_of_long_samples(root, on_overflow, long, two, shortened):
    """28 and 24 text tokens and 10 of the image, of at most 30."""
    budget = Budget.from_buckets([(1, 40)], visual_tokens, 30, on_overflow)
    (survey,) = look(root, "bad", budget=budget, samples=0)
    assert faults(survey).get("long") == long
    assert faults(survey).get("two") == two
    assert survey.shortened == shortened
    assert "fine" not in faults(survey)
    reasons = [problem.reason for problem in survey.problems if problem.id == "long"]
    assert reasons[0].startswith(
        "24 text tokens and up to 10 visual ones of 1 frames are over the max_length of 30"
    )


def test_videos_count_with_the_most_frames(root, tmp_path):
    video = {"id": "v", "video": "0.png", "conversations": talk("why ?", "so " * 10)}  # 14 text tokens
    (root / "video.json").write_text(json.dumps([video]))
    for frames, on_overflow, fault, shortened in (
        (2, "error", None, 0),
        (3, "error", "too long", 0),
        (3, "fewer_frames", None, 1),
        (3, "drop_turns", "too long", 0),
    ):
        budget = Budget.from_buckets([(frames, 40)], visual_tokens, 40, on_overflow)
        (survey,) = look(root, "video", budget=budget, samples=0)
        assert faults(survey).get("v") == fault, (frames, on_overflow)
        assert survey.shortened == shortened


def test_turns_that_are_samples_of_their_own(root):
    """The first turn of "two" fits, the second with the first before it does not."""
    (survey,) = look(root, "bad", guidance="each_turn", samples=0)
    assert faults(survey)["two"] == "too long"
    (survey,) = look(root, "bad", guidance="each_turn", samples=0, budget=Budget.from_buckets([(1, 28)]))
    assert "two" not in faults(survey)
    assert sorted(survey.tokens)[-1] == 28


def test_distribution():
    assert distribution([]) is None
    assert distribution([1]) == {"median": 1, "99%": 1, "most": 1, "up_to": {1: 1}}
    found = distribution([1, 2, 3, 4, 5, 8, 9, 1000])
    assert found["up_to"] == {1: 1, 2: 1, 4: 2, 8: 2, 16: 1, 32: 0, 64: 0, 128: 0, 256: 0, 512: 0, 1024: 1}
    assert found["most"] == 1000
    values = np.arange(1, 1001).tolist()
    assert (distribution(values)["median"], distribution(values)["99%"]) == (501, 991)
