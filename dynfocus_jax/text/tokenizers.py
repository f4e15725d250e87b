"""Text to token ids and back: word lists, published tokenizers from local files, BERT for the questions.

`WordTokenizer` is for benchmarks whose vocabulary is small and closed. `PublishedTokenizer` reads what a
language model is published with: Hugging Face's tokenizer.json, the SentencePiece tokenizer.model of Llama
and Vicuna, or a GGUF file. `BertTokenizer` is the text encoder's. Nothing is fetched from the network.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from dynfocus_jax.errors import UserError

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")


class WordTokenizer:
    """Maps lower-cased words, split at white space, to ids; ids 0-3 are <pad>, <bos>, <eos>, <unk>.

    With `strict` (the default, for data) a word outside the vocabulary is a UserError; otherwise (for text
    that a person types) it becomes <unk>.
    """

    pad_id, bos_id, eos_id, unk_id = range(len(SPECIALS))
    special_ids = frozenset({pad_id, bos_id, eos_id})

    def __init__(self, words: Sequence[str], *, strict: bool = True):
        self._words = (*SPECIALS, *words)
        self._ids = {word: i for i, word in enumerate(self._words)}
        if len(self._ids) != len(self._words):
            raise UserError("the vocabulary holds a word twice or a special token: list every word once")
        self._strict = strict

    @classmethod
    def from_file(cls, path: str | Path, *, strict: bool = True) -> "WordTokenizer":
        """Reads a json list of words, without the special tokens."""
        try:
            words = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"vocabulary file {path} does not exist: check the path, or name the folder of the language "
                "model's published tokenizer in config.data.tokenizer"
            ) from None
        except ValueError as error:
            raise UserError(
                f"vocabulary file {path} is not JSON ({error}): expected a list of words"
            ) from None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"vocabulary file {path} holds something else than a list of words")
        return cls(words, strict=strict)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special ones included."""
        return len(self._words)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of `text`, without <bos> and <eos>."""
        return [self._encode_word(word) for word in text.lower().split()]

    def encode_parts(self, parts: Sequence[str | None]) -> list[list[int]]:
        """Ids of each part of a text; None is the end token."""
        return [[self.eos_id] if part is None else self.encode(part) for part in parts]

    def encode_query(self, text: str, max_length: int) -> list[int]:
        """The last `max_length` words."""
        return self.encode(text)[-max_length:]

    def _encode_word(self, word: str) -> int:
        if self._strict and word not in self._ids:
            raise UserError(
                f"the word {word!r} is not in the vocabulary of {self.vocab_size} words: "
                "use the vocabulary file that belongs to the data"
            )
        return self._ids.get(word, self.unk_id)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The words of `ids` joined by spaces; special tokens are left out unless asked for.

        A model may have more ids than there are words: those read <unk>.
        """
        first = len(SPECIALS) if skip_special else 0
        words = self._words
        return " ".join(words[i if i < len(words) else self.unk_id] for i in map(int, ids) if i >= first)


