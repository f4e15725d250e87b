"""Reader of CLEVRER's annotations."""

from dynfocus_jax.records import prompts
from dynfocus_jax.records.entries import JsonValue, json_list_entries
from dynfocus_jax.records.fields import ensure, first_existing, id_of, kind_of, list_of, object_of, text_of
from dynfocus_jax.records.format_reader import SourceFiles, make_record, parse_source
from dynfocus_jax.records.records import ParsedEntries, Record


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
        return make_record(files, id_of(file), media, turns)

    return parse_source(files, json_list_entries(files.annotations), parse)


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


FORMAT = read_clevrer
