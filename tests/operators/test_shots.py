"""Shot detection on videos whose boundaries are known."""

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from winnow.operators.change import Change
from winnow.operators.errors import MediaError
from winnow.operators.frames import Span
from winnow.operators.shots import (
    AdaptiveDetector,
    Detector,
    NoDetector,
    TransNetV2Detector,
    scan_shots,
)

VIDEOS = Path(__file__).parents[3] / "shared" / "videos"
needs_videos = pytest.mark.skipif(not VIDEOS.is_dir(), reason=f"no real videos at {VIDEOS}")
WIDTH, HEIGHT = 192, 108


def scene(seed, frames, speed=1.0):
    """A textured object moving over textured ground: (frames, h, w, 3)."""
    rng = np.random.default_rng(seed)
    size = (3 * WIDTH, HEIGHT)
    coarse = rng.integers(0, 176, (6, 14, 3), dtype=np.uint8)
    fine = rng.integers(0, 80, (HEIGHT // 6, WIDTH // 2, 3), dtype=np.uint8)
    ground = cv2.add(
        cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC),
        cv2.resize(fine, size, interpolation=cv2.INTER_LINEAR),
    )
    thing = cv2.resize(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), (40, 40))
    pictures = []
    for n in range(frames):
        left = round(n * speed) % (2 * WIDTH)
        picture = ground[:, left : left + WIDTH].copy()
        x = 10 + abs((3 * n) % (2 * (WIDTH - 60)) - (WIDTH - 60))
        picture[30:70, x : x + 40] = thing
        pictures.append(picture)
    return np.stack(pictures)


def dissolve(before, after, length):
    weights = (np.arange(1, length + 1) / (length + 1))[:, None, None, None]
    middle = (1 - weights) * before[-length:] + weights * after[:length]
    return np.concatenate([before[:-length], middle.astype(np.uint8), after[length:]])


