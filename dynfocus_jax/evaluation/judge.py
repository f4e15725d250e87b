"""Open answers marked by a language model, asked as the benchmarks' authors ask theirs.

A question that gets no readable reply counts as wrong with the reason listed: no question leaves the
denominator. Replies are kept in a file, so that a run that was broken off asks only what is left, and the
same answers get the same marks again.
"""

import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.evaluation.judge_endpoint import Endpoint, JudgeSettings, NoReply, Reply
from dynfocus_jax.evaluation.judge_prompts import Rubric, rubric_named


class Item(NamedTuple):
    """An answer to be marked. rubric: a name in judge_prompts.toml; fields: what its words ask for."""

    id: str
    rubric: str
    fields: dict[str, str]


class Verdict(NamedTuple):
    """The marks of one answer.

    correct: None where the rubric asks for scores only. scores: by key, 0 where there are no marks. reply:
    the judge's words. model: as the endpoint named it. reason: why there are no marks; None where there are.
    """

    id: str
    rubric: str
    correct: bool | None
    scores: dict[str, float]
    reply: str
    model: str
    reason: str | None


class Judge:
    """Marks answers; use it as a context manager or `close` it.

    Raises:
      UserError: the settings are wrong, or the key is missing.
    """

    def __init__(self, settings: JudgeSettings):
        self.settings = settings
        self._endpoint = Endpoint(settings)
        self._replies = Replies(settings.cache)
        self._served: set[str] = set()
        self._sources: dict[str, str] = {}  # of the prompts, by version

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the connections."""
        self._endpoint.close()

    def grade(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict for each item, in their order. What two items have in common is asked once.

        Raises:
          UserError: an item's rubric is unknown or a field is missing; the endpoint refuses the key, the
            model or its path.
          RunError: `give_up_after` questions in a row got no reply, or none of all did. Replies so far are
            kept.
        """
        rubrics = [rubric_named(item.rubric) for item in items]
        unknown: dict[str, tuple[Rubric, list[dict]]] = {}
        keys = []
        for item, rubric in zip(items, rubrics, strict=True):
            key = None
            if _answered(item, rubric):
                messages = rubric.messages(item.fields)
                key = self._key_of(messages)
                if rubric.read(self._replies.get(key).text) is None:
                    unknown[key] = (rubric, messages)
            keys.append(key)
        failures = self._ask(unknown)
        verdicts = [self._verdict(*row, failures) for row in zip(items, rubrics, keys, strict=True)]
        self._served.update(verdict.model for verdict in verdicts if verdict.model)
        self._sources.update((rubric.version, rubric.source) for rubric in rubrics)
        return verdicts

    def record(self) -> dict:
        """Return the description of the judge for the report of all answers graded so far."""
        return {
            "endpoint": self._endpoint.url,
            "model": self.settings.model,
            "models_served": sorted(self._served),
            "prompts": dict(sorted(self._sources.items())),
            "parameters": self.settings.parameters,
        }

    def _key_of(self, messages: list[dict]) -> str:
        asked = {"endpoint": self._endpoint.url, **self._endpoint.body(messages)}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _ask(self, chats: dict[str, tuple[Rubric, list[dict]]]) -> dict[str, str | Reply]:
        """Ask and keeps the readable replies. Returns, for the rest, the reason or the unreadable reply."""
        failures: dict[str, str | Reply] = {}
        if not chats:
            return failures
        in_a_row, any_reply = 0, False
        pool = ThreadPoolExecutor(min(self.settings.concurrency, len(chats)))
        try:
            under_way = {pool.submit(self._reply, key, *chat): key for key, chat in chats.items()}
            for future in tqdm(as_completed(under_way), "judging", len(under_way), disable=None):
                key = under_way[future]
                try:
                    reply = future.result()
                except NoReply as error:
                    failures[key] = str(error)
                    in_a_row += 1
                    if in_a_row == self.settings.give_up_after:
                        raise self._gave_up(f"{in_a_row} questions in a row got no reply", error) from None
                    continue
                in_a_row, any_reply = 0, True
                if self._replies.get(key) is not reply:
                    failures[key] = reply
            if not any_reply:
                raise self._gave_up("no question got a reply", next(iter(failures.values())))
        except BaseException:
            self._endpoint.stopped.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return failures

    def _reply(self, key: str, rubric: Rubric, messages: list[dict]) -> Reply:
        """A reply, kept if it can be read; asked for a second time if the first cannot."""
        reply = self._endpoint.ask(messages)
        if rubric.read(reply.text) is None:
            with suppress(NoReply):
                reply = self._endpoint.ask(messages)
        if rubric.read(reply.text) is not None:
            self._replies.keep(key, reply)
        return reply

    def _gave_up(self, what: str, reason: object) -> RunError:
        kept = self.settings.cache
        again = (
            f"the replies so far are in {kept}: run again to go on."
            if kept
            else "no cache keeps its replies."
        )
        return RunError(f"the judge at {self._endpoint.url} failed: {what} ({reason}); {again}")

    def _verdict(self, item: Item, rubric: Rubric, key: str | None, failures: dict) -> Verdict:
        reply, reason = _NOTHING, None
        if key is None:
            reason = "the model gave no answer"
        elif isinstance(failures.get(key), str):
            reason = f"the judge gave no reply: {failures[key]}"
        else:
            reply = failures.get(key, self._replies.get(key))
        marks = rubric.read(reply.text)
        if marks is None:
            wrong = False if rubric.yes_no else None
            nothing = dict.fromkeys(rubric.keys, 0.0)
            reason = reason or "the judge's reply cannot be read"
            return Verdict(item.id, rubric.version, wrong, nothing, reply.text, reply.model, reason)
        return Verdict(item.id, rubric.version, marks.correct, marks.scores, reply.text, reply.model, None)


