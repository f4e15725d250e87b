"""Small tokenizers in the formats of published models, trained on a few sentences."""

import json
from pathlib import Path

import gguf
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: what shape is red? ASSISTANT: a red disc",
    "USER: which came first, red or blue ? ASSISTANT: the blue one came first",
    "12 dogs are on the grass;\nthere is 1 cat  and a naïve café ☃",
) * 3


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def llama_folder(folder: Path, **settings) -> Path:
    """Write a tokenizer like Vicuna's: tokenizer.model, and tokenizer_config.json with `settings` added."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    names = {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "unk_token": {"__type": "AddedToken", "content": "<unk>", "special": True},
        "pad_token": None,
        "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizer",
    }
    write_json(folder / "tokenizer_config.json", names | settings)
    return folder


def byte_pairs(specials: tuple[str, ...], *before) -> Tokenizer:
    """Train a byte-level BPE tokenizer. It splits text by `before`, then as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE())
    splits = [*before, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def qwen_folder(folder: Path, **settings) -> Path:
    """Write a tokenizer like Qwen's: tokenizer.json, no start token, different end and padding tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_pairs(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    write_json(folder / "tokenizer_config.json", names | {"add_bos_token": False} | settings)
    return folder


def gguf_file(path: Path, tokenizer: Tokenizer, *, pre: str, **numbers: int) -> Path:
    """Write a GGUF file with a tokenizer and no tensors; `numbers` are ids of its special tokens."""
    content = json.loads(tokenizer.to_str())
    ids = content["model"]["vocab"]
    specials = {token["id"] for token in content["added_tokens"]}
    kinds = [gguf.TokenType.CONTROL if i in specials else gguf.TokenType.NORMAL for i in range(len(ids))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(ids, key=ids.get))
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_add_bos_token(False)
    for name, number in numbers.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


BERT_WORDS = (
    *("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("what", "shape", "is", "red", "?", ",", "'", "s", "the", "cafe", "dis", "##c", "##s", "re", "##d"),
    *("!", "1", "##2", "是", ";"),
)


def bert_folder(folder: Path) -> Path:
    """Write a vocabulary like that of bert-base-uncased, with few words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in BERT_WORDS), encoding="utf-8")
    return folder
