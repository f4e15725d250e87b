"""Conversations as tokens: templates, loss masks, and where the visual tokens stand."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from dynfocus_jax.errors import SampleError, UserError


class Tokenizer(Protocol):
    """What is needed of a tokenizer: ids of the special tokens, and text to ids without them."""

    pad_id: int
    bos_id: int | None  # None: nothing stands before a text
    eos_id: int
    special_ids: frozenset[int]  # those that no text may hold

    def encode(self, text: str) -> list[int]:
        """Ids of a text alone."""

    def encode_parts(self, parts: Sequence[str | None]) -> list[list[int]]:
        """Ids of each part of one text, encoded as a whole; None is the end-of-sequence token."""

    def encode_query(self, text: str, max_length: int) -> list[int]:
        """Ids of a question for the text encoder, at most `max_length`: the end of a longer one."""


@dataclass(frozen=True)
class Template:
    """The literal text around the turns; an answer is always closed by the end-of-sequence token.

    A conversation reads <bos> system and, for each turn, user_prefix question answer_prefix answer <eos>;
    `between` stands after every <eos> but the last. The visual tokens are before or after the first question,
    set off by `visual_separator`. What stands before them and what stands after them are two texts for the
    tokenizer, as in LLaVA: a tokenizer that marks the start of a text with a space does so after the visual
    tokens too. An answer is not a text of its own: the tokens are those of question and answer together,
    predicted from the answer's first on. The literal text may hold special tokens, the turns may not.
    """

    system: str = ""
    user_prefix: str = ""
    answer_prefix: str = ""
    answer_space: str = ""  # between answer_prefix and the answer; part of what is predicted
    between: str = ""
    visual_separator: str = ""
    show_question: bool = True  # False: the human text reaches the text encoder only, one turn a sample
    end: str | None = None  # what the end-of-sequence token must be; None: that of any tokenizer


# The chat form of Vicuna v1.1 and later, as LLaVA-v1.5 uses it. The loss covers what it covers there: each
# answer from the token after "ASSISTANT:" on, and the </s> behind it.
_VICUNA = Template(
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    ),
    user_prefix="USER: ",
    answer_prefix=" ASSISTANT:",
    answer_space=" ",
    visual_separator="\n",
)

TEMPLATES = {
    "plain": Template(answer_space=" "),
    # Guided captions of the first published stage: visual tokens, then the caption (paper, C.1). The
    # published code closes a caption with a newline; here it is the end token, so that an answer can end.
    "plain_guided": Template(show_question=False),
    "vicuna_v1": _VICUNA,
    "imgsp_v1": _VICUNA,  # its name in LLaMA-VID, from which the second published stage is taken
    # Llama 3 and its successors, as their published chat template without a system message; for a tokenizer
    # of the Instruct models, whose end token closes a turn.
    "llama3": Template(
        user_prefix="<|start_header_id|>user<|end_header_id|>\n\n",
        answer_prefix="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        visual_separator="\n",
        end="<|eot_id|>",
    ),
    # ChatML as Qwen 2 and 2.5 are published with it, default system message included.
    "chatml": Template(
        system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        user_prefix="<|im_start|>user\n",
        answer_prefix="<|im_end|>\n<|im_start|>assistant\n",
        between="\n",
        visual_separator="\n",
        end="<|im_end|>",
    ),
}

GUIDANCE = ("joined", "first_turn", "each_turn")  # what the text encoder reads, see `query_text`


def check_template(tokenizer: Tokenizer, name: str) -> None:
    """Whether a tokenizer has the special tokens of a template, and ends its answers as the template does.

    Raises:
      UserError: it has not.
    """
    template = TEMPLATES[name]
    literal = template.system + template.user_prefix + template.answer_prefix + template.between
    for token in sorted(set(re.findall(r"<\|\w+\|>", literal))):
        if len(tokenizer.encode(token)) != 1 or tokenizer.special_ids.isdisjoint(tokenizer.encode(token)):
            raise UserError(
                f"config.data.template is {name!r}, but {token} is no special token of the tokenizer; choose "
                "the template of the language model, or its tokenizer in config.data.tokenizer."
            )
    if template.end is not None and tokenizer.encode(template.end) != [tokenizer.eos_id]:
        raise UserError(
            f"config.data.template is {name!r}, which closes answers with {template.end}, but that is not "
            "the tokenizer's eos_token; set it in its tokenizer_config.json, as the chat models have it."
        )


class Conversation(NamedTuple):
    """Token ids of a conversation, without visual tokens."""

    tokens: np.ndarray  # int32 [L]
    loss_mask: np.ndarray  # bool [L], True for answers and the end token of each
    visual_position: int  # number of tokens before the visual tokens
    ends: tuple[int, ...]  # number of tokens up to the end of each answer: of the conversation cut there


class _Piece(NamedTuple):
    text: str | None  # None: the end-of-sequence token
    predicted: bool = False
    said: bool = False  # by somebody, in contrast to the template


def encode_conversation(
    tokenizer: Tokenizer,
    turns: Sequence[tuple[str, str]],
    template: Template,
    *,
    max_length: int | None = None,
    has_visual: bool = True,
    visual_at_end: bool = False,
    learn: str = "all",
) -> Conversation:
    """Tokens of (question, answer) turns; visual tokens go before or after the first question.

    learn: the answers of the loss mask, "all" or the "last" one.
    Raises SampleError when the tokens are more than `max_length` (a conversation is never cut), or when a
    text holds a special token, such as a literal "</s>".
    """
    conversation = _encode(tokenizer, _chunks(turns, template, has_visual, visual_at_end))
    _check_length(conversation, max_length)
    if learn == "last":
        conversation.loss_mask[: conversation.ends[-2] if len(conversation.ends) > 1 else 0] = False
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
    answer_start: str = "",
) -> Conversation:
    """Tokens up to where the answer to `question` starts: a prefix of what `encode_conversation` gives.

    answer_start: words that the answer is made to begin with, at the end of the prompt then.
    Raises SampleError as `encode_conversation` does.
    """
    turns = [*history, (question, None)]
    chunks = _chunks(turns, template, has_visual, visual_at_end)
    if answer_start:
        chunks[-1].append(_Piece(template.answer_space + answer_start, said=True))
    conversation = _encode(tokenizer, chunks)
    _check_length(conversation, max_length)
    return conversation._replace(loss_mask=np.zeros_like(conversation.loss_mask))


def query_text(turns: Sequence[tuple[str, str]], guidance: str = "joined") -> str:
    """The human text of a conversation, for the text encoder: `guidance` is one of `GUIDANCE`.

    "joined": all questions; "first_turn": the first one only; "each_turn": the last one, as each turn of a
    conversation is a sample then, of which it is the last.
    Line breaks stay and separate words; the published code removes them, so that words may run together.
    """
    chosen = {"joined": turns, "first_turn": turns[:1], "each_turn": turns[-1:]}[guidance]
    return " ".join(question for question, _ in chosen)


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
        before, after = text + template.user_prefix, template.answer_prefix
        said = [_Piece(question, said=True)] if template.show_question else []
        if has_visual and i == 0 and visual_at_end:
            chunks[-1] += [_Piece(before), *said, _Piece(template.visual_separator)]
            chunks.append([_Piece(after)])
        elif has_visual and i == 0:
            chunks[-1].append(_Piece(before))
            chunks.append([_Piece(template.visual_separator), *said, _Piece(after)])
        else:
            chunks[-1] += [_Piece(before), *said, _Piece(after)]
        if answer is not None:
            answer = _Piece(template.answer_space + answer, predicted=True, said=True)
            chunks[-1] += [answer, _Piece(None, predicted=True)]
        text = template.between
    return chunks


def _encode(tokenizer: Tokenizer, chunks: list[list[_Piece]]) -> Conversation:
    tokens = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    predicted = [False] * len(tokens)
    visual_position, ends = len(tokens), []
    for number, chunk in enumerate(chunks):
        if number == 1:
            visual_position = len(tokens)
        encoded = tokenizer.encode_parts([piece.text for piece in chunk])
        for piece, ids in zip(chunk, encoded, strict=True):
            if piece.said and not tokenizer.special_ids.isdisjoint(ids):
                raise SampleError(f"the text {_short(piece.text)} holds a special token: leave it out")
            tokens += ids
            predicted += [piece.predicted] * len(ids)
            if piece.text is None:
                ends.append(len(tokens))
    if len(chunks) == 1 and not tokens:
        raise SampleError("the conversation has neither text nor visual tokens: ask a question")
    if len(chunks) == 1 or visual_position > 0:
        predicted[0] = False  # nothing stands before it from which it could be predicted
    return Conversation(
        np.asarray(tokens, np.int32), np.asarray(predicted, bool), visual_position, tuple(ends)
    )


def _short(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:30] + " ... " + text[-30:])
