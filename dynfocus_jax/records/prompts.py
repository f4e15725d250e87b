"""Questions for data sets without questions, and the form of questions with options.

Choices depend only on the record's id, so they are the same in every process and every run.
"""

import zlib
from collections.abc import Sequence

# LLaVA's requests for a brief description (arXiv 2304.08485, appendix), which LLaMA-VID uses for WebVid.
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

# Answer formats of LLaVA 1.5 (arXiv 2310.03744, table 7), which LLaVA-665K has in its questions.
SHORT_ANSWER = "Answer the question using a single word or phrase."
ONE_LETTER = "Answer with the option's letter from the given choices directly."
SEVERAL_LETTERS = "Answer with the letters of all options that are right, or with None."

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def caption_request(medium: str, key: str) -> str:
    """Return one of the requests for a caption of an "image" or "video", chosen by the checksum of `key`."""
    return CAPTION_REQUESTS[_checksum(key) % len(CAPTION_REQUESTS)].format(medium)


def visual_at_end(key: str) -> bool:
    """Return whether the visual tokens follow the question: for half of all keys (paper, 3.4: at random)."""
    return bool(_checksum(f"place of {key}") & 1)


def with_options(question: str, options: Sequence[str], answer_format: str) -> str:
    """Return a multiple-choice question in the form of LLaVA 1.5.

    Args:
      question: the question.
      options: at most 26, each on a line of its own ("A. ...").
      answer_format: the last line, such as `ONE_LETTER`.
    """
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, answer_format])


def _checksum(key: str) -> int:
    return zlib.crc32(key.encode())
