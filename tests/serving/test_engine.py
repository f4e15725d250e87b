"""The engine: a naive loop, batches against single requests, meshes, the cache of clips, bad requests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynfocus_jax.batch import padding_sample
from dynfocus_jax.errors import UserError
from dynfocus_jax.media.video import Clip
from dynfocus_jax.parallel.sharding import to_devices
from dynfocus_jax.serving.engine import Engine
from dynfocus_jax.serving.requests import Request
from dynfocus_jax.serving.token_sampling import SamplingParams
from dynfocus_jax.text.conversation import TEMPLATES, encode_prompt
from dynfocus_jax.text.tokenizers import WordTokenizer
from dynfocus_jax.video_language_model import VideoLanguageModel
from tests.tiny import (
    MAX_QUERY,
    SIZE,
    VOCABULARY,
    K,
    make_sample,
    mesh_of,
    model_of,
    pad,
    random_params,
    stack,
    tiny_config,
)

FRAMES = 6
WORDS = [f"w{i}" for i in range(VOCABULARY - 4)]


def make_config(**generation):
    config = tiny_config()
    config.evaluation.media_frames = FRAMES
    config.model.language.update({"heads": 4, "kv_heads": 2})
    sizes = {"max_new_tokens": 7, "text": (8, 16), "batch": (1, 4, 16), "cache": 32}
    config.generation.update(sizes | generation)
    return config


@pytest.fixture(scope="module")
def tokenizer():
    return WordTokenizer(WORDS, strict=False)


@pytest.fixture(scope="module")
def params():
    model = model_of(make_config())
    batch = stack([pad(make_sample(np.random.default_rng(0), 3, 4, 3), FRAMES, 6)])
    params = random_params(model, batch)
    params["language"]["head"]["kernel"] *= 5.0  # rows get different answers
    return params


@pytest.fixture(scope="module")
def engine(params, tokenizer):
    return Engine(make_config(), params, tokenizer, mesh_of(data=1))


def clip_of(rng, count):
    frames = rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    return Clip(frames, np.arange(count) / 2, np.arange(count, dtype=np.int32))


def words(rng, count):
    return " ".join(rng.choice(WORDS, count))


def mixed_requests(count=16):
    """Videos, images and text, one to three turns, greedy and sampled, some with stop strings."""
    rng = np.random.default_rng(3)
    requests = []
    for number in range(count):
        turns = []
        for _ in range(number % 3):
            turns += [("user", words(rng, 2)), ("assistant", words(rng, 1))]
        frames = (FRAMES, 3, 1, 0)[number % 4]
        sampling = SamplingParams() if number % 2 else SamplingParams(1.5, number % 5 * 4, 0.9, seed=number)
        requests.append(
            Request(
                f"r{number}",
                (*turns, ("user", words(rng, 1 + number % 4))),
                clip=clip_of(rng, frames) if frames else None,
                sampling=sampling,
                max_new_tokens=None if number % 3 else 1 + number,
                stop=("w1",) if number % 5 == 0 else (),
                visual_at_end=number % 7 == 3,
            )
        )
    return requests


def naive_answer(config, params, tokenizer, request, count):
    """Greedy tokens, each from a forward pass over the whole sequence, without a KV cache."""
    model = model_of(config)
    turns = list(zip(request.messages[:-1:2], request.messages[1::2], strict=True))
    history = [(question, answer) for (_, question), (_, answer) in turns]
    prompt = encode_prompt(
        tokenizer,
        request.messages[-1][1],
        TEMPLATES[config.data.template],
        history,
        has_visual=request.clip is not None,
        visual_at_end=request.visual_at_end,
    )
    query = " ".join(text for role, text in request.messages if role == "user").split()[-MAX_QUERY:]
    ids = tokenizer.encode(" ".join(query))
    tokens = prompt.tokens.tolist()
    for _ in range(count):
        frames = np.zeros((0, SIZE, SIZE, 3), np.uint8) if request.clip is None else request.clip.frames
        sample = make_sample(np.random.default_rng(0), frames, len(tokens), len(ids))._replace(
            tokens=np.asarray(tokens, np.int32),
            query_tokens=np.asarray(ids, np.int32),
            visual_position=np.int32(prompt.visual_position),
        )
        batch = stack([pad(sample, FRAMES, 40)])
        logits = _forward(model, params, batch)
        tokens.append(int(np.argmax(logits[0, sample.length])))
        if tokens[-1] == tokenizer.eos_id:
            break
    return tuple(tokens[len(prompt.tokens) :])


def _forward(model, params, batch):
    run = _forward.__dict__.setdefault("run", jax.jit(lambda p, b: model.apply({"params": p}, b).logits))
    return np.asarray(run(params, batch))


def test_greedy_answers_equal_a_naive_loop_without_cache(engine, params, tokenizer):
    requests = [dataclasses.replace(r, sampling=SamplingParams(), stop=()) for r in mixed_requests(8)]
    answers = engine.generate(requests)
    for request, answer in zip(requests, answers, strict=True):
        limit = request.max_new_tokens or 7
        assert answer.tokens == naive_answer(engine.config, params, tokenizer, request, limit)
        assert answer.id == request.id
        ended = answer.tokens[-1] == tokenizer.eos_id
        assert answer.finish_reason == ("stop" if ended else "length")
        assert ended or len(answer.tokens) == limit
    assert len({answer.tokens for answer in answers}) == 8, "the case is too easy"


def prompts_batch(tokenizer, requests):
    """The last question of each request as a batch of the evaluation; the third row is a padding row."""
    rng, rows = np.random.default_rng(0), []
    for number, request in enumerate(requests):
        question = request.messages[-1][1]
        prompt = encode_prompt(tokenizer, question, TEMPLATES["plain"], has_visual=request.clip is not None)
        frames = np.zeros((0, SIZE, SIZE, 3), np.uint8) if request.clip is None else request.clip.frames
        query = np.asarray(tokenizer.encode(question), np.int32)
        sample = make_sample(rng, frames, len(prompt.tokens), len(query))._replace(
            tokens=prompt.tokens,
            query_tokens=query,
            visual_position=np.int32(prompt.visual_position),
            index=np.int32(number),
        )
        rows.append(pad(sample, FRAMES, 16))
    rows[2] = padding_sample(FRAMES, SIZE, 16, MAX_QUERY)
    return stack(rows)


def test_a_batch_of_the_evaluation_equals_single_requests(engine, tokenizer):
    """Answers, counts and focus of `answer_batch` against `generate`."""
    requests = [
        dataclasses.replace(each, messages=each.messages[-1:], sampling=SamplingParams(), stop=())
        for each in mixed_requests(8)
    ]
    requests = [dataclasses.replace(each, max_new_tokens=7, visual_at_end=False) for each in requests]
    answers = engine.answer_batch(to_devices(prompts_batch(tokenizer, requests), engine.mesh), 7)
    assert answers.index.tolist() == [0, 1, -1, *range(3, 8)]
    assert answers.tokens[2] == []
    for row, (request, alone) in enumerate(zip(requests, engine.generate(requests), strict=True)):
        if row == 2:
            continue
        assert tuple(answers.tokens[row]) == alone.tokens
        assert answers.clips.count[row] == alone.visual_tokens
        assert answers.clips.frames[row] == (0 if request.clip is None else len(request.clip.frames))
        if request.clip is not None:
            encoded = engine.encode_clip(request.clip, request.messages[-1][1])
            chosen, focus = encoded.focus.chosen.nonzero()[0], answers.clips.focus
            assert focus.chosen[row].nonzero()[0].tolist() == chosen.tolist()
            assert set(chosen) <= set(focus.candidates[row].nonzero()[0])
            assert focus.candidates[row].sum() == min(K, encoded.frames)


def same(one, other):
    fields = ("id", "text", "tokens", "finish_reason", "visual_tokens", "prompt_tokens", "error")
    return all(getattr(one, name) == getattr(other, name) for name in fields)


def test_sixteen_mixed_requests_together_equal_each_alone(engine):
    requests = mixed_requests()
    together = engine.generate(requests)
    alone = [engine.generate([request])[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert same(one, other)
    assert {len(answer.tokens) for answer in together} >= {1, 7}
    assert len({answer.tokens for answer in together}) > 10


def test_on_a_mesh(engine, params, tokenizer):
    """Rows are split over `fsdp`, kernels over `fsdp` and `tensor`."""
    mesh = mesh_of(fsdp=2, tensor=2)
    meshed = Engine(make_config(text=(16,), cache=64), params, tokenizer, mesh)
    requests = [each for each in mixed_requests(10) if each.clip is None or len(each.clip.frames) > 1][:5]
    for one, other in zip(meshed.generate(requests), engine.generate(requests), strict=True):
        assert same(one, other)
    batch = prompts_batch(tokenizer, requests[:4])
    one, other = (each.answer_batch(to_devices(batch, each.mesh), 7) for each in (meshed, engine))
    assert one.tokens == other.tokens
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one.clips, other.clips)


def test_a_batch_that_the_mesh_does_not_divide(engine, params, tokenizer):
    requests = [dataclasses.replace(each, clip=None) for each in mixed_requests(5)]
    meshed = Engine(make_config(text=(16,), cache=64), params, tokenizer, mesh_of(data=3))
    for one, other in zip(meshed.generate(requests), engine.generate(requests), strict=True):
        assert same(one, other)


def test_end_tokens(params, tokenizer):
    """An answer ends with the first end token, the tokenizer's or one of config.generation.end_tokens."""
    request = Request("a", (("user", "w5 w6"),))
    plain = Engine(make_config(), params, tokenizer, mesh_of(data=1)).generate([request])[0]
    assert plain.finish_reason == "length"
    assert len(plain.tokens) == 7
    end = plain.tokens[2]
    first = plain.tokens.index(end)

    class Ending(WordTokenizer):
        eos_id = end
        special_ids = frozenset({0, 1, 2, end})

    ending = Ending(WORDS, strict=False)
    answer = Engine(make_config(), params, ending, mesh_of(data=1)).generate([request])[0]
    assert answer.tokens == plain.tokens[: first + 1]
    assert answer.finish_reason == "stop"

    class Special(WordTokenizer):
        special_ids = frozenset({0, 1, 2, end})

    special = Special(WORDS, strict=False)
    config = make_config(end_tokens=(WORDS[end - 4],))
    assert Engine(config, params, special, mesh_of(data=1)).generate([request])[0].tokens == answer.tokens
    with pytest.raises(UserError, match="not a special token"):
        Engine(make_config(end_tokens=("w35",)), params, tokenizer, mesh_of(data=1))


