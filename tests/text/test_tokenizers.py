"""The word tokenizer."""

import pytest

from dynfocus_jax.errors import UserError
from dynfocus_jax.text.tokenizers import WordTokenizer


def test_ids_and_text():
    tokenizer = WordTokenizer(["what", "is", "red", "?"])
    assert tokenizer.vocab_size == 8
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.encode("  What is\nRED ? ") == [4, 5, 6, 7]
    assert tokenizer.encode("") == []
    assert tokenizer.decode([1, 4, 5, 2, 0, 0]) == "what is"
    assert tokenizer.decode([1, 4, 2, 0, 3], skip_special=False) == "<bos> what <eos> <pad> <unk>"


def test_unknown_words():
    with pytest.raises(UserError, match="'mauve'"):
        WordTokenizer(["red"]).encode("red mauve")
    assert WordTokenizer(["red"], strict=False).encode("red mauve") == [4, 3]


def test_files(tmp_path):
    path = tmp_path / "vocabulary.json"
    path.write_text('["red", "blue"]')
    assert WordTokenizer.from_file(path).encode("blue red") == [5, 4]
    assert WordTokenizer.from_file(path, strict=False).encode("green") == [3]
    for content, message in [
        ("{", "is not JSON"),
        ('{"red": 1}', "list of words"),
        ('["a", 1]', "list of words"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            WordTokenizer.from_file(path)
    with pytest.raises(UserError, match="does not exist"):
        WordTokenizer.from_file(tmp_path / "none.json")


@pytest.mark.parametrize("words", [["red", "red"], ["<eos>"]])
def test_duplicate_words_raise(words):
    with pytest.raises(UserError, match="twice, or a special"):
        WordTokenizer(words)
