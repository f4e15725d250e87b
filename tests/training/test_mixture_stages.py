"""Training on a mixture of images, videos and texts: buckets, epochs, long samples, exact resume."""

import json
import re

import jax
import numpy as np
import pytest

from dynfocus_jax import trees
from dynfocus_jax.config import source
from dynfocus_jax.errors import UserError
from dynfocus_jax.training import loop

STAGE = 1  # compiles fast
BUCKETS = ((1, 16), (1, 96), (16, 144))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Five short records without media, and an invalid one."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    entries = [
        {
            "id": f"t{i}",
            "conversations": [
                {"from": "human", "value": "what shape is red ?"},
                {"from": "gpt", "value": "square"},
            ],
        }
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in [*entries, {"id": "t5"}]))
    return path


@pytest.fixture
def mixed(run_stage, texts):
    """A function (workdir, **fields) -> the second stage, on images, videos and texts."""

    def build(workdir, data=None, **fields):
        def change(config):
            config.log_every = 1
            config.data.max_skip_share = 0.2
            config.data.update(data or {})
            for stage in config.stages:
                stage.max_turns = None
            sources = tuple(
                source(name=name, annotations=annotations)
                for name, annotations in (
                    ("images", "images.json"),
                    ("videos", "train.json"),
                    ("texts", str(texts)),
                )
            )
            config.stages[STAGE].update(
                {"annotations": None, "sources": sources, "buckets": BUCKETS, "steps": None, "epochs": 2.0}
                | fields
            )

        return run_stage(workdir, STAGE, change)

    return build


@pytest.fixture
def consumed(monkeypatch):
    """Return a list that receives (record numbers, frames, text tokens) of every batch put on the devices."""
    batches, to_devices = [], loop.to_devices

    def record(batch, mesh):
        batches.append((batch.index.tolist(), batch.frames.shape[1], batch.tokens.shape[1]))
        return to_devices(batch, mesh)

    monkeypatch.setattr(loop, "to_devices", record)
    return batches


@pytest.fixture
def steps(monkeypatch):
    """Return a list that receives the train steps."""
    made, make = [], loop.make_train_step
    monkeypatch.setattr(loop, "make_train_step", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    return made


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_epochs_in_three_shapes(mixed, consumed, steps, tmp_path, capsys):
    stage = mixed(tmp_path)
    params, _ = stage.run(None)
    assert all(np.isfinite(leaf).all() for leaf in trees.flatten(jax.device_get(params)).values())
    count = len(stage.data.loader.records)
    assert count == 12 + 6 + 5
    per_epoch = stage.data.order.steps_per_epoch(0)
    assert len(consumed) == 2 * per_epoch == stage.stage.steps
    for epoch in (consumed[:per_epoch], consumed[per_epoch:]):
        assert sorted(i for rows, *_ in epoch for i in rows if i >= 0) == list(range(count))
    assert {tuple(shape) for _, *shape in consumed} == set(BUCKETS)
    (step,) = steps
    assert step._cache_size() == 3

    output = capsys.readouterr().out
    expected = f"stage pretrain_sequences: 23 records (1 unusable), {2 * per_epoch} steps of 4 (2.00 epochs)"
    assert expected in output
    printed = re.findall(r"step for (\d+) frames and (\d+) text tokens compiled in [\d.]+ s", output)
    assert {tuple(map(int, shape)) for shape in printed} == set(BUCKETS)
    assert len(printed) == 3
    assert "stage pretrain_sequences: the step was compiled for 3 of 3 buckets" in output
    assert re.search(r"pretrain_sequences 1/\d+ .* wait \d+ %", output)
    (skipped,) = entries(tmp_path / "skipped.jsonl")
    assert (skipped["source"], skipped["id"], skipped["number"]) == ("texts", "t5", 5)
    assert "conversations" in skipped["reason"]
    assert all(0 <= entry["wait"] <= 1 for entry in entries(tmp_path / "metrics.jsonl"))


def test_resume_in_the_middle_of_an_epoch(mixed, consumed, tmp_path):
    """The rest is read by worker processes, and is still the same."""
    mixed(tmp_path / "whole").run(None)
    whole, consumed[:] = list(consumed), []
    expected = jax.device_get(mixed(tmp_path / "whole").checkpoints.restore_params())
    mixed(tmp_path / "parts").run(None, stop_at=3)
    params, _ = mixed(tmp_path / "parts", data={"processes": 2}).run(None)
    assert consumed == whole
    for path, leaf in trees.flatten(jax.device_get(params)).items():
        np.testing.assert_array_equal(leaf, trees.flatten(expected)[path], err_msg=path)


def test_other_lengths_are_refused(mixed, tmp_path):
    """A position in the data is valid only for the same buckets."""
    mixed(tmp_path).run(None, stop_at=1)
    path = tmp_path / "lengths.jsonl"
    lines = [entry | ({"ends": [17]} if "text" in entry else {}) for entry in entries(path)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    with pytest.raises(UserError, match=r"other settings \(records"):
        mixed(tmp_path)


def test_samples_that_are_too_long_are_listed(mixed, consumed, tmp_path, capsys):
    budget = mixed(tmp_path / "a").data.loader.budget
    limit = 24 + budget.visual_tokens[16]
    stage = mixed(tmp_path / "b", max_length=limit, on_overflow="drop_turns", epochs=1.0)
    stage.run(None)
    count = stage.data.shortened.counts["turns"]
    assert count == 6  # the videos
    output = capsys.readouterr().out
    assert f"6 samples were too long and lost turns; see {tmp_path}/b/overflow.jsonl" in output
    listed = entries(tmp_path / "b" / "overflow.jsonl")
    assert {entry["source"] for entry in listed} == {"videos"}
    assert all(re.fullmatch(r"dropped \d+ of \d+ turns", entry["action"]) for entry in listed)
    assert stage.data.skipped.count == 0


def test_every_turn_is_a_sample(mixed, consumed, tmp_path):
    stage = mixed(tmp_path, data={"text_guidance": "each_turn"}, epochs=1.0)
    stage.run(None)
    turns = [len(record.turns) for record in stage.data.loader.records]
    seen = [i for rows, *_ in consumed for i in rows if i >= 0]
    assert np.bincount(seen).tolist() == turns
