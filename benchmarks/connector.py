"""Compare speed and memory of the connector at full width with a PyTorch program of the published code.

    python benchmarks/connector.py --frames 16 64 200 --runs 5
    python benchmarks/connector.py --device gpu --dtype bfloat16 --frames 1000

Programs:

    published   the PyTorch program, benchmarks/torch_published.py
    released    ours in mode "released": the same computation with the same weights, features and initial
                frames; the largest difference of its tokens from `published` is reported
    paper       ours in the default mode: K = 25, ratio 0.8

For each number of frames, every program runs in its own process, so that peak memory is measured separately.
The timed runs of the programs are interleaved. Features come from benchmarks/video_features.py.

Times are medians. `total` is one call of the whole connector. The parts are timed separately: spatial
(clustering of patches), temporal (pooling, clustering of frames), selection (score net, top-J, gathering of
events) and encoding (cones, rods, sequence).
"""

import argparse
import datetime
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs in any folder

from benchmarks.reporting import (
    add_output_argument,
    markdown_table,
    peak_memory,
    processor,
    seconds,
    write_report,
)
from benchmarks.video_features import video_features
from dynfocus_jax.errors import UserError

WIDTH, LANGUAGE_WIDTH = 1408, 4096  # C, D
GRID, QUERIES = 16, 32  # N = 16 x 16 patches, Q
RELEASED_EVENTS, RELEASED_GATES = 80, 6  # K and M_2 of the released code
PROGRAMS = ("published", "released", "paper")
PARTS = ("spatial", "temporal", "selection", "encoding")


class Program(NamedTuple):
    """A program with its data, ready to be timed. All its callables wait for the device.

    Attributes:
      total: runs the whole connector.
      tokens: returns its tokens, float32 [L, D].
      parts: returns a callable for each of PARTS. It is called after memory is measured, as it compiles.
      accelerator_peak: returns the peak memory of the accelerator, bytes; None on a CPU.
      facts: other results; complete after the call of `parts`.
    """

    total: Callable[[], object]
    tokens: Callable[[], np.ndarray]
    parts: Callable[[], dict[str, Callable[[], object]]]
    accelerator_peak: Callable[[], int | None]
    facts: dict[str, float | str]


