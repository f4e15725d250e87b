"""Ask a trained model about a video.

    python -m dynfocus_jax.chat --workdir runs/toy --video clip.mp4 --question "what shape is red ?"

Prints the greedy answer and which frames were in focus; --focus_picture FILE.png draws them.
"""

import json
from pathlib import Path

import jax
import numpy as np
from absl import flags

from dynfocus_jax.command import run_command
from dynfocus_jax.config import UserError, from_dict
from dynfocus_jax.data.budget import Budget
from dynfocus_jax.data.conversation import TEMPLATES, SampleError
from dynfocus_jax.data.prepare import make_media_reader, make_tokenizer
from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.data.sources import Record
from dynfocus_jax.data.video import MediaError
from dynfocus_jax.evaluation.exact_match import focused_frames
from dynfocus_jax.models.dynfocus import build_model
from dynfocus_jax.serving.generate import make_greedy
from dynfocus_jax.training.checkpoints import restore_params
from dynfocus_jax.validation import validate
from dynfocus_jax.visualize.focus import Strip, draw_focus

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished training run.")
_VIDEO = flags.DEFINE_string("video", None, "Video or image file.")
_QUESTION = flags.DEFINE_string("question", None, "The question, in the words the model was trained on.")
_PICTURE = flags.DEFINE_string("focus_picture", None, "Also draw the frames and their scores to this file.")


def load_run(workdir: Path):
    """The configuration, tokenizer and final parameters of a finished run."""
    config_file = workdir / "config.json"
    if not config_file.is_file():
        raise UserError(f"--workdir {workdir} has no config.json; name the folder of a training run.")
    config = from_dict(json.loads(config_file.read_text(encoding="utf-8")))
    config.initial = None  # what training started from may be gone
    validate(config)
    stage = config.stages[-1]
    params = restore_params(workdir / "checkpoints" / stage.name, stage.steps)
    return config, make_tokenizer(config, workdir / "vocabulary.json", strict=False), params


def main() -> None:
    for name, flag in (("workdir", _WORKDIR), ("video", _VIDEO), ("question", _QUESTION)):
        if flag.value is None or not flag.value.strip():
            raise UserError(f"--{name} is missing or empty; see --help.")
    video, question = Path(_VIDEO.value).expanduser(), _QUESTION.value.strip()
    config, tokenizer, params = load_run(Path(_WORKDIR.value).expanduser())
    evaluation, media = config.evaluation, make_media_reader(config)
    record = Record("question", video, ((question, ""),))
    loader = SampleLoader(
        [record],
        tokenizer,
        TEMPLATES[config.data.template],
        media,
        Budget.of([(evaluation.media_frames, evaluation.max_text)]),
        max_query=config.data.max_query,
        guidance=config.data.text_guidance,
        prompt_only=True,
    )
    try:
        sample, _ = loader(0, np.random.default_rng(0))
        clip = media.read(record, evaluation.media_frames, np.random.default_rng(0))
    except (MediaError, SampleError) as error:
        raise UserError(str(error)) from None
    unknown = [word for word in question.lower().split() if tokenizer.encode(word) == [tokenizer.unk_id]]
    if unknown:
        print(f"note: the model does not know the words {', '.join(unknown)}")

    model = build_model(config, config.stages[-1].connector)
    greedy = make_greedy(model, evaluation.max_new_tokens, tokenizer.eos_id)
    batch = jax.tree.map(lambda x: np.asarray(x)[None], sample)
    answers = jax.device_get(greedy(params, batch))
    answer = tokenizer.decode(answers.tokens[0])
    print(answer or "(no answer)")

    focus = focused_frames(answers.visual, evaluation.media_frames)
    count = len(clip.frames)
    tokens = int(answers.visual.count[0])
    if focus is None:
        print(f"{count} frames, {tokens} visual tokens; this model has no frames in focus")
        return
    scores = answers.visual.selection.frame_scores[0][:count]
    chosen = focus[0][:count].nonzero()[0]
    named = ", ".join(f"{i} ({clip.times[i]:.2f} s, score {scores[i]:.2f})" for i in chosen)
    print(f"in focus: frames {named} of {count}; {tokens} visual tokens")
    if _PICTURE.value:
        strip = Strip(clip.frames, clip.times, scores, focus[0][:count], question, answer)
        draw_focus(_PICTURE.value, [strip])


if __name__ == "__main__":
    run_command(main)
