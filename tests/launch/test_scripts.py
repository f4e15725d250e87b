"""The launch scripts: linters, the schema of the JobSet, and how they run the command."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.commands import REPOSITORY

LAUNCH = REPOSITORY / "launch"
BIN = Path(sys.executable).parent  # the linters are installed beside this Python
SHELL = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


def run(*command, timeout=60, **environment):
    """Run a command and return exit code, stdout and stderr."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", SHELL)
def test_shellcheck(name):
    code, findings, _ = run(BIN / "shellcheck", LAUNCH / name)
    assert code == 0, findings


def test_yamllint():
    code, findings, _ = run(BIN / "yamllint", "--strict", LAUNCH)
    assert code == 0, findings


@pytest.mark.parametrize("name", [*SHELL, "gke_jobset.yaml", "local_multiprocess.py"])
def test_header_has_usage_and_assumptions(name):
    header = (LAUNCH / name).read_text()[:2500]
    assert re.search(r"assumes", header, re.IGNORECASE) or name == "local.sh"
    assert f"launch/{name}" in header


# --- JobSet -------------------------------------------------------------------------------------------


@pytest.fixture
def jobset():
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def check(jobset):
    """Validate the JobSet and its jobs against their schemas."""
    jsonschema.validate(jobset, json.loads((Path(__file__).parent / "jobset_schema.json").read_text()))
    for job in jobset["spec"]["replicatedJobs"]:
        metadata = job["template"].get("metadata", {}) | {"name": job["name"]}
        manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata} | job["template"]
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_jobset_matches_its_schema(jobset):
    check(jobset)


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "replicatedJob"),
        ("spec", "failurePolicy", "restarts"),
        ("spec", "replicatedJobs", 0, "template", "spec", "completion"),
        ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "nodeSelectors"),
        ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "argv"),
    ],
)
def test_the_schema_rejects_unknown_fields(jobset, path):
    changed = copy.deepcopy(jobset)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = 1
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(changed)


