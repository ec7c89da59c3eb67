"""How well the fingerprint tells copies from different clips, on the real videos.

    python bench/fingerprint.py [--videos ../shared/videos] [--work /tmp/fp_eval] [--json]

Encodes transformed copies of every video once (into --work, reused; minutes on the first run),
takes all fingerprints and compares every copy with every original. Also hard negatives: clips that
share a scene and differ in what happens. Exit code 1 where a requirement is missed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from winnow.operators.fingerprint import MODEL, Fingerprint
from winnow.operators.frames import Span, read_spans
from winnow.operators.operator import ClipView, FrameChunk, Needs

THRESHOLD = 0.80
"""Advice to the dedup stage: halfway between the least similar copy (0.87, a 4 s clip of 8 fps at
4 fps) and the most similar halves of one clip in which something moves (0.74)."""

REQUIRED_RECALL = 0.95
REQUIRED = ("crf35", "half", "crop3", "crop6", "fps_other", "fps_twice", "fps_half")
CHUNK = 32
SEED = 7

Vector = NDArray[np.float32]
Luma = NDArray[np.uint8]


@dataclass(frozen=True)
class Video:
    path: Path
    fps: float
    generated: bool


def transformations(fps: float) -> dict[str, tuple[str, int]]:
    """Name -> (ffmpeg filter, CRF)."""

    def scaled(filter_name: str, share: float) -> str:
        return f"{filter_name}=trunc(iw*{share}/2)*2:trunc(ih*{share}/2)*2"

    other, back = (12, 24) if fps <= 8 else (15, 30)
    mild_all = f"{scaled('crop', 0.97)},{scaled('scale', 0.5)},fps={other}"
    strong_all = f"{scaled('crop', 0.94)},{scaled('scale', 0.5)},fps={other},fps={back}"
    return {
        "crf35": ("null", 35),
        "half": (scaled("scale", 0.5), 23),
        "crop3": (scaled("crop", 0.97), 23),
        "crop6": (scaled("crop", 0.94), 23),
        "crop_corner": (scaled("crop", 0.97) + ":0:0", 23),
        "fps_other": (f"fps={other}", 23),
        "fps_twice": (f"fps={other},fps={back}", 23),
        "fps_blend": (f"framerate=fps={back}", 23),
        "fps_half": (f"fps={fps / 2}", 23),
        "bright": ("eq=brightness=0.06:contrast=1.1", 23),
        "dark": ("eq=brightness=-0.06:contrast=0.88:gamma=0.92", 23),
        "combined": (mild_all + ",eq=brightness=0.04:contrast=0.94", 35),
        "combined_hard": (strong_all + ",eq=brightness=-0.05:contrast=1.1", 35),
        # Not required to be found; reported.
        "bordered": ("pad=iw:ceil(ih*1.25/2)*2:0:(oh-ih)/2", 23),
        "mirrored": ("hflip", 23),
        "reversed": ("reverse", 23),
    }


NOT_COPIES = ("bordered", "mirrored", "reversed")


def read_manifest(videos: Path) -> list[Video]:
    with (videos / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return [
            Video(videos / row["path"], float(row["fps"]), row["path"].startswith("generated/"))
            for row in csv.DictReader(file)
        ]


def transformed(video: Video, name: str, videos: Path, work: Path) -> Path:
    """The transformed copy, encoded unless it is there already."""
    relative = video.path.relative_to(videos).as_posix()
    target = work / f"{hashlib.sha1(relative.encode()).hexdigest()[:10]}_{name}.mp4"
    if target.exists():
        return target
    picture, crf = transformations(video.fps)[name]
    partial = target.with_suffix(".part.mp4")
    subprocess.run(
        [
            imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", str(video.path),
            "-map", "0:v:0", "-an", "-vf", picture, "-c:v", "libx264", "-preset", "veryfast",
            "-crf", str(crf), "-pix_fmt", "yuv420p", "-threads", "1", "-filter_threads", "1",
            str(partial),
        ],
        check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    partial.rename(target)
    return target


def read_luma(path: Path, fps: float) -> tuple[Luma, NDArray[np.float64]]:
    """(n, h, w) small luma and (n,) seconds of a whole file."""
    chunks: list[FrameChunk] = []
    read_spans(
        path, [Span(0, 1 << 30)], fps, Needs(luma=True), lambda _, chunk: chunks.append(chunk)
    )
    luma = np.concatenate([chunk.luma for chunk in chunks if chunk.luma is not None])
    return luma, np.concatenate([chunk.seconds for chunk in chunks])


def chunked(luma: Luma, seconds: NDArray[np.float64]) -> Iterator[FrameChunk]:
    for first in range(0, len(luma), CHUNK):
        part = slice(first, first + CHUNK)
        pictures = np.ones(len(luma[part]), np.int8)
        yield FrameChunk(first, seconds[part] - seconds[0], pictures, luma[part])


class Stopwatch:
    frames = 0
    seconds = 0.0


def fingerprint(luma: Luma, seconds: NDArray[np.float64], watch: Stopwatch) -> Vector:
    """The clip's vector; a zero vector where it has none."""
    step = float(np.median(np.diff(seconds))) if len(seconds) > 1 else 1 / 24
    view = ClipView("bench", len(luma), 1 / step, luma.shape[2], luma.shape[1], "raw")
    chunks = list(chunked(luma, seconds))
    start = time.perf_counter()
    measurement = Fingerprint().start(view)
    for chunk in chunks:
        measurement.update(chunk)
    vector = measurement.vectors().get(MODEL)
    watch.seconds += time.perf_counter() - start
    watch.frames += len(luma)
    return np.zeros(256, np.float32) if vector is None else vector


