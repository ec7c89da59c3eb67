"""The samples of `winnow demo`: what was said to be planted is physically there."""

from __future__ import annotations

import json
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from winnow.pipeline import samples
from winnow.pipeline.drawing import Shot
from winnow.pipeline.filming import Coding, encode
from winnow.pipeline.samples import Planted, draw_samples

ALIKE = 0.9
"""Correlation of two videos' coarse layouts over time; above it they would be called copies."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Planted], list[str]]:
    folder = tmp_path_factory.mktemp("samples") / "videos"
    lines: list[str] = []
    planted = draw_samples(folder, workers=2, progress=lines.append)
    return folder, {sample.name: sample for sample in planted}, lines


@pytest.fixture(scope="module")
def folder(drawn) -> Path:
    return drawn[0]


@pytest.fixture(scope="module")
def planted(drawn) -> dict[str, Planted]:
    return drawn[1]


def gray(path: Path) -> np.ndarray:
    """(n, h, w) the gray frames as coded: before any rotation, in full range."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="gray") for f in container.decode(video=0)])


def changes(path: Path) -> np.ndarray:
    """(n - 1,) mean absolute difference of neighbouring frames, small enough to ignore coding."""
    small = [cv2.resize(f, (160, 90), interpolation=cv2.INTER_AREA) for f in gray(path)]
    return np.abs(np.diff(np.stack(small).astype(np.float32), axis=0)).mean((1, 2))


def layout(path: Path) -> np.ndarray:
    """Unit vector: eight moments of a video at 16x9, free of brightness and contrast."""
    frames = gray(path)
    moments = np.linspace(0, len(frames) - 1, 8).round().astype(int)
    small = [cv2.resize(frames[k], (16, 9), interpolation=cv2.INTER_AREA) for k in moments]
    vector = np.stack(small).astype(np.float32).ravel()
    vector -= vector.mean()
    return vector / np.linalg.norm(vector)


