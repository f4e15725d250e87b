"""Compare the backbones at full size with Hugging Face's PyTorch modules, with the same random weights.

    python benchmarks/backbones.py --device gpu --dtype bfloat16 --reference float32
    python benchmarks/backbones.py --device gpu --dtype float32 --layers 4
    python benchmarks/backbones.py --layers 1 --batch 2 --tokens 64 --frames 2

Parts: `vision` (EVA ViT-g without the LayerNorm that belongs to the text encoder), `text_encoder`
(InstructBLIP's Q-Former with the LayerNorm before it and the projection W_q after it), `language` (Llama 7B),
`end_to_end` (ours only: one forward pass of the whole system, from the frames of a video and a question of 32
tokens to logits, with random weights generated on the device).

The PyTorch module and ours run one after the other, each in its own process, so that host and accelerator
never hold both. Our module gets the weights through dynfocus_jax/weights. Weights and inputs are exact in
bfloat16, so they are the same in every precision; float32 is computed without TF32. Differences of outputs
are divided by the largest magnitude of PyTorch's output; `--reference float32` adds the differences of both
programs from PyTorch in float32. Times are medians of the calls after the first, which measures peak memory.
The libraries are imported in the functions that run in those processes.
"""

import argparse
import datetime
import functools
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs in any folder

from benchmarks.reporting import (
    add_output_argument,
    markdown_table,
    peak_memory,
    processor,
    seconds,
    write_report,
)
from dynfocus_jax.config import default_config
from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.weights.files import WeightSource

# Part -> family of its published names, and its batch: number of frames or texts
FAMILIES = {"vision": "instruct_blip_vision", "text_encoder": "qformer_instruct_blip", "language": "llama"}
BATCH = {"vision": 32, "text_encoder": 32, "language": 1}
QUESTION = 32  # tokens
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


# --- Weights and inputs of both programs --------------------------------------------------------------


def model_section(options: argparse.Namespace) -> ConfigDict:
    """Return `config.model` of the published system with the dtype, depth and attention of the options."""
    model = default_config().model
    model.dtype = model.param_dtype = options.dtype
    for part in FAMILIES:
        model[part].depth = min(model[part].depth, options.layers or model[part].depth)
        model[part].attention = options.attention
    return model


def uniform(rng: np.random.Generator, shape, scale: float, centre: float = 0.0, dtype="float32"):
    """Draw an array from 256 evenly spaced values within `centre +- scale`, all exact in bfloat16."""
    steps = centre + scale * (np.arange(256) - 127.5) / 128
    steps = steps.astype(ml_dtypes.bfloat16).astype(DTYPES[dtype])
    return steps[rng.integers(256, size=shape, dtype=np.uint8)]


