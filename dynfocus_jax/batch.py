"""The batch: the one structure that passes from the data to the model."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """A batch of samples; without the leading axis B, one sample.

    Frames and text are padded on the right. A text-only sample has no true `frame_mask` entry, an image has
    one. A padding row (the end of an evaluation set, or a sample that could not be read) has index -1, no
    frame and a single pad token, so that no row of a batch is empty.
    """

    # Pixels, uint8 [B, T, H, W, 3], RGB; or in their place what the vision tower makes of them, in the dtype
    # of the model: [B, T, N, C], with a class token [B, T, 1 + N, C]
    frames: np.ndarray
    frame_mask: np.ndarray  # bool [B, T], True for frames that exist
    query_tokens: np.ndarray  # int32 [B, Lq], the human text alone, for the text encoder
    query_length: np.ndarray  # int32 [B]
    tokens: np.ndarray  # int32 [B, Lt], the chat text without visual tokens
    length: np.ndarray  # int32 [B]
    visual_position: np.ndarray  # int32 [B], number of text tokens before the visual tokens
    loss_mask: np.ndarray  # bool [B, Lt], True where the token itself is to be predicted
    oracle_frames: np.ndarray  # bool [B, T], frames known to matter; all False when unknown
    index: np.ndarray  # int32 [B], number of the record, -1 for a padding row
    subtitles: np.ndarray  # int32 [B, S], text tokens that stand behind the visual tokens of their frames
    subtitle_frames: np.ndarray  # int32 [B, S], frame of each, ascending; -1 for padding, on the right


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
    """A sample without content: T = num_frames, H = W = image_size, Lt = max_text, Lq = max_query,
    S = max_subtitle.

    blank: a frame without content, where features [(1 +) N, C] stand in place of pixels.
    """
    blank = np.zeros((image_size, image_size, 3), np.uint8) if blank is None else blank
    return Batch(
        frames=np.zeros((num_frames, *blank.shape), blank.dtype),
        frame_mask=np.zeros(num_frames, bool),
        query_tokens=np.full(max_query, pad_id, np.int32),
        query_length=np.int32(1),
        tokens=np.full(max_text, pad_id, np.int32),
        length=np.int32(1),
        visual_position=np.int32(0),
        loss_mask=np.zeros(max_text, bool),
        oracle_frames=np.zeros(num_frames, bool),
        index=np.int32(-1),
        subtitles=np.full(max_subtitle, pad_id, np.int32),
        subtitle_frames=np.full(max_subtitle, -1, np.int32),
    )
