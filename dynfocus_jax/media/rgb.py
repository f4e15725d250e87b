"""Conversion of decoded frames to RGB images."""

from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, VideoReformatter

# H.273 matrix coefficients other than BT.601's. PyAV before 18 has no BT.2020; BT.709 is the closest.
_BT2020 = Colorspace.BT2020 if hasattr(Colorspace, "BT2020") else Colorspace.ITU709
_MATRICES = {1: Colorspace.ITU709, 4: Colorspace.FCC, 7: Colorspace.SMPTE240M, 9: _BT2020, 10: _BT2020}
_FULL_RANGE = 2

# By default libswscale starts a thread per core. PyAV before 17 has no argument for it.
_ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}


class RgbConverter:
    """Converts decoded frames to images as they are meant to be seen: uint8 [H, W, 3], RGB, upright.

    libswscale converts the colours with the matrix (BT.601, BT.709, FCC, SMPTE 240M, BT.2020) and the range
    of the frame's tags, and with BT.601 and limited range for a frame without tags. More than 8 bits are
    reduced to 8, without tone mapping. Pixels are taken as square, and fields are not deinterlaced.

    Use one converter for a whole file: its set-up costs more than converting a small frame.
    """

    def __init__(self):
        # One for each kind of frame: before PyAV 17 a reformatter keeps the matrix of its first frame.
        self._reformatters: dict[tuple, VideoReformatter] = {}

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        kind = (frame.format.name, frame.width, frame.height, frame.colorspace, frame.color_range)
        reformatter = self._reformatters.setdefault(kind, VideoReformatter())
        matrix = _MATRICES.get(int(frame.colorspace), Colorspace.ITU601)
        is_full = int(frame.color_range) == _FULL_RANGE or frame.format.name.startswith("yuvj")
        # PyAV before 17 ignores the source's matrix if it equals the destination's, which is unused for RGB.
        unused = Colorspace.FCC if matrix == Colorspace.ITU601 else Colorspace.ITU601
        rgb = reformatter.reformat(
            frame,
            format="rgb24",
            src_colorspace=matrix,
            dst_colorspace=unused,
            src_color_range="JPEG" if is_full else "MPEG",
            dst_color_range="JPEG",
            **_ONE_THREAD,
        )
        return _turn_upright(rgb.to_ndarray(), frame)


def _turn_upright(image: np.ndarray, frame: VideoFrame) -> np.ndarray:
    """Rotate and mirror an image as the frame's display matrix says."""
    if not getattr(frame, "rotation", True):  # PyAV 14 has no `rotation`
        return image
    # Reading its side data keeps a frame in memory until the garbage collector runs, so a small copy is used.
    small = frame.reformat(width=16, height=16, **_ONE_THREAD)
    try:
        matrix = small.side_data.get("DISPLAYMATRIX")
    except ValueError:  # the frame has side data of a kind that PyAV does not know
        return np.rot90(image, round(frame.rotation / 90))
    if matrix is None:
        return image
    (x_from_x, y_from_x), (x_from_y, y_from_y) = (
        np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2].tolist()
    )
    if abs(x_from_x) < abs(y_from_x):  # a quarter turn
        image, x_from_x, y_from_y = image.swapaxes(0, 1), x_from_y, y_from_x
    return image[:: -1 if y_from_y < 0 else 1, :: -1 if x_from_x < 0 else 1]
