"""Conversations as tokens: templates, loss masks, and where the visual tokens stand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


class SampleError(Exception):
    """A sample that cannot be used, in one sentence."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer: ids of the special tokens, and text to ids without them."""

    pad_id: int
    bos_id: int | None  # None: nothing stands before a text
    eos_id: int
    special_ids: frozenset[int]  # those that no text may hold

    def encode_parts(self, parts: Sequence[str | None]) -> list[list[int]]:
        """Ids of each part of one text, encoded as a whole; None is the end-of-sequence token."""

    def encode_query(self, text: str, max_length: int) -> list[int]:
        """Ids of a question for the text encoder, at most `max_length`: the end of a longer one."""


@dataclass(frozen=True)
class Template:
    """The literal text around the turns; an answer is always closed by the end-of-sequence token.

    A conversation reads <bos> system and, for each turn, user_prefix question answer_prefix answer <eos>.
    The visual tokens stand before or after the first question, set off by `visual_separator`. What stands
    before them and what stands after them are two texts for the tokenizer, as in LLaVA: a tokenizer that
    marks the start of a text with a space does so after the visual tokens too. An answer is not a text of
    its own: the tokens are those of question and answer together, predicted from the answer's first on.
    """

    system: str = ""
    user_prefix: str = ""
    answer_prefix: str = ""
    answer_space: str = ""  # between answer_prefix and the answer; part of what is predicted
    visual_separator: str = ""
    show_question: bool = True  # False: the human text reaches the text encoder only, one turn a sample


TEMPLATES = {
    "plain": Template(answer_space=" "),
    # Guided captions of the first published stage: visual tokens, then the caption (paper, C.1). The
    # published code closes a caption with a newline; here it is the end token, so that an answer can end.
    "plain_guided": Template(show_question=False),
    # The chat form of Vicuna v1.1 and later, as LLaVA-v1.5 uses it; also known as imgsp_v1. The loss covers
    # what it covers there: each answer from the token after "ASSISTANT:" on, and the </s> behind it.
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
    text: str | None  # None: the end-of-sequence token
    predicted: bool = False


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

    Raises SampleError when the tokens are more than `max_length` (a conversation is never cut), or when a
    text holds a special token, such as a literal "</s>".
    """
    conversation = _encode(tokenizer, _chunks(turns, template, has_visual, visual_at_end))
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

    Raises SampleError as `encode_conversation` does.
    """
    turns = [*history, (question, None)]
    conversation = _encode(tokenizer, _chunks(turns, template, has_visual, visual_at_end))
    _check_length(conversation, max_length)
    return conversation._replace(loss_mask=np.zeros_like(conversation.loss_mask))


def query_text(turns: Sequence[tuple[str, str]]) -> str:
    """The human text of a conversation, for the text encoder.

    Line breaks stay and separate words; the published code removes them, so that words may run together.
    """
    return " ".join(question for question, _ in turns)


def _check_length(conversation: Conversation, max_length: int | None) -> None:
    if max_length is not None and len(conversation.tokens) > max_length:
        raise SampleError(
            f"the conversation has {len(conversation.tokens)} text tokens, over the limit of {max_length}: "
            "shorten it or raise the limit"
        )


def _chunks(
    turns: Sequence[tuple[str, str | None]], template: Template, has_visual: bool, visual_at_end: bool
) -> list[list[_Piece]]:
    """The conversation as text: one chunk, or two with the visual tokens between them."""
    if not template.show_question and len(turns) > 1:
        raise SampleError(
            f"the conversation has {len(turns)} turns, but its template hides the questions: "
            "use one turn a sample or another template"
        )
    chunks, text = [[]], template.system
    for i, (question, answer) in enumerate(turns):
        text += template.user_prefix
        visual_here = has_visual and i == 0
        shown = question if template.show_question else ""
        if visual_here and visual_at_end:
            chunks[-1].append(_Piece(text + shown + template.visual_separator))
            chunks.append([])
            text = template.answer_prefix
        elif visual_here:
            chunks[-1].append(_Piece(text))
            chunks.append([])
            text = template.visual_separator + shown + template.answer_prefix
        else:
            text += shown + template.answer_prefix
        chunks[-1].append(_Piece(text))
        if answer is not None:
            chunks[-1] += [
                _Piece(template.answer_space + answer, predicted=True),
                _Piece(None, predicted=True),
            ]
        text = ""
    return chunks


def _encode(tokenizer: Tokenizer, chunks: list[list[_Piece]]) -> Conversation:
    tokens = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    predicted = [False] * len(tokens)
    visual_position = len(tokens)
    for number, chunk in enumerate(chunks):
        if number == 1:
            visual_position = len(tokens)
        encoded = tokenizer.encode_parts([piece.text for piece in chunk])
        for piece, ids in zip(chunk, encoded, strict=True):
            if piece.text is not None and not tokenizer.special_ids.isdisjoint(ids):
                raise SampleError(f"the text {_short(piece.text)} holds a special token: leave it out")
            tokens += ids
            predicted += [piece.predicted] * len(ids)
    if len(chunks) == 1 and not tokens:
        raise SampleError("the conversation has neither text nor visual tokens: ask a question")
    if len(chunks) == 1 or visual_position > 0:
        predicted[0] = False  # nothing stands before it from which it could be predicted
    return Conversation(np.asarray(tokens, np.int32), np.asarray(predicted, bool), visual_position)


def _short(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:30] + " ... " + text[-30:])
