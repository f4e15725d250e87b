"""Extraction, and training from features: it computes the same as training from pixels."""

import itertools
import json
import pickle
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from dynfocus_jax import trees
from dynfocus_jax.data.prepare import make_media_reader, make_tokenizer
from dynfocus_jax.errors import MediaError, UserError
from dynfocus_jax.evaluation.held_out import check_held_out_features, evaluate_held_out
from dynfocus_jax.extract import extract_features
from dynfocus_jax.features.store import MediaKey, media_key, read_index
from dynfocus_jax.parallel.sharding import place_like
from dynfocus_jax.parameters import init_params, sharded_shapes
from dynfocus_jax.planning.planned_steps import planned_train_step
from dynfocus_jax.records.mixture import Mixture
from dynfocus_jax.records.records import Record
from dynfocus_jax.records.sources import read_records
from dynfocus_jax.training.checkpoints import read_params, save_params
from dynfocus_jax.training.loop import StageRun
from dynfocus_jax.training.stage_data import make_loader, stage_budget
from dynfocus_jax.validation import validate
from dynfocus_jax.video_language_model import VideoLanguageModel, build_model
from tests.features.conftest import entry
from tests.features.extract_config import BATCH_SIZE, FRAMES, make_config
from tests.tiny import make_sample, mesh_of, pad, perturb, stack, with_kind

RNG = np.random.default_rng(0)
# Parameters that only shift all scores, or all logits of a query: their gradient is zero up to rounding, of
# which Adam makes steps.
ZERO_GRADIENT = ("score_net/out_dense_2/bias", "attention/key/bias", "context/key/bias")
MOVIES = [("a.pkl", 5), ("b.pkl", 40)]  # name and number of frames


def media_records(config, folder, index):
    mixture = Mixture(config.stages[index], folder, 0)
    return [record for record in mixture.records if record.media is not None]


def shards(path):
    return {file.name: file.read_bytes() for file in path.glob("features-*")}


# --- Extracted features -------------------------------------------------------------------------------


def test_every_media_item_is_stored_once(extracted, folder):
    index = read_index(extracted["float32"])
    expected = {
        **{MediaKey(name, "video", None): (2, 16) for name in FRAMES},
        MediaKey("long.mp4", "video", (1.0, 3.0)): (2, 16),
        MediaKey("0.png", "image", None): (1,),
        MediaKey("1.png", "image", None): (1,),
    }
    expected[MediaKey("middle.mp4", "video", None)] = expected[MediaKey("long.mp4", "video", None)] = (
        2,
        8,
        16,
    )
    assert {key: entry.limits for key, entry in index.items()} == expected
    # All 3 frames are stored, for limit 16; the video whose frames are all the same has one distinct frame.
    assert index[MediaKey("short.mp4", "video", None)].frames == 3
    assert index[MediaKey("still.mp4", "video", None)].frames == 1
    assert index[MediaKey("middle.mp4", "video", None)].frames == 11


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clips_equal_encoded_pixels(extracted, folder, initial, dtype):
    """For every record and bucket, times, indices and, bit for bit, features are the same."""
    config = make_config(folder, initial, dtype)
    config.data.features = str(extracted[dtype])
    pixels, features = make_media_reader(config), make_media_reader(config, folder)
    model = build_model(config)
    params = {"vision": jax.tree.map(lambda x: x.astype(dtype), read_params(initial)["vision"])}

    @jax.jit
    def tower(frames):
        return model.apply({"params": params}, frames, method=lambda model, x: model.vision(x, keep_cls=True))

    for index in range(2):
        limits = [frames for frames, _ in stage_budget(config, index).buckets]
        for record, limit in itertools.product(media_records(config, folder, index), limits):
            clip, stored = pixels.read(record, limit, RNG), features.read(record, limit, RNG)
            np.testing.assert_array_equal(stored.times, clip.times)
            np.testing.assert_array_equal(stored.indices, clip.indices)
            # The batch size of the extraction: with another one, sums may be computed in another order.
            padded = np.zeros((BATCH_SIZE, *clip.frames.shape[1:]), np.uint8)
            padded[: len(clip.frames)] = clip.frames
            expected = np.asarray(tower(padded[None]))[0, : len(clip.frames)]
            assert stored.frames.dtype == expected.dtype == {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
            np.testing.assert_array_equal(stored.frames, expected)
            assert np.ptp(stored.frames.astype(np.float32)) > 0.1
            assert features.info(record.media) == pixels.info(record.media)


# --- Training and evaluation from features ------------------------------------------------------------


def run_stages(config, folder, workdir, count=2):
    """Train some stages; return the metrics of all steps and the final parameters by path."""
    config.log_every = 1
    validate(config)
    tokenizer = make_tokenizer(config, folder / "vocabulary.json")
    params = read_params(Path(config.initial))
    for index in range(count):
        run = StageRun(config, index, workdir=workdir, data_root=folder, tokenizer=tokenizer, mesh=mesh_of())
        params, _ = run.run(params)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return lines, trees.flatten(jax.device_get(params))


def test_training_equals_training_from_pixels(config, folder, extracted, tmp_path):
    """Losses and parameters are the same, for videos, images and text in two buckets."""
    pixels, expected = run_stages(config, folder, tmp_path / "pixels", count=1)
    config.data.features = str(extracted["float32"])
    features, found = run_stages(config, folder, tmp_path / "features", count=1)
    assert len(pixels) == 3
    for one, other in zip(pixels, features, strict=True):
        assert [one[key] for key in ("stage", "step")] == [other[key] for key in ("stage", "step")]
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-5)
        np.testing.assert_allclose(other["grad_norm"], one["grad_norm"], rtol=1e-4)
    assert np.ptp([line["loss"] for line in pixels]) > 1e-3
    assert found.keys() == expected.keys()  # with the vision tower, so that later stages can read pixels
    for path, leaf in found.items():
        if path.endswith(ZERO_GRADIENT):
            continue
        np.testing.assert_allclose(leaf, expected[path], atol=1e-4, err_msg=path)
        assert path.startswith("vision/") <= np.array_equal(leaf, expected[path])
    assert not (tmp_path / "features" / "skipped.jsonl").exists()


