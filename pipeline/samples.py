"""The videos of `winnow demo`: about forty short takes of which the truth is known.

Each one is drawn, encoded and named here together with what the default policy should make of it,
so that a run can be checked against what was planted. The pixels are the same every time.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from winnow.pipeline.drawing import Image, Shot, bordered, held, lettering, spliced
from winnow.pipeline.filming import H264, SOUND_RATE, Coding, decoded, encode, mux_tone


@dataclass(frozen=True, slots=True)
class Planted:
    """One file and the truth about it.

    `name` is the path relative to the folder, `defect` a short kind, `note` what was planted, for
    people. `expect` is what the default policy should find: `keep`, `reject:<rule>` (this rule
    among the reasons), `duplicate:<name that stays>`, `copy:<name that came first>`,
    `failed:<error kind>` or `incomplete`.
    """

    name: str
    defect: str
    expect: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How one file, or an original with its copies, is made in a folder."""

    planted: tuple[Planted, ...]
    make: Callable[[Path], object]
    coding: Coding = H264


def draw_samples(
    folder: Path, *, workers: int | None = None, progress: Callable[[str], None] | None = None
) -> list[Planted]:
    """Draw all samples into `folder` (made where missing, same names overwritten).

    Drawn on `workers` threads, by default one a core: OpenCV and the encoders release the
    interpreter lock. A sample that this machine has no encoder for is left out and `progress` says
    so. Returns what was planted, sorted by name.
    """
    say = progress or (lambda line: None)
    folder.mkdir(parents=True, exist_ok=True)
    planted: list[Planted] = []
    opencv_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            running = {}
            for recipe in _recipes():
                if recipe.coding.available():
                    running[pool.submit(recipe.make, folder)] = recipe
                else:
                    say(_left_out(recipe, "this build of FFmpeg cannot encode it"))
            for done in as_completed(running):
                recipe = running[done]
                try:
                    done.result()
                except av.error.FFmpegError as error:
                    for sample in recipe.planted:
                        (folder / sample.name).unlink(missing_ok=True)
                    say(_left_out(recipe, str(error)))
                    continue
                for sample in recipe.planted:
                    planted.append(sample)
                    say(f"{sample.name}: {sample.defect}")
    finally:
        cv2.setNumThreads(opencv_threads)
    return sorted(planted, key=lambda sample: sample.name)


def _left_out(recipe: _Recipe, why: str) -> str:
    names = ", ".join(sample.name for sample in recipe.planted)
    return f"left out {names} ({recipe.coding.encoder}, {recipe.coding.pixel_format}): {why}"


def _recipes() -> list[_Recipe]:
    """Every sample, the longest work first. No two scenes share a seed unless they are copies."""
    return [*_copies(), *_clean(), *_unusual(), *_defects(), *_transfer(), *_broken()]


def _take(
    name: str,
    defect: str,
    expect: str,
    note: str,
    shot: Shot,
    change: Callable[[Iterator[Image]], Iterable[Image]] = iter,
    coding: Coding = H264,
    prompt: str = "",
) -> _Recipe:
    """One file: a shot, a change to its frames, a coding, and a prompt beside it where given."""

    def make(folder: Path) -> None:
        encode(folder / name, change(shot.frames()), shot.fps, coding)
        _write_prompt(folder / name, prompt)

    return _Recipe((Planted(name, defect, expect, note),), make, coding)


def _write_prompt(video: Path, prompt: str) -> None:
    """A text file beside some videos, a JSON file beside others: both are in use."""
    if not prompt:
        return
    if len(prompt) % 2:
        video.with_suffix(".txt").write_text(prompt + "\n", encoding="utf-8")
    else:
        text = json.dumps({"prompt": prompt}, ensure_ascii=False)
        video.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def _clean() -> list[_Recipe]:
    """Nothing wrong with any of these."""

    def keep(name: str, note: str, shot: Shot, prompt: str, coding: Coding = H264) -> _Recipe:
        return _take(name, "clean", "keep", note, shot, coding=coding, prompt=prompt)

    return [
        keep("harbour.mp4", "24 fps", Shot(1),
             "Boulders tumble past a blue harbour at dusk"),
        keep("desert.mp4", "16 fps, the aspect of 1280x704", Shot(2, 640, 352, 16, 3.5),
             "Stones drift over red desert sand"),
        keep("terrace.mp4", "30 fps, with sound", Shot(3, fps=30),
             "Painted rocks slide over violet paving slabs", Coding(tone=True)),
        keep("pine ridge.mp4", "a space in its name", Shot(4, 640, 352),
             "A green ridge under a bright sky, rocks in the air"),
        keep('slow pan, over "red" sand\'s edge_v2.mp4', "comma, quotes, underscore in its name",
             Shot(30, 480, 272), "A slow pan over red sand, bright stones"),
        keep("Überfahrt_夜明け_ёлка.mp4", "name and prompt beyond ASCII",
             Shot(32, 480, 272), "Morgenlicht über der Wiese, 夜明けの草原"),
    ]  # fmt: skip


