"""Measures of open answers that need no judge: normalised exact match and token F1.

They differ from the benchmarks' own measure, the marks of a judge (`dynfocus_jax.evaluation.judge`), and are
reported under their own names.
"""

import string
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

MEASURE = "offline text match (normalised exact match and token F1; no judge)"


class TextMatch(NamedTuple):
    """Means over questions. exact_match and token_f1: 0 to 1, None without questions."""

    questions: int
    exact_match: float | None
    token_f1: float | None


def normalise(text: str) -> str:
    """Return a text in lower case without punctuation, articles and extra spaces.

    A text of nothing but articles, such as the answer "A", keeps them.

    Source: Rajpurkar et al., 2016, evaluation script.
    """
    words = text.lower().translate(_NO_PUNCTUATION).split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def exact_match(prediction: str, answer: str) -> bool:
    """Whether both texts are equal once normalised; False for an empty prediction."""
    predicted = normalise(prediction)
    return bool(predicted) and predicted == normalise(answer)


def token_f1(prediction: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall over the words of both, with repetition; 0 to 1."""
    predicted, expected = normalise(prediction).split(), normalise(answer).split()
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0


def summarize_matches(pairs: Iterable[tuple[str, str]]) -> TextMatch:
    """Return the means over pairs (prediction, answer); the prediction is "" if the model gave no answer."""
    pairs = list(pairs)
    if not pairs:
        return TextMatch(0, None, None)
    matches = [exact_match(*pair) for pair in pairs]
    overlaps = [token_f1(*pair) for pair in pairs]
    return TextMatch(len(pairs), sum(matches) / len(pairs), sum(overlaps) / len(pairs))


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
