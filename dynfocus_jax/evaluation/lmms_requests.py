"""Conversion of lmms-eval's chats and generation settings to requests for the engine."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.prepare import make_media_reader
from dynfocus_jax.errors import MediaError, SampleError, UserError
from dynfocus_jax.media.images import fit_to_square
from dynfocus_jax.media.video import Clip
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.records.records import Record
from dynfocus_jax.serving.engine import Completion, Request
from dynfocus_jax.serving.load import load_engine, load_run
from dynfocus_jax.serving.token_sampling import GREEDY, SamplingParams
from dynfocus_jax.validation import validate

Json = Mapping[str, Any]
LmmsChat = tuple[str, Sequence[Json], Json, int]  # id, messages, generation settings, seed


class VisualPart(NamedTuple):
    """An image or video of a chat."""

    kind: str  # "image" or "video"
    source: Any  # a path, or a picture
    span: tuple[float, float] | None  # seconds of a video that are meant; None: all


class ParsedChat(NamedTuple):
    """A chat, with its texts and its images and videos apart."""

    turns: tuple[tuple[str, str], ...]  # (role, text)
    visuals: list[Json]
    visual_at_end: bool  # whether the images and videos come after the text of their message


class BatchEngine(Protocol):
    """The part of `serving.engine.Engine` that the answerer uses."""

    config: ConfigDict

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Return a completion for each request, in their order."""
        ...


class LmmsAnswerer:
    """Reads the images and videos of chats, and answers the chats in batches.

    Args:
      engine: the generation engine.
      media: reads files.
      num_frames: frames of a video.
      layout, mean: how a picture becomes a square, see `media.images.fit_to_square`.
    """

    def __init__(
        self, engine: BatchEngine, media: MediaReader, num_frames: int, layout: str, mean: Sequence[float]
    ):
        self._engine, self._media, self._num_frames = engine, media, num_frames
        self._layout, self._mean = layout, mean

    @classmethod
    def load(cls, checkpoint: Path, num_frames: int | None) -> "LmmsAnswerer":
        """Load a run's checkpoint onto all devices of this machine.

        Raises:
          UserError: the checkpoint cannot be used.
        """
        run = load_run(checkpoint)
        run.config.data.sampling.pick = "middle"  # the same frames each time
        if num_frames is not None:
            if not isinstance(num_frames, int):
                raise UserError(f"num_frames is {num_frames!r}, expected an integer.")
            run.config.generation.num_frames = num_frames
            validate(run.config)
        mesh = make_mesh(mesh_shape(run.config.mesh, jax.local_device_count()), jax.local_devices())
        engine = load_engine(run, mesh)
        layout, mean = run.config.data.image_layout, run.config.model.vision.mean
        return cls(engine, make_media_reader(run.config), engine.num_frames, layout, mean)

    @property
    def max_batch_size(self) -> int:
        """Largest number of questions that the engine answers together."""
        return self._engine.config.generation.batch[-1]

    def answer(self, chats: Sequence[LmmsChat]) -> list[Completion]:
        """Return the completions, in order; with an `error` if a chat cannot be read or answered.

        Raises:
          UserError: the task needs beam search, which the engine does not support.
        """
        with ThreadPoolExecutor(max(1, min(8, len(chats)))) as pool:
            requests = list(pool.map(lambda chat: self._make_request(*chat), chats))
        valid = [request for request in requests if isinstance(request, Request)]
        completions = iter(self._engine.generate(valid))
        return [next(completions) if isinstance(each, Request) else each for each in requests]

    def _make_request(
        self, name: str, messages: Sequence[Json], settings: Json, seed: int
    ) -> Request | Completion:
        """Return the request of a chat, or a completion with an error if the chat cannot be read."""
        sampling = read_sampling(settings, seed)
        try:
            turns, visuals, visual_at_end = split_messages(messages)
            clip = self._read_clip(visuals)
        except (MediaError, SampleError, OSError) as error:
            return Completion(name, error=str(error))
        return Request(
            name,
            turns,
            clip=clip,
            sampling=sampling,
            max_new_tokens=settings.get("max_new_tokens"),
            stop=read_stop_strings(settings),
            visual_at_end=visual_at_end,
        )

    def _read_clip(self, visuals: Sequence[Json]) -> Clip | None:
        if not visuals:
            return None
        if len(visuals) > 1:
            raise SampleError(f"the chat has {len(visuals)} images or videos, expected at most 1")
        kind, source, span = _parse_visual(visuals[0])
        if kind == "image" and isinstance(source, Image.Image):
            picture = fit_to_square(source.convert("RGB"), self._media.size, self._layout, self._mean)
            return Clip(np.asarray(picture)[None], np.zeros(1), np.zeros(1, np.int32))
        if kind not in ("image", "video") or not isinstance(source, str | Path):
            raise SampleError(
                f"the chat has a {kind} of type {type(source).__name__}, expected a path or a PIL image"
            )
        record = Record(str(source), Path(source), (), modality=kind, span=span)
        return self._media.read(record, self._num_frames if kind == "video" else 1, np.random.default_rng(0))


def _parse_visual(visual: Json) -> VisualPart:
    """Parse an image or video of a message.

    For a part of a video, tasks give the seconds beside the file, or the file and its seconds in place of the
    file.
    """
    source = visual["url"]
    start, end = visual.get("start_time"), visual.get("end_time")
    if isinstance(source, Mapping):
        start, end = source.get("video_start"), source.get("video_end")
        source = next((source[key] for key in ("url", "path", "video") if key in source), source)
    if start is None and end is None:
        return VisualPart(visual["type"], source, None)
    if start is None or end is None:
        raise SampleError(f"the span of {source} has only a start or an end, expected both")
    return VisualPart(visual["type"], source, (float(start), float(end)))


def split_messages(messages: Sequence[Json]) -> ParsedChat:
    """Split a chat into its texts and its images and videos. System messages precede the first question.

    Raises:
      SampleError: a message after the first question has an image or video.
    """
    turns: list[tuple[str, str]] = []
    visuals: list[Json] = []
    system: list[str] = []
    at_end = False
    for message in messages:
        content = message["content"]
        parts: list[Json] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        if message["role"] == "system":
            system.append(text)
            continue
        in_message = [part for part in parts if part["type"] != "text"]
        if in_message and turns:
            raise SampleError("an image or video comes after the chat's first question, expected within it")
        if in_message:
            visuals, at_end = in_message, parts[0]["type"] == "text" and parts[-1]["type"] != "text"
        turns.append((message["role"], "\n".join([*system, text])))
        system = []
    return ParsedChat(tuple(turns), visuals, at_end)


def read_sampling(settings: Json, seed: int) -> SamplingParams:
    """Return a task's sampling settings: greedy, unless it sets a temperature and allows sampling.

    Raises:
      UserError: the task needs beam search.
    """
    if (settings.get("num_beams") or 1) > 1:
        raise UserError(
            f"the task sets num_beams={settings['num_beams']}, but beam search is not supported; use "
            "lmms-eval --gen_kwargs num_beams=1."
        )
    temperature = settings.get("temperature") or 0.0
    if temperature == 0 or not settings.get("do_sample", True):
        return GREEDY
    return SamplingParams(temperature, settings.get("top_k") or 0, settings.get("top_p") or 1.0, seed)


def read_stop_strings(settings: Json) -> tuple[str, ...]:
    """Return the strings that end an answer."""
    until = settings.get("until") or ()
    return tuple(text for text in ([until] if isinstance(until, str) else until) if text)
