"""Surveys of sources whose faults are all known."""

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


def conversation(*texts, media=True):
    texts = [("<image>\n" if media and i == 0 else "") + text for i, text in enumerate(texts)]
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def entry(name, image=None, texts=("why ?", "so"), **fields):
    media = {} if image is None else {"image": image}
    return {"id": name, "conversations": conversation(*texts, media=image is not None)} | media | fields


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
            entry("backwards", "1.png", ("so", "why ?"))
            | {"conversations": conversation("why ?", "so")[::-1]},
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


def survey_sources(root, *names, budget=None, tokens=True, guidance="joined", features=None, **options):
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
    return list(Surveyor(mixture, budget, media, loader if tokens else None, **options).survey_sources())


def faults(survey):
    return {problem.id: problem.fault for problem in survey.problems}


def test_sources_without_faults(root):
    (survey,) = survey_sources(root, "good")
    assert (survey.name, survey.entries, survey.refused, survey.records, survey.epoch) == ("good", 7, 0, 7, 7)
    assert survey.modalities == {"image": 6, "text": 1}
    assert survey.problems == []
    assert sorted(survey.tokens) == [5] * 6 + [7]  # <bos> why ? so <eos>; <bos> why why ? so so <eos>
    assert survey.frames == [1] * 4  # one per file
    assert survey.unusable == 0


def test_each_fault(root):
    good, bad = survey_sources(root, "good", "bad")
    assert good.problems == []
    assert faults(bad) == {
        "backwards": "turns",
        "gone": "missing",
        "gone too": "missing",
        "no subtitles": "missing",
        "again": "unreadable",  # one record per file is decoded
        "long": "too long",
        "two": "too long",
        "strange": "words",
        "special": "conversation",
    }
    assert bad.faults["missing"] == 3
    assert (bad.entries, bad.refused, bad.records) == (11, 1, 10)
    assert sorted(bad.tokens) == [5] * 5 + [24, 28]
    assert bad.frames == [1]
    # 8 known problems; one of the two decoded files is unreadable, so half of the other records with files.
    assert bad.unreadable == 0.5
    assert math.isclose(bad.unusable, 8 + 0.5 * (8 - 3))
    by_id = {problem.id: problem for problem in bad.problems}
    assert by_id["gone"].reason == f"{root / 'gone.png'}: no such file"
    assert by_id["no subtitles"].reason == f"{root / 'none.srt'}: no such file"
    assert by_id["long"].reason.startswith("the conversation has 24 text tokens, expected at most 16")
    assert "'unknown' is not in the vocabulary" in by_id["strange"].reason
    assert str(root / "broken.png") in by_id["again"].reason
    assert by_id["again"].media == str(root / "broken.png")


def test_without_a_tokenizer(root):
    (survey,) = survey_sources(root, "bad", tokens=False)
    assert survey.tokens == []
    assert set(survey.faults) == {"turns", "missing", "unreadable"}


def test_stored_features_replace_files(root):
    """With stored features the media files may be missing."""
    (survey,) = survey_sources(root, "bad", features=object(), samples=0)
    assert [problem.id for problem in survey.problems if problem.fault == "missing"] == ["no subtitles"]


def test_subtitles_of_decoded_files(root):
    texts = {"fine": "why ?", "long": "so so so so", "special": "&lt;eos&gt;", "strange": "unknown"}
    for name, words in texts.items():
        (root / f"{name}.srt").write_text(f"00:00:00,000 --> 00:00:01,000\n{words}\n")
    (root / "broken.srt").write_text("why ?")
    names = [*texts, "broken"]
    entries = [entry(name, f"{i}.png", subtitles=f"{name}.srt") for i, name in enumerate(names)]
    (root / "subtitled.json").write_text(json.dumps(entries))
    (survey,) = survey_sources(root, "subtitled")
    assert faults(survey) == dict.fromkeys(names[1:], "subtitles")
    reasons = {problem.id: problem.reason for problem in survey.problems}
    assert "more than the 3 text tokens of max_subtitle" in reasons["long"]
    assert "'unknown' is not in the vocabulary" in reasons["strange"]
    assert survey.frames == [1] * 5
    assert (survey.unreadable, survey.unusable) == (0.0, 4)
    (survey,) = survey_sources(root, "subtitled", budget=Budget.from_buckets([(4, 16)]))  # without subtitles
    assert survey.problems == []


def test_number_of_decoded_files(root):
    for samples, count in ((0, 0), (1, 1), (3, 3), (100, 4)):
        (survey,) = survey_sources(root, "good", samples=samples)
        assert len(survey.frames) == count
        assert survey.unreadable == 0.0
    chosen = {tuple(survey_sources(root, "bad", samples=1, seed=seed)[0].frames) for seed in range(8)}
    assert chosen == {(), (1,)}  # depending on the seed, the broken file or another


VISUAL = 10  # tokens of a frame


def count_visual_tokens(frames):
    return VISUAL * frames


@pytest.mark.parametrize(
    ("on_overflow", "long", "two", "shortened"),
    [
        ("error", "too long", "too long", 0),
        ("drop_turns", "too long", None, 1),  # "two" loses its long turn
        ("fewer_frames", "too long", "too long", 0),  # an image has one frame
    ],
)
def test_long_samples(root, on_overflow, long, two, shortened):
    """24 and 28 text tokens, 10 visual tokens of the image, and a maximum of 30."""
    budget = Budget.from_buckets([(1, 40)], count_visual_tokens, 30, on_overflow)
    (survey,) = survey_sources(root, "bad", budget=budget, samples=0)
    assert faults(survey).get("long") == long
    assert faults(survey).get("two") == two
    assert survey.shortened == shortened
    assert "fine" not in faults(survey)
    reasons = [problem.reason for problem in survey.problems if problem.id == "long"]
    assert reasons[0].startswith(
        "24 text tokens and up to 10 visual tokens of 1 frames are more than max_length = 30"
    )


def test_videos_are_assumed_to_have_the_most_frames(root, tmp_path):
    video = {
        "id": "v",
        "video": "0.png",
        "conversations": conversation("why ?", "so " * 10),
    }  # 14 text tokens
    (root / "video.json").write_text(json.dumps([video]))
    for frames, on_overflow, fault, shortened in (
        (2, "error", None, 0),
        (3, "error", "too long", 0),
        (3, "fewer_frames", None, 1),
        (3, "drop_turns", "too long", 0),
    ):
        budget = Budget.from_buckets([(frames, 40)], count_visual_tokens, 40, on_overflow)
        (survey,) = survey_sources(root, "video", budget=budget, samples=0)
        assert faults(survey).get("v") == fault, (frames, on_overflow)
        assert survey.shortened == shortened


def test_one_sample_per_turn(root):
    """The first turn of "two" fits; the second, whose history is the first, does not."""
    (survey,) = survey_sources(root, "bad", guidance="each_turn", samples=0)
    assert faults(survey)["two"] == "too long"
    (survey,) = survey_sources(
        root, "bad", guidance="each_turn", samples=0, budget=Budget.from_buckets([(1, 28)])
    )
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
