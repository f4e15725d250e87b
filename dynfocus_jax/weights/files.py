"""Readers of published weight files. They read one shard at a time and never execute code from a file."""

import importlib
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import einops
import ml_dtypes
import numpy as np
import safetensors

from dynfocus_jax.errors import UserError

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf")
_STEMS = ("model.safetensors", "pytorch_model.bin")  # names in a Hugging Face folder, the first preferred
_CONTAINERS = ("model", "state_dict", "module")  # keys below which training scripts store the weights


def open_weights(path: str | Path) -> "WeightSource":
    """Open the weights of a file or folder; values are read on access.

    Args:
      path: a `.safetensors`, `.bin`, `.pth`, `.pt` or `.gguf` file, the `.index.json` of several shards, or a
        folder that holds one of these in Hugging Face's layout.

    Raises:
      UserError: the path does not exist, is not a weights file, or its index does not fit its shards.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = _find_in_folder(file)
    if file.name.endswith(".index.json"):
        return WeightSource(file, _read_index(file))
    if not file.is_file():
        raise UserError(f"{file}: no such file or folder. Use a file or folder of published weights.")
    if file.suffix not in SUFFIXES:
        raise UserError(
            f"{file}: not a weights file, expected {', '.join(SUFFIXES)} or a folder with such files."
        )
    return WeightSource(file, {file: None})


class WeightSource:
    """Published weights, read one shard at a time.

    Attributes:
      where: path of the file or index, for messages.
    """

    def __init__(self, where: Path, files: Mapping[Path, set[str] | None]):
        """Initialise from {shard: names that the index expects in it, or None without an index}."""
        self.where = str(where)
        self._files = files
        self._open: tuple[Path, Mapping[str, np.ndarray]] | None = None

    def names(self) -> list[str]:
        """Return the names of all weights, sorted."""
        known = [names if names is not None else self._shard(file) for file, names in self._files.items()]
        return sorted(name for names in known for name in names)

    def shards(self) -> Iterator[Mapping[str, np.ndarray]]:
        """Yield {name: array} for each shard. An array is read on access; bfloat16 arrays use ml_dtypes."""
        for file, names in self._files.items():
            shard = self._shard(file)
            missing = sorted((names or set()) - set(shard))
            if missing:
                raise UserError(
                    f"{file}: {len(missing)} weights that the index {self.where} lists in this file are "
                    f"missing ({_shorten(missing)}). Download the file again."
                )
            yield shard

    def _shard(self, file: Path) -> Mapping[str, np.ndarray]:
        if self._open is None or self._open[0] != file:
            self._open = None  # frees the memory of the previous shard before the next one is opened
            self._open = file, _READERS[file.suffix](file)
        return self._open[1]


def _shorten(names: list[str], most: int = 3) -> str:
    """Join the first names with commas."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


# --- Folders and indices ------------------------------------------------------------------------------


def _find_in_folder(folder: Path) -> Path:
    """Return the weights file or index of a folder; raise UserError if there is not exactly one."""
    for stem in _STEMS:
        for name in (f"{stem}.index.json", stem):
            if (folder / name).is_file():
                return folder / name
    found = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if not found:
        raise UserError(f"{folder}: no weights in this folder, expected {', '.join(SUFFIXES)} files.")
    if len(found) == 1 and "-of-" not in found[0].stem:
        return found[0]
    if any("-of-" in file.stem for file in found):
        raise UserError(
            f"{folder}: the shards ({_shorten([file.name for file in found])}) have no index. Download "
            f"{' or '.join(f'{stem}.index.json' for stem in _STEMS)} as well."
        )
    raise UserError(
        f"{folder}: several weights files ({_shorten([file.name for file in found])}), expected one. Use "
        "the path of one file."
    )


def _read_index(index: Path) -> dict[Path, set[str]]:
    """Return {shard: names of its weights}; raise UserError if the index is malformed or a shard missing."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: index.parent / Path(shard).name for name, shard in names.items()}
    except OSError:
        raise UserError(f"{index}: cannot be read. Use a file or folder of published weights.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{index}: not an index of shards, expected a JSON object with 'weight_map'. Download it again."
        ) from None
    missing = sorted({file.name for file in files.values() if not file.is_file()})
    if missing:
        raise UserError(
            f"{index}: the index lists shards that are missing from the folder ({_shorten(missing)}). "
            "Download them."
        )
    unknown = sorted({file.name for file in files.values() if file.suffix not in _READERS})
    if unknown or not files:
        raise UserError(
            f"{index}: the index lists {_shorten(unknown) or 'no shards'}, expected files with the suffixes "
            f"{', '.join(SUFFIXES)}. Download it again."
        )
    shards: dict[Path, set[str]] = {file: set() for file in files.values()}
    for name, file in files.items():
        shards[file].add(name)
    return shards


# --- Readers of one file ------------------------------------------------------------------------------


def _import(module: str, file: Path) -> Any:
    """Import an optional module that reads `file`; raise UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"{file}: reading {file.suffix} files needs the package {module}, which is not installed. "
            "Install it with pip install -r requirements-convert.txt."
        ) from None


