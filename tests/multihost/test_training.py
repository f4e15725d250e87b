"""Training in several processes: losses and answers of one process, checkpoints for any number of them."""

import shutil
import signal
import time

import numpy as np
import pytest

from dynfocus_jax.json_lines import read_json_lines
from tests.multihost.processes import TRAIN, arguments, begin, end, explicit, free_port, train

STEPS = 20
CHECKPOINTS = "--config.checkpoint.every=10"


def curve(workdir):
    """Return {step: (loss, gradient norm)}; each step must be logged once."""
    entries = read_json_lines(workdir / "metrics.jsonl")
    values = {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in entries}
    assert len(values) == len(entries)
    return values


def assert_same_curve(workdir, reference):
    here, there = curve(workdir), curve(reference)
    assert list(here) == list(there) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(here.values()), list(there.values()), rtol=1e-5)
    losses = np.array(list(there.values()))[:, 0]
    assert np.ptp(losses) > 1e-3  # the losses differ, so that a wrong order of the data is noticed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def one(data_root, folder):
    """Workdir of a run in one process."""
    train(1, *arguments(data_root, folder / "one"))
    return folder / "one"


@pytest.fixture(scope="module")
def interrupted(folder):
    """Workdir and stdout of process 0 of a run in two processes, of which only the second gets SIGTERM.

    The run also generates its data.
    """
    workdir, address = folder / "two", f"localhost:{free_port()}"
    processes = [
        begin(*TRAIN, *arguments(folder / "data", workdir, *explicit(address, 2, index)))
        for index in range(2)
    ]
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert processes[0].poll() is None, end(processes[0])
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    results = [end(process) for process in processes]
    assert [code for code, _, _ in results] == [0, 0], results
    return workdir, results[0][1]


@pytest.fixture(scope="module")
def two(interrupted, folder):
    """Workdir and stdout of the same run, continued to the end."""
    stdout, _ = train(2, *arguments(folder / "data", interrupted[0]))
    return interrupted[0], stdout


@pytest.fixture(scope="module")
def four(data_root, folder):
    """Workdir of a run in four processes that split parameters and batch; checkpoints at steps 10 and 20."""
    flags = ("--config.mesh.data=2", "--config.mesh.fsdp=2", CHECKPOINTS)
    train(4, *arguments(data_root, folder / "four", *flags, evaluate=False))
    return folder / "four"


def test_two_processes_have_the_losses_of_one(one, two):
    assert_same_curve(two[0], one)


@pytest.mark.slow
def test_four_processes_have_the_losses_of_one(one, four):
    assert_same_curve(four, one)


def test_all_processes_stop_when_one_gets_a_signal(interrupted, two):
    step = int(interrupted[1].split("stopped at step ")[1].split()[0])
    assert 3 <= step < STEPS
    assert f"resumed at step {step}\n" in two[1]


def test_two_processes_give_the_answers_of_one(one, two):
    answers = read_json_lines(two[0] / "predictions.jsonl")
    assert len(answers) > 8  # more than a batch
    assert answers == read_json_lines(one / "predictions.jsonl")


def test_only_process_zero_prints_and_writes(one, two):
    workdir, stdout = two
    lines = [line for line in stdout.splitlines() if "[Gloo]" not in line]
    assert [line for line in lines if not line.startswith("[0] ")] == []
    assert lines[0].startswith("[0] 2 x cpu in 2 processes")
    assert sum("M parameters trained" in line for line in lines) == 1
    assert {path.name for path in workdir.iterdir()} == {path.name for path in one.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_of_four_processes_resumes_in_fewer(data_root, folder, one, four, processes):
    workdir = shutil.copytree(four, folder / f"four_to_{processes}")
    shutil.rmtree(workdir / "checkpoints" / "all" / str(STEPS))
    stdout, _ = train(processes, *arguments(data_root, workdir, CHECKPOINTS, evaluate=False))
    assert "resumed at step 10\n" in stdout
    assert_same_curve(workdir, one)


@pytest.mark.slow
def test_two_processes_evaluate_a_run_of_one(data_root, one, folder):
    workdir = shutil.copytree(one, folder / "again")
    (workdir / "predictions.jsonl").unlink()
    stdout, _ = train(2, *arguments(data_root, workdir, "--config.mesh.data=1", "--config.mesh.fsdp=2"))
    assert "stage all: already finished" in stdout
    assert read_json_lines(workdir / "predictions.jsonl") == read_json_lines(one / "predictions.jsonl")
