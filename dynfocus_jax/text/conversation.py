"""Conversations as token ids: chat templates, loss masks and the position of the visual tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dynfocus_jax.errors import SampleError, UserError
from dynfocus_jax.text.tokenizers import Tokenizer


@dataclass(frozen=True)
class Template:
    """The literal text around the turns of a conversation.

    A conversation is <bos> system, and for each turn user_prefix question answer_prefix answer <eos>, with
    `between` after every <eos> but the last. The literal text may hold special tokens, the turns may not.

    The visual tokens go before or after the first question, set off by `visual_separator`. As in LLaVA, the
    text before them and the text after them are tokenized apart: a tokenizer that puts a space before a text
    does so after the visual tokens too. An answer is tokenized together with the text before it; the loss
    covers the tokens from the answer's first on, and <eos>.

    The Jinja templates that come with published tokenizers are not used: vicuna_v1 and plain have none, and
    those for llama3 and chatml do not mark answers (`{% generation %}`), which the loss mask needs. The tests
    compare llama3 and chatml with them, by `apply_chat_template` of transformers.
    """

    system: str = ""
    user_prefix: str = ""
    answer_prefix: str = ""
    answer_space: str = ""  # between answer_prefix and the answer; covered by the loss
    between: str = ""
    visual_separator: str = ""
    show_question: bool = True  # False: only the text encoder reads the question, and a sample has one turn
    end: str | None = None  # the end-of-sequence token that the tokenizer must have; None: any


# Vicuna v1.1 and later, as in LLaVA-v1.5. As there, the loss covers each answer from the token after
# "ASSISTANT:" on, and the </s> after it.
_VICUNA = Template(
    system=(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. "
    ),
    user_prefix="USER: ",
    answer_prefix=" ASSISTANT:",
    answer_space=" ",
    visual_separator="\n",
)

TEMPLATES = {
    "plain": Template(answer_space=" "),
    # Captions of the first published stage: visual tokens, then the caption (paper, C.1). A caption ends with
    # the end token, so that generation stops; in the published code it ends with a newline.
    "plain_guided": Template(show_question=False),
    "vicuna_v1": _VICUNA,
    "imgsp_v1": _VICUNA,  # its name in LLaMA-VID, whose second stage is used here
    # Llama 3 and its successors, without a system message. It needs the tokenizer of an Instruct model, whose
    # end token closes a turn.
    "llama3": Template(
        user_prefix="<|start_header_id|>user<|end_header_id|>\n\n",
        answer_prefix="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        visual_separator="\n",
        end="<|eot_id|>",
    ),
    # ChatML of Qwen 2 and 2.5, with their default system message.
    "chatml": Template(
        system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        user_prefix="<|im_start|>user\n",
        answer_prefix="<|im_end|>\n<|im_start|>assistant\n",
        between="\n",
        visual_separator="\n",
        end="<|im_end|>",
    ),
}

GUIDANCE = ("joined", "first_turn", "each_turn")  # text that the text encoder reads, see `query_text`


def check_template(tokenizer: Tokenizer, name: str) -> None:
    """Check that a tokenizer has the special and end tokens of a template; raise UserError if not."""
    template = TEMPLATES[name]
    literal = template.system + template.user_prefix + template.answer_prefix + template.between
    for token in sorted(set(re.findall(r"<\|\w+\|>", literal))):
        if len(tokenizer.encode(token)) != 1 or tokenizer.special_ids.isdisjoint(tokenizer.encode(token)):
            raise UserError(
                f"config.data.template is {name!r}, but {token} is not a special token of the tokenizer; "
                "use the template of the language model, or set config.data.tokenizer to its tokenizer."
            )
    if template.end is not None and tokenizer.encode(template.end) != [tokenizer.eos_id]:
        raise UserError(
            f"config.data.template is {name!r}, which ends answers with {template.end}, but that is not the "
            f"tokenizer's eos_token; set eos_token to {template.end} in its tokenizer_config.json."
        )


class Conversation(NamedTuple):
    """Token ids of a conversation, without visual tokens."""

    tokens: np.ndarray  # int32 [L]
    loss_mask: np.ndarray  # bool [L], True for each answer and its end token
    visual_position: int  # number of tokens before the visual tokens
    ends: tuple[int, ...]  # number of tokens up to the end of each answer


class _Piece(NamedTuple):
    text: str | None  # None: the end-of-sequence token
    in_loss: bool = False
    from_user: bool = False  # text of a turn, not of the template: must not hold special tokens


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
    """Encode the turns of a conversation.

    Args:
      tokenizer: the tokenizer of the language model.
      turns: (question, answer) pairs.
      template: text around the turns, one of `TEMPLATES`.
      max_length: largest number of tokens; a longer conversation is an error, it is never truncated.
      has_visual: whether there are visual tokens.
      visual_at_end: put them after the first question, not before it.
      learn: the answers that the loss covers, "all" or "last".

    Raises:
      SampleError: if there are too many tokens, or a turn holds a special token, such as "</s>".
    """
    conversation = _encode(tokenizer, _render(turns, template, has_visual, visual_at_end))
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
    """Encode a conversation up to the start of its last answer: a prefix of `encode_conversation`.

    Args:
      tokenizer: the tokenizer of the language model.
      question: the question to be answered.
      template: text around the turns, one of `TEMPLATES`.
      history: earlier (question, answer) pairs.
      max_length: as in `encode_conversation`, like `has_visual` and `visual_at_end`.
      answer_start: text that the answer has to begin with; it becomes the end of the prompt.

    Raises:
      SampleError: as `encode_conversation`.
    """
    turns = [*history, (question, None)]
    texts = _render(turns, template, has_visual, visual_at_end)
    if answer_start:
        texts[-1].append(_Piece(template.answer_space + answer_start, from_user=True))
    conversation = _encode(tokenizer, texts)
    _check_length(conversation, max_length)
    return conversation._replace(loss_mask=np.zeros_like(conversation.loss_mask))


def query_text(turns: Sequence[tuple[str, str]], guidance: str = "joined") -> str:
    """Return the questions of a conversation that the text encoder reads.

    Line breaks are kept; the published code removes them, which joins the words on either side.

    Args:
      turns: (question, answer) pairs.
      guidance: "joined" for all questions, "first_turn" for the first one, "each_turn" for the last one
        (with "each_turn", each turn of a conversation becomes a sample that ends with it).
    """
    chosen = {"joined": turns, "first_turn": turns[:1], "each_turn": turns[-1:]}[guidance]
    return " ".join(question for question, _ in chosen)


def _check_length(conversation: Conversation, max_length: int | None) -> None:
    if max_length is not None and len(conversation.tokens) > max_length:
        raise SampleError(
            f"the conversation has {len(conversation.tokens)} text tokens, expected at most {max_length}; "
            "shorten it, or raise max_text"
        )


def _render(
    turns: Sequence[tuple[str, str | None]], template: Template, has_visual: bool, visual_at_end: bool
) -> list[list[_Piece]]:
    """Return the pieces of a conversation's text, or of the two texts around the visual tokens."""
    if not template.show_question and len(turns) > 1:
        raise SampleError(
            f"the conversation has {len(turns)} turns, expected 1, because the template leaves out the "
            "questions; use one turn per sample, or another template"
        )
    texts: list[list[_Piece]] = [[]]
    opening = template.system
    for i, (question, answer) in enumerate(turns):
        before, after = opening + template.user_prefix, template.answer_prefix
        shown = [_Piece(question, from_user=True)] if template.show_question else []
        if has_visual and i == 0 and visual_at_end:
            texts[-1] += [_Piece(before), *shown, _Piece(template.visual_separator)]
            texts.append([_Piece(after)])
        elif has_visual and i == 0:
            texts[-1].append(_Piece(before))
            texts.append([_Piece(template.visual_separator), *shown, _Piece(after)])
        else:
            texts[-1] += [_Piece(before), *shown, _Piece(after)]
        if answer is not None:
            texts[-1].append(_Piece(template.answer_space + answer, in_loss=True, from_user=True))
            texts[-1].append(_Piece(None, in_loss=True))
        opening = template.between
    return texts


def _encode(tokenizer: Tokenizer, texts: list[list[_Piece]]) -> Conversation:
    tokens = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    in_loss = [False] * len(tokens)
    visual_position, ends = len(tokens), []
    for number, pieces in enumerate(texts):
        if number == 1:
            visual_position = len(tokens)
        encoded = tokenizer.encode_parts([piece.text for piece in pieces])
        for piece, ids in zip(pieces, encoded, strict=True):
            if piece.text is not None and piece.from_user and not tokenizer.special_ids.isdisjoint(ids):
                raise SampleError(f"the text {_abbreviate(piece.text)} contains a special token; remove it")
            tokens += ids
            in_loss += [piece.in_loss] * len(ids)
            if piece.text is None:
                ends.append(len(tokens))
    has_visual = len(texts) > 1
    if not has_visual and not tokens:
        raise SampleError("the conversation has neither text nor visual tokens; add a question")
    if not has_visual or visual_position > 0:
        in_loss[0] = False  # no token comes before it that could predict it
    return Conversation(np.asarray(tokens, np.int32), np.asarray(in_loss, bool), visual_position, tuple(ends))


def _abbreviate(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:30] + " ... " + text[-30:])
