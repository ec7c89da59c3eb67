"""The fingerprint finds copies, tells scenes and motions apart, and stays silent on flat clips."""

from __future__ import annotations

import csv
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from winnow.operators.errors import MeasureError
from winnow.operators.fingerprint import DIMENSIONS, MODEL, Fingerprint
from winnow.operators.frames import Span, read_spans
from winnow.operators.operator import ClipView, FrameChunk, Needs

THRESHOLD = 0.80  # what bench/fingerprint.py advises
FPS = 24.0
VIDEOS = Path(__file__).parents[3] / "shared" / "videos"


def measure(luma, fps=FPS, seconds=None, chunk=32, announced=None):
    """(columns, vector or None) of (n, h, w) luma, fed chunk by chunk."""
    seconds = np.arange(len(luma)) / fps if seconds is None else seconds
    frames = len(luma) if announced is None else announced
    view = ClipView("clip", frames, fps, luma.shape[2], luma.shape[1], "h264")
    measurement = Fingerprint().start(view)
    for first in range(0, len(luma), chunk):
        part = slice(first, first + chunk)
        pictures = np.ones(len(luma[part]), np.int8)
        measurement.update(FrameChunk(first, seconds[part], pictures, luma[part]))
    return measurement.columns(), measurement.vectors().get(MODEL)


def vector(luma, **how):
    found = measure(luma, **how)[1]
    assert found is not None
    return found


def similarity(one, two):
    return float(one @ two)


