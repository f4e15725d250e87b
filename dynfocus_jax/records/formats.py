"""Annotation files as they are published, each as records: `FORMATS` by the name that a source gives.

| format | files | entries |
|---|---|---|
| llava | LLaVA-558K, LLaVA-665K, LLaMA-VID's and one's own json or jsonl | see `sources.llava_parser` |
| videochat2 | VideoChat2-IT, `video/*/*/train.json` | `{"video" or "image", "QA": [{"i", "q", "a"}]}` |
| videochatgpt | VideoChatGPT-100K, `VideoInstruct100K.json` | `{"video_id", "q", "a"}` |
| webvid | WebVid, `results_2M_train.csv` | columns `videoid, name, page_dir` |
| scienceqa | ScienceQA in LLaVA's form, or its own `problems.json` | LLaVA's; or see `_problem_entries` |
| nextqa | NExT-QA, `train.csv` (multiple choice) | columns `video, question, answer, qid, type, a0 ... a4` |
| clevrer | CLEVRER, `train.json`, `validation.json` | `{"video_filename", "questions": [...]}`, see below |

Where entries have no place for the visual tokens and no question, `prompts` chooses both by the record's id.
Further fields and columns are ignored.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from dynfocus_jax.errors import UserError
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records import prompts
from dynfocus_jax.records.entries import csv_entries, list_entries, read_json
from dynfocus_jax.records.fields import (
    ASSUMED_SUFFIXES,
    check_size,
    ensure,
    id_of,
    kind_of,
    media_of,
    path_of,
    span_of,
    text_of,
)
from dynfocus_jax.records.records import ParseRecord, Record, Refused, collect, llava_entries, llava_parser


class Origin(NamedTuple):
    """Context of a parser: the source that an entry comes from."""

    path: Path  # of the annotation file
    folder: MediaFolder
    source: str


class Format(NamedTuple):
    """Reader of a published format: a file's entries, and the parser that makes records of them."""

    entries: Callable[[Path], Iterator[tuple[int, object]]]
    parser: Callable[[Origin], ParseRecord]


def read_source(source: ConfigDict, data_root: str | Path) -> tuple[list[Record], list[Refused]]:
    """All usable records of a source (`config.source(...)`), in the file's order, and what is refused.

    Every entry of the file is in one of the two lists. Ids are unique, see `sources.collect`.

    Raises:
      UserError: the annotation file or the folder of the media cannot be read.
    """
    path = Path(data_root) / Path(source.annotations).expanduser()
    media = Path(data_root) / Path(source.media or "").expanduser()
    if source.media and not media.is_dir():
        raise UserError(
            f"source {source.name!r} has media {source.media!r}, but {media} is not a folder; put its media "
            "there."
        )
    entries, parser = FORMATS[source.format]
    parse = parser(Origin(path, MediaFolder(media), source.name))
    return collect(entries(path), _of_modality(parse, source.modality))


def _of_modality(parse: ParseRecord, modality: str) -> ParseRecord:
    if modality == "auto":
        return parse

    def checked(entry: object) -> Record:
        record = parse(entry)
        ensure(
            record.modality == modality,
            f"is about {_ABOUT[record.modality]}, but the modality of its source is {modality!r}",
            "modality",
        )
        return record

    return checked


_ABOUT = {"text": "text alone", "image": "an image", "video": "a video"}


# ---- VideoChat2-IT --------------------------------------------------------------------------------------


def _videochat2(origin: Origin) -> ParseRecord:
    """The instruction "i" (may be absent or empty) is said before the first question of those that share it.

    An empty question, as captions have it, becomes a request for a caption. "start" and "end" are seconds of
    the file.
    """

    def parse(entry: object) -> Record:
        entry = _object(entry)
        media, modality = media_of(entry, origin.folder)
        ensure(media is not None, 'has neither "image" nor "video"')
        name = id_of(entry[modality] if entry.get("id") is None else entry["id"])
        dialogue = entry.get("QA")
        ensure(
            isinstance(dialogue, list) and len(dialogue) > 0, 'field "QA" is missing or not a list of turns'
        )
        turns, said = [], ""
        for i, turn in enumerate(dialogue):
            ensure(isinstance(turn, dict), f'field "QA[{i}]" is {kind_of(turn)}, expected an object')
            instruction = text_of(turn.get("i", ""), f"QA[{i}].i", empty=True)
            question = text_of(turn.get("q", ""), f"QA[{i}].q", empty=True)
            if not question:
                question = prompts.caption_request(modality, f"{name} {i}")
            if instruction and instruction != said:
                question, said = f"{instruction}\n{question}", instruction
            turns.append((question, text_of(turn.get("a"), f"QA[{i}].a")))
        return _record(origin, name, media, turns, modality=modality, span=span_of(entry))

    return parse


# ---- VideoChatGPT-100K ----------------------------------------------------------------------------------