def test_stop_string_ends_the_answer(engine):
    request = Request("a", (("user", "w5 w6"),))
    whole = engine.generate([request])[0]
    stop = whole.text.split()[2]
    answer = engine.generate([dataclasses.replace(request, stop=("nowhere", f" {stop}"))])[0]
    at = whole.text.index(f" {stop}")
    assert answer.text == whole.text[:at]
    assert answer.finish_reason == "stop"
    assert len(answer.tokens) < len(whole.tokens)


def test_streamed_pieces_concatenate_to_the_text(engine):
    requests = mixed_requests()
    pieces = {request.id: [] for request in requests}
    answers = engine.generate(requests, on_token=lambda name, text: pieces[name].append(text))
    assert {name: "".join(parts) for name, parts in pieces.items()} == {a.id: a.text for a in answers}
    assert max(map(len, pieces.values())) > 3


def test_a_clip_is_encoded_once_per_query(engine, monkeypatch):
    calls = []
    programs = engine._programs

    def encode_clips(*arguments):
        calls.append(1)
        return programs.encode_clips(*arguments)

    monkeypatch.setattr(engine, "_programs", programs._replace(encode_clips=encode_clips))
    rng = np.random.default_rng(11)
    clip, other = clip_of(rng, 4), clip_of(rng, 4)
    first = Request("a", (("user", "w1"),), clip=clip)
    engine.generate([first, dataclasses.replace(first, id="b")])
    assert len(calls) == 1
    engine.generate([first])
    assert len(calls) == 1
    engine.generate([dataclasses.replace(first, messages=(("user", "w2"),))])
    assert len(calls) == 2, "the text encoder reads another question"
    engine.generate([dataclasses.replace(first, clip=other)])
    assert len(calls) == 3
    encoded = engine.encode_clip(clip, "w1")
    turns = (("user", "w1"), ("assistant", "w3"), ("user", "w9"))
    reused = engine.generate([Request("c", turns, encoded=encoded)])[0]
    assert len(calls) == 3
    assert reused.visual_tokens == encoded.count