def summarize_verdicts(verdicts: Sequence[Verdict]) -> dict:
    """The judged measure over verdicts of one rubric.

    Returns:
      questions; accuracy, 0 to 1, only where the rubric asks for yes or no; scores, the mean by key; score,
      the mean of the sums over the keys; failed, id and reason of each answer without marks (wrong, score 0).
    """
    if len({verdict.rubric for verdict in verdicts}) > 1:
        raise ValueError("verdicts of several rubrics have no common mean")
    if not verdicts:
        return {"questions": 0, "scores": {}, "score": None, "failed": []}
    count = len(verdicts)
    scores = {key: sum(v.scores[key] for v in verdicts) / count for key in verdicts[0].scores}
    summary = {"questions": count, "scores": scores, "score": sum(scores.values())}
    if verdicts[0].correct is not None:
        summary["accuracy"] = sum(v.correct for v in verdicts) / count
    summary["failed"] = [{"id": v.id, "reason": v.reason} for v in verdicts if v.reason]
    return summary


class Replies:
    """The replies so far by the digest of what was asked, in memory and, with a path, in a file.

    The file only grows, one json value a line. A line that cannot be read (a process was killed while it
    wrote) is left alone, and its question asked again.
    """

    def __init__(self, path: Path | None):
        self._path, self._lock = path, threading.Lock()
        self._replies: dict[str, Reply] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                lines = file.read().split(b"\n")
                if lines[-1]:
                    file.write(b"\n")
        except OSError as error:
            raise UserError(f"the judge's cache {path} cannot be used: {error.strerror}.") from None
        self._replies.update(_entries(lines))

    def get(self, key: str) -> Reply:
        """An empty one if there is none."""
        return self._replies.get(key, _NOTHING)

    def keep(self, key: str, reply: Reply) -> None:
        """Add a reply; it is in the file when this returns."""
        with self._lock:
            self._replies[key] = reply
            if self._path is not None:
                with self._path.open("ab") as file:
                    file.write(json.dumps({"key": key, **reply._asdict()}).encode() + b"\n")


def _entries(lines: Iterable[bytes]) -> Iterable[tuple[str, Reply]]:
    for line in lines:
        try:
            entry = json.loads(line)
            yield entry["key"], Reply(str(entry["text"]), str(entry["model"]))
        except (ValueError, KeyError, TypeError):
            continue


def _answered(item: Item, rubric: Rubric) -> bool:
    """Whether the model has answered, every time it was asked.

    Raises:
      UserError: a field of the rubric is missing.
    """
    missing = sorted(rubric.fields - item.fields.keys())
    if missing:
        raise UserError(
            f"question {item.id!r} has no {missing[0]!r}, which the judge's rubric {item.rubric!r} asks for."
        )
    return all(item.fields[name].strip() for name in rubric.fields if name.startswith("prediction"))


_NOTHING = Reply("", "")
