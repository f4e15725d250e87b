"""Token sequences and loss masks of conversations, compared with lists written by hand."""

import numpy as np
import pytest

from dynfocus_jax.errors import SampleError
from dynfocus_jax.text.conversation import TEMPLATES, encode_conversation, encode_prompt, query_text
from dynfocus_jax.text.tokenizers import WordTokenizer

WORDS = WordTokenizer(["what", "where", "?", "red", "disc", "left"])  # ids 4 to 9
BOS, EOS = 1, 2
TURNS = [("what ?", "red disc"), ("where ?", "left")]


class Characters:
    """A tokenizer with one token per character, so that sequences are legible."""

    pad_id, bos_id, eos_id = 0, 1, 2
    special_ids = frozenset()

    def encode_parts(self, parts):
        return [[self.eos_id] if part is None else [3 + ord(c) for c in part] for part in parts]

    def text(self, tokens):
        return "".join({1: "<s>", 2: "</s>"}.get(t) or chr(t - 3) for t in tokens)


def test_plain():
    got = encode_conversation(WORDS, TURNS, TEMPLATES["plain"], max_length=11)
    assert got.tokens.tolist() == [BOS, 4, 6, 7, 8, EOS, 5, 6, 9, EOS]
    assert got.loss_mask.astype(int).tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    assert got.visual_position == 1
    assert (got.tokens.dtype, got.loss_mask.dtype) == (np.int32, bool)


def test_plain_with_visual_tokens_after_the_first_question():
    got = encode_conversation(WORDS, TURNS, TEMPLATES["plain"], max_length=11, visual_at_end=True)
    assert got.tokens.tolist() == [BOS, 4, 6, 7, 8, EOS, 5, 6, 9, EOS]
    assert got.visual_position == 3


def test_plain_guided_leaves_out_the_question():
    got = encode_conversation(WORDS, TURNS[:1], TEMPLATES["plain_guided"], max_length=4)
    assert got.tokens.tolist() == [BOS, 7, 8, EOS]
    assert got.loss_mask.astype(int).tolist() == [0, 1, 1, 1]
    assert got.visual_position == 1
    with pytest.raises(SampleError, match="2 turns"):
        encode_conversation(WORDS, TURNS, TEMPLATES["plain_guided"], max_length=99)


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({}, "<image>\nwhat ?"),
        ({"visual_at_end": True}, "what ?\n<image>"),
        ({"has_visual": False}, "what ?"),
    ],
)
def test_vicuna_equals_the_published_text(options, first):
    tokenizer = Characters()
    got = encode_conversation(tokenizer, TURNS, TEMPLATES["vicuna_v1"], max_length=999, **options)
    before, after = (tokenizer.text(part) for part in np.split(got.tokens, [got.visual_position]))
    marker = "<image>" if options.get("has_visual", True) else ""
    chat = f"{SYSTEM} USER: {first} ASSISTANT: red disc</s>USER: where ? ASSISTANT: left</s>"
    assert before + marker + after == "<s>" + chat
    predicted = [
        tokenizer.text(run) for run in np.split(got.tokens, np.flatnonzero(np.diff(got.loss_mask)) + 1)
    ]
    assert predicted[1::2] == [" red disc</s>", " left</s>"]
    assert not got.loss_mask[0]


@pytest.mark.parametrize("name", ["plain", "vicuna_v1"])
@pytest.mark.parametrize("options", [{}, {"visual_at_end": True}, {"has_visual": False}])
@pytest.mark.parametrize("tokenizer", [WORDS, Characters()])
@pytest.mark.parametrize("turns", [TURNS, TURNS[:1]])
def test_prompt_is_a_prefix_of_the_conversation(name, options, tokenizer, turns):
    if name == "vicuna_v1" and tokenizer is WORDS:
        tokenizer = WordTokenizer(["what", "where", "?", "red", "disc", "left"], strict=False)
    template, (*history, (question, _)) = TEMPLATES[name], turns
    whole = encode_conversation(tokenizer, turns, template, max_length=999, **options)
    prompt = encode_prompt(tokenizer, question, template, history, **options)
    answer_start = np.flatnonzero(np.diff(whole.loss_mask.astype(int)) == 1)[-1] + 1
    assert prompt.tokens.tolist() == whole.tokens[:answer_start].tolist()
    assert prompt.visual_position == whole.visual_position
    assert not prompt.loss_mask.any()


def test_guided_prompt_is_a_prefix_of_the_conversation():
    prompt = encode_prompt(WORDS, "what ?", TEMPLATES["plain_guided"])
    assert (prompt.tokens.tolist(), prompt.visual_position) == ([BOS], 1)


def test_too_long_conversations_raise():
    assert len(encode_conversation(WORDS, TURNS, TEMPLATES["plain"], max_length=10).tokens) == 10
    with pytest.raises(SampleError, match="10 text tokens, expected at most 9"):
        encode_conversation(WORDS, TURNS, TEMPLATES["plain"], max_length=9)
    assert len(encode_prompt(WORDS, "what ?", TEMPLATES["plain"], max_length=3).tokens) == 3
    with pytest.raises(SampleError, match="3 text tokens, expected at most 2"):
        encode_prompt(WORDS, "what ?", TEMPLATES["plain"], max_length=2)


def test_special_token_in_a_turn_raises():
    words = WordTokenizer(["what", "red"], strict=False)
    for turn in (("what <eos>", "red"), ("what", "<bos> red"), ("<pad>", "red")):
        with pytest.raises(SampleError, match="contains a special token"):
            encode_conversation(words, [turn], TEMPLATES["plain"], max_length=9)
    got = encode_conversation(words, [("<unk> mauve", "red")], TEMPLATES["plain"], max_length=9)
    assert got.tokens.tolist() == [BOS, 3, 3, 5, EOS]


def test_query_text_joins_the_questions():
    assert query_text(TURNS) == "what ? where ?"
