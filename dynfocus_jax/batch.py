"""The batch: the structure that passes from the data to the model."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8

if TYPE_CHECKING:  # pyright knows no union within jaxtyping's annotations
    Array = jax.Array
else:
    Array = jax.Array | np.ndarray


class Batch(NamedTuple):
    """A batch of samples; without the leading axis B, one sample.

    Frames and text are padded on the right. A text-only sample has no true `frame_mask` entry, an image has
    one. A padding row (the end of an evaluation set, or a sample that could not be read) has index -1, no
    frames and a single padding token, so that no row of a batch is empty.
    """

    # RGB pixels, or the vision tower's features in their place (N: the class token, if any, and the patches)
    frames: UInt8[Array, "B T H W 3"] | Float[Array, "B T N C"]
    frame_mask: Bool[Array, "B T"]  # True for frames that exist
    query_tokens: Int32[Array, "B Lq"]  # the human text alone, for the text encoder
    query_length: Int32[Array, " B"]
    tokens: Int32[Array, "B Lt"]  # the chat text without visual tokens
    length: Int32[Array, " B"]
    visual_position: Int32[Array, " B"]  # text tokens before the visual tokens
    loss_mask: Bool[Array, "B Lt"]  # True where the token itself is predicted
    oracle_frames: Bool[Array, "B T"]  # frames known to matter; all False if unknown
    index: Int32[Array, " B"]  # number of the record, -1 for a padding row
    subtitles: Int32[Array, "B S"]  # text tokens that follow the visual tokens of their frames
    subtitle_frames: Int32[Array, "B S"]  # frame of each, ascending; -1 for padding, on the right


def padding_sample(
    num_frames: int,
    image_size: int,
    max_text: int,
    max_query: int,
    pad_id: int = 0,
    *,
    max_subtitle: int = 0,
    blank: np.ndarray | None = None,
) -> Batch:
    """Return a sample without content.

    T = num_frames, H = W = image_size, Lt = max_text, Lq = max_query, S = max_subtitle.
    blank: an empty frame `[N, C]`, for features in place of pixels.
    """
    blank = np.zeros((image_size, image_size, 3), np.uint8) if blank is None else blank
    fields: dict[str, Any] = {
        "frames": np.zeros((num_frames, *blank.shape), blank.dtype),
        "frame_mask": np.zeros(num_frames, bool),
        "query_tokens": np.full(max_query, pad_id, np.int32),
        "query_length": np.int32(1),
        "tokens": np.full(max_text, pad_id, np.int32),
        "length": np.int32(1),
        "visual_position": np.int32(0),
        "loss_mask": np.zeros(max_text, bool),
        "oracle_frames": np.zeros(num_frames, bool),
        "index": np.int32(-1),
        "subtitles": np.full(max_subtitle, pad_id, np.int32),
        "subtitle_frames": np.full(max_subtitle, -1, np.int32),
    }
    return Batch(**fields)