def test_run_from_pixels_continues_with_features(config, folder, extracted, tmp_path):
    """`config.data.features` is not among the settings that a resumed run must keep."""
    tokenizer = make_tokenizer(config, folder / "vocabulary.json")

    def stage_run():
        return StageRun(config, 1, workdir=tmp_path, data_root=folder, tokenizer=tokenizer, mesh=mesh_of())

    stage_run().run(read_params(Path(config.initial)), stop_at=1)
    config.data.features = str(extracted["float32"])
    assert stage_run().checkpoints.latest_step() == 1


def test_evaluation_gives_the_same_answers(config, folder, extracted, tmp_path):
    for each in config.stages:
        each.connector = with_kind(config, "pooled")
    config.evaluation.update({"annotations": "align.json", "media_frames": 16, "batch_size": 4})
    params = init_like(config)
    tokenizer = make_tokenizer(config, folder / "vocabulary.json")
    found = {}
    for name in (None, str(extracted["float32"])):
        config.data.features = name
        check_held_out_features(config, folder)
        workdir = tmp_path / str(name is None)
        workdir.mkdir()
        inputs = {"data_root": folder, "tokenizer": tokenizer, "workdir": workdir, "mesh": mesh_of()}
        evaluate_held_out(config, params, **inputs)
        found[name] = (workdir / "predictions.jsonl").read_text()
        assert not (workdir / "skipped.jsonl").exists()
    one, other = found.values()
    assert one == other
    assert len({json.loads(line)["prediction"] for line in one.splitlines()}) > 1
    config.evaluation.media_frames = 7
    with pytest.raises(UserError, match="not for 7; rerun extract"):
        check_held_out_features(config, folder)


def init_like(config):
    """Return the parameters of the model: those of the checkpoint, and random ones of the connector."""
    model = build_model(config)
    shapes = sharded_shapes(config, len(config.stages) - 1, mesh_of())
    held = trees.flatten(read_params(Path(config.initial)))
    fresh = {path: leaf for path, leaf in shapes.items() if path not in held}
    fresh = jax.device_get(perturb(trees.unflatten(init_params(model, jax.random.key(0), fresh))))
    params = held | trees.flatten(fresh)
    return trees.unflatten({path: place_like(params[path], shape) for path, shape in shapes.items()})


