"""Read published tokenizers from local files.

Nothing is downloaded and nothing in a file is executed. Chat templates in the files are ignored, see
`conversation.Template`.

transformers converts SentencePiece models and builds the text encoder's tokenizer. The tests compare ids with
its `AutoTokenizer`, which is not used because it
- imports PyTorch if that is installed (1.6 s);
- reads GGUF with PyTorch only, and does not split text at digits as SmolLM does, so "\\n 3" gets other ids;
- adds tokens that tokenizer_config.json names and the vocabulary lacks, for which a model has no embedding;
- ignores `add_bos_token` beside a tokenizer.json;
- converts a SentencePiece model of the legacy kind to `LlamaTokenizer` if tokenizer_config.json names that
  class. Its ids differ from SentencePiece's after </s> (in 31 of 200 random texts).
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, pre_tokenizers

from dynfocus_jax.errors import UserError, quoted
from dynfocus_jax.text.tokenizers import PublishedTokenizer, QueryTokenizer, SpecialTokens


def read_tokenizer(path: str | Path) -> PublishedTokenizer:
    """Read the tokenizer of a language model.

    Args:
      path: a folder with tokenizer.json (Hugging Face) or tokenizer.model (SentencePiece, for Llama and
        Vicuna), and the settings beside them, or a GGUF file.

    Raises:
      UserError: if there is no such file, or it cannot be read.
    """
    path = Path(path).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return PublishedTokenizer(*_read_gguf(path), path)
    settings = _read_settings(path)
    if (path / "tokenizer.json").is_file():
        try:
            # What PreTrainedTokenizerFast of transformers does, without 0.8 s to import it.
            backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{path}/tokenizer.json cannot be read ({error}); download it again.") from None
        return PublishedTokenizer(backend, _special_tokens(settings), path)
    if (path / "tokenizer.model").is_file():
        legacy = bool(settings.get("legacy", True))
        backend = _convert_sentencepiece(path / "tokenizer.model", legacy=legacy)
        special = _special_tokens(_LLAMA_SETTINGS | settings)
        return PublishedTokenizer(backend, special, path, prefix=_prefix(legacy))
    raise UserError(
        f"{path} is not a tokenizer, expected a folder with the language model's tokenizer.json or "
        "tokenizer.model, or its .gguf file; set config.data.tokenizer to one of them."
    )


def read_query_tokenizer(path: str | Path) -> QueryTokenizer:
    """Read the vocabulary of the text encoder.

    Args:
      path: vocab.txt of bert-base-uncased, or its folder. A tokenizer_config.json beside it may turn
        lower-casing off.

    Raises:
      UserError: if the file is missing or is not a BERT vocabulary.
    """
    path = Path(path).expanduser()
    file = path if path.is_file() else path / "vocab.txt"
    if not file.is_file():
        raise UserError(
            f"{path} is not a BERT vocabulary, expected vocab.txt of bert-base-uncased, or its folder; set "
            "config.data.query_tokenizer to it."
        )
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        lines = []
    ids = {line: i for i, line in enumerate(lines) if line or i < len(lines) - 1}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]") if token not in ids]
    if missing:
        raise UserError(
            f"{file} is not a BERT vocabulary: it lacks {', '.join(missing)}; use vocab.txt of "
            "bert-base-uncased."
        )
    lower = bool(_read_settings(file.parent).get("do_lower_case", True))
    bert = _import_transformers().BertTokenizer(vocab=ids, do_lower_case=lower)
    bert.add_special_tokens({"bos_token": "[DEC]"})
    return QueryTokenizer(bert.backend_tokenizer)


def _import_transformers() -> ModuleType:
    """Import transformers without its warning that PyTorch, which this package does not need, is missing."""

    def is_shown(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(is_shown)
    try:
        # Takes 0.8 s, and tokenizer.json and GGUF files are read without it.
        import transformers  # noqa: PLC0415
    finally:
        logger.removeFilter(is_shown)
    return transformers


# --- Settings beside a tokenizer ----------------------------------------------------------------------

_LLAMA_SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of special_tokens_map.json and tokenizer_config.json; the latter takes precedence.

    Special tokens are given by their text. Settings that are null are left out.
    """
    settings = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            continue
        try:
            content = json.loads((folder / file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{folder}/{file} is not JSON ({error}); download it again.") from None
        if not isinstance(content, dict):
            raise UserError(f"{folder}/{file} is not a JSON object; download it again.")
        settings |= {key: _token_text(value) for key, value in content.items() if value is not None}
    for name in ("eos_token", "bos_token", "unk_token", "pad_token"):
        if not isinstance(settings.get(name, ""), str):
            raise UserError(
                f"{folder}: {name} is {quoted(settings[name])}, expected a string; download the tokenizer "
                "again."
            )
    return settings


def _token_text(value: Any) -> Any:
    """Return the text of a special token that is written with its properties; any other value as it is."""
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return value["content"]
    return value


def _special_tokens(settings: dict[str, Any]) -> SpecialTokens:
    names = {name: settings.get(f"{name}_token") for name in ("eos", "bos", "unk", "pad")}
    return SpecialTokens(**names, add_bos=settings.get("add_bos_token"))


# --- SentencePiece ------------------------------------------------------------------------------------


def _prefix(legacy: bool) -> str:
    """Return the text to put before a text for a converted SentencePiece model.

    SentencePiece puts a space before every text. A converted model does not if the text starts with a space,
    unless it is of the legacy kind; with this prefix, both give the same ids.
    """
    return "" if legacy else " "


def _convert_sentencepiece(path: Path, *, legacy: bool) -> tokenizers.Tokenizer:
    """Convert a SentencePiece model of Llama's kind with transformers.

    Args:
      path: tokenizer.model. Other files of its folder are not read.
      legacy: whether text after a special token gets a space before it, like the start of a text.
    """
    content, processor = path.read_bytes(), sentencepiece.SentencePieceProcessor()
    broken = UserError(f"{path} is not a SentencePiece model; download it again.")
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(content)  # pyright: ignore[reportAttributeAccessIssue]
    except DecodeError:
        raise broken from None
    normalizer = model.normalizer_spec
    if (
        model.trainer_spec.model_type != model.trainer_spec.BPE
        or normalizer.precompiled_charsmap
        or normalizer.remove_extra_whitespaces
        or not normalizer.add_dummy_prefix
    ):
        raise UserError(
            f"{path} is not a SentencePiece model of Llama's kind (byte pairs, no text normalisation); write "
            "a tokenizer.json with AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of "
            "transformers, and use that."
        )
    if not all(isinstance(piece.piece, str) for piece in model.pieces):  # bytes: invalid UTF-8
        raise broken
    transformers = _import_transformers()
    reader = transformers.PreTrainedTokenizerFast
    try:
        processor.LoadFromSerializedProto(content)
        converted = reader(**reader.convert_to_native_format(vocab_file=str(path), legacy=legacy))
    except Exception:  # neither library raises anything more specific
        raise broken from None
    backend = converted.backend_tokenizer
    # transformers 5.20 to 5.23 gave other ids for models of the legacy kind.
    probe = "A chat,  with 2 spaces\nand café ☃"
    if backend.encode(_prefix(legacy) + probe, add_special_tokens=False).ids != processor.EncodeAsIds(probe):
        raise UserError(
            f"{path}: transformers {transformers.__version__} gives this model other token ids than "
            "SentencePiece; install the version of transformers in requirements.txt."
        )
    return backend


# --- GGUF ---------------------------------------------------------------------------------------------

# Splits of a text before byte pairs are merged, besides GPT-2's, by tokenizer.ggml.model and .pre.
_GGUF_SPLITS = {
    ("gpt2", "gpt-2"): (),
    ("gpt2", "smollm"): (pre_tokenizers.Digits(individual_digits=True),),
}


def _read_gguf(path: Path) -> tuple[tokenizers.Tokenizer, SpecialTokens]:
    """Read the byte-level tokenizer of a GGUF file, and its special tokens."""
    try:
        import gguf  # noqa: PLC0415 (an optional dependency)
    except ImportError:
        raise UserError(f"{path}: the package gguf is missing; install it with pip install gguf.") from None
    try:
        fields = {
            name.removeprefix("tokenizer.ggml."): field.contents()
            for name, field in gguf.GGUFReader(path).fields.items()
            if name.startswith("tokenizer.ggml.")
        }
        kind: tuple[Any, Any] = fields.get("model"), fields.get("pre")
        if kind in _GGUF_SPLITS:
            return _build_byte_level(fields, _GGUF_SPLITS[kind], gguf.TokenType.CONTROL)
    except Exception as error:  # neither library raises anything more specific
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(f"{path} is not a GGUF file, or is damaged ({reason}); download it again.") from None
    raise UserError(
        f"{path}: tokenizer of kind {'/'.join(map(str, kind))}, expected one of "
        f"{', '.join('/'.join(known) for known in _GGUF_SPLITS)}; use the folder with the model's "
        "tokenizer.json instead."
    )


def _build_byte_level(
    fields: dict[str, Any], splits: Sequence[pre_tokenizers.PreTokenizer], control: int
) -> tuple[tokenizers.Tokenizer, SpecialTokens]:
    """Build a byte-level tokenizer from the fields tokenizer.ggml.* of a GGUF file.

    Args:
      fields: their values, by name without the prefix.
      splits: splits of a text before GPT-2's.
      control: the token type of special tokens.
    """
    tokens: list[str] = fields["tokens"]
    merges = [tuple(line.split(" ")) for line in fields["merges"]]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    types = zip(tokens, fields["token_type"], strict=True)
    backend.add_special_tokens([token for token, token_type in types if token_type == control])

    def token(name: str) -> str | None:
        number = fields.get(f"{name}_token_id")
        return None if number is None else tokens[number]

    names = {"eos": token("eos"), "bos": token("bos"), "unk": token("unknown"), "pad": token("padding")}
    return backend, SpecialTokens(**names, add_bos=bool(fields.get("add_bos_token")))
