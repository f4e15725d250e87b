"""The paper's training data: the sources of its two stages, and those of each row of its Table 13.

    stage(sources=mixtures.align(), epochs=1.0, ...)
    stage(sources=mixtures.instruct("clevrer"), epochs=1.0, ...)

Files are expected in one folder (config.data.root), under their publishers' names; links to folders outside
it are refused, so name other places with `annotations` and `media` of a source.

    webvid/results_2M_train.csv, webvid/videos/          WebVid-2.5M (page_dir/videoid.mp4 or videoid.mp4)
    llava_558k/blip_laion_cc_sbu_558k.json, images/      liuhaotian/LLaVA-Pretrain
    llava_665k/llava_v1_5_mix665k.json, coco/, gqa/, ocr_vqa/, textvqa/, vg/
                                                         liuhaotian/LLaVA-Instruct-150K
    scienceqa/problems.json, images/                     ScienceQA (images/train/1/image.png)
    videochat2_it/video/*/*/train.json                   OpenGVLab/VideoChat2-IT
    activitynet/, nextqa/, clevrer/video_train/          the videos that these name

The paper (4.1) names the sources and takes those of VideoChat2 for VideoChatGPT-100K, CLEVRER, NExT-QA and
WebVid-QA; how many records of each, it does not say. Its "LLaVA-filter-CC3M" is taken to be LLaVA-558K, with
which LLaMA-VID trains, whose preparation it follows; of WebVid as many captions are drawn as there. (The
older LLaVA-CC3M-Pretrain-595K has the same format: its chat.json can be named instead.) LLaVA-665K is the
"LLaVA-625K" of the table with 40 k conversations without an image.
"""

from dynfocus_jax.config import source
from dynfocus_jax.errors import UserError

# Table 13, from its first row of DynFocus to its last; the last is what the paper's other tables use.
ROWS = ("video", "image", "scienceqa", "clevrer", "paper")


def align(row: str = "paper"):
    """The first stage: captions of videos, and in all rows but the first of images."""
    webvid = source(
        name="webvid",
        annotations="webvid/results_2M_train.csv",
        format="webvid",
        media="webvid/videos",
        select="random:232000",
    )
    llava = source(
        name="llava_558k",
        annotations="llava_558k/blip_laion_cc_sbu_558k.json",
        media="llava_558k/images",
    )
    return (webvid, llava)[: 1 if _number(row) == 0 else 2]


def instruct(row: str = "paper"):
    """The second stage: conversations about videos and images, and without either; each row adds to them."""
    additions = (
        (_videochat2("videochatgpt", "conversation", "activitynet"),),
        (source(name="llava_665k", annotations="llava_665k/llava_v1_5_mix665k.json", media="llava_665k"),),
        (
            source(
                name="scienceqa",
                annotations="scienceqa/problems.json",
                format="scienceqa",
                media="scienceqa/images",
            ),
        ),
        (
            _videochat2("clevrer_qa", "reasoning", "clevrer/video_train"),
            _videochat2("clevrer_mc", "reasoning", "clevrer/video_train"),
        ),
        (
            _videochat2("next_qa", "reasoning", "nextqa"),
            _videochat2("webvid_qa", "vqa", "webvid/videos"),
        ),
    )
    return sum(additions[: _number(row) + 1], ())


def _videochat2(name: str, task: str, media: str):
    return source(
        name=name,
        annotations=f"videochat2_it/video/{task}/{name}/train.json",
        format="videochat2",
        media=media,
    )


def _number(row: str) -> int:
    if row not in ROWS:
        raise UserError(f"there is no mixture {row!r}; there are {', '.join(ROWS)}.")
    return ROWS.index(row)
