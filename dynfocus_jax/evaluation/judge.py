"""Marks for open answers, given by a language model with the benchmarks' own prompts.

An answer without a readable reply counts as wrong, and its reason is listed: every question stays in the
denominator. Replies are kept in a file, so that an interrupted run asks only the remaining questions, and
equal answers get equal marks.
"""

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from tqdm import tqdm

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.evaluation.judge_prompts import Rubric, rubric_named
from dynfocus_jax.evaluation.judge_replies import NO_REPLY, NoReply, Reply, ReplyCache
from dynfocus_jax.evaluation.judge_settings import JudgeSettings


class JudgeItem(NamedTuple):
    """An answer to be marked.

    rubric: a name in judge_prompts.toml. fields: the values of its prompt's fields.
    """

    id: str
    rubric: str
    fields: dict[str, str]


class Verdict(NamedTuple):
    """The marks of one answer.

    correct: None if the rubric asks for scores only. scores: by key, 0 without marks. reply: the judge's
    words. model: the judge's name, as reported by the endpoint. reason: why there are no marks; None if there
    are.
    """

    id: str
    rubric: str
    correct: bool | None
    scores: dict[str, float]
    reply: str
    model: str
    reason: str | None


class Judge:
    """A language model that marks answers. Use it as a context manager, or `close` it.

    Raises:
      UserError: the settings are wrong, or the key is missing.
    """

    def __init__(self, settings: JudgeSettings):
        # Imports the openai client, which takes 0.3 s that commands without a judge need not wait for.
        from dynfocus_jax.evaluation.judge_endpoint import Endpoint  # noqa: PLC0415

        self.settings = settings
        self._endpoint = Endpoint(settings)
        self._replies = ReplyCache(settings.cache)
        self._runner = asyncio.Runner()
        self._models_served: set[str] = set()
        self._prompt_sources: dict[str, str] = {}  # by version of the prompt

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._endpoint.close())
        self._runner.close()

    def grade(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        """Return a verdict for each item, in their order. Items with the same prompt are asked about once.

        Raises:
          UserError: an item's rubric is unknown or a field is missing; the endpoint refuses the key, the
            model or its path.
          RunError: `give_up_after` consecutive questions, or all questions, got no reply. The replies so far
            are kept.
        """
        rubrics = [rubric_named(item.rubric) for item in items]
        unknown: dict[str, tuple[Rubric, list[dict[str, str]]]] = {}
        keys: list[str | None] = []
        for item, rubric in zip(items, rubrics, strict=True):
            key = None
            if _is_answered(item, rubric):
                messages = rubric.messages(item.fields)
                key = self._key_of(messages)
                if rubric.read(self._replies.get(key).text) is None:
                    unknown[key] = (rubric, messages)
            keys.append(key)
        failures = self._runner.run(self._ask_all(unknown)) if unknown else {}
        verdicts = [
            self._verdict(item, rubric, key, failures)
            for item, rubric, key in zip(items, rubrics, keys, strict=True)
        ]
        self._models_served.update(verdict.model for verdict in verdicts if verdict.model)
        self._prompt_sources.update((rubric.version, rubric.source) for rubric in rubrics)
        return verdicts

    def record(self) -> dict[str, Any]:
        """Return the description of the judge, and of all prompts so far, for the report."""
        return {
            "endpoint": self.settings.url,
            "model": self.settings.model,
            "models_served": sorted(self._models_served),
            "prompts": dict(sorted(self._prompt_sources.items())),
            "parameters": self.settings.parameters,
        }

    def _key_of(self, messages: list[dict[str, str]]) -> str:
        request = {"endpoint": self.settings.url, **self._endpoint.body(messages)}
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    async def _ask_all(
        self, chats: Mapping[str, tuple[Rubric, list[dict[str, str]]]]
    ) -> dict[str, NoReply | Reply]:
        """Ask about all chats and keep the readable replies.

        Returns:
          For each of the other chats, its unreadable reply, or the reason why there is none.
        """
        in_flight = asyncio.Semaphore(self.settings.concurrency)

        async def ask(
            key: str, rubric: Rubric, messages: list[dict[str, str]]
        ) -> tuple[str, NoReply | Reply]:
            async with in_flight:
                try:
                    return key, await self._ask(key, rubric, messages)
                except NoReply as error:
                    return key, error

        failures: dict[str, NoReply | Reply] = {}
        consecutive_failures, any_reply = 0, False
        tasks = [asyncio.create_task(ask(key, *chat)) for key, chat in chats.items()]
        try:
            for task in tqdm(asyncio.as_completed(tasks), "judging", len(tasks), disable=None):
                key, outcome = await task
                if isinstance(outcome, NoReply):
                    failures[key] = outcome
                    consecutive_failures += 1
                    if consecutive_failures == self.settings.give_up_after:
                        raise self._failed(f"{consecutive_failures} questions in a row got no reply", outcome)
                    continue
                consecutive_failures, any_reply = 0, True
                if self._replies.get(key) is not outcome:
                    failures[key] = outcome
            if not any_reply:
                raise self._failed("no question got a reply", next(iter(failures.values())))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return failures

    async def _ask(self, key: str, rubric: Rubric, messages: list[dict[str, str]]) -> Reply:
        """Return a reply, and keep it if it is readable. An unreadable first reply is asked for again."""
        reply = await self._endpoint.ask(messages)
        if rubric.read(reply.text) is None:
            with suppress(NoReply):
                reply = await self._endpoint.ask(messages)
        if rubric.read(reply.text) is not None:
            self._replies.add(key, reply)
        return reply

    def _failed(self, problem: str, reason: object) -> RunError:
        cache = self.settings.cache
        kept = f" The replies so far are kept in {cache}." if cache else ""
        return RunError(
            f"the judge at {self.settings.url} failed: {problem} ({reason}); rerun the same command later."
            f"{kept}"
        )

    def _verdict(
        self, item: JudgeItem, rubric: Rubric, key: str | None, failures: Mapping[str, NoReply | Reply]
    ) -> Verdict:
        reply, reason = NO_REPLY, "the judge's reply cannot be parsed"
        if key is None:
            reason = "the model gave no answer"
        elif isinstance(failure := failures.get(key), NoReply):
            reason = f"the judge gave no reply: {failure}"
        else:
            reply = failure or self._replies.get(key)
        marks = rubric.read(reply.text)
        if marks is None:
            wrong = False if rubric.yes_no else None
            no_scores = dict.fromkeys(rubric.keys, 0.0)
            return Verdict(item.id, rubric.version, wrong, no_scores, reply.text, reply.model, reason)
        return Verdict(item.id, rubric.version, marks.correct, marks.scores, reply.text, reply.model, None)


def summarize_verdicts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the judged measure over verdicts of one rubric.

    Returns:
      questions: their number. accuracy: 0 to 1, only if the rubric asks for yes or no. scores: the mean of
      each key. score: the mean of the sums over the keys. failed: id and reason of each answer without marks,
      which counts as wrong with score 0.
    """
    if len({verdict.rubric for verdict in verdicts}) > 1:
        raise ValueError("verdicts of several rubrics have no common mean")
    if not verdicts:
        return {"questions": 0, "scores": {}, "score": None, "failed": []}
    count = len(verdicts)
    scores = {key: sum(v.scores[key] for v in verdicts) / count for key in verdicts[0].scores}
    summary = {"questions": count, "scores": scores, "score": sum(scores.values())}
    if verdicts[0].correct is not None:
        summary["accuracy"] = sum(bool(verdict.correct) for verdict in verdicts) / count
    summary["failed"] = [{"id": v.id, "reason": v.reason} for v in verdicts if v.reason]
    return summary


def _is_answered(item: JudgeItem, rubric: Rubric) -> bool:
    """Whether the model has answered all questions that the item is about.

    Raises:
      UserError: a field of the rubric is missing.
    """
    missing = sorted(rubric.fields - item.fields.keys())
    if missing:
        raise UserError(
            f"question {item.id!r} has no {missing[0]!r}, which the judge's rubric {item.rubric!r} needs."
        )
    return all(item.fields[name].strip() for name in rubric.fields if name.startswith("prediction"))