def facts(path: Path) -> tuple[str, str, int, int, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        rate = float(stream.average_rate)
        return context.codec.canonical_name, context.pix_fmt, stream.width, stream.height, rate


def test_about_forty_samples_of_every_kind(drawn) -> None:
    folder, planted, lines = drawn
    assert 38 <= len(planted) <= 48
    assert not [line for line in lines if line.startswith("left out")]
    assert all((folder / name).is_file() for name in planted)
    videos = {
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.suffix in {".mp4", ".mov", ".webm"} and "_control_" not in p.name
    }
    assert videos == set(planted)
    kinds = {sample.expect.split(":")[0] for sample in planted.values()}
    assert kinds == {"keep", "reject", "duplicate", "copy", "failed", "incomplete"}


def test_names_that_expectations_point_to_exist(planted) -> None:
    for sample in planted.values():
        kind, _, other = sample.expect.partition(":")
        if kind in {"duplicate", "copy"}:
            assert planted[other].expect == "keep"
        if kind == "copy":
            assert other < sample.name


def test_kept_videos_move_all_the_time_and_are_normally_exposed(folder, planted) -> None:
    for name, sample in planted.items():
        if sample.expect != "keep":
            continue
        moving = changes(folder / name)
        assert moving.min() > 1.5, name
        assert moving.max() < 18, name
        with av.open(str(folder / name)) as container:
            assert float(container.duration or 0) / 1e6 >= 2.0, name
        if sample.defect != "black borders":
            frames = gray(folder / name)
            assert 80 < frames.mean() < 170, name
            assert frames.std((1, 2)).min() > 22, name


def test_no_two_scenes_look_alike_but_copies_do(folder, planted) -> None:
    names = [n for n, s in planted.items() if s.expect.split(":")[0] in {"keep", "duplicate"}]
    upright = [n for n in names if n not in {"rotated.mov"}]
    vectors = np.stack([layout(folder / n) for n in upright])
    similar = vectors @ vectors.T
    family = {n: planted[n].expect.partition(":")[2] or n for n in upright}
    for i, one in enumerate(upright):
        for j, other in enumerate(upright[:i]):
            assert (similar[i, j] > ALIKE) == (family[one] == family[other]), (one, other)


def test_hard_cut_and_dissolve(folder) -> None:
    jump = changes(folder / "hard_cut.mp4")
    assert jump.argmax() == 35
    assert jump[35] > 4 * np.delete(jump, 35).max()
    frames = gray(folder / "dissolve.mp4").astype(np.float32)
    assert len(frames) == 108
    between = frames[36:48]
    share = [np.corrcoef(f.ravel(), frames[35].ravel())[0, 1] for f in between]
    assert share[0] > 0.8
    assert share[-1] < 0.3
    assert changes(folder / "dissolve.mp4").max() < 15


def test_freezes_are_where_the_note_says(folder) -> None:
    for name, start, end in (("frozen_tail", 39, 83), ("frozen_middle", 24, 60), ("frozen", 0, 71)):
        still = changes(folder / f"{name}.mp4") < 0.3
        assert still[start:end].all(), name
        assert not np.delete(still, np.arange(start, end)).any(), name


def test_hardly_moves_is_not_frozen(folder) -> None:
    moving = changes(folder / "hardly_moves.mp4")
    assert moving.max() < 0.5
    frames = gray(folder / "hardly_moves.mp4")
    assert np.abs(frames[-1].astype(int) - frames[0]).max() > 60


def test_exposure_defects(folder) -> None:
    # Gray as PyAV converts it is in full range: black is 0 and white 255.
    assert gray(folder / "dark.mp4").mean() < 20
    assert (gray(folder / "overexposed.mp4") > 235).mean() > 0.6
    fog = gray(folder / "fog.mp4")
    assert fog.std((1, 2)).max() < 5
    assert 100 < fog.mean() < 160


def test_blur_takes_the_detail_away(folder) -> None:
    def detail(name: str) -> float:
        return float(cv2.Laplacian(gray(folder / name)[30], cv2.CV_32F).var())

    assert detail("blurred.mp4") < 0.1 * detail("harbour.mp4")


@pytest.mark.parametrize(
    ("name", "box"),
    [("letterbox.mp4", (0, 44, 640, 272)), ("pillarbox.mp4", (96, 0, 448, 360))],
)
def test_borders_are_black_outside_the_box_of_the_note(folder, planted, name, box) -> None:
    assert ",".join(map(str, box)) in planted[name].note
    x, y, width, height = box
    frames = gray(folder / name)
    outside = np.ones(frames.shape[1:], bool)
    # Two pixels of leeway: coding smears the edge.
    outside[max(0, y - 2) : y + height + 2, max(0, x - 2) : x + width + 2] = False
    assert frames[:, outside].max() < 24
    inside = frames[:, y : y + height, x : x + width]
    assert inside[:, :, [0, -1]].mean() > 60
    assert inside[:, [0, -1]].mean() > 60


def test_text_is_burned_in_where_and_when_the_note_says(folder) -> None:
    def bright(frames: np.ndarray) -> np.ndarray:
        """Share of pixels as white as only letters are."""
        return (frames > 230).mean((1, 2))

    subtitle = gray(folder / "subtitle.mp4")[:, 285:340, 150:490]
    shown = bright(subtitle) > bright(subtitle[:10]).max() + 0.03
    assert shown[10:80].all()
    assert not shown[:10].any()
    assert not shown[80:].any()
    corner = gray(folder / "watermark.mp4").astype(np.float32)[:, 10:50, 480:630]
    # What stays while the scene moves on is the mark: edges of the mean over time.
    inside = cv2.Laplacian(corner.mean(0), cv2.CV_32F).std()
    beside = gray(folder / "watermark.mp4").astype(np.float32)[:, 10:50, 20:170]
    assert inside > 3 * cv2.Laplacian(beside.mean(0), cv2.CV_32F).std()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("harbour.mp4", ("h264", "yuv420p", 640, 360, 24)),
        ("desert.mp4", ("h264", "yuv420p", 640, 352, 16)),
        ("terrace.mp4", ("h264", "yuv420p", 640, 360, 30)),
        ("portrait.mp4", ("h264", "yuv420p", 270, 480, 24)),
        ("odd_size.mp4", ("h264", "yuv444p", 321, 243, 24)),
        ("ten_bit.mp4", ("h264", "yuv420p10le", 480, 270, 24)),
        ("hevc.mp4", ("hevc", "yuv420p", 480, 270, 24)),
        ("vp9.webm", ("vp9", "yuv420p", 480, 270, 24)),
        ("av1.mp4", ("av1", "yuv420p", 480, 270, 24)),
        ("lake_half_crf35.mp4", ("h264", "yuv420p", 320, 180, 30)),
        ("lake_24fps.mp4", ("h264", "yuv420p", 640, 360, 24)),
        ("lake_trimmed.mp4", ("h264", "yuv420p", 620, 350, 30)),
    ],
)
def test_codecs_sizes_and_rates(folder, name, expected) -> None:
    assert facts(folder / name) == expected


def test_variable_rate_has_uneven_times(folder) -> None:
    with av.open(str(folder / "variable_rate.mp4")) as container:
        times = np.array([f.time for f in container.decode(video=0)])
    steps = np.diff(times)
    assert steps.min() == pytest.approx(0.02, abs=0.002)
    assert steps.max() == pytest.approx(0.1, abs=0.002)
    assert len(times) == 61


