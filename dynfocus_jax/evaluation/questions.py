"""Benchmark questions, and readers of annotation files that drop none of them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from dynfocus_jax.errors import UserError
from dynfocus_jax.records.entries import InvalidEntry, JsonValue, json_line_entries, json_list_entries
from dynfocus_jax.records.fields import ASSUMED_SUFFIXES, ensure, kind_of, object_of, text_of, with_suffixes
from dynfocus_jax.records.prompts import LETTERS

Form = Literal["choice", "yes_no", "open", "span"]  # of an answer: determines how it is parsed


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a video: one request to the model, one line of the predictions."""

    id: str
    media: Path  # a video, or a folder of frames; it need not exist
    question: str  # without options and instructions
    # The right letter, "yes" or "no", or text. None for a "span", and if the benchmark does not publish it.
    answer: str | None
    form: Form
    options: tuple[str, ...] = ()  # of a "choice", without their letters
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # {"duration": ("short",)}
    unit: str = ""  # shared by questions that are scored together (a pair, the tries of a needle); "": the id
    span: tuple[float, float] | None = None  # seconds of the video that are shown; None: all
    subtitles: Path | None = None
    frames_per_second: float | None = None  # of a folder of frames
    rubrics: Mapping[str, str] = field(default_factory=dict)  # of the judge, by dimension
    true_spans: tuple[tuple[float, float], ...] = ()  # seconds in which the answer is seen
    extra: Mapping[str, str] = field(default_factory=dict)  # fields for the judge's prompt or the submission

    def __post_init__(self):
        if self.form == "open" and self.answer is None:
            raise ValueError(f"open question {self.id!r} has no answer")
        if not self.unit:
            object.__setattr__(self, "unit", self.id)

    @property
    def reference(self) -> str:
        """The right answer of a question whose benchmark publishes it, such as any open question."""
        if self.answer is None:
            raise ValueError(f"question {self.id!r} has no published answer")
        return self.answer


RawEntry = Mapping[str, JsonValue] | JsonValue | InvalidEntry  # the first is a row of a csv file
ParseQuestion = Callable[[dict[str, JsonValue]], Question | Sequence[Question]]  # raises InvalidEntry


def read_questions(
    path: Path, entries: Iterable[tuple[int, RawEntry]], parse: ParseQuestion
) -> list[Question]:
    """Return the questions of all entries of a file, in its order.

    Raises:
      UserError: an entry is invalid (skipping it would change the denominator), or the file has no questions.
    """
    questions: list[Question] = []
    for number, entry in entries:
        try:
            if isinstance(entry, InvalidEntry):
                raise entry
            parsed = parse(object_of(entry))
        except InvalidEntry as error:
            raise UserError(
                f"annotation file {path}, entry {number}: {error}; correct the file, or download it again "
                "(no entry is skipped)."
            ) from None
        questions += [parsed] if isinstance(parsed, Question) else parsed
    if not questions:
        raise UserError(f"annotation file {path} has no questions; check that it is the right file.")
    return questions


def make_ids_unique(questions: Sequence[Question]) -> list[Question]:
    """Rename the second question with an id to "id#2", and so on, so that all are asked and counted."""
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
        alone = question.unit == question.id
        unique.append(replace(question, id=name, unit=name if alone else question.unit))
    return unique


def fingerprint(questions: Sequence[Question]) -> str:
    """Return 16 hexadecimal digits that depend on all questions, options and answers."""
    lines = (
        json.dumps([q.id, q.question, q.options, q.answer, q.form, dict(q.groups), q.unit, q.span])
        for q in questions
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


# ---- Files ----------------------------------------------------------------------------------------------


def table_entries(path: Path) -> Iterator[tuple[int, RawEntry]]:
    """Yield a file's numbered entries: lines of .jsonl, rows of .parquet, or else values of a JSON list."""
    readers = {".jsonl": json_line_entries, ".parquet": _parquet_entries}
    return readers.get(path.suffix, json_list_entries)(path)


def _parquet_entries(path: Path) -> Iterator[tuple[int, RawEntry]]:
    import pyarrow  # noqa: PLC0415 (takes 0.6 s, which other formats need not wait for)
    from pyarrow import parquet  # noqa: PLC0415

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows)
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"annotation file {path} is not a parquet file ({reason}); download it again."
        ) from None


def annotation_files(annotations: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of a benchmark that has several.

    annotations: one of the files, or a folder that holds some of them: directly, each in a folder of its own
    name, or in the folder "json". (A mean over some of the files is reported under another name.)

    Raises:
      UserError: the folder has none of the files.
    """
    if annotations.is_file():
        return [annotations]
    places = [(annotations / n, annotations / Path(n).stem / n, annotations / "json" / n) for n in names]
    found = [place for each in places if (place := next(filter(Path.is_file, each), None))]
    if not found:
        raise UserError(
            f"--annotations {str(annotations)!r} has none of the files {names[0]}, ... {names[-1]}; set it "
            "to the folder that has them."
        )
    return found


# ---- Fields ---------------------------------------------------------------------------------------------


def video_paths(name: str, *folders: str) -> list[str]:
    """Return the paths at which a video may be, directly and in each of `folders`.

    The name may lack its suffix; then all usual suffixes are tried.
    """
    names = [name] if name.lower().endswith(ASSUMED_SUFFIXES) else with_suffixes(name)
    return [f"{parent}/{each}" if parent else each for parent in ("", *folders) for each in names]


def word_of(value: JsonValue, key: str) -> str:
    """Return a short field that is a text or a number."""
    return text_of(str(value) if type(value) in (int, float) else value, key)


def texts_of(value: JsonValue, key: str) -> tuple[str, ...]:
    """Return a list of at least two texts or numbers."""
    if not isinstance(value, list) or not 1 < len(value) <= len(LETTERS):
        found = f"a list of {len(value)}" if isinstance(value, list) else kind_of(value)
        raise InvalidEntry(f'field "{key}" is {found}, expected a list of 2 to {len(LETTERS)} options')
    return tuple(word_of(each, f"{key}[{i}]") for i, each in enumerate(value))


def letter_of(answer: JsonValue, key: str, options: Sequence[str]) -> str:
    """Return the letter of the right option, in a file that has the letter: "B", "(B)"."""
    letter = word_of(answer, key).strip("().: ")
    last = LETTERS[len(options) - 1]
    is_letter = len(letter) == 1 and letter in LETTERS[: len(options)]
    ensure(is_letter, f'field "{key}" is {kind_of(answer)}, expected a letter from A to {last}')
    return letter


def letter_of_text(answer: JsonValue, key: str, options: Sequence[str]) -> str:
    """Return the letter of the right option, in a file that has the option's text."""
    text = word_of(answer, key)
    if text in options:
        return LETTERS[options.index(text)]
    equal = [i for i, option in enumerate(options) if _normalise(option) == _normalise(text)]
    ensure(
        len(equal) == 1,
        f'field "{key}" is {kind_of(answer)}, expected the text of one of the {len(options)} options',
    )
    return LETTERS[equal[0]]


def _normalise(text: str) -> str:
    """Remove case, extra spaces and the final full stop, in which answers and options may differ."""
    return " ".join(text.casefold().split()).rstrip(".")
