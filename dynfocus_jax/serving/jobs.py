"""Requests in progress: encoded prompt, padded sizes, the answer so far, and why it ended."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from dynfocus_jax.serving.answer_text import AnswerText
from dynfocus_jax.serving.requests import Completion, EncodedClip, Request
from dynfocus_jax.text.conversation import Conversation


@dataclass
class Job:
    """A request in progress."""

    number: int  # position in the call of `Engine.generate`
    request: Request
    prompt: Conversation
    query: str  # text for the text encoder
    text_size: int  # text tokens, padded
    visual_size: int  # visual tokens, padded
    max_tokens: int  # of the answer
    answer: AnswerText
    encoded: EncodedClip | None = None
    finish_reason: str | None = None  # None while it is being answered
    error: str | None = None  # why it cannot be answered
    text: str = ""  # set when the answer is complete
    token_times: list[float] = field(default_factory=list)  # of the first and of the latest token

    @property
    def visual_count(self) -> int:
        """Visual tokens without padding."""
        return 0 if self.encoded is None else self.encoded.count

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the longest possible answer, without padding."""
        return self.visual_count + len(self.prompt.tokens) + self.max_tokens

    @property
    def running(self) -> bool:
        """Whether the answer has not ended yet."""
        return self.finish_reason is None and self.error is None

    def add_token(self, token: int, end_ids: Collection[int]) -> None:
        """Append a token to the answer; end it at an end token, a stop string or its maximum length."""
        self.token_times[1:] = [time.perf_counter()]
        self.answer.add(token)
        if token in end_ids or self.answer.stopped:
            self.finish_reason = "stop"
        elif len(self.answer.tokens) == self.max_tokens:
            self.finish_reason = "length"
        if not self.running:
            self.text = self.answer.finish()

    def completion(self, started: float) -> Completion:
        """Return the completion of an answer that has ended; `started` is the clock at the call."""
        if self.finish_reason is None:
            return Completion(self.request.id, error=self.error)
        count, (first, last) = len(self.answer.tokens), (self.token_times[0], self.token_times[-1])
        return Completion(
            self.request.id,
            self.text,
            tuple(self.answer.tokens),
            self.finish_reason,
            self.visual_count,
            len(self.prompt.tokens),
            seconds_to_first_token=first - started,
            tokens_per_second=(count - 1) / (last - first) if count > 1 else None,
        )
