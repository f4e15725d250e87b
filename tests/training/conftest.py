"""A tiny run, stage by stage, for the tests of training."""

import jax
import pytest

from dynfocus_jax.data.prepare import make_tokenizer, prepare_data_root
from dynfocus_jax.training.loop import StageRun
from dynfocus_jax.validation import validate
from tests.tiny import mesh_of, tiny_config


@pytest.fixture(scope="session")
def run_stage(data_root):
    """A function (workdir, index, change=None) -> StageRun of the tiny configuration, changed."""

    def build(workdir, index, change=None, root=None):
        config = tiny_config()
        config.data.root = str(data_root)
        config.checkpoint.every = 100
        if change:
            change(config)
        validate(config)
        if root is None:
            root = prepare_data_root(config.data)
        tokenizer = make_tokenizer(config, root / config.data.vocabulary)
        return StageRun(config, index, workdir=workdir, data_root=root, tokenizer=tokenizer, mesh=mesh_of())

    return build


@pytest.fixture(scope="session")
def stages(run_stage, tmp_path_factory):
    """Parameters before and after every stage of an uninterrupted run: {name: (before, after)}, numpy."""
    workdir = tmp_path_factory.mktemp("run")
    params, taken = None, {}
    for index in range(4):
        stage = run_stage(workdir, index)
        before, _ = run_stage(tmp_path_factory.mktemp("start"), index).run(params, stop_at=0)
        before = jax.device_get(before)
        params, _ = stage.run(params)
        taken[stage.name] = before, jax.device_get(params)
    return taken
