"""A word tokenizer: one id a word, for benchmarks whose vocabulary is small and closed."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from dynfocus_jax.config import UserError

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")


class WordTokenizer:
    """Maps lower-cased words, split at white space, to ids; ids 0-3 are <pad>, <bos>, <eos>, <unk>.

    With `strict` (the default, for data) a word outside the vocabulary is a UserError; otherwise (for text
    that a person types) it becomes <unk>.
    """

    pad_id, bos_id, eos_id, unk_id = range(len(SPECIALS))

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
            raise UserError(f"vocabulary file {path} does not exist: check the path") from None
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
