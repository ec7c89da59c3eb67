"""Exposure reads the luma that was put in."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import write_video
from tests.operators.measuring import gray, measure, measure_luma, texture
from winnow.operators.errors import MeasureError
from winnow.operators.exposure import Exposure


def flat(*levels: int) -> np.ndarray:
    return np.stack([np.full((90, 160), level, np.uint8) for level in levels])


def test_black_and_white_shares():
    luma = flat(0, 0, 128, 255)
    luma[2, :45] = 10
    columns = measure_luma(Exposure(), luma)
    assert columns["exposure_black"] == pytest.approx(2.5 / 4)
    assert columns["exposure_black_frames"] == pytest.approx(0.5)
    assert columns["exposure_white"] == pytest.approx(0.25)
    assert columns["exposure_mean"] == pytest.approx((5 + 64 + 255) / 4 / 255)


def test_contrast_is_that_of_the_clip_not_of_one_frame():
    assert measure_luma(Exposure(), flat(*[100] * 8))["exposure_contrast"] == 0
    assert measure_luma(Exposure(), flat(*[100, 151] * 4))["exposure_contrast"] == 0.2


@pytest.mark.parametrize("chunk", [1, 2, 5, 32])
def test_flicker_ignores_fades_and_sees_every_second_frame(chunk):
    fade = flat(*range(40, 88))
    assert measure_luma(Exposure(), fade, chunk=chunk)["exposure_flicker"] == pytest.approx(0)
    flicker = flat(*[100, 110] * 24)
    columns = measure_luma(Exposure(), flicker, chunk=chunk)
    assert columns["exposure_flicker"] == pytest.approx(20 / 255)


def test_range_of_the_file_does_not_matter(tmp_path):
    images = [gray(texture(1, 180, 320))] * 5
    limited = measure(write_video(tmp_path / "a.mp4", images), Exposure())
    full = measure(write_video(tmp_path / "b.mkv", images, 24, "mjpeg", "yuvj420p"), Exposure())
    for name in ("exposure_mean", "exposure_contrast", "exposure_black"):
        assert limited[name] == pytest.approx(full[name], abs=0.02)


def test_black_video_is_black(tmp_path):
    path = write_video(tmp_path / "black.mp4", [gray(np.full((180, 320), 3))] * 10)
    columns = measure(path, Exposure())
    assert columns["exposure_black_frames"] == 1
    assert columns["exposure_mean"] < 0.02


def test_no_frames_is_an_error():
    with pytest.raises(MeasureError):
        measure_luma(Exposure(), np.zeros((0, 90, 160), np.uint8))
