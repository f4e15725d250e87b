"""Reader of ScienceQA's annotations."""

from collections.abc import Iterator
from pathlib import Path

from dynfocus_jax.errors import UserError
from dynfocus_jax.records import prompts
from dynfocus_jax.records.entries import InvalidEntry, JsonValue, read_json
from dynfocus_jax.records.fields import first_existing, id_of, kind_of, list_of, object_of, text_of
from dynfocus_jax.records.format_reader import SourceFiles, make_record, parse_source
from dynfocus_jax.records.formats.llava import read_llava
from dynfocus_jax.records.records import ParsedEntries, Record


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
                f'field "answer" is {kind_of(answer)}, expected the index of one of {len(options)} choices'
            )
        context = text_of(entry.get("hint") or "", "hint", empty=True)
        listed = " ".join(f"({prompts.LETTERS[i]}) {option}" for i, option in enumerate(options))
        question = (
            f"{text_of(entry.get('question'), 'question')}\nContext: {context or 'N/A'}\nOptions: {listed}"
        )
        reasons = [text_of(entry.get(key) or "", key, empty=True) for key in ("lecture", "solution")]
        reply = " ".join([*filter(None, reasons), f"The answer is {prompts.LETTERS[answer]}."])
        if not entry.get("image"):
            return make_record(files, name, None, [(question, reply)], modality="text")
        image = text_of(entry["image"], "image")
        media = first_existing([f"train/{name}/{image}", f"{name}/{image}"], "image", files.folder)
        return make_record(files, name, media, [(question, reply)], modality="image")

    if files.annotations.name != "problems.json":
        return read_llava(files)
    return parse_source(files, _training_problems(files.annotations), parse)


def _training_problems(path: Path) -> Iterator[tuple[int, JsonValue]]:
    """Return the numbered training problems of problems.json, with their ids as the field "id"."""
    problems = read_json(path)
    if not isinstance(problems, dict):
        raise UserError(f"annotation file {path} is {kind_of(problems)}, expected a JSON object of problems.")
    chosen: list[JsonValue] = []
    for name, problem in problems.items():
        if not isinstance(problem, dict):
            chosen.append(problem)
        elif problem.get("split") in ("train", None):
            chosen.append({"id": name, **problem})
    return iter(enumerate(chosen))


FORMAT = read_scienceqa
