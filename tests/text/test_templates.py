"""Chat templates, compared with token sequences written by hand and with the published Jinja templates."""

import json

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from dynfocus_jax.data.prepare import make_tokenizer
from dynfocus_jax.errors import SampleError, UserError
from dynfocus_jax.text.conversation import (
    TEMPLATES,
    check_template,
    encode_conversation,
    encode_prompt,
    query_text,
)
from dynfocus_jax.text.tokenizer_files import read_tokenizer
from dynfocus_jax.text.tokenizers import WordTokenizer
from tests.tiny import tiny_config

WORDS = (
    *("user", "assistant", "system", "You", "Ġare", "Ġa", "Ġhelpful", "what", "Ġshape", "Ġred"),
    *("Ġdisc", "where", "left", "ĊĊ"),
)
TURNS = (("what shape ?", "a red disc"), ("where ?", "left"))

# Regular expressions by which the published models split text before merging bytes.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")

SPECIALS = {
    "llama3": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    "chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}

# One word per token; "*" marks tokens in the loss mask, "|" the position of the visual tokens.
EXPECTED = {
    ("llama3", "visual first"): """
        <|begin_of_text|> <|start_header_id|> user <|end_header_id|> ĊĊ
        | Ċ what Ġshape Ġ ? <|eot_id|> <|start_header_id|> assistant <|end_header_id|> ĊĊ
        *a *Ġred *Ġdisc *<|eot_id|>
        <|start_header_id|> user <|end_header_id|> ĊĊ
        where Ġ ? <|eot_id|> <|start_header_id|> assistant <|end_header_id|> ĊĊ *left *<|eot_id|>
    """,
    ("llama3", "visual last"): """
        <|begin_of_text|> <|start_header_id|> user <|end_header_id|> ĊĊ
        what Ġshape Ġ ? Ċ | <|eot_id|> <|start_header_id|> assistant <|end_header_id|> ĊĊ
        *a *Ġred *Ġdisc *<|eot_id|>
        <|start_header_id|> user <|end_header_id|> ĊĊ
        where Ġ ? <|eot_id|> <|start_header_id|> assistant <|end_header_id|> ĊĊ *left *<|eot_id|>
    """,
    ("llama3", "text only"): """
        <|begin_of_text|> | <|start_header_id|> user <|end_header_id|> ĊĊ
        what Ġshape Ġ ? <|eot_id|> <|start_header_id|> assistant <|end_header_id|> ĊĊ
        *a *Ġred *Ġdisc *<|eot_id|>
        <|start_header_id|> user <|end_header_id|> ĊĊ
        where Ġ ? <|eot_id|> <|start_header_id|> assistant <|end_header_id|> ĊĊ *left *<|eot_id|>
    """,
    ("chatml", "visual first"): """
        <|im_start|> system Ċ You Ġare Ġa Ġhelpful Ġ assistant . <|im_end|> Ċ
        <|im_start|> user Ċ | Ċ what Ġshape Ġ ? <|im_end|> Ċ
        <|im_start|> assistant Ċ *a *Ġred *Ġdisc *<|im_end|> Ċ
        <|im_start|> user Ċ where Ġ ? <|im_end|> Ċ
        <|im_start|> assistant Ċ *left *<|im_end|>
    """,
    ("chatml", "visual last"): """
        <|im_start|> system Ċ You Ġare Ġa Ġhelpful Ġ assistant . <|im_end|> Ċ
        <|im_start|> user Ċ what Ġshape Ġ ? Ċ | <|im_end|> Ċ
        <|im_start|> assistant Ċ *a *Ġred *Ġdisc *<|im_end|> Ċ
        <|im_start|> user Ċ where Ġ ? <|im_end|> Ċ
        <|im_start|> assistant Ċ *left *<|im_end|>
    """,
    ("chatml", "text only"): """
        | <|im_start|> system Ċ You Ġare Ġa Ġhelpful Ġ assistant . <|im_end|> Ċ
        <|im_start|> user Ċ what Ġshape Ġ ? <|im_end|> Ċ
        <|im_start|> assistant Ċ *a *Ġred *Ġdisc *<|im_end|> Ċ
        <|im_start|> user Ċ where Ġ ? <|im_end|> Ċ
        <|im_start|> assistant Ċ *left *<|im_end|>
    """,
}
PLACES = {"visual first": {}, "visual last": {"visual_at_end": True}, "text only": {"has_visual": False}}

# chat_template of Meta-Llama-3-8B-Instruct and of Qwen2-7B-Instruct
JINJA = {
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}",
    "chatml": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ "
    "'<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}


def chat_folder(folder, template):
    """Write a tokenizer in the format of a published model; its tokens are the bytes and `WORDS`."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary.setdefault(word[:end], len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges))))
    split = pre_tokenizers.Split(Regex(LLAMA_3 if template == "llama3" else QWEN_2), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS[template]))
    if template == "llama3":
        bos = SPECIALS[template][0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        names = {"bos_token": bos, "eos_token": "<|eot_id|>"}
    else:
        names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    names["chat_template"] = JINJA[template]
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    return {template: chat_folder(root / template, template) for template in SPECIALS}


@pytest.mark.parametrize(("template", "place"), EXPECTED)
def test_tokens(folders, template, place):
    tokenizer = read_tokenizer(folders[template])
    words = Tokenizer.from_file(str(folders[template] / "tokenizer.json"))
    got = encode_conversation(tokenizer, TURNS, TEMPLATES[template], **PLACES[place])
    tokens = [
        "*" * int(in_loss) + words.id_to_token(token)
        for token, in_loss in zip(got.tokens.tolist(), got.loss_mask, strict=True)
    ]
    tokens.insert(got.visual_position, "|")
    assert tokens == EXPECTED[template, place].split()
    ends = [i for i, token in enumerate(token for token in tokens if token != "|") if token[:2] == "*<"]
    assert got.ends == tuple(end + 1 for end in ends)


@pytest.mark.parametrize("template", SPECIALS)
def test_against_published_jinja_templates(folders, template):
    """Token ids are equal, except that we omit the line break after the last end token."""
    published = AutoTokenizer.from_pretrained(folders[template], local_files_only=True)
    roles = ("user", "assistant")
    turns = [("what shape ?\n\n1 dog's <b>", "a naïve\ncafé ☃"), ("where ?", "left")]
    messages = [
        {"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)
    ]
    tokenizer = read_tokenizer(folders[template])
    options = {"has_visual": False}

    def ids(messages, **choice):
        return published.apply_chat_template(messages, return_dict=False, **choice)

    whole = encode_conversation(tokenizer, turns, TEMPLATES[template], **options).tokens.tolist()
    assert whole == ids(messages)[: len(whole)]
    assert published.decode(ids(messages)[len(whole) :]) == ("" if template == "llama3" else "\n")
    prompt = encode_prompt(tokenizer, "where ?", TEMPLATES[template], turns[:1], **options)
    assert prompt.tokens.tolist() == ids(messages[:3], add_generation_prompt=True)


@pytest.mark.parametrize("template", SPECIALS)
@pytest.mark.parametrize("place", PLACES)
def test_conversation_of_the_first_turns_is_a_prefix(folders, template, place):
    tokenizer, form = read_tokenizer(folders[template]), TEMPLATES[template]
    turns = (*TURNS, ("", "what\n"), ("\n1  2", " left"))
    whole = encode_conversation(tokenizer, turns, form, **PLACES[place])
    for number, end in enumerate(whole.ends, 1):
        part = encode_conversation(tokenizer, turns[:number], form, **PLACES[place])
        assert part.tokens.tolist() == whole.tokens[:end].tolist()
        assert part.loss_mask.tolist() == whole.loss_mask[:end].tolist()
        last = encode_conversation(tokenizer, turns[:number], form, learn="last", **PLACES[place])
        begin = 0 if number == 1 else whole.ends[number - 2]
        assert last.tokens.tolist() == part.tokens.tolist()
        assert not last.loss_mask[:begin].any()
        assert last.loss_mask[begin:].tolist() == part.loss_mask[begin:].tolist()


def test_vicuna_tokens():
    """The template exists under Vicuna's name and LLaMA-VID's."""
    text = """
        a chat between a curious user and an artificial intelligence assistant. the assistant gives helpful,
        detailed, and polite answers to the user's questions. user: | what shape ?
        assistant: *a *red *disc *<eos> user: where ? assistant: *left *<eos>
    """
    chat = text.split()
    words = list(dict.fromkeys(word.lstrip("*") for word in chat if word != "|" and "<" not in word))
    tokenizer = WordTokenizer(words)
    for name in ("vicuna_v1", "imgsp_v1"):
        got = encode_conversation(tokenizer, TURNS, TEMPLATES[name])
        tokens = [
            "*" * int(in_loss) + tokenizer.decode([token], skip_special=False)
            for token, in_loss in zip(got.tokens, got.loss_mask, strict=True)
        ]
        tokens.insert(got.visual_position, "|")
        assert tokens == ["<bos>", *chat]


def test_special_tokens_in_turns_raise(folders):
    for template, special in (("llama3", "<|eot_id|>"), ("chatml", "<|im_end|>")):
        tokenizer = read_tokenizer(folders[template])
        for turn in ((f"what {special}", "left"), ("what", f"left{special}")):
            with pytest.raises(SampleError, match="contains a special token"):
                encode_conversation(tokenizer, [turn], TEMPLATES[template])


def test_check_template(folders, tmp_path):
    llama, qwen = (read_tokenizer(folders[name]) for name in ("llama3", "chatml"))
    check_template(llama, "llama3")
    check_template(qwen, "chatml")
    for name in ("plain", "plain_guided", "vicuna_v1", "imgsp_v1"):
        check_template(llama, name)
    with pytest.raises(UserError, match=r"template is 'chatml', but <\|im_end\|> is not a special token"):
        check_template(llama, "chatml")
    with pytest.raises(UserError, match=r"template is 'llama3', but <\|end_header_id\|> is not a special"):
        check_template(qwen, "llama3")
    config = tiny_config()
    config.model.language.vocab_size = config.model.text_encoder.vocab_size = 1000
    config.data.update({"template": "chatml", "tokenizer": str(folders["chatml"])})
    assert make_tokenizer(config, tmp_path / "none").eos_id == qwen.eos_id
    folder = chat_folder(tmp_path / "base", "chatml")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    config.data.tokenizer = str(folder)
    with pytest.raises(
        UserError, match=r"ends answers with <\|im_end\|>, but that is not the tokenizer's eos"
    ):
        make_tokenizer(config, tmp_path / "none")


def test_query_text():
    assert query_text(TURNS) == query_text(TURNS, "joined") == "what shape ? where ?"
    assert query_text(TURNS, "first_turn") == "what shape ?"
    assert query_text(TURNS, "each_turn") == "where ?"
    assert (
        np.unique([query_text(TURNS[:1], name) for name in ("joined", "first_turn", "each_turn")]).size == 1
    )
