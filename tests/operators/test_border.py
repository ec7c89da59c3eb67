"""Borders are cropped to the pixel, dark scenes not at all."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from tests.conftest import scene, write_video
from tests.operators.measuring import gray, measure, texture
from winnow.operators.border import Border
from winnow.operators.errors import MeasureError
from winnow.operators.operator import ClipView

WIDTH, HEIGHT = 320, 180


def padded(images, left=0, right=0, top=0, bottom=0, level=0):
    return [
        cv2.copyMakeBorder(i, top, bottom, left, right, cv2.BORDER_CONSTANT, value=[level] * 3)
        for i in images
    ]


def border(tmp_path, images, fps=8, **how):
    return measure(write_video(tmp_path / "v.mp4", images, fps, **how), Border())


def box(columns):
    return tuple(columns[f"border_{name}"] for name in ("x", "y", "width", "height"))


@pytest.mark.parametrize(
    "sides",
    [
        {"top": 30, "bottom": 30},
        {"left": 60, "right": 60},
        {"left": 20, "right": 20, "top": 40, "bottom": 40},
        {"bottom": 44},
        {"right": 16},
    ],
)
@pytest.mark.parametrize("crf", ["18", "35"])
def test_the_picture_is_found(tmp_path, sides, crf):
    images = padded(scene(1, 24, WIDTH, HEIGHT), **sides)
    columns = border(tmp_path, images, options={"crf": crf})
    x, y, width, height = box(columns)
    left, top = sides.get("left", 0), sides.get("top", 0)
    assert columns["border_found"] is True
    # Even-aligned inward, and at most the lines that coding rings into are left as border.
    assert left - 2 <= x <= left + 1
    assert top - 2 <= y <= top + 1
    assert left + WIDTH - 1 <= x + width <= left + WIDTH + 2
    assert top + HEIGHT - 1 <= y + height <= top + HEIGHT + 2
    assert [value % 2 for value in (x, y, width, height)] == [0, 0, 0, 0]
    whole = images[0].shape[0] * images[0].shape[1]
    assert columns["border_share"] == pytest.approx(1 - width * height / whole)


def test_off_black_and_odd_borders(tmp_path):
    images = padded(scene(2, 24, 322, 182), top=31, bottom=29, level=14)
    columns = border(tmp_path, images, options={"crf": "18"})
    assert box(columns) in {(0, 32, 322, 180), (0, 30, 322, 184), (0, 32, 322, 182)}


def whole(columns, width=WIDTH, height=HEIGHT):
    return not columns["border_found"] and box(columns) == (0, 0, width, height)


def test_no_border_is_the_whole_frame(tmp_path):
    columns = border(tmp_path, scene(3, 16, WIDTH, HEIGHT))
    assert whole(columns)
    assert columns["border_share"] == 0


def night(kind: str, frames: int = 24) -> list[np.ndarray]:
    """Scenes with a lot of black at the edges of the frame, none of it a border."""
    images = []
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    ground = texture(4, HEIGHT, WIDTH).astype(np.float32)
    for n in range(frames):
        if kind == "spotlight":
            light = np.exp(-((x - 160 - 2 * n) ** 2 + (y - 90) ** 2) / 4000)
        elif kind == "sky":
            ridge = 60 + 12 * np.sin(x / 25 + 1) + 8 * np.sin(x / 7)
            light = (y > ridge) * 0.8
        elif kind == "dusk":
            light = np.clip((y - 40) / 100, 0, 1)
        else:
            light = np.full_like(x, 0.06)
        images.append(gray(np.clip(ground * light, 0, 255)))
    return images


@pytest.mark.parametrize("kind", ["spotlight", "sky", "dusk", "dark"])
def test_a_dark_scene_is_never_cropped(tmp_path, kind):
    assert whole(border(tmp_path, night(kind)))


def test_a_letterboxed_dark_scene_keeps_all_of_its_picture(tmp_path):
    columns = border(tmp_path, padded(night("sky"), top=40, bottom=40))
    _, y, _, height = box(columns)
    assert y <= 41
    assert y + height >= 40 + HEIGHT - 1


def test_black_frames_have_no_say(tmp_path):
    images = padded(scene(5, 48, WIDTH, HEIGHT), top=30, bottom=30)
    images[:24] = [np.zeros_like(images[0])] * 24
    assert border(tmp_path, images)["border_y"] == pytest.approx(30, abs=2)
    assert whole(border(tmp_path, [np.zeros_like(images[0])] * 16), WIDTH, HEIGHT + 60)


def test_a_picture_that_fills_the_frame_for_a_while_is_not_cropped(tmp_path):
    boxed = padded(scene(6, 24, WIDTH, HEIGHT - 60), top=30, bottom=30)
    assert whole(border(tmp_path, boxed + scene(7, 12, WIDTH, HEIGHT)))


def test_absurd_crops_are_refused(tmp_path):
    narrow = padded(scene(8, 16, 80, HEIGHT), left=120, right=120)
    assert whole(border(tmp_path, narrow))
    thin = padded(scene(9, 16, WIDTH, HEIGHT - 2), bottom=2)
    assert whole(border(tmp_path, thin))


def test_no_sample_is_an_error():
    with pytest.raises(MeasureError):
        Border().start(ClipView("clip", 0, 24, 64, 64, "h264")).columns()


@pytest.mark.real
def test_no_generated_video_has_a_border(real_videos):
    for path in sorted((real_videos / "generated").rglob("*.mp4")):
        assert not measure(path, Border())["border_found"], path.stem
