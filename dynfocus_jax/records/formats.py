"""Readers of published annotation formats. `FORMATS` lists them by the name that a source gives.

| format | files | entries |
|---|---|---|
| llava | LLaVA-558K, LLaVA-665K, LLaMA-VID's and your own json or jsonl files | see `read_llava` |
| videochat2 | VideoChat2-IT, `video/*/*/train.json` | `{"video" or "image", "QA": [{"i", "q", "a"}]}` |
| videochatgpt | VideoChatGPT-100K, `VideoInstruct100K.json` | `{"video_id", "q", "a"}` |
| webvid | WebVid, `results_2M_train.csv` | columns `videoid, name, page_dir` |
| scienceqa | ScienceQA in LLaVA's form, or its own `problems.json` | see `read_scienceqa` |
| nextqa | NExT-QA, `train.csv` (multiple choice) | columns `video, question, answer, qid, type, a0 ... a4` |
| clevrer | CLEVRER, `train.json`, `validation.json` | `{"video_filename", "questions": [...]}` |

If a format has no question or no place for the visual tokens, `prompts` chooses it by the record's id. Other
fields and columns are ignored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dynfocus_jax.errors import UserError, quoted
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records import prompts
from dynfocus_jax.records.entries import (
    InvalidEntry,
    JsonValue,
    csv_entries,
    json_line_entries,
    json_list_entries,
    read_json,
)
from dynfocus_jax.records.fields import (
    ASSUMED_SUFFIXES,
    check_size,
    ensure,
    first_existing,
    id_of,
    kind_of,
    list_of,
    media_of,
    object_of,
    path_of,
    span_of,
    text_of,
)
from dynfocus_jax.records.records import Entry, ParsedEntries, Record, parse_entries


class SourceFiles(NamedTuple):
    """The files of a source, and what its records must be.

    annotations: the annotation file.
    folder: the folder of the media files.
    name: name of the source, which becomes that of its records.
    modality: modality of every record; "auto" allows all.
    """

    annotations: Path
    folder: MediaFolder
    name: str = ""
    modality: str = "auto"


FormatReader = Callable[[SourceFiles], ParsedEntries]  # raises UserError if a file cannot be read


# ---- LLaVA -------------------------------------------------------------------------------------------------

_MARKERS = ("<image>", "<video>")  # place of the visual tokens in the first human message
_ROLES = ("human", "gpt")


def read_llava(files: SourceFiles) -> ParsedEntries:
    """Read a JSON list, or with the suffix .jsonl one entry per line, in the format of LLaVA.

    An entry is {"id", "image" or "video", "conversations": [{"from", "value"}, ...]}. Its messages are of
    "human" and "gpt" in turn. If it has a file, the first message begins or ends with the marker <image> (for
    a video as well), and no other message contains one. Text-only entries may mention the marker.

    Optional fields of our own: "type" (of the question), "needle_frames" (a list of frame numbers for each
    turn), "start" and "end" (seconds of the video), and "subtitles" (a path, like that of the video).
    """

    def parse(value: JsonValue) -> Record:
        entry = object_of(value)
        messages = _llava_messages(entry.get("conversations"))
        media, modality = media_of(entry, files.folder)
        first, has_marker, at_end = _split_marker(messages[0], media is not None)
        if has_marker and media is None:
            raise InvalidEntry(
                'field "conversations" has <image> in its first message, but there is no field "image" or '
                '"video"'
            )
        if media is not None and not has_marker:
            raise InvalidEntry('field "image" or "video" is given, but the first message has no <image>')
        texts = [first, *messages[1:]]
        for i, text in enumerate(texts):
            if not text:
                raise InvalidEntry(f'field "conversations[{i}].value" has no text', "text")
            if media is not None and any(marker in text for marker in _MARKERS):
                raise InvalidEntry(
                    f'field "conversations[{i}].value" contains <image>, expected only in the first message'
                )
        turns = tuple(zip(texts[::2], texts[1::2], strict=True))
        subtitles = entry.get("subtitles")
        return Record(
            id_of(entry.get("id")),
            media,
            turns,
            at_end,
            kind=text_of(entry.get("type", ""), "type", empty=True),
            needle_frames=_needle_frames(entry.get("needle_frames", []), len(turns)),
            source=files.name,
            modality=modality,
            span=span_of(entry),
            subtitles=path_of(subtitles, "subtitles", files.folder) if subtitles else None,
        )

    is_lines = files.annotations.suffix == ".jsonl"
    entries = json_line_entries if is_lines else json_list_entries
    return _parse_source(files, entries(files.annotations), parse)


def _llava_messages(conversations: JsonValue) -> list[str]:
    """Return the texts of the messages, of human and gpt in turn."""
    texts: list[str] = []
    for i, value in enumerate(list_of(conversations, "conversations", "messages")):
        message = object_of(value, f"conversations[{i}]")
        role = _ROLES[i % 2]
        if message.get("from") != role:
            found = kind_of(message.get("from"))
            raise InvalidEntry(f'field "conversations[{i}].from" is {found}, expected {role!r}', "turns")
        texts.append(text_of(message.get("value"), f"conversations[{i}].value", empty=True))
    ensure(
        len(texts) % 2 == 0,
        f'field "conversations" is a list of {len(texts)}, expected an answer to each question',
        "turns",
    )
    check_size(texts)
    return texts


def _split_marker(text: str, has_media: bool) -> tuple[str, bool, bool]:
    """Return the first message without its marker, whether it had one, and whether that was at its end."""
    for marker in _MARKERS:
        if text.startswith(marker):
            return text.removeprefix(marker).strip(), True, False
        if text.endswith(marker):
            return text.removesuffix(marker).strip(), True, True
        if has_media and marker in text:
            raise InvalidEntry(
                f'field "conversations[0].value" contains {marker} within the text, expected first or last'
            )
    return text, False, False


def _needle_frames(value: JsonValue, num_turns: int) -> tuple[tuple[int, ...], ...]:
    """Return the frame numbers of each turn, or () for an empty list."""
    if isinstance(value, list) and len(value) in (0, num_turns):
        frames = [_frame_numbers(each) for each in value]
        if None not in frames:
            return tuple(each for each in frames if each is not None)
    raise InvalidEntry(
        f'field "needle_frames" is {quoted(value)}, expected a list of frame numbers for each turn'
    )


def _frame_numbers(value: JsonValue) -> tuple[int, ...] | None:
    """Return a list of frame numbers as a tuple, None for anything else."""
    if not isinstance(value, list):
        return None
    numbers = tuple(each for each in value if type(each) is int and each >= 0)
    return numbers if len(numbers) == len(value) else None


# ---- VideoChat2-IT -----------------------------------------------------------------------------------------


def read_videochat2(files: SourceFiles) -> ParsedEntries:
    """Read VideoChat2-IT.

    The instruction "i" (may be missing or empty) precedes the question; of consecutive questions with one
    instruction, only the first. An empty question, as for captions, becomes a request for a caption. "start"
    and "end" are seconds of the file.
    """

    def parse(value: JsonValue) -> Record:
        entry = object_of(value)
        media, modality = media_of(entry, files.folder)
        ensure(media is not None, 'has neither "image" nor "video"')
        name = id_of(entry[modality] if entry.get("id") is None else entry["id"])
        turns: list[tuple[str, str]] = []
        last_instruction = ""
        for i, item in enumerate(list_of(entry.get("QA"), "QA", "turns")):
            turn = object_of(item, f"QA[{i}]")
            instruction = text_of(turn.get("i", ""), f"QA[{i}].i", empty=True)
            question = text_of(turn.get("q", ""), f"QA[{i}].q", empty=True)
            if not question:
                question = prompts.caption_request(modality, f"{name} {i}")
            if instruction and instruction != last_instruction:
                question, last_instruction = f"{instruction}\n{question}", instruction
            turns.append((question, text_of(turn.get("a"), f"QA[{i}].a")))
        return _make_record(files, name, media, turns, modality=modality, span=span_of(entry))

    return _parse_source(files, json_list_entries(files.annotations), parse)


# ---- VideoChatGPT-100K -------------------------------------------------------------------------------------


def read_videochatgpt(files: SourceFiles) -> ParsedEntries:
    """Read VideoChatGPT-100K: videos of ActivityNet, named without their suffix (mp4, mkv or webm)."""

    def parse(value: JsonValue) -> Record:
        entry = object_of(value)
        name = text_of(entry.get("video_id"), "video_id")
        turn = text_of(entry.get("q"), "q"), text_of(entry.get("a"), "a")
        media = first_existing(_with_suffixes(name), "video_id", files.folder)
        return _make_record(files, id_of(name), media, [turn])

    return _parse_source(files, json_list_entries(files.annotations), parse)


# ---- WebVid ------------------------------------------------------------------------------------------------


def read_webvid(files: SourceFiles) -> ParsedEntries:
    """Read WebVid: captions ("name") of the videos page_dir/videoid.mp4, or videoid.mp4."""

    def parse(row: dict[str, str]) -> Record:
        name = id_of(row["videoid"])
        caption = text_of(row["name"], "name")
        pages = row["page_dir"].strip()
        places = [f"{pages}/{name}.mp4"] if pages else []
        media = first_existing([*places, f"{name}.mp4"], "videoid", files.folder)
        return _make_record(files, name, media, [(prompts.caption_request("video", name), caption)])

    return _parse_source(files, csv_entries(files.annotations, ("videoid", "name", "page_dir")), parse)


# ---- ScienceQA ---------------------------------------------------------------------------------------------


def read_scienceqa(files: SourceFiles) -> ParsedEntries:
    """Read ScienceQA, in LLaVA's form or as the published problems.json.

    problems.json is {id: {"question", "choices", "answer", "hint", "image", "lecture", "solution", "split"}}.
    Only problems of the split "train", or without a split, are records. The conversation is that of LLaVA
    ("QCM-LEA"): question, context and choices; then the answer. Images are at train/id/image.png or
    id/image.png.
    """

    def parse(value: JsonValue) -> Record:
        entry = object_of(value)
        name = id_of(entry.get("id"))
        choices = list_of(entry.get("choices"), "choices", "choices", at_least=2)
        options = [text_of(choice, f"choices[{i}]") for i, choice in enumerate(choices)]
        answer = entry.get("answer")
        if not (type(answer) is int and 0 <= answer < len(options) <= len(prompts.LETTERS)):
            raise InvalidEntry(
                f'field "answer" is {kind_of(answer)}, expected the number of one of {len(options)} choices'
            )
        context = text_of(entry.get("hint") or "", "hint", empty=True)
        listed = " ".join(f"({prompts.LETTERS[i]}) {option}" for i, option in enumerate(options))
        question = (
            f"{text_of(entry.get('question'), 'question')}\nContext: {context or 'N/A'}\nOptions: {listed}"
        )
        reasons = [text_of(entry.get(key) or "", key, empty=True) for key in ("lecture", "solution")]
        reply = " ".join([*filter(None, reasons), f"The answer is {prompts.LETTERS[answer]}."])
        if not entry.get("image"):
            return _make_record(files, name, None, [(question, reply)], modality="text")
        image = text_of(entry["image"], "image")
        media = first_existing([f"train/{name}/{image}", f"{name}/{image}"], "image", files.folder)
        return _make_record(files, name, media, [(question, reply)], modality="image")

    if files.annotations.name != "problems.json":
        return read_llava(files)
    return _parse_source(files, _training_problems(files.annotations), parse)


def _training_problems(path: Path) -> Iterator[tuple[int, JsonValue]]:
    """Return the numbered training problems of problems.json, with their ids as the field "id"."""
    problems = read_json(path)
    if not isinstance(problems, dict):
        raise UserError(f"annotation file {path} is {kind_of(problems)}, expected an object of problems.")
    chosen: list[JsonValue] = []
    for name, problem in problems.items():
        if not isinstance(problem, dict):
            chosen.append(problem)
        elif problem.get("split") in ("train", None):
            chosen.append({"id": name, **problem})
    return iter(enumerate(chosen))


# ---- NExT-QA -----------------------------------------------------------------------------------------------

_NEXTQA_OPTIONS = ("a0", "a1", "a2", "a3", "a4")


def read_nextqa(files: SourceFiles) -> ParsedEntries:
    """Read NExT-QA: multiple choice in the form of LLaVA 1.5.

    "answer" is the number of an option; in some releases it is the option's text. Videos are at the paths of
    map_vid_vidorID.json beside the CSV file ("1164/3238737531", without suffix), or at video.mp4.
    """
    places = _nextqa_places(files.annotations.with_name("map_vid_vidorID.json"))

    def parse(row: dict[str, str]) -> Record:
        video = text_of(row["video"], "video")
        question = text_of(row["question"], "question")
        options = [text_of(row[key], key) for key in _NEXTQA_OPTIONS]
        answer = text_of(row["answer"], "answer")
        number = "01234".find(answer) if len(answer) == 1 else -1
        if number < 0 and answer in options:
            number = options.index(answer)
        ensure(number >= 0, f'field "answer" is {kind_of(answer)}, expected 0 to 4 or the text of an option')
        question += "" if question.endswith(("?", ".")) else "?"
        turn = prompts.with_options(question, options, prompts.ONE_LETTER), prompts.LETTERS[number]
        stems = [places[video], video] if video in places else [video]
        paths = [path for stem in stems for path in _with_suffixes(stem)]
        media = first_existing(paths, "video", files.folder)
        name = id_of(f"{video}_{text_of(row['qid'], 'qid')}")
        kind = text_of(row["type"], "type", empty=True)
        return _make_record(files, name, media, [turn], kind=kind)

    columns = ("video", "question", "answer", "qid", "type", *_NEXTQA_OPTIONS)
    return _parse_source(files, csv_entries(files.annotations, columns), parse)


def _nextqa_places(path: Path) -> Mapping[str, str]:
    """Return the paths of videos without suffix, by their ids; {} if there is no such file."""
    content = read_json(path) if path.is_file() else {}
    if isinstance(content, dict):
        places = {video: place for video, place in content.items() if isinstance(place, str)}
        if len(places) == len(content):
            return places
    raise UserError(f"{path}: not NExT-QA's map of video ids to paths; remove it or download it again.")


# ---- CLEVRER -----------------------------------------------------------------------------------------------


def read_clevrer(files: SourceFiles) -> ParsedEntries:
    """Read CLEVRER: all questions about a video are one conversation.

    A question is {"question", "answer"} (descriptive) or {"question", "choices": [{"choice", "answer":
    "correct" or "wrong"}]}, of which any number may be correct. Videos are where the published archive has
    them, such as video_00000-01000/video_00000.mp4, or at video_filename.
    """

    def parse(value: JsonValue) -> Record:
        entry = object_of(value)
        file = text_of(entry.get("video_filename"), "video_filename")
        questions = list_of(entry.get("questions"), "questions", "questions")
        turns = [_clevrer_turn(question, f"questions[{i}]") for i, question in enumerate(questions)]
        media = first_existing([*_clevrer_places(file), file], "video_filename", files.folder)
        return _make_record(files, id_of(file), media, turns)

    return _parse_source(files, json_list_entries(files.annotations), parse)


def _clevrer_turn(value: JsonValue, field: str) -> tuple[str, str]:
    question = object_of(value, field)
    text = text_of(question.get("question"), f"{field}.question")
    if "choices" not in question:
        return f"{text}\n{prompts.SHORT_ANSWER}", text_of(question.get("answer"), f"{field}.answer")
    choices = list_of(question["choices"], f"{field}.choices", "choices")
    ensure(
        len(choices) <= len(prompts.LETTERS),
        f'field "{field}.choices" has {len(choices)} choices, expected at most {len(prompts.LETTERS)}',
    )
    options: list[str] = []
    right: list[str] = []
    for i, item in enumerate(choices):
        choice = object_of(item, f"{field}.choices[{i}]")
        options.append(text_of(choice.get("choice"), f"{field}.choices[{i}].choice"))
        verdict = choice.get("answer")
        ensure(
            verdict in ("correct", "wrong"),
            f"field \"{field}.choices[{i}].answer\" is {kind_of(verdict)}, expected 'correct' or 'wrong'",
        )
        right += [prompts.LETTERS[i]] if verdict == "correct" else []
    return prompts.with_options(text, options, prompts.SEVERAL_LETTERS), ", ".join(right) or "None"


def _clevrer_places(file: str) -> list[str]:
    """Return the path of a video in the published archive, as a list; [] for a name of another form."""
    number = file.removeprefix("video_").removesuffix(".mp4")
    if not (number.isascii() and number.isdigit()):
        return []
    start = int(number) // 1000 * 1000
    return [f"video_{start:05d}-{start + 1000:05d}/{file}"]


# ---- Common to all -----------------------------------------------------------------------------------------


def _parse_source(
    files: SourceFiles, entries: Iterator[tuple[int, Entry | InvalidEntry]], parse: Callable[[Entry], Record]
) -> ParsedEntries:
    """Parse the entries of a source; refuse records of another modality than the source's."""

    def parse_checked(entry: Entry) -> Record:
        record = parse(entry)
        ensure(
            files.modality in ("auto", record.modality),
            f"has modality {record.modality!r}, but its source has modality {files.modality!r}",
            "modality",
        )
        return record

    return parse_entries(entries, parse_checked)


def _make_record(
    files: SourceFiles,
    name: str,
    media: Path | None,
    turns: Sequence[tuple[str, str]],
    *,
    modality: str = "video",
    kind: str = "",
    span: tuple[float, float] | None = None,
) -> Record:
    """Return a record of a format that has no place for the visual tokens."""
    check_size(text for turn in turns for text in turn)
    return Record(
        name,
        media,
        tuple(turns),
        visual_at_end=media is not None and prompts.visual_at_end(f"{name} {turns[0][0]}"),
        kind=kind,
        source=files.name,
        modality=modality,
        span=span,
    )


def _with_suffixes(name: str) -> list[str]:
    return [f"{name}{suffix}" for suffix in ASSUMED_SUFFIXES]


FORMATS: Mapping[str, FormatReader] = {
    "llava": read_llava,
    "videochat2": read_videochat2,
    "videochatgpt": read_videochatgpt,
    "webvid": read_webvid,
    "scienceqa": read_scienceqa,
    "nextqa": read_nextqa,
    "clevrer": read_clevrer,
}