def test_rotated_is_upright_once_turned(folder) -> None:
    with av.open(str(folder / "rotated.mov")) as container:
        frame = next(container.decode(video=0))
    assert (frame.width, frame.height) == (480, 270)
    assert frame.rotation == 90
    coded = frame.to_ndarray(format="rgb24")
    scene = next(Shot(10, 270, 480).frames())
    turned = np.ascontiguousarray(np.rot90(coded))  # counter-clockwise
    assert np.abs(turned.astype(int) - scene).mean() < 8
    assert np.abs(turned[::-1, ::-1].astype(int) - scene).mean() > 25


def test_sound_beside_pictures_and_alone(folder) -> None:
    with av.open(str(folder / "terrace.mp4")) as container:
        assert container.streams.audio
        assert container.streams.video
    with av.open(str(folder / "audio_only.mp4")) as container:
        assert container.streams.audio
        assert not container.streams.video
        assert sum(frame.samples for frame in container.decode(audio=0)) > 2.5 * 44100


def test_short_ones(folder) -> None:
    assert len(gray(folder / "one_frame.mp4")) == 1
    assert len(gray(folder / "short.mp4")) == 30


def test_exact_copy_has_the_same_bytes_and_others_have_not(folder) -> None:
    original = (folder / "lake.mp4").read_bytes()
    assert (folder / "lake_copy.mp4").read_bytes() == original
    for name in ("lake_half_crf35.mp4", "lake_24fps.mp4", "lake_trimmed.mp4"):
        assert (folder / name).read_bytes() != original


def test_broken_files_are_broken_in_the_way_that_was_said(folder) -> None:
    assert (folder / "empty.mp4").stat().st_size == 0
    for name in ("text.mp4", "truncated_no_index.mp4", "empty.mp4"):
        with pytest.raises(av.error.InvalidDataError):
            av.open(str(folder / name))
    with av.open(str(folder / "truncated.mp4")) as container:
        assert container.streams.video[0].frames == 72
        whole: list[av.VideoFrame] = []
        with pytest.raises(av.error.InvalidDataError):
            whole.extend(container.decode(video=0))
    assert 20 < len(whole) < 65
    with av.open(str(folder / "scrambled.mp4")) as container:
        assert container.streams.video[0].frames == 72
        with pytest.raises(av.error.FFmpegError):
            list(container.decode(video=0))


def test_transfer_folder_is_laid_out_as_the_generator_does(folder) -> None:
    out = folder / "transfer"
    spec = json.loads((out / "yard.json").read_text())
    assert spec["seed"] == 38
    assert (out / "yard.txt").read_text() == spec["prompt"]
    assert (out / "garden.json").is_file()
    assert not (out / "garden.txt").exists()
    for name in ("yard", "garden"):
        assert facts(out / f"{name}_control_edge.mp4")[2:4] == facts(out / f"{name}.mp4")[2:4]


def test_prompts_lie_beside_clean_videos_in_both_forms(folder, planted) -> None:
    forms = set()
    for name, sample in planted.items():
        if sample.defect == "clean":
            beside = [p for p in (folder / name).parent.iterdir() if p.stem == Path(name).stem]
            (prompt,) = [p for p in beside if p.suffix in {".txt", ".json"}]
            forms.add(prompt.suffix)
            text = prompt.read_text(encoding="utf-8")
            assert (json.loads(text)["prompt"] if prompt.suffix == ".json" else text).strip()
    assert forms == {".txt", ".json"}


def test_the_same_scene_is_the_same_file_every_time(folder, tmp_path) -> None:
    # A width of an odd number of macroblocks: x264 with its macroblock tree fails here.
    shot = Shot(5, 270, 480)
    encode(tmp_path / "again.mp4", shot.frames(), shot.fps)
    assert (tmp_path / "again.mp4").read_bytes() == (folder / "portrait.mp4").read_bytes()


def test_a_missing_encoder_leaves_its_sample_out_and_says_so(tmp_path, monkeypatch) -> None:
    recipes = {r.planted[0].name: r for r in samples._recipes()}
    recipe = recipes["one_frame.mp4"]
    absent = samples._Recipe(recipe.planted, recipe.make, Coding("no_such_encoder"))
    refusing = samples._take(
        "refused.mp4", "clean", "keep", "", Shot(1, 321, 243, seconds=0.2)
    )  # 4:2:0 needs even sizes
    monkeypatch.setattr(samples, "_recipes", lambda: [absent, refusing, recipes["text.mp4"]])
    lines: list[str] = []
    planted = draw_samples(tmp_path, workers=1, progress=lines.append)
    assert [sample.name for sample in planted] == ["text.mp4"]
    assert [p.name for p in tmp_path.iterdir()] == ["text.mp4"]
    assert sum(line.startswith("left out") for line in lines) == 2
    assert any("no_such_encoder" in line for line in lines)
