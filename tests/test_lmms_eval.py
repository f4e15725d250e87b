"""The plugin of lmms-eval, with a stand-in for its documented interface and (slow) in the real package."""

import abc
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.prepare import prepare_data_root
from dynfocus_jax.errors import SampleError, UserError
from dynfocus_jax.evaluation.lmms_requests import (
    LmmsAnswerer,
    read_sampling,
    read_stop_strings,
    split_messages,
)
from dynfocus_jax.serving.engine import Completion
from dynfocus_jax.serving.token_sampling import GREEDY, SamplingParams
from tests.commands import REPOSITORY, command
from tests.tiny import tiny_config

SIZE = 16


class ScriptedEngine:
    """An engine that answers with the question in capitals, and fails if the question says "fail"."""

    config = SimpleNamespace(generation=SimpleNamespace(batch=(1, 4)))
    num_frames = 3

    def __init__(self):
        self.requests, self.calls = [], []

    def generate(self, requests):
        self.requests += requests
        self.calls.append(len(requests))
        return [
            Completion(request.id, error="too long")
            if "fail" in request.messages[-1][1]
            else Completion(request.id, request.messages[-1][1].upper(), (1, 2), "stop", 5, 7)
            for request in requests
        ]


@pytest.fixture
def engine():
    return ScriptedEngine()


@pytest.fixture
def answerer(engine):
    return LmmsAnswerer(engine, MediaReader(SIZE), engine.num_frames, "stretch", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def heldout(data_root):
    """The folder of the generated data."""
    config = tiny_config()
    config.data.root = str(data_root)
    return prepare_data_root(config.data)


def chat(*parts, role="user"):
    return {
        "role": role,
        "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts],
    }


def test_turns_of_a_chat():
    video = {"type": "video", "url": "a.mp4"}
    assert split_messages([chat(video, "what ?")]) == ((("user", "what ?"),), [video], False)
    assert split_messages([chat("what ?", video)]) == ((("user", "what ?"),), [video], True)
    assert split_messages([chat("one", video, "two")]) == ((("user", "one\ntwo"),), [video], False)
    turns = [chat("be short", role="system"), chat(video, "a"), chat("b", role="assistant"), chat("c")]
    expected = (("user", "be short\na"), ("assistant", "b"), ("user", "c"))
    assert split_messages(turns) == (expected, [video], False)
    assert split_messages([{"role": "user", "content": "plain"}]) == ((("user", "plain"),), [], False)
    with pytest.raises(SampleError, match="comes after the chat's first question"):
        split_messages([chat("a"), chat("b", role="assistant"), chat(video, "c")])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, GREEDY),
        ({"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, GREEDY),
        ({"temperature": 0.7, "do_sample": False}, GREEDY),
        ({"temperature": None, "top_p": None, "num_beams": None}, GREEDY),
        ({"temperature": 0.7, "do_sample": True}, SamplingParams(0.7, 0, 1.0, 9)),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.9}, SamplingParams(0.7, 5, 0.9, 9)),
    ],
)
def test_sampling_of_a_task(settings, expected):
    assert read_sampling(settings, 9) == expected


def test_beam_search_is_not_supported():
    with pytest.raises(UserError, match="num_beams=5"):
        read_sampling({"num_beams": 5}, 0)


def test_stop_strings_of_a_task():
    assert read_stop_strings({}) == ()
    assert read_stop_strings({"until": "\n\n"}) == ("\n\n",)
    assert read_stop_strings({"until": ["ASSISTANT:", "", "\n"]}) == ("ASSISTANT:", "\n")


