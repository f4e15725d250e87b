"""Tokenizers read from files, compared with SentencePiece, transformers and LLaVA's conversations."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from dynfocus_jax.data.budget import Budget
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.prepare import make_tokenizer
from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.errors import SampleError, UserError
from dynfocus_jax.records.records import Record
from dynfocus_jax.text.conversation import TEMPLATES, encode_conversation, encode_prompt
from dynfocus_jax.text.tokenizer_files import read_query_tokenizer, read_tokenizer
from tests.text.published_tokenizers import (
    bert_folder,
    byte_pairs,
    gguf_file,
    llama_folder,
    qwen_folder,
    write_json,
)
from tests.tiny import tiny_config

REPOSITORY = Path(__file__).resolve().parents[2]
TURNS = [("what shape is red?", "a red disc"), ("which came first,\nred or blue ?", "12 dogs; naïve ☃")]
CHAT = TEMPLATES["vicuna_v1"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    llama_folder(root / "vicuna", legacy=False)
    shutil.copytree(root / "vicuna", root / "vicuna_legacy")
    write_json(root / "vicuna_legacy" / "tokenizer_config.json", {"legacy": True})
    shutil.copytree(root / "vicuna", root / "vicuna_bare")
    (root / "vicuna_bare" / "tokenizer_config.json").unlink()
    qwen_folder(root / "qwen")
    bert_folder(root / "bert")
    return root


def random_texts(count, letters="abcdehrstUSER:? \n\t12'é☃是▁"):
    rng = random.Random(0)
    return ["".join(rng.choices(letters, k=rng.randrange(25))) for _ in range(count)]


def joined(parts):
    return [i for part in parts for i in part]


class ReferenceLlamaTokenizer:
    """Llama's original tokenizer, by SentencePiece alone; a legacy one adds a space to text after </s>."""

    def __init__(self, folder, legacy):
        content = (folder / "tokenizer.model").read_bytes()
        self.start = sentencepiece.SentencePieceProcessor(model_proto=content)
        model = sentencepiece_model_pb2.ModelProto.FromString(content)
        model.normalizer_spec.add_dummy_prefix = False
        bare = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self.inner = self.start if legacy else bare

    def __call__(self, text):
        first, *rest = text.split("</s>")
        return [1, *self.start.encode(first), *(i for part in rest for i in (2, *self.inner.encode(part)))]


@pytest.mark.parametrize("name", ["vicuna", "vicuna_legacy", "vicuna_bare"])
def test_vicuna_against_sentencepiece(folders, name):
    """A tokenizer without tokenizer_config.json, or without `legacy` in it, is a legacy one."""
    tokenizer, slow = (
        read_tokenizer(folders / name),
        ReferenceLlamaTokenizer(folders / "vicuna", name != "vicuna"),
    )
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (1, 2, 0, 0)
    assert tokenizer.vocab_size == slow.start.vocab_size()
    assert tokenizer.special_ids == {1, 2}
    texts = random_texts(400)
    for one, two in zip(texts[::2], texts[1::2], strict=True):
        assert tokenizer.encode(one) == slow(one)[1:]
        assert tokenizer.decode(slow(one)) == slow.start.decode(slow(one)).strip()
        if one:  # text, end token, text
            parts = tokenizer.encode_parts([one[:7], one[7:], None, two])
            assert [1, *joined(parts)] == slow(f"{one}</s>{two}")
    assert tokenizer.encode_parts([""]) == [[]]


def llava(slow, turns, *, at_end=False, image=True):
    """Return a conversation's token ids in LLaVA v1.5, with -200 for the image, and its loss mask.

    As in the published code, the prompt is one string, and the texts before and after <image> are tokenized
    separately, without <s>. The same function counts the tokens of a round and of its instruction; from the
    latter, two are subtracted for <s> and the space before the answer. `slow` is a legacy tokenizer.
    """

    def image_tokens(text):
        chunks = [slow(chunk) for chunk in text.split("<image>")]
        ids = chunks[0]
        for chunk in chunks[1:]:
            ids = [*ids, -200, *chunk[1:]]
        return ids

    (question, answer), *rest = turns
    if image:
        question = f"{question}\n<image>" if at_end else f"<image>\n{question}"
    rounds = [f"USER: {q} ASSISTANT: {a}" for q, a in [(question, answer), *rest]]
    rounds[0] = CHAT.system + rounds[0]
    ids = image_tokens("".join(f"{each}</s>" for each in rounds))
    predicted, position = [False] * len(ids), 1
    for each in rounds:
        instruction = each[: each.index(" ASSISTANT: ") + len(" ASSISTANT: ")]
        end = position + len(image_tokens(each))
        start = position + len(image_tokens(instruction)) - 2
        predicted[start:end] = [True] * (end - start)
        position = end
    assert position == len(ids)
    return ids, predicted


