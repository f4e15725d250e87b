"""Reader of NExT-QA's annotations."""

from pathlib import Path

from dynfocus_jax.errors import UserError
from dynfocus_jax.records import prompts
from dynfocus_jax.records.entries import csv_entries, read_json
from dynfocus_jax.records.fields import ensure, first_existing, id_of, kind_of, text_of, with_suffixes
from dynfocus_jax.records.format_reader import SourceFiles, make_record, parse_source
from dynfocus_jax.records.records import ParsedEntries, Record

OPTION_COLUMNS = ("a0", "a1", "a2", "a3", "a4")


def read_nextqa(files: SourceFiles) -> ParsedEntries:
    """Read NExT-QA: multiple choice in the form of LLaVA 1.5.

    "answer" is the number of an option; in some releases it is the option's text. Videos are at the paths of
    map_vid_vidorID.json beside the CSV file ("1164/3238737531", without suffix), or at video.mp4.
    """
    places = read_video_places(files.annotations)

    def parse(row: dict[str, str]) -> Record:
        video = text_of(row["video"], "video")
        question = text_of(row["question"], "question")
        options = [text_of(row[key], key) for key in OPTION_COLUMNS]
        answer = text_of(row["answer"], "answer")
        number = "01234".find(answer) if len(answer) == 1 else -1
        if number < 0 and answer in options:
            number = options.index(answer)
        ensure(number >= 0, f'field "answer" is {kind_of(answer)}, expected 0 to 4 or the text of an option')
        question += "" if question.endswith(("?", ".")) else "?"
        turn = prompts.with_options(question, options, prompts.ONE_LETTER), prompts.LETTERS[number]
        stems = [places[video], video] if video in places else [video]
        paths = [path for stem in stems for path in with_suffixes(stem)]
        media = first_existing(paths, "video", files.folder)
        name = id_of(f"{video}_{text_of(row['qid'], 'qid')}")
        kind = text_of(row["type"], "type", empty=True)
        return make_record(files, name, media, [turn], kind=kind)

    columns = ("video", "question", "answer", "qid", "type", *OPTION_COLUMNS)
    return parse_source(files, csv_entries(files.annotations, columns), parse)


def read_video_places(annotations: Path) -> dict[str, str]:
    """Return the paths of videos without suffix, by their ids; {} if there is no map beside the annotations.

    The map, map_vid_vidorID.json, has entries such as {"3238737531": "1164/3238737531"}.

    Raises:
      UserError: the map is not an object of texts.
    """
    path = annotations.with_name("map_vid_vidorID.json")
    content = read_json(path) if path.is_file() else {}
    if isinstance(content, dict):
        places = {video: place for video, place in content.items() if isinstance(place, str)}
        if len(places) == len(content):
            return places
    raise UserError(f"{path}: not NExT-QA's map of video ids to paths; remove it, or download it again.")


FORMAT = read_nextqa
