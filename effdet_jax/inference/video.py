"""Reads and writes videos frame by frame with OpenCV, which drops the sound."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from effdet_jax.errors import UserError
from effdet_jax.records.files import replacing

DEFAULT_FRAME_RATE = 25.0  # if the file has none

# Silences OpenCV and FFmpeg: we report a bad file in one line.
os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


@dataclasses.dataclass(frozen=True)
class Video:
    """A readable video file. `num_frames` comes from its header, is often an estimate and may be 0."""

    path: Path
    height: int
    width: int
    frame_rate: float  # per second
    num_frames: int

    def frames(self) -> Iterator[UInt8[np.ndarray, 'H W 3']]:
        """Yields upright RGB frames, up to the first that cannot be decoded."""
        capture = cv2.VideoCapture(str(self.path), cv2.CAP_FFMPEG)
        try:
            while (read := capture.read())[0]:
                yield cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)
        finally:
            capture.release()


def open_video(path: Path) -> Video:
    """Opens a video file.

    Raises:
      UserError: if its first frame cannot be decoded.
    """
    if not path.is_file():  # OpenCV would wait for the writer of a pipe
        raise UserError(f'{path}: not a regular file: check the path')
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    readable, frame = capture.read()
    frame_rate, num_frames = capture.get(cv2.CAP_PROP_FPS), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    capture.release()
    if not readable:
        raise UserError(f'{path}: not a video that can be decoded: replace or remove the file')
    height, width, _ = frame.shape
    known = 0 < frame_rate <= 1000
    return Video(path, height, width, frame_rate if known else DEFAULT_FRAME_RATE, max(num_frames, 0))


@contextlib.contextmanager
def video_writer(
    path: Path, frame_rate: float, height: int, width: int
) -> Iterator[Callable[[UInt8[np.ndarray, 'H W 3']], None]]:
    """`with video_writer(...) as write: write(rgb_frame)` writes an MP4 file (MPEG-4 part 2), atomically.

    With an odd height or width the last row or column is lost, because the format stores colour in 2x2 blocks.

    Raises:
      UserError: if OpenCV cannot write the file.
    """

    def write(rgb: np.ndarray) -> None:
        writer.write(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))

    with replacing(path) as temporary:
        writer = cv2.VideoWriter(
            str(temporary), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*'mp4v'), frame_rate, (width, height)
        )
        if not writer.isOpened():
            raise UserError(
                f'{path}: OpenCV cannot write a video of {width}x{height} pixels there: choose another --out'
            )
        try:
            yield write
        finally:
            writer.release()
