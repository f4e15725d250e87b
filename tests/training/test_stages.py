"""Stages of a run: the parameters that each changes, stopping and resuming, runs that must stop."""

import itertools
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dynfocus_jax import trees
from dynfocus_jax.data.prepare import prepare_data_root
from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.training import loop
from dynfocus_jax.training.checkpoints import restore_params
from tests.tiny import tiny_config

INSTRUCT = 3


def changed_paths(before, after):
    before, after = trees.flatten(before), trees.flatten(after)
    assert before.keys() == after.keys()
    return {path for path in before if not np.array_equal(before[path], after[path])}


# --- Changed parameters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
def test_only_the_declared_parts_change(stages, index):
    stage = tiny_config().stages[index]
    before, after = stages[stage.name]
    declared = {
        path
        for path in trees.flatten(before)
        if any(re.fullmatch(pattern, path) for pattern in stage.trainable)
    }
    changed = changed_paths(before, after)
    assert changed <= declared
    # Weight decay and Adam change every declared leaf, except those that start at zero and have no gradient
    still = {path for path in declared - changed if trees.flatten(before)[path].any()}
    assert not still
    assert len(changed) > len(declared) // 2


def test_align_trains_the_projectors_only(stages):
    before, after = stages["align"]
    parts = {"/".join(path.split("/")[:3]) for path in changed_paths(before, after)}
    assert parts <= {
        "connector/projector/linear",
        "connector/projector/up",
        "connector/projector/down",
        "connector/cce/context",
        *(part for part in parts if part.startswith("text_encoder/query_projection")),
    }
    assert {"connector/projector/linear", "connector/cce/context"} <= parts


def test_instruct_reaches_the_score_net(stages):
    changed = changed_paths(*stages["instruct"])
    assert {path for path in changed if path.startswith("connector/dpe/score_net")} >= {
        f"connector/dpe/score_net/{layer}/{leaf}"
        for layer in ("in_norm", "in_dense", "out_dense_0", "out_dense_1")
        for leaf in ("kernel" if "dense" in layer else "scale", "bias")
    }
    assert not any(path.startswith("vision/") for path in changed)


def test_a_stage_starts_from_the_stage_before(stages):
    """All parameters bit for bit, except W_v, which starts as a copy of f's linear map."""
    names = list(stages)
    for earlier, later in itertools.pairwise(names):
        old, new = trees.flatten(stages[earlier][1]), trees.flatten(stages[later][0])
        copied = {path for path in new if path.startswith("connector/cce/context/value")}
        for path in old.keys() & new.keys() - (copied if later == "align" else set()):
            np.testing.assert_array_equal(new[path], old[path], err_msg=f"{later}: {path}")
    start = trees.flatten(stages["align"][0])
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(
            start[f"connector/cce/context/value/{leaf}"], start[f"connector/projector/linear/{leaf}"]
        )
    assert start["connector/projector/linear/kernel"].any()


# --- Stop and resume ----------------------------------------------------------------------------------


@pytest.fixture
def consumed(monkeypatch):
    """Return a list that receives the record numbers of every training batch."""
    batches, to_devices = [], loop.to_devices

    def record(batch, mesh):
        batches.append(batch.index.tolist())
        return to_devices(batch, mesh)

    monkeypatch.setattr(loop, "to_devices", record)
    return batches


@pytest.mark.parametrize("stop", [1, 3])  # within the steps of random selection, and after them
def test_resumed_training_is_bit_identical(stages, run_stage, consumed, tmp_path, stop):
    previous = stages["align"][1]
    run_stage(tmp_path / "whole", INSTRUCT).run(previous)
    whole, consumed[:] = list(consumed), []

    stopped = run_stage(tmp_path / "parts", INSTRUCT)
    stopped.run(previous, stop_at=stop)
    assert not stopped.finished
    assert consumed == whole[:stop]
    consumed.clear()
    resumed = run_stage(tmp_path / "parts", INSTRUCT)
    assert not resumed.finished
    params, seconds = resumed.run(previous)
    assert consumed == whole[stop:]
    assert resumed.finished
    assert not changed_paths(stages["instruct"][1], jax.device_get(params))
    assert seconds > 0
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4


def test_the_last_checkpoint_equals_the_result_of_run(stages, run_stage, tmp_path):
    run_stage(tmp_path, INSTRUCT).run(stages["align"][1])
    finished = run_stage(tmp_path, INSTRUCT)
    assert finished.finished
    assert not changed_paths(stages["instruct"][1], jax.device_get(finished.checkpoints.restore_params()))
    assert finished.checkpoints.seconds() > 0


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("learning_rate", lambda config: config.stages[INSTRUCT].update({"learning_rate": 0.5})),
        ("sigma", lambda config: config.model.connector.dpe.update({"sigma": 0.5})),
        ("seed", lambda config: config.update({"seed": 1})),
        ("template", lambda config: config.data.update({"template": "plain_guided"})),
    ],
)
def test_changed_settings_are_refused(stages, run_stage, tmp_path, field, change):
    run_stage(tmp_path, INSTRUCT).run(stages["align"][1], stop_at=1)
    with pytest.raises(UserError, match=rf"other settings \(.*{field}.*--workdir") as error:
        run_stage(tmp_path, INSTRUCT, change).run(stages["align"][1])
    assert "\n" not in str(error.value)


def test_settings_of_speed_may_change_on_resume(stages, run_stage, tmp_path):
    """Other devices may need others."""

    def change(config):
        config.data.threads = 1
        config.model.language.remat = "full"
        config.stages[INSTRUCT].update({"microbatches": 2, "loss_chunk": 8})

    run_stage(tmp_path, INSTRUCT).run(stages["align"][1], stop_at=1)
    run_stage(tmp_path, INSTRUCT, change).run(stages["align"][1], stop_at=2)


