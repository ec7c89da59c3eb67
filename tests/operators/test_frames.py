"""The frame reader gives every operator what it declared, upright, in full range and in order."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from tests.conftest import scene, write_video
from tests.operators.measuring import ffmpeg, gray, texture
from winnow.operators.errors import MediaError
from winnow.operators.frames import (
    CHUNK_FRAMES,
    ClipFrames,
    Span,
    decode,
    frame_vectors,
    luma_plane,
    read_spans,
    sample_image,
    shrink,
    small_luma,
    small_size,
)
from winnow.operators.operator import Needs, Sampling


@pytest.mark.parametrize(
    ("width", "height"), [(720, 480), (1280, 704), (1921, 1081), (333, 517), (160, 90), (40, 30)]
)
def test_shrink_averages_areas(width, height):
    size = small_size(width, height)
    image = texture(1, height, width, smooth=2.5 * width / size[0])
    shrunk = shrink(image, size)
    even = image[: height // 2 * 2, : width // 2 * 2].astype(np.float32)
    exact = cv2.resize(even, size, interpolation=cv2.INTER_AREA)
    assert shrunk.shape == exact.shape
    assert np.abs(shrunk - exact).mean() < 1.5
    assert abs(float(shrunk.mean()) - float(exact.mean())) < 0.6


def collect(path, spans, fps, needs):
    chunks: dict[int, list] = {k: [] for k in range(len(spans))}
    counts = read_spans(path, spans, fps, needs, lambda k, chunk: chunks[k].append(chunk))
    return counts, chunks


def numbered(frames: int, width=320, height=180) -> list[np.ndarray]:
    """Frame n is grey of level 40 + 2 n."""
    return [np.full((height, width, 3), 40 + 2 * n, np.uint8) for n in range(frames)]


def test_spans_get_exactly_their_frames(tmp_path):
    path = write_video(tmp_path / "v.mp4", numbered(80), 20, options={"crf": "10"})
    spans = [Span(3, 10), Span(10, 60), Span(70, 80)]
    sampling = Sampling(2.0, "luma", minimum=4)
    needs = Needs(luma=True, samples=(sampling,))
    counts, chunks = collect(path, spans, 20, needs)
    assert counts == [7, 50, 10]
    for k, span in enumerate(spans):
        assert all(len(chunk) <= CHUNK_FRAMES for chunk in chunks[k])
        assert [c.first for c in chunks[k]] == list(range(0, len(span), CHUNK_FRAMES))
        levels = np.concatenate([c.luma.mean(axis=(1, 2)) for c in chunks[k]])
        assert np.allclose(levels, 40 + 2 * np.arange(span.start, span.end), atol=1.5)
        seconds = np.concatenate([c.seconds for c in chunks[k]])
        assert np.allclose(seconds, np.arange(len(span)) / 20, atol=1e-3)
        samples = [sample for c in chunks[k] for sample in c.samples[sampling]]
        assert [s.index for s in samples] == sampling.indices(len(span), 20).tolist()
        for s in samples:
            assert s.image.mean() == pytest.approx(40 + 2 * (span.start + s.index), abs=1.5)
            assert s.seconds == pytest.approx(s.index / 20, abs=1e-3)


def test_a_file_that_ends_early_says_so(tmp_path):
    path = write_video(tmp_path / "v.mp4", numbered(30))
    counts, chunks = collect(path, [Span(10, 50)], 24, Needs(luma=True))
    assert counts == [20]
    assert sum(len(chunk) for chunk in chunks[0]) == 20


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_luma_is_full_range_whatever_the_pixel_format(tmp_path, pixel_format):
    levels = np.tile(np.linspace(0, 255, 320).astype(np.uint8), (180, 1))
    path = write_video(
        tmp_path / "v.mp4", [gray(levels)] * 3, pixel_format=pixel_format, options={"crf": "1"}
    )
    frame = next(decode(path))
    sample = sample_image(frame, Sampling(1.0))
    assert sample.shape == (180, 320)
    assert np.abs(sample.astype(int) - levels).mean() < 2
    assert np.abs(small_luma(frame).astype(int) - levels[::2, ::2]).mean() < 2


def test_full_range_files_stay_as_they_are(tmp_path):
    levels = np.tile(np.linspace(0, 255, 320).astype(np.uint8), (180, 1))
    path = write_video(tmp_path / "v.mkv", [gray(levels)] * 3, 24, "mjpeg", "yuvj420p")
    sample = sample_image(next(decode(path)), Sampling(1.0))
    assert np.abs(sample.astype(int) - levels).mean() < 3


def test_samples_outlive_the_frame(tmp_path):
    """A sample of a full-range file is the plane itself, so it must be copied."""
    path = write_video(tmp_path / "v.mkv", scene(1, 12), 24, "mjpeg", "yuvj420p")
    for frame in decode(path):
        assert not np.may_share_memory(sample_image(frame, Sampling(1.0)), luma_plane(frame))


def test_rotated_files_come_upright(tmp_path):
    upright = np.full((180, 320, 3), 60, np.uint8)
    upright[:90] = 200  # the upper half is bright
    coded = np.ascontiguousarray(np.rot90(upright))
    plain = write_video(tmp_path / "plain.mp4", [coded] * 8)
    path = tmp_path / "turned.mp4"
    # Which way FFmpeg counts degrees is its own affair: one of the two must come out upright.
    found = []
    for degrees in ("90", "270"):
        ffmpeg("-display_rotation", degrees, "-i", plain, "-c", "copy", path)
        frame = next(decode(path))
        small = small_luma(frame)
        assert small.shape == (90, 160)
        rgb = sample_image(frame, Sampling(1.0, "rgb", 90))
        assert rgb.shape == (90, 160, 3)
        assert np.abs(rgb[..., 1].astype(int) - small).mean() < 4
        assert sample_image(frame, Sampling(1.0)).shape == (180, 320)
        found.append(small[:40].mean() > small[50:].mean())
    assert sorted(found) == [False, True]


def test_vectors_do_not_hold_the_frame(tmp_path):
    path = write_video(tmp_path / "v.mp4", scene(2, 6))
    vectors = [frame_vectors(frame) for frame in decode(path, motion_vectors=True)]
    assert vectors[0] is None
    assert all(v is not None and len(v) and v.base is not None for v in vectors[1:])
    assert {"source", "motion_x", "motion_scale"} <= set(vectors[1].dtype.names)
    assert set(np.unique(vectors[1]["motion_scale"])) == {4}


def test_vectors_are_the_same_with_any_number_of_threads(tmp_path):
    path = write_video(tmp_path / "v.mp4", scene(4, 60, 640, 352), options={"crf": "18"})

    def motions(threads):
        frames = decode(path, threads=threads, motion_vectors=True)
        return [v["motion_x"].tolist() for f in frames if (v := frame_vectors(f)) is not None]

    alone = motions(1)
    for _ in range(5):
        assert motions(4) == alone


def test_memory_of_a_clip_is_bounded_by_the_chunk(tmp_path):
    path = write_video(tmp_path / "v.mp4", scene(3, 100))
    needs = Needs(luma=True, motion_vectors=True)
    clip = ClipFrames(Span(0, 100), 24, needs)
    sizes = []
    for number, frame in enumerate(decode(path, motion_vectors=True)):
        clip.add(frame, number / 24)
        if clip.full:
            sizes.append(len(clip.take()))
    assert sizes == [CHUNK_FRAMES] * (100 // CHUNK_FRAMES)


def test_broken_files_name_their_kind(tmp_path):
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(MediaError) as caught:
        next(decode(noise))
    assert caught.value.kind == "not_video"
    with pytest.raises(MediaError) as caught:
        next(decode(tmp_path / "nothing.mp4"))
    assert caught.value.kind == "vanished"
