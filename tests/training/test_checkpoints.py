"""Checkpoints of a stage: contents, which are kept, states and settings that are refused."""

import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.training.checkpoints import StageCheckpoints
from dynfocus_jax.training.state import TrainState
from dynfocus_jax.version import code_version

SETTINGS = {"seed": 0, "stage": {"learning_rate": 0.1, "trainable": ("a.*",)}}
ABOUT = {"config": {"seed": 0, "log_every": 5}, "code": code_version()}


def make_state(step=0, value=0.0, dtype=jnp.float32, width=3):
    trained = {"part": {"kernel": jnp.full((2, width), value, dtype), "bias": jnp.full(width, value, dtype)}}
    frozen = {"tower": {"kernel": jnp.full(4, -value, jnp.bfloat16)}}
    return TrainState(jnp.int32(step), trained, frozen, optax.adamw(0.1).init(trained))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def open_checkpoints(path, settings=SETTINGS, about=ABOUT, **options):
    return StageCheckpoints(path / "stage", settings, about, **({"every": 1, "keep": 1} | options))


def save(checkpoints, step, loss=0.0):
    checkpoints.save(step, make_state(step, value=step), 10.0 * step, {"loss": loss, "grad_norm": -loss})


def kept(path):
    return sorted(int(folder.name) for folder in (path / "stage").iterdir() if folder.is_dir())


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_the_newest_is_restored_with_its_moments(tmp_path):
    checkpoints = open_checkpoints(tmp_path, keep=2)
    assert checkpoints.latest_step() is None
    for step in (1, 2, 3):
        save(checkpoints, step)
    checkpoints.wait()
    again = open_checkpoints(tmp_path, keep=2)
    assert again.latest_step() == 3
    state, seconds = again.restore(abstract(make_state()))
    assert_equal(state, make_state(3, value=3))
    assert seconds == again.seconds() == 30
    params = again.restore_params()
    assert isinstance(params["part"]["kernel"], np.ndarray)
    assert_equal(params, jax.device_get({"part": state.trained["part"], "tower": state.frozen["tower"]}))


LOSSES = {2: 5.0, 4: 1.0, 6: 3.0, 8: 9.0, 10: 2.0, 12: 4.0, 14: 6.0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [14]),
        ({"keep": 3}, [10, 12, 14]),
        ({"keep_every": 6}, [6, 12, 14]),
        ({"best": "loss"}, [4, 14]),
        ({"best": "loss", "best_mode": "max"}, [8, 14]),
        ({"best": "grad_norm"}, [8, 14]),
        ({"keep": 2, "keep_every": 6, "best": "loss"}, [4, 6, 12, 14]),
    ],
)
def test_kept_checkpoints(tmp_path, options, expected):
    """The policies hold across interruptions, after which another manager writes."""
    checkpoints = open_checkpoints(tmp_path, **options)
    for step, loss in LOSSES.items():
        if step in (6, 12):
            checkpoints.wait()
            checkpoints = open_checkpoints(tmp_path, **options)
        save(checkpoints, step, loss)
    checkpoints.wait()
    assert kept(tmp_path) == expected
    if "best" in options:
        assert checkpoints.best_step() == min(set(expected) & {4, 8})
        assert open_checkpoints(tmp_path, **options).best_step() == min(set(expected) & {4, 8})


def test_a_better_checkpoint_replaces_the_best(tmp_path):
    checkpoints = open_checkpoints(tmp_path, best="loss")
    seen = []
    for step, loss in enumerate((3.0, 2.0, 4.0, 1.0, 5.0), 1):
        save(checkpoints, step, loss)
        checkpoints.wait()
        seen.append(kept(tmp_path))
    assert seen == [[1], [2], [2, 3], [4], [4, 5]]


