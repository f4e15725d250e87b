"""A connector outside of the package works with all commands, without changes to any other file."""

import json

import pytest
from safetensors import safe_open

from tests.commands import command

KIND = "tests.connectors.gated_pooling:GatedPooling"
CONFIG = f"""
from dynfocus_jax.config import connector
from tests.tiny import tiny_config

def get_config(arg=""):
    config = tiny_config()
    config.model.connector = connector({KIND!r}, frames=3, samples=8)
    stage = config.stages[-1]
    stage.update({{"copy": (), "trainable": ("vision/.*", "language/.*", "connector/.*")}})
    config.stages = (stage,)
    return config
"""


@pytest.fixture(scope="module")
def run(data_root, tmp_path_factory):
    """Folder of a run that was stopped after two steps and then resumed to its end."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "gated.py").write_text(CONFIG)
    arguments = [f"--config={folder}/gated.py", f"--workdir={folder}/run", f"--config.data.root={data_root}"]
    code, _, stderr = command("train", *arguments, "--stop_at=instruct:2")
    assert code == 0, stderr
    code, stdout, stderr = command("train", *arguments)
    assert code == 0, stderr
    assert "resumed at step 2" in stdout
    return folder


def test_trains_resumes_evaluates_and_draws(run):
    results = json.loads((run / "run" / "eval.json").read_text())
    assert results["visual_tokens"] == 3 * 8
    assert (run / "run" / "focus.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]


def test_export_uses_the_parameter_paths_as_names(run):
    checkpoint = run / "run" / "checkpoints" / "instruct" / "4"
    code, _, stderr = command(
        "convert", f"--config={run}/gated.py", f"--checkpoint={checkpoint}", f"--export={run}/published"
    )
    assert code == 0, stderr
    with safe_open(run / "published" / "connector" / "model.safetensors", "numpy") as file:
        assert {"gate.kernel", "gate.bias"} < set(file.keys())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.model.connector.kind=nowhere:Method"], ("'nowhere:Method'", "cannot be imported")),
        (["--config.model.connector.kind=tests.tiny:Method"], ("'tests.tiny'", "no 'Method'")),
        (["--config.model.connector.kind=tests.tiny:pad"], ("'pad' is not a subclass",)),
        (["--config.model.connector.kind=dynfocs"], ("not a connector", "did you mean 'dynfocus'")),
        (
            ["--config.model.connector.dpe.ratio=0.5"],
            ("dpe is not a field of connector", "expected one of "),
        ),
        (["--config.model.connector.samples=0"], ("samples is 0, expected an integer at least 1",)),
    ],
    ids=lambda value: value[0].rpartition("=")[2] if isinstance(value, list) else "",
)
def test_bad_connectors_end_the_command(run, arguments, words):
    """Every mistake in the connector's section ends the command with one sentence."""
    code, stdout, stderr = command("train", f"--config={run}/gated.py", f"--workdir={run}/other", *arguments)
    (line,) = stderr.splitlines()
    assert (code, stdout) == (2, "")
    assert all(word in line for word in words), line
    assert not (run / "other").exists()
