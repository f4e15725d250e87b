"""Talk with a trained model about a video or an image, or with its language model alone.

    python -m dynfocus_jax.chat --checkpoint runs/toy --video clip.mp4
    python -m dynfocus_jax.chat --checkpoint runs/toy --video clip.mp4 --question "what shape is red ?"

With --question it answers that and ends; otherwise it reads questions from the terminal (or a pipe), a line
each, and answers while it writes. Lines that begin with / are commands:

    /focus FILE.png   draw the frames, their scores and which are in focus (the default is focus.png)
    /video FILE       go on with another video or image
    /reset            forget the conversation so far
    /quit             end; so does the end of the input
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from dynfocus_jax.command import run_command
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.prepare import make_media_reader
from dynfocus_jax.errors import MediaError, UserError
from dynfocus_jax.media.video import Clip
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.records.records import Record
from dynfocus_jax.serving.engine import Engine
from dynfocus_jax.serving.load import load_engine, load_run
from dynfocus_jax.serving.requests import Completion, Request, Visual
from dynfocus_jax.serving.token_sampling import SamplingParams, check_sampling
from dynfocus_jax.visualize.focus import Strip, draw_focus

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, or WORKDIR/checkpoints/STAGE/STEP.")
_VIDEO = flags.DEFINE_string("video", None, "Video or image file; left out: text only.")
_QUESTION = flags.DEFINE_string("question", None, "Answer this and end; left out: questions from the input.")
_PICTURE = flags.DEFINE_string("focus_picture", None, "With --question: draw the frames to this file.")
_FRAMES = flags.DEFINE_integer("num_frames", None, "Most frames of a video (config.generation.num_frames).")
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "Most tokens of an answer.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "0 is greedy (config.generation.temperature).")
_TOP_K = flags.DEFINE_integer("top_k", None, "Candidates for a token, 0 for all.")
_TOP_P = flags.DEFINE_float("top_p", None, "Probability that the candidates reach together.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn.")
_STOP = flags.DEFINE_multi_string("stop", [], "A string that ends an answer; may be given again.")


class Shown(NamedTuple):
    """The latest question, what was looked at for it, and the answer."""

    visual: Visual | None
    question: str
    answer: str


class Chat:
    """A conversation about at most one clip at a time.

    request: sampling, limits and stop strings of every answer; write: what shows text, as `print` does.
    """

    def __init__(self, engine: Engine, media: MediaReader, request: Request, write: Callable[..., None]):
        self._engine, self._media, self._request, self._write = engine, media, request, write
        self._messages: tuple[tuple[str, str], ...] = ()
        self._clip: Clip | None = None
        self._shown: Shown | None = None

    def open(self, path: Path) -> None:
        """Begin anew, about this file. Raises MediaError when it cannot be read."""
        record = Record("clip", path.expanduser(), ())
        self._clip = self._media.read(record, self._engine.num_frames, np.random.default_rng(0))
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self._messages, self._shown = (), None

    def ask(self, question: str) -> None:
        """Write the answer while it comes, and what it took.

        Raises:
          UserError: there is none; the conversation stays as it was.
        """
        tokenizer = self._engine.tokenizer
        unknown = [word for word in question.split() if tokenizer.encode(word) == [tokenizer.unk_id]]
        if unknown:
            self._write(f"note: the model does not know the words {', '.join(unknown)}")
        messages = (*self._messages, ("user", question))
        request = replace(self._request, messages=messages, clip=self._clip)
        written: list[str] = []

        def show(_id: str, text: str) -> None:
            written.append(text)
            self._write(text, end="", flush=True)

        with _compilations() as compiled:
            completion = self._engine.generate([request], on_token=show)[0]
        if completion.error is not None:
            raise UserError(completion.error)
        self._write("" if written else "(no answer)")
        visual = None if self._clip is None else self._engine.look(self._clip, self._engine.query(messages))
        self._messages = (*messages, ("assistant", completion.text))
        self._shown = Shown(visual, question, completion.text)
        self._write(_summary(self._engine, completion, visual, self._clip, bool(compiled)))

    def draw(self, path: Path) -> None:
        """Draw what the latest answer was made from.

        Raises:
          UserError: nothing was asked yet, there is no clip, the model has no focus, or it cannot be written.
        """
        if self._shown is None or self._clip is None:
            raise UserError("nothing to draw: ask a question about a video first.")
        visual, question, answer = self._shown
        if visual.focus is None:
            raise UserError("nothing to draw: this model's connector chooses no frames.")
        strip = Strip(self._clip.frames, self._clip.times, visual.scores, visual.focus, question, answer)
        try:
            draw_focus(path.expanduser(), [strip])
        except (OSError, ValueError) as error:
            raise UserError(f"the picture cannot be written to {path} ({error}).") from None
        self._write(f"drawn to {path}")

    def command(self, line: str) -> bool:
        """Does what a line of input says; False when it ends the conversation."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        try:
            if name == "/quit":
                return False
            if name == "/focus":
                self.draw(Path(argument or "focus.png"))
            elif name == "/reset":
                self.reset()
            elif name == "/video" and argument:
                self.open(Path(argument))
            elif name.startswith("/"):
                raise UserError(
                    f"{line} is not a command; the commands are /focus, /video FILE, /reset and /quit."
                )
            elif line:
                self.ask(line)
        except (MediaError, UserError) as error:
            self._write(f"error: {error}")
        return True