_LETTERBOX = (0, 44, 640, 272)
_PILLARBOX = (96, 0, 448, 360)


def _unusual() -> list[_Recipe]:
    """Sound videos in unusual files: none of this is a reason to reject."""
    size = (480, 270)
    lasting = itertools.cycle((0.02, 0.06, 0.035, 0.1, 0.025))
    moments = np.cumsum([0.0, *itertools.islice(lasting, 60)])

    def keep(
        name: str,
        defect: str,
        note: str,
        shot: Shot,
        coding: Coding = H264,
        change: Callable[[Iterator[Image]], Iterable[Image]] = iter,
    ) -> _Recipe:
        return _take(name, defect, "keep", note, shot, change, coding)

    def sideways(frames: Iterator[Image]) -> Iterable[Image]:
        return (np.ascontiguousarray(np.rot90(image, -1)) for image in frames)

    def framed(name: str, shot: Shot, box: tuple[int, int, int, int]) -> _Recipe:
        note = "crop box x,y,w,h = " + ",".join(map(str, box))
        return keep(name, "black borders", note, shot, change=lambda f: bordered(f, box))

    def uneven(folder: Path) -> None:
        encode(folder / "variable_rate.mp4", Shot(9, *size).frames(moments), 24, times=moments)

    return [
        keep("portrait.mp4", "portrait", "270x480", Shot(5, 270, 480)),
        keep("odd_size.mp4", "odd size", "321x243, 4:4:4", Shot(6, 321, 243),
             Coding(pixel_format="yuv444p")),
        keep("ten_bit.mp4", "10-bit", "H.264 High 10", Shot(7, *size),
             Coding(pixel_format="yuv420p10le")),
        keep("hevc.mp4", "HEVC", "H.265 in mp4", Shot(8, *size), Coding("libx265", quality=24)),
        keep("vp9.webm", "VP9", "in webm", Shot(11, *size), Coding("libvpx-vp9", quality=30)),
        keep("av1.mp4", "AV1", "in mp4", Shot(12, *size), Coding("libsvtav1", quality=32)),
        keep("rotated.mov", "rotated", "coded as 480x270, to be turned by 90 degrees",
             Shot(10, 270, 480), Coding(rotation=90), sideways),
        _Recipe((Planted("variable_rate.mp4", "variable frame rate", "keep",
                         "frames last 20 to 100 ms"),), uneven),
        framed("letterbox.mp4", Shot(13), _LETTERBOX),
        framed("pillarbox.mp4", Shot(14), _PILLARBOX),
    ]  # fmt: skip


