"""Sharpness falls with blur, not with contrast or resolution; blockiness sees the grid."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from tests.conftest import scene, write_video
from tests.operators.measuring import gray, measure, texture
from winnow.operators.errors import MeasureError
from winnow.operators.frames import decode, full_range, luma_plane
from winnow.operators.operator import ClipView
from winnow.operators.sharpness import Sharpness, blockiness, detail_ratio

BLURRED = 0.13
"""What the default policy rejects below."""


def drawing(height: int) -> np.ndarray:
    """Rectangles and discs with hard edges, the same scene at any height."""
    random = np.random.default_rng(5)
    image = np.full((height, height * 16 // 18 * 2), 90, np.uint8)
    for _ in range(60):
        x, y = random.uniform(0, image.shape[1]), random.uniform(0, height)
        size, level = random.uniform(0.03, 0.12) * height, int(random.integers(20, 236))
        if random.random() < 0.5:
            cv2.circle(image, (int(x), int(y)), int(size), level, -1, cv2.LINE_AA)
        else:
            corner = (int(x + size), int(y + 2 * size))
            cv2.rectangle(image, (int(x), int(y)), corner, level, -1, cv2.LINE_AA)
    return image


def blurred(image: np.ndarray, share: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), share * image.shape[0])


@pytest.mark.parametrize("height", [240, 352, 480, 704, 1080])
def test_blur_of_one_percent_of_the_height_is_found_at_any_height(height):
    image = drawing(height)
    assert detail_ratio(image, 240) > 1.5 * BLURRED
    assert detail_ratio(blurred(image, 0.01), 240) < 0.8 * BLURRED
    assert detail_ratio(blurred(image, 0.03), 240) < 0.8 * BLURRED


def test_low_contrast_is_not_blur():
    image = drawing(480)
    pale = (110 + (image.astype(int) - 110) // 4).astype(np.uint8)
    assert detail_ratio(pale, 240) > 1.5 * BLURRED


def test_a_background_out_of_focus_is_not_blur():
    image = blurred(drawing(480), 0.02)
    image[150:330, 300:560] = drawing(480)[150:330, 300:560]
    assert detail_ratio(image, 240) > 1.5 * BLURRED


def test_a_flat_frame_has_no_detail():
    assert detail_ratio(np.full((480, 640), 77, np.uint8), 240) == 0


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 200), (64, 64), (241, 17)])
def test_frames_of_any_shape(size):
    image = np.random.default_rng(1).integers(0, 256, size).astype(np.uint8)
    assert np.isfinite(detail_ratio(image, 240))
    assert np.isfinite(blockiness(image))


def test_blockiness_sees_the_grid_and_only_the_grid():
    smooth = texture(2, 256, 256, smooth=12)
    blocks = cv2.resize(smooth, (32, 32), interpolation=cv2.INTER_AREA)
    mixed = (smooth.astype(int) + np.kron(blocks, np.ones((8, 8), int))) // 2
    assert blockiness(smooth) < 0.1
    assert blockiness(mixed.astype(np.uint8)) > 0.5
    assert blockiness(np.roll(mixed, (4, 4), (0, 1)).astype(np.uint8)) < 0.1


def test_columns_of_a_file(tmp_path):
    """Three of four seconds are sharp."""
    images = [gray(drawing(480))] * 18 + [gray(blurred(drawing(480), 0.02))] * 6
    columns = measure(write_video(tmp_path / "v.mp4", images, 6), Sharpness())
    assert columns["sharpness_min"] < BLURRED < columns["sharpness_mean"]


def test_coding_noise_does_not_hide_blur(tmp_path):
    for crf in ("18", "30"):
        images = [blurred(image, 0.012) for image in scene(6, 12, 640, 360)]
        path = write_video(tmp_path / f"{crf}.mp4", images, 12, options={"crf": crf})
        assert measure(path, Sharpness())["sharpness_mean"] < BLURRED


def test_no_sample_is_an_error():
    with pytest.raises(MeasureError):
        Sharpness().start(ClipView("clip", 0, 24, 64, 64, "h264")).columns()


@pytest.mark.real
def test_generated_videos_pass_and_their_blurred_frames_do_not(real_videos):
    for path in sorted((real_videos / "generated").rglob("*.mp4")):
        frame = next(f for n, f in enumerate(decode(path)) if n == 10)
        luma = full_range(luma_plane(frame), frame)
        assert detail_ratio(blurred(luma, 0.01), 240) < BLURRED * 0.9, path.stem
        assert measure(path, Sharpness())["sharpness_mean"] > BLURRED