def test_other_records_are_refused(stages, run_stage, broken_data, tmp_path):
    """A position in the data is valid only for the same records."""
    run_stage(tmp_path, INSTRUCT).run(stages["align"][1], stop_at=1)
    with pytest.raises(UserError, match=r"other settings \(records: then '\w+', now '\w+'\)"):
        run_stage(tmp_path, INSTRUCT, root=broken_data[0])


def test_the_best_checkpoint_is_printed(stages, run_stage, tmp_path, capsys):
    def change(config):
        config.checkpoint.update({"every": 1, "best": "loss"})
        config.log_every = 1

    stage = run_stage(tmp_path, INSTRUCT, change)
    stage.run(stages["align"][1])
    named = re.search(r"stage instruct: best loss at step (\d), kept in (\S+)", capsys.readouterr().out)
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert int(named[1]) == min(entries, key=lambda entry: entry["loss"])["step"]
    assert named[2].endswith(f"checkpoints/instruct/{named[1]}")
    assert Path(named[2]).is_dir()


# --- Runs that must stop ---------------------------------------------------------------------------


def explode(config, log_every):
    config.stages[INSTRUCT].update({"learning_rate": 1e30, "steps": 8})
    config.checkpoint.update({"every": 1, "keep": 8})
    config.log_every = log_every


@pytest.mark.parametrize("log_every", [1, 3, 8])
def test_a_loss_that_is_not_finite_stops_the_run(stages, run_stage, tmp_path, log_every):
    stage = run_stage(tmp_path, INSTRUCT, lambda config: explode(config, log_every))
    with pytest.raises(RunError, match=r"not finite") as error:
        stage.run(stages["align"][1])
    named = re.search(r"the last checkpoint is step (\d+) in (\S+?/checkpoints/instruct)", str(error.value))
    assert named, str(error.value)
    assert Path(named[2]).name == "instruct"
    assert (Path(named[2]) / named[1]).is_dir()
    good = trees.flatten(restore_params(Path(named[2]), int(named[1])))
    assert all(np.isfinite(leaf).all() for leaf in good.values()), f"checkpoint {named[1]} is not good"
    with pytest.raises(RunError, match="not finite"):  # it does not resume from a broken state
        run_stage(tmp_path, INSTRUCT, lambda config: explode(config, log_every)).run(stages["align"][1])


def test_a_loss_that_is_not_finite_before_the_first_checkpoint(stages, run_stage, tmp_path):
    def change(config):
        explode(config, 1)
        config.checkpoint.every = 100

    with pytest.raises(RunError, match=r"not finite at step 2; there is no checkpoint"):
        run_stage(tmp_path, INSTRUCT, change).run(stages["align"][1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"trainable": ("language/.*", "langage/.*")}, r"trainable: 'langage/\.\*' matches no parameter"),
        ({"lr_scale": (("vision/.*", 2.0),)}, r"lr_scale: 'vision/\.\*' matches no parameter"),
        ({"copy": ("connector/cce/context/key <- connector/projector/linear",)}, r"copy .* does not fit"),
        ({"copy": ("connector/projector/up <- connector/projector/upp",)}, r"copy .* does not"),
    ],
)
def test_wrong_paths(run_stage, tmp_path, change, sentence):
    """Wrong parameter paths are refused before training, when the stage is set up."""
    with pytest.raises(UserError, match=sentence) as error:
        run_stage(tmp_path, INSTRUCT, lambda config: config.stages[INSTRUCT].update(change))
    assert "instruct" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def broken_data(data_root, tmp_path_factory):
    """A copy of the data; its train.json has records of three videos, the second of which is broken."""
    config = tiny_config()
    config.data.root = str(data_root)
    root = tmp_path_factory.mktemp("broken") / "data"
    shutil.copytree(prepare_data_root(config.data), root)
    records = json.loads((root / "train.json").read_text())
    videos = sorted({record["video"] for record in records})[:3]
    records = [record for record in records if record["video"] in videos]
    (root / "train.json").write_text(json.dumps(records))
    broken = root / videos[1]
    broken.write_bytes(broken.read_bytes()[:500])
    bad = [index for index, record in enumerate(records) if record["video"] == videos[1]]
    return root, records, bad


def test_a_broken_video_is_skipped_counted_and_listed(stages, run_stage, broken_data, consumed, tmp_path):
    root, records, bad = broken_data

    def lenient(config):
        config.data.max_skip_share = 0.5

    stage = run_stage(tmp_path, INSTRUCT, lenient, root=root)
    stage.run(stages["align"][1])
    assert stage.finished
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(entry["id"] for entry in listed) == sorted(records[index]["id"] for index in bad)
    assert all(entry["media"].endswith(records[bad[0]]["video"]) and entry["reason"] for entry in listed)
    assert {i for batch in consumed for i in batch} == {-1} | set(range(len(records))) - set(bad)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["skipped"] >= len(bad)


def test_too_many_broken_videos_stop_the_run(stages, run_stage, broken_data, tmp_path):
    def strict(config):
        config.data.max_skip_share = 0.0

    root, records, bad = broken_data
    with pytest.raises(UserError, match=re.escape(records[bad[0]]["video"])):
        run_stage(tmp_path, INSTRUCT, strict, root=root).run(stages["align"][1])


def test_missing_annotations(run_stage, tmp_path):
    with pytest.raises(UserError, match=r"nothing\.json: cannot be read"):
        run_stage(tmp_path, 0, lambda config: config.stages[0].update({"annotations": "nothing.json"}))
