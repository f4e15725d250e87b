"""Settings of all tests: the CPU, a cache of compiled programs, and a tiny needles benchmark."""

import os
from pathlib import Path

import pytest

# Set before JAX is imported, and inherited by the commands that tests start. The workers of pytest-xdist and
# later runs share the cache of compiled programs.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# The programs are small and run a few times. Optimizing them would take a third of the total time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()


# Files and folders that start no subprocess, use no mesh and compile few programs.
FAST = (
    *(
        "tests/media",
        "tests/records",
        "tests/text",
        "tests/ops/test_perturbed_topk.py",
        "tests/ops/test_pooling.py",
    ),
    *("tests/data/test_budget.py", "tests/data/test_media_reader.py", "tests/data/test_samples.py"),
    *("tests/data/test_lengths.py", "tests/data/test_survey.py", "tests/data/test_synthetic.py"),
    *("tests/evaluation/test_parsing.py", "tests/evaluation/test_choice_benchmarks.py"),
    *("tests/evaluation/test_other_benchmarks.py", "tests/evaluation/test_text_match.py"),
    *("tests/evaluation/test_judge_prompts.py", "tests/evaluation/test_predictions.py"),
    *(
        "tests/features/test_movie_features.py",
        "tests/serving/test_answer_text.py",
        "tests/serving/test_batch_layout.py",
        "tests/weights/test_files.py",
    ),
    *("tests/weights/test_gguf.py", "tests/training/test_feed.py", "tests/models/test_full_size.py"),
    *(
        "tests/parallel/test_sharding.py",
        "tests/test_data_config.py",
        "tests/test_mixtures.py",
        "tests/test_shapes.py",
    ),
)
NOT_FAST = ("tests/records/test_ten_thousand.py",)


def pytest_collection_modifyitems(config, items):
    """Mark the tests in FAST, which `pytest -m fast` selects."""
    for item in items:
        path = item.path.relative_to(config.rootpath).as_posix()
        if path.startswith(FAST) and path not in NOT_FAST and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.fast)


def pytest_configure():
    """Create eight virtual devices, for the tests of meshes. Other tests use the first; commands have one."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    from tests import shapes

    shapes.install()


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """Folder in which the tiny needles benchmark is generated."""
    from dynfocus_jax.data.prepare import prepare_data_root
    from tests.tiny import tiny_config

    root = tmp_path_factory.mktemp("data")
    config = tiny_config()
    config.data.root = str(root)
    prepare_data_root(config.data)
    return root


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs():
    """Drop the compiled programs of a file, which would fill gigabytes and are of no use to other files."""
    yield
    import jax

    jax.clear_caches()