def random_weight(name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Draw the weight of a published name: standard deviation 0.018; about 1 for weights of norms."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 1 and name.endswith("weight"):
        return uniform(rng, shape, 0.25, centre=1.0, dtype=dtype)
    return uniform(rng, shape, 1 / 32, dtype=dtype)


class RandomWeights(WeightSource):
    """Random weights of published names {name: shape}, each drawn when it is read."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: str):
        super().__init__(Path("random weights"), {})
        self._shapes, self._dtype = shapes, dtype

    def names(self) -> list[str]:
        return sorted(self._shapes)

    def shards(self) -> Iterator[dict[str, np.ndarray]]:
        for name, shape in self._shapes.items():
            yield {name: random_weight(name, shape, self._dtype)}


def inputs(part: str, options: argparse.Namespace, model: ConfigDict) -> tuple[np.ndarray, ...]:
    """Return the inputs of a part.

    Returns:
      vision: frames uint8 `[F, H, W, 3]`; text_encoder: a question int32 `[Lq]` and features float32
      `[F, 1 + N, C]`; language: tokens int32 `[B, L]`.
    """
    rng, batch = np.random.default_rng(0), options.batch or BATCH[part]
    size, patch = model.vision.image_size, model.vision.patch_size
    if part == "vision":
        return (rng.integers(256, size=(batch, size, size, 3), dtype=np.uint8),)
    if part == "text_encoder":
        question = rng.integers(1, model.text_encoder.vocab_size, QUESTION, dtype=np.int32)
        return question, uniform(rng, (batch, 1 + (size // patch) ** 2, model.vision.width), 2.0)
    return (rng.integers(1, model.language.vocab_size, (batch, options.tokens), dtype=np.int32),)


# --- PyTorch ------------------------------------------------------------------------------------------


def torch_module(part: str, model: ConfigDict) -> Any:
    """Return Hugging Face's module of the published sizes, with the depth and epsilons of `model`."""
    import torch
    import transformers

    depth = {"num_hidden_layers": model[part].depth}
    if part == "vision":
        module: Any = transformers.InstructBlipVisionModel(transformers.InstructBlipVisionConfig(**depth))
        module.post_layernorm = torch.nn.Identity()  # belongs to the text encoder
    elif part == "text_encoder":
        section, features = model.text_encoder, model.vision.width
        config = transformers.InstructBlipQFormerConfig(vocab_size=section.vocab_size, **depth)
        norm = torch.nn.LayerNorm(features, eps=section.vision_eps)
        projector = torch.nn.Linear(config.hidden_size, features)
        parts = {
            "qformer": transformers.InstructBlipQFormerModel(config),
            "vision_model": torch.nn.ModuleDict({"post_layernorm": norm}),
            "model": torch.nn.ModuleDict({"vlm_att_projector": projector}),
        }
        module = torch.nn.ModuleDict(parts)
        module.query_tokens = torch.nn.Parameter(torch.empty(1, section.num_queries, config.hidden_size))
    else:
        eps = model.language.eps  # Vicuna's is not the default
        module = transformers.LlamaForCausalLM(transformers.LlamaConfig(rms_norm_eps=eps, **depth))
    return module.eval()


def published_shapes(part: str, model: ConfigDict) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a part, by published name."""
    import torch

    with torch.device("meta"):
        module = torch_module(part, model)
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def pytorch(options: argparse.Namespace, part: str, dtype: str, runs: int) -> dict:
    """Measure output, peak memory and median time of the PyTorch module on the inputs of a part."""
    import torch

    on_gpu = options.device == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise UserError(f"--device gpu: PyTorch {torch.__version__} sees no CUDA device; use --device cpu.")
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cudnn.allow_tf32 = False  # off by default for matrix products, but on for convolutions
    torch.set_default_dtype(getattr(torch, dtype))

    model = model_section(options)
    with device:
        module = torch_module(part, model)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(random_weight(name, tuple(parameter.shape), "float32")))
    arrays = [torch.from_numpy(array).to(device) for array in inputs(part, options, model)]
    mean, std = (torch.tensor(model.vision[key], dtype=torch.float32).to(device) for key in ("mean", "std"))

    def vision(frames):
        pixels = (frames.float() / 255 - mean) / std
        return module(pixel_values=pixels.permute(0, 3, 1, 2).contiguous()).last_hidden_state

    def text_encoder(question, features):
        frames, queries = len(features), module.query_tokens
        output = module["qformer"](
            input_ids=question.expand(frames, -1),
            query_embeds=queries.expand(frames, -1, -1),
            encoder_hidden_states=module["vision_model"]["post_layernorm"](features),
        )
        return module["model"]["vlm_att_projector"](output.last_hidden_state[:, : queries.shape[1]])

    def language(tokens):
        return module(tokens, use_cache=False).logits

    forward = {"vision": vision, "text_encoder": text_encoder, "language": language}[part]
    arrays = [array.to(torch.get_default_dtype()) if array.is_floating_point() else array for array in arrays]

    @torch.inference_mode()
    def run():
        output = forward(*arrays)
        if on_gpu:
            torch.cuda.synchronize()
        return output

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    memory = peak_memory(run)
    if on_gpu:
        memory = torch.cuda.max_memory_allocated() / 2**20
    return {"memory_mib": memory, "seconds": median(run, runs), "output": run().float().cpu().numpy()}


# --- Ours ---------------------------------------------------------------------------------------------


def start_jax(options: argparse.Namespace):
    """Set up JAX in this process and return the device.

    Raises:
      UserError: if there is no such device.
    """
    os.environ["JAX_PLATFORMS"] = "cuda" if options.device == "gpu" else "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    jax.config.update("jax_enable_compilation_cache", False)  # compile time is measured
    if options.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # no TF32
    try:
        return jax.devices()[0]
    except (RuntimeError, AssertionError):  # AssertionError: no CUDA plugin is installed
        raise UserError(f"--device gpu: jax {jax.__version__} sees no GPU; use --device cpu.") from None


def measured(options, device, forward: Callable, shapes: dict, make_params: Callable, batch) -> dict:
    """Measure output, compile time, peak memory and median time of `forward(params, *batch)`.

    Args:
      shapes: shapes and dtypes of the parameters.
      make_params: returns parameters on the device. It is called after compilation, which runs kernels on the
        accelerator to choose between them, so that the memory of both does not add up.
    """
    import jax

    begin = time.perf_counter()
    executable = jax.jit(forward).lower(shapes, *batch).compile()
    compile_s = time.perf_counter() - begin
    arguments = make_params(), *jax.device_put(batch)

    def run():
        return jax.block_until_ready(executable(*arguments))

    memory = peak_memory(run)
    on_accelerator = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "device": device.device_kind if options.device == "gpu" else processor(),
        "compile_s": compile_s,
        "memory_mib": on_accelerator / 2**20 if on_accelerator else memory,
        "seconds": median(run, options.runs),
        "output": jax.device_get(run()),
    }


def ours(options: argparse.Namespace, part: str, published: dict[str, tuple[int, ...]]) -> dict:
    """Return the measurements (`measured`) of our module on the inputs of a part."""
    device = start_jax(options)
    import jax
    import jax.numpy as jnp

    from dynfocus_jax import trees
    from dynfocus_jax.models.llama import Llama
    from dynfocus_jax.models.qformer import QFormer
    from dynfocus_jax.models.vit import VisionTransformer
    from dynfocus_jax.weights.merge import load_part

    model = model_section(options)
    types = {"dtype": options.dtype, "param_dtype": options.dtype}

    def vision(tower, frames):
        return tower(frames, keep_cls=True)

    def text_encoder(encoder, question, features):
        return encoder(question[None], jnp.full(1, QUESTION), features[None])[0]

    def language(decoder, tokens):
        batch, length = tokens.shape
        hidden = decoder(decoder.embed(tokens), jnp.full(batch, length))
        return decoder.logits(hidden)

    if part == "vision":
        module, method = VisionTransformer(**model.vision, **types), vision
    elif part == "text_encoder":
        width = model.vision.width
        module, method = QFormer(**model.text_encoder, output_width=width, **types), text_encoder
    else:
        module, method = Llama(**model.language, **types), language

    dtype = DTYPES[options.dtype]
    batch = [x.astype(dtype) if x.dtype == np.float32 else x for x in inputs(part, options, model)]
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda key, batch: module.init(key, *batch, method=method), key, batch)["params"]

    def make_params():
        weights = RandomWeights(published, options.dtype)

        def load(target, family):
            return load_part(weights, target, family, say=lambda line: None)

        flat = trees.flatten(load(shapes, FAMILIES[part]))
        if part == "text_encoder":
            name = "query_projection"
            flat |= trees.flatten({name: load(shapes[name], name)})
        # Leaf by leaf, so that each leaves host memory once it is on the device.
        placed = {path: jax.block_until_ready(jax.device_put(flat.pop(path))) for path in list(flat)}
        return trees.unflatten(placed)

    def forward(params, *batch):
        return module.apply({"params": params}, *batch, method=method)

    facts = measured(options, device, forward, shapes, make_params, batch)
    return facts | {"output": facts["output"].astype(np.float32)}


def weights_on_device(shapes: dict) -> dict:
    """Generate random parameters like those of `random_weight` on the device, in their own dtype.

    They are generated one by one, the largest first, so that temporary arrays do not raise the peak memory.
    """
    import jax

    from dynfocus_jax import trees

    @functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
    def weight(key, shape, dtype, scale, centre):
        steps = jax.random.bits(key, shape, "uint8").astype(dtype)
        return centre + scale * (steps - 127.5) / 128

    params = {}
    flat = sorted(trees.flatten(shapes).items(), key=lambda item: -item[1].size)
    for index, (path, leaf) in enumerate(flat):
        key = jax.random.key(index, impl="rbg")  # draws bytes without larger intermediates
        scale_and_centre = (0.25, 1.0) if path.endswith("scale") else (1 / 32, 0.0)
        params[path] = jax.block_until_ready(weight(key, leaf.shape, leaf.dtype, *scale_and_centre))
    return trees.unflatten(params)


def end_to_end(options: argparse.Namespace) -> dict:
    """Return the measurements of the whole system on a video of `options.frames` frames, and its sizes."""
    device = start_jax(options)
    import jax
    import jax.numpy as jnp

    from dynfocus_jax.batch import padding_sample
    from dynfocus_jax.video_language_model import VideoLanguageModel

    section = model_section(options)
    model, rng = VideoLanguageModel(FrozenConfigDict(section)), np.random.default_rng(0)

    def padding(frames):
        return padding_sample(frames, section.vision.image_size, QUESTION, QUESTION)

    sample = padding(options.frames)
    sample = sample._replace(
        frames=rng.integers(256, size=sample.frames.shape, dtype=np.uint8),
        frame_mask=np.ones(options.frames, bool),
        query_tokens=rng.integers(1, section.text_encoder.vocab_size, QUESTION, dtype=np.int32),
        query_length=np.int32(QUESTION),
        tokens=rng.integers(1, section.language.vocab_size, QUESTION, dtype=np.int32),
        length=np.int32(QUESTION),
        visual_position=np.int32(1),
    )
    small, batch = (jax.tree.map(lambda x: np.asarray(x)[None], each) for each in (padding(1), sample))

    def init(key):
        return model.init(key, small)["params"]

    def forward(params, batch):
        output: Any = model.apply({"params": params}, batch)
        return jnp.isfinite(output.logits).all(), output.visual.count[0]

    shapes = jax.eval_shape(init, jax.random.key(0))
    facts = measured(options, device, forward, shapes, lambda: weights_on_device(shapes), (batch,))
    finite, visual = facts.pop("output")
    if not finite:
        raise RunError("end_to_end: the logits are not finite, so the measurements are not valid.")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    return {**facts, "visual_tokens": int(visual), "parameters": parameters}


# --- Measurement and report ---------------------------------------------------------------------------


def median(run: Callable[[], object], runs: int) -> float | None:
    """Return the median wall time of a call in seconds, or None for 0 runs."""
    return statistics.median(seconds(run) for _ in range(runs)) if runs else None


def alone(program: Callable, *arguments) -> dict:
    """Run `program(*arguments)` in its own process and return its result.

    Raises:
      RunError: if it runs out of memory or is killed.
    """
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(program, *arguments).result()
    except (RuntimeError, MemoryError) as error:
        if not re.search("out of memory|RESOURCE_EXHAUSTED|allocate|terminated abruptly", str(error)):
            raise
        what = " of ".join([program.__name__, *arguments[1:2]])
        raise RunError(
            f"{what} ran out of memory or was killed; use fewer --layers, a smaller --batch or --frames."
        ) from error


def difference(actual: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Return the largest and mean absolute difference, divided by the largest expected magnitude."""
    error, scale = np.abs(actual - expected), np.abs(expected).max()
    return {"largest": float(error.max() / scale), "mean": float(error.mean(dtype=np.float64) / scale)}


def measure(options: argparse.Namespace, part: str) -> dict:
    """Measure a part in each program: input, number of parameters, results by program."""
    if part == "end_to_end":
        facts = alone(end_to_end, options)
        sizes = f"{options.frames} frames, {QUESTION} tokens; {facts.pop('visual_tokens')} visual tokens"
        return {"input": sizes, "parameters": facts.pop("parameters"), "programs": {"ours": facts}}
    published, batch = published_shapes(part, model_section(options)), options.batch or BATCH[part]
    reference = None
    if options.reference:
        reference = alone(pytorch, options, part, "float32", 0)["output"]
    programs = {
        "pytorch": alone(pytorch, options, part, options.dtype, options.runs),
        "ours": alone(ours, options, part, published),
    }
    outputs = {name: facts.pop("output") for name, facts in programs.items()}
    programs["ours"]["difference"] = difference(outputs["ours"], outputs["pytorch"])
    programs["ours"]["speedup"] = programs["pytorch"]["seconds"] / programs["ours"]["seconds"]
    if reference is not None:
        for name in programs:
            programs[name]["difference_from_float32"] = difference(outputs[name], reference)
    sizes = {
        "vision": f"{batch} frames",
        "text_encoder": f"{batch} frames, {QUESTION} tokens",
        "language": f"{batch} x {options.tokens} tokens",
    }
    parameters = sum(math.prod(shape) for shape in published.values())
    return {"input": sizes[part], "parameters": parameters, "programs": programs}


def table(results: dict[str, dict]) -> str:
    """Return a Markdown table with a row per part and program."""
    head = ["part", "input", "M parameters", "program", "seconds", "times faster", "MiB", "compile"]
    head += ["largest", "mean", "largest from float32", "mean from float32"]
    rows = [head]
    for part, result in results.items():
        for name, facts in result["programs"].items():
            row = [part, result["input"], f"{result['parameters'] / 1e6:.0f}", name]
            row.append(f"{facts['seconds']:.4f}")
            row.append(f"{facts['speedup']:.2f}" if "speedup" in facts else "-")
            row.append(f"{facts['memory_mib']:.0f}")
            row.append(f"{facts['compile_s']:.1f}" if "compile_s" in facts else "-")
            for kind in ("difference", "difference_from_float32"):
                row += [f"{error:.1e}" for error in facts.get(kind, {}).values()] or ["-", "-"]
            rows.append(row)
    return markdown_table(rows)


def report(options: argparse.Namespace, results: dict[str, dict]) -> tuple[str, dict]:
    """Return the results as Markdown and as a record for JSON."""
    about = {
        "date": str(datetime.date.today()),
        "device": next(iter(results.values()))["programs"]["ours"]["device"],
        "dtype": options.dtype,
        "attention": options.attention or "xla",
        "layers": options.layers,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "torch", "transformers")},
        "runs": options.runs,
    }
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    depth = f"layers 1 to {options.layers} of every part" if options.layers else "all layers"
    notes = (
        f"Seconds, medians of {options.runs} runs, {options.dtype}, {depth}; our attention: "
        f"{about['attention']}, PyTorch's: SDPA. MiB: peak while the program runs, weights and inputs "
        "included. Largest and mean: differences from `pytorch` in the same precision, or from `pytorch` in "
        "float32, divided by the largest magnitude of the output. "
        f"{about['device']}; {versions}; {about['date']}."
    )
    return f"{table(results)}\n\n{notes}\n", {**about, "results": results}