@contextmanager
def _compilations() -> Iterator[list[str]]:
    """The programs that are compiled meanwhile, as JAX's events."""
    events: list[str] = []

    def listen(event: str, _seconds: float, **_about) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _summary(
    engine: Engine, completion: Completion, visual: Visual | None, clip: Clip | None, compiled: bool
) -> str:
    """Return the line below an answer: frames and tokens that were used, and the speed."""
    rate = completion.tokens_per_second
    speed = f"first token after {completion.seconds_to_first_token:.2f} s"
    speed += "" if rate is None else f", {rate:.1f} tokens/s"
    speed += ", compiling included" if compiled else ""
    text = f"{completion.prompt_tokens} text tokens"
    if visual is None:
        return f"[{text}; {speed}]"
    return f"[{_frames_used(visual, clip)}; {visual.count} visual and {text}; {speed}]"


def _frames_used(visual: Visual, clip: Clip) -> str:
    """Frames, and tokens of each kind of them."""
    frames = f"{visual.frames} frame{'' if visual.frames == 1 else 's'}"
    if visual.focus is None:
        return f"{frames} of {visual.count // visual.frames} tokens"
    chosen = visual.focus.nonzero()[0]
    of_chosen, of_others = (
        visual.frame_tokens[mask].max(initial=0) for mask in (visual.focus, ~visual.focus)
    )
    named = ", ".join(f"{i} ({clip.times[i]:.2f} s, score {visual.scores[i]:.2f})" for i in chosen)
    others = visual.frames - len(chosen)
    counts = f"{len(chosen)} in focus with {of_chosen} tokens, {others} others with {of_others}"
    return f"{frames}: {counts}; in focus: {named or 'none'}"


def main() -> None:
    if _CHECKPOINT.value is None:
        raise UserError("--checkpoint is missing; name the workdir of a training run.")
    if _QUESTION.value is not None and not _QUESTION.value.strip():
        raise UserError("--question is empty; leave it out to be asked, or ask something.")

    # --- Model ----------------------------------------------------------------------------------------
    run = load_run(Path(_CHECKPOINT.value))
    generation = run.config.generation
    if _FRAMES.value is not None:
        generation.num_frames = _FRAMES.value
        generation.frames = ()
    sampling = SamplingParams(
        generation.temperature if _TEMPERATURE.value is None else _TEMPERATURE.value,
        generation.top_k if _TOP_K.value is None else _TOP_K.value,
        generation.top_p if _TOP_P.value is None else _TOP_P.value,
        _SEED.value,
    )
    check_sampling(sampling, "flags")
    for flag in (_FRAMES, _NEW_TOKENS):
        if flag.value is not None and flag.value < 1:
            raise UserError(f"--{flag.name} is {flag.value}, expected at least 1.")
    media = make_media_reader(run.config)
    video = None if _VIDEO.value is None else Path(_VIDEO.value).expanduser()
    if video is not None and not video.is_file():
        raise UserError(f"--video {video}: no such file, check the path.")
    engine = load_engine(run, make_mesh(mesh_shape({"data": -1}, jax.device_count())))
    request = Request(
        "chat", (), sampling=sampling, max_new_tokens=_NEW_TOKENS.value, stop=tuple(_STOP.value)
    )

    # --- Conversation ---------------------------------------------------------------------------------
    chat = Chat(engine, media, request, print)
    if video is not None:
        try:
            chat.open(video)
        except MediaError as error:
            raise UserError(str(error)) from None
    if _QUESTION.value is not None:
        chat.ask(_QUESTION.value.strip())
        if _PICTURE.value is not None:
            chat.draw(Path(_PICTURE.value))
        return
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            if not chat.command(input(prompt).strip()):
                return
        except EOFError:
            return
        except KeyboardInterrupt:  # stops an answer
            if not prompt:
                raise
            print("\n(interrupted; /quit ends)")


if __name__ == "__main__":
    run_command(main)
