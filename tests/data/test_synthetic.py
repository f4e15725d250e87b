"""The needles benchmark: records, files and truth agree, and every question has one answer."""

import itertools
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from dynfocus_jax.data import synthetic
from dynfocus_jax.data.synthetic import NUM_FRAMES, generate_needles
from dynfocus_jax.data.synthetic_frames import (
    COLORS,
    QUADRANT,
    SHAPES,
    draw_frames,
    shape_mask,
    write_video,
)
from dynfocus_jax.media.video import read_media, read_video
from dynfocus_jax.text.tokenizers import WordTokenizer
from tests.data.conftest import COUNTS

VIDEO_SPLITS = ("train", "validation", "heldout")
FRAMES = {"train": 16, "validation": 16, "heldout": 16, "images": 1, "sequences": 3}


def load(folder, split):
    return json.loads((folder / f"{split}.json").read_text())


def media_of(record):
    return record.get("video") or record["image"]


def turns_of(record):
    texts = [message["value"].removeprefix("<image>\n") for message in record["conversations"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


def solve(question, objects):
    """Return all answers that the objects allow, with the frames that show them."""
    match question.split():
        case ["describe"]:
            ordered = sorted(objects, key=lambda o: (o["frame"], o["quadrant"]))
            text = " ".join(f"{o['color']} {o['shape']}" for o in ordered) or "nothing"
            return [(text, {o["frame"] for o in objects})]
        case ["what", "shape", "is", color, "?"]:
            return [(o["shape"], {o["frame"]}) for o in objects if o["color"] == color]
        case ["what", "is", "with", color, "?"]:
            return [
                (f"{b['color']} {b['shape']}", {a["frame"]})
                for a, b in itertools.permutations(objects, 2)
                if a["color"] == color and a["frame"] == b["frame"]
            ]
        case ["which", "came", "first", first, "or", second, "?"]:
            found = [o for o in objects if o["color"] in (first, second)]
            earliest = min(o["frame"] for o in found)
            frames = {o["frame"] for o in found}
            return [(o["color"], frames) for o in found if o["frame"] == earliest]
    raise AssertionError(f"unknown question {question!r}")


def visible(frame):
    """Return (colour, quadrant) of the saturated areas of a frame, from its pixels only."""
    found = set()
    names, values = list(COLORS), np.array(list(COLORS.values()), float)
    for quadrant in range(4):
        row, column = divmod(quadrant, 2)
        area = frame[row * QUADRANT : (row + 1) * QUADRANT, column * QUADRANT : (column + 1) * QUADRANT]
        pixels = area.reshape(-1, 3).astype(float)
        distance = np.linalg.norm(pixels[:, None] - values, axis=-1)  # [pixels, colours]
        votes = Counter(distance[distance.min(1) < 45].argmin(1).tolist())
        found |= {(names[color], quadrant) for color, count in votes.items() if count >= 60}
    return found


@pytest.mark.parametrize("split", FRAMES)
def test_every_question_has_exactly_one_answer(needles, split):
    truth = json.loads((needles / "truth.json").read_text())
    for record in load(needles, split):
        for (question, answer), needles in zip(turns_of(record), record["needle_frames"], strict=True):
            ((solved, frames),) = solve(question, truth[media_of(record)])
            assert solved == answer
            assert frames == set(needles)


@pytest.mark.parametrize("split", FRAMES)
def test_files_show_the_objects_of_truth(needles, split):
    truth = json.loads((needles / "truth.json").read_text())
    for media in sorted({media_of(record) for record in load(needles, split)}):
        frames = read_media(needles / media, 100, 48).frames
        assert frames.shape == (FRAMES[split], 48, 48, 3)
        for number, frame in enumerate(frames):
            expected = {(o["color"], o["quadrant"]) for o in truth[media] if o["frame"] == number}
            assert visible(frame) == expected, (media, number)


def test_counts_and_balance(needles):
    truth = json.loads((needles / "truth.json").read_text())
    for split, videos in zip(VIDEO_SPLITS, (6, 2, 4), strict=True):
        records = load(needles, split)
        starts = {"shape": "what shape", "with": "what is with", "order": "which came"}
        by_type = {
            kind: [turn for r in records for turn in turns_of(r) if turn[0].startswith(start)]
            for kind, start in starts.items()
        }
        if split == "train":
            assert len(records) == videos
        else:
            assert all(turns_of(r)[0][0].startswith(starts[r["type"]]) for r in records)
        assert {kind: len(turns) for kind, turns in by_type.items()} == {
            "shape": 6 * videos,
            "with": 6 * videos,
            "order": 4 * videos,
        }
        assert Counter(answer for _, answer in by_type["shape"]) == dict.fromkeys(SHAPES, videos)
        assert Counter(answer.split()[0] for _, answer in by_type["with"]) == dict.fromkeys(COLORS, videos)
        named_first = sum(question.split()[3] == answer for question, answer in by_type["order"])
        assert named_first == 2 * videos
        for media in {media_of(r) for r in records}:
            objects = truth[media]
            assert sorted(o["shape"] for o in objects) == sorted(SHAPES)
            assert sorted(o["color"] for o in objects) == sorted(COLORS)
            assert sorted(Counter(o["frame"] for o in objects).values()) == [2, 2, 2]
    assert {len(truth[media_of(r)]) for r in load(needles, "images")} == {0, 1, 2, 3, 4}
    assert len(load(needles, "images")) == 40
    assert len(load(needles, "sequences")) == 20


def test_splits_share_no_file_or_scene(needles):
    files = [path.read_bytes() for path in sorted((needles / "media").rglob("*.*"))]
    assert len(files) == len(set(files)) == 72
    truth = json.loads((needles / "truth.json").read_text())
    scenes = [json.dumps(objects) for media, objects in truth.items() if len(objects) == 6]
    assert len(scenes) == len(set(scenes))


def test_vocabulary_covers_every_text(needles):
    tokenizer = WordTokenizer.from_file(needles / "vocabulary.json")
    assert tokenizer.vocab_size <= 64
    for split in FRAMES:
        for record in load(needles, split):
            for text in itertools.chain(*turns_of(record)):
                assert tokenizer.decode(tokenizer.encode(text)) == text


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_content_is_independent_of_workers(needles, tmp_path):
    again = generate_needles(tmp_path, workers=2, **COUNTS)
    assert again.name == needles.name
    assert contents(again) == contents(needles)


def test_content_depends_on_the_seed(needles, tmp_path):
    other = generate_needles(tmp_path, seed=1, workers=1, **COUNTS)
    assert other.name != needles.name
    assert not {b for n, b in contents(other).items() if "media" in n} & set(contents(needles).values())


def test_complete_folder_is_kept(needles):
    before = {path: path.stat().st_mtime_ns for path in needles.rglob("*")}
    assert generate_needles(needles.parent, workers=1, **COUNTS) == needles
    assert {path: path.stat().st_mtime_ns for path in needles.rglob("*")} == before


def test_interrupted_run_leaves_no_files(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    counts = {"num_train": 2, "num_validation": 0, "num_heldout": 0, "num_images": 0, "num_sequences": 0}
    with pytest.raises(KeyboardInterrupt):
        generate_needles(tmp_path, workers=1, progress=interrupt, **counts)
    assert list(tmp_path.iterdir()) == []
    seen = []
    generate_needles(tmp_path, workers=1, progress=lambda done, total: seen.append((done, total)), **counts)
    assert seen == [(2, 2)]


def test_workers_do_not_import_jax():
    code = "import sys, dynfocus_jax.data.synthetic; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_round_trip_through_mp4(tmp_path):
    """The mean error is below 8 grey levels in needle frames, which have sharp edges, else below 6."""
    rng = np.random.default_rng(3)
    for case in range(4):
        objects = synthetic._place_needles(rng)
        frames = draw_frames(rng, NUM_FRAMES, objects, [[2, 3], [9]], 3)
        write_video(tmp_path / f"{case}.mp4", frames)
        clip = read_video(tmp_path / f"{case}.mp4", NUM_FRAMES, size=48)
        np.testing.assert_allclose(clip.times, np.arange(16) / 4, atol=1e-6)
        error = np.abs(clip.frames[:, None].astype(float) - frames[None]).mean((2, 3, 4))  # [read, drawn]
        assert (error.argmin(1) == np.arange(NUM_FRAMES)).all()
        needles = np.isin(np.arange(NUM_FRAMES), [item["frame"] for item in objects])
        assert error.diagonal()[needles].max() < 8
        assert error.diagonal()[~needles].max() < 6


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("disc", np.pi / 4),
        ("ring", np.pi / 4 * (1 - 0.55**2)),
        ("square", 0.88**2),
        ("triangle", 1.9 / 4),
        ("cross", (2 * 2 * 0.64 - 0.64**2) / 4),
        ("star", 5 * 0.4 * np.sin(np.pi / 5) / 4),
    ],
)
def test_shape_areas(shape, area):
    mask = shape_mask(shape, 60)
    assert mask.min() == 0
    assert mask.max() == 1
    assert mask.mean() == pytest.approx(area, abs=0.006)
    np.testing.assert_array_equal(mask, mask[:, ::-1])


def test_star_points_up():
    mask = shape_mask("star", 60)
    assert mask[:5].sum() > 0
    assert mask[-5:].sum() == 0
