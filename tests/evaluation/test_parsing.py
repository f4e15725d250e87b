"""Parsed answers, compared with a person's reading of them."""

import pytest

from dynfocus_jax.evaluation import parsing

OPTIONS = ("red", "dark red", "a dog", "None of these")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (C) a dog", "C"),
        ("C)", "C"),
        ("B. dark red", "B"),
        ("**B**", "B"),
        ("The answer is B", "B"),
        ("The best answer is: (D).", "D"),
        ("Answer: A", "A"),
        ("Best Option: (C", "C"),
        ("The answer is D because A and B are wrong", "D"),
        ("C, because B is a trap", "C"),
        ("(B) dark red, not (A)", "B"),
        ("I think C is right", "C"),
        ("It is (B), I believe", "B"),
        ("dark red", "B"),
        ("Red.", "A"),
        ("A dog runs", "C"),
        ("The answer is a dog", "C"),
        ("none of these", "D"),
    ],
)
def test_letter(text, letter):
    assert parsing.parse_letter(text, OPTIONS) == letter


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no idea",
        "E",  # not one of four
        "The answer is E",
        "A or B",
        "A, B",
        "(A) or (B)",
        "It is (A) or (B)",
        "The answer is A or B",
        "red or a dog",
        "A man is walking",  # an article
        "Abc",
    ],
)
def test_no_letter_is_guessed(text):
    assert parsing.parse_letter(text, OPTIONS) is None


def test_only_letters_of_options_count():
    five = ("one", "two", "three", "four", "five")
    assert parsing.parse_letter("E", five) == "E"
    assert parsing.parse_letter("(E)", five) == "E"
    assert parsing.parse_letter("3", ("2", "3", "4", "5")) == "B"
    assert parsing.parse_letter("3 or 4", ("2", "3", "4", "5")) is None


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Yes.", "yes"),
        ("no, it does not", "no"),
        ("I think yes", "yes"),
        ("The answer is no, not yes", "no"),
        ("Yes and it is red", "yes"),
        ("yes and no", None),
        ("maybe", None),
        ("Not at all", None),
        ("I know nothing", None),
        ("", None),
    ],
)
def test_yes_or_no(text, meant):
    assert parsing.parse_yes_no(text) == meant


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("from 3.5 to 7 seconds", (3.5, 7.0)),
        ("3.5s - 7s", (3.5, 7.0)),
        ("1:05-1:15", (65.0, 75.0)),
        ("from 1:00:05.5 to 3610", (3605.5, 3610.0)),
        ("4 to 4", (4.0, 4.0)),
        ("7 to 3", None),
        ("at 5 seconds", None),
        ("1, 2 or 3", None),
        ("never", None),
    ],
)
def test_span(text, span):
    assert parsing.parse_span(text) == span