def test_images_and_videos_of_chats(answerer, engine, heldout, tmp_path):
    entry = json.loads((heldout / "heldout.json").read_text())[0]
    video = str(heldout / entry["video"])
    colours = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "picture.png")
    whole = MediaReader(SIZE)
    chats = [
        [chat({"type": "video", "url": video}, "video")],
        [chat({"type": "image", "url": Image.fromarray(colours)}, "picture")],
        [chat({"type": "image", "url": str(tmp_path / "picture.png")}, "file")],
        [chat("text")],
        [chat({"type": "video", "url": str(tmp_path / "missing.mp4")}, "missing")],
        [chat({"type": "video", "url": video}, {"type": "video", "url": video}, "two")],
        [chat({"type": "audio", "url": "a.wav"}, "audio")],
        [chat("please fail")],
    ]
    settings = {"max_new_tokens": 3, "until": ["."]}
    answers = answerer.answer([(str(i), messages, settings, i) for i, messages in enumerate(chats)])
    assert [answer.id for answer in answers] == [str(i) for i in range(8)]
    assert [answer.text for answer in answers[:4]] == ["VIDEO", "PICTURE", "FILE", "TEXT"]
    assert [bool(answer.error) for answer in answers] == [False] * 4 + [True] * 4
    assert "missing.mp4" in answers[4].error
    assert "2 images or videos" in answers[5].error
    assert "audio" in answers[6].error
    assert [request.id for request in engine.requests] == ["0", "1", "2", "3", "7"]
    assert {(request.max_new_tokens, request.stop) for request in engine.requests} == {(3, (".",))}
    clips = [request.clip for request in engine.requests]
    assert len(clips[0].frames) == engine.num_frames
    np.testing.assert_array_equal(clips[1].frames, colours[None])
    np.testing.assert_array_equal(clips[2].frames, colours[None])
    assert clips[3] is None
    length = whole.info(video).duration
    for part in (
        {"type": "video", "url": video, "start_time": 0.0, "end_time": length / 2},
        {"type": "video", "url": {"path": video, "video_start": 0.0, "video_end": length / 2}},
    ):
        answerer.answer([("part", [chat(part, "part")], {}, 0)])
        assert engine.requests[-1].clip.times.max() < length / 2 < clips[0].times.max()
        assert engine.requests[-1].max_new_tokens is None


@dataclass
class Instance:
    """`Instance` of lmms-eval 0.7, without its metadata."""

    arguments: tuple
    task_name: str = "task"

    @property
    def args(self):
        return self.arguments


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Lmms(abc.ABC):
    is_simple = True

    def __init__(self):
        self.cache_hook, self.task_dict = CacheHook(), {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclass
class CacheHook:
    kept: list = field(default_factory=list)

    def add_partial(self, kind, request, answer):
        self.kept.append((kind, request[0], answer))


@pytest.fixture
def interface(monkeypatch):
    """A stand-in for the part of lmms-eval that plugins use."""
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.api.instance": {
            "Instance": Instance,
            "TokenCounts": TokenCounts,
            "GenerationResult": GenerationResult,
        },
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "dynfocus_jax.evaluation.lmms_model", raising=False)
    yield
    sys.modules.pop("dynfocus_jax.evaluation.lmms_model", None)