def test_jobset_requests_the_whole_slice(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    assert job["parallelism"] == job["completions"]
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert job["completionMode"] == "Indexed"
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def jobset_command(jobset, tmp_path, python):
    """Start the shell command of the JobSet, with a script in place of python."""
    (tmp_path / "python").write_text(f"#!/usr/bin/env bash\n{python}\n")
    (tmp_path / "python").chmod(0o755)
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return subprocess.Popen(
        [*container["command"], *container["args"]],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_jobset_command_passes_on_arguments_and_exit_code(jobset, tmp_path):
    process = jobset_command(jobset, tmp_path, 'echo "$@"; exit 2')
    stdout, _ = process.communicate(timeout=30)
    assert stdout.startswith("-m dynfocus_jax.train --config=configs/")
    assert "--config.distributed.mode=auto" in stdout
    assert process.returncode == 2


def test_jobset_command_fails_after_saving_on_sigterm(jobset, tmp_path):
    process = jobset_command(jobset, tmp_path, STOPPABLE)
    assert process.stdout.readline() == "running\n"
    time.sleep(1)  # bash would handle a signal just before its wait only after the wait
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=30)
    assert stdout == "saved\n"
    assert process.returncode == 143


STOPPABLE = """
trap 'sleep 0.3; echo saved; exit 0' TERM
echo running
for _ in $(seq 300); do sleep 0.1; done
"""


# --- SLURM --------------------------------------------------------------------------------------------


def slurm(tmp_path, srun, tasks):
    """Start the job script, with scripts in place of srun and scontrol."""
    for name, text in (("srun", srun), ("scontrol", 'echo "scontrol $*"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    allocation = {
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_NTASKS": str(tasks),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "6",
    }
    return subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch", "--config", "configs/toy.py"],
        env=os.environ | allocation | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("tasks", "devices"), [(2, "0,1,2,3"), (8, "none")])
def test_slurm_process_alone_on_its_node_gets_all_gpus(tmp_path, tasks, devices):
    process = slurm(tmp_path, 'echo "${JAX_LOCAL_DEVICE_IDS:-none} $*"', tasks)
    stdout, _ = process.communicate(timeout=30)
    seen, _, command = stdout.partition(" ")
    assert process.returncode == 0
    assert seen == devices
    assert "-m dynfocus_jax.train --config configs/toy.py --config.distributed.mode=auto" in command


def test_slurm_passes_on_a_failure(tmp_path):
    process = slurm(tmp_path, "exit 5", 2)
    assert process.wait(timeout=30) == 5


@pytest.mark.parametrize(("number", "queued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_requeues_only_at_the_time_limit(tmp_path, number, queued):
    process = slurm(tmp_path, STOPPABLE, 2)
    assert process.stdout.readline() == "running\n"
    time.sleep(1)  # as above
    process.send_signal(number)
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert stdout.startswith("saved\n")
    assert ("scontrol requeue 77" in stdout) == queued


# --- TPU VM -------------------------------------------------------------------------------------------


def test_tpu_vm_quotes_arguments_for_the_hosts(tmp_path):
    gcloud = '#!/usr/bin/env bash\nfor last; do :; done\necho "${last#--command=}"\n'
    (tmp_path / "gcloud").write_text(gcloud)
    (tmp_path / "gcloud").chmod(0o755)
    argument = "--config.data.root=/mnt/a b'$HOME"
    code, stdout, stderr = run(
        *("bash", LAUNCH / "tpu_vm.sh", "slice", "zone", "--config=x.py", argument),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert code == 0, stderr
    _, _, command = stdout.partition("exec bash launch/local.sh")
    _, words, _ = run("bash", "-c", f"printf '%s\\n' {command}")
    assert words.splitlines()[:5] == ["python", "-m", "dynfocus_jax.train", "--config=x.py", argument]


# --- Several processes on this machine ----------------------------------------------------------------

CHILD = """
import os, signal, sys, time
index = int(sys.argv[-1].partition("=")[2])
print("number", index, "of", sys.argv[-2], "devices", os.environ["JAX_NUM_CPU_DEVICES"], flush=True)
print("to stderr", file=sys.stderr, flush=True)
what = sys.argv[1]
if index == 1 and what == "fail": sys.exit(3)
if index == 1 and what == "die": os.kill(os.getpid(), signal.SIGKILL)
if what == "stop": signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if what != "end": print("waiting", flush=True); time.sleep(300)
"""


def local(tmp_path, what):
    """Return the command that runs CHILD in two processes."""
    (tmp_path / "child.py").write_text(CHILD)
    return [
        *(sys.executable, LAUNCH / "local_multiprocess.py", "--processes", "2", "--devices", "3"),
        *("--", sys.executable, tmp_path / "child.py", what),
    ]


def test_local_processes_have_numbers_and_prefixed_output(tmp_path):
    code, stdout, stderr = run(*local(tmp_path, "end"))
    flag = "--config.distributed.num_processes=2"
    assert code == 0
    assert sorted(stdout.splitlines()) == [f"[{i}] number {i} of {flag} devices 3" for i in (0, 1)]
    assert sorted(stderr.splitlines()) == ["[0] to stderr", "[1] to stderr"]


@pytest.mark.parametrize(("what", "expected"), [("fail", 3), ("die", 128 + signal.SIGKILL)])
def test_a_failed_local_process_ends_the_others(tmp_path, what, expected):
    started = time.monotonic()
    code, _, stderr = run(*local(tmp_path, what))
    assert code == expected
    assert "process 1 failed (" in stderr
    assert time.monotonic() - started < 50  # seconds; the other process would sleep for 300


def test_local_processes_receive_signals(tmp_path):
    process = subprocess.Popen(local(tmp_path, "stop"), stdout=subprocess.PIPE, text=True)
    waiting = set()
    while len(waiting) < 2:
        line = process.stdout.readline()
        assert line, "ended early"
        if line.endswith("waiting\n"):
            waiting.add(line)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0


def test_a_missing_local_command():
    code, _, stderr = run(sys.executable, LAUNCH / "local_multiprocess.py", "--processes", "2")
    assert code == 2
    assert "the command is missing" in stderr