def test_features_are_not_encoded_again(config, extracted):
    """The planned step takes features as its argument, and its program contains no vision tower."""
    config.data.features = str(extracted["float32"])
    mesh = mesh_of()
    step = planned_train_step(config, 1, mesh)
    _, batch = step.arguments
    assert batch.frames.shape == (4, 8, 16, 16)
    assert batch.frames.dtype == np.float32
    with_features = step.function.lower(*step.arguments).as_text()
    config.data.features = None
    step = planned_train_step(config, 1, mesh)
    assert step.arguments[1].frames.shape == (4, 8, 16, 16, 3)
    without = step.function.lower(*step.arguments).as_text()
    assert "tensor<4x8x16x16x3xui8>" in without
    assert "ui8" not in with_features
    assert with_features.count("dot_general") < without.count("dot_general")


def test_padding_independence(config, initial):
    """The visual tokens of a sample of features are the same in a bucket of more frames."""
    config = config.copy_and_resolve_references()
    config.stages[0].connector = with_kind(config, "pooled")
    model = build_model(config, 0)
    frames = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    mask = np.array([[True, True, True]])

    def tokens(frames, mask):
        batch = _batch(frames, mask)
        params = model.init(jax.random.key(0), batch)
        return model.apply(params, batch, method=VideoLanguageModel.visual_tokens)

    alone = tokens(frames, mask)
    padded = tokens(np.pad(frames, ((0, 0), (0, 2), (0, 0), (0, 0))), np.pad(mask, ((0, 0), (0, 2))))
    count = int(alone.count[0])
    assert int(padded.count[0]) == count == 3 * 4
    np.testing.assert_allclose(padded.tokens[:, :count], alone.tokens[:, :count], atol=1e-6)


def _batch(frames, mask):
    sample = stack([pad(make_sample(np.random.default_rng(0), 1, 6, 4), 1, 8)])
    return sample._replace(frames=frames, frame_mask=mask, oracle_frames=np.zeros_like(mask))


# --- Continued extraction, and unreadable media -------------------------------------------------------


def test_only_missing_features_are_extracted(config, folder, tmp_path):
    out = tmp_path / "f"
    first = extract_features(config, out, stage="instruct", batch_size=BATCH_SIZE)
    assert (first.media, first.skipped) == (3, 0)
    before = shards(out)
    assert extract_features(config, out, stage="instruct", batch_size=BATCH_SIZE).media == 0
    assert shards(out) == before
    # The media of both stages lack frames of the first: they are extracted again, for all limits.
    second = extract_features(config, out, batch_size=BATCH_SIZE)
    assert second.media == 6
    assert before.items() <= shards(out).items()
    index = read_index(out)
    assert index[MediaKey("long.mp4", "video", None)].limits == (2, 8, 16)
    assert len(index) == 7
    config.data.features = str(out)
    reader, pixels = make_media_reader(config, folder), make_media_reader(config)
    record = Record("a", folder / "long.mp4", ())
    for limit in (2, 8, 16):
        assert (
            reader.read(record, limit, RNG).times.tolist() == pixels.read(record, limit, RNG).times.tolist()
        )


def test_unreadable_media_are_listed(config, folder, tmp_path, extracted):
    (folder / "text.mp4").write_text("no video")
    good = json.loads((folder / "align.json").read_text())
    bad = [entry("none", "gone.mp4"), entry("text", "text.mp4")]
    (folder / "bad.json").write_text(json.dumps([bad[0], *good, bad[1]]))
    config.stages[0].annotations = "bad.json"
    done = extract_features(config, tmp_path, batch_size=BATCH_SIZE)
    assert (done.media, done.skipped) == (7, 2)
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(each["id"], each["source"]) for each in listed] == [("none", "bad"), ("text", "bad")]
    assert "no such file" in listed[0]["reason"]
    assert "not a readable video" in listed[1]["reason"]
    # The other features are unaffected, and the unreadable media are tried again.
    for key, expected in read_index(extracted["float32"]).items():
        assert read_index(tmp_path)[key].checksum == expected.checksum
    assert extract_features(config, tmp_path, batch_size=BATCH_SIZE) == (0, 0, 2)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 2
    # Training skips them, with a hint at the list.
    config.data.features = str(tmp_path)
    with pytest.raises(MediaError, match=r"gone\.mp4: .*no features of it; check .* skipped\.jsonl"):
        make_media_reader(config, folder).read(Record("none", folder / "gone.mp4", ()), 2, RNG)


def test_too_many_unreadable_media(config, folder, tmp_path):
    many = [entry(f"n{i}", f"gone{i}.mp4") for i in range(31)]
    (folder / "many.json").write_text(json.dumps(many))
    config.stages[0].annotations = "many.json"
    with pytest.raises(UserError, match="31 of 31 samples could not be used"):
        extract_features(config, tmp_path, batch_size=BATCH_SIZE)