def parse_options() -> argparse.Namespace:
    """Parse the command line and check the values that argparse cannot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = (*FAMILIES, "end_to_end")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, metavar="PART")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int, help="use only the first N layers of every part")
    parser.add_argument("--batch", type=int, help="frames (vision, text_encoder: 32), texts (language: 1)")
    parser.add_argument("--tokens", type=int, default=512, help="length of each text (language)")
    parser.add_argument("--frames", type=int, default=200, help="length of the video (end_to_end)")
    parser.add_argument("--runs", type=int, default=5, help="number of timed calls, whose median is reported")
    parser.add_argument(
        "--attention", choices=("cudnn",), help="use fused attention in our modules (gpu, bfloat16)"
    )
    parser.add_argument("--reference", choices=("float32",), help="also compare with PyTorch in this dtype")
    add_output_argument(parser)
    options = parser.parse_args()
    for name in ("layers", "batch", "tokens", "frames", "runs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.attention and (options.device, options.dtype) != ("gpu", "bfloat16"):
        parser.error("--attention cudnn needs --device gpu --dtype bfloat16")
    if options.reference == options.dtype:
        parser.error("--reference float32 compares --dtype bfloat16 with it")
    return options


def main() -> None:
    options = parse_options()
    results: dict[str, dict] = {}
    text = ""
    for part in options.parts:
        try:
            results[part] = measure(options, part)
        except (UserError, RunError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2 if isinstance(error, UserError) else 1)
        print(table({part: results[part]}), flush=True)
        text, record = report(options, results)
        write_report(options.output, text, record)  # after every part, since a later one may fail
    print(f"\n{text}")


if __name__ == "__main__":
    main()