class PublishedTokenizer:
    """A language model's own tokenizer, without anything added: no id lies outside its embedding.

    bos_id: what the tokenizer itself puts before a text, None when that is nothing (Qwen, SmolLM).
    pad_id: of its padding token, else the unknown token (as Vicuna is trained), else the end token.
    special_ids: ids that no text may hold (a "</s>" in a text reads as the end token, as published).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        names: Mapping[str, str | bool | None],
        where: Path,
        prefix: str = "",
    ):
        """
        names: eos_token, bos_token, ... and add_bos_token as in tokenizer_config.json.
        where: the file or folder, for messages.
        prefix: put before every text that is not empty.
        """

        def id_of(name):
            token = names.get(name)
            found = None if token is None else backend.token_to_id(token)
            if token is not None and found is None and name in ("bos_token", "eos_token"):
                raise UserError(f"{where} names the {name} {token!r}, which its vocabulary does not hold.")
            return found

        self.eos_id, self.unk_id = id_of("eos_token"), id_of("unk_token")
        if self.eos_id is None:
            raise UserError(
                f"{where} does not name its eos_token; add the tokenizer_config.json of the published model."
            )
        self._eos = names["eos_token"]
        first = backend.encode("").ids[:1]  # what the post-processor adds
        adds_bos = names.get("add_bos_token")
        adds_bos = first == [id_of("bos_token")] if adds_bos is None else adds_bos
        self.bos_id = id_of("bos_token") if adds_bos else None
        pads = (id_of("pad_token"), self.unk_id, self.eos_id)
        self.pad_id = next(number for number in pads if number is not None)
        special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        unknown = getattr(backend.model, "unk_token", names.get("unk_token"))  # any text may come to hold it
        special -= set() if unknown is None else {backend.token_to_id(unknown)}
        self.special_ids = frozenset(special | {self.eos_id})
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

        backend.no_truncation()  # settings that may have been saved with it
        backend.no_padding()
        backend.post_processor = None  # it trims offsets
        self._backend, self._prefix = backend, prefix

    @classmethod
    def from_path(cls, path: str | Path) -> "PublishedTokenizer":
        """Reads a folder with tokenizer.json or tokenizer.model, or a GGUF file.

        Raises:
          UserError: there is neither, or it cannot be read.
        """
        path = Path(path).expanduser()
        if path.suffix == ".gguf" and path.is_file():
            return cls(*_read_gguf(path), path)
        names = _read_names(path)
        if (path / "tokenizer.json").is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            except Exception as error:  # the library raises nothing more specific
                raise UserError(
                    f"{path}/tokenizer.json cannot be read ({error}): copy it again from the published model."
                ) from None
            return cls(backend, names, path)
        if (path / "tokenizer.model").is_file():
            # Text after a special token: with a space before it, like the start of a text, or as it is.
            legacy = names.get("legacy", True)
            backend = _read_sentencepiece(path / "tokenizer.model", prefix_all=legacy)
            return cls(backend, _LLAMA_NAMES | names, path, prefix="" if legacy else " ")
        raise UserError(
            f"{path} is no tokenizer: expected a folder with tokenizer.json or tokenizer.model, as the "
            "language model is published with, or a .gguf file; name it in config.data.tokenizer."
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without special tokens around it."""
        return self.encode_parts([text])[0]

    def encode_parts(self, parts: Sequence[str | None]) -> list[list[int]]:
        """Ids of each part of one text that is encoded as a whole; None is the end token.

        So a part in the middle does not get the space that SentencePiece puts before a text, and what
        follows an end token is treated as the published tokenizer does. A token that reaches over the end
        of a part belongs to the part in which it ends.
        """
        texts = [self._eos if part is None else part for part in parts]
        if any(texts):
            texts[0] = self._prefix + texts[0]
        encoding = self._backend.encode("".join(texts), add_special_tokens=False)
        ids, offsets = encoding.ids, np.asarray(encoding.offsets).reshape(-1, 2)
        last = np.maximum(offsets[:, 0], offsets[:, 1] - 1)  # of the characters of each token
        ends = np.searchsorted(last, np.cumsum([len(text) for text in texts])).tolist()
        return [ids[start:end] for start, end in itertools.pairwise([0, *ends])]

    def encode_query(self, text: str, max_length: int) -> list[int]:
        """The last `max_length` tokens."""
        return self.encode(text)[-max_length:]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids` without white space around it; special tokens are left out unless asked for."""
        ids = [i for i in map(int, ids) if i < self.vocab_size]  # a model may have more rows
        return self._backend.decode(ids, skip_special_tokens=skip_special).strip()


class BertTokenizer:
    """The text encoder's: lower-cased WordPiece between [CLS] and [SEP], cut on the left.

    As the published models use it (LAVIS, LLaMA-VID): the uncased vocabulary of BERT and a token [DEC] after
    its end, 30,523 ids; of a question that is too long the last tokens are kept. That cut is part of the
    published model (InstructBLIP's Q-Former has read at most 256 tokens), so it is made without a word.
    """

    def __init__(self, path: str | Path):
        """`path`: vocab.txt, or the folder that holds it and perhaps a tokenizer_config.json."""
        path = Path(path).expanduser()
        file = path if path.is_file() else path / "vocab.txt"
        if not file.is_file():
            raise UserError(
                f"{path} is no BERT vocabulary: expected vocab.txt of bert-base-uncased, or its folder; "
                "name it in config.data.query_tokenizer."
            )
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError:
            lines = []
        ids = {line: i for i, line in enumerate(lines) if line or i < len(lines) - 1}
        missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in ids]
        if missing:
            raise UserError(f"{file} is no BERT vocabulary: it lacks {', '.join(missing)}.")
        self._backend = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        lower = _read_names(file.parent).get("do_lower_case", True)
        self._backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
        self._backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        known = [token for token in ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]") if token in ids]
        self._backend.add_special_tokens([*known, "[DEC]"])
        self._around = ids["[CLS]"], ids["[SEP]"]
        self.vocab_size = self._backend.get_vocab_size()

    def encode(self, text: str, max_length: int) -> list[int]:
        """[CLS], the last tokens of `text`, [SEP]: at most `max_length` ids (3 or more)."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        first, last = self._around
        return [first, *ids[max(0, len(ids) - (max_length - 2)) :], last]


class WithQueries:
    """A tokenizer of the text with another one for the text encoder's questions."""

    def __init__(self, text: WordTokenizer | PublishedTokenizer, query: BertTokenizer):
        self._text, self._query = text, query

    def __getattr__(self, name: str):
        return getattr(self._text, name)

    def encode_query(self, text: str, max_length: int) -> list[int]:
        """As the text encoder reads it: at most `max_length` ids."""
        return self._query.encode(text, max_length)


# --- Published files ----------------------------------------------------------------------------------

_LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}


def _read_names(folder: Path) -> dict:
    """Names of the special tokens and other settings from the files beside a tokenizer."""
    names = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            continue
        try:
            content = json.loads((folder / file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{folder}/{file} is not JSON ({error}): copy it again from the published model."
            ) from None
        names |= {key: value for key, value in content.items() if value is not None}
    return {key: value["content"] if _is_token(value) else value for key, value in names.items()}


def _is_token(value) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def _read_sentencepiece(path: Path, *, prefix_all: bool) -> tokenizers.Tokenizer:
    """Byte pairs of Llama and Vicuna; `prefix_all`: a space before every text between special tokens."""
    model = sentencepiece.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise UserError(
            f"{path} is not a SentencePiece model: copy it again from the published model."
        ) from None
    spec = model.normalizer_spec
    if (
        model.trainer_spec.model_type != sentencepiece.TrainerSpec.BPE
        or spec.precompiled_charsmap
        or spec.remove_extra_whitespaces
        or not spec.add_dummy_prefix
    ):
        raise UserError(
            f"{path} is not a SentencePiece model of Llama's kind (byte pairs, text kept as it is); with "
            "transformers, AutoTokenizer.from_pretrained(folder).save_pretrained(folder) makes a "
            "tokenizer.json that can be read."
        )
    piece_type = sentencepiece.ModelProto.SentencePiece
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    # Every way to join two pieces to a third, the best pieces first.
    joined = sorted((p for p in model.pieces if p.type == piece_type.NORMAL), key=lambda p: -p.score)
    merges = []
    for piece in (p.piece for p in joined):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [(left, right) for left, right in splits if left in ids and right in ids]
        merges += sorted(splits, key=lambda split: (ids[split[0]], ids[split[1]]))
    unknown = next(p.piece for p in model.pieces if p.type == piece_type.UNKNOWN)
    backend = tokenizers.Tokenizer(
        models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prepend = [normalizers.Prepend("▁")] if prefix_all else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    backend.add_special_tokens(
        [
            AddedToken(p.piece, normalized=False)
            for p in model.pieces
            if p.type in (piece_type.UNKNOWN, piece_type.CONTROL)
        ]
    )
    backend.add_tokens(
        [AddedToken(p.piece, normalized=False) for p in model.pieces if p.type == piece_type.USER_DEFINED]
    )
    return backend


def _read_gguf(path: Path) -> tuple[tokenizers.Tokenizer, dict]:
    """The byte-level tokenizer inside a GGUF file, and the names of its special tokens."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"the tokenizer in {path} needs the package gguf: pip install gguf.") from None
    try:
        fields = gguf.GGUFReader(path).fields
    except (ValueError, LookupError) as error:
        raise UserError(f"{path} is not a GGUF file ({error}): copy it again.") from None

    def field(name):
        found = fields.get(f"tokenizer.ggml.{name}")
        return None if found is None else found.contents()

    kind = field("model"), field("pre")
    if kind not in _GGUF_SPLITS:
        raise UserError(
            f"{path} holds a tokenizer of the kind {'/'.join(map(str, kind))}, and only "
            f"{', '.join('/'.join(known) for known in _GGUF_SPLITS)} can be read from GGUF; use the folder "
            "with the model's tokenizer.json instead."
        )
    words = field("tokens")
    merges = [tuple(line.split(" ")) for line in field("merges")]
    backend = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*_GGUF_SPLITS[kind], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = zip(words, field("token_type"), strict=True)
    backend.add_special_tokens([word for word, kind in kinds if kind == gguf.TokenType.CONTROL])
    numbers = {
        f"{name}_token": field(f"{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    names = {name: None if number is None else words[number] for name, number in numbers.items()}
    return backend, names | {"add_bos_token": bool(field("add_bos_token"))}


# How a text is split before byte pairs are joined, beyond GPT-2's rule, by (model, pre) of the file.
_GGUF_SPLITS = {
    ("gpt2", "gpt-2"): (),
    ("gpt2", "smollm"): (pre_tokenizers.Digits(individual_digits=True),),
}
