"""The text of an answer while it is streamed: incomplete characters, stop strings, white space."""

import hypothesis
import hypothesis.strategies as st
import pytest

from dynfocus_jax.serving.answer_text import AnswerText


def decode(ids):
    """Decode tokens that are bytes."""
    return bytes(ids).decode("utf-8", errors="replace").strip()


def stream(text, stop=()):
    """Stream `text` byte by byte; return the pieces, the final text and the bytes up to the end."""
    pieces = []
    answer = AnswerText(decode, stop, pieces.append)
    for byte in text.encode():
        answer.add(byte)
        if answer.stopped:
            break
    return pieces, answer.finish(), bytes(answer.tokens).decode(errors="replace")


def test_characters_are_streamed_whole():
    pieces, text, _ = stream("é 円x")
    assert pieces == ["é", " 円", "x"]
    assert text == "é 円x"


def test_an_incomplete_character_is_replaced_at_the_end():
    answer = AnswerText(decode, (), (pieces := []).append)
    for byte in "a円".encode()[:-1]:
        answer.add(byte)
    assert pieces == ["a"]
    assert answer.finish() == "a\N{REPLACEMENT CHARACTER}"
    assert "".join(pieces) == "a\N{REPLACEMENT CHARACTER}"


def test_text_that_may_become_a_stop_string_is_held_back():
    pieces, text, read = stream("one\n\nUSE a\n\nUSER: two", stop=("\n\nUSER:",))
    assert text == "one\n\nUSE a"
    assert read == "one\n\nUSE a\n\nUSER:"
    assert "".join(pieces) == text
    assert not any(piece.endswith("U") for piece in pieces)


def test_the_first_of_several_stop_strings_ends_the_text():
    assert stream("a b c d", stop=("c", "b"))[1:] == ("a", "a b")
    assert stream("stop", stop=("stop",))[1] == ""


def test_stop_strings_that_overlap():
    assert stream("xab", stop=("ab", "abc"))[1] == "x"
    assert stream("xaab", stop=("ab",))[1] == "xa"


def test_without_streaming_and_stop_strings_the_text_is_decoded_once():
    calls = []
    answer = AnswerText(lambda ids: calls.append(1) or decode(ids))
    for byte in b"hello":
        answer.add(byte)
    assert answer.finish() == "hello"
    assert len(calls) == 1


@hypothesis.given(
    st.text(alphabet="ab é\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=2)
)
@hypothesis.settings(max_examples=200, deadline=None)
def test_pieces_concatenate_to_the_text(text, stop):
    pieces, answer, _ = stream(text, tuple(stop))
    assert "".join(pieces) == answer
    assert text.strip().startswith(answer)
    assert not any(each in answer for each in stop)


@pytest.mark.parametrize("text", ["  a  b  ", "\n"])
def test_white_space_around_the_text_is_removed(text):
    pieces, answer, _ = stream(text)
    assert answer == text.strip()
    assert "".join(pieces) == answer
