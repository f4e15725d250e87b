"""Measures of open answers that need no judge: normalised exact match and token F1.

They are not the benchmarks' own measure, which is a judge's (`dynfocus_jax.evaluation.judge`), and are always
reported under their own names.
"""

import string
from collections import Counter
from collections.abc import Iterable

MEASURE = "offline text match (normalised exact match and token F1; no judge)"


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and extra spaces (Rajpurkar et al., 2016, evaluation script).

    A text of nothing but articles, such as the answer "A", keeps them.
    """
    words = text.lower().translate(_NO_PUNCTUATION).split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def exact_match(prediction: str, answer: str) -> bool:
    """Whether both are the same once normalised; an empty prediction never is."""
    predicted = normalise(prediction)
    return bool(predicted) and predicted == normalise(answer)


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the words of both, each as often as it occurs; 0 to 1."""
    predicted, wanted = normalise(prediction).split(), normalise(answer).split()
    shared = (Counter(predicted) & Counter(wanted)).total()
    return 2 * shared / (len(predicted) + len(wanted)) if shared else 0.0


def summarize_matches(pairs: Iterable[tuple[str, str]]) -> dict:
    """The means over all (prediction, answer); a question without a prediction takes part with an empty one.

    Returns:
      measure: what this is, in words; questions; exact_match and token_f1, 0 to 1, None without questions.
    """
    pairs = list(pairs)
    matches = [exact_match(*pair) for pair in pairs]
    overlaps = [token_f1(*pair) for pair in pairs]
    return {
        "measure": MEASURE,
        "questions": len(pairs),
        "exact_match": sum(matches) / len(pairs) if pairs else None,
        "token_f1": sum(overlaps) / len(pairs) if pairs else None,
    }


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
