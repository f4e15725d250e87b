"""Readers of published annotation formats, one file each; `FORMATS` lists them by name.

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

from collections.abc import Mapping

from dynfocus_jax.records.formats.clevrer import read_clevrer
from dynfocus_jax.records.formats.llava import read_llava
from dynfocus_jax.records.formats.nextqa import read_nextqa
from dynfocus_jax.records.formats.reader import FormatReader
from dynfocus_jax.records.formats.scienceqa import read_scienceqa
from dynfocus_jax.records.formats.videochat2 import read_videochat2
from dynfocus_jax.records.formats.videochatgpt import read_videochatgpt
from dynfocus_jax.records.formats.webvid import read_webvid

FORMATS: Mapping[str, FormatReader] = {
    "llava": read_llava,
    "videochat2": read_videochat2,
    "videochatgpt": read_videochatgpt,
    "webvid": read_webvid,
    "scienceqa": read_scienceqa,
    "nextqa": read_nextqa,
    "clevrer": read_clevrer,
}