def other_motion(scene: Luma, motion: Luma) -> Luma:
    """The first frame of one clip, moved by another's changes: one prompt image, another seed."""
    height, width = scene.shape[1:]
    moves = np.stack(
        [cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in motion]
    ).astype(np.float32)
    return np.clip(scene[:1] + 0.7 * (moves - moves[:1]), 0, 255).astype(np.uint8)


def watched_scene(scene: Luma, rng: np.random.Generator, frames: int = 96) -> Luma:
    """A fixed camera with sensor noise, and a small object that crosses at random."""
    height, width = scene.shape[1:]
    start, end = rng.uniform(0.1, 0.9, (2, 2)) * (width, height)
    still = scene[0].astype(np.float32)
    out = np.empty((frames, height, width), np.uint8)
    for number, share in enumerate(np.linspace(0, 1, frames)):
        centre = start + (end - start) * share
        image = still.copy()
        cv2.circle(image, (int(centre[0]), int(centre[1])), 6, float(255 - still.mean()), -1)
        out[number] = np.clip(image + rng.normal(0, 2, image.shape), 0, 255)
    return out


def describe(values: list[float]) -> dict[str, Any]:
    array = np.array(values)
    return {
        "pairs": len(array),
        "min": round(float(array.min()), 3),
        "median": round(float(np.median(array)), 3),
        "max": round(float(array.max()), 3),
        "at_threshold": int((array >= THRESHOLD).sum()),
    }


