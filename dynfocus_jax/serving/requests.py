"""Requests to the engine, and the completions that it returns."""

from dataclasses import dataclass
from typing import NamedTuple

import jax

from dynfocus_jax.errors import SampleError
from dynfocus_jax.media.video import Clip
from dynfocus_jax.serving.programs import FrameFocus
from dynfocus_jax.serving.token_sampling import GREEDY, SamplingParams

Messages = tuple[tuple[str, str], ...]


class EncodedClip(NamedTuple):
    """The visual tokens of one clip, encoded for one question."""

    tokens: jax.Array  # [1, Lv, D], padded, replicated over the devices
    count: int  # valid tokens
    frames: int  # frames of the clip
    focus: FrameFocus | None  # arrays [frames]; None for a connector that chooses no frames


@dataclass(frozen=True)
class Request:
    """A question to be answered, about a clip or without one.

    messages: ("user", text) and ("assistant", text) pairs in turn; the last is the user's question.
    clip: pixels or features to encode.
    encoded: the result of `Engine.encode_clip`, used instead of `clip`.
    max_new_tokens: None takes `config.generation.max_new_tokens`.
    stop: strings that end the answer.
    answer_start: text that the answer must begin with; the completion does not repeat it.
    query: text for the text encoder; None takes it from the messages as `config.data.text_guidance` says.
    visual_at_end: put the visual tokens behind the first question instead of before it.
    """

    id: str
    messages: Messages
    clip: Clip | None = None
    encoded: EncodedClip | None = None
    sampling: SamplingParams = GREEDY
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    answer_start: str = ""
    query: str | None = None
    visual_at_end: bool = False


@dataclass(frozen=True)
class Completion:
    """The answer to a request.

    text: without special tokens and without the stop string.
    tokens: all tokens that were generated, including the end token.
    finish_reason: "stop" (end token or stop string), "length" (max_new_tokens) or "error" (no answer, the
      reason is in `error`).
    visual_tokens, prompt_tokens: tokens of the prompt; the latter counts text only.
    seconds_to_first_token: time since `generate` was called.
    tokens_per_second: speed after the first token; None if there is only one.
    """

    id: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    finish_reason: str = "error"
    visual_tokens: int = 0
    prompt_tokens: int = 0
    seconds_to_first_token: float | None = None
    tokens_per_second: float | None = None
    error: str | None = None


def split_turns(messages: Messages) -> tuple[list[tuple[str, str]], str]:
    """Split messages into the (question, answer) turns so far and the question to be answered.

    Raises:
      SampleError: user and assistant do not alternate, or the last message is not the user's.
    """
    roles = [role for role, _ in messages]
    alternating = [("user", "assistant")[i % 2] for i in range(len(roles))]
    if roles != alternating or len(roles) % 2 == 0:
        raise SampleError(
            f"the roles of the messages are {', '.join(roles) or '(none)'}, expected user and assistant in "
            "turn, ending with the user's question"
        )
    texts = [text for _, text in messages]
    return list(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1]
