"""Prompts of benchmark questions, with their frames and subtitles."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.errors import MediaError, UserError
from dynfocus_jax.evaluation.questions import Question
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.media.frame_sampling import Sampling, choose_frames
from dynfocus_jax.media.images import IMAGE_SUFFIXES, read_image
from dynfocus_jax.media.subtitles import Subtitle, read_subtitles
from dynfocus_jax.media.video import Clip
from dynfocus_jax.records.prompts import LETTERS
from dynfocus_jax.records.records import Record

_SUBTITLES = "This video's subtitles are listed below:\n{}\n"  # as Video-MME has it


def prompt_of(question: Question, settings: Mapping, subtitles: Sequence[str] = ()) -> str:
    """The text of the user's turn; `settings` is the benchmark's section of configs/benchmarks.py.

    Raises:
      UserError: the prompt has a field that there is not.
    """
    key = {"open": "free_prompt", "span": "when_prompt"}.get(question.form, "prompt")
    text = _filled(settings[key], question, settings, bool(subtitles))
    return (_SUBTITLES.format("\n".join(subtitles)) if subtitles else "") + text


def guidance_of(question: Question, settings: Mapping) -> str:
    """Return the text encoder's input: the question without instructions, which would fill its few tokens.

    Raises:
      UserError: as `prompt_of`.
    """
    return _filled(settings["guidance"], question, settings, False)


def _filled(template: str, question: Question, settings: Mapping, subtitled: bool) -> str:
    letters = list(LETTERS[: len(question.options)])
    try:
        lines = [
            settings["option"].format(letter=letter, option=option)
            for letter, option in zip(letters, question.options, strict=True)
        ]
        # "A or B", "A, B, or C"
        named = " or ".join(letters) if len(letters) < 3 else f"{', '.join(letters[:-1])}, or {letters[-1]}"
        seen = "video and the subtitles" if subtitled else "video"
        fields = {"question": question.question, "options": "\n".join(lines), "letters": named, "seen": seen}
        return template.format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"a prompt in the config has a field that there is not ({error}); there are question, options, "
            "letters and seen, of an option letter and option."
        ) from None


class Clips:
    """Reads what questions are about: videos, and folders of frames.

    limit: frames of a clip, at most; sampling: which; size, layout, mean: of a frame, as the `reader`'s.
    """

    def __init__(
        self,
        reader: MediaReader,
        limit: int,
        sampling: Sampling,
        *,
        layout: str = "crop",
        mean: Sequence[float] = (0.0, 0.0, 0.0),
    ):
        self._reader, self._limit, self._sampling = reader, limit, sampling
        self._layout, self._mean = layout, tuple(mean)

    def read(self, question: Question) -> Clip:
        """The frames of a question.

        Raises:
          MediaError: they cannot be read.
        """
        rate = question.about.get("frames_per_second")
        if rate is not None and not question.media.is_file():
            return self._read_folder(question.media, rate, question.span)
        record = Record(question.id, question.media, (), modality="video", span=question.span)
        return self._reader.read(record, self._limit, np.random.default_rng(0))

    def subtitles(self, question: Question, clip: Clip) -> list[str]:
        """The lines on the screen at the times of the clip's frames, each once.

        Raises:
          MediaError: the file cannot be read.
        """
        if question.subtitles is None:
            return []
        return [each.text for each in read_subtitles(question.subtitles) if _seen(each, clip.times)]

    def _read_folder(self, folder: Path, rate: float, span: tuple[float, float] | None) -> Clip:
        """Images as frames, in the order of their names, `rate` a second."""
        try:
            names = sorted(name for name in os.listdir(folder) if Path(name).suffix.lower() in IMAGE_SUFFIXES)
        except OSError as error:
            raise MediaError(f"{folder}: no such folder of frames ({error.strerror}), check it") from None
        times = np.arange(len(names)) / rate
        begin, end = (0.0, len(names) / rate) if span is None else span
        inside = np.flatnonzero((times >= begin) & (times < end))
        if not len(inside):
            raise MediaError(f"{folder}: has {len(names)} frames, none from {begin:g} to {end:g} s, check it")
        chosen = inside[
            choose_frames(times[inside], min(end, len(names) / rate), self._sampling, self._limit)
        ]
        files = MediaFolder(folder)
        try:
            frames = [
                read_image(files.file(names[i]), size=self._reader.size, layout=self._layout, mean=self._mean)
                for i in chosen
            ]
        except ValueError as error:
            raise MediaError(f"{folder}: {error}") from None
        return Clip(np.stack(frames), times[chosen], chosen.astype(np.int32))


def _seen(subtitle: Subtitle, times: np.ndarray) -> bool:
    return bool(np.any((times >= subtitle.start) & (times < subtitle.end)))
