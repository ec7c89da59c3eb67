"""Overlay text against clips in which it was burned, encoded as H.264 at CRF 23."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.conftest import write_video
from tests.operators import measuring
from winnow.operators.errors import MeasureError
from winnow.operators.operator import ClipView, FrameChunk, Sample
from winnow.operators.text import HEIGHT, Text, detector
from winnow.operators.text_gate import Box, Searched, candidates, gradient, steady, windows
from winnow.operators.text_tracks import presence, union_share

FPS, FRAMES, WIDTH = 12, 48, 640
Painter = Callable[[np.ndarray, int], None]


def nothing(image: np.ndarray, number: int) -> None:
    """No text."""


def write(
    target: Path, paint: Painter = nothing, *, speed: int = 5, frames: int = FRAMES,
    size: tuple[int, int] = (WIDTH, 360),
) -> Path:  # fmt: skip
    """Textured ground that pans by `speed` pixels a frame, and what is painted over it."""
    width, height = size
    ground = measuring.gray(measuring.texture(3, height, width, smooth=6.0) // 2 + 50)
    images = []
    for number in range(frames):
        image = np.roll(ground, -speed * number, axis=1)
        if speed:
            cv2.circle(image, (9 * number, height // 2), height // 8, (200, 60, 60), -1)
        paint(image, number)
        images.append(image)
    return write_video(target, images, FPS, options={"crf": "23", "preset": "veryfast"})


def line(words: str, x: int, y: int, scale: float = 0.9, opacity: float = 1.0, since: int = 0,
         until: int = FRAMES, outline: bool = True) -> Painter:  # fmt: skip
    """White text with its baseline starting at (x, y), in frames [since, until)."""

    def paint(image: np.ndarray, number: int) -> None:
        if since <= number < until:
            over = image.copy()
            at, font = (x, y), cv2.FONT_HERSHEY_SIMPLEX
            if outline:
                cv2.putText(over, words, at, font, scale, (0, 0, 0), 6, cv2.LINE_AA)
            cv2.putText(over, words, at, font, scale, (255, 255, 255), 2, cv2.LINE_AA)
            image[:] = cv2.addWeighted(over, opacity, image, 1 - opacity, 0)

    return paint


def measure(path: Path) -> dict[str, Any]:
    return measuring.measure(path, Text())


def look_at(images: list[np.ndarray], frames: int | None = None, chunk: int = 1) -> dict[str, Any]:
    """Measure luma pictures as if they were sampled at 2 frames a second, some at a time."""
    operator = Text()
    (sampling,) = operator.needs.samples
    height, width = images[0].shape
    frames = frames or 4 * len(images)
    measurement = operator.start(ClipView("clip", frames, 8.0, width, height, "h264"))
    for first in range(0, len(images), chunk):
        samples = [Sample(k * 4, k / 2, image) for k, image in enumerate(images)]
        taken = {sampling: samples[first : first + chunk]}
        measurement.update(FrameChunk(first * 4, np.ones(1), np.ones(1, np.int8), samples=taken))
    return measurement.columns()


def overlay_text(columns: dict[str, Any]) -> bool:
    """The rule `overlay_text` of the default policy."""
    return columns["text_line_s"] >= 1.0


def watermark(columns: dict[str, Any]) -> bool:
    """The rule `watermark` of the default policy."""
    return columns["text_corner_share"] >= 0.6


@pytest.mark.parametrize("speed", [5, 0], ids=["moving", "still"])
def test_a_subtitle_is_found_and_timed(tmp_path: Path, speed: int) -> None:
    path = write(tmp_path / "v.mp4", line("We leave before sunrise", 140, 335), speed=speed)
    columns = measure(path)
    assert overlay_text(columns)
    assert not watermark(columns)
    assert columns["text_line_s"] == pytest.approx(4.0, abs=0.5)
    assert columns["text_frame_share"] == 1.0
    # The words are 360 by 27 pixels of 640 by 360; the detector's box is a little larger.
    assert 0.03 < columns["text_overlay_area_share"] < 0.1


def test_a_lower_third_of_two_seconds_is_timed(tmp_path: Path) -> None:
    caption = line("Dr. Maria Jensen", 40, 320, since=12, until=36)
    columns = measure(write(tmp_path / "v.mp4", caption))
    assert overlay_text(columns)
    assert columns["text_line_s"] == pytest.approx(2.0, abs=0.5)
    assert columns["text_frame_share"] == pytest.approx(0.5, abs=0.13)


def test_changing_subtitles_are_separate_texts(tmp_path: Path) -> None:
    first = line("Where did you put the keys", 120, 335, until=24)
    second = line("All right one more time", 140, 335, since=24)

    def paint(image: np.ndarray, number: int) -> None:
        first(image, number)
        second(image, number)

    columns = measure(write(tmp_path / "v.mp4", paint))
    assert columns["text_line_s"] == pytest.approx(2.0, abs=0.5)
    assert columns["text_frame_share"] == 1.0


@pytest.mark.parametrize("speed", [5, 0], ids=["moving", "still"])
@pytest.mark.parametrize("at", [(20, 30), (470, 30), (20, 345), (470, 345)])
def test_a_semi_transparent_watermark_is_found_in_every_corner(
    tmp_path: Path, speed: int, at: tuple[int, int]
) -> None:
    mark = line("GenVideo AI", *at, scale=0.7, opacity=0.5, outline=False)
    columns = measure(write(tmp_path / "v.mp4", mark, speed=speed))
    assert watermark(columns)
    assert columns["text_corner_share"] > 0.8


def test_a_title_over_a_moving_scene_is_overlay(tmp_path: Path) -> None:
    path = write(tmp_path / "v.mp4", line("THE LAST RIVER", 140, 190, scale=1.4))
    columns = measure(path)
    assert overlay_text(columns)
    assert not watermark(columns)


def test_text_that_moves_with_the_scene_is_not_overlay(tmp_path: Path) -> None:
    def sign(image: np.ndarray, number: int) -> None:
        line("OPEN ALL NIGHT", 380 - 5 * number, 200, scale=1.0)(image, 0)

    columns = measure(write(tmp_path / "v.mp4", sign))
    assert columns["text_line_s"] == 0.0
    assert columns["text_corner_share"] == 0.0


def test_a_sign_in_a_still_scene_is_text_but_not_overlay(tmp_path: Path) -> None:
    sign = line("OPEN ALL NIGHT", 60, 150, scale=1.0)
    columns = measure(write(tmp_path / "v.mp4", sign, speed=0))
    assert columns["text_stillness"] > 0.8
    assert columns["text_track_s"] == pytest.approx(4.0)
    assert columns["text_overlay_area_share"] == 0.0
    assert not overlay_text(columns)
    assert not watermark(columns)


def test_a_scene_without_text_needs_no_detector(tmp_path: Path) -> None:
    columns = measure(write(tmp_path / "v.mp4"))
    assert columns["text_frames_searched"] == 0
    assert columns["text_area_share_max"] == 0.0
    assert columns["text_stillness"] < 0.3


def test_unchanged_pictures_are_searched_once(tmp_path: Path) -> None:
    path = write(tmp_path / "v.mp4", line("We leave before sunrise", 140, 335), speed=0)
    columns = measure(path)
    assert columns["text_frames_sampled"] == 8
    assert columns["text_frames_searched"] == 1


def test_a_caption_on_a_blank_picture_is_overlay() -> None:
    black = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.putText(black, "A title card", (220, 180), cv2.FONT_HERSHEY_SIMPLEX, 1.2, 255, 2)
    columns = look_at([black] * 6)
    assert columns["text_stillness"] == 0.0
    assert overlay_text(columns)


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 200), (200, 3), (64, 64), (HEIGHT, 40), (HEIGHT, 1500)]
)
def test_any_frame_size_is_measured(shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(1).integers(0, 255, shape, dtype=np.uint8)
    columns = look_at([noise] * 4)
    assert columns["text_frames_sampled"] == 4
    assert 0.0 <= columns["text_area_share"] <= 1.0


def test_a_portrait_clip_is_measured(tmp_path: Path) -> None:
    path = write(tmp_path / "v.mp4", line("Hello there", 70, 560), size=(360, 640))
    assert overlay_text(measure(path))


def words(text: str, at: tuple[int, int] = (90, 75), width: int = WIDTH) -> np.ndarray:
    """A luma picture with bright words on a plain ground."""
    picture = np.full((HEIGHT, width), 60, np.uint8)
    cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, 1.0, 250, 2, cv2.LINE_AA)
    return picture


def test_too_few_frames_cannot_tell() -> None:
    assert set(look_at([words("Hello")] * 2, frames=2).values()) == {None}


def test_missing_frames_are_an_error() -> None:
    with pytest.raises(MeasureError, match="only 2 of the sampled frames"):
        look_at([words("Hello")] * 2, frames=48)


def test_the_result_does_not_depend_on_how_frames_are_chunked() -> None:
    pictures = [words("Where did you go")] * 4 + [words("Nowhere")] * 5
    assert look_at(pictures, chunk=1) == look_at(pictures, chunk=4) == look_at(pictures, chunk=9)


def test_the_detector_boxes_the_words() -> None:
    picture = np.full((128, 320), 60, np.uint8)
    cv2.putText(picture, "Winnow", (90, 75), cv2.FONT_HERSHEY_SIMPLEX, 1.0, 250, 2, cv2.LINE_AA)
    (box,) = detector()(picture)
    lit = np.argwhere(picture > 200)
    (top, left), (bottom, right) = lit.min(axis=0), lit.max(axis=0) + 1
    assert box.overlap(Box(int(left), int(top), int(right), int(bottom))) > 0.5


def test_what_was_searched_is_no_candidate_again() -> None:
    picture = np.full((HEIGHT, WIDTH), 60, np.uint8)
    cv2.putText(picture, "Winnow", (90, 75), cv2.FONT_HERSHEY_SIMPLEX, 1.0, 250, 2, cv2.LINE_AA)
    lasting = steady(gradient(picture), gradient(picture))
    searched = Searched(*picture.shape)
    (window,) = windows(candidates(lasting, searched), WIDTH, HEIGHT)
    assert window.intersection(Box(90, 52, 210, 76)) == Box(90, 52, 210, 76)
    searched.remember(window, lasting, found=True)
    assert candidates(lasting, searched) == []
    cv2.putText(picture, "grain", (300, 275), cv2.FONT_HERSHEY_SIMPLEX, 1.0, 250, 2, cv2.LINE_AA)
    lasting = steady(gradient(picture), gradient(picture))
    (fresh,) = candidates(lasting, searched)
    assert fresh.intersection(window).area == 0


def test_strokes_are_recognised_at_their_place_only() -> None:
    picture = np.full((64, 320), 60, np.uint8)
    cv2.putText(picture, "Winnow", (90, 45), cv2.FONT_HERSHEY_SIMPLEX, 1.0, 250, 2, cv2.LINE_AA)
    strokes = gradient(picture)
    faint = gradient((picture * 0.3).astype(np.uint8))
    shifted = gradient(np.roll(picture, 4, axis=1))
    assert presence(strokes, strokes) == pytest.approx(1.0)
    assert presence(strokes, faint) > 0.9
    assert presence(strokes, shifted) < 0.3
    assert presence(strokes, np.zeros_like(strokes)) == 0.0


def test_overlapping_boxes_are_counted_once() -> None:
    assert union_share([Box(0, 0, 5, 10), Box(3, 0, 8, 10)], 10, 10) == pytest.approx(0.8)


@pytest.mark.real
@pytest.mark.slow
def test_of_the_real_clips_only_the_three_with_a_logo_are_flagged(real_videos: Path) -> None:
    flagged = {}
    sampled = searched = 0
    for path in sorted((real_videos / "generated").rglob("*.mp4")):
        columns = measure(path)
        sampled += columns["text_frames_sampled"]
        searched += columns["text_frames_searched"]
        if overlay_text(columns) or watermark(columns):
            flagged[path.name.split("_")[1]] = (overlay_text(columns), watermark(columns))
    # "PIKA LABS" stands in the lower right corner of these and of no others.
    assert flagged == dict.fromkeys(("spatula", "skates", "squishes"), (False, True))
    assert searched < 0.3 * sampled