def test_evaluation_is_extracted(config, folder, tmp_path):
    config.evaluation.update({"annotations": "instruct.json", "media_frames": 5})
    assert extract_features(config, tmp_path, stage="evaluation", batch_size=BATCH_SIZE).media == 3
    index = read_index(tmp_path)
    assert index[media_key(Record("a", folder / "long.mp4", ()), folder)].limits == (5,)


# --- Errors -------------------------------------------------------------------------------------------


def test_stage_that_trains_the_vision_tower(config, folder, extracted, tmp_path):
    config.stages[1].trainable = ("vision/.*", "language/.*")
    message = "stage 'instruct' trains the vision tower"
    with pytest.raises(UserError, match=message):
        extract_features(config, tmp_path / "f", stage="align")
    config.data.features = str(extracted["float32"])
    with pytest.raises(UserError, match=message):
        run_stages(config, folder, tmp_path / "run")


def test_features_of_another_vision_tower(config, folder, initial, extracted, tmp_path):
    """One bit of one weight differs."""
    params = read_params(initial)
    params["vision"]["position"] = params["vision"]["position"].copy()
    params["vision"]["position"].view(np.uint32)[3, 5] ^= 1
    save_params(tmp_path / "other", params)
    config.initial = str(tmp_path / "other")
    config.data.features = str(extracted["float32"])
    with pytest.raises(UserError, match=r"were computed by another vision tower.* set config\.initial"):
        run_stages(config, folder, tmp_path / "run", count=1)
    config.data.features = None
    with pytest.raises(UserError, match=r"weights: stored .*, now"):
        extract_features(config, extracted["float32"], batch_size=BATCH_SIZE)


def test_features_of_other_buckets(config, folder, extracted, tmp_path):
    """The error comes at the start of the run, not after hours."""
    config.data.features = str(extracted["float32"])
    config.stages[1].num_frames = 9
    with pytest.raises(UserError, match=r"2 of 3 records have no features.* not for 9; rerun extract"):
        run_stages(config, folder, tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda c: c.data.sampling.update({"kind": "segments", "pick": "random"}),
            "sampling.pick is 'random'",
        ),
        (lambda c: c.stages[0].update({"on_overflow": "fewer_frames"}), "on_overflow is 'fewer_frames'"),
    ],
)
def test_configurations_that_do_not_determine_frames(config, extracted, tmp_path, change, reason):
    change(config)
    with pytest.raises(UserError, match=reason):
        extract_features(config, tmp_path)
    validate(config)
    config.data.features = str(extracted["float32"])
    with pytest.raises(UserError, match=reason):
        validate(config)


