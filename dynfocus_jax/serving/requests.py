"""Requests to the engine, and completions from it."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from dynfocus_jax.errors import SampleError
from dynfocus_jax.media.video import Clip
from dynfocus_jax.serving.token_sampling import GREEDY, SamplingParams

Messages = tuple[tuple[str, str], ...]


class Visual(NamedTuple):
    """The visual tokens of one clip, as its prompt made them: `tokens [1, Lv, D]` on the devices.

    count: valid tokens; frames: of the clip.
    focus: bool `[frames]`, which the connector chose; scores: float32 `[frames]`; frame_tokens: int32
    `[frames]`, visual tokens spent on each frame. All None for a connector that chooses no frames.
    """

    tokens: jax.Array
    count: int
    frames: int
    focus: np.ndarray | None
    scores: np.ndarray | None
    frame_tokens: np.ndarray | None


@dataclass(frozen=True)
class Request:
    """A question to be answered.

    messages: ("user", text) and ("assistant", text) in turn; the last is the user's question.
    clip: what it is about, pixels or features; visual: or what `Engine.look` made of it. Neither: text only.
    max_new_tokens: None is `config.generation.max_new_tokens`.
    stop: strings that end the answer. answer_start: words that it is made to begin with, not part of it.
    query: what the text encoder reads; None: of the messages what `config.data.text_guidance` says.
    visual_at_end: the visual tokens stand after the first question, not before it.
    """

    id: str
    messages: Messages
    clip: Clip | None = None
    visual: Visual | None = None
    sampling: SamplingParams = GREEDY
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    answer_start: str = ""
    query: str | None = None
    visual_at_end: bool = False


@dataclass(frozen=True)
class Completion:
    """An answer.

    text: without special tokens and stop string; tokens: all that were generated, the end token included.
    finish_reason: "stop" (end token or stop string) | "length" | "error": there is none, `error` says why.
    visual_tokens, prompt_tokens: what was read, the latter without the former.
    seconds_to_first_token: since `generate` was called. tokens_per_second: of those behind the first; None
      when there are none.
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


def turns_of(messages: Messages) -> tuple[list[tuple[str, str]], str]:
    """The (question, answer) turns so far, and the question.

    Raises:
      SampleError: they are not of user and assistant in turn, or the last is no question.
    """
    roles = [role for role, _ in messages]
    if (
        not messages
        or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]
        or len(roles) % 2 == 0
    ):
        raise SampleError(
            f"the messages are of {', '.join(roles) or 'nobody'}: expected user and assistant in turn, and "
            "the user's question last"
        )
    texts = [text for _, text in messages]
    return list(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1]