def scene(seed, height=90, width=160):
    """A textured still picture with large and small structure."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width), np.float32)
    for cells, strength in ((3, 60), (7, 40), (20, 20)):
        noise = rng.normal(0, strength, (cells, cells)).astype(np.float32)
        picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(picture + 128, 20, 235)


def clip(background, motion, frames=48):
    """A bright disc crosses the scene on a path that depends on `motion`."""
    rng = np.random.default_rng(1000 + motion)
    height, width = background.shape
    start, end = rng.uniform(0.1, 0.9, (2, 2)) * (width, height)
    bend = rng.uniform(-0.3, 0.3, 2) * (width, height)
    out = []
    for share in np.linspace(0, 1, frames):
        x, y = start + (end - start) * share + bend * np.sin(np.pi * share)
        image = background.copy()
        cv2.circle(image, (round(x), round(y)), height // 9, 250.0, -1)
        out.append(image.astype(np.uint8))
    return np.stack(out)


@pytest.fixture(scope="module")
def clips():
    return [clip(scene(seed), seed) for seed in range(12)]


@pytest.fixture(scope="module")
def vectors(clips):
    return np.stack([vector(luma) for luma in clips])


def test_a_vector_has_length_one_and_the_declared_shape(clips, vectors):
    assert vectors.shape == (len(clips), DIMENSIONS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_different_clips_are_far_from_each_other(vectors):
    among = vectors @ vectors.T
    assert among[np.triu_indices(len(vectors), 1)].max() < 0.7


def crop(share):
    def apply(luma):
        height, width = luma.shape[1:]
        top, left = round(height * share), round(width * share)
        return luma[:, top : height - top, left : width - left]

    return apply


COPIES = {
    "half size": lambda luma: np.stack(
        [cv2.resize(f, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for f in luma]
    ),
    "cropped by 3 % a side": crop(0.03),
    "brighter": lambda luma: np.clip(luma * 1.1 + 8, 0, 255).astype(np.uint8),
    "darker": lambda luma: np.clip(luma * 0.85 - 5, 0, 255).astype(np.uint8),
    "every other frame": lambda luma: luma[::2],
    "frames doubled": lambda luma: np.repeat(luma, 2, axis=0),
    "24 to 15 to 30": lambda luma: luma[(np.arange(60) // 2 * 1.6).astype(int)],
    "noisy": lambda luma: np.clip(
        luma + np.random.default_rng(0).normal(0, 4, luma.shape), 0, 255
    ).astype(np.uint8),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_changed_copy_is_found(name, clips, vectors):
    for luma, original in zip(clips, vectors, strict=True):
        changed = COPIES[name](luma)
        fps = FPS * len(changed) / len(luma)
        assert similarity(vector(changed, fps=fps), original) > THRESHOLD + 0.05


def test_every_copy_is_nearest_to_its_own_original(clips, vectors):
    for change in COPIES.values():
        copies = np.stack([vector(change(luma)) for luma in clips])
        assert (np.argmax(copies @ vectors.T, axis=1) == np.arange(len(clips))).all()


def test_one_scene_with_another_motion_is_not_a_duplicate():
    for seed in range(8):
        background = scene(seed)
        one, two = (vector(clip(background, seed + shift)) for shift in (100, 200))
        assert similarity(one, two) < THRESHOLD - 0.05


def test_the_halves_of_a_moving_clip_are_not_duplicates(clips):
    for luma in clips:
        half = len(luma) // 2
        assert similarity(vector(luma[:half]), vector(luma[half:])) < THRESHOLD - 0.05


@pytest.mark.parametrize("seed", range(6))
def test_reversed_and_mirrored_clips_are_not_duplicates(seed):
    # A path of its own: one that goes up the middle is its own mirror image, and one that comes
    # back to its start is its own reverse.
    background = scene(seed)
    luma = np.stack([background.astype(np.uint8)] * 48)
    for number, share in enumerate(np.linspace(0, 1, 48)):
        cv2.circle(luma[number], (round(20 + 100 * share), round(25 + 20 * share)), 10, 250.0, -1)
    original = vector(luma)
    assert similarity(vector(luma[::-1]), original) < THRESHOLD - 0.2
    assert similarity(vector(luma[:, :, ::-1]), original) < THRESHOLD - 0.2


def test_still_clips_of_one_scene_are_duplicates_whatever_their_noise():
    rng = np.random.default_rng(5)
    still = scene(3)
    one, two = (
        np.clip(still + rng.normal(0, 2, (48, *still.shape)), 0, 255).astype(np.uint8)
        for _ in range(2)
    )
    assert similarity(vector(one), vector(two)) > 0.9


@pytest.mark.parametrize("level", [0, 16, 128, 255])
def test_a_flat_clip_has_no_fingerprint(level):
    noise = np.random.default_rng(level).integers(-2, 3, (40, 90, 160))
    luma = np.clip(level + noise, 0, 255).astype(np.uint8)
    columns, found = measure(luma)
    assert found is None
    assert columns["fingerprint_usable"] is False
    assert 0 <= columns["fingerprint_energy"] < 1
    assert np.isfinite(list(columns.values())).all()


def test_energy_and_motion_say_what_is_there(clips):
    still = np.repeat(clips[0][:1], 48, axis=0)
    moving_columns, still_columns = measure(clips[0])[0], measure(still)[0]
    assert still_columns["fingerprint_motion"] == pytest.approx(0, abs=1e-3)
    assert still_columns["fingerprint_energy"] > 5
    assert moving_columns["fingerprint_motion"] > 1
    assert moving_columns["fingerprint_usable"] is True


def test_the_chunking_changes_nothing(clips):
    whole = vector(clips[1], chunk=1000)
    for size in (1, 7, 32):
        np.testing.assert_allclose(vector(clips[1], chunk=size), whole, atol=1e-5)


def test_the_announced_number_of_frames_does_not_matter(clips, vectors):
    assert similarity(vector(clips[2], announced=4800), vectors[2]) > 0.9999


def test_a_long_clip_is_thinned_without_losing_its_fingerprint(clips, vectors):
    slow = np.repeat(clips[4], 40, axis=0)  # 1920 frames, far more knots than are kept
    assert similarity(vector(slow), vectors[4]) > 0.999


def test_variable_frame_rate_is_read_from_the_timestamps(clips, vectors):
    rng = np.random.default_rng(2)
    kept = np.sort(np.append(rng.choice(np.arange(1, 47), 30, replace=False), [0, 47]))
    sparse = clips[5][kept]
    timed = vector(sparse, seconds=kept / FPS)
    counted = vector(sparse)
    assert similarity(timed, vectors[5]) > 0.95
    assert similarity(timed, vectors[5]) > similarity(counted, vectors[5])


@pytest.mark.parametrize("seconds", [np.zeros(48), np.arange(48)[::-1] / FPS])
def test_broken_timestamps_count_as_a_constant_rate(seconds, clips, vectors):
    assert similarity(vector(clips[6], seconds=seconds), vectors[6]) > 0.999


def test_one_frame_gives_a_finite_fingerprint_of_its_layout(clips):
    columns, found = measure(clips[7][:1])
    assert found is not None
    assert np.isfinite(found).all()
    assert columns["fingerprint_motion"] == pytest.approx(0, abs=1e-3)


def test_a_sliver_of_a_frame_is_no_problem():
    luma = np.random.default_rng(0).integers(0, 256, (10, 1, 160), dtype=np.uint8)
    columns, found = measure(luma)
    assert np.isfinite(columns["fingerprint_energy"])
    assert found is None or np.isfinite(found).all()


def test_no_frames_is_an_error():
    view = ClipView("clip", 10, FPS, 160, 90, "h264")
    with pytest.raises(MeasureError, match="no frames"):
        Fingerprint().start(view).columns()


def test_the_columns_are_the_declared_ones(clips):
    columns, _ = measure(clips[8])
    assert set(columns) == {column.name for column in Fingerprint.columns}


def encode(path, luma, rate, crf):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        stream.height, stream.width = luma.shape[1:]
        stream.pix_fmt = "yuv420p"
        for number, image in enumerate(luma):
            frame = av.VideoFrame.from_ndarray(image, format="gray").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read(path, fps):
    chunks = []
    span = Span(0, 1 << 20)
    read_spans(path, [span], fps, Needs(luma=True), lambda _, chunk: chunks.append(chunk))
    luma = np.concatenate([chunk.luma for chunk in chunks])
    return vector(luma, fps=fps, seconds=np.concatenate([chunk.seconds for chunk in chunks]))


def test_an_encoded_copy_at_low_quality_half_size_and_another_rate_is_found(tmp_path):
    large = clip(scene(9, 360, 640), 9)
    encode(tmp_path / "original.mp4", large, 24, 18)
    shown = (np.arange(30) * 1.6).astype(int)
    small = np.stack([cv2.resize(f, (320, 180), interpolation=cv2.INTER_AREA) for f in large])
    encode(tmp_path / "copy.mp4", small[shown], 15, 35)
    one, two = read(tmp_path / "original.mp4", 24.0), read(tmp_path / "copy.mp4", 15.0)
    assert similarity(one, two) > THRESHOLD + 0.05


@pytest.mark.real
@pytest.mark.skipif(not VIDEOS.exists(), reason="the real videos (../shared/videos) are not here")
def test_no_two_generated_videos_are_duplicates():
    with (VIDEOS / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["path"].startswith("generated/")]
    found = np.stack([read(VIDEOS / row["path"], float(row["fps"])) for row in rows])
    among = (found @ found.T)[np.triu_indices(len(rows), 1)]
    assert len(rows) == 32
    assert among.max() < THRESHOLD - 0.15
