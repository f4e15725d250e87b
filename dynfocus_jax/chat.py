"""Chat with a trained model, with or without a video or image.

    python -m dynfocus_jax.chat --checkpoint runs/toy --video clip.mp4
    python -m dynfocus_jax.chat --checkpoint runs/toy --video clip.mp4 --question "what shape is red ?"

With --question, the command answers that question and exits. Otherwise it reads questions from the terminal
(or a pipe), one per line, and streams the answers. Lines that start with / are commands:

    /focus FILE.png   draw the frames, their scores and which are in focus (default: focus.png)
    /video FILE       start a new conversation about another video or image
    /reset            clear the conversation
    /quit             exit; the end of the input also exits
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
from dynfocus_jax.serving.requests import Completion, EncodedClip, Request
from dynfocus_jax.serving.token_sampling import SamplingParams, check_sampling
from dynfocus_jax.visualize.focus import FocusStrip, draw_focus

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Workdir of a training run, or WORKDIR/checkpoints/STAGE/STEP."
)
_VIDEO = flags.DEFINE_string("video", None, "Video or image file to talk about.")
_QUESTION = flags.DEFINE_string("question", None, "Answer this question and exit.")
_PICTURE = flags.DEFINE_string("focus_picture", None, "With --question: file to draw the frames to.")
_FRAMES = flags.DEFINE_integer(
    "num_frames", None, "Number of frames sampled from a video (default: config.generation.num_frames)."
)
_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    None,
    "Maximum number of tokens in an answer (default: config.generation.max_new_tokens).",
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "Sampling temperature; 0 decodes greedily (default: config.generation.temperature)."
)
_TOP_K = flags.DEFINE_integer(
    "top_k",
    None,
    "Sample from the k most likely tokens; 0: from all tokens (default: config.generation.top_k).",
)
_TOP_P = flags.DEFINE_float(
    "top_p",
    None,
    "Sample from the most likely tokens that together have probability p (default: config.generation.top_p).",
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed for sampling.")
_STOP = flags.DEFINE_multi_string("stop", [], "String that ends an answer.")


class Exchange(NamedTuple):
    """A question, the clip that was encoded for it (None without a video), and the answer."""

    encoded: EncodedClip | None
    question: str
    answer: str


class Chat:
    """A conversation about one clip at a time, or without one.

    Args:
      engine: answers the questions.
      media: reads video and image files.
      request: sampling settings, limits and stop strings of every answer.
      write: writes text, with the arguments of `print`.
    """

    def __init__(self, engine: Engine, media: MediaReader, request: Request, write: Callable[..., None]):
        self._engine, self._media, self._request, self._write = engine, media, request, write
        self._messages: tuple[tuple[str, str], ...] = ()
        self._clip: Clip | None = None
        self._latest: Exchange | None = None

    def open(self, path: Path) -> None:
        """Start a new conversation about a file; raise MediaError if the file cannot be read."""
        record = Record("clip", path.expanduser(), ())
        self._clip = self._media.read(record, self._engine.num_frames, np.random.default_rng(0))
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self._messages, self._latest = (), None

    def ask(self, question: str) -> None:
        """Stream the answer to a question, then write the tokens and the time that it took.

        Raises:
          UserError: the question cannot be answered; the conversation stays as it was.
        """
        self._warn_of_unknown_words(question)
        messages = (*self._messages, ("user", question))
        request = replace(self._request, messages=messages, clip=self._clip)
        written: list[str] = []

        def stream(_id: str, text: str) -> None:
            written.append(text)
            self._write(text, end="", flush=True)

        with _compilations() as compiled:
            completion = self._engine.generate([request], on_token=stream)[0]
        if completion.error is not None:
            raise UserError(completion.error)
        self._write("" if written else "(no answer)")
        encoded = None
        if self._clip is not None:
            encoded = self._engine.encode_clip(self._clip, self._engine.query(messages))
        self._messages = (*messages, ("assistant", completion.text))
        self._latest = Exchange(encoded, question, completion.text)
        self._write(_summary(completion, encoded, self._clip, compiled=bool(compiled)))

    def _warn_of_unknown_words(self, question: str) -> None:
        tokenizer = self._engine.tokenizer
        if tokenizer.unk_id is None:
            return
        unknown = [word for word in question.split() if tokenizer.encode(word) == [tokenizer.unk_id]]
        if unknown:
            self._write(f"note: words that the model does not know: {', '.join(unknown)}")

    def draw(self, path: Path) -> None:
        """Draw the frames that the latest answer is based on.

        Raises:
          UserError: nothing has been asked about a clip yet, the connector chooses no frames, or the file
            cannot be written.
        """
        if self._latest is None or self._clip is None or self._latest.encoded is None:
            raise UserError("nothing to draw: ask a question about a video first.")
        focus = self._latest.encoded.focus
        if focus is None:
            raise UserError("nothing to draw: this model's connector does not select frames.")
        strip = FocusStrip(
            self._clip.frames,
            self._clip.times,
            np.asarray(focus.scores),
            np.asarray(focus.chosen),
            self._latest.question,
            self._latest.answer,
        )
        try:
            draw_focus(path.expanduser(), [strip])
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot write the picture to {path} ({error}); use an existing folder and a name that ends "
                "in .png or .pdf."
            ) from None
        self._write(f"wrote {path}")

    def handle(self, line: str) -> bool:
        """Execute a command or answer a question; return False if the line ends the conversation."""
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
                raise UserError(f"{line} is not a command; use /focus [FILE], /video FILE, /reset or /quit.")
            elif line:
                self.ask(line)
        except (MediaError, UserError) as error:
            self._write(f"error: {error}")
        return True


@contextmanager
def _compilations() -> Iterator[list[str]]:
    """Collect JAX's events of programs that are compiled inside the context."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **metadata: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _summary(
    completion: Completion, encoded: EncodedClip | None, clip: Clip | None, *, compiled: bool
) -> str:
    """Return the line below an answer: frames and tokens of the prompt, and the speed."""
    rate = completion.tokens_per_second
    speed = f"first token after {completion.seconds_to_first_token:.2f} s"
    speed += "" if rate is None else f", {rate:.1f} tokens/s"
    speed += ", including compilation" if compiled else ""
    text = f"{completion.prompt_tokens} text tokens"
    if encoded is None or clip is None:
        return f"[{text}; {speed}]"
    return f"[{_frame_summary(encoded, clip)}; {encoded.count} visual and {text}; {speed}]"


