"""The strip is a small JPEG that shows the clip from start to end."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from tests.conftest import write_video
from tests.operators.measuring import measure
from winnow.operators.errors import MeasureError
from winnow.operators.operator import ClipView
from winnow.operators.thumbnail import Thumbnail


def strip(path) -> np.ndarray:
    jpeg = measure(path, Thumbnail())["thumbnail_jpeg"]
    assert len(jpeg) <= 15_000
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(jpeg, np.uint8), 1), cv2.COLOR_BGR2RGB)


def test_frames_of_all_parts_of_the_clip_in_their_colours(tmp_path):
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]
    images = [np.full((180, 320, 3), colour, np.uint8) for colour in colours for _ in range(12)]
    shown = strip(write_video(tmp_path / "v.mp4", images))
    assert shown.shape == (90, 640, 3)
    for n, colour in enumerate(colours):
        assert np.allclose(shown[45, 160 * n + 80], colour, atol=25)


@pytest.mark.parametrize(
    ("width", "height", "shape"),
    [(1280, 704, (90, 656)), (64, 64, (64, 256)), (1600, 64, (64, 768)), (90, 160, (90, 204))],
)
def test_noise_of_any_shape_stays_small(tmp_path, width, height, shape):
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (height, width, 3)).astype(np.uint8) for _ in range(4)]
    shown = strip(write_video(tmp_path / "v.mp4", images, options={"crf": "12"}))
    assert shown.shape[0] == 90
    assert shown.shape[1] == pytest.approx(shape[1], abs=400)


def test_a_clip_with_fewer_frames_gives_a_shorter_strip(tmp_path):
    images = [np.full((180, 320, 3), 99, np.uint8)] * 2
    assert strip(write_video(tmp_path / "v.mp4", images)).shape == (90, 320, 3)


def test_no_frame_is_an_error():
    with pytest.raises(MeasureError):
        Thumbnail().start(ClipView("clip", 0, 24, 64, 64, "h264")).columns()
