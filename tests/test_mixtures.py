"""The paper's mixtures: the rows of Table 13, and the files that configs/mixtures.py describes."""

import csv
import json

import pytest

from configs import mixtures
from dynfocus_jax.config import stage
from dynfocus_jax.errors import UserError
from dynfocus_jax.records.mixture import Mixture
from dynfocus_jax.validation import validate
from tests.test_published_configs import load_config

# Table 13: row -> (data sets of the first stage, of the second).
TABLE_13 = {
    "video": ("WebVid-Cap", "VideoChatGPT-100K"),
    "image": ("WebVid-Cap, LLaVA-CC3M", "VideoChatGPT-100K, LLaVA-625K"),
    "scienceqa": ("WebVid-Cap, LLaVA-CC3M", "VideoChatGPT-100K, LLaVA-625K, Science-QA"),
    "clevrer": ("WebVid-Cap, LLaVA-CC3M", "VideoChatGPT-100K, LLaVA-625K, Science-QA, CLEVRER"),
    "paper": (
        "WebVid-Cap, LLaVA-CC3M",
        "VideoChatGPT-100K, LLaVA-625K, Science-QA, CLEVRER, NeXT-QA, WebVid-QA",
    ),
}
SOURCES = {"align": mixtures.align_sources, "instruct": mixtures.instruct_sources}
NAMES = {
    "WebVid-Cap": ("webvid",),
    "LLaVA-CC3M": ("llava_558k",),
    "VideoChatGPT-100K": ("videochatgpt",),
    "LLaVA-625K": ("llava_665k",),
    "Science-QA": ("scienceqa",),
    "CLEVRER": ("clevrer_qa", "clevrer_mc"),
    "NeXT-QA": ("next_qa",),
    "WebVid-QA": ("webvid_qa",),
}


@pytest.mark.parametrize("row", mixtures.ROWS)
def test_rows_of_the_table(row):
    for sources, cell in zip(
        (mixtures.align_sources(row), mixtures.instruct_sources(row)), TABLE_13[row], strict=True
    ):
        assert [one.name for one in sources] == [name for part in cell.split(", ") for name in NAMES[part]]


def test_unknown_row():
    with pytest.raises(UserError, match="mixture is 'all', expected one of video, image"):
        mixtures.instruct_sources("all")


@pytest.mark.parametrize("row", mixtures.ROWS)
@pytest.mark.parametrize("name", ["align_7b", "instruct_7b"])
def test_options_of_the_published_configs(name, row):
    config = load_config(name, f"mixture={row}")
    config.data.root = "data"
    validate(config, devices=8)
    (only,) = config.stages
    assert only.sources == SOURCES[only.name](row)
    assert (only.annotations, only.steps, only.epochs) == (None, None, 1.0)
    plain = load_config(name)
    assert (plain.stages[0].annotations, plain.stages[0].sources) == (f"{only.name}.json", ())


def test_two_options():
    config = load_config("instruct_7b", "mixture=video,train=lora")
    assert [one.name for one in config.stages[0].sources] == ["videochatgpt"]
    assert config.model.language.lora.rank == 128


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(content)
    else:
        path.write_text(json.dumps(content))


def test_every_file_of_the_described_folder_is_read(tmp_path):
    """The folder has one record of every data set, in its own format and place."""
    talk = [{"from": "human", "value": "<image>\nwhy?"}, {"from": "gpt", "value": "so"}]
    write(
        tmp_path / "webvid/results_2M_train.csv",
        [
            ["videoid", "contentUrl", "duration", "page_dir", "name"],
            ["1", "http://x", "PT1S", "1_50", "A dog."],
        ],
    )
    write(
        tmp_path / "llava_558k/blip_laion_cc_sbu_558k.json",
        [{"id": "a", "image": "00453/a.jpg", "conversations": talk}],
    )
    write(
        tmp_path / "llava_665k/llava_v1_5_mix665k.json",
        [{"id": "b", "image": "coco/train2017/b.jpg", "conversations": talk}],
    )
    problem = {"question": "why?", "choices": ["a", "b"], "answer": 1, "image": "image.png", "split": "train"}
    write(tmp_path / "scienceqa/problems.json", {"1": problem})
    media = {
        "webvid": "webvid/videos/1_50/1.mp4",
        "llava_558k": "llava_558k/images/00453/a.jpg",
        "llava_665k": "llava_665k/coco/train2017/b.jpg",
        "scienceqa": "scienceqa/images/train/1/image.png",
        "videochatgpt": "activitynet/v_c.mp4",
        "clevrer_qa": "clevrer/video_train/video_00000-01000/video_00010.mp4",
        "clevrer_mc": "clevrer/video_train/video_00000-01000/video_00010.mp4",
        "next_qa": "nextqa/1164/3.mp4",
        "webvid_qa": "webvid/videos/1_50/1.mp4",
    }
    sources = (*mixtures.align_sources(), *mixtures.instruct_sources())
    for one in sources:
        one.select = "all"
        (tmp_path / one.media).mkdir(parents=True, exist_ok=True)
        if one.format == "videochat2":
            video = str((tmp_path / media[one.name]).relative_to(tmp_path / one.media))
            write(tmp_path / one.annotations, [{"video": video, "QA": [{"i": "", "q": "why?", "a": "so"}]}])
    mixture = Mixture(stage(sources=sources), tmp_path, 0)
    assert mixture.refused == []
    assert {r.source: str(r.media.relative_to(tmp_path)) for r in mixture.records} == media
