"""Readers of published annotation formats, one file each. `FORMATS` lists them by the name of their file.

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
fields and columns are ignored. To add a format, add a file that ends with `FORMAT = my_reader`.
"""

import importlib
import pkgutil
from collections.abc import Mapping

from dynfocus_jax.records.format_reader import FormatReader

FORMATS: Mapping[str, FormatReader] = {
    each.name: importlib.import_module(f"{__name__}.{each.name}").FORMAT
    for each in pkgutil.iter_modules(__path__)
}