def evaluate(videos: Path, work: Path) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    clips = read_manifest(videos)
    watch = Stopwatch()
    lumas = [read_luma(clip.path, clip.fps) for clip in clips]
    originals = np.stack([fingerprint(*pair, watch) for pair in lumas])
    names = list(transformations(24))
    vectors: dict[str, NDArray[np.float32]] = {}
    for name in names:
        vectors[name] = np.stack(
            [
                fingerprint(*read_luma(transformed(clip, name, videos, work), clip.fps), watch)
                for clip in clips
            ]
        )
        print(f"{name}: measured", file=sys.stderr)

    different = ~np.eye(len(clips), dtype=bool)
    copies, found_false = {}, []
    among_originals = originals @ originals.T
    upper = np.triu_indices(len(clips), 1)
    for name in names:
        across = vectors[name] @ originals.T
        copies[name] = {**describe(list(np.diag(across))), "required": name in REQUIRED}
        copies[name]["recall"] = round(copies[name]["at_threshold"] / len(clips), 3)
        if name not in NOT_COPIES:
            found_false.append(across[different])

    rng = np.random.default_rng(SEED)
    generated = [k for k, clip in enumerate(clips) if clip.generated]
    hard: dict[str, list[float]] = {"first half, second half": [], "one image, two seeds": [],
                                    "fixed camera, two pieces": []}  # fmt: skip

    def similarity(one: Luma, two: Luma) -> float:
        first, second = (fingerprint(luma, np.arange(len(luma)) / 24, watch) for luma in (one, two))
        return float(first @ second)

    for position, k in enumerate(generated):
        luma = lumas[k][0]
        half = len(luma) // 2
        hard["first half, second half"].append(similarity(luma[:half], luma[half:]))
        one, two = (lumas[generated[(position + step) % len(generated)]][0] for step in (1, 2))
        hard["one image, two seeds"].append(
            similarity(other_motion(luma, one), other_motion(luma, two))
        )
        hard["fixed camera, two pieces"].append(
            similarity(watched_scene(luma, rng), watched_scene(luma, rng))
        )

    true = [float(x) for n in names if n not in NOT_COPIES
            for x in np.diag(vectors[n] @ originals.T)]  # fmt: skip
    required = [float(x) for n in REQUIRED for x in np.diag(vectors[n] @ originals.T)]
    false = np.concatenate([among_originals[upper], *found_false])
    return {
        "threshold": THRESHOLD,
        "clips": len(clips),
        "copies": copies,
        "hard_negatives": {name: describe(values) for name, values in hard.items()},
        "required_recall": round(float(np.mean(np.array(required) >= THRESHOLD)), 4),
        "all_recall": round(float(np.mean(np.array(true) >= THRESHOLD)), 4),
        "different_pairs": {
            "among_originals": len(upper[0]),
            "with_copies": int(sum(len(x) for x in found_false)),
            "called_duplicates": int((false >= THRESHOLD).sum()),
            "max": round(float(false.max()), 3),
        },
        "min_true": round(min(true), 3),
        "margin": round(min(true) - float(false.max()), 3),
        "ms_per_frame": round(watch.seconds / watch.frames * 1000, 4),
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"threshold {result['threshold']}, {result['clips']} clips")
    print(
        f"{'':28s} {'pairs':>6s} {'min':>7s} {'median':>7s} {'max':>7s} {'called duplicates':>18s}"
    )
    for name, row in {**result["copies"], **result["hard_negatives"]}.items():
        print(
            f"{name:28s} {row['pairs']:6d} {row['min']:7.3f} {row['median']:7.3f} "
            f"{row['max']:7.3f} {row['at_threshold']:18d}"
        )
    pairs = result["different_pairs"]
    print(
        f"recall: required {result['required_recall']:.4f}, all copies {result['all_recall']:.4f}\n"
        f"different pairs: {pairs['among_originals']} among originals, {pairs['with_copies']} with "
        f"copies; called duplicates {pairs['called_duplicates']}\n"
        f"least similar copy {result['min_true']}, most similar different pair {pairs['max']}, "
        f"margin {result['margin']}\n{result['ms_per_frame']} ms a frame"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).resolve().parents[2]
    parser.add_argument("--videos", type=Path, default=here / "shared" / "videos")
    parser.add_argument("--work", type=Path, default=Path("/tmp/fp_eval"))
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    if not (arguments.videos / "manifest.csv").exists():
        print(f"no manifest.csv in {arguments.videos}: give --videos", file=sys.stderr)
        return 2
    cv2.setNumThreads(1)
    result = evaluate(arguments.videos, arguments.work)
    if arguments.json:
        print(json.dumps(result))
    else:
        print_table(result)
    met = result["required_recall"] >= REQUIRED_RECALL
    return 0 if met and result["different_pairs"]["called_duplicates"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
