"""Text to token ids and back.

`WordTokenizer` is for benchmarks with a small, closed vocabulary, `PublishedTokenizer` for published language
models, and `QueryTokenizer` for the text encoder. `tokenizer_files` reads the last two from local files.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from tokenizers import Tokenizer as Backend

from dynfocus_jax.errors import UserError


class Tokenizer(Protocol):
    """A tokenizer of conversations and answers."""

    @property
    def pad_id(self) -> int: ...

    @property
    def bos_id(self) -> int | None:
        """Id of the token before every text; None if there is no such token."""

    @property
    def eos_id(self) -> int: ...

    @property
    def unk_id(self) -> int | None:
        """Id of words that the tokenizer does not know; None if it can encode any text."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that must not occur in the text of a conversation."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens around it."""
        ...

    def encode_parts(self, parts: Sequence[str | None]) -> list[list[int]]:
        """Encode the parts of a text as one text, and return the ids of each part; None is the end token."""
        ...

    def encode_query(self, text: str, max_length: int) -> list[int]:
        """Return the last `max_length` ids of a query to the text encoder."""
        ...

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids without white space around it, by default without special tokens."""
        ...


SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")


class WordTokenizer:
    """Maps lower-cased words, split at white space, to ids; ids 0 to 3 are <pad>, <bos>, <eos>, <unk>.

    Its vocabulary file is a plain JSON list of words, not the format of a library.
    """

    pad_id, bos_id, eos_id, unk_id = range(len(SPECIALS))
    special_ids = frozenset({pad_id, bos_id, eos_id})

    def __init__(self, words: Sequence[str], *, strict: bool = True):
        """Build a tokenizer from its vocabulary.

        Args:
          words: the vocabulary without special tokens.
          strict: raise UserError for a word outside the vocabulary. If False, such a word becomes <unk>.
        """
        self._words = (*SPECIALS, *words)
        self._ids = {word: i for i, word in enumerate(self._words)}
        if len(self._ids) != len(self._words):
            raise UserError(
                "the vocabulary contains a word twice, or a special token; list each word once, without "
                f"{', '.join(SPECIALS)}."
            )
        self._strict = strict

    @classmethod
    def from_file(cls, path: str | Path, *, strict: bool = True) -> "WordTokenizer":
        """Read the vocabulary from a JSON list of words, without special tokens.

        Raises:
          UserError: if the file is missing or is not a list of words.
        """
        try:
            words = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"vocabulary file {path} does not exist; check the path, or set config.data.tokenizer to the "
                "folder of a published tokenizer."
            ) from None
        except ValueError as error:
            raise UserError(
                f"vocabulary file {path} is not JSON ({error}), expected a list of words."
            ) from None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"vocabulary file {path} is not a list of words, expected [WORD, ...].")
        return cls(words, strict=strict)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._words)

    def encode(self, text: str) -> list[int]:
        """Return the ids of the words of a text, without <bos> and <eos>."""
        return [self._encode_word(word) for word in text.lower().split()]

    def encode_parts(self, parts: Sequence[str | None]) -> list[list[int]]:
        """Return the ids of each part of a text; None is the end token."""
        return [[self.eos_id] if part is None else self.encode(part) for part in parts]

    def encode_query(self, text: str, max_length: int) -> list[int]:
        """Return the ids of the last `max_length` words of a query to the text encoder."""
        return self.encode(text)[-max_length:]

    def _encode_word(self, word: str) -> int:
        if self._strict and word not in self._ids:
            raise UserError(
                f"the word {word!r} is not in the vocabulary of {self.vocab_size} words; use the vocabulary "
                "file that belongs to the data."
            )
        return self._ids.get(word, self.unk_id)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the words of ids, joined by spaces, by default without special tokens.

        Ids beyond the vocabulary become <unk>: a model may have more embeddings than there are words.
        """
        first = len(SPECIALS) if skip_special else 0
        words = self._words
        return " ".join(words[i if i < len(words) else self.unk_id] for i in map(int, ids) if i >= first)


class SpecialTokens(NamedTuple):
    """Special tokens of a published tokenizer, by their text; None for a token that it does not have."""

    eos: str | None
    bos: str | None = None
    unk: str | None = None
    pad: str | None = None
    add_bos: bool | None = None  # put bos before every text; None: if the tokenizer's post-processor does so


class PublishedTokenizer:
    """The tokenizer of a published language model, read by `tokenizer_files.read_tokenizer`.

    No token is added to its vocabulary, so every id has an embedding.

    Attributes:
      bos_id: the token that this tokenizer puts before a text; None if it adds none (Qwen, SmolLM).
      pad_id: the padding token, else the unknown token (as in Vicuna's training), else the end token.
      special_ids: ids that must not occur in the text of a conversation; "</s>" in a text becomes the end
        token.
    """

    def __init__(self, backend: Backend, special: SpecialTokens, path: Path, *, prefix: str = ""):
        """Wrap a tokenizer of the library `tokenizers`; its padding, truncation and post-processor go.

        Args:
          backend: the tokenizer.
          special: its special tokens.
          path: its file or folder, for error messages.
          prefix: text to put before every text that is not empty.

        Raises:
          UserError: if `special` has no end token, or one that is not in the vocabulary.
        """
        for name, token in (("eos_token", special.eos), ("bos_token", special.bos)):
            if token is not None and backend.token_to_id(token) is None:
                raise UserError(
                    f"{path}: {name} is {token!r}, which is not in the vocabulary; download the tokenizer "
                    "again."
                )

        def id_of(token: str | None) -> int | None:
            return None if token is None else backend.token_to_id(token)

        eos_id = id_of(special.eos)
        if special.eos is None or eos_id is None:
            raise UserError(
                f"{path} does not set an eos_token; download the tokenizer_config.json of the model as well."
            )
        self._eos, self.eos_id = special.eos, eos_id
        self.unk_id = id_of(special.unk)
        bos_id, added_ids = id_of(special.bos), backend.encode("").ids
        add_bos = added_ids[:1] == [bos_id] if special.add_bos is None else special.add_bos
        self.bos_id = bos_id if add_bos else None
        pad_ids = (id_of(special.pad), self.unk_id, self.eos_id)
        self.pad_id = next(i for i in pad_ids if i is not None)

        special_ids = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        # An ordinary text may hold a character that is encoded as the unknown token.
        unknown = getattr(backend.model, "unk_token", special.unk)
        self.special_ids = frozenset((special_ids - {id_of(unknown)}) | {self.eos_id})
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None  # it may trim white space off the offsets
        self._backend, self._prefix = backend, prefix

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens around it."""
        return self.encode_parts([text])[0]

    def encode_parts(self, parts: Sequence[str | None]) -> list[list[int]]:
        """Encode the parts of a text as one text, and return the ids of each part; None is the end token.

        So only the first part gets the space that SentencePiece puts before a text, and text after an end
        token is treated as by the published tokenizer. A token that spans two parts belongs to the later one.
        """
        texts = [self._eos if part is None else part for part in parts]
        if any(texts):
            texts[0] = self._prefix + texts[0]
        encoding = self._backend.encode("".join(texts), add_special_tokens=False)
        ids, offsets = encoding.ids, np.asarray(encoding.offsets).reshape(-1, 2)
        last = np.maximum(offsets[:, 0], offsets[:, 1] - 1)  # position of each token's last character
        ends = np.searchsorted(last, np.cumsum([len(text) for text in texts])).tolist()
        return [ids[start:end] for start, end in itertools.pairwise([0, *ends])]

    def encode_query(self, text: str, max_length: int) -> list[int]:
        """Return the last `max_length` ids of a query to the text encoder."""
        return self.encode(text)[-max_length:]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids without white space around it, by default without special tokens.

        Ids beyond the vocabulary are skipped: a model may have more embeddings than the tokenizer has tokens.
        """
        ids = [i for i in map(int, ids) if i < self.vocab_size]
        return self._backend.decode(ids, skip_special_tokens=skip_special).strip()


class QueryTokenizer:
    """BERT's uncased WordPiece tokenizer, for queries to the text encoder: [CLS] query [SEP].

    As in LAVIS and LLaMA-VID, it has an additional token [DEC] after BERT's vocabulary (30,523 ids in all),
    and keeps the last tokens of a query that is too long. InstructBLIP's Q-Former was trained with that
    truncation (at 256 tokens), so it happens without a warning. `tokenizer_files.read_query_tokenizer` reads
    one from a file.
    """

    def __init__(self, backend: Backend):
        self._backend = backend
        vocabulary = backend.get_vocab()
        self._cls_id, self._sep_id = vocabulary["[CLS]"], vocabulary["[SEP]"]
        self.vocab_size = len(vocabulary)

    def encode(self, text: str, max_length: int) -> list[int]:
        """Return [CLS], the last ids of a query, [SEP]: at most `max_length` ids, which is at least 3."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self._cls_id, *ids[max(0, len(ids) - (max_length - 2)) :], self._sep_id]


class TextAndQueryTokenizer:
    """A tokenizer of conversations, and another one for the queries to the text encoder."""

    def __init__(self, text: Tokenizer, query: QueryTokenizer):
        self._text, self._query = text, query
        self.pad_id, self.bos_id, self.eos_id = text.pad_id, text.bos_id, text.eos_id
        self.unk_id = text.unk_id
        self.special_ids, self.vocab_size = text.special_ids, text.vocab_size

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens around it."""
        return self._text.encode(text)

    def encode_parts(self, parts: Sequence[str | None]) -> list[list[int]]:
        """Encode the parts of a text as one text, and return the ids of each part; None is the end token."""
        return self._text.encode_parts(parts)

    def encode_query(self, text: str, max_length: int) -> list[int]:
        """Return the ids of a query in the text encoder's vocabulary, at most `max_length`."""
        return self._query.encode(text, max_length)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids without white space around it, by default without special tokens."""
        return self._text.decode(ids, skip_special=skip_special)
