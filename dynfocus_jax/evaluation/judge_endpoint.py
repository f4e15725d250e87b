"""Requests to a judge's OpenAI-compatible endpoint.

The openai client sends, retries and waits: it retries timeouts, failed connections and the statuses 408, 409,
429 and 5xx, and waits as long as the header Retry-After asks, if that is at most two minutes.
"""

import asyncio
import json
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import openai

from dynfocus_jax.errors import UserError
from dynfocus_jax.evaluation.judge_replies import NoReply, Reply
from dynfocus_jax.evaluation.judge_settings import JudgeSettings, check_settings, read_key

if TYPE_CHECKING:
    from httpx2 import Response  # the openai client's own type
    from openai import RequestOptions

# Stands for a successful response that is no chat completion. The client retries all statuses from 500.
_NOT_A_COMPLETION = 599
_REFUSED = (401, 402, 404, 405)  # no request will succeed: wrong key, no credit, wrong model or path
_last_failure: ContextVar[str] = ContextVar("last_failure", default="")  # of the task's current question


class Endpoint:
    """The endpoint that `settings` describe. All requests are made in one event loop.

    Raises:
      UserError: the settings are wrong or the key is missing.
    """

    def __init__(self, settings: JudgeSettings):
        check_settings(settings)
        self.settings = settings
        self._key = read_key(settings)
        self._refusal: UserError | None = None  # of all requests; later ones are not sent
        self._client = openai.AsyncOpenAI(
            base_url=settings.url,
            api_key=self._key or "none",  # the client refuses an empty key
            timeout=settings.timeout,
            max_retries=settings.attempts - 1,
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False,  # the results name the address that replied
                event_hooks={"response": [self._classify_response]},
            ),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """Return the request body of a chat."""
        return {**self.settings.parameters, "model": self.settings.model, "messages": messages}

    async def ask(self, messages: list[dict[str, str]]) -> Reply:
        """Send a chat and return the reply.

        Raises:
          NoReply: no reply came within the attempts and the patience of the settings, or the endpoint refused
            this chat.
          UserError: the endpoint refuses all requests: wrong key, model or address, or no credit.
        """
        if self._refusal is not None:
            raise self._refusal
        _last_failure.set("")
        # ASCII JSON: a lone surrogate, from a broken annotation file, has no UTF-8 encoding.
        content = json.dumps(self.body(messages)).encode()
        options: RequestOptions = {} if self._key else {"headers": {"Authorization": openai.omit}}
        try:
            async with asyncio.timeout(self.settings.patience):
                text = await self._client.post(
                    "/chat/completions", cast_to=str, content=content, options=options
                )
        except TimeoutError:
            last = _last_failure.get()
            after = f"; the last attempt ended with {last}" if last else ""
            raise NoReply(f"no reply within {self.settings.patience:.3g} s{after}") from None
        except openai.APIStatusError as error:
            raise self._status_failure(error) from None
        except openai.APITimeoutError as error:
            raise NoReply(f"no data for {self.settings.timeout:.3g} s {_attempts(error)}") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            reason = _shorten(str(cause) or type(cause).__name__)
            raise NoReply(f"the connection failed: {reason} {_attempts(error)}") from None
        reply = _parse_completion(text)
        assert reply is not None  # `_classify_response` accepted the same text
        return reply

    async def _classify_response(self, response: "Response") -> None:
        """Make the client retry replies without a completion, and not retry when the credit is used up."""
        await response.aread()
        if response.is_success:
            if _parse_completion(response.text) is not None:
                return
            response.status_code = _NOT_A_COMPLETION
        elif _is_out_of_credit(response):
            response.headers["x-should-retry"] = "false"
        _last_failure.set(self._describe(response))

    def _status_failure(self, error: openai.APIStatusError) -> NoReply | UserError:
        response = error.response
        described = self._describe(response)
        refused = response.status_code < 400 or response.status_code in _REFUSED
        if not refused and not _is_out_of_credit(response):
            return NoReply(f"{described} {_attempts(error)}")
        key = self.settings.key_variable or "key_variable (not set)"
        self._refusal = UserError(
            f"the judge at {self.settings.url} refuses requests ({described}); check its address, the model "
            f"{self.settings.model!r}, the key in {key}, and the credit of the key."
        )
        return self._refusal

    def _describe(self, response: "Response") -> str:
        """Return the failure of a response in words, without the key."""
        if response.status_code == _NOT_A_COMPLETION:
            return f"a reply that is not a chat completion with text: {self._quote(response.text) or 'blank'}"
        words = f"HTTP status {response.status_code} {response.reason_phrase}".strip()
        if "retry-after" in response.headers:
            words += f", Retry-After {self._quote(response.headers['retry-after'])}"
        message = self._quote(_error_message(response.text))
        return f"{words}: {message}" if message else words

    def _quote(self, text: str) -> str:
        return _shorten(text.replace(self._key, "(key)") if self._key else text)


def _parse_completion(text: str) -> Reply | None:
    """Return the reply in a chat completion; None if the text is no completion or has no words."""
    try:
        completion = json.loads(text)
        words, model = completion["choices"][0]["message"]["content"], completion.get("model")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    return Reply(words, str(model or "")) if isinstance(words, str) and words.strip() else None


def _is_out_of_credit(response: "Response") -> bool:
    """Whether OpenAI's endpoint reports a used-up credit, with the status of a rate limit."""
    return response.status_code == 429 and "insufficient_quota" in response.text


def _error_message(text: str) -> str:
    """Return the message in the body of an error; the whole body if it has none."""
    try:
        error = json.loads(text)["error"]
        return f"{error.get('code') or ''} {error['message']}" if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError, RecursionError):
        return text


def _attempts(error: openai.APIError) -> str:
    count = int(error.request.headers.get("x-stainless-retry-count", 0)) + 1
    return f"(after {count} attempt{'s' if count > 1 else ''})"


def _shorten(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}..."
