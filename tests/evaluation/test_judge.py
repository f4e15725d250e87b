"""The judge with a local endpoint that misbehaves."""

import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate

import pytest

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.evaluation.judge import Judge, JudgeItem, Verdict, summarize_verdicts
from dynfocus_jax.evaluation.judge_settings import JudgeSettings
from tests.evaluation.chat_server import chat_server, completion, drip, flood, reset, say, send

KEY = "sk-not-a-real-key"
YES = "{'pred': 'yes', 'score': 4}"


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)


@pytest.fixture
def short_waits(monkeypatch):
    """The openai client waits milliseconds between attempts, instead of half a second and more."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


def settings(server, **changes) -> JudgeSettings:
    """Settings of a judge that gives up after seconds instead of minutes."""
    url = server if isinstance(server, str) else server.url
    quick = {"attempts": 3, "timeout": 2.0, "patience": 10.0, "concurrency": 4}
    return JudgeSettings("judge-1", **{"base_url": url, "key_variable": "JUDGE_KEY"} | quick | changes)


def item(name: str, prediction: str = "a cat") -> JudgeItem:
    fields = {"question": f"what is {name} ?", "answer": "cat", "prediction": prediction}
    return JudgeItem(name, "video_chatgpt_qa", fields)


def items(count: int) -> list[JudgeItem]:
    return [item(f"q{i}") for i in range(count)]


def test_verdicts_follow_the_order_of_the_questions():
    def behaviour(handler, request, _):
        number = int(request.question.split("what is q")[1].split()[0])
        time.sleep(0.05 * (3 - number))  # the last question is answered first
        say(handler, json.dumps({"pred": "yes" if number % 2 else "no", "score": number}))

    with chat_server(behaviour) as server, Judge(settings(server)) as judge:
        verdicts = judge.grade(items(4))
        assert [(v.id, v.correct, v.scores["score"]) for v in verdicts] == [
            ("q0", False, 0),
            ("q1", True, 1),
            ("q2", False, 2),
            ("q3", True, 3),
        ]
        assert {v.reason for v in verdicts} == {None}
        assert {v.model for v in verdicts} == {"judge-1"}
    for request in server.requests:
        assert request.path == "/v1/chat/completions"
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        assert request.body.keys() == {"model", "messages", "temperature", "max_tokens"}
        assert (request.body["model"], request.body["temperature"]) == ("judge-1", 0)
        assert [m["role"] for m in request.body["messages"]] == ["system", "user"]
    record = judge.record()
    assert record["endpoint"] == server.url
    assert (record["model"], record["models_served"]) == ("judge-1", ["judge-1"])
    ((version, source),) = record["prompts"].items()
    assert version == verdicts[0].rubric
    assert source.startswith("Video-ChatGPT, evaluate_activitynet_qa.py")
    assert record["parameters"] == {"temperature": 0, "max_tokens": 1024}
    assert KEY not in json.dumps(record)


def _stall(handler):
    time.sleep(2)
    handler.close_connection = True


def _cut_off(handler):
    send(handler, 200, json.dumps(completion(YES)), Content_Length="5000")
    handler.close_connection = True


MISBEHAVIOUR = {
    "429": lambda h: send(h, 429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}),
    "429, Retry-After not understood": lambda h: send(h, 429, "", Retry_After="soon"),
    "429, Retry-After in the past": lambda h: send(h, 429, "", Retry_After=formatdate(0, usegmt=True)),
    "408": lambda h: send(h, 408, ""),
    "500": lambda h: send(h, 500, {"error": {"message": "internal"}}),
    "502 of a proxy": lambda h: send(h, 502, "<html>bad gateway</html>"),
    "503, error a string": lambda h: send(h, 503, {"error": "overloaded"}),
    "529": lambda h: send(h, 529, b"\xff\xfe"),
    "no reply in time": _stall,
    "a reply that drips": lambda h: drip(h, 1.2),
    "a reply without end": flood,
    "reset": reset,
    "connection closed": lambda h: setattr(h, "close_connection", True),
    "cut off": _cut_off,
    "not HTTP": lambda h: (h.wfile.write(b"hello\r\n\r\n"), setattr(h, "close_connection", True)),
    "not gzip": lambda h: send(h, 200, b"not gzip", Content_Encoding="gzip"),
    "not JSON": lambda h: send(h, 200, "<html>welcome</html>"),
    "half of the JSON": lambda h: send(h, 200, json.dumps(completion(YES))[:40]),
    "JSON, but a list": lambda h: send(h, 200, "[]"),
    "JSON nested without end": lambda h: send(h, 200, "[" * 100_000),
    "error in a 200": lambda h: send(h, 200, {"error": {"message": "overloaded"}}),
    "no choices": lambda h: send(h, 200, {"choices": []}),
    "content null": lambda h: say(h, None),
    "content empty": lambda h: say(h, " \n"),
    "content a list": lambda h: say(h, [{"type": "text", "text": YES}]),
}


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize("misbehave", MISBEHAVIOUR.values(), ids=MISBEHAVIOUR.keys())
def test_retries_until_there_is_a_reply(misbehave):
    def behaviour(handler, request, count):
        misbehave(handler) if count < 2 else say(handler, YES)

    with chat_server(behaviour) as server, Judge(settings(server, timeout=1.0)) as judge:
        (verdict,) = judge.grade(items(1))
    assert (verdict.correct, verdict.scores, verdict.reason) == (True, {"score": 4}, None)
    assert len(server.requests) == 3


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize("misbehave", MISBEHAVIOUR.values(), ids=MISBEHAVIOUR.keys())
def test_gives_up_on_a_question_after_all_attempts(misbehave):
    """A question that gets no proper reply is wrong and listed; the others get their marks."""

    def behaviour(handler, request, _):
        misbehave(handler) if "what is q1 ?" in request.question else say(handler, YES)

    with chat_server(behaviour) as server, Judge(settings(server, timeout=1.0)) as judge:
        verdicts = judge.grade(items(3))
    assert [v.correct for v in verdicts] == [True, False, True]
    assert "(after 3 attempts)" in verdicts[1].reason
    assert len(server.requests) == 3 + 2
    summary = summarize_verdicts(verdicts)
    assert summary["questions"] == 3
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert summary["score"] == pytest.approx(8 / 3)
    assert summary["failed"] == [{"id": "q1", "reason": verdicts[1].reason}]


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_honours_retry_after(form):
    def behaviour(handler, request, count):
        date = formatdate(time.time() + 2, usegmt=True)  # whole seconds, so 1 to 2 s from now
        after = "1" if form == "seconds" else date
        send(handler, 429, "", Retry_After=after) if count == 0 else say(handler, YES)

    with chat_server(behaviour) as server, Judge(settings(server)) as judge:
        (verdict,) = judge.grade(items(1))
    assert verdict.correct
    assert 0.95 < server.requests[1].at - server.requests[0].at < 3


def test_does_not_wait_for_an_hour():
    def behaviour(handler, request, _):
        limited = "what is q1 ?" in request.question
        send(handler, 429, "", Retry_After="3600") if limited else say(handler, YES)

    start = time.monotonic()
    with chat_server(behaviour) as server, Judge(settings(server, attempts=100)) as judge:
        verdicts = judge.grade(items(2))
    assert time.monotonic() - start < 5
    assert "429" in verdicts[1].reason
    assert len(server.requests) == 2


def test_waits_double_and_patience_limits_their_sum():
    """The client waits 0.5 s after the first attempt and doubles it each time, less up to a quarter."""

    def behaviour(handler, request, _):
        send(handler, 500, "") if "what is q0 ?" in request.question else say(handler, YES)

    start = time.monotonic()
    with chat_server(behaviour) as server, Judge(settings(server, attempts=1000, patience=2.5)) as judge:
        verdicts = judge.grade(items(2))
    assert time.monotonic() - start < 5
    assert verdicts[0].reason == (
        "the judge gave no reply: no reply within 2.5 s; the last attempt ended with HTTP status 500 "
        "Internal Server Error"
    )
    assert verdicts[1].correct
    times = [request.at for request in server.requests if "what is q0 ?" in request.question]
    waits = [after - before for before, after in itertools.pairwise(times)]
    assert len(waits) == 2
    for number, wait in enumerate(waits):
        assert wait >= 0.375 * 2**number


def test_patience_ends_a_reply_that_drips():
    def behaviour(handler, request, _):
        drip(handler, 60) if "what is q0 ?" in request.question else say(handler, YES)

    start = time.monotonic()
    with chat_server(behaviour) as server, Judge(settings(server, patience=1.0)) as judge:
        verdicts = judge.grade(items(2))
    assert time.monotonic() - start < 5
    assert verdicts[0].reason == "the judge gave no reply: no reply within 1 s"
    assert verdicts[1].correct


def test_a_refused_question_is_not_retried():
    def behaviour(handler, request, _):
        refused = "what is q2 ?" in request.question
        complaint = {"error": {"code": "context_length_exceeded", "message": "too long"}}
        send(handler, 400, complaint) if refused else say(handler, YES)

    with chat_server(behaviour) as server, Judge(settings(server)) as judge:
        verdicts = judge.grade(items(4))
    assert [v.correct for v in verdicts] == [True, True, False, True]
    assert "too long" in verdicts[2].reason
    assert len(server.requests) == 4


FATAL = {
    "wrong key": (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}),
    "no such model": (404, {"error": {"message": "the model does not exist", "code": "model_not_found"}}),
    "no credit": (429, {"error": {"message": "check your plan", "code": "insufficient_quota"}}),
    "another address": (301, ""),
}


@pytest.mark.parametrize(("status", "body"), FATAL.values(), ids=FATAL.keys())
def test_a_refusal_of_all_requests_ends_at_once(status, body):
    with chat_server(lambda handler, *_: send(handler, status, body)) as server:
        with Judge(settings(server)) as judge, pytest.raises(UserError) as error:
            judge.grade(items(50))
        assert len(server.requests) <= 4  # one for each request in flight
    sentence = str(error.value)
    assert str(status) in sentence
    assert "JUDGE_KEY" in sentence
    assert KEY not in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")


@pytest.mark.usefixtures("short_waits")
def test_an_endpoint_that_is_down(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    cache = tmp_path / "cache" / "replies.jsonl"
    with Judge(settings(url, cache=cache)) as judge, pytest.raises(RunError) as error:
        judge.grade(items(2))
    sentence = str(error.value)
    assert url in sentence
    assert "no question got a reply" in sentence
    assert str(cache) in sentence
    assert "\n" not in sentence


@pytest.mark.usefixtures("short_waits")
def test_gives_up_when_the_endpoint_goes_down_and_resumes(tmp_path):
    up = [True]

    def behaviour(handler, request, _):
        if "what is q7 ?" in request.question:
            up[0] = False
        say(handler, YES) if up[0] else send(handler, 503, "")

    one = {"concurrency": 1, "give_up_after": 5, "attempts": 2, "cache": tmp_path / "replies.jsonl"}
    with chat_server(behaviour) as server:
        with Judge(settings(server, **one)) as judge:
            with pytest.raises(RunError, match=r"5 questions in a row got no reply .*503"):
                judge.grade(items(40))
            assert len(server.requests) < 2 * 40
        asked_before = len(server.requests)
        up[0] = True
        with Judge(settings(server, **one)) as judge:
            assert all(v.correct for v in judge.grade([i for i in items(40) if i.id != "q7"]))
        asked_again = [request.question for request in server.requests[asked_before:]]
        assert len(asked_again) == 39 - 7
        assert not any(f"what is q{i} ?" in question for question in asked_again for i in range(7))


def test_unreadable_replies_are_wrong_listed_and_not_cached(tmp_path):
    cache = tmp_path / "replies.jsonl"

    def behaviour(handler, request, _):
        say(handler, "I would rather not say." if "what is q1 ?" in request.question else YES)

    with chat_server(behaviour) as server:
        with Judge(settings(server, cache=cache)) as judge:
            verdicts = judge.grade(items(3))
        assert [v.correct for v in verdicts] == [True, False, True]
        assert verdicts[1].scores == {"score": 0}
        assert verdicts[1].reply == "I would rather not say."
        assert verdicts[1].reason == "the judge's reply cannot be parsed"
        assert len(server.requests) == 4  # the unreadable one twice
        with Judge(settings(server, cache=cache)) as judge:
            assert judge.grade(items(3)) == verdicts
        assert len(server.requests) == 6


def test_an_unreadable_reply_is_asked_for_again():
    def behaviour(handler, request, count):
        say(handler, YES if count else "Sure! Here you go:")

    with chat_server(behaviour) as server, Judge(settings(server)) as judge:
        assert [v.correct for v in judge.grade(items(2))] == [True, True]


def test_replies_are_cached(tmp_path):
    cache = tmp_path / "replies.jsonl"
    with chat_server(lambda handler, *_: say(handler, YES)) as server:
        with Judge(settings(server, cache=cache)) as judge:
            verdicts = judge.grade(items(5))
            assert judge.grade(items(5)) == verdicts
        assert len(server.requests) == 5
        text = cache.read_text()
        assert KEY not in text
        lines = text.splitlines(keepends=True)
        # As after a kill in the middle of the last line, with another line damaged
        cache.write_text("".join(lines[:3]) + "{nonsense\n" + lines[3] + lines[4][:30])
        with Judge(settings(server, cache=cache)) as judge:
            assert judge.grade(items(5)) == verdicts
        assert len(server.requests) == 6
        with Judge(settings(server, cache=cache)) as judge:
            assert judge.grade(items(5)) == verdicts
            assert judge.record()["models_served"] == ["judge-1"]
        assert len(server.requests) == 6
        for change in ({"parameters": {"temperature": 1}}, {"base_url": server.url + "/other"}):
            with Judge(settings(server, cache=cache)._replace(**change)) as judge:
                judge.grade(items(5))
        assert len(server.requests) == 16


def test_equal_questions_are_asked_once_and_empty_predictions_never():
    with chat_server(lambda handler, *_: say(handler, YES)) as server, Judge(settings(server)) as judge:
        verdicts = judge.grade([item("q"), item("q")._replace(id="r"), item("q", " \n"), item("q", "")])
        assert [v.id for v in verdicts] == ["q", "r", "q", "q"]
        assert [v.correct for v in verdicts] == [True, True, False, False]
        assert [v.reason for v in verdicts[2:]] == ["the model gave no answer"] * 2
        assert judge.grade([item("z", "")])[0].correct is False
        assert judge.grade([]) == []
    assert len(server.requests) == 1


def test_concurrency_limits_the_requests_in_flight():
    lock, at_once = threading.Lock(), []

    def behaviour(handler, request, _):
        with lock:
            at_once.append(at_once[-1] + 1 if at_once else 1)
        time.sleep(0.1)
        with lock:
            at_once.append(at_once[-1] - 1)
        say(handler, YES)

    with chat_server(behaviour) as server, Judge(settings(server, concurrency=3)) as judge:
        judge.grade(items(12))
    assert 2 <= max(at_once) <= 3


def test_predictions_reach_the_judge_unchanged():
    """Template characters, quotes, other scripts and a lone surrogate from a broken annotation file."""
    odd = "$answer ${question} {0} %s \\n \"'} 猫\U0001f431\ud83d"
    with chat_server(lambda handler, *_: say(handler, YES)) as server, Judge(settings(server)) as judge:
        assert judge.grade([item("q", odd)])[0].correct
    assert f"Predicted Answer: {odd}\n" in server.requests[0].question


def test_errors_in_the_settings(monkeypatch, tmp_path):
    good = settings("http://127.0.0.1:1/v1")
    (tmp_path / "file").write_text("")
    mistakes = [
        (good._replace(model=" "), "model is not set"),
        (good._replace(base_url="127.0.0.1:8000"), "expected a URL such as"),
        (good._replace(base_url="http://host:port/v1"), "expected a URL such as"),
        (good._replace(base_url="file:///etc/passwd"), "expected a URL such as"),
        (good._replace(key_variable="NOT_SET_AT_ALL"), "NOT_SET_AT_ALL is not set"),
        (good._replace(attempts=0), "attempts is 0"),
        (good._replace(patience=-1), "patience is -1"),
        (good._replace(cache=tmp_path / "file" / "replies.jsonl"), "replies.jsonl cannot be used"),
    ]
    for wrong, expected in mistakes:
        with pytest.raises(UserError, match=expected) as error:
            Judge(wrong)
        assert "\n" not in str(error.value)
    monkeypatch.setenv("JUDGE_KEY", "two\nlines")
    with pytest.raises(UserError, match="characters that a key cannot have"):
        Judge(good)
    judge = Judge(good._replace(key_variable=""))
    with pytest.raises(UserError, match=r"'video_chatgpt_q'.*video_chatgpt_qa"):
        judge.grade([item("q")._replace(rubric="video_chatgpt_q")])
    with pytest.raises(UserError, match="question 'q' has no 'answer'"):
        judge.grade([JudgeItem("q", "video_chatgpt_qa", {"question": "", "prediction": ""})])


def test_the_openai_client_is_imported_only_to_judge():
    program = "import sys, dynfocus_jax.evaluate; sys.exit('openai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_no_key_is_sent_if_none_is_named():
    with chat_server(lambda handler, *_: say(handler, YES)) as server:
        with Judge(settings(server, key_variable="", base_url=server.url + "/chat/completions/")) as judge:
            assert judge.grade(items(1))[0].correct
        assert "Authorization" not in server.requests[0].headers
        assert server.requests[0].path == "/v1/chat/completions"


def test_summary_by_hand():
    def verdict(name, correct, *scores, reason=None):
        return Verdict(name, "r@1", correct, dict(zip("ab", scores, strict=False)), "", "", reason)

    mlvu = [verdict("1", None, 5, 3), verdict("2", None, 0, 0, reason="x"), verdict("3", None, 1, 2)]
    summary = summarize_verdicts(mlvu)
    assert summary == {
        "questions": 3,
        "scores": {"a": 2, "b": pytest.approx(5 / 3)},
        "score": pytest.approx(11 / 3),
        "failed": [{"id": "2", "reason": "x"}],
    }
    assert summarize_verdicts([verdict("1", True, 4), verdict("2", False, 1)])["accuracy"] == 0.5
    assert summarize_verdicts([])["questions"] == 0
    with pytest.raises(ValueError, match="several rubrics"):
        summarize_verdicts([mlvu[0], mlvu[1]._replace(rubric="s@1")])
