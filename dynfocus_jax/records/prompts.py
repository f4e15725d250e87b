"""Questions for data sets that have none, and the form of questions with options.

What is chosen depends on the record's id alone, so it is the same in every process and every run.
"""

import zlib
from collections.abc import Sequence

# The requests for a brief description of LLaVA (arXiv 2304.08485, appendix), which LLaMA-VID's preparation
# of WebVid puts to videos.
CAPTION_REQUESTS = (
    "Describe the {} concisely.",
    "Provide a brief description of the given {}.",
    "Offer a succinct explanation of the {} presented.",
    "Summarize the visual content of the {}.",
    "Give a short and clear explanation of the subsequent {}.",
    "Share a concise interpretation of the {} provided.",
    "Present a compact description of the {}'s key features.",
    "Relay a brief, clear account of the {} shown.",
    "Render a clear and concise summary of the {}.",
    "Write a terse but informative summary of the {}.",
    "Create a compact narrative representing the {} presented.",
)

# The answer formats of LLaVA 1.5 (arXiv 2310.03744, table 7), which LLaVA-665K has in its questions.
SHORT_ANSWER = "Answer the question using a single word or phrase."
ONE_LETTER = "Answer with the option's letter from the given choices directly."
SEVERAL_LETTERS = "Answer with the letters of all options that are right, or with None."

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def caption_request(medium: str, key: str) -> str:
    """One of the requests for a caption of an "image" or "video", by the checksum of a record's `key`."""
    return CAPTION_REQUESTS[_checksum(key) % len(CAPTION_REQUESTS)].format(medium)


def visual_at_end(key: str) -> bool:
    """Whether the visual tokens follow the question: for every other record (paper, 3.4: at random)."""
    return bool(_checksum(f"place of {key}") & 1)


def with_options(question: str, options: Sequence[str], form: str) -> str:
    """A question, its options a line each ("A. ..."), and the form of the answer, as LLaVA 1.5 puts them."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, form])


def _checksum(key: str) -> int:
    return zlib.crc32(key.encode())
