"""Frames in and out."""

import numpy as np
import pytest

from effdet_jax.errors import UserError
from effdet_jax.inference.video import open_video, video_writer


def film(path, count=6, height=48, width=64, frame_rate=12.5):
    """Frames of one grey each, brighter by the frame."""
    with video_writer(path, frame_rate, height, width) as write:
        for number in range(count):
            write(np.full((height, width, 3), 40 * number, np.uint8))
    return path


@pytest.mark.parametrize(('height', 'width'), [(48, 64), (49, 65)])
def test_what_is_written_is_read(tmp_path, height, width):
    video = open_video(film(tmp_path / 'made' / 'film.mp4', height=height, width=width))
    assert (video.height, video.width, video.frame_rate, video.num_frames) == (48, 64, 12.5, 6)
    frames = list(video.frames())
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 6
    np.testing.assert_allclose([frame.mean() for frame in frames], 40 * np.arange(6), atol=3)


def test_colors_are_rgb(tmp_path):
    with video_writer(tmp_path / 'red.mp4', 25, 32, 32) as write:
        write(np.broadcast_to(np.array([220, 40, 40], np.uint8), (32, 32, 3)))
    (frame,) = open_video(tmp_path / 'red.mp4').frames()
    np.testing.assert_allclose(frame.mean(axis=(0, 1)), [220, 40, 40], atol=8)


@pytest.mark.parametrize('content', [b'', b'no video' * 100], ids=['empty', 'text'])
def test_what_is_no_video_is_named_and_nothing_else_is_printed(tmp_path, content, capfd):
    (tmp_path / 'film.mp4').write_bytes(content)
    with pytest.raises(UserError, match=r'film\.mp4: not a video that can be decoded'):
        open_video(tmp_path / 'film.mp4')
    assert capfd.readouterr() == ('', '')


def test_an_interrupted_film_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), video_writer(tmp_path / 'film.mp4', 25, 32, 32) as write:
        write(np.zeros((32, 32, 3), np.uint8))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