def test_an_encoded_clip_equals_the_model(engine, params):
    """Tokens, count and focus of a padded clip, against the model on the clip without padding."""
    clip = clip_of(np.random.default_rng(2), 4)
    encoded = engine.encode_clip(clip, "w7 w8")
    ids = engine.tokenizer.encode("w7 w8")
    sample = make_sample(np.random.default_rng(0), clip.frames, 2, len(ids))._replace(
        query_tokens=np.asarray(ids, np.int32)
    )
    model = model_of(engine.config)
    batch = stack([sample])
    expected = jax.jit(lambda p, b: model.apply({"params": p}, b, method=VideoLanguageModel.visual_tokens))(
        params, batch
    )
    assert encoded.count == int(expected.count[0])
    np.testing.assert_allclose(
        encoded.tokens[0, : encoded.count], expected.tokens[0, : encoded.count], rtol=1e-5, atol=1e-5
    )
    frames = expected.focus.frames[0][np.asarray(expected.focus.valid[0])]
    assert encoded.focus.chosen.nonzero()[0].tolist() == sorted(frames.tolist())
    np.testing.assert_allclose(encoded.focus.scores, expected.focus.scores[0], rtol=1e-5, atol=1e-6)
    assert encoded.frames == 4


def test_bad_requests_get_an_error_each_and_the_others_are_answered(engine):
    rng = np.random.default_rng(4)
    good = Request("good", (("user", "w1 w2"),))
    bad = {
        "no messages": Request("a", ()),
        "no question": Request("b", (("user", "w1"), ("assistant", "w2"))),
        "special": Request("c", (("user", "w1 <eos>"),)),
        "frames": Request("d", (("user", "w1"),), clip=clip_of(rng, FRAMES + 1)),
        "limit": dataclasses.replace(good, max_new_tokens=0),
        "stop": dataclasses.replace(good, stop=("",)),
        "temperature": dataclasses.replace(good, sampling=SamplingParams(-1.0)),
        "top_p": dataclasses.replace(good, sampling=SamplingParams(1.0, 0, 0.0)),
    }
    answers = engine.generate([good, *bad.values(), good])
    assert same(answers[0], answers[-1])
    assert answers[0].error is None
    for name, answer in zip(bad, answers[1:-1], strict=True):
        assert answer.finish_reason == "error", name
        assert len(answer.error) > 20
        assert answer.text == ""
    assert engine.generate([]) == []


