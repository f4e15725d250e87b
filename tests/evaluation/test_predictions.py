"""The append-only file of predictions: killed writers, several processes, later answers."""

import json

import pytest

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.evaluation.predictions import Predictions


def entry(name, prediction, **more):
    return {"id": name, "prediction": prediction} | more


def test_every_entry_is_there_at_once(tmp_path):
    predictions = Predictions(tmp_path / "deep" / "out")
    predictions.add(entry("ü", "yes"))
    assert predictions.answered("ü")
    lines = (tmp_path / "deep" / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [entry("ü", "yes")]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_what_a_kill_left_unfinished_is_asked_again(tmp_path, cut):
    predictions = Predictions(tmp_path)
    predictions.add(entry("a", "yes"))
    predictions.add(entry("b", "no"))
    file = tmp_path / "predictions.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    again = Predictions(tmp_path)
    assert again.answered("a")
    assert not again.answered("b")
    again.add(entry("b", "maybe"))
    assert Predictions(tmp_path).all() == {"a": entry("a", "yes"), "b": entry("b", "maybe")}


def test_a_line_that_another_process_is_writing_is_left_alone(tmp_path):
    other = tmp_path / "predictions.1.jsonl"
    other.write_text(json.dumps(entry("a", "yes")) + '\n{"id": "b", "predic')
    predictions = Predictions(tmp_path)
    assert predictions.answered("a")
    assert not predictions.answered("b")
    with other.open("a") as file:
        file.write('tion": "no"}\n')
    assert predictions.all()["b"] == entry("b", "no")


def test_an_answer_counts_before_a_failure(tmp_path):
    failed, answered = entry("a", None, reason="missing"), entry("a", "yes")
    (tmp_path / "predictions.jsonl").write_text(json.dumps(answered) + "\n" + json.dumps(failed) + "\n")
    (tmp_path / "predictions.2.jsonl").write_text(json.dumps(failed) + "\n")
    predictions = Predictions(tmp_path)
    assert predictions.all() == {"a": answered}
    assert predictions.answered("a")


def test_a_failure_is_asked_again(tmp_path):
    Predictions(tmp_path).add(entry("a", None, reason="missing"))
    predictions = Predictions(tmp_path)
    assert not predictions.answered("a")
    assert predictions.all()["a"]["reason"] == "missing"


@pytest.mark.parametrize("content", ["[1]\n", '{"id": 1}\n', "words\n"])
def test_another_file_of_that_name(tmp_path, content):
    (tmp_path / "predictions.jsonl").write_text(content)
    with pytest.raises(UserError, match="is not a predictions file"):
        Predictions(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        Predictions(tmp_path / "file" / "out")


def test_a_file_that_cannot_be_written(tmp_path):
    predictions = Predictions(tmp_path)
    (tmp_path / "predictions.jsonl").mkdir()
    with pytest.raises(RunError, match="free disk space and start again"):
        predictions.add(entry("a", "yes"))
