"""The prompts of the judge's rubrics, compared with the published ones, and the parser of replies."""

import hashlib

import pytest

from dynfocus_jax.evaluation.judge_prompts import Marks, rubric_named, rubrics

# First 16 digits of the SHA-256 of the published system and user messages (sources in judge_prompts.toml),
# joined by a zero byte, with $name for each field
PUBLISHED = {
    "video_chatgpt_qa": "79abfacc4c279cc9",
    "vcg_correctness": "ab8767041d260076",
    "vcg_detail": "5c906622e24ba78d",
    "vcg_context": "3b38191dbea199f6",
    "vcg_temporal": "e8457aaab02d3584",
    "vcg_consistency": "27ce0bc4f2a23221",
    "mlvu_ssc": "46c4556632d0c92c",
    "mlvu_summary": "9c32310e3b2387bc",
}


def test_prompts_equal_the_published_ones():
    assert rubrics().keys() == PUBLISHED.keys()
    for name, digest in PUBLISHED.items():
        fields = {field: f"${field}" for field in rubric_named(name).fields}
        system, user = (message["content"] for message in rubric_named(name).messages(fields))
        assert hashlib.sha256(f"{system}\0{user}".encode()).hexdigest()[:16] == digest, name
        assert rubric_named(name).version == f"{name}@{digest[:8]}"


def test_consistency_asks_about_both_questions():
    fields = {f"{kind}_{n}": f"{kind} {n}" for kind in ("question", "prediction") for n in (1, 2)}
    user = rubric_named("vcg_consistency").messages(fields | {"answer": "gold"})[1]["content"]
    assert "Question 1: question 1\nQuestion 2: question 2\nCorrect Answer: gold\n" in user
    assert "Question 1: prediction 1\nPredicted Answer to Question 2: prediction 2\n" in user


READ = {
    "{'pred': 'yes', 'score': 4}": (True, 4),
    '{"pred": "No", "score": 0}': (False, 0),
    "{'pred': 'yes', 'score': 4.8}.": (True, 4.8),
    "{'pred': 'yes', 'score': '5'}": (True, 5),
    "{''pred': 'yes', ''score': 3}": (True, 3),  # quotes as in the published example
    '```json\n{\n  "score": 2,\n  "pred": "no"\n}\n```': (False, 2),
    "<think>{'pred': 'no', 'score': 0}?</think> {'pred': 'yes', 'score': 5}": (True, 5),
    "{pred: yes, score: 1}": (True, 1),
    "{'pred': 'yes', 'score': 4, 'total_score': 9, 'why': 'it fits'}": (True, 4),
    "": None,
    "yes, 4": None,
    "{'pred': 'maybe', 'score': 4}": None,
    "{'pred': 'yes'}": None,
    "{'score': 4}": None,
    "{'pred': 'yes', 'score': 6}": None,
    "{'pred': 'yes', 'score': -1}": None,
    "{'pred': 'yes', 'score': 'nan'}": None,
    "{'pred': 'yes', 'score': '\uff14'}": None,
    "{'pred': 'yes', 'score': 4/5}": None,
    "{'pred': 'yes', 'score': 4, 'score': 1}": None,
    "{'pred': 'yes', 'score': 4} or rather {'pred': 'yes', 'score': 'n/a'}": None,
    "{'pred': 'yes', 'score': 4": None,
    "{" * 10_000: None,
}


@pytest.mark.parametrize(("reply", "marks"), READ.items())
def test_yes_or_no_with_a_score(reply, marks):
    expected = marks and Marks(marks[0], {"score": marks[1]})
    assert rubric_named("video_chatgpt_qa").read(reply) == expected


def test_two_scores_after_a_rationale():
    rationale = "The points {1, 2} are met: (5 + 3) / 2 = 4. Relevance: 5.\n"
    ssc = "{'score_accuracy': 4.0, 'score_relevance': 5, 'total_score': 4 + 5}"
    expected = Marks(None, {"score_accuracy": 4, "score_relevance": 5})
    assert rubric_named("mlvu_ssc").read(rationale + ssc) == expected
    assert rubric_named("mlvu_ssc").read(rationale + ssc.replace("4.0", "0")) is None  # the lowest score is 1
    summary = '{"scores": {"score_completeness": 1, "score_reliability": 2, "total_score": 3}}'
    expected = Marks(None, {"score_completeness": 1, "score_reliability": 2})
    assert rubric_named("mlvu_summary").read(summary) == expected
    assert rubric_named("mlvu_summary").read(ssc) is None
