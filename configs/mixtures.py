"""The paper's training data: the sources of its two stages, for each row of its Table 13.

    stage(sources=mixtures.align_sources(), epochs=1.0, ...)
    stage(sources=mixtures.instruct_sources("clevrer"), epochs=1.0, ...)

All files are expected in one folder (config.data.root), under their publishers' names:

    webvid/results_2M_train.csv, webvid/videos/          WebVid-2.5M (page_dir/videoid.mp4 or videoid.mp4)
    llava_558k/blip_laion_cc_sbu_558k.json, images/      liuhaotian/LLaVA-Pretrain
    llava_665k/llava_v1_5_mix665k.json, coco/, gqa/, ocr_vqa/, textvqa/, vg/
                                                         liuhaotian/LLaVA-Instruct-150K
    scienceqa/problems.json, images/                     ScienceQA (images/train/1/image.png)
    videochat2_it/video/*/*/train.json                   OpenGVLab/VideoChat2-IT
    activitynet/, nextqa/, clevrer/video_train/          the videos of VideoChat2-IT

Links that leave this folder are refused. To read from other folders, set `annotations` and `media` of a
source.

The paper (4.1) names its sources but not their sizes. These choices fill the gaps:

- VideoChatGPT-100K, CLEVRER, NExT-QA and WebVid-QA are read in VideoChat2's version, as in the paper.
- "LLaVA-filter-CC3M" is taken to be LLaVA-558K, as in LLaMA-VID, whose data preparation the paper follows.
  The older LLaVA-CC3M-Pretrain-595K has the same format: name its chat.json to use it instead.
- As many WebVid captions are drawn as LLaMA-VID uses.
- "LLaVA-625K" is taken to be LLaVA-665K, which has 40 k more conversations, all without an image.
"""

from ml_collections.config_dict import ConfigDict

from dynfocus_jax.config import source
from dynfocus_jax.errors import UserError

# DynFocus in Table 13, from its first row to its last, which the paper's other tables use.
ROWS = ("video", "image", "scienceqa", "clevrer", "paper")


def align_sources(row: str = "paper") -> tuple[ConfigDict, ...]:
    """Return the sources of the first stage: captions of videos and, in all rows but "video", of images.

    Raises:
      UserError: if `row` is not in ROWS.
    """
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
    return (webvid,) if _row_index(row) == 0 else (webvid, llava)


def instruct_sources(row: str = "paper") -> tuple[ConfigDict, ...]:
    """Return the sources of the second stage: conversations about videos, images and text.

    Raises:
      UserError: if `row` is not in ROWS.
    """
    added_by_row = (
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
    return tuple(one for added in added_by_row[: _row_index(row) + 1] for one in added)


def _videochat2(name: str, task: str, media: str) -> ConfigDict:
    return source(
        name=name,
        annotations=f"videochat2_it/video/{task}/{name}/train.json",
        format="videochat2",
        media=media,
    )


def _row_index(row: str) -> int:
    if row not in ROWS:
        raise UserError(f"mixture is {row!r}, expected one of {', '.join(ROWS)}.")
    return ROWS.index(row)
