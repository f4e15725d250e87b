"""The text of an answer while its tokens arrive: pieces that stay, and where a stop string ends it."""

from collections.abc import Callable, Iterable, Sequence


class AnswerText:
    """Tokens in, text out.

    decode: ids to text without white space around it, as the tokenizers have it.
    stop: strings that end the answer; the text is what stands before the first of them.
    on_text: called with each new piece of text. What may still change is held back: the bytes of an
      unfinished character, white space at the end, and what may become a stop string. The pieces together
      are the text.
    """

    def __init__(
        self,
        decode: Callable[[Iterable[int]], str],
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ):
        self._decode, self._stop, self._on_text = decode, tuple(stop), on_text
        self._sent = ""
        self.tokens: list[int] = []
        self.stopped = False

    def add(self, token: int) -> None:
        """The next token; `stopped` is True then when a stop string is complete."""
        self.tokens.append(token)
        if self._stop or self._on_text:  # nobody else needs the text now
            text = self._decode(self.tokens)
            self.stopped = self._cut(text) is not None
            if not self.stopped:
                self._send(_settled(text, self._stop))

    def finish(self) -> str:
        """The whole text, after its last token."""
        text = self._decode(self.tokens)
        cut = self._cut(text)
        text = (text if cut is None else text[:cut]).rstrip()
        self._send(text)
        return text

    def _cut(self, text: str) -> int | None:
        found = [at for at in map(text.find, self._stop) if at >= 0]
        return min(found, default=None)

    def _send(self, text: str) -> None:
        if self._on_text and len(text) > len(self._sent) and text.startswith(self._sent):
            self._on_text(text[len(self._sent) :])
            self._sent = text


def _settled(text: str, stop: Sequence[str]) -> str:
    """The beginning of a text that further tokens leave as it is."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # what is not yet a whole character
    held = (n for each in stop for n in range(1, len(each)) if text.endswith(each[:n]))
    return text[: len(text) - max(held, default=0)].rstrip()
