"""Motion measures known pans in known units, whatever the codec, the size and the frame rate."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import write_video
from tests.operators.measuring import gray, measure, texture, view_of
from winnow.operators.errors import MeasureError
from winnow.operators.frames import Span, read_spans
from winnow.operators.motion import Motion
from winnow.operators.operator import ClipView, FrameChunk, Needs

WIDTH, HEIGHT = 320, 192
DIAGONAL = np.hypot(WIDTH, HEIGHT)


def pan(pixels_per_frame: float, frames: int = 40, width: int = WIDTH, height: int = HEIGHT):
    """A texture that moves to the left by whole or half pixels."""
    ground = texture(1, height * 2, 2 * (width + int(pixels_per_frame * frames) + 4), smooth=4)
    images = []
    for n in range(frames):
        left = round(2 * n * pixels_per_frame)
        window = ground[:, left : left + 2 * width].astype(np.uint16)
        small = window.reshape(height, 2, width, 2).mean(axis=(1, 3))
        images.append(gray(small))
    return images


CODECS = {
    "x264 with b-pyramid": ("libx264", {"crf": "20", "bf": "3", "x264-params": "b-adapt=0"}),
    # One reference: given more, x264 prefers whole-pixel vectors two frames back for 1.5 pixels a
    # frame, and FFmpeg does not tell.
    "x264 without B": ("libx264", {"crf": "20", "bf": "0", "refs": "1"}),
    "mpeg4": ("mpeg4", {"b": "3000k"}),
    "mpeg2 with B": ("mpeg2video", {"b": "3000k", "bf": "2"}),
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("speed", [1.5, 4.0])
def test_codec_speed_of_a_pan_is_true(tmp_path, name, speed):
    codec, options = CODECS[name]
    path = write_video(tmp_path / "pan.mp4", pan(speed), 24, codec, options=options)
    columns = measure(path, Motion())
    assert columns["motion_method"] == "codec"
    true = speed * 24 / DIAGONAL
    assert columns["motion_mean"] == pytest.approx(true, rel=0.12)
    assert columns["motion_p95"] == pytest.approx(true, rel=0.2)
    assert columns["motion_min_half"] == pytest.approx(true, rel=0.15)
    assert columns["motion_area"] > 0.95
    assert columns["motion_camera"] > 0.85


@pytest.mark.parametrize("codec", ["libx265", "libvpx-vp9", "mjpeg"])
def test_flow_takes_over_where_no_vectors_are_exported(tmp_path, codec):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_video(tmp_path / "pan.mkv", pan(2.0), 24, codec, pixel_format, options=options)
    columns = measure(path, Motion())
    assert columns["motion_method"] == "flow"
    assert columns["motion_mean"] == pytest.approx(2.0 * 24 / DIAGONAL, rel=0.25)
    assert columns["motion_camera"] > 0.8


def test_size_and_frame_rate_do_not_matter(tmp_path):
    images = pan(2.0, 48)
    full = measure(write_video(tmp_path / "a.mp4", images, 24), Motion())
    half = measure(write_video(tmp_path / "b.mp4", images[::2], 12), Motion())
    large = [np.kron(image, np.ones((2, 2, 1), np.uint8)) for image in images]
    double = measure(write_video(tmp_path / "c.mp4", large, 24), Motion())
    assert half["motion_mean"] == pytest.approx(full["motion_mean"], rel=0.1)
    assert double["motion_mean"] == pytest.approx(full["motion_mean"], rel=0.1)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "libx265"])
def test_a_still_has_no_motion(tmp_path, codec):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write_video(tmp_path / "still.mp4", pan(0.0), 24, codec, options=options)
    columns = measure(path, Motion())
    assert columns["motion_mean"] < 0.0005
    assert columns["motion_area"] == 0
    assert columns["motion_camera"] <= 1


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_freeze_in_the_second_half_shows(tmp_path, codec):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    moving = pan(3.0, 30)
    path = write_video(tmp_path / "v.mp4", moving + [moving[-1]] * 30, 24, codec, options=options)
    columns = measure(path, Motion())
    assert columns["motion_mean"] > 0.05
    assert columns["motion_min_half"] < 0.25 * columns["motion_mean"]


def test_blocks_count_by_their_area():
    """One large block that stands still outweighs the small one that moves."""
    vectors = np.zeros(2, VECTOR)
    vectors["source"] = -1
    vectors["motion_scale"] = 4
    vectors["w"], vectors["h"] = (16, 8), (16, 8)
    vectors["dst_x"], vectors["dst_y"] = (8, 20), (8, 4)
    vectors["motion_x"] = (0, 4 * 10)
    columns = from_vectors([None, vectors], [1, 2], fps=10, width=32, height=16)
    diagonal = np.hypot(32, 16)
    assert columns["motion_mean"] == pytest.approx(10 * (64 / 320) * 10 / diagonal)
    assert columns["motion_area"] == pytest.approx(0.5)


def test_a_vector_spans_the_time_to_its_reference():
    """P after two B refers three frames back; B right after an anchor one; the other B is unsure."""
    moves = uniform(6.0), uniform(1000.0), uniform(18.0)
    columns = from_vectors([None, *moves], [1, 3, 3, 2], fps=10, width=64, height=32)
    assert columns["motion_mean"] == pytest.approx(6.0 * 10 / np.hypot(64, 32))


def test_future_vectors_and_intra_blocks_are_left_out():
    past, future = uniform(2.0), uniform(50.0)
    future["source"] = 1
    half_intra = past[::2]
    found = np.concatenate([half_intra, future])
    columns = from_vectors([None, found], [1, 2], fps=10, width=64, height=32)
    assert columns["motion_mean"] == pytest.approx(2.0 * 10 / np.hypot(64, 32))


def test_rotation_does_not_change_speeds():
    vectors = uniform(2.0)
    upright = from_vectors([None, vectors], [1, 2], fps=10, width=64, height=32)
    turned = from_vectors([None, vectors], [1, 2], fps=10, width=32, height=64, rotation=90)
    assert turned == upright


@pytest.mark.parametrize("size", [(9, 160), (16, 160), (160, 9), (12, 12), (1, 1)])
def test_flow_takes_frames_of_any_shape(size):
    height, width = size
    luma = np.random.default_rng(0).integers(0, 256, (6, height, width)).astype(np.uint8)
    measurement = Motion().start(ClipView("clip", 6, 8, width, height, "vp9"))
    measurement.update(FrameChunk(0, np.arange(6) / 8, np.ones(6, np.int8), luma, [None] * 6))
    assert np.isfinite(measurement.columns()["motion_mean"])


def test_flow_measures_a_clip_shorter_than_its_interval():
    luma = np.stack([texture(1, 90, 160), np.roll(texture(1, 90, 160), 1, axis=1)])
    measurement = Motion().start(ClipView("clip", 2, 60, 160, 90, "vp9"))
    # One frame a chunk: the method cannot be chosen before the second.
    for n in range(2):
        measurement.update(
            FrameChunk(n, np.array([n / 60]), np.ones(1, np.int8), luma[n : n + 1], [None])
        )
    columns = measurement.columns()
    assert columns["motion_method"] == "flow"
    assert columns["motion_mean"] == pytest.approx(60 / np.hypot(160, 90), rel=0.2)


def test_one_frame_has_no_motion_to_measure(tmp_path):
    path = write_video(tmp_path / "one.mp4", pan(0.0, 1))
    with pytest.raises(MeasureError, match="two frames"):
        measure(path, Motion())


def test_a_span_that_starts_between_key_frames(tmp_path):
    path = write_video(tmp_path / "pan.mp4", pan(2.0, 60), options={"crf": "20", "g": "250"})
    columns = measure(path, Motion(), span=Span(17, 50))
    assert columns["motion_mean"] == pytest.approx(2.0 * 24 / DIAGONAL, rel=0.15)


@pytest.mark.real
def test_codec_and_flow_agree_on_generated_videos(real_videos):
    """Within a factor of two for most; flow reads more where the picture flickers or morphs."""
    ratios = []
    for path in sorted((real_videos / "generated").rglob("*.mp4"))[::3]:
        codec = measure(path, Motion())
        flow = measure_by_flow(path)
        assert (codec["motion_method"], flow["motion_method"]) == ("codec", "flow")
        ratios.append(codec["motion_mean"] / flow["motion_mean"])
    assert 0.6 < np.median(ratios) < 1.2
    assert np.mean((np.array(ratios) > 0.5) & (np.array(ratios) < 2)) > 0.6


VECTOR = np.dtype(
    [
        ("source", "<i4"),
        ("w", "u1"),
        ("h", "u1"),
        ("dst_x", "<i2"),
        ("dst_y", "<i2"),
        ("motion_x", "<i4"),
        ("motion_y", "<i4"),
        ("motion_scale", "<u2"),
    ]
)


def uniform(pixels: float) -> np.ndarray:
    """The vectors of a 64x32 frame, all of 16x16 blocks that moved right by so many pixels."""
    y, x = np.mgrid[8:32:16, 8:64:16]
    vectors = np.zeros(x.size, VECTOR)
    vectors["source"] = -1
    vectors["w"] = vectors["h"] = 16
    vectors["dst_x"], vectors["dst_y"] = x.ravel(), y.ravel()
    vectors["motion_x"], vectors["motion_scale"] = round(-4 * pixels), 4
    return vectors


def from_vectors(vectors, pictures, fps, width, height, rotation=0):
    view = ClipView("clip", len(vectors), fps, width, height, "h264", rotation)
    measurement = Motion().start(view)
    seconds = np.arange(len(vectors)) / fps
    luma = np.zeros((len(vectors), 16, 32), np.uint8)
    measurement.update(FrameChunk(0, seconds, np.array(pictures, np.int8), luma, list(vectors)))
    return measurement.columns()


def measure_by_flow(path):
    view = view_of(path)
    measurement = Motion().start(view)

    def receive(_, chunk):
        chunk.vectors = None
        measurement.update(chunk)

    read_spans(path, [Span(0, view.frames)], view.fps, Needs(luma=True), receive)
    return measurement.columns()
