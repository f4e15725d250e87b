"""Decoded frames as RGB pictures."""

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter

# H.273's matrices other than BT.601's. PyAV before 18 has no name for BT.2020's; BT.709's is the nearest.
_BT2020 = "BT2020" if hasattr(Colorspace, "BT2020") else "ITU709"
_MATRICES = {1: "ITU709", 4: "FCC", 7: "SMPTE240M", 9: _BT2020, 10: _BT2020}
_FULL_RANGE = 2

# libswscale's own threads, of which there are as many as cores, can be turned off since they exist in PyAV.
_ONE_THREAD = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}


class ToRgb:
    """Turns decoded frames into pictures as they are to be seen: uint8 [H, W, 3], RGB, upright.

    Colours are converted by libswscale with the matrix (BT.601, BT.709, FCC, SMPTE 240M, BT.2020) and the
    range that the frame names; where it names none with libswscale's own, BT.601 and limited. More than 8
    bits become 8; tones are not mapped. Pixels count as squares, and fields are not taken apart.

    To be kept for a whole file: setting it up costs more than a small frame.
    """

    def __init__(self):
        # One for each kind of frame: before PyAV 17 they go on using the first kind's matrix.
        self._reformatters: dict[tuple, VideoReformatter] = {}

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        kind = (frame.format.name, frame.width, frame.height, frame.colorspace, frame.color_range)
        reformatter = self._reformatters.setdefault(kind, VideoReformatter())
        matrix = _MATRICES.get(int(frame.colorspace), "ITU601")
        is_full = int(frame.color_range) == _FULL_RANGE or frame.format.name.startswith("yuvj")
        rgb = reformatter.reformat(
            frame,
            format="rgb24",
            src_colorspace=matrix,
            dst_colorspace="FCC" if matrix == "ITU601" else "ITU601",  # before 17 ignored when both are equal
            src_color_range="JPEG" if is_full else "MPEG",
            dst_color_range="JPEG",
            **_ONE_THREAD,
        )
        return _upright(rgb.to_ndarray(), frame)


def _upright(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Rotate and mirror an image as the frame's display matrix asks for."""
    if not getattr(frame, "rotation", True):  # PyAV 14 does not say
        return image
    # Asked for its side data, a frame stays in memory until the garbage collector comes: a small one may.
    small = frame.reformat(width=16, height=16, **_ONE_THREAD)
    try:
        matrix = small.side_data.get("DISPLAYMATRIX")
    except ValueError:  # there is side data of a kind that PyAV does not know
        return np.rot90(image, round(frame.rotation / 90))
    if matrix is None:
        return image
    (across, turned_down), (turned_across, down) = (
        np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2].tolist()
    )
    if abs(across) < abs(turned_down):  # a quarter turn
        image, across, down = image.swapaxes(0, 1), turned_across, turned_down
    return image[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