def _frame_summary(encoded: EncodedClip, clip: Clip) -> str:
    """Return the number of frames and the tokens spent on them, and name the frames in focus."""
    frames = f"{encoded.frames} frame{'' if encoded.frames == 1 else 's'}"
    focus = encoded.focus
    if focus is None:
        return f"{frames} of {encoded.count // encoded.frames} tokens"
    chosen = focus.chosen.nonzero()[0]
    tokens, other_tokens = (focus.tokens[mask].max(initial=0) for mask in (focus.chosen, ~focus.chosen))
    named = ", ".join(f"{i} ({clip.times[i]:.2f} s, score {focus.scores[i]:.2f})" for i in chosen)
    others = encoded.frames - len(chosen)
    counts = f"{len(chosen)} in focus with {tokens} tokens, {others} others with {other_tokens}"
    return f"{frames}: {counts}; in focus: {named or 'none'}"


def main() -> None:
    if _CHECKPOINT.value is None:
        raise UserError("--checkpoint is missing; set it to the workdir of a training run.")
    if _QUESTION.value is not None and not _QUESTION.value.strip():
        raise UserError("--question is empty; set it to a question, or remove it to chat interactively.")

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
        raise UserError(f"--video {video} does not exist; check the path.")
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
            if not chat.handle(input(prompt).strip()):
                return
        except EOFError:
            return
        except KeyboardInterrupt:  # ends an answer, not the conversation
            if not prompt:
                raise
            print("\n(interrupted; /quit exits)")


if __name__ == "__main__":
    run_command(main)
