"""Text match of open answers, compared with a direct count of common words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynfocus_jax.evaluation.text_match import MEASURE, exact_match, summarize_matches, token_f1

# Words, and their normalised form
WORDS = {
    "the": "",
    "A": "",
    "an": "",
    "cat": "cat",
    "Cat.": "cat",
    "'cats'": "cats",
    "it's": "its",
    "2": "2",
} | {
    "-": "",
    "\u732b": "\u732b",
    "ANT,": "ant",
}
TEXTS = st.lists(st.sampled_from(sorted(WORDS)), max_size=6)


@given(TEXTS, TEXTS)
def test_equals_a_direct_count(prediction, answer):
    predicted, wanted = ([WORDS[word] for word in text if WORDS[word]] for text in (prediction, answer))
    rest, shared = list(wanted), 0
    for word in predicted:
        if word in rest:
            rest.remove(word)
            shared += 1
    if not predicted or not wanted:
        return
    precision, recall = shared / len(predicted), shared / len(wanted)
    f1 = 2 * precision * recall / (precision + recall) if shared else 0
    assert token_f1(" ".join(prediction), "  ".join(answer)) == pytest.approx(f1, abs=1e-12)
    assert exact_match(" ".join(prediction), "  ".join(answer)) == (predicted == wanted)


def test_examples_worked_out_by_hand():
    assert exact_match("The cat.", "cat")
    assert not exact_match("cats", "cat")
    assert token_f1("a black cat", "the cat sat") == pytest.approx(0.5)
    assert token_f1("cat cat", "cat") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "answer", "same"), [("A", "a.", True), ("b", "A", False), ("the", "a", False)]
)
def test_answers_that_are_an_article(prediction, answer, same):
    assert exact_match(prediction, answer) is same
    assert token_f1(prediction, answer) == float(same)


@pytest.mark.parametrize("empty", ["", " ", "...", "\n"])
def test_an_empty_prediction_is_never_right(empty):
    assert not exact_match(empty, "cat")
    assert not exact_match(empty, empty)
    assert token_f1(empty, empty) == 0


def test_all_questions_are_in_the_denominator():
    summary = summarize_matches([("cat", "cat"), ("", "cat"), ("black cat", "cat"), ("dog", "cat")])
    assert summary.questions == 4
    assert summary.exact_match == 0.25
    assert summary.token_f1 == pytest.approx((1 + 2 / 3) / 4)
    assert "offline" in MEASURE
    assert "no judge" in MEASURE
    assert summarize_matches([]).exact_match is None
