"""The append-only files of predictions: killed writers, several processes, later answers."""

import json

import pytest

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.evaluation.predictions import PredictionStore


def entry(name, prediction, **more):
    return {"id": name, "prediction": prediction} | more


def test_an_entry_is_on_disk_at_once(tmp_path):
    predictions = PredictionStore(tmp_path / "deep" / "out")
    predictions.add(entry("ü", "yes"))
    assert predictions.is_answered("ü")
    lines = (tmp_path / "deep" / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [entry("ü", "yes")]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_an_unfinished_line_is_removed(tmp_path, cut):
    predictions = PredictionStore(tmp_path)
    predictions.add(entry("a", "yes"))
    predictions.add(entry("b", "no"))
    file = tmp_path / "predictions.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    again = PredictionStore(tmp_path)
    assert again.is_answered("a")
    assert not again.is_answered("b")
    again.add(entry("b", "maybe"))
    assert PredictionStore(tmp_path).read_all() == {"a": entry("a", "yes"), "b": entry("b", "maybe")}


def test_an_unfinished_line_of_another_process_is_kept(tmp_path):
    other = tmp_path / "predictions.1.jsonl"
    other.write_text(json.dumps(entry("a", "yes")) + '\n{"id": "b", "predic')
    predictions = PredictionStore(tmp_path)
    assert predictions.is_answered("a")
    assert not predictions.is_answered("b")
    with other.open("a") as file:
        file.write('tion": "no"}\n')
    assert predictions.read_all()["b"] == entry("b", "no")


def test_an_answer_precedes_a_failure(tmp_path):
    failed, answered = entry("a", None, reason="missing"), entry("a", "yes")
    (tmp_path / "predictions.jsonl").write_text(json.dumps(answered) + "\n" + json.dumps(failed) + "\n")
    (tmp_path / "predictions.2.jsonl").write_text(json.dumps(failed) + "\n")
    predictions = PredictionStore(tmp_path)
    assert predictions.read_all() == {"a": answered}
    assert predictions.is_answered("a")


def test_a_failed_question_is_not_answered(tmp_path):
    PredictionStore(tmp_path).add(entry("a", None, reason="missing"))
    predictions = PredictionStore(tmp_path)
    assert not predictions.is_answered("a")
    assert predictions.read_all()["a"]["reason"] == "missing"


@pytest.mark.parametrize("content", ["[1]\n", '{"id": 1}\n', "words\n"])
def test_a_file_without_predictions(tmp_path, content):
    (tmp_path / "predictions.jsonl").write_text(content)
    with pytest.raises(UserError, match="is not a file of predictions"):
        PredictionStore(tmp_path)


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        PredictionStore(tmp_path / "file" / "out")


def test_a_file_that_cannot_be_written(tmp_path):
    predictions = PredictionStore(tmp_path)
    (tmp_path / "predictions.jsonl").mkdir()
    with pytest.raises(RunError, match="rerun the same command"):
        predictions.add(entry("a", "yes"))
