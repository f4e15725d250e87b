"""`python -m dynfocus_jax.data_check`: its output, JSON file and exit code."""

import json

import pytest
from PIL import Image

from tests.commands import REPOSITORY, command

CONFIG = f"""
import runpy
from dynfocus_jax.config import source, stage

def get_config(arg=""):
    config = runpy.run_path({str(REPOSITORY / "configs" / "toy.py")!r})["get_config"]()
    config.data.generate = None
    config.data.root = ROOT
    config.evaluation.annotations = None
    config.stages = (
        stage(
            name="first",
            sources=tuple(source(name=name, annotations=f"{{name}}.json") for name in ("good", "bad")),
            steps=2,
            batch_size=2,
            max_text=16,
            trainable=("language/.*",),
        ),
        stage(name="second", annotations="good.json", steps=2, batch_size=2, trainable=("language/.*",)),
    )
    return config
"""


def entry(name, image, answer="so"):
    conversation = [{"from": "human", "value": "<image>\nwhy ?"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": conversation}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("check")
    for i in range(4):
        Image.new("RGB", (20, 16), (i, 0, 0)).save(root / f"{i}.png")
    (root / "vocabulary.json").write_text('["why", "?", "so"]')
    (root / "good.json").write_text(json.dumps([entry(f"g{i}", f"{i % 4}.png") for i in range(95)]))
    bad = [
        entry("fine", "0.png"),
        entry("gone", "gone.png"),
        entry("long", "1.png", "so " * 20),
        entry("evil", "../../etc/passwd"),
        entry("backwards", "0.png") | {"conversations": entry("", "")["conversations"][::-1]},
    ]
    (root / "bad.json").write_text(json.dumps(bad))
    (root / "config.py").write_text(CONFIG.replace("ROOT", repr(str(root))))
    return root


def check(root, *arguments):
    return command("data_check", "--config", root / "config.py", *arguments)


def test_output(root, tmp_path):
    code, out, err = check(root, "--json", tmp_path / "check.json", "--samples", "3")
    assert code == 0, err
    lines = [" ".join(line.split()) for line in out.splitlines()]
    start = lines.index("stage first: 98 samples per epoch")
    assert lines[start : start + 17] == [
        "stage first: 98 samples per epoch",
        "",
        "source entries refused records text image video samples per epoch",
        "good 95 0 95 0 95 0 95",
        "bad 5 2 3 0 3 0 3",
        "",
        "source wrong turns missing too long shortened files decoded unreadable",
        "good 0 0 0 0 3 0",
        "bad 1 1 1 0 1 0",
        "",
        "text tokens of a conversation median 99 % most to 8 to 16 to 32",
        "good 5 5 5 95 0 0",
        "bad 5 24 24 2 0 1",  # includes the record whose file is missing
        "",
        "frames of a decoded file median 99 % most to 1",
        "good 1 1 1 3",
        "bad 1 1 1 1",
    ]
    assert f"bad: missing (1), first record gone: {root / 'gone.png'}: no such file" in lines
    assert "bad: path (1), first record evil: field \"image\": path '../../etc/passwd' contains" in out
    assert lines.index("cannot be used: 4.00% of the records") < lines.index(
        "stage second: 95 samples per epoch"
    )
    assert "cannot be used: 0.00% of the records" in lines

    found = json.loads((tmp_path / "check.json").read_text())
    assert list(found) == ["first", "second"]
    good, bad = found["first"]
    assert good["problems"] == []
    assert {problem["id"]: problem["fault"] for problem in bad["problems"]} == {
        "evil": "path",
        "backwards": "turns",
        "gone": "missing",
        "long": "too long",
    }
    assert all(problem["reason"] for problem in bad["problems"])
    assert (bad["entries"], bad["records"], bad["unusable"]) == (5, 3, 4.0)
    assert good["text_tokens"]["up_to"] == {"1": 0, "2": 0, "4": 0, "8": 95}


def test_too_many_unusable_records(root):
    code, out, err = check(root, "--config.data.max_skip_share=0.03", "--samples", "0")
    assert code == 1
    assert "cannot be used: 4.00% of the records" in out
    assert err.strip().splitlines()[-1] == (
        "error: 4.00% of the records of stage 'first' cannot be used, more than config.data.max_skip_share = "
        "0.03 allows; correct the data, or raise max_skip_share."
    )


def test_without_a_tokenizer(root):
    code, out, _ = check(root, "--config.data.tokenizer=none")
    assert code == 0
    assert out.startswith(
        "note: text tokens are not counted, because the tokenizer cannot be read: none is not a tokenizer"
    )
    assert "text tokens of a conversation" not in out
    assert "frames of a decoded file" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.stages[0].sources[0].annotations=none.json"],
            "cannot be read (No such file or directory)",
        ),
        (["--config.data.root=/no/such"], "config.data.root"),
        (["--config.stages[0].batch_size=0"], "batch_size"),
        (["--samples=-1"], "samples"),
    ],
)
def test_user_errors(root, arguments, message):
    code, _, err = check(root, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_no_config():
    code, _, err = command("data_check")
    assert code == 2
    assert err.strip() == "error: --config is missing; set it to a config file such as configs/toy.py."
