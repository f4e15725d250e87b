"""Lengths of samples (text tokens and frames), measured before training and kept in a file."""

import json
import sys
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import numpy as np
import tqdm

from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.errors import MediaError, SampleError
from dynfocus_jax.json_lines import read_json_lines
from dynfocus_jax.media.video import MediaInfo
from dynfocus_jax.records.records import Record

_CHUNK = 1000  # measurements that are written to the file together

_Measured = TypeVar("_Measured")


class SampleLengths:
    """Measured lengths of conversations and media files, including those measured by earlier runs."""

    def __init__(
        self,
        path: Path | None = None,
        *,
        text_settings: Hashable = None,
        threads: int = 2,
        write: bool = True,
    ):
        """Read the lengths that a file holds.

        Args:
          path: a file of JSON lines: {"text": key, "ends": text tokens up to the end of each answer} and
            {"media": path, "info": fields of `MediaInfo`}, with null for what cannot be used. Its lengths are
            not measured again, so a resumed run sees the same lengths even if media files have changed;
            delete the file after replacing media. None keeps no file.
          text_settings: everything that the length of a text depends on, apart from the text.
          threads: number of threads that measure.
          write: whether this process adds its measurements to the file.
        """
        self._path, self._settings, self._threads = path, repr(text_settings), threads
        self._output = path if write else None
        self._ends: dict[str, tuple[int, ...] | None] = {}
        self._infos: dict[str, MediaInfo | None] = {}
        for entry in read_json_lines(path) if path else ():
            if "text" in entry:
                self._ends[entry["text"]] = entry["ends"] and tuple(entry["ends"])
            else:
                self._infos[entry["media"]] = entry["info"] and MediaInfo(*entry["info"])

    def assign_buckets(self, loader: SampleLoader) -> np.ndarray:
        """Return the bucket of each sample of a loader, after measuring the lengths that are not known yet.

        An unreadable file counts as one with the most frames, as it may be readable later.

        Returns:
          int64 [len(loader)].
        """
        budget, buckets = loader.budget, np.zeros(len(loader), np.int64)
        if len(budget.buckets) == 1:
            return buckets
        self._measure(loader)
        first = 0  # sample of the record
        for record in loader.records:
            ends, count = self._ends[self._text_key(record)], len(record.turns) if loader.each_turn else 1
            if ends is not None:  # otherwise loading the sample raises the reason, in any bucket
                frames = self._count_frames(loader, record)
                samples = [(end,) for end in ends] if loader.each_turn else [ends]
                buckets[first : first + count] = [budget.choose_bucket(each, frames) for each in samples]
            first += count
        return buckets

    def _count_frames(self, loader: SampleLoader, record: Record) -> int:
        if record.media is None or record.modality == "image":
            return int(record.media is not None)
        info, max_frames = self._infos[str(record.media)], loader.budget.max_frames
        return max_frames if info is None else loader.media.count_frames(info, record, max_frames)

    def _text_key(self, record: Record) -> str:
        content = (self._settings, record.turns, record.visual_at_end, record.media is None)
        return blake2b(repr(content).encode(), digest_size=12).hexdigest()

    def _measure(self, loader: SampleLoader) -> None:
        """Measure the lengths that are missing, and add them to the file."""
        texts = {self._text_key(record): index for index, record in enumerate(loader.records)}
        self._fill(self._ends, texts, lambda key: loader.text_ends(texts[key]), ("text", "ends"))
        files = sorted({str(record.media) for record in loader.records if record.modality == "video"})
        self._fill(self._infos, files, lambda path: loader.media.info(Path(path)), ("media", "info"))

    def _fill(
        self,
        known: dict[str, _Measured | None],
        keys: Iterable[str],
        measure: Callable[[str], _Measured],
        fields: tuple[str, str],
    ) -> None:
        """Measure the keys that are missing in `known`. fields: names of key and value in the file."""

        def attempt(key: str) -> _Measured | None:
            try:
                return measure(key)
            except (MediaError, SampleError):
                return None

        missing = [key for key in keys if key not in known]
        output = self._output
        if output is not None and missing:
            output.parent.mkdir(parents=True, exist_ok=True)
        title, hidden = f"{fields[0]} lengths", not sys.stderr.isatty()
        with (
            ThreadPoolExecutor(self._threads) as pool,
            tqdm.tqdm(total=len(missing), desc=title, disable=hidden) as bar,
        ):
            for begin in range(0, len(missing), _CHUNK):
                chunk = missing[begin : begin + _CHUNK]
                known |= zip(chunk, pool.map(attempt, chunk), strict=True)
                if output is not None:
                    lines = (json.dumps({fields[0]: key, fields[1]: known[key]}) + "\n" for key in chunk)
                    with output.open("a", encoding="utf-8") as file:
                        file.writelines(lines)
                bar.update(len(chunk))