def write(path, pictures, durations=None):
    """H.264; `durations` in seconds per frame, 1/24 where not given."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 90_000)
        now = Fraction(0)
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(now * 90_000), Fraction(1, 90_000)
            container.mux(stream.encode(frame))
            now += Fraction(1, 24) if durations is None else durations[n]
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("detector", [TransNetV2Detector(), AdaptiveDetector()])
def test_cuts_are_found_to_the_frame_at_mixed_frame_rates(tmp_path, detector):
    takes = [scene(1, 40), scene(2, 33), scene(3, 47)]
    rates = [24, 8, 15]
    durations = [Fraction(1, r) for r, t in zip(rates, takes, strict=True) for _ in t]
    path = write(tmp_path / "cuts.mp4", np.concatenate(takes), durations)
    scan = scan_shots(path, detector)
    assert scan.shots == [Span(0, 40), Span(40, 73), Span(73, 120)]
    assert [(t.start, t.end) for t in scan.transitions] == [(40, 40), (73, 73)]
    expected = np.concatenate([[0.0], np.cumsum([float(d) for d in durations])[:-1]])
    assert scan.frames == 120
    np.testing.assert_allclose(scan.seconds, expected, atol=1e-3)


def test_frames_of_a_dissolve_are_in_no_shot(tmp_path):
    path = write(tmp_path / "dissolve.mp4", dissolve(scene(1, 60), scene(2, 60), 12))
    scan = scan_shots(path, TransNetV2Detector())
    (transition,) = scan.transitions
    assert transition.start == pytest.approx(48, abs=2)
    assert transition.end == pytest.approx(60, abs=2)
    assert scan.shots == [Span(0, transition.start), Span(transition.end, 108)]


@pytest.mark.parametrize("length", [1, 2])
def test_a_flash_is_not_a_cut(tmp_path, length):
    pictures = scene(1, 70)
    pictures[30 : 30 + length] = 250
    scan = scan_shots(write(tmp_path / "flash.mp4", pictures), TransNetV2Detector())
    assert scan.transitions == []


def test_a_fast_pan_is_not_a_cut(tmp_path):
    path = write(tmp_path / "pan.mp4", scene(5, 60, speed=5))
    scan = scan_shots(path, TransNetV2Detector())
    assert scan.transitions == []
    assert scan.shots == [Span(0, 60)]


def test_looking_only_where_it_changes_finds_what_looking_everywhere_finds(tmp_path):
    pictures = np.concatenate([scene(1, 125), dissolve(scene(3, 60), scene(4, 60), 12)])
    path = write(tmp_path / "long.mp4", pictures)
    gated = scan_shots(path, TransNetV2Detector())
    full = scan_shots(path, TransNetV2Detector(everywhere=True))
    assert gated.transitions == full.transitions
    assert len(gated.transitions) == 2
    assert full.examined_frames == full.frames == len(pictures)
    assert gated.examined_frames <= 0.6 * full.examined_frames


@pytest.mark.parametrize("detector", [TransNetV2Detector(), AdaptiveDetector(), NoDetector()])
@pytest.mark.parametrize("frames", [1, 2, 49, 50, 51, 100, 101])
def test_any_length_is_counted_whole(tmp_path, frames, detector):
    path = write(tmp_path / "length.mp4", scene(1, frames))
    scan = scan_shots(path, detector)
    assert (scan.frames, len(scan.seconds)) == (frames, frames)
    assert scan.shots == [Span(0, frames)]


def test_no_detector_leaves_the_file_whole(tmp_path):
    path = write(tmp_path / "cut.mp4", np.concatenate([scene(1, 20), scene(2, 20)]))
    assert scan_shots(path, NoDetector()).shots == [Span(0, 40)]


def test_a_file_that_is_no_video_is_a_media_error(tmp_path):
    path = tmp_path / "text.mp4"
    path.write_text("not a video")
    with pytest.raises(MediaError) as caught:
        scan_shots(path, TransNetV2Detector())
    assert caught.value.kind == "not_video"


def test_the_network_leaves_the_random_generators_alone(tmp_path):
    path = write(tmp_path / "cut.mp4", np.concatenate([scene(1, 20), scene(2, 20)]))
    np.random.seed(7)
    expected = np.random.random()
    np.random.seed(7)
    assert scan_shots(path, TransNetV2Detector()).examined_frames == 40
    assert np.random.random() == expected


def test_the_change_signal_sees_dissolves_in_the_dark():
    dark = dissolve(scene(1, 40) // 8, scene(2, 40) // 8, 12)
    small = np.stack([cv2.resize(p, (48, 27), interpolation=cv2.INTER_AREA) for p in dark])
    assert Change(small).dissolves()[28:40].any()
    assert not Change(small[:28]).dissolves().any()


def test_detectors_are_chosen_in_configuration_by_kind():
    adapter = TypeAdapter(Detector)
    assert adapter.validate_python({"kind": "none"}) == NoDetector()
    assert adapter.validate_python({"kind": "transnetv2", "threshold": 0.5}) == TransNetV2Detector(
        threshold=0.5
    )
    with pytest.raises(ValidationError, match="treshold"):
        adapter.validate_python({"kind": "adaptive", "treshold": 2})


@pytest.mark.real
@needs_videos
@pytest.mark.parametrize("detector", [TransNetV2Detector(), AdaptiveDetector()])
def test_generated_videos_hold_no_cut(detector):
    videos = sorted((VIDEOS / "generated").rglob("*.mp4"))
    assert len(videos) == 32
    scans = {video.name: scan_shots(video, detector) for video in videos}
    assert {name: s.transitions for name, s in scans.items() if s.transitions} == {}
    # Cheap because the network is hardly ever asked.
    examined = sum(scan.examined_frames for scan in scans.values())
    assert examined <= 0.1 * sum(scan.frames for scan in scans.values())


@pytest.mark.real
@needs_videos
def test_the_cuts_of_a_real_film_are_found():
    scan = scan_shots(VIDEOS / "camera" / "tests__ops__data__video1.mp4", TransNetV2Detector())
    assert [(t.start, t.end) for t in scan.transitions] == [(144, 144), (237, 237)]
