"""Reading published weight files: layouts of files and folders, and errors for malformed ones."""

import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dynfocus_jax.errors import UserError
from dynfocus_jax.weights.files import open_weights

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.linspace(-1, 1, 5).astype(ml_dtypes.bfloat16),
    "c.bias": np.full((), 7, np.float16),
}


def tensors(arrays=ARRAYS):
    """Return the arrays as tensors; bfloat16 is converted by its bits."""
    return {
        name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(array)
        for name, array in arrays.items()
    }


def check(path, arrays=ARRAYS):
    source = open_weights(path)
    assert source.names() == sorted(arrays)
    read = {name: shard[name] for shard in source.shards() for name in shard}
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def error_of(path) -> str:
    """Return the error of reading all weights of a path; it must be one line and name the path."""

    def read():
        return [shard[name] for shard in open_weights(path).shards() for name in shard]

    with pytest.raises(UserError) as caught:
        read()
    text = str(caught.value)
    assert str(path).removesuffix("/") in text
    assert "\n" not in text
    return text


# --- Files and folders --------------------------------------------------------------------------------


def test_safetensors_file_and_folder(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    check(tmp_path / "model.safetensors")
    check(str(tmp_path))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_pytorch_1.6"])
@pytest.mark.parametrize("key", [None, "model", "state_dict", "module"])
def test_pytorch_file(tmp_path, key, zipped):
    content = tensors() if key is None else {key: tensors(), "epoch": 3}
    torch.save(content, tmp_path / "some.pth", _use_new_zipfile_serialization=zipped)
    check(tmp_path / "some.pth")


def test_a_weight_may_be_named_like_a_container(tmp_path):
    arrays = {"model": ARRAYS["a.weight"], "module.b": ARRAYS["a.weight"]}
    torch.save(tensors(arrays), tmp_path / "x.bin")
    check(tmp_path, arrays)


def write_shards(folder, save, stem, suffix):
    """Write two shards and their index; return the index file."""
    names = [f"{stem}-0000{n}-of-00002.{suffix}" for n in (1, 2)]
    first = {"a.weight": ARRAYS["a.weight"]}
    rest = {name: array for name, array in ARRAYS.items() if name not in first}
    save(first, folder / names[0])
    save(rest, folder / names[1])
    index = {name: names[name not in first] for name in ARRAYS}
    file = folder / f"{stem}.{suffix}.index.json"
    file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return file


def save_torch(arrays, file):
    torch.save(tensors(arrays), file)


SHARDED = pytest.mark.parametrize(
    ("save", "stem", "suffix"),
    [(save_file, "model", "safetensors"), (save_torch, "pytorch_model", "bin")],
    ids=["safetensors", "bin"],
)


@SHARDED
def test_shards(tmp_path, save, stem, suffix):
    index = write_shards(tmp_path, save, stem, suffix)
    check(tmp_path)
    check(index)


def test_safetensors_are_preferred_to_pickles(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    check(tmp_path)


def test_shards_are_read_one_at_a_time(tmp_path):
    write_shards(tmp_path, save_file, "model", "safetensors")
    shards = open_weights(tmp_path).shards()
    assert list(next(shards)) == ["a.weight"]
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="00002-of-00002"):
        next(shards)


# --- Errors -------------------------------------------------------------------------------------------


def test_missing_file_or_empty_folder(tmp_path):
    assert "no such file" in error_of(tmp_path / "none.safetensors")
    assert "no weights in this folder" in error_of(tmp_path)


def test_another_kind_of_file(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "not a weights file" in error_of(tmp_path / "notes.txt")


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "bin", "gguf"])
@pytest.mark.parametrize("content", [b"", b"hello, I am a text file\n" * 9])
def test_a_text_file_with_the_suffix_of_weights(tmp_path, suffix, content):
    file = tmp_path / f"x.{suffix}"
    file.write_bytes(content)
    assert "truncated or not a" in error_of(file)


@pytest.mark.parametrize("share", [0.03, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated_file(tmp_path, kind, share):
    arrays = {"a": np.arange(3000, dtype=np.float32)}
    file = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    if kind == "safetensors":
        save_file(arrays, file)
    else:
        torch.save(tensors(arrays), file, _use_new_zipfile_serialization=kind == "zip")
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert "truncated" in error_of(file)


@SHARDED
def test_truncated_shard(tmp_path, save, stem, suffix):
    write_shards(tmp_path, save, stem, suffix)
    shard = tmp_path / f"{stem}-00002-of-00002.{suffix}"
    shard.write_bytes(shard.read_bytes()[:-20])
    text = error_of(tmp_path)
    assert shard.name in text
    assert "truncated" in text


@SHARDED
def test_shards_without_an_index(tmp_path, save, stem, suffix):
    write_shards(tmp_path, save, stem, suffix).unlink()
    assert "no index" in error_of(tmp_path)
    (tmp_path / f"{stem}-00001-of-00002.{suffix}").unlink()
    assert "no index" in error_of(tmp_path), "a single shard is incomplete too"


@SHARDED
def test_an_index_that_lists_a_missing_shard(tmp_path, save, stem, suffix):
    write_shards(tmp_path, save, stem, suffix)
    (tmp_path / f"{stem}-00001-of-00002.{suffix}").unlink()
    assert f"missing from the folder ({stem}-00001-of-00002.{suffix})" in error_of(tmp_path)


@SHARDED
def test_an_index_that_lists_a_weight_missing_from_its_shard(tmp_path, save, stem, suffix):
    file = write_shards(tmp_path, save, stem, suffix)
    index = json.loads(file.read_text())
    index["weight_map"]["d.weight"] = f"{stem}-00001-of-00002.{suffix}"
    file.write_text(json.dumps(index))
    text = error_of(tmp_path)
    assert f"{stem}-00001-of-00002.{suffix}" in text
    assert "d.weight" in text


@pytest.mark.parametrize(
    "content", ["", "[]", '{"weights": {}}', '{"weight_map": {}}', '{"weight_map": {"a": "x.txt"}}', "{"]
)
def test_a_malformed_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    (tmp_path / "x.txt").write_text("")
    error_of(tmp_path)


def test_an_index_cannot_leave_its_folder(tmp_path):
    """Only the file name of a listed path counts; the file must lie beside the index."""
    (tmp_path / "in").mkdir()
    save_file(ARRAYS, tmp_path / "x.safetensors")
    index = {"weight_map": dict.fromkeys(ARRAYS, "../x.safetensors")}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "missing from the folder" in error_of(tmp_path / "in")


def test_several_files(tmp_path):
    for name in ("one.pth", "two.pth"):
        torch.save(tensors(), tmp_path / name)
    assert "several weights files" in error_of(tmp_path)


class _Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path, kind):
    content, file = tensors() | {"x": _Evil(tmp_path / "ran")}, tmp_path / "evil.pth"
    if kind == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    assert "would run code" in error_of(file)
    assert not (tmp_path / "ran").exists()


def test_a_pickled_module_is_an_error(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    assert "would run code" in error_of(tmp_path / "module.pth")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": {"a": [torch.ones(1)]}}, torch.ones(2)])
def test_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    assert "not a state dict" in error_of(tmp_path / "x.pt")