def test_information_kept_with_the_state(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    save(checkpoints, 4)
    checkpoints.wait()
    meta = json.loads((tmp_path / "stage" / "4" / "meta" / "metadata").read_text())
    assert meta["config"] == ABOUT["config"]
    assert meta["code"] == code_version()
    assert len(meta["code"]["source"]) == 12
    assert meta["code"]["jax"] == jax.__version__
    assert meta["settings"]["stage"]["trainable"] == ["a.*"]


def test_another_version_of_the_code_is_reported(tmp_path, capsys):
    checkpoints = open_checkpoints(tmp_path)
    save(checkpoints, 1)
    checkpoints.wait()
    open_checkpoints(tmp_path).restore(abstract(make_state()))
    assert capsys.readouterr().out == ""
    about = ABOUT | {"code": code_version() | {"source": "0" * 12}}
    open_checkpoints(tmp_path, about=about).restore(abstract(make_state()))
    out = capsys.readouterr().out
    assert (
        f"another version of the code (source: then '{code_version()['source']}', now '000000000000')" in out
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": jnp.bfloat16}, r"trained/part/bias: then '\(3,\) float32', now '\(3,\) bfloat16'"),
        ({"width": 5}, r"trained/part/bias: then '\(3,\) float32', now '\(5,\) float32'"),
    ],
)
def test_another_state_is_refused(tmp_path, changes, sentence):
    """Orbax alone would cast silently."""
    checkpoints = open_checkpoints(tmp_path)
    save(checkpoints, 1)
    checkpoints.wait()
    with pytest.raises(UserError, match=rf"the state in .*stage/1 does not fit .*\(.*{sentence}.*--workdir"):
        open_checkpoints(tmp_path).restore(abstract(make_state(**changes)))
    less = make_state()._replace(frozen={})
    with pytest.raises(UserError, match=r"frozen/tower/kernel: then '\(4,\) bfloat16', now None"):
        open_checkpoints(tmp_path).restore(abstract(less))


def test_other_settings_are_refused(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    save(checkpoints, 1)
    checkpoints.wait()
    other = SETTINGS | {"stage": SETTINGS["stage"] | {"learning_rate": 0.2}}
    with pytest.raises(
        UserError, match=r"other settings \(stage\.learning_rate: then 0\.1, now 0\.2\).*--workdir"
    ):
        open_checkpoints(tmp_path, settings=other)


def test_an_unfinished_save_is_not_a_checkpoint(tmp_path):
    checkpoints = open_checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        save(checkpoints, step)
    checkpoints.wait()
    stage = tmp_path / "stage"
    names = {path.name for path in stage.iterdir()}
    (stage / "2").rename(stage / "3.orbax-checkpoint-tmp")  # Orbax's name of an unfinished save
    again = open_checkpoints(tmp_path, keep=3)
    assert not (stage / "3.orbax-checkpoint-tmp").exists()  # at once: no thread outlives a refused run
    assert again.latest_step() == 1
    state, _ = again.restore(abstract(make_state()))
    assert int(state.step) == 1
    for step in (2, 3):
        save(again, step)
    again.wait()
    assert {path.name for path in stage.iterdir()} == names | {"3"}


def test_changes_of_the_state_after_the_call_are_not_saved(tmp_path):
    """The state may be donated to the next step while the files are still being written."""
    checkpoints = open_checkpoints(tmp_path)
    step_on = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = make_state(1, value=1)
    expected = jax.tree.map(np.array, state)
    checkpoints.save(1, state, 0.0, {"loss": 0.0, "grad_norm": 0.0})
    for _ in range(20):
        state = step_on(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored, _ = open_checkpoints(tmp_path).restore(abstract(make_state()))
    assert_equal(jax.tree.map(np.array, restored), expected)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of abandoned writers
def test_a_full_disk(tmp_path):
    """A limit on the size of files stands in for a full disk."""
    checkpoints = open_checkpoints(tmp_path, keep=2)
    save(checkpoints, 1)
    checkpoints.wait()
    large = make_state(2)
    noise = jax.random.normal(jax.random.key(0), (1 << 18,))  # does not compress
    large.trained["part"]["kernel"] = noise
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, limits[1]))
    try:
        checkpoints.save(2, large, 20.0, {})
        with pytest.raises(
            RunError, match=r"cannot write a checkpoint to .*stage \(.*the last one is of step 1"
        ):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert open_checkpoints(tmp_path, keep=2).restore(abstract(make_state()))[1] == 10
