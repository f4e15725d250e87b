"""Lengths of samples, measured before training: text tokens and frames, kept in a file."""

import json
import sys
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
import tqdm

from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.errors import MediaError, SampleError
from dynfocus_jax.json_lines import read_json_lines
from dynfocus_jax.media.video import MediaInfo
from dynfocus_jax.records.records import Record

_CHUNK = 1000  # measurements that are written together


class Lengths:
    """Measured lengths of conversations and files, those of earlier runs included.

    path: a file of json lines: {"text": key, "ends": text tokens up to the end of each answer} and {"media":
      path, "info": the fields of MediaInfo}, with null for what cannot be used. What it holds is not measured
      again, so that a run which is resumed sees the same lengths whatever became of the files; to be deleted
      when files were replaced. None keeps nothing.
    text_settings: what the length of a text depends on apart from the text.
    threads: that measure; write: whether this process adds to the file.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        text_settings: Hashable = None,
        threads: int = 2,
        write: bool = True,
    ):
        self._path, self._settings = path, repr(text_settings)
        self._threads, self._write = threads, write and path is not None
        self._ends: dict[str, tuple[int, ...] | None] = {}
        self._infos: dict[str, MediaInfo | None] = {}
        for entry in read_json_lines(path) if path else ():
            if "text" in entry:
                self._ends[entry["text"]] = entry["ends"] and tuple(entry["ends"])
            else:
                self._infos[entry["media"]] = entry["info"] and MediaInfo(*entry["info"])

    def buckets(self, load: SampleLoader) -> np.ndarray:
        """The bucket of every sample of `load`, int64 `[len(load)]`; measures what is not known yet.

        A file that cannot be read counts as one of the most frames: it may be readable later.
        """
        budget, numbers = load.budget, np.zeros(len(load), np.int64)
        if len(budget.buckets) == 1:
            return numbers
        self._measure(load)
        first = 0  # sample of the record
        for record in load.records:
            ends, count = self._ends[self._text_key(record)], len(record.turns) if load.each_turn else 1
            if ends is not None:  # else reading it, in whatever bucket, ends in the reason
                frames = self._frames(load, record)
                samples = [(end,) for end in ends] if load.each_turn else [ends]
                numbers[first : first + count] = [budget.choose(each, frames) for each in samples]
            first += count
        return numbers

    def _frames(self, load: SampleLoader, record: Record) -> int:
        if record.media is None or record.modality == "image":
            return int(record.media is not None)
        info, most = self._infos[str(record.media)], load.budget.max_frames
        return most if info is None else load.media.count(info, record, most)

    def _text_key(self, record: Record) -> str:
        about = (self._settings, record.turns, record.visual_at_end, record.media is None)
        return blake2b(repr(about).encode(), digest_size=12).hexdigest()

    def _measure(self, load: SampleLoader) -> None:
        """Add what is missing, to the file too."""
        texts = {self._text_key(record): index for index, record in enumerate(load.records)}
        self._fill(self._ends, texts, lambda key: load.text_ends(texts[key]), ("text", "ends"))
        files = sorted({str(record.media) for record in load.records if record.modality == "video"})
        self._fill(self._infos, files, lambda path: load.media.info(Path(path)), ("media", "info"))

    def _fill(self, known: dict, keys: Iterable[str], measure: Callable, fields: tuple[str, str]) -> None:
        """Measure those of the keys that are not known; a line of the file has them under `fields`."""

        def attempt(key: str):
            try:
                return measure(key)
            except (MediaError, SampleError):
                return None

        missing = [key for key in keys if key not in known]
        if self._write and missing:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm.tqdm(total=len(missing), desc=f"{fields[0]} lengths", disable=not sys.stderr.isatty())
        with ThreadPoolExecutor(self._threads) as pool, bar:
            for begin in range(0, len(missing), _CHUNK):
                chunk = missing[begin : begin + _CHUNK]
                known |= zip(chunk, pool.map(attempt, chunk), strict=True)
                if self._write:
                    lines = (json.dumps({fields[0]: key, fields[1]: known[key]}) + "\n" for key in chunk)
                    with self._path.open("a", encoding="utf-8") as file:
                        file.writelines(lines)
                bar.update(len(chunk))