@pytest.mark.parametrize("turns", [TURNS[:1], TURNS[1:], TURNS, TURNS[::-1]])
@pytest.mark.parametrize("options", [{}, {"at_end": True}, {"image": False}])
def test_conversations_as_in_llava(folders, turns, options):
    tokenizer = read_tokenizer(folders / "vicuna_legacy")
    got = encode_conversation(
        tokenizer,
        turns,
        CHAT,
        max_length=999,
        has_visual=options.get("image", True),
        visual_at_end=options.get("at_end", False),
    )
    ids, predicted = llava(ReferenceLlamaTokenizer(folders / "vicuna", legacy=True), turns, **options)
    if -200 in ids:
        position = ids.index(-200)
        assert got.visual_position == position
        assert not predicted.pop(position)
        ids.pop(position)
    assert got.tokens.tolist() == ids
    assert got.loss_mask.tolist() == predicted


def test_guided_captions_as_in_llava(folders):
    """The sequence is <s>, image, caption and an end token, where the published code has a newline."""
    caption, slow = "12 dogs are on the grass", ReferenceLlamaTokenizer(folders / "vicuna", legacy=True)
    tokenizer = read_tokenizer(folders / "vicuna_legacy")
    got = encode_conversation(tokenizer, [("describe", caption)], TEMPLATES["plain_guided"], max_length=99)
    assert (got.tokens.tolist(), got.visual_position) == ([*slow(caption), 2], 1)
    assert got.loss_mask.tolist() == [False] + [True] * (len(got.tokens) - 1)


@pytest.mark.parametrize("at_end", [False, True])
def test_conversations_without_a_space_after_the_end_token(folders, at_end):
    """The current tokenizer of Vicuna v1.5 adds no such space (`legacy` is false)."""
    tokenizer = read_tokenizer(folders / "vicuna")
    got = encode_conversation(tokenizer, TURNS, CHAT, max_length=999, visual_at_end=at_end)
    ids, predicted = llava(ReferenceLlamaTokenizer(folders / "vicuna", legacy=True), TURNS, at_end=at_end)
    expected = llava(ReferenceLlamaTokenizer(folders / "vicuna", legacy=False), TURNS[:1], at_end=at_end)[0]
    rest = ReferenceLlamaTokenizer(folders / "vicuna", legacy=False)(
        "</s>USER: {} ASSISTANT: {}</s>".format(*TURNS[1])
    )[2:]
    expected = [i for i in [*expected, *rest] if i != -200]
    assert got.tokens.tolist() == expected
    assert len(got.tokens) != len(ids) - 1, "both kinds of tokenizer give the same ids here"
    assert got.loss_mask.sum() == sum(predicted)
    answers = tokenizer.decode(got.tokens[got.loss_mask])
    assert "".join(answers.split()) == "areddisc12dogs;naïve☃"


@pytest.mark.parametrize("name", ["vicuna", "vicuna_legacy", "qwen"])
@pytest.mark.parametrize("template", ["vicuna_v1", "plain"])
@pytest.mark.parametrize("options", [{}, {"visual_at_end": True}, {"has_visual": False}])
def test_prompt_is_a_prefix_of_the_conversation(folders, name, template, options):
    tokenizer, template = read_tokenizer(folders / name), TEMPLATES[template]
    whole = encode_conversation(tokenizer, TURNS, template, max_length=999, **options)
    prompt = encode_prompt(tokenizer, TURNS[1][0], template, TURNS[:1], **options)
    start = np.flatnonzero(np.diff(whole.loss_mask.astype(int)) == 1)[-1] + 1
    assert prompt.tokens.tolist() == whole.tokens[:start].tolist()
    assert prompt.visual_position == whole.visual_position


