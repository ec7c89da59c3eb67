"""Freezes and duplicates are found through coding noise, and small or slow motion is not one."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from tests.conftest import scene, write_video
from tests.operators.measuring import gray, measure, measure_luma, texture
from winnow.operators.errors import MeasureError
from winnow.operators.frozen import Frozen, largest_tile_difference


def moving(frames: int, seed: int = 1) -> np.ndarray:
    ground = texture(seed, 90, 160 + 3 * frames)
    return np.stack([ground[:, 3 * n : 3 * n + 160] for n in range(frames)])


def test_motion_is_no_freeze():
    assert measure_luma(Frozen(), moving(48)) == {
        "frozen_ratio": 0,
        "frozen_duplicate_ratio": 0,
        "frozen_longest_s": 0,
        "frozen_longest_start_s": 0,
        "frozen_tail_s": 0,
    }


@pytest.mark.parametrize("crf", ["18", "26", "31"])
@pytest.mark.parametrize(("width", "height"), [(320, 320), (640, 352)])
def test_a_still_is_frozen_however_it_is_encoded(tmp_path, crf, width, height):
    still = scene(3, 1, width, height)[0]
    path = write_video(tmp_path / "s.mp4", [still] * 49, options={"crf": crf, "g": "12"})
    columns = measure(path, Frozen())
    assert columns["frozen_ratio"] == 1
    assert columns["frozen_longest_s"] == pytest.approx(2.0)
    assert columns["frozen_tail_s"] == pytest.approx(2.0)


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_freezes_are_timed_across_chunks(chunk):
    """1 s of motion, 1.5 s frozen, 1 s of motion, 0.5 s frozen tail, at 24 frames a second."""
    luma = moving(72)
    luma[24:60] = luma[24]
    luma[-12:] = luma[-12]
    columns = measure_luma(Frozen(), luma[:72], chunk=chunk)
    assert columns["frozen_longest_s"] == pytest.approx(35 / 24)
    assert columns["frozen_longest_start_s"] == pytest.approx(1.0)
    assert columns["frozen_tail_s"] == pytest.approx(11 / 24)
    assert columns["frozen_ratio"] == pytest.approx((35 + 11) / 71)
    assert columns["frozen_duplicate_ratio"] == pytest.approx((35 + 11) / 71)


def test_a_frozen_tail_survives_encoding(tmp_path):
    images = scene(4, 48)
    images[24:] = [images[24]] * 24
    columns = measure(write_video(tmp_path / "t.mp4", images, 12), Frozen())
    assert columns["frozen_tail_s"] == pytest.approx(23 / 12, abs=1 / 12)
    assert columns["frozen_longest_start_s"] == pytest.approx(2.0, abs=1 / 12)
    assert columns["frozen_ratio"] == pytest.approx(23 / 47, abs=0.03)


@pytest.mark.parametrize("source_fps", [12, 8, 6])
def test_padding_to_a_higher_rate_is_duplicates_without_freeze(tmp_path, source_fps):
    repeat = 24 // source_fps
    images = [image for image in scene(5, 96 // repeat) for _ in range(repeat)]
    columns = measure(write_video(tmp_path / "p.mp4", images, 24), Frozen())
    assert columns["frozen_duplicate_ratio"] == pytest.approx(1 - 1 / repeat, abs=0.08)
    assert columns["frozen_longest_s"] < 0.25
    assert columns["frozen_ratio"] == 0


def test_a_small_thing_that_moves_is_seen(tmp_path):
    """A ball 12 pixels wide crosses a still scene of 640x360."""
    ground = gray(texture(6, 360, 640, smooth=6) // 2)
    images = []
    for n in range(48):
        image = ground.copy()
        cv2.circle(image, (60 + 8 * n, 180), 6, (240, 240, 240), -1)
        images.append(image)
    columns = measure(write_video(tmp_path / "b.mp4", images), Frozen())
    assert columns["frozen_ratio"] == 0
    assert columns["frozen_longest_s"] < 0.1


def test_slow_drift_does_not_add_up_to_a_freeze():
    """A fortieth of a small pixel a frame: no step shows, the sum does."""
    ground = texture(7, 90, 170).astype(np.float32)
    shifts = [np.float32([[1, 0, -n / 40], [0, 1, 0]]) for n in range(240)]
    luma = np.stack([cv2.warpAffine(ground, m, (160, 90)) for m in shifts]).astype(np.uint8)
    columns = measure_luma(Frozen(), luma)
    assert columns["frozen_duplicate_ratio"] > 0.5
    assert columns["frozen_longest_s"] < 0.5


def test_two_stills_are_two_freezes(tmp_path):
    """The second begins with a key frame, as encoders do at a cut."""
    one, other = scene(3, 40, 640, 352)[::39]
    path = write_video(tmp_path / "s.mp4", [one] * 24 + [other] * 24)
    columns = measure(path, Frozen())
    assert columns["frozen_longest_s"] == pytest.approx(23 / 24, abs=0.05)
    assert columns["frozen_duplicate_ratio"] == pytest.approx(46 / 47)


def test_tiles_are_judged_wherever_they_lie():
    still = np.zeros((90, 163), np.uint8)
    changed = still.copy()
    changed[86:90, 159:163] = 100
    assert largest_tile_difference(still, changed, 8) == pytest.approx(100 * 16 / 64)
    assert largest_tile_difference(still[:3, :3], still[:3, :3] + 9, 8) == 9


def test_one_frame_is_an_error():
    with pytest.raises(MeasureError):
        measure_luma(Frozen(), moving(1))


@pytest.mark.real
def test_only_the_pot_stands_still_among_generated_videos(real_videos):
    frozen = [
        path.stem
        for path in sorted((real_videos / "generated").rglob("*.mp4"))
        if measure(path, Frozen())["frozen_ratio"] > 0.25
    ]
    assert len(frozen) == 1
    assert frozen[0].startswith("A_large,_heavy_pot")
