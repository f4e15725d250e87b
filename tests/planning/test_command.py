"""The command `python -m dynfocus_jax.plan`."""

import json
import os

import pytest

from tests.commands import REPOSITORY, command
from tests.planning.conftest import PLAN_SITE


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A function that plans for the tiny configuration and returns exit code, stdout and stderr."""
    file = tmp_path_factory.mktemp("plan") / "tiny.py"
    file.write_text("from tests.tiny import tiny_config as get_config\n")

    # The command must set platform and cache itself, without the variables of the tests.
    environment = {name: None for name in os.environ if name.startswith(("JAX_", "XLA_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), PLAN_SITE or ""])
    return lambda *arguments: command("plan", f"--config={file}", *arguments, **environment)


def test_json(plan, tmp_path):
    mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")
    file = tmp_path / "plan.json"
    code, stdout, stderr = plan(
        "--machine=a100-80gb:2", "--steps=decode", *mesh, "--json", f"--output={file}"
    )
    assert (code, stderr) == (0, "")
    report = json.loads(stdout)
    assert json.loads(file.read_text()) == report
    assert report["machine"] == "a100-80gb:2"
    assert report["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1, "context": 1}
    (decode,) = report["steps"]
    assert decode["step"] == "decode"
    assert decode["fits"]
    assert decode["total"] == sum(decode["memory"].values())
    # Parameters are gathered where they are used, one layer at a time; the tiny model has one.
    assert decode["collectives"]["all-gather"]["bytes"] > 0


def test_a_step_that_does_not_fit(plan):
    code, stdout, stderr = plan(
        "--machine=v5e:1x1", "--steps=decode", f"--config.evaluation.max_new_tokens={10**9}"
    )
    assert code == 1
    assert "DOES NOT FIT" in stdout
    assert stderr.startswith("error: ")  # no messages of the plugins before it
    assert "the largest part is key-value cache" in stderr
    assert "Change one of config.evaluation.batch_size" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--machine=a100"], "unknown chip 'a100'"),
        ([], "--machine is missing"),
        (["--machine=h100:1", "--steps=train,serve"], "--steps: unknown step 'serve'"),
        (["--machine=h100:3", "--config.mesh.fsdp=2"], "which does not divide 3 devices"),
        (["--machine=v5e:3x5"], "the compiler rejects the shape"),
        (["--machine=h100:7"], "batch_size is"),
        (
            ["--machine=h100:1", "--output=no/plan.json"],
            "--output: the folder of 'no/plan.json' does not exist",
        ),
    ],
)
def test_mistakes(plan, arguments, sentence):
    code, stdout, stderr = plan(*arguments)
    assert code == 2
    assert sentence in stderr
    assert "Traceback" not in stderr
    assert stdout == ""