def _defects() -> list[_Recipe]:
    """Takes with one planted defect each."""

    def into_another(blend: int) -> Callable[[Iterator[Image]], Iterable[Image]]:
        return lambda frames: spliced(list(frames), list(Shot(16).frames()), blend)

    def light(gain: float, offset: float) -> Callable[[Iterator[Image]], Iterable[Image]]:
        table = np.clip(np.arange(256) * gain + offset, 0, 255).astype(np.uint8)
        return lambda frames: (cv2.LUT(image, table) for image in frames)

    def written(
        text: str, first: int, end: int, **style: Any
    ) -> Callable[[Iterator[Image]], Iterable[Image]]:
        return lambda frames: (
            lettering(image, text, **style) if first <= number < end else image
            for number, image in enumerate(frames)
        )

    def soft(frames: Iterator[Image]) -> Iterable[Image]:
        return (cv2.GaussianBlur(image, (0, 0), 3) for image in frames)

    return [
        _take("hard_cut.mp4", "hard cut", "reject:cut_inside", "another scene from frame 36 on",
              Shot(15, seconds=1.5), into_another(0)),
        _take("dissolve.mp4", "dissolve", "reject:cut_inside",
              "0.5 s into another scene, frames 36-47", Shot(17, seconds=2), into_another(12)),
        _take("frozen_tail.mp4", "frozen tail", "reject:frozen", "frames 40-83 repeat frame 39",
              Shot(18, seconds=40 / 24), lambda frames: held(frames, 40, 44)),
        _take("frozen_middle.mp4", "frozen middle", "reject:frozen", "frames 25-60 repeat frame 24",
              Shot(19, seconds=2), lambda frames: held(frames, 25, 36)),
        _take("frozen.mp4", "fully frozen", "reject:frozen", "72 times the same frame",
              Shot(20, seconds=1 / 24), lambda frames: held(frames, 1, 71)),
        _take("hardly_moves.mp4", "hardly any motion", "reject:low_motion",
              "still camera, objects at 5 % of their speed", Shot(21, camera=0, action=0.05)),
        _take("dark.mp4", "nearly black", "reject:too_dark", "7 % of the light",
              Shot(22), light(0.07, 0)),
        _take("overexposed.mp4", "overexposed", "reject:too_bright",
              "most of the frame clipped to white", Shot(23), light(0.9, 165)),
        _take("fog.mp4", "no contrast", "reject:low_contrast", "contrast cut to 6 %",
              Shot(24), light(0.06, 124)),
        _take("blurred.mp4", "blurred", "reject:blurred", "Gaussian blur, sigma 3 pixels",
              Shot(25), soft, Coding(quality=16)),
        _take("subtitle.mp4", "burned-in text", "reject:overlay_text",
              "a subtitle on frames 10-79", Shot(26, seconds=3.5),
              written("The boat leaves at seven", 10, 80, place="bottom", height_share=0.07)),
        _take("watermark.mp4", "corner watermark", "reject:watermark",
              "60 % opaque letters, top right, all the time", Shot(27),
              written("STOCKCLIP", 0, 72, place="top right", height_share=0.06, opacity=0.6)),
        _take("short.mp4", "too short", "reject:too_short", "1.25 s", Shot(28, seconds=1.25)),
        _take("one_frame.mp4", "one frame", "reject:too_short", "a single frame",
              Shot(29, seconds=1 / 24)),
    ]  # fmt: skip


def _copies() -> list[_Recipe]:
    """Exact and near duplicates. Names sort so that the original is met first, but for one pair."""

    def half(frames: Iterable[Image]) -> Iterator[Image]:
        return (cv2.resize(image, (320, 180), interpolation=cv2.INTER_AREA) for image in frames)

    def lake(folder: Path) -> None:
        original, shot = folder / "lake.mp4", Shot(31, fps=30, seconds=4)
        encode(original, shot.frames(), shot.fps)
        _write_prompt(original, "Violet swells under an evening sky")
        shutil.copyfile(original, folder / "lake_copy.mp4")
        frames = list(decoded(original))
        encode(folder / "lake_half_crf35.mp4", half(frames), 30, Coding(quality=35))
        slower = [image for number, image in enumerate(frames) if number % 5 != 4]
        encode(folder / "lake_24fps.mp4", slower, 24)
        inner = (image[5:-5, 10:-10] for image in frames)
        encode(folder / "lake_trimmed.mp4", inner, 30, Coding(quality=23))

    def pier(folder: Path) -> None:
        original, shot = folder / "pier_render.mp4", Shot(33)
        encode(original, shot.frames(), shot.fps)
        _write_prompt(original, "Stones roll along the grey slabs of a pier")
        encode(folder / "pier_preview.mp4", half(decoded(original)), shot.fps, Coding(quality=28))

    twin = "duplicate:lake.mp4"
    return [
        _Recipe((
            Planted("lake.mp4", "original", "keep", "640x360, 30 fps; has four copies"),
            Planted("lake_copy.mp4", "exact copy", "copy:lake.mp4", "the same bytes"),
            Planted("lake_half_crf35.mp4", "re-encoded copy", twin, "320x180, CRF 35"),
            Planted("lake_24fps.mp4", "copy at another rate", twin, "24 fps, every 5th frame gone"),
            Planted("lake_trimmed.mp4", "cropped copy", twin, "3 % off the width and the height"),
        ), lake),
        _Recipe((
            Planted("pier_preview.mp4", "earlier, smaller copy", "duplicate:pier_render.mp4",
                    "320x180, met before the 640x360 original"),
            Planted("pier_render.mp4", "later, larger original", "keep", "replaces its preview"),
        ), pier),
    ]  # fmt: skip