def test_checkpoint_without_vision_tower(config, initial, tmp_path):
    config.initial = None
    with pytest.raises(UserError, match=r"config\.initial is not set, expected a checkpoint"):
        extract_features(config, tmp_path / "f")
    save_params(tmp_path / "i", {"language": read_params(initial)["language"]})
    config.initial = str(tmp_path / "i")
    with pytest.raises(UserError, match=r"does not fit config\.model \(missing: vision"):
        extract_features(config, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_unknown_stage(config, tmp_path):
    with pytest.raises(UserError, match="--stage is 'nothing', expected one of align, instruct"):
        extract_features(config, tmp_path / "f", stage="nothing")


def test_disk_space(config, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"--output .* GiB free, but the features need about .* GiB"):
        extract_features(config, tmp_path)


# --- Movie features -----------------------------------------------------------------------------------


def test_movies_are_converted_without_a_vision_tower(config, folder, tmp_path, movie):
    (folder / "movies").mkdir()
    values = {name: movie(folder / "movies" / name, frames, seed=frames) for name, frames in MOVIES}
    (folder / "movies" / "broken.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    config.initial = None
    done = extract_features(config, tmp_path, movies=folder / "movies")
    assert (done.media, done.skipped) == (2, 1)
    (listed,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert "broken.pkl: not a file of movie features" in listed["reason"]
    config.data.features = str(tmp_path)
    reader = make_media_reader(config, folder)
    for name, frames in MOVIES:
        record = Record("a", folder / "movies" / name, ())
        for limit in (2, 8, 16):
            clip = reader.read(record, limit, RNG)
            count = min(limit, frames)
            chosen = ((2 * np.arange(count) + 1) * frames) // (2 * count)
            assert clip.indices.tolist() == chosen.tolist()
            assert clip.times.tolist() == chosen.tolist()  # one frame per second
            np.testing.assert_array_equal(clip.frames, values[name][chosen].astype(np.float32))
        assert reader.info(record.media).frames == frames
        subtitles = reader.features.subtitles(record)
        assert [(each.start, each.end, each.text) for each in subtitles] == [
            (i, i + 1, f"word {i}") for i in range(1, frames, 2)
        ]


def test_training_on_movies_and_videos(config, folder, tmp_path, movie):
    """Records may name files of movie features or videos; both are stored in one folder."""
    movie(folder / "c.pkl", 12)
    (folder / "both.json").write_text(
        json.dumps([entry("m", "c.pkl"), entry("p", "c.pkl", start=2.5, end=6.0), entry("v", "short.mp4")])
    )
    config.stages = config.stages[1:]
    config.stages[0].update({"annotations": "both.json", "batch_size": 3, "steps": 2})
    assert extract_features(config, tmp_path / "f", batch_size=BATCH_SIZE).media == 3
    config.data.features = str(tmp_path / "f")
    record = Record("p", folder / "c.pkl", (), span=(2.5, 6.0))
    assert make_media_reader(config, folder).read(record, 8, RNG).times.tolist() == [2.0, 3.0, 4.0, 5.0]
    lines, _ = run_stages(config, folder, tmp_path / "run", count=1)
    assert [line["step"] for line in lines] == [1, 2]
    assert not (tmp_path / "run" / "skipped.jsonl").exists()


def test_subtitles_of_movies_reach_the_batch(config, folder, tmp_path, movie):
    """A record's own subtitle file takes the place of the subtitles stored with the features."""
    movie(folder / "said.pkl", 12, text="<image>red" + "<image>" * 7 + "<image>square disc" + "<image>" * 3)
    (folder / "own.srt").write_text("00:00:05,000 --> 00:00:06,000\nblue\n")
    entries = [entry("m", "said.pkl"), entry("o", "said.pkl", subtitles="own.srt")]
    (folder / "said.json").write_text(json.dumps(entries))
    config.stages = config.stages[1:]
    config.stages[0].update(
        {"annotations": "said.json", "batch_size": 2, "steps": 2, "num_frames": 4, "max_subtitle": 5}
    )
    extract_features(config, tmp_path / "f", batch_size=BATCH_SIZE)
    config.data.features = str(tmp_path / "f")
    lines, _ = run_stages(config, folder, tmp_path / "run", count=1)
    assert [line["step"] for line in lines] == [1, 2]
    assert not (tmp_path / "run" / "skipped.jsonl").exists()
    tokenizer = make_tokenizer(config, folder / "vocabulary.json")
    records = read_records(folder / "said.json", folder)
    loader = make_loader(config, 0, records, tokenizer, folder)
    found = [loader(number, RNG)[0] for number in range(2)]
    assert found[0].subtitles[:3].tolist() == tokenizer.encode("red square disc")
    # Frames 1, 4, 7 and 10 of 12 are sampled: the words spoken in second 8 follow the frame of second 7.
    assert found[0].subtitle_frames.tolist() == [0, 2, 2, -1, -1]
    assert found[1].subtitles[:1].tolist() == tokenizer.encode("blue")
    assert found[1].subtitle_frames.tolist() == [1, -1, -1, -1, -1]


def test_movies_of_another_shape(config, folder, tmp_path, movie):
    movie(tmp_path / "wide.pkl", 4, width=24)
    extract_features(config, tmp_path / "f", movies=tmp_path)
    assert (
        "features have shape (16, 24), expected (16, 16) as in config.model.vision"
        in (tmp_path / "f" / "skipped.jsonl").read_text()
    )


def test_movies_with_nan_or_inf(config, tmp_path, movie):
    values = np.zeros((2, 16, 16), np.float16)
    values[1, 3, 3] = np.inf
    (tmp_path / "inf.pkl").write_bytes(pickle.dumps({"feats": values, "inputs": "<image><image>"}))
    extract_features(config, tmp_path / "f", movies=tmp_path)
    assert "NaN or Inf" in (tmp_path / "f" / "skipped.jsonl").read_text()


def test_folder_without_movies(config, tmp_path):
    with pytest.raises(UserError, match=r"--movie_features is .* expected a folder with \.pkl files"):
        extract_features(config, tmp_path / "f", movies=tmp_path)