class _Safetensors(Mapping[str, np.ndarray]):
    """The arrays of a safetensors file; each access reads one array."""

    def __init__(self, file: Path):
        self._file = file
        try:
            self._handle = safetensors.safe_open(file, "np")
        except safetensors.SafetensorError as error:
            raise UserError(
                f"{file}: truncated or not a safetensors file ({error}). Download it again."
            ) from None
        self._names = list(self._handle.keys())

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self._handle.get_tensor(name)
        except (TypeError, AttributeError, ValueError) as error:
            dtype = self._handle.get_slice(name).get_dtype()
            raise UserError(
                f"{self._file}: {name} has the unsupported dtype {dtype}, expected float32, float16 or "
                f"bfloat16 ({error})."
            ) from None

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Torch(Mapping[str, np.ndarray]):
    """The tensors of a PyTorch state dict, as arrays that share their memory."""

    def __init__(self, tensors: Mapping[str, Any]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        import torch  # noqa: PLC0415 (an optional dependency, imported when the file was opened)

        tensor = self._tensors[name].detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _read_torch(file: Path) -> _Torch:
    """Read a `torch.save` file; only tensors and plain containers are accepted in its pickle."""
    torch = _import("torch", file)
    try:
        # PyTorch before 1.6 wrote plain pickles instead of zip archives; those cannot be memory-mapped.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported" in str(error):
            raise UserError(
                f"{file}: the pickle holds Python objects besides weights, and loading it would run code. "
                "Save the weights alone, preferably as safetensors."
            ) from None
        raise UserError(f"{file}: truncated or not a PyTorch file. Download it again.") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError):
        raise UserError(f"{file}: truncated or not a PyTorch file. Download it again.") from None
    for key in _CONTAINERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        raise UserError(
            f"{file}: not a state dict, expected tensors by name, at the top level or under the key "
            f"{' or '.join(map(repr, _CONTAINERS))}."
        )
    return _Torch(loaded)


class _Gguf(Mapping[str, np.ndarray]):
    """The weights of a GGUF decoder under their Hugging Face names, dequantised to float32 on access."""

    def __init__(self, file: Path):
        reader, self._architecture, field = _open_gguf(file)
        heads = field.get(f"{self._architecture}.attention.head_count", 1)
        kv_heads = field.get(f"{self._architecture}.attention.head_count_kv", heads)
        self._file = file
        self._heads = {"q_proj": heads, "k_proj": kv_heads}
        self._tensors = {_gguf_name(tensor.name): tensor for tensor in reader.tensors}

    def __getitem__(self, name: str) -> np.ndarray:
        import gguf  # noqa: PLC0415 (an optional dependency, imported when the file was opened)

        tensor = self._tensors[name]
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(f"{self._file}: {name} cannot be dequantised ({error}).") from None
        heads = self._heads.get(name.split(".")[-2])
        if self._architecture == "llama" and heads:
            # llama.cpp applies RoPE to neighbouring channels, Hugging Face's Llama to the halves of a head.
            array = einops.rearrange(array, "(head n two) ... -> (head two n) ...", head=heads, two=2)
        return array

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _open_gguf(file: Path) -> tuple[Any, str, dict[str, Any]]:
    """Return the reader of a GGUF file, its architecture, and its fields without the tokenizer's."""
    gguf = _import("gguf", file)
    try:
        reader = gguf.GGUFReader(file)
        field = {key: field.contents() for key, field in reader.fields.items() if "tokenizer" not in key}
        architecture = field["general.architecture"]
    except (ValueError, IndexError, KeyError, OSError):
        raise UserError(f"{file}: truncated or not a GGUF file. Download it again.") from None
    if architecture not in _GGUF_ARCHITECTURES:
        raise UserError(
            f"{file}: unsupported architecture {architecture!r}, expected one of "
            f"{', '.join(_GGUF_ARCHITECTURES)}."
        )
    return reader, architecture, field


def gguf_settings(file: Path) -> dict:
    """Return a GGUF file's decoder settings under the names of Hugging Face's config.json.

    GGUF stores Llama 3's RoPE scaling as one factor per frequency; it is returned as
    `{"rope_type": "llama3"}` without the factors.
    """
    reader, prefix, field = _open_gguf(file)
    settings = {
        theirs: field[f"{prefix}.{name}"]
        for name, theirs in _GGUF_SETTINGS.items()
        if f"{prefix}.{name}" in field
    }
    kind = field.get(f"{prefix}.rope.scaling.type", "none")
    scaling: dict[str, Any] = {"rope_type": "default" if kind == "none" else kind}
    if any(tensor.name.startswith("rope_freqs") for tensor in reader.tensors):
        scaling = {"rope_type": "llama3"}
    elif f"{prefix}.rope.scaling.factor" in field:
        scaling["factor"] = field[f"{prefix}.rope.scaling.factor"]
    tied = not any(tensor.name.startswith("output.") for tensor in reader.tensors)
    return settings | {"rope_scaling": scaling, "tie_word_embeddings": tied}


_GGUF_SETTINGS = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "rope_freqs": "model.rotary_emb.inv_freq",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _gguf_name(name: str) -> str:
    """Return the Hugging Face name of a GGUF weight; an unknown name is returned unchanged.

    "blk.3.attn_q.weight" gives "model.layers.3.self_attn.q_proj.weight".
    """
    *block, module, kind = name.split(".")
    if module not in _GGUF_NAMES:
        return name
    return ".".join([*(["model.layers", *block[1:]] if block else []), _GGUF_NAMES[module], kind])


_READERS: dict[str, Callable[[Path], Mapping[str, np.ndarray]]] = {
    ".safetensors": _Safetensors,
    ".bin": _read_torch,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".gguf": _Gguf,
}