def _transfer() -> list[_Recipe]:
    """An output folder as Cosmos-Transfer2.5 leaves it: one sample finished, one cut off.

    The control video beside each is no generation: it must not be taken in, so it is not planted.
    """

    def sample(name: str, shot: Shot, prompt: str, complete: bool) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            out = folder / "transfer"
            out.mkdir(exist_ok=True)
            for leftover in out.glob(f"{name}.txt"):
                leftover.unlink()
            # The generator's own order of writing: the text comes last and marks the end.
            (out / f"{name}.json").write_text(_transfer_json(name, prompt, shot.seed))
            frames = list(shot.frames())
            edges = (cv2.Canny(image, 100, 200) for image in frames)
            control = (cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) for image in edges)
            encode(out / f"{name}_control_edge.mp4", control, shot.fps, Coding(quality=28))
            encode(out / f"{name}.mp4", frames, shot.fps)
            if complete:
                (out / f"{name}.txt").write_text(prompt)

        return make

    return [
        _Recipe((Planted("transfer/yard.mp4", "Transfer2.5 sample", "keep",
                         "prompt and seed 38 in its JSON, a control video beside it"),),
                sample("yard", Shot(38, 640, 352), "Stones over violet slabs, evening", True)),
        _Recipe((Planted("transfer/garden.mp4", "unfinished Transfer2.5 sample", "incomplete",
                         "the .txt that marks the end is missing"),),
                sample("garden", Shot(39, 640, 352), "Stones over green moss", False)),
    ]  # fmt: skip


def _transfer_json(name: str, prompt: str, seed: int) -> str:
    edge = {"control_path": None, "control_weight": 1.0, "mask_path": None, "mask_prompt": None,
            "preset_edge_threshold": "medium"}  # fmt: skip
    facts = {
        "name": name, "prompt_path": None, "prompt": prompt, "negative_prompt": "low quality",
        "seed": seed, "guidance": 3, "video_path": f"/data/inputs/{name}.mp4", "max_frames": None,
        "context_frame_index": None, "image_context_path": None, "num_conditional_frames": 1,
        "resolution": "720", "sigma_max": None, "num_video_frames_per_chunk": 93, "num_steps": 35,
        "show_control_condition": False, "show_input": False, "keep_input_resolution": True,
        "edge": edge, "depth": None, "vis": None, "seg": None, "guided_generation_mask": None,
        "guided_generation_step_threshold": 25, "guided_generation_foreground_labels": None,
    }  # fmt: skip
    return json.dumps(facts)


def _broken() -> list[_Recipe]:
    """Files that are no whole video."""

    def cut_off(name: str, shot: Shot, coding: Coding) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            encode(folder / name, shot.frames(), shot.fps, coding)
            whole = (folder / name).read_bytes()
            (folder / name).write_bytes(whole[: len(whole) * 6 // 10])

        return make

    def scrambled(folder: Path) -> None:
        path, shot = folder / "scrambled.mp4", Shot(36, 480, 270)
        encode(path, shot.frames(), shot.fps)
        content = path.read_bytes()
        media = content.index(b"mdat") + len(b"mdat")
        junk = np.random.default_rng(7).bytes(len(content) - media)
        path.write_bytes(content[:media] + junk)

    def sound_alone(folder: Path) -> None:
        path = folder / "audio_only.mp4"
        with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
            mux_tone(container, container.add_stream("aac", rate=SOUND_RATE), 3.0)

    def one(
        name: str, defect: str, kind: str, note: str, make: Callable[[Path], object],
        coding: Coding = H264,
    ) -> _Recipe:  # fmt: skip
        return _Recipe((Planted(name, defect, f"failed:{kind}", note),), make, coding)

    words = "This is a list of shots, not a video.\nharbour, desert, terrace\n" * 20
    return [
        one("truncated.mp4", "truncated", "truncated", "index at the front, 60 % of the bytes",
            cut_off("truncated.mp4", Shot(34), H264)),
        one("truncated_no_index.mp4", "truncated, no index", "truncated",
            "the index was at the end, 60 % of the bytes",
            cut_off("truncated_no_index.mp4", Shot(35), Coding(index_first=False))),
        one("scrambled.mp4", "scrambled", "corrupt", "a good index, noise for media", scrambled),
        one("empty.mp4", "empty file", "empty", "no bytes",
            lambda folder: (folder / "empty.mp4").write_bytes(b"")),
        one("text.mp4", "text file", "not_video", "plain text named .mp4",
            lambda folder: (folder / "text.mp4").write_text(words)),
        one("audio_only.mp4", "audio only", "no_video", "a tone of 3 s",
            sound_alone, Coding("aac", pixel_format=None)),
    ]  # fmt: skip