def _videochatgpt(origin: Origin) -> ParseRecord:
    """Videos of ActivityNet, which are mp4, mkv or webm files; entries name them without the suffix."""

    def parse(entry: object) -> Record:
        entry = _object(entry)
        name = text_of(entry.get("video_id"), "video_id")
        turn = text_of(entry.get("q"), "q"), text_of(entry.get("a"), "a")
        media = _first_present(origin.folder, "video_id", _with_suffixes(name))
        return _record(origin, id_of(name), media, [turn])

    return parse


# ---- WebVid ---------------------------------------------------------------------------------------------


def _webvid_entries(path: Path) -> Iterator[tuple[int, object]]:
    return csv_entries(path, ("videoid", "name", "page_dir"))


def _webvid(origin: Origin) -> ParseRecord:
    """Captions ("name") of the videos page_dir/videoid.mp4, or videoid.mp4."""

    def parse(row: dict) -> Record:
        name = id_of(row["videoid"])
        caption = text_of(row["name"], "name")
        pages = row["page_dir"].strip()
        names = [f"{pages}/{name}.mp4"] if pages else []
        media = _first_present(origin.folder, "videoid", [*names, f"{name}.mp4"])
        return _record(origin, name, media, [(prompts.caption_request("video", name), caption)])

    return parse


# ---- ScienceQA ------------------------------------------------------------------------------------------


def _scienceqa_entries(path: Path) -> Iterator[tuple[int, object]]:
    return _problem_entries(path) if path.name == "problems.json" else llava_entries(path)


def _scienceqa(origin: Origin) -> ParseRecord:
    if origin.path.name == "problems.json":
        return _problem_parser(origin)
    return llava_parser(origin.folder, origin.source)


def _problem_entries(path: Path) -> Iterator[tuple[int, object]]:
    """The training problems of ScienceQA's own file, {id: {"question", "choices", "answer", "hint", "image",
    "lecture", "solution", "split"}}; those whose split is another ("val", "test") are not its records.
    """
    problems = read_json(path)
    if not isinstance(problems, dict):
        raise UserError(f"annotation file {path} holds {kind_of(problems)}, expected an object of problems")
    chosen = (
        {"id": name, **problem} if isinstance(problem, dict) else problem
        for name, problem in problems.items()
        if not isinstance(problem, dict) or problem.get("split") in ("train", None)
    )
    return enumerate(chosen)


def _problem_parser(origin: Origin) -> ParseRecord:
    """Parse ScienceQA as LLaVA does ("QCM-LEA"): question, context and choices; then the answer.

    Images are at train/id/image.png or id/image.png.
    """

    def parse(entry: object) -> Record:
        entry = _object(entry)
        name = id_of(entry.get("id"))
        options = entry.get("choices")
        ensure(isinstance(options, list) and len(options) > 1, 'field "choices" is not a list of two or more')
        options = [text_of(option, f"choices[{i}]") for i, option in enumerate(options)]
        answer = entry.get("answer")
        ensure(
            type(answer) is int and 0 <= answer < len(options) <= len(prompts.LETTERS),
            f'field "answer" is {kind_of(answer)}, expected the number of one of {len(options)} choices',
        )
        context = text_of(entry.get("hint") or "", "hint", empty=True)
        choices = " ".join(f"({prompts.LETTERS[i]}) {option}" for i, option in enumerate(options))
        question = (
            f"{text_of(entry.get('question'), 'question')}\nContext: {context or 'N/A'}\nOptions: {choices}"
        )
        reasons = [text_of(entry.get(key) or "", key, empty=True) for key in ("lecture", "solution")]
        reply = " ".join([*filter(None, reasons), f"The answer is {prompts.LETTERS[answer]}."])
        image, media = entry.get("image"), None
        if image:
            image = text_of(image, "image")
            media = _first_present(origin.folder, "image", [f"train/{name}/{image}", f"{name}/{image}"])
        modality = "image" if image else "text"
        return _record(origin, name, media, [(question, reply)], modality=modality)

    return parse


# ---- NExT-QA --------------------------------------------------------------------------------------------

_OPTIONS = ("a0", "a1", "a2", "a3", "a4")


def _nextqa_entries(path: Path) -> Iterator[tuple[int, object]]:
    return csv_entries(path, ("video", "question", "answer", "qid", "type", *_OPTIONS))


