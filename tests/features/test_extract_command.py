"""`python -m dynfocus_jax.extract`: continued after a kill, as several processes, and with wrong flags."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from dynfocus_jax.features.store import FeatureStore, read_index
from dynfocus_jax.records.records import Record
from tests.commands import REPOSITORY
from tests.features.extract_config import BATCH_SIZE
from tests.multihost.processes import LAUNCHER

CONFIG_FILE = REPOSITORY / "tests" / "features" / "extract_config.py"


@pytest.fixture
def run(folder, initial):
    """`run(output, *flags, module=..., launcher=(), KILL=...)` -> (exit code, stdout, stderr)."""

    def run_extract(output, *flags, module="dynfocus_jax.extract", launcher=(), **environment):
        command = [sys.executable, "-m", module, f"--config={CONFIG_FILE}", f"--output={output}", *flags]
        done = subprocess.run(
            [*launcher, *command, f"--batch_size={BATCH_SIZE}"],
            cwd=REPOSITORY,
            env=os.environ
            | {"PYTHONPATH": str(REPOSITORY), "DATA": str(folder), "INITIAL": str(initial)}
            | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout, done.stderr

    return run_extract


def files(path):
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}


def assert_same_features(one, other, folder, config):
    """Check that two folders have the same media, frames and, bit for bit, features, in whatever shards."""
    indices = read_index(one), read_index(other)
    assert indices[0].keys() == indices[1].keys()
    stores = [FeatureStore(path, folder, config) for path in (one, other)]
    for key, entry in indices[0].items():
        assert entry.limits == indices[1][key].limits
        record = Record("a", folder / key.media, (), modality=key.modality, span=key.span)
        for limit in entry.limits:
            here, there = (store.read(record, limit) for store in stores)
            for field, value in zip(here, there, strict=True):
                np.testing.assert_array_equal(field, value)


def test_continued_after_a_kill(run, folder, config, extracted, tmp_path):
    out = tmp_path / "f"
    killed = {"module": "tests.features.killed_extract"}
    code, _, stderr = run(out, **killed, KILL="4")
    assert code == -signal.SIGKILL, stderr
    files_left = files(out)
    assert len(read_index(out)) == 3
    assert sum(name.endswith(".tmp") for name in files_left) == 1
    code, stdout, stderr = run(out, **killed)
    assert code == 0, stderr
    assert "7 media, 3 of them with features already" in stdout
    assert "4 media with " in stdout
    files_now = files(out)
    kept = {
        name: file for name, file in files_left.items() if name.startswith("features") and ".tmp" not in name
    }
    assert len(kept) == 6
    assert kept.items() <= files_now.items()
    assert len(files_now) == 1 + 2 * 7
    assert not any(name.endswith(".tmp") for name in files_now)
    assert_same_features(out, extracted["float32"], folder, config)


def test_two_processes_share_the_media(run, folder, config, extracted, tmp_path):
    """All processes call the tower together, also when one of them has fewer media or none."""
    out = tmp_path / "f"
    two = {"launcher": [*LAUNCHER, "--processes=2", "--"], "module": "tests.features.killed_extract"}
    code, stdout, stderr = run(out, **two)
    assert code == 0, stderr
    assert "[0] 7 media with " in stdout
    assert "[1] " not in stdout.replace("[1] [Gloo]", "")
    # Process 0 has every second media item and every second shard number, starting with the first.
    shards = {entry.shard for entry in read_index(out).values()}
    assert sorted(shards) == [f"features-{number:06d}.array_record" for number in range(7)]
    assert_same_features(out, extracted["float32"], folder, config)
    # One media item is missing: process 1 has none, and only takes part in the calls of the tower.
    (out / "features-000003.jsonl").unlink()
    code, stdout, stderr = run(out, **two)
    assert code == 0, stderr
    assert "[0] 1 media with " in stdout
    assert_same_features(out, extracted["float32"], folder, config)


def test_wrong_flags_end_in_one_sentence(run, tmp_path):
    for flags, message in (
        (["--config.model.vision.width=24"], "error: config.initial "),
        (["--stage=nothing"], "error: --stage is 'nothing', expected one of align, instruct."),
    ):
        code, stdout, stderr = run(tmp_path / "f", *flags)
        assert code == 2, stderr
        assert stdout == ""
        (line,) = [line for line in stderr.splitlines() if "WARNING" not in line]
        assert line.startswith(message)
    assert not (tmp_path / "f").exists()
