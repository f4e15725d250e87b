"""Prompts, frames and subtitles of benchmark questions."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

_SUBTITLES = "This video's subtitles are listed below:\n{}\n"  # Video-MME's words


def make_prompt(question: Question, settings: Mapping[str, Any], subtitles: Sequence[str] = ()) -> str:
    """Return the text of the user's turn.

    settings: the benchmark's section of configs/benchmarks.py.

    Raises:
      UserError: the prompt's template has an unknown field.
    """
    key = {"open": "free_prompt", "span": "when_prompt"}.get(question.form, "prompt")
    text = _fill(settings[key], question, settings, with_subtitles=bool(subtitles))
    return (_SUBTITLES.format("\n".join(subtitles)) if subtitles else "") + text


def make_guidance(question: Question, settings: Mapping[str, Any]) -> str:
    """Return the text encoder's input: the question without instructions, which would fill its few tokens.

    Raises:
      UserError: the template has an unknown field.
    """
    return _fill(settings["guidance"], question, settings, with_subtitles=False)


def _fill(template: str, question: Question, settings: Mapping[str, Any], *, with_subtitles: bool) -> str:
    letters = list(LETTERS[: len(question.options)])
    try:
        lines = [
            settings["option"].format(letter=letter, option=option)
            for letter, option in zip(letters, question.options, strict=True)
        ]
        return template.format(
            question=question.question,
            options="\n".join(lines),
            letters=_join_letters(letters),
            seen="video and the subtitles" if with_subtitles else "video",
        )
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"prompt template {template!r} is invalid ({error}), expected only the fields question, options, "
            "letters and seen (in `option`: letter and option); correct it in the config."
        ) from None


def _join_letters(letters: Sequence[str]) -> str:
    """Return "A or B", "A, B, or C"."""
    return " or ".join(letters) if len(letters) < 3 else f"{', '.join(letters[:-1])}, or {letters[-1]}"


class ClipReader:
    """Reads the clips of questions, from videos and from folders of frames.

    Args:
      reader: reads videos.
      limit: largest number of frames of a clip.
      sampling: rule that chooses the frames.
      layout, mean: how a frame becomes a square, as in `reader`.
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
        """Return the clip of a question.

        Raises:
          MediaError: it cannot be read.
        """
        rate = question.frames_per_second
        if rate is not None and not question.media.is_file():
            return self._read_folder(question.media, rate, question.span)
        record = Record(question.id, question.media, (), modality="video", span=question.span)
        return self._reader.read(record, self._limit, np.random.default_rng(0))

    def subtitles(self, question: Question, clip: Clip) -> list[str]:
        """Return the subtitles shown at the times of the clip's frames, each once.

        Raises:
          MediaError: the file cannot be read.
        """
        if question.subtitles is None:
            return []
        return [each.text for each in read_subtitles(question.subtitles) if _is_shown(each, clip.times)]

    def _read_folder(self, folder: Path, rate: float, span: tuple[float, float] | None) -> Clip:
        """Read a folder's images, ordered by name, as a video of `rate` frames per second."""
        try:
            names = sorted(name for name in os.listdir(folder) if Path(name).suffix.lower() in IMAGE_SUFFIXES)
        except OSError as error:
            raise MediaError(
                f"{folder}: the folder of frames cannot be read ({error.strerror}); check the path."
            ) from None
        times = np.arange(len(names)) / rate
        duration = len(names) / rate
        start, end = (0.0, duration) if span is None else span
        inside = np.flatnonzero((times >= start) & (times < end))
        if not len(inside):
            raise MediaError(
                f"{folder}: none of its {len(names)} frames is between {start:g} and {end:g} s; check that "
                "the folder is complete."
            )
        chosen = inside[choose_frames(times[inside], min(end, duration), self._sampling, self._limit)]
        files = MediaFolder(folder)
        try:
            frames = [
                read_image(files.file(names[i]), size=self._reader.size, layout=self._layout, mean=self._mean)
                for i in chosen
            ]
        except ValueError as error:
            raise MediaError(f"{folder}: {error}") from None
        return Clip(np.stack(frames), times[chosen], chosen.astype(np.int32))


def _is_shown(subtitle: Subtitle, times: np.ndarray) -> bool:
    return bool(np.any((times >= subtitle.start) & (times < subtitle.end)))