def _nextqa(origin: Origin) -> ParseRecord:
    """Multiple choice as LLaVA 1.5 puts it; "answer" is the number of an option, in some releases its text.

    Videos are at the place that `map_vid_vidorID.json` beside the csv file gives ("1164/3238737531", without
    suffix), or at video.mp4.
    """
    places = origin.path.with_name("map_vid_vidorID.json")
    place_of = read_json(places) if places.is_file() else {}
    if not isinstance(place_of, dict) or not all(isinstance(place, str) for place in place_of.values()):
        raise UserError(f"{places} is not NExT-QA's map of video ids to paths; remove it")

    def parse(row: dict) -> Record:
        video = text_of(row["video"], "video")
        question = text_of(row["question"], "question")
        options = [text_of(row[key], key) for key in _OPTIONS]
        answer = text_of(row["answer"], "answer")
        number = "01234".find(answer) if len(answer) == 1 else -1
        if number < 0 and answer in options:
            number = options.index(answer)
        ensure(number >= 0, f'field "answer" is {kind_of(answer)}, expected 0 to 4 or the text of an option')
        question += "" if question.endswith(("?", ".")) else "?"
        turn = prompts.with_options(question, options, prompts.ONE_LETTER), prompts.LETTERS[number]
        names = [place_of[video], video] if video in place_of else [video]
        media = _first_present(origin.folder, "video", [name for n in names for name in _with_suffixes(n)])
        name = id_of(f"{video}_{text_of(row['qid'], 'qid')}")
        return _record(origin, name, media, [turn], kind=text_of(row["type"], "type", empty=True))

    return parse


# ---- CLEVRER --------------------------------------------------------------------------------------------


def _clevrer(origin: Origin) -> ParseRecord:
    """All questions about a video are one conversation.

    A question is {"question", "answer"} (descriptive) or {"question", "choices": [{"choice", "answer":
    "correct" or "wrong"}]}; of the choices any number may be correct. Videos are where the published archive
    puts them, video_00000-01000/video_00000.mp4, or at video_filename itself.
    """

    def parse(entry: object) -> Record:
        entry = _object(entry)
        file = text_of(entry.get("video_filename"), "video_filename")
        questions = entry.get("questions")
        ensure(
            isinstance(questions, list) and len(questions) > 0, 'field "questions" is missing or not a list'
        )
        turns = [_clevrer_turn(question, f"questions[{i}]") for i, question in enumerate(questions)]
        media = _first_present(origin.folder, "video_filename", [*_clevrer_place(file), file])
        return _record(origin, id_of(file), media, turns)

    return parse


def _clevrer_turn(question: object, field: str) -> tuple[str, str]:
    ensure(isinstance(question, dict), f'field "{field}" is {kind_of(question)}, expected an object')
    asked = text_of(question.get("question"), f"{field}.question")
    if "choices" not in question:
        return f"{asked}\n{prompts.SHORT_ANSWER}", text_of(question.get("answer"), f"{field}.answer")
    choices = question["choices"]
    ensure(
        isinstance(choices, list)
        and 0 < len(choices) <= len(prompts.LETTERS)
        and all(isinstance(choice, dict) for choice in choices),
        f'field "{field}.choices" is not a list of choices',
    )
    options = [text_of(choice.get("choice"), f"{field}.choices[{i}]") for i, choice in enumerate(choices)]
    right = []
    for i, choice in enumerate(choices):
        verdict = choice.get("answer")
        ensure(
            verdict in ("correct", "wrong"),
            f"field \"{field}.choices[{i}].answer\" is {kind_of(verdict)}, expected 'correct' or 'wrong'",
        )
        right += [prompts.LETTERS[i]] if verdict == "correct" else []
    return prompts.with_options(asked, options, prompts.SEVERAL_LETTERS), ", ".join(right) or "None"


def _clevrer_place(file: str) -> list[str]:
    number = file.removeprefix("video_").removesuffix(".mp4")
    if not (number.isascii() and number.isdigit()):
        return []
    start = int(number) // 1000 * 1000
    return [f"video_{start:05d}-{start + 1000:05d}/{file}"]


# ---- What they share ------------------------------------------------------------------------------------


def _object(entry: object) -> dict:
    ensure(isinstance(entry, dict), f"is {kind_of(entry)}, expected an object")
    return entry


def _record(
    origin: Origin,
    name: str,
    media: Path | None,
    turns: Sequence[tuple[str, str]],
    *,
    modality: str = "video",
    **fields,
) -> Record:
    check_size(text for turn in turns for text in turn)
    return Record(
        name,
        media,
        tuple(turns),
        visual_at_end=media is not None and prompts.visual_at_end(f"{name} {turns[0][0]}"),
        source=origin.source,
        modality=modality,
        **fields,
    )


def _with_suffixes(name: str) -> list[str]:
    return [f"{name}{suffix}" for suffix in ASSUMED_SUFFIXES]


def _first_present(folder: MediaFolder, field: str, names: Sequence[str]) -> Path:
    """The first of several places at which there is something, or else the first place."""
    return path_of(next(filter(folder.has, names), names[0]), field, folder)


FORMATS: dict[str, Format] = {
    "llava": Format(llava_entries, lambda origin: llava_parser(origin.folder, origin.source)),
    "videochat2": Format(list_entries, _videochat2),
    "videochatgpt": Format(list_entries, _videochatgpt),
    "webvid": Format(_webvid_entries, _webvid),
    "scienceqa": Format(_scienceqa_entries, _scienceqa),
    "nextqa": Format(_nextqa_entries, _nextqa),
    "clevrer": Format(list_entries, _clevrer),
}
