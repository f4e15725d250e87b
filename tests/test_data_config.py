"""The configuration of data: error messages, mixtures in files, and overrides of their fields."""

import json

import pytest

from dynfocus_jax import command as command_lib
from dynfocus_jax.config import from_dict, source, stage
from dynfocus_jax.data.budget import stage_buckets
from dynfocus_jax.errors import UserError
from dynfocus_jax.sections import to_dict
from dynfocus_jax.training.stage_data import with_steps
from dynfocus_jax.validation import validate
from tests.commands import command
from tests.tiny import tiny_config

TWO_SOURCES = (
    source(name="a", annotations="a.json"),
    source(name="b", annotations="b.json", format="webvid"),
)
MIXTURE = {"annotations": None, "sources": TWO_SOURCES}


def expect_error(config, *parts):
    with pytest.raises(UserError) as error:
        validate(config)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"epochs": 2.0}, ("stages[1] has both steps and epochs",)),
        ({"epochs": 0.0, "steps": None}, ("stages[1].epochs is 0.0",)),
        ({"sources": TWO_SOURCES}, ("stages[1] has both annotations and sources",)),
        ({"buckets": ((4, 8), (4,))}, ("stages[1].buckets has (4,)", "(num_frames, max_text) pairs")),
        ({"buckets": ((4, 0),)}, ("stages[1].buckets has (4, 0)",)),
        ({"buckets": ((4, 8), (1, 8), (4, 8))}, ("stages[1].buckets has the same shape twice",)),
        ({"max_subtitle": -1}, ("stages[1].max_subtitle is -1", "at least 0")),
        ({"max_length": 0}, ("stages[1].max_length is 0",)),
        ({"on_overflow": "cut"}, ("stages[1].on_overflow is 'cut'", "'drop_turns'")),
        (
            MIXTURE | {"sources": (*TWO_SOURCES, TWO_SOURCES[0])},
            ("stages[1].sources has two sources with the same name: a, b, a",),
        ),
        (MIXTURE | {"sources": (source(name="a"),)}, ("sources[0].annotations is not set",)),
        (MIXTURE | {"sources": (source(annotations="a.json"),)}, ("sources[0].name is not set",)),
        (
            MIXTURE | {"sources": (TWO_SOURCES[0], source(name="b", annotations="b.json", weight=2.0))},
            ("stages[1].sources has weights for b only",),
        ),
        *(
            (MIXTURE | {"sources": (source(name="a", annotations="a.json", **{field: value}),)}, parts)
            for field, value, parts in (
                ("format", "coco", ("sources[0].format is 'coco'", "'llava'")),
                ("modality", "sound", ("sources[0].modality is 'sound'",)),
                ("select", "last:3", ("sources[0].select is 'last:3'", "'first:N%'")),
                ("select", "first:-3", ("sources[0].select",)),
                ("repeat", 0, ("sources[0].repeat is 0",)),
                ("weight", 0.0, ("sources[0].weight is 0.0",)),
            )
        ),
    ],
    ids=str,
)
def test_stage_fields(fields, parts):
    config = tiny_config()
    config.stages[1].update(fields)
    expect_error(config, *parts)


@pytest.mark.parametrize(
    ("field", "value", "parts"),
    [
        ("text_guidance", "last_turn", ("text_guidance is 'last_turn'", "'each_turn'")),
        ("image_layout", "fill", ("image_layout is 'fill'", "'pad'")),
        ("timeout", 0.0, ("timeout is 0.0",)),
        ("processes", -1, ("processes is -1",)),
        ("template", "llama2", ("template is 'llama2'", "'llama3'", "'chatml'", "'imgsp_v1'")),
        ("sampling.kind", "random", ("sampling.kind is 'random'", "'segments'")),
        ("sampling.pick", "first", ("sampling.pick is 'first'",)),
        ("sampling.fps", 0.0, ("sampling.fps is 0.0",)),
        ("sampling.above", 3000, ("sampling.above is 3000", "at most cap = 2000")),
    ],
)
def test_data_fields(field, value, parts):
    config = tiny_config()
    config.data.update_from_flattened_dict({field: value})
    expect_error(config, *(f"data.{part}" if part is parts[0] else part for part in parts))


def test_max_turns_excludes_one_sample_per_turn():
    config = tiny_config()
    config.data.text_guidance = "each_turn"
    config.stages[0].max_turns = 2
    expect_error(config, "stages[0].max_turns is 2", "'each_turn'")


def test_invalid_sources():
    with pytest.raises(
        UserError, match=r"source\(\.\.\.\) has no field 'repeats' \(did you mean 'repeat'\?\)"
    ):
        source(name="a", repeats=2)
    config = tiny_config()
    config.stages[0].update({"annotations": None, "sources": ("a.json",)})
    expect_error(config, "stages[0].sources[0] is 'a.json', expected a source")


def test_mixtures_round_trip_through_json():
    config = tiny_config()
    config.stages[1].update(MIXTURE | {"steps": None, "epochs": 1.5, "buckets": ((4, 8), (1, 20))})
    validate(config)
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert to_dict(again) == to_dict(config)
    validate(again)
    assert again.stages[1].sources[1].format == "webvid"
    assert stage_buckets(again.stages[1]) == ((4, 8), (1, 20))
    assert stage_buckets(stage(num_frames=3, max_text=5)) == ((3, 5),)


def test_with_steps():
    config = tiny_config()
    config.stages[1].update({"steps": None, "epochs": 1.5})
    changed = with_steps(config, 1, 12)
    assert (changed.stages[1].steps, changed.stages[1].epochs) == (12, None)
    assert (config.stages[1].steps, config.stages[1].epochs) == (None, 1.5)
    assert to_dict(changed.stages[0]) == to_dict(config.stages[0])
    validate(changed)


def test_source_fields_on_the_command_line(tmp_path):
    file = tmp_path / "mixed.py"
    file.write_text(
        "from tests.test_data_config import MIXTURE\n"
        "from tests.tiny import tiny_config\n"
        "def get_config(arg=''):\n"
        "    config = tiny_config()\n"
        "    config.stages[0].update(MIXTURE)\n"
        "    return config\n"
    )
    arguments = ["train", f"--config={file}", "--config.stages[0].sources[1].repeat=2"]
    command_lib._take_config(arguments)
    with pytest.raises(UserError, match=r"sources has 2 entries, so .*sources\[2\] does not exist"):
        command_lib._take_config([*arguments, "--config.stages[0].sources[2].repeat=2"])
    code, stdout, stderr = command(
        *("train", f"--config={file}", f"--workdir={tmp_path}/run", f"--config.data.root={tmp_path}"),
        "--config.stages[0].sources[1].repeat=0",
    )
    assert (code, stdout) == (2, "")
    (line,) = stderr.splitlines()
    assert "stages[0].sources[1].repeat is 0" in line