def inputs(frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return float32 features [T, N, C] and text queries [T, Q, C], and initial frames [80] of k-means."""
    rng = np.random.default_rng(1)
    features = video_features(frames, GRID * GRID, WIDTH)
    queries = rng.standard_normal((frames, QUERIES, WIDTH), np.float32)
    return features, queries, rng.permutation(frames)[:RELEASED_EVENTS]


def published(options: argparse.Namespace, frames: int) -> Program:
    """Return the PyTorch program.

    Raises:
      UserError: if there is no such device.
    """
    import torch

    from benchmarks.published_weights import random_published
    from benchmarks.torch_published import PublishedConnector

    if options.device == "gpu" and not torch.cuda.is_available():
        raise UserError(f"--device gpu: PyTorch {torch.__version__} sees no CUDA device; use --device cpu.")
    device, dtype = torch.device("cuda" if options.device == "gpu" else "cpu"), getattr(torch, options.dtype)
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def on_device(array):
        tensor = torch.from_numpy(array)
        return tensor.to(dtype if tensor.is_floating_point() else None).to(device)

    features, queries, initial = map(on_device, inputs(frames))
    model = PublishedConnector(WIDTH, LANGUAGE_WIDTH)
    weights = random_published(WIDTH, LANGUAGE_WIDTH, RELEASED_GATES)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    model.to(dtype).to(device).eval()

    def waiting(function, *arguments):
        """Return a call of the function that waits for its result."""

        @torch.inference_mode()
        def run():
            result = function(*arguments)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return result

        return run

    def parts():
        with torch.inference_mode():
            spatial = model.spatial_prototypes(features)
            events, keys = model.event_prototypes(model.pool(features), initial)
            cones, chosen = model.selective(events, spatial[keys])
        return {
            "spatial": waiting(model.spatial_prototypes, features),
            "temporal": waiting(lambda: model.event_prototypes(model.pool(features), initial)),
            "selection": waiting(model.selective, events, spatial[keys]),
            "encoding": waiting(model.encode, cones, keys[chosen], spatial, queries),
        }

    on_gpu = device.type == "cuda"
    whole = waiting(model, features, queries, initial)
    return Program(
        total=whole,
        tokens=lambda: whole().float().cpu().numpy(),
        parts=parts,
        accelerator_peak=lambda: torch.cuda.max_memory_allocated() if on_gpu else None,
        facts={"device": torch.cuda.get_device_name() if on_gpu else processor()},
    )


def ours(options: argparse.Namespace, frames: int, mode: str) -> Program:
    """Return the JAX connector in one of its modes.

    Raises:
      UserError: if there is no such device.
    """
    os.environ["JAX_PLATFORMS"] = "cuda" if options.device == "gpu" else "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the accelerator is shared with PyTorch
    import jax
    import jax.numpy as jnp

    from benchmarks.published_weights import our_params, random_published
    from dynfocus_jax.config import default_config
    from dynfocus_jax.connectors.dynfocus.event_prototypes import EventPrototypes
    from dynfocus_jax.connectors.dynfocus.scores import ScoreNet
    from dynfocus_jax.connectors.dynfocus.selection import kept_counts, min_max
    from dynfocus_jax.connectors.interface import ConnectorInputs
    from dynfocus_jax.connectors.registry import make_connector
    from dynfocus_jax.ops.kmeans import kmeans
    from dynfocus_jax.ops.perturbed_topk import hard_topk
    from dynfocus_jax.ops.pooling import pool_grid
    from dynfocus_jax.video_language_model import row_randomness

    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError):  # AssertionError: no CUDA plugin is installed
        raise UserError(f"--device gpu: jax {jax.__version__} sees no GPU; use --device cpu.") from None

    config = default_config().model
    config.dtype = config.param_dtype = options.dtype
    settings = config.connector
    settings.mode = mode
    if mode == "released":
        settings.dpe.update({"clustering": "kmeans", "num_prototypes": RELEASED_EVENTS, "ratio": 0.45})
        settings.cce.levels = ((16, 8), (RELEASED_GATES, 3))
    connector = make_connector(config)

    params = our_params(random_published(WIDTH, LANGUAGE_WIDTH, RELEASED_GATES))
    if mode == "paper":
        del params["cce"]["spatial"]  # this mode has no gates
    *arrays, initial_frames = inputs(frames)
    dtype = jnp.dtype(options.dtype)
    params, (features, queries) = jax.tree.map(
        lambda x: jnp.asarray(x.astype(dtype, copy=False)), (params, arrays)
    )
    features, queries = features[None], queries[None]
    mask = jnp.ones((1, frames), bool)
    initial = None  # k-means of no more frames than events does nothing
    if mode == "released" and frames > RELEASED_EVENTS:
        initial = jnp.asarray(initial_frames, jnp.int32)[None]

    def compiled(function, *arguments):
        """Compile the function and return a call of it that waits for its result."""
        executable = jax.jit(function).lower(*arguments).compile()
        return lambda: jax.block_until_ready(executable(*arguments))

    def connector_inputs(features, queries, initial):
        given = {} if initial is None else {"initial_frames": initial}
        randomness = row_randomness(jax.random.key(0), 1, **given)  # evaluation uses only `given`
        return ConnectorInputs(features, mask, text_queries=queries, randomness=randomness)

    def whole(params, features, queries, initial):
        return connector.apply({"params": params}, connector_inputs(features, queries, initial))

    begin = time.perf_counter()
    run = compiled(whole, params, features, queries, initial)
    facts = {
        "device": device.device_kind if options.device == "gpu" else processor(),
        "compile_s": time.perf_counter() - begin,
    }

    def spatial(params, features):
        return connector.apply({"params": params}, features, method=lambda bound, x: bound.cce.spatial(x))

    def temporal(features, initial):
        grid, pool = connector.dimensions.grid, connector.settings.pool
        dpe = EventPrototypes(connector.settings.dpe, mode, grid, pool, options.dtype, options.dtype)
        inputs = connector_inputs(features, None, initial)
        return dpe.cluster_frames(pool_grid(features, grid, pool), mask, inputs.randomness)

    def select(params, events, valid):
        summary = jnp.concatenate([events.mean(axis=2), events.max(axis=2)], axis=-1)
        score_net = ScoreNet(options.dtype, options.dtype)
        raw = jnp.asarray(score_net.apply({"params": params["dpe"]["score_net"]}, summary, valid))
        scores = min_max(raw, valid)
        chosen = hard_topk(scores, max(kept_counts(connector.settings.dpe, frames)), mask=valid)
        return jnp.take_along_axis(events, chosen[..., None, None], axis=1)

    def selection(params, features, queries, initial):
        """Return the result of DPE, the input of `encode`."""
        inputs = connector_inputs(features, queries, initial)
        return connector.apply({"params": params}, inputs, method=lambda bound, x: bound.dpe(x, train=False))

    def encode(params, features, grains, chosen, queries):
        inputs = connector_inputs(features, queries, None)
        return connector.apply({"params": params}, inputs, grains, chosen, method="encode")

    def parts():
        patches, events = compiled(spatial, params, features), compiled(temporal, features, initial)
        prototypes, _, valid, _ = events()
        chosen = compiled(selection, params, features, queries, initial)
        if initial is not None:
            grid, pool = connector.dimensions.grid, connector.settings.pool
            pooled = pool_grid(features, grid, pool).reshape(1, frames, -1)
            facts["iterations"] = int(kmeans(pooled, initial).iterations[0])
        return {
            "spatial": patches,
            "temporal": events,
            "selection": compiled(select, params, prototypes, valid),
            "encoding": compiled(encode, params, features, patches(), chosen(), queries),
        }

    return Program(
        total=run,
        tokens=lambda: np.asarray(run().tokens[0], np.float32),
        parts=parts,
        accelerator_peak=lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"),
        facts=facts,
    )


def serve_program(pipe: Connection, name: str, options: argparse.Namespace, frames: int) -> None:
    """Run a program in this process: send its facts, or an error message, then answer requests.

    The requests are "times" and "tokens"; None ends the process.
    """
    try:
        program = published(options, frames) if name == "published" else ours(options, frames, name)
    except UserError as error:
        pipe.send(str(error))
        return
    memory = peak_memory(program.total)
    on_accelerator = program.accelerator_peak()
    memory = on_accelerator / 2**20 if on_accelerator else memory
    parts = program.parts()
    pipe.send({**program.facts, "memory_mib": memory})
    while request := pipe.recv():
        if request == "tokens":
            pipe.send(program.tokens())
        else:
            pipe.send({name: seconds(run) for name, run in {"total": program.total, **parts}.items()})


def measure(options: argparse.Namespace, frames: int) -> dict[str, dict]:
    """Return facts and median times in seconds of every program at T = frames.

    Raises:
      UserError: if a program cannot run.
    """
    context = multiprocessing.get_context("spawn")
    pipes, facts = {}, {}
    for name in PROGRAMS:
        pipes[name], end = context.Pipe()
        context.Process(target=serve_program, args=(end, name, options, frames), daemon=True).start()
        end.close()
        facts[name] = pipes[name].recv()  # one by one, since compilation uses all cores
        if isinstance(facts[name], str):
            raise UserError(facts[name])

    def ask(name, request):
        pipes[name].send(request)
        return pipes[name].recv()

    times = {name: [] for name in PROGRAMS}
    for turn in range(options.runs + 1):
        for name in PROGRAMS:
            taken = ask(name, "times")
            if turn > 0:  # the first turn is a warm-up
                times[name].append(taken)
    expected, actual = (ask(name, "tokens") for name in ("published", "released"))
    facts["released"]["token_error"] = float(np.abs(actual - expected).max() / np.abs(expected).max())
    for name in PROGRAMS:
        pipes[name].send(None)
        facts[name] |= {part: statistics.median(run[part] for run in times[name]) for part in times[name][0]}
        facts[name]["speedup"] = facts["published"]["total"] / facts[name]["total"]
    return facts


def table(results: dict[int, dict[str, dict]]) -> str:
    """Return a Markdown table with a row per number of frames and program."""
    head = ["T", "program", "total", *PARTS, "compile", "MiB", "k-means iterations", "times faster", "error"]
    rows = [head]
    for frames, programs in results.items():
        for name, facts in programs.items():
            times = [f"{facts[key]:.3f}" for key in ("total", *PARTS)]
            rest = [
                f"{facts['compile_s']:.1f}" if "compile_s" in facts else "-",
                f"{facts['memory_mib']:.0f}",
                str(facts.get("iterations", "-")),
                f"{facts['speedup']:.2f}",
                f"{facts['token_error']:.1e}" if "token_error" in facts else "-",
            ]
            rows.append([str(frames), name, *times, *rest])
    return markdown_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 64, 200], help="numbers of frames T")
    parser.add_argument("--runs", type=int, default=5, help="number of timed runs, whose median is reported")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_output_argument(parser)
    options = parser.parse_args()
    if min(options.runs, *options.frames) < 1:
        parser.error("--frames and --runs must be at least 1")

    results = {}
    for frames in options.frames:
        try:
            results[frames] = measure(options, frames)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        print(table({frames: results[frames]}), flush=True)
    about = {
        "date": str(datetime.date.today()),
        "device": results[options.frames[0]]["released"]["device"],
        "dtype": options.dtype,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "torch", "numpy")},
        "runs": options.runs,
        "sizes": {"C": WIDTH, "D": LANGUAGE_WIDTH, "N": GRID * GRID, "Q": QUERIES},
    }
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    notes = (
        f"Seconds, medians of {options.runs} interleaved runs, {options.dtype}. MiB: peak while the "
        "connector runs, weights and inputs included. Error: largest difference of the tokens from "
        "`published`, divided by their largest magnitude. "
        f"{about['device']}; {versions}; {about['date']}."
    )
    text = f"{table(results)}\n\n{notes}\n"
    print(f"\n{text}")
    write_report(options.output, text, {**about, "results": results})


if __name__ == "__main__":
    main()
