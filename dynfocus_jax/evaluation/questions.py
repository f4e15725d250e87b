"""Questions of a benchmark, and reading them from its annotation files without losing one."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dynfocus_jax.errors import UserError
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import InvalidEntry, json_line_entries, json_list_entries
from dynfocus_jax.records.fields import ASSUMED_SUFFIXES, ensure, kind_of, path_of, text_of
from dynfocus_jax.records.prompts import LETTERS


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one video: one answer of the model, one record of the predictions."""

    id: str
    media: Path  # a video, or a folder of frames; whether it is there shows when it is read
    question: str  # without options and instructions
    answer: str | None  # what is right: a letter, "yes" or "no", a text; None: the benchmark keeps it
    form: str  # "choice" | "yes_no" | "open" | "span": how the model's words are understood
    options: tuple[str, ...] = ()  # of a "choice", without their letters
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # {"duration": ("short",)}
    belongs_to: str = ""  # what is judged as a whole (a pair, the tries of a needle); left out: itself
    span: tuple[float, float] | None = None  # seconds of the video that are shown; None: all
    subtitles: Path | None = None
    about: Mapping[str, object] = field(default_factory=dict)  # what only its benchmark's measure needs

    def __post_init__(self):
        if not self.belongs_to:
            object.__setattr__(self, "belongs_to", self.id)


ParseQuestion = Callable[[dict], Question | Sequence[Question]]  # raises InvalidEntry


def read_questions(path: Path, entries: Iterable[tuple[int, object]], parse: ParseQuestion) -> list[Question]:
    """The questions of all entries of a file, in its order.

    Raises:
      UserError: an entry is not what it should be. None is left out: it would leave the denominator too.
    """
    questions: list[Question] = []
    for number, entry in entries:
        try:
            if isinstance(entry, InvalidEntry):
                raise entry
            ensure(isinstance(entry, dict), f"is {kind_of(entry)}, expected an object")
            parsed = parse(entry)
        except InvalidEntry as error:
            raise UserError(
                f"annotation file {path}, entry {number}: {error}; every entry counts, so correct the file."
            ) from None
        questions += [parsed] if isinstance(parsed, Question) else parsed
    if not questions:
        raise UserError(f"annotation file {path} contains no questions; check that it is the right file.")
    return questions


def with_unique_ids(questions: Sequence[Question]) -> list[Question]:
    """The second question of an id becomes "id#2", and so on: all of them are asked and counted."""
    taken = {question.id for question in questions}
    seen: dict[str, int] = {}
    unique = []
    for question in questions:
        number = seen.get(question.id, 0) + 1
        name = question.id
        if number > 1:
            while (name := f"{question.id}#{number}") in taken:
                number += 1
            taken.add(name)
        seen[question.id] = number
        alone = question.belongs_to == question.id
        unique.append(replace(question, id=name, belongs_to=name if alone else question.belongs_to))
    return unique


def fingerprint(questions: Sequence[Question]) -> str:
    """16 hexadecimal digits of everything that is asked and what is right."""
    lines = (
        json.dumps([q.id, q.question, q.options, q.answer, q.form, dict(q.groups), q.belongs_to, q.span])
        for q in questions
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


# ---- Files ----------------------------------------------------------------------------------------------


def table_entries(path: Path) -> Iterator[tuple[int, object]]:
    """The entries of a JSON list or, by the suffix, of the lines of .jsonl or the rows of .parquet."""
    readers = {".jsonl": json_line_entries, ".parquet": _parquet_entries}
    return readers.get(path.suffix, json_list_entries)(path)


def _parquet_entries(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow  # noqa: PLC0415 (takes 0.6 s, which other formats need not wait for)
    from pyarrow import parquet  # noqa: PLC0415

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows)
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"annotation file {path} cannot be read as parquet ({reason}).") from None


def annotation_files(annotations: Path, names: Sequence[str]) -> list[Path]:
    """The files of a benchmark that has several: the one that is named, or those in the folder that is.

    They are in the folder, in one of their own name, or below "json". (A mean over fewer of them than the
    benchmark has is reported under another name.)

    Raises:
      UserError: there are none.
    """
    if annotations.is_file():
        return [annotations]
    places = [(annotations / n, annotations / Path(n).stem / n, annotations / "json" / n) for n in names]
    found = [place for each in places if (place := next(filter(Path.is_file, each), None))]
    if not found:
        raise UserError(
            f"--annotations {str(annotations)!r} has none of the files {names[0]}, ... {names[-1]}; name the "
            "folder that holds them."
        )
    return found


# ---- Fields ---------------------------------------------------------------------------------------------


def media_file(folder: MediaFolder, key: str, names: Sequence[str]) -> Path:
    """The first of several places at which there is something, or else the first place."""
    return path_of(next(filter(folder.has, names), names[0]), key, folder)


def with_suffixes(name: str, *folders: str) -> list[str]:
    """Path of a video that is named without its suffix (or with it): in each folder, below `folders`."""
    names = (
        [name] if name.lower().endswith(ASSUMED_SUFFIXES) else [name + suffix for suffix in ASSUMED_SUFFIXES]
    )
    return [f"{parent}/{each}" if parent else each for parent in ("", *folders) for each in names]


def word_of(value: object, key: str) -> str:
    """A short field that is a text or a number."""
    return text_of(str(value) if type(value) in (int, float) else value, key)


def texts_of(value: object, key: str) -> tuple[str, ...]:
    """A list of at least two texts or numbers."""
    found = f"a list of {len(value)}" if isinstance(value, list) else kind_of(value)
    ensure(
        isinstance(value, list) and 1 < len(value) <= len(LETTERS),
        f'field "{key}" is {found}, expected a list of 2 to {len(LETTERS)} options',
    )
    return tuple(word_of(each, f"{key}[{i}]") for i, each in enumerate(value))


def letter_of(answer: object, key: str, options: Sequence[str]) -> str:
    """The letter of the right option, where a file gives letters: "B", "(B)"."""
    letter = word_of(answer, key).strip("().: ")
    last = LETTERS[len(options) - 1]
    good = len(letter) == 1 and letter in LETTERS[: len(options)]
    ensure(good, f'field "{key}" is {kind_of(answer)}, expected a letter from A to {last}')
    return letter


def letter_of_text(answer: object, key: str, options: Sequence[str]) -> str:
    """The letter of the right option, where a file gives its text."""
    text = word_of(answer, key)
    if text in options:
        return LETTERS[options.index(text)]
    alike = [i for i, option in enumerate(options) if _plain(option) == _plain(text)]
    ensure(len(alike) == 1, f'field "{key}" is {kind_of(answer)}, none of {len(options)} options')
    return LETTERS[alike[0]]


def _plain(text: str) -> str:
    """Without case, doubled spaces and the last full stop, in which answers and options may differ."""
    return " ".join(text.casefold().split()).rstrip(".")
