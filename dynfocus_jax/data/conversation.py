"""Conversations as tokens: templates, loss masks, and where the visual tokens stand."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


class SampleError(Exception):
    """A sample that cannot be used, in one sentence."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer: ids of the special tokens, and text to ids without them."""

    pad_id: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Template:
    """The literal text around the turns; an answer is always closed by the end-of-sequence token.

    A conversation reads <bos> system and, for each turn, user_prefix question answer_prefix answer <eos>.
    The visual tokens stand before or after the first question, set off by `visual_separator`.
    """

    system: str = ""
    user_prefix: str = ""
    answer_prefix: str = ""
    answer_space: str = ""  # between answer_prefix and the answer; part of what is predicted
    visual_separator: str = ""
    show_question: bool = True  # False: the human text reaches the text encoder only, one turn a sample


TEMPLATES = {
    "plain": Template(visual_separator=" ", answer_prefix=" "),
    # Guided captions of the first published stage: visual tokens, then the caption (paper, C.1).
    "plain_guided": Template(show_question=False),
    # The chat form of Vicuna v1.1 and later, as LLaVA-v1.5 uses it; also known as imgsp_v1.
    "vicuna_v1": Template(
        system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        ),
        user_prefix="USER: ",
        answer_prefix=" ASSISTANT:",
        answer_space=" ",
        visual_separator="\n",
    ),
}


class Conversation(NamedTuple):
    """Token ids of a conversation, without visual tokens."""

    tokens: np.ndarray  # int32 [L]
    loss_mask: np.ndarray  # bool [L], True for answers and the end token of each
    visual_position: int  # number of tokens before the visual tokens


class _Piece(NamedTuple):
    text: str
    predicted: bool = False


_VISUAL = _Piece("<image>")


def encode_conversation(
    tokenizer: Tokenizer,
    turns: Sequence[tuple[str, str]],
    template: Template,
    *,
    max_length: int,
    has_visual: bool = True,
    visual_at_end: bool = False,
) -> Conversation:
    """Tokens of (question, answer) turns; visual tokens go before or after the first question.

    Raises SampleError when the tokens are more than `max_length`: a conversation is never cut.
    """
    conversation = _encode(tokenizer, _pieces(turns, template, has_visual, visual_at_end))
    _check_length(conversation, max_length)
    return conversation


def encode_prompt(
    tokenizer: Tokenizer,
    question: str,
    template: Template,
    history: Sequence[tuple[str, str]] = (),
    *,
    max_length: int | None = None,
    has_visual: bool = True,
    visual_at_end: bool = False,
) -> Conversation:
    """Tokens up to where the answer to `question` starts: a prefix of what `encode_conversation` gives.

    Raises SampleError when the tokens are more than `max_length`.
    """
    turns = [*history, (question, None)]
    conversation = _encode(tokenizer, _pieces(turns, template, has_visual, visual_at_end))
    _check_length(conversation, max_length)
    return conversation._replace(loss_mask=np.zeros_like(conversation.loss_mask))


def query_text(turns: Sequence[tuple[str, str]]) -> str:
    """The human text of a conversation, for the text encoder."""
    return " ".join(question for question, _ in turns)


def _check_length(conversation: Conversation, max_length: int | None) -> None:
    if max_length is not None and len(conversation.tokens) > max_length:
        raise SampleError(
            f"the conversation has {len(conversation.tokens)} text tokens, over the limit of {max_length}: "
            "shorten it or raise the limit"
        )


def _pieces(
    turns: Sequence[tuple[str, str | None]], template: Template, has_visual: bool, visual_at_end: bool
) -> Iterator[_Piece]:
    """The conversation as text; adjoining text is one piece, as a tokenizer may join across its parts."""
    if not template.show_question and len(turns) > 1:
        raise SampleError(
            f"the conversation has {len(turns)} turns, but its template hides the questions: "
            "use one turn a sample or another template"
        )
    text = template.system
    for i, (question, answer) in enumerate(turns):
        text += template.user_prefix
        visual_here = has_visual and i == 0
        shown = question if template.show_question else ""
        if visual_here and visual_at_end:
            yield _Piece(text + shown + template.visual_separator)
            yield _VISUAL
            text = template.answer_prefix
        elif visual_here:
            yield _Piece(text)
            yield _VISUAL
            text = template.visual_separator + shown + template.answer_prefix
        else:
            text += shown + template.answer_prefix
        yield _Piece(text)
        if answer is not None:
            yield _Piece(template.answer_space + answer, predicted=True)
        text = ""


def _encode(tokenizer: Tokenizer, pieces: Iterator[_Piece]) -> Conversation:
    tokens, predicted, visual_position = [tokenizer.bos_id], [False], 1
    for piece in pieces:
        if piece is _VISUAL:
            visual_position = len(tokens)
            continue
        ids = tokenizer.encode(piece.text) if piece.text else []
        if piece.predicted:
            ids = [*ids, tokenizer.eos_id]
        tokens += ids
        predicted += [piece.predicted] * len(ids)
    return Conversation(np.asarray(tokens, np.int32), np.asarray(predicted, bool), visual_position)
