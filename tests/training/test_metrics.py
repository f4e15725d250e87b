"""The log of a stage: its entries, and losses and gradients that are not finite."""

import json

import jax.numpy as jnp
import pytest

from dynfocus_jax.training.metrics import NotFinite, StageLog


def metrics(loss=1.0, grad_norm=2.0, learning_rate=0.1):
    values = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "frames": 3.0,
        "tokens": 5.0,
    }
    return {key: jnp.float32(value) for key, value in values.items()}


def make_log(path, every=2, steps=5, start=0):
    return StageLog(path / "metrics.jsonl", "align", steps, start, every)


def test_entries(tmp_path):
    log = make_log(tmp_path)
    for step in range(1, 6):
        log.step(
            step,
            metrics(loss=step, grad_norm=10 - step, learning_rate=step / 10),
            skipped=step,
            waited=2 * step,
        )
    log.close()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4, 5]
    assert [entry["loss"] for entry in entries] == [1.5, 3.5, 5]
    assert [entry["grad_norm"] for entry in entries] == [9, 7, 5]
    assert [entry["skipped"] for entry in entries] == [2, 4, 5]
    assert entries[0]["learning_rate"] == pytest.approx(0.2)
    assert {entry["stage"] for entry in entries} == {"align"}
    for entry in entries:
        assert entry["tokens_per_second"] == pytest.approx(5 * entry["steps_per_second"])
        assert entry["wait"] == pytest.approx(2 * entry["steps_per_second"])
        assert entry["frames_per_second"] == pytest.approx(3 * entry["steps_per_second"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("first", [True, False])
def test_not_finite(tmp_path, bad, name, first):
    log = make_log(tmp_path)
    pair = [metrics(**{name: bad}), metrics()]
    log.step(1, pair[not first], 0, 0.0)
    with pytest.raises(NotFinite):
        log.step(2, pair[first], 0, 0.0)


def test_means_over_the_steps_since_the_last_checkpoint(tmp_path):
    log = make_log(tmp_path)
    for step in range(1, 4):
        log.step(step, metrics(loss=step, grad_norm=10 - step), 0, 0.0)
    assert log.means() == {"loss": 2, "grad_norm": 8}
    log.step(4, metrics(loss=7), 0, 0.0)
    assert log.means() == {"loss": 7, "grad_norm": 2}


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_means_include_steps_that_are_not_reported_yet(tmp_path, name):
    log = make_log(tmp_path)
    log.step(1, metrics(), 0, 0.0)
    log.means()
    log.step(2, metrics(), 0, 0.0)
    log.step(3, metrics(**{name: float("nan")}), 0, 0.0)
    with pytest.raises(NotFinite):
        log.means()


def test_entries_after_the_checkpoint_are_removed(tmp_path):
    for stage in ("images", "align"):
        log = StageLog(tmp_path / "metrics.jsonl", stage, 6, 0, 1)
        for step in range(1, 5):
            log.step(step, metrics(), 0, 0.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": "al')  # killed while writing
    log = make_log(tmp_path, every=1, start=2)
    log.step(3, metrics(loss=9), 0, 0.0)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["stage"], entry["step"]) for entry in entries] == [
        *(("images", step) for step in (1, 2, 3, 4)),
        *(("align", step) for step in (1, 2, 3)),
    ]
    assert entries[-1]["loss"] == 9
