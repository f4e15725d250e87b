"""lmms-eval's chats and settings as requests to the engine."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.prepare import make_media_reader
from dynfocus_jax.errors import MediaError, SampleError, UserError
from dynfocus_jax.media.images import fit_to_square
from dynfocus_jax.media.video import Clip
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.records.records import Record
from dynfocus_jax.serving.engine import Completion, Engine, Request
from dynfocus_jax.serving.load import load_engine, load_run
from dynfocus_jax.serving.token_sampling import GREEDY, SamplingParams
from dynfocus_jax.validation import validate

LmmsChat = tuple[str, Sequence[Mapping], Mapping, int]  # id, messages, generation settings, seed


class LmmsAnswerer:
    """Reads what chats are about and answers them together.

    engine: what answers; media: what reads files; num_frames: of a video; layout, mean: of a picture, see
    `media.images.fit_to_square`.
    """

    def __init__(
        self, engine: Engine, media: MediaReader, num_frames: int, layout: str, mean: Sequence[float]
    ):
        self._engine, self._media, self._num_frames = engine, media, num_frames
        self._layout, self._mean = layout, mean

    @classmethod
    def of(cls, checkpoint: Path, num_frames: int | None) -> "LmmsAnswerer":
        """Load a run's checkpoint onto all devices of this machine.

        Raises:
          UserError: the checkpoint cannot be used.
        """
        run = load_run(checkpoint)
        run.config.data.sampling.pick = "middle"  # the same frames each time
        if num_frames is not None:
            if not isinstance(num_frames, int):
                raise UserError(f"num_frames is {num_frames!r}; expected a whole number.")
            run.config.generation.num_frames = num_frames
            validate(run.config)
        mesh = make_mesh(mesh_shape(run.config.mesh, jax.local_device_count()), jax.local_devices())
        engine = load_engine(run, mesh)
        layout, mean = run.config.data.image_layout, run.config.model.vision.mean
        return cls(engine, make_media_reader(run.config), engine.num_frames, layout, mean)

    @property
    def most_at_once(self) -> int:
        """Largest number of questions that the engine answers together."""
        return self._engine.config.generation.batch[-1]

    def answer(self, chats: Sequence[LmmsChat]) -> list[Completion]:
        """The answers, in order; one with an `error` where a chat cannot be read or answered.

        Raises:
          UserError: the task asks for what the engine does not do (beam search).
        """
        with ThreadPoolExecutor(max(1, min(8, len(chats)))) as pool:
            read = list(pool.map(lambda chat: self._request(*chat), chats))
        answers = iter(self._engine.generate([each for each in read if isinstance(each, Request)]))
        return [next(answers) if isinstance(each, Request) else each for each in read]

    def _request(
        self, name: str, messages: Sequence[Mapping], settings: Mapping, seed: int
    ) -> Request | Completion:
        sampling = sampling_of(settings, seed)
        try:
            turns, visuals, visual_at_end = split_messages(messages)
            clip = self._clip(visuals)
        except (MediaError, SampleError, OSError) as error:
            return Completion(name, error=str(error))
        return Request(
            name,
            turns,
            clip=clip,
            sampling=sampling,
            max_new_tokens=settings.get("max_new_tokens"),
            stop=stop_strings(settings),
            visual_at_end=visual_at_end,
        )

    def _clip(self, visuals: Sequence[Mapping]) -> Clip | None:
        if not visuals:
            return None
        if len(visuals) > 1:
            raise SampleError(f"there are {len(visuals)} images or videos in the chat; the model takes one")
        kind, source, span = _source(visuals[0])
        if kind == "image" and isinstance(source, Image.Image):
            picture = fit_to_square(source.convert("RGB"), self._media.size, self._layout, self._mean)
            return Clip(np.asarray(picture)[None], np.zeros(1), np.zeros(1, np.int32))
        if kind not in ("image", "video") or not isinstance(source, str | Path):
            raise SampleError(
                f"the chat is about {kind} as {type(source).__name__}; the model takes files and pictures"
            )
        record = Record(str(source), Path(source), (), modality=kind, span=span)
        return self._media.read(record, self._num_frames if kind == "video" else 1, np.random.default_rng(0))


def _source(visual: Mapping) -> tuple[str, object, tuple[float, float] | None]:
    """Kind, picture or file, and the seconds that are meant, of a video of which a part is.

    Tasks write the seconds beside the file, or both in its place.
    """
    source, about = visual["url"], dict(visual)
    if isinstance(source, Mapping):
        about |= {"start_time": source.get("video_start"), "end_time": source.get("video_end")}
        source = next((source[key] for key in ("url", "path", "video") if key in source), source)
    start, end = about.get("start_time"), about.get("end_time")
    if (start is None) != (end is None):
        raise SampleError(f"of a part of {source} only one end is given; both are needed")
    return visual["type"], source, None if start is None else (float(start), float(end))


def split_messages(messages: Sequence[Mapping]) -> tuple[tuple[tuple[str, str], ...], list[Mapping], bool]:
    """The turns of a chat as (role, text), its images and videos, and whether these come after their text.

    What the system says goes before the first question.

    Raises:
      SampleError: an image or video comes later than with the first question.
    """
    turns: list[tuple[str, str]] = []
    visuals: list[Mapping] = []
    system, at_end = [], False
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        if message["role"] == "system":
            system.append(text)
            continue
        seen = [part for part in parts if part["type"] != "text"]
        if seen and turns:
            raise SampleError("an image or video comes later than with the first question of the chat")
        if seen:
            visuals, at_end = seen, parts[0]["type"] == "text" and parts[-1]["type"] != "text"
        turns.append((message["role"], "\n".join([*system, text])))
        system = []
    return tuple(turns), visuals, at_end


def sampling_of(settings: Mapping, seed: int) -> SamplingParams:
    """Return a task's sampling settings: greedy, unless it sets a temperature and allows sampling.

    Raises:
      UserError: it wants beam search.
    """
    if (settings.get("num_beams") or 1) > 1:
        raise UserError(
            f"the task asks for beam search (num_beams={settings['num_beams']}), which there is not; give "
            "lmms-eval --gen_kwargs num_beams=1."
        )
    temperature = settings.get("temperature") or 0.0
    if temperature == 0 or not settings.get("do_sample", True):
        return GREEDY
    return SamplingParams(temperature, settings.get("top_k") or 0, settings.get("top_p") or 1.0, seed)


def stop_strings(settings: Mapping) -> tuple[str, ...]:
    """The strings that end an answer."""
    until = settings.get("until") or ()
    return tuple(text for text in ([until] if isinstance(until, str) else until) if text)