def plugin() -> ModelManifest:
    """Return the manifest that the entry point in pyproject.toml names."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["dynfocus_jax"].partition(":")
    return getattr(import_module(module), name)()


def model_class():
    module, _, name = plugin().chat_class_path.rpartition(".")
    return getattr(import_module(module), name)


def test_the_entry_point_names_a_class_for_chats(interface):
    assert plugin().model_id == "dynfocus_jax"
    assert plugin().aliases == ("dynfocus",)
    assert issubclass(model_class(), Lmms)
    assert model_class().is_simple is False


def test_the_entry_point_imports_no_jax():
    code = "import sys, dynfocus_jax.lmms_eval; print([m for m in ('jax', 'flax', 'av') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def instances(model, questions, settings=None):
    model.task_dict = {"task": {"test": [{"question": question} for question in questions]}}

    def messages(doc):
        return [chat(doc["question"])]

    return [
        Instance((f"context {i}", messages, settings or {}, i, "task", "test")) for i in range(len(questions))
    ]


@pytest.fixture
def make_model(interface, monkeypatch, answerer):
    monkeypatch.setattr(LmmsAnswerer, "load", lambda checkpoint, num_frames: answerer)
    return lambda **arguments: model_class()(checkpoint="run", device="cpu", max_batch_size=None, **arguments)


@pytest.mark.parametrize(
    ("batch_size", "calls"), [(2, [2, 2, 1]), ("auto", [4, 1]), (None, [1] * 5), ("3", [3, 2])]
)
def test_answers_come_in_order(make_model, engine, batch_size, calls, caplog):
    model = make_model(batch_size=batch_size)
    questions = ["a", "b", "fail", "d", "e"]
    results = model.generate_until(instances(model, questions))
    assert [result.text for result in results] == ["A", "B", "", "D", "E"]
    assert results[0].token_counts == TokenCounts(12, 2)
    assert engine.calls == calls
    assert [record.getMessage() for record in caplog.records] == ["task 2: empty answer (too long)"]
    kept = [("generate_until", f"context {i}", text) for i, text in enumerate(["A", "B", "", "D", "E"])]
    assert model.cache_hook.kept == kept


def test_repeated_questions_have_different_seeds(make_model, engine):
    model = make_model(batch_size=4)
    one = instances(model, ["a"], {"temperature": 1.0, "do_sample": True})
    model.generate_until(one * 3)
    assert len({request.sampling.seed for request in engine.requests}) == 3


def test_errors_in_the_arguments(interface, make_model, monkeypatch):
    with pytest.raises(UserError, match=r"unknown fields: frames, expected checkpoint and num_frames only\."):
        make_model(frames=4)
    with pytest.raises(UserError, match="has no checkpoint"):
        model_class()()
    model = make_model()
    with pytest.raises(UserError, match="task task needs log-likelihoods"):
        model.loglikelihood(instances(model, ["a"]))
    with pytest.raises(UserError, match="task task has several rounds"):
        model.generate_until_multi_round(instances(model, ["a"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes"):
        make_model()


TASK = """
task: needles
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function needles.visual
doc_to_text: !function needles.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false, num_beams: 1}}
process_results: !function needles.results
metric_list: [{{metric: same, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """
def visual(doc):
    return [doc["video"]]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, results):
    return {"same": float(results[0] == doc["expected"])}
"""


@pytest.mark.slow
def test_a_task_in_the_real_package(data_root, heldout, tmp_path):
    """The answers to a task equal those of the run's own evaluation."""
    python = os.environ.get("DYNFOCUS_LMMS_EVAL_PYTHON")
    assert python, (
        "set DYNFOCUS_LMMS_EVAL_PYTHON to the Python of an environment with dynfocus_jax[lmms-eval]"
    )
    (tmp_path / "tiny.py").write_text("from tests.tiny import tiny_config as get_config\n")
    workdir = tmp_path / "run"
    code, _, stderr = command(
        "train", f"--config={tmp_path}/tiny.py", f"--config.data.root={data_root}", f"--workdir={workdir}"
    )
    assert code == 0, stderr
    entries = json.loads((heldout / "heldout.json").read_text())
    predictions = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
    with (tmp_path / "questions.jsonl").open("w") as file:
        for entry, prediction in zip(entries, predictions, strict=True):
            doc = {key: prediction[key] for key in ("question", "answer")}
            doc |= {"video": str(heldout / entry["video"]), "expected": prediction["prediction"]}
            file.write(json.dumps(doc) + "\n")
    (tmp_path / "needles.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "needles.py").write_text(FUNCTIONS)
    offline = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
    named = {
        "model": "dynfocus_jax",
        "model_args": f"checkpoint={workdir}",
        "tasks": "needles",
        "batch_size": "4",
    }
    folders = {"include_path": str(tmp_path), "output_path": str(tmp_path / "out")}
    arguments = [word for name, value in (named | folders).items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [python, "-m", "lmms_eval", *arguments],
        env=os.environ | offline | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("*results.json")
    measured = json.loads(results.read_text())["results"]["needles"]
    assert measured["same,none"] == 1.0