def test_requests_over_max_length(params, tokenizer):
    engine = Engine(make_config(max_length=30), params, tokenizer, mesh_of(data=1))
    clip = clip_of(np.random.default_rng(4), FRAMES)
    answers = engine.generate([Request("a", (("user", "w1"),), clip=clip), Request("b", (("user", "w1"),))])
    assert "exceed config.generation.max_length = 30;" in answers[0].error
    assert answers[1].error is None


def test_answer_start_is_prefilled_and_not_repeated(engine):
    """After the beginning of its own answer as `answer_start`, the model continues as without it."""
    request = Request("a", (("user", "w5 w6"),))
    whole = engine.generate([request])[0]
    start, rest = whole.text.split()[:2], whole.text.split()[2:]
    answer = engine.generate([dataclasses.replace(request, answer_start=" ".join(start), max_new_tokens=5)])[
        0
    ]
    assert answer.text.split() == rest
    assert answer.prompt_tokens == whole.prompt_tokens + 2


def test_parameters_in_the_serving_layout_are_not_copied(engine, params, tokenizer):
    again = Engine(make_config(), engine._params, tokenizer, engine.mesh)
    for one, other in zip(jax.tree.leaves(again._params), jax.tree.leaves(engine._params), strict=True):
        assert one is other


def test_bfloat16_matrices_are_held_in_bfloat16(params, tokenizer):
    config = make_config()
    config.model.dtype = "bfloat16"
    engine = Engine(config, params, tokenizer, mesh_of(data=1))
    language = engine._params["language"]
    assert language["blocks"]["query"]["kernel"].dtype == jnp.bfloat16
    assert language["final_norm"]["scale"].dtype == jnp.float32
    assert engine.generate([Request("a", (("user", "w5 w6"),))])[0].error is None
