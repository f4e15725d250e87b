"""One question to an OpenAI-compatible endpoint: attempts, waits, and an end to both."""

import json
import os
import random
import threading
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

import httpx2

from dynfocus_jax.errors import UserError
from dynfocus_jax.media.timeouts import CallTimeout, call_with_timeout


class JudgeSettings(NamedTuple):
    """Endpoint, model and retry settings of a judge. Times are in seconds."""

    model: str
    base_url: str = "https://api.openai.com/v1"
    key_variable: str = (
        "OPENAI_API_KEY"  # environment variable that holds the key; "" for an endpoint without
    )
    cache: Path | None = None  # file of the replies so far, one json value a line; kept between runs
    parameters: dict = {"temperature": 0, "max_tokens": 1024}  # noqa: RUF012  sent as they are, never changed
    concurrency: int = 8  # questions under way at once
    attempts: int = 8  # for one question
    timeout: float = 60.0  # for one attempt, from the look-up of the host to the last byte
    patience: float = 600.0  # for all attempts at one question and the waits between them
    backoff: float = 1.0  # first wait; doubled each time up to a minute, less up to a half at random
    give_up_after: int = 16  # questions in a row that got no reply, before the rest is not asked any more


class Reply(NamedTuple):
    """text: what the judge wrote; model: what the endpoint says has written it."""

    text: str
    model: str


class NoReply(Exception):
    """One question got no reply; says why. Others may get theirs."""


class _Again(Exception):
    """An attempt failed in a way that the next may not; `after`: how long the endpoint asks to wait."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.after = after


class Endpoint:
    """The judge behind `settings`; safe to use from several threads.

    Raises:
      UserError: the settings are wrong or the key is missing.
    """

    def __init__(self, settings: JudgeSettings):
        _check(settings)
        self.settings = settings
        self.url = settings.base_url.strip().rstrip("/").removesuffix("/chat/completions")
        self.stopped = threading.Event()  # set: nothing more is asked
        self._refusal: UserError | None = None  # why the endpoint takes no questions at all
        self._key = _key(settings)
        self._client = httpx2.Client(
            headers={
                "Content-Type": "application/json",
                **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            },
            timeout=settings.timeout,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=settings.concurrency),
        )

    def close(self) -> None:
        """End the waits under way and close the connections."""
        self.stopped.set()
        self._client.close()

    def body(self, messages: list[dict[str, str]]) -> dict:
        """Return the request body of a chat."""
        return {**self.settings.parameters, "model": self.settings.model, "messages": messages}

    def ask(self, messages: list[dict[str, str]]) -> Reply:
        """The reply to a chat.

        Raises:
          NoReply: none came within the attempts and the patience of the settings, or this chat was refused.
          UserError: the endpoint takes none at all: wrong key, model or path, no credit.
        """
        settings, end = self.settings, time.monotonic() + self.settings.patience
        for attempt in range(1, settings.attempts + 1):
            if self._refusal is not None:
                raise self._refusal
            if self.stopped.is_set():
                raise NoReply("not asked any more: the judge was given up")
            try:
                seconds = max(0.0, min(settings.timeout, end - time.monotonic()))
                return self._attempt(self.body(messages), seconds)
            except _Again as error:
                reason, wait = str(error), _wait(attempt, settings.backoff, error.after)
            if attempt == settings.attempts or time.monotonic() + wait > end:
                break
            self.stopped.wait(wait)
        raise NoReply(f"{reason} (after {attempt} attempt{'s' if attempt > 1 else ''})")

    def _attempt(self, body: dict, seconds: float) -> Reply:
        try:
            status, headers, content = call_with_timeout(lambda: self._post(body, seconds), seconds)
        except (CallTimeout, httpx2.TimeoutException):
            raise _Again(f"no complete reply in {seconds:.3g} s") from None
        except httpx2.RequestError as error:
            raise _Again(f"the connection failed: {_short(str(error) or type(error).__name__)}") from None
        if status == 200:
            return _reply(content)
        said = self._complaint(content)
        no_credit = status == 429 and "insufficient_quota" in said
        if status < 400 or status in (401, 402, 404, 405) or no_credit:
            key = self.settings.key_variable or "key_variable (none is named)"
            self._refusal = UserError(
                f"the judge at {self.url} refuses requests (HTTP status {status}{said}); check its "
                f"address, the model {self.settings.model!r} and the key in {key}."
            )
            raise self._refusal
        if status in (408, 409, 425, 429) or status >= 500:
            raise _Again(f"HTTP status {status}{said}", _retry_after(headers))
        raise NoReply(f"HTTP status {status}{said}")  # of this chat: too long, or not to the endpoint's taste

    def _post(self, body: dict, seconds: float) -> tuple[int, httpx2.Headers, bytes]:
        """Status, headers and body; both a body without end and one that drips are cut off."""
        end, content = time.monotonic() + seconds, bytearray()
        url, sent = f"{self.url}/chat/completions", json.dumps(body).encode()
        with self._client.stream("POST", url, content=sent, timeout=seconds) as response:
            for chunk in response.iter_bytes():
                content += chunk
                if time.monotonic() > end or len(content) > _MOST_BYTES:
                    raise httpx2.ReadError("the reply does not end")
            return response.status_code, response.headers, bytes(content)

    def _complaint(self, content: bytes) -> str:
        """Return the message in an error's body as `: text`, without the key."""
        try:
            error = json.loads(content)["error"]
            said = f"{error.get('code') or ''} {error['message']}" if isinstance(error, dict) else str(error)
        except (ValueError, KeyError, TypeError, RecursionError):
            said = content.decode("utf-8", "replace")
        if self._key:
            said = said.replace(self._key, "(key)")
        return f": {_short(said)}" if said.strip() else ""


def _check(settings: JudgeSettings) -> None:
    if not settings.model.strip():
        raise UserError("the judge's model is not set; name one that its endpoint serves.")
    try:
        url = httpx2.URL(settings.base_url.strip())
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(
            f"the judge's base_url is {settings.base_url!r}; expected an address such as https://host/v1."
        )
    for name in ("concurrency", "attempts", "timeout", "patience", "give_up_after"):
        if getattr(settings, name) <= 0:
            raise UserError(f"the judge's {name} is {getattr(settings, name)}; expected more than 0.")
    if settings.backoff < 0:
        raise UserError(f"the judge's backoff is {settings.backoff}; expected 0 or more seconds.")


def _key(settings: JudgeSettings) -> str:
    if not settings.key_variable:
        return ""
    key = os.environ.get(settings.key_variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        found = "holds characters that no key has" if key else "is not set"
        raise UserError(
            f"the judge's key is read from the environment variable {settings.key_variable}, which {found}; "
            'set it, or set key_variable to "" for an endpoint that needs none.'
        )
    return key


def _reply(content: bytes) -> Reply:
    try:
        answer = json.loads(content)
        text = answer["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise _Again(f"a reply that is no chat completion: {_short(content.decode('utf-8', 'replace'))}")
    return Reply(text, str(answer.get("model") or ""))


def _wait(attempt: int, backoff: float, after: float | None) -> float:
    """Seconds before the next attempt; spread at random so that the threads do not return all at once."""
    if after is not None:
        return after * random.uniform(1, 1.1)
    return min(60.0, backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1)


def _retry_after(headers: httpx2.Headers) -> float | None:
    """Seconds that the Retry-After header asks for, as a number or a date; None without a usable one."""
    said = headers.get("retry-after", "").strip()
    try:
        seconds = float(said) if said[:1].isdigit() else parsedate_to_datetime(said).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, seconds)


def _short(text: str, most: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}..."


_MOST_BYTES = 4 << 20