def test_qwen_against_transformers(folders):
    tokenizer = read_tokenizer(folders / "qwen")
    reference = PreTrainedTokenizerFast(tokenizer_file=str(folders / "qwen" / "tokenizer.json"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (None, 2, 0, None)
    assert tokenizer.vocab_size == len(reference)
    for text in random_texts(100):
        ids = reference(text).input_ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode([*ids, 2, 0, 0, 999_999]) == text.strip()
        assert joined(tokenizer.encode_parts([text[:5], text[5:], None, text])) == [*ids, 2, *ids]
    assert tokenizer.encode_query("what shape is red ?", 3) == reference("what shape is red ?").input_ids[-3:]
    got = encode_conversation(tokenizer, TURNS, CHAT, max_length=999)
    (q1, a1), (q2, a2) = TURNS
    before = reference(CHAT.system + "USER: ").input_ids
    after = f"\n{q1} ASSISTANT: {a1}<|im_end|>USER: {q2} ASSISTANT: {a2}<|im_end|>"
    assert got.visual_position == len(before)
    assert got.tokens.tolist() == before + reference(after).input_ids
    runs = np.split(got.tokens, np.flatnonzero(np.diff(got.loss_mask)) + 1)
    assert [reference.decode(run) for run in runs[1::2]] == [f" {a1}<|im_end|>", f" {a2}<|im_end|>"]


@pytest.mark.parametrize("name", ["vicuna", "vicuna_legacy", "qwen"])
def test_against_auto_tokenizer(folders, name):
    """Texts that start with a space are left out: for them LlamaTokenizer differs from SentencePiece."""
    reference = AutoTokenizer.from_pretrained(folders / name, local_files_only=True)
    tokenizer = read_tokenizer(folders / name)
    assert tokenizer.vocab_size == len(reference)
    assert (tokenizer.eos_id, tokenizer.unk_id) == (reference.eos_token_id, reference.unk_token_id)
    eos = reference.eos_token
    for text in random_texts(100):
        if text and text[0] not in " ▁":
            for case in (text, f"{text}{eos}", f"{text}{eos}{text}"):
                assert tokenizer.encode(case) == reference.encode(case, add_special_tokens=False)
                assert (
                    tokenizer.decode(tokenizer.encode(case))
                    == reference.decode(
                        reference.encode(case, add_special_tokens=False), skip_special_tokens=True
                    ).strip()
                )


def test_without_start_token_the_loss_covers_the_first_token_only_after_visual_tokens(folders):
    tokenizer = read_tokenizer(folders / "qwen")
    caption, guided = tokenizer.encode(" a red disc"), TEMPLATES["plain_guided"]
    options = {"template": guided, "max_length": 99}
    got = encode_conversation(tokenizer, [("describe", " a red disc")], **options)
    assert (got.tokens.tolist(), got.visual_position) == ([*caption, 2], 0)
    assert got.loss_mask.all()
    got = encode_conversation(tokenizer, [("describe", " a red disc")], has_visual=False, **options)
    assert got.tokens.tolist() == [*caption, 2]
    assert got.loss_mask.tolist() == [False] + [True] * len(caption)
    assert encode_prompt(tokenizer, "describe", guided).tokens.tolist() == []
    with pytest.raises(SampleError, match="neither text nor visual tokens"):
        encode_prompt(tokenizer, "describe", guided, has_visual=False)


@pytest.mark.parametrize(("name", "token"), [("vicuna", "</s>"), ("vicuna", "<s>"), ("qwen", "<|im_start|>")])
def test_special_token_in_a_turn_raises(folders, name, token):
    tokenizer = read_tokenizer(folders / name)
    for turn in ((f"what {token} is red", "disc"), ("what", f"{token}disc")):
        with pytest.raises(SampleError, match=f"{token[:2]}.*contains a special token".replace("|", r"\|")):
            encode_conversation(tokenizer, [turn], CHAT, max_length=999)
    encode_conversation(tokenizer, [("what is <b> or s> or <unk> ?", "☃")], CHAT, max_length=999)


def copy_tokenizer(folders, tmp_path, name="qwen", **settings):
    shutil.copytree(folders / name, tmp_path / name)
    if settings:
        write_json(tmp_path / name / "tokenizer_config.json", settings)
    return tmp_path / name


def test_start_token(folders, tmp_path):
    """Llama 3 adds the start token only in tokenizer.json; `add_bos_token` takes precedence."""
    folder, names = (
        copy_tokenizer(folders, tmp_path),
        {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"},
    )
    write_json(folder / "tokenizer_config.json", names)
    assert read_tokenizer(folder).bos_id is None
    write_json(folder / "tokenizer_config.json", names | {"add_bos_token": True})
    assert read_tokenizer(folder).bos_id == 1
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", names)
    tokenizer = read_tokenizer(folder)
    assert tokenizer.bos_id == 1
    assert 1 not in tokenizer.encode("what")
    write_json(folder / "tokenizer_config.json", names | {"add_bos_token": False})
    assert read_tokenizer(folder).bos_id is None


def test_padding_without_a_padding_token(folders, tmp_path):
    folder = copy_tokenizer(folders, tmp_path, eos_token="<|im_end|>")
    assert read_tokenizer(folder).pad_id == 2
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"})
    assert read_tokenizer(folder).pad_id == 0
    names = {"eos_token": "<|im_end|>", "pad_token": "<pad> that was never added"}
    write_json(folder / "tokenizer_config.json", names)
    assert read_tokenizer(folder).pad_id == 2


def test_saved_truncation_and_padding_are_ignored(folders, tmp_path):
    folder = copy_tokenizer(folders, tmp_path)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    plain = read_tokenizer(folders / "qwen")
    for text in ("a", "which came first, red or blue ?"):
        assert read_tokenizer(folder).encode(text) == plain.encode(text)


# --- GGUF ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pre", "splits"), [("gpt-2", ()), ("smollm", (pre_tokenizers.Digits(individual_digits=True),))]
)
def test_gguf(tmp_path, pre, splits):
    reference = byte_pairs(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), *splits)
    path = gguf_file(tmp_path / "m.gguf", reference, pre=pre, bos=1, eos=2, unknown=0, padding=2)
    tokenizer = read_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (None, 2, 0, 2)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.vocab_size == reference.get_vocab_size()
    for text in [*random_texts(100), "1234 12 dogs"]:
        ids = reference.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text.strip()


def test_unreadable_gguf(tmp_path):
    path = gguf_file(tmp_path / "m.gguf", byte_pairs(("<|end|>",)), pre="llama-bpe", eos=0)
    assert_unreadable(path, "gpt2/llama-bpe", "gpt2/smollm", "tokenizer.json")
    content = path.read_bytes()
    gguf_file(path, byte_pairs(("<|end|>",)), pre="smollm", eos=0)
    bad_merge = path.read_bytes().replace("Ġ a".encode(), "Ġ ".encode() + b"\xff")
    assert bad_merge != path.read_bytes()
    for wrong in (b"GGML" + content[4:], content[:2], content[: len(content) // 2], bad_merge):
        path.write_bytes(wrong)
        assert_unreadable(path, "not a GGUF file")
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert_unreadable(path, "None/None")


def test_readers_do_not_import_torch(folders, tmp_path):
    """PyTorch is installed for the tests, and transformers imports it for many of its classes."""
    gguf = gguf_file(tmp_path / "m.gguf", byte_pairs(("<|end|>",)), pre="smollm", eos=0)
    program = (
        "import sys; from dynfocus_jax.text.tokenizer_files import read_query_tokenizer, read_tokenizer\n"
        f"for path in ({str(folders / 'qwen')!r}, {str(gguf)!r}): read_tokenizer(path)\n"
        "assert not {'torch', 'transformers', 'jax'} & set(sys.modules)\n"
        f"read_tokenizer({str(folders / 'vicuna')!r}); read_query_tokenizer({str(folders / 'bert')!r})\n"
        "assert not {'torch', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)


def test_without_torch_nothing_is_printed(folders):
    """The warning of transformers about missing PyTorch is suppressed, but no other warning."""
    program = (
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "from dynfocus_jax.text.tokenizer_files import read_tokenizer\n"
        f"read_tokenizer({str(folders / 'vicuna')!r})\n"
        "from transformers.utils import is_torch_available, logging\n"
        "assert not is_torch_available()\n"
        "logging.get_logger('transformers').warning('a warning')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout == ""
    assert done.stderr.strip().endswith("a warning")
    assert "PyTorch" not in done.stderr


def test_ids_are_compared_with_sentencepiece(folders, monkeypatch):
    """A version of transformers that converts SentencePiece models wrongly is an error."""
    other = PreTrainedTokenizerFast(tokenizer_file=str(folders / "qwen" / "tokenizer.json"))
    monkeypatch.setattr(
        PreTrainedTokenizerFast,
        "convert_to_native_format",
        lambda **_: {"tokenizer_object": other.backend_tokenizer},
    )
    assert_unreadable(
        folders / "vicuna", "tokenizer.model: transformers 5.", "other token ids than SentencePiece"
    )


# --- Unusable files -----------------------------------------------------------------------------------


def assert_unreadable(path, *parts):
    with pytest.raises(UserError) as error:
        read_tokenizer(path)
    sentence = str(error.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    for part in (str(path), *parts):
        assert part in sentence


def test_missing_tokenizer(folders, tmp_path):
    for path in (tmp_path / "absent", tmp_path, folders / "bert", tmp_path / "absent.gguf"):
        assert_unreadable(path, "tokenizer.json or tokenizer.model")


def test_broken_files(folders, tmp_path):
    folder = copy_tokenizer(folders, tmp_path)
    for content in ("{", "{}", '{"model": 3}'):
        (folder / "tokenizer.json").write_text(content)
        assert_unreadable(folder, "tokenizer.json cannot be read")
    folder = copy_tokenizer(folders, tmp_path, name="vicuna")
    for content, problem in [
        ("[", "tokenizer_config.json is not JSON"),
        ("[]", "tokenizer_config.json is not a JSON object"),
        ('{"eos_token": 2}', "eos_token is 2, expected a string"),
        ('{"pad_token": {"id": 0}}', "pad_token is {'id': 0}, expected a string"),
    ]:
        (folder / "tokenizer_config.json").write_text(content)
        assert_unreadable(folder, problem)
    (folder / "tokenizer_config.json").unlink()
    content = (folder / "tokenizer.model").read_bytes()
    for wrong in (content[:1000], b"<html>not found</html>", b""):
        (folder / "tokenizer.model").write_bytes(wrong)
        assert_unreadable(folder, "is not a SentencePiece model")


def test_unsupported_sentencepiece_models(folders, tmp_path):
    folder = copy_tokenizer(folders, tmp_path, name="vicuna")
    content = (folder / "tokenizer.model").read_bytes()
    for section, field, value in [
        ("trainer_spec", "model_type", sentencepiece_model_pb2.TrainerSpec.UNIGRAM),
        ("normalizer_spec", "remove_extra_whitespaces", True),
        ("normalizer_spec", "add_dummy_prefix", False),
        ("normalizer_spec", "precompiled_charsmap", b"x"),
    ]:
        model = sentencepiece_model_pb2.ModelProto.FromString(content)
        setattr(getattr(model, section), field, value)
        (folder / "tokenizer.model").write_bytes(model.SerializeToString())
        assert_unreadable(folder, "not a SentencePiece model of Llama's kind", "save_pretrained")


def test_missing_special_tokens(folders, tmp_path):
    folder = copy_tokenizer(folders, tmp_path, pad_token="<|endoftext|>")
    assert_unreadable(folder, "does not set an eos_token", "tokenizer_config.json")
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}})
    assert read_tokenizer(folder).eos_id == 2
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|fin|>"})
    assert_unreadable(folder, "eos_token is '<|fin|>', which is not in the vocabulary")


# --- Query tokenizers ---------------------------------------------------------------------------------

QUESTIONS = ("What SHAPE is the reds'?", "", "café 是 12", "red [SEP] [DEC] zzz", "the " * 40 + "disc!\n is;")


@pytest.mark.parametrize("max_length", [3, 4, 9, 256])
@pytest.mark.parametrize("lower", [None, True, False])
def test_bert_against_transformers(folders, tmp_path, max_length, lower):
    folder = copy_tokenizer(folders, tmp_path, name="bert")
    if lower is not None:
        write_json(folder / "tokenizer_config.json", {"do_lower_case": lower})
    reference = BertTokenizer.from_pretrained(folder, truncation_side="left")
    reference.add_special_tokens({"bos_token": "[DEC]"})
    for path in (folder, folder / "vocab.txt"):
        tokenizer = read_query_tokenizer(path)
        assert tokenizer.vocab_size == len(reference)
        for text in (*QUESTIONS, *random_texts(50, letters="redishapcWHATé ?!;,'12是☃\n")):
            expected = reference(text, max_length=max_length, truncation=True).input_ids
            assert tokenizer.encode(text, max_length) == expected, text


def test_no_bert_vocabulary(folders, tmp_path):
    for path in (tmp_path, tmp_path / "absent.txt"):
        with pytest.raises(UserError, match=rf"{path} is not a BERT vocabulary, expected vocab\.txt"):
            read_query_tokenizer(path)
    wrong = tmp_path / "words.txt"
    for content in (b"red\nblue\n[SEP]\n", b"", b"\xff\xfe\x00"):
        wrong.write_bytes(content)
        with pytest.raises(UserError, match=r"words\.txt is not a BERT vocabulary: it lacks \[UNK\]"):
            read_query_tokenizer(wrong)


def tokenizer_config(folders, text="vicuna", query="bert"):
    config = tiny_config()
    config.data.tokenizer = None if text is None else str(folders / text)
    config.data.query_tokenizer = None if query is None else str(folders / query)
    config.model.language.vocab_size = 420
    return config


def test_queries_are_encoded_by_the_query_tokenizer(folders):
    config = tokenizer_config(folders)
    tokenizer = make_tokenizer(config, folders / "no_vocabulary.json")
    record = Record("t", None, (("What shape is the red disc ?", "a red disc"),))
    loader = SampleLoader(
        [record], tokenizer, CHAT, MediaReader(8), Budget.from_buckets([(1, 99)]), max_query=6
    )
    sample, _ = loader(0, np.random.default_rng(0))
    bert = BertTokenizer.from_pretrained(folders / "bert", truncation_side="left")
    expected = bert("What shape is the red disc ?", max_length=6, truncation=True).input_ids
    assert sample.query_tokens.tolist() == expected
    assert sample.query_length == 6
    conversation = encode_conversation(
        read_tokenizer(folders / "vicuna"), record.turns, CHAT, max_length=99, has_visual=False
    )
    assert sample.tokens[: sample.length].tolist() == conversation.tokens.tolist()
    assert (sample.tokens[sample.length :] == tokenizer.pad_id).all()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)


def test_query_padding_is_zero(folders):
    """The text's padding id may lie outside the text encoder's vocabulary."""
    tokenizer = make_tokenizer(tokenizer_config(folders, text="qwen"), folders)
    record = Record("t", None, (("red ?", "disc"),))
    loader = SampleLoader(
        [record], tokenizer, CHAT, MediaReader(8), Budget.from_buckets([(1, 99)]), max_query=20
    )
    sample, _ = loader(0, np.random.default_rng(0))
    assert sample.query_tokens.tolist() == [3, 9, 10, 4] + [0] * 16
    assert not loader.padding().sample.query_tokens.any()


def test_make_tokenizer_errors(folders):
    def assert_refused(config, *parts):
        with pytest.raises(UserError) as error:
            make_tokenizer(config, folders / "vocabulary.json")
        assert str(error.value).endswith(".")
        for part in parts:
            assert part in str(error.value)

    config = tokenizer_config(folders)
    config.model.language.vocab_size = 419
    assert_refused(
        config, "config.model.language.vocab_size is 419", "vicuna has 420 tokens; raise vocab_size"
    )
    config = tokenizer_config(folders)
    config.model.text_encoder.vocab_size = 25
    assert_refused(
        config, "config.model.text_encoder.vocab_size is 25", "bert has 27 tokens; raise vocab_size"
    )
    config = tokenizer_config(folders, query=None)
    assert_refused(config, "text_encoder.vocab_size is 40", "vicuna has 420", "config.data.query_tokenizer")
    config = tokenizer_config(folders)
    config.data.max_query = 2
    assert_refused(config, "config.data.max_query is 2, expected at least 3")
    with pytest.raises(UserError, match=r"does not exist.*config\.data\.tokenizer"):
        make_tokenizer(tokenizer_config(folders, text=None), folders / "vocabulary.json")
