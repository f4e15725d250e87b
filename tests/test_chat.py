"""`chat`: turns, commands, printed lines, and that errors do not change the conversation."""

import re

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from dynfocus_jax.chat import Chat, main
from dynfocus_jax.data.prepare import make_media_reader
from dynfocus_jax.errors import MediaError, UserError
from dynfocus_jax.media.video import Clip
from dynfocus_jax.serving.engine import Engine
from dynfocus_jax.serving.requests import Request
from dynfocus_jax.text.tokenizers import WordTokenizer
from tests.tiny import (
    SIZE,
    VOCABULARY,
    J,
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


class OneVideo:
    """A reader of one video, a.mp4; any other path is an error."""

    def __init__(self):
        frames = np.random.default_rng(1).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
        self.clip = Clip(frames, np.arange(5) / 4, np.arange(5, dtype=np.int32))

    def read(self, record, limit, rng):
        assert limit == FRAMES
        if record.media.name != "a.mp4":
            raise MediaError(f"{record.media}: no such file")
        return self.clip


@pytest.fixture(scope="module")
def engine():
    config = tiny_config()
    config.evaluation.media_frames = FRAMES
    config.generation.update({"max_new_tokens": 5, "text": (32,), "batch": (1,), "cache": 64})
    model = model_of(config)
    params = random_params(model, stack([pad(make_sample(np.random.default_rng(0), 3, 4, 3), FRAMES, 6)]))
    params["language"]["head"]["kernel"] *= 5.0
    return Engine(config, params, WordTokenizer(WORDS, strict=False), mesh_of(data=1))


class Talk:
    """A chat whose output is recorded."""

    def __init__(self, engine, media=None, **request):
        self.text = ""
        self.chat = Chat(engine, media or OneVideo(), Request("chat", (), **request), self.write)

    def write(self, text, end="\n", flush=False):
        self.text += text + end

    def say(self, *lines):
        """Enter lines; return the output of the last one."""
        for line in lines:
            self.text = ""
            assert self.chat.handle(line)
        return self.text.splitlines()


def test_an_answer_and_its_summary(engine):
    answer, first = Talk(engine).say("/video a.mp4", "w1 w2")
    again, took = Talk(engine).say("/video a.mp4", "w1 w2")
    assert again == answer
    assert first.endswith(", including compilation]")
    assert "compilation" not in took
    expected = engine.generate([Request("x", (("user", "w1 w2"),), clip=OneVideo().clip)])[0]
    assert answer == (expected.text or "(no answer)")
    encoded = engine.encode_clip(OneVideo().clip, "w1 w2")
    cone = 4 + 4 + 2  # P and the levels of M
    assert encoded.count == J * cone + 2 * (5 - J)
    assert f"5 frames: {J} in focus with {cone} tokens, {5 - J} others with 2;" in took
    named = re.findall(r"(\d) \((\d\.\d\d) s, score (\d\.\d\d)\)", took)
    assert [int(i) for i, _, _ in named] == encoded.focus.chosen.nonzero()[0].tolist()
    assert [float(t) for _, t, _ in named] == [int(i) / 4 for i, _, _ in named]
    assert f"{encoded.count} visual and {expected.prompt_tokens} text tokens" in took
    assert re.search(r"first token after \d+\.\d\d s", took)
    assert ("tokens/s" in took) == (len(expected.tokens) > 1)


def test_turns_are_remembered_until_reset(engine):
    talk = Talk(engine)
    first, _ = talk.say("/video a.mp4", "w1 w2")
    second, _ = talk.say("w7")
    clip = OneVideo().clip
    said = "" if first == "(no answer)" else first
    turns = (("user", "w1 w2"), ("assistant", said), ("user", "w7"))
    expected = engine.generate([Request("x", turns, clip=clip)])[0].text or "(no answer)"
    assert second == expected
    alone = engine.generate([Request("x", (("user", "w7"),), clip=clip)])[0].text or "(no answer)"
    assert talk.say("/reset", "w7")[0] == alone
    assert talk.say("/video a.mp4", "w1 w2")[0] == first


def test_without_a_video(engine):
    answer, took = Talk(engine).say("w3 w4")
    assert answer == (engine.generate([Request("x", (("user", "w3 w4"),))])[0].text or "(no answer)")
    assert "visual" not in took
    assert re.match(r"\[\d+ text tokens; first token", took)


def test_focus_draws_the_frames_of_the_latest_answer(engine, tmp_path):
    talk = Talk(engine)
    picture = tmp_path / "focus.png"
    assert talk.say(f"/focus {picture}") == ["error: nothing to draw: ask a question about a video first."]
    assert talk.say("/video a.mp4", "w1", f"/focus {picture}") == [f"wrote {picture}"]
    with Image.open(picture) as image:
        assert image.size[0] > 500
    (line,) = talk.say(f"/focus {tmp_path}/none/focus.png")
    assert line.startswith("error: cannot write the picture to")
    (line,) = talk.say(f"/focus {tmp_path}/focus.nothing")
    assert line.startswith("error: cannot write the picture to")


def test_errors_are_written_and_change_nothing(engine):
    talk = Talk(engine)
    talk.say("/video a.mp4", "w1 w2")
    assert talk.say("/video b.mp4") == ["error: b.mp4: no such file"]
    (line,) = talk.say("/fokus")
    assert line == "error: /fokus is not a command; use /focus [FILE], /video FILE, /reset or /quit."
    assert "contains a special token" in talk.say("w1 <eos>")[0]
    assert talk.say("") == []
    again = Talk(engine)
    again.say("/video a.mp4", "w1 w2")
    assert talk.say("w9")[0] == again.say("w9")[0]


def test_unknown_words_are_named(engine):
    note, *_ = Talk(engine).say("w1 zebra w2 zoo")
    assert note == "note: words that the model does not know: zebra, zoo"


def test_quit_ends(engine):
    assert not Talk(engine).chat.handle("/quit")


def test_an_image(engine, tmp_path):
    """An image file, read as the configuration says."""
    Image.fromarray(OneVideo().clip.frames[0]).save(tmp_path / "a.png")
    talk = Talk(engine, make_media_reader(engine.config))
    _, took = talk.say(f"/video {tmp_path}/a.png", "w1")
    assert "1 frame: 1 in focus with 10 tokens, 0 others with 0;" in took


def test_sampling_and_stop_strings_reach_the_engine(engine):
    whole, _ = Talk(engine).say("/video a.mp4", "w1 w2")
    stop = whole.split()[-1]
    answer, _ = Talk(engine, stop=(stop,)).say("/video a.mp4", "w1 w2")
    assert answer == whole[: whole.index(stop)].rstrip() or answer == "(no answer)"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "--checkpoint is missing; set it to the workdir of a training run"),
        ({"checkpoint": "/nowhere"}, "--checkpoint /nowhere has no config.json; set it to the workdir"),
        ({"checkpoint": "/nowhere", "question": " "}, "--question is empty; set it to a question"),
    ],
)
def test_missing_and_empty_flags(given, sentence):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    with flagsaver.flagsaver(**given), pytest.raises(UserError, match=sentence):
        main()


def test_ask_raises_the_error_that_a_line_prints(engine):
    with pytest.raises(UserError, match="special token"):
        Talk(engine).chat.ask("<bos>")
