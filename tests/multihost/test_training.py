"""Several real processes train as one does: same losses, same answers, checkpoints for any number of them."""

import shutil

import numpy as np
import pytest

from tests.multihost.processes import arguments, json_lines, train


def curve(workdir):
    """{step: (loss, gradient norm)}; each step is reported once."""
    entries = json_lines(workdir / "metrics.jsonl")
    values = {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in entries}
    assert len(values) == len(entries)
    return values


def assert_same_curve(workdir, reference, steps):
    here, there = curve(workdir), curve(reference)
    assert list(here) == list(there) == list(range(1, steps + 1))
    np.testing.assert_allclose(list(here.values()), list(there.values()), rtol=1e-5)
    losses = np.array(list(there.values()))[:, 0]
    assert np.ptp(losses) > 1e-3  # the steps differ, so that a wrong order of the data would show


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def one(data_root, folder):
    """The workdir of a run in one process."""
    train(1, *arguments(data_root, folder / "one"))
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder):
    """(workdir, stdout, stderr) of a run in two processes, which also have the data to generate."""
    workdir = folder / "two"
    return workdir, *train(2, *arguments(folder / "data", workdir))


def test_two_processes_have_the_losses_of_one(one, two):
    assert_same_curve(two[0], one, 4)


def test_two_processes_give_the_answers_of_one(one, two):
    answers = json_lines(two[0] / "predictions.jsonl")
    assert len(answers) > 8  # more than a batch
    assert answers == json_lines(one / "predictions.jsonl")


def test_the_first_process_alone_reports_and_writes(one, two):
    workdir, stdout, _ = two
    lines = [line for line in stdout.splitlines() if "[Gloo]" not in line]
    assert [line for line in lines if not line.startswith("[0] ")] == []
    assert lines[0].startswith("[0] 2 x cpu in 2 processes")
    assert sum("M parameters trained" in line for line in lines) == 1
    assert {path.name for path in workdir.iterdir()} == {path.name for path in one.iterdir()}


@pytest.mark.slow
def test_two_processes_evaluate_what_one_has_trained(data_root, one, folder):
    workdir = shutil.copytree(one, folder / "again")
    (workdir / "predictions.jsonl").unlink()
    stdout, _ = train(2, *arguments(data_root, workdir, "--config.mesh.data=1", "--config.mesh.fsdp=2"))
    assert "stage all: finished before" in stdout
    assert json_lines(workdir / "predictions.jsonl") == json_lines(one / "predictions.jsonl")


@pytest.mark.slow
def test_four_processes_and_their_checkpoint_in_two_and_one(data_root, folder):
    """20 steps: one process, and in turn 4 (parameters over all of them), 2 and 1."""
    whole, parts = folder / "twenty", folder / "parts"
    train(1, *arguments(data_root, whole, steps=20))
    for processes, mesh, stop in (
        (4, ("--config.mesh.data=2", "--config.mesh.fsdp=2"), ["--stop_at=all:8"]),
        (2, ("--config.mesh.data=1", "--config.mesh.fsdp=2"), ["--stop_at=all:14"]),
        (1, (), []),
    ):
        stdout, _ = train(processes, *arguments(data_root, parts, *mesh, *stop, steps=20))
        assert ("resumed at step" in stdout) == (processes != 4)
    assert_same_curve(parts, whole, 20)


@pytest.mark.slow
def test_four_processes_have_the_losses_of_one(data_root, folder):
    """20 steps, uninterrupted."""
    for processes in (1, 4):
        workdir = folder / f"uninterrupted_{processes}"
        train(processes, *arguments(data_root, workdir, steps=20))
    assert_same_curve(folder / "uninterrupted_4", folder / "uninterrupted_1", 20)
