"""The text of an answer while its tokens arrive: which text is final, and where a stop string ends it."""

from collections.abc import Callable, Iterable, Sequence


class AnswerText:
    """Converts the tokens of an answer to text as they arrive.

    Pieces of text are streamed as soon as no further token can change them. Held back are the bytes of an
    incomplete character, white space at the end, and text that may become a stop string. The pieces
    concatenate to the text of the answer.

    Args:
      decode: converts ids to text without white space around it, as the tokenizers' `decode`.
      stop: strings that end the answer; the text ends before the first of them.
      on_text: called with each new piece of text.
    """

    def __init__(
        self,
        decode: Callable[[Iterable[int]], str],
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ):
        self._decode, self._stop, self._on_text = decode, tuple(stop), on_text
        self._streamed = ""
        self.tokens: list[int] = []
        self.stopped = False  # True once the text has a stop string

    def add(self, token: int) -> None:
        """Append a token, stream the text that it makes final, and update `stopped`."""
        self.tokens.append(token)
        if self._stop or self._on_text:  # otherwise the text is only needed at the end
            text = self._decode(self.tokens)
            self.stopped = self._stop_position(text) is not None
            if not self.stopped:
                self._stream(_final_prefix(text, self._stop))

    def finish(self) -> str:
        """Return the whole text, after the last token, and stream what is left of it."""
        text = self._decode(self.tokens)
        text = text[: self._stop_position(text)].rstrip()
        self._stream(text)
        return text

    def _stop_position(self, text: str) -> int | None:
        """Return the position of the first stop string in a text, None if it has none."""
        positions = [position for position in map(text.find, self._stop) if position >= 0]
        return min(positions, default=None)

    def _stream(self, text: str) -> None:
        """Pass on the part of a text that has not been streamed yet."""
        if self._on_text and len(text) > len(self._streamed) and text.startswith(self._streamed):
            self._on_text(text[len(self._streamed) :])
            self._streamed = text


def _final_prefix(text: str, stop: Sequence[str]) -> str:
    """Return the beginning of a text that further tokens cannot change."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # an incomplete character
    partial_stops = (n for each in stop for n in range(1, len(each)) if text.endswith(each[:n]))
    return text[: len(text) - max(partial_stops, default=0)].rstrip()
