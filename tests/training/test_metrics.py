"""The log of a stage: what it reports, and that it notices what is not a number."""

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
        log.step(step, metrics(loss=step, grad_norm=10 - step, learning_rate=step / 10), skipped=step)
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
        assert entry["frames_per_second"] == pytest.approx(3 * entry["steps_per_second"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("first", [True, False])
def test_not_finite(tmp_path, bad, name, first):
    log = make_log(tmp_path)
    pair = [metrics(**{name: bad}), metrics()]
    log.step(1, pair[not first], 0)
    with pytest.raises(NotFinite):
        log.step(2, pair[first], 0)


def test_check_looks_at_steps_that_are_not_yet_reported(tmp_path):
    log = make_log(tmp_path)
    log.check()
    log.step(1, metrics(), 0)
    log.check()
    log.step(2, metrics(), 0)
    log.step(3, metrics(grad_norm=float("nan")), 0)
    with pytest.raises(NotFinite):
        log.check()
