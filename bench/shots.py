"""Shot detection measured on real videos: python bench/shots.py [--videos DIR] [--json].

Takes of ../shared/videos without a cut inside are joined into files whose boundaries are known:
hard cuts with every take at its own frame rate in one file, hard cuts resampled to one rate, and
dissolves of 0.5 s. Reports precision, recall and F1 within 2 frames, cuts reported inside the
generated videos (there are none), the share of frames that the network saw, and the CPU time
against decoding alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from winnow.operators.frames import decode
from winnow.operators.shots import AdaptiveDetector, Detector, TransNetV2Detector, scan_shots

TOLERANCE = 2
SIZE = (448, 256)
TICKS = 90_000
# The film's own cuts and fades, found by looking: takes are what lies between them.
CAMERA_TAKES = {
    "tests__cosmos_curate__pipelines__video__data__test_clip_10s.mp4": [
        (4, 82),
        (180, 214),
        (214, 240),
    ],
    "tests__ops__data__video1.mp4": [(16, 144), (144, 237), (237, 278)],
    "tests__ops__data__video2.mp4": [(0, 90), (200, 290), (400, 490)],
    "tests__ops__data__video4.mp4": [(0, 90), (260, 350), (500, 590)],
}
Take = tuple[list[NDArray[np.uint8]], Fraction]
Truth = list[tuple[int, int]]  # frames [start, end) of each transition; start == end for a cut


def read_take(path: Path, start: int = 0, end: int | None = None, longest: int = 48) -> Take:
    """Frames at SIZE and their rate."""
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate or Fraction(24)
    frames = []
    for number, frame in enumerate(decode(path)):
        if number >= start and (end is None or number < end) and len(frames) < longest:
            small = frame.reformat(width=SIZE[0], height=SIZE[1], format="rgb24")
            frames.append(small.to_ndarray())
    return frames, rate


def resample(take: Take, rate: Fraction) -> Take:
    """The nearest earlier frame at every tick of another rate."""
    frames, own = take
    count = int(len(frames) * rate / own)
    return [frames[int(i * own / rate)] for i in range(count)], rate


def write(path: Path, frames: Iterable[tuple[NDArray[np.uint8], Fraction]]) -> None:
    """Encode frames, each with its own duration in seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "23", "preset": "fast"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS)
        now = Fraction(0)
        for image, duration in frames:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(now * TICKS), Fraction(1, TICKS)
            container.mux(stream.encode(frame))
            now += duration
        container.mux(stream.encode(None))


def join_cuts(path: Path, takes: list[Take]) -> Truth:
    write(path, ((image, 1 / rate) for frames, rate in takes for image in frames))
    ends = np.cumsum([len(frames) for frames, _ in takes])[:-1].tolist()
    return [(end, end) for end in ends]


def join_dissolves(path: Path, takes: list[Take], length: int) -> Truth:
    joined = list(takes[0][0])
    truth: Truth = []
    for frames, _ in takes[1:]:
        start = len(joined) - length
        for k in range(length):
            weight = (k + 1) / (length + 1)
            joined[start + k] = cv2.addWeighted(joined[start + k], 1 - weight, frames[k], weight, 0)
        joined.extend(frames[length:])
        truth.append((start, start + length))
    write(path, ((image, 1 / takes[0][1]) for image in joined))
    return truth


def score(truth: Truth, found: list[tuple[int, int]]) -> dict[str, int]:
    """Each found transition may match one true one, within TOLERANCE."""
    unused = list(found)
    hits = 0
    for start, end in truth:
        for candidate in unused:
            if candidate[0] <= end + TOLERANCE and candidate[1] >= start - TOLERANCE:
                unused.remove(candidate)
                hits += 1
                break
    return {"true": len(truth), "hits": hits, "false": len(unused)}


def summary(counts: list[dict[str, int]]) -> dict[str, float]:
    true, hits, false = (sum(c[key] for c in counts) for key in ("true", "hits", "false"))
    precision, recall = hits / max(1, hits + false), hits / max(1, true)
    f1 = 2 * precision * recall / max(1e-9, precision + recall)
    figures = {"precision": precision, "recall": recall, "f1": f1}
    return {"true": true, "false": false, **{k: round(v, 3) for k, v in figures.items()}}


def leaked(truth: Truth, found: list[tuple[int, int]]) -> int:
    """Dissolve frames that a found transition leaves in the shots (misses not counted)."""
    inside = {i for start, end in found for i in range(start, end)}
    return sum(
        len(set(range(start, end)) - inside)
        for start, end in truth
        if any(a <= end and b >= start for a, b in found)
    )


def cpu_seconds(work: Callable[[], object]) -> float:
    """Least CPU time of three goes: the machine may be busy with other things."""
    goes = []
    for _ in range(3):
        before = time.process_time()
        work()
        goes.append(time.process_time() - before)
    return min(goes)


def measure(videos: Path, takes_each: int, joined: int, seed: int = 0) -> dict[str, Any]:
    cv2.setNumThreads(1)
    generated = sorted((videos / "generated").rglob("*.mp4"))
    sources: list[tuple[Path, int, int | None]] = [(path, 0, None) for path in generated]
    for name, spans in CAMERA_TAKES.items():
        sources += [(videos / "camera" / name, start, end) for start, end in spans]
    rng = np.random.default_rng(seed)
    detectors: dict[str, Detector] = {
        "transnetv2": TransNetV2Detector(),
        "adaptive": AdaptiveDetector(),
    }
    result: dict[str, Any] = {name: {} for name in detectors}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "joined.mp4"
        for kind in ("cuts, own rates", "cuts, 24 fps", "dissolves, 16 fps", "dissolves, 30 fps"):
            counts: dict[str, list[dict[str, int]]] = {name: [] for name in detectors}
            left = dict.fromkeys(detectors, 0)
            order = rng.permutation(len(sources))[:takes_each]
            for part in np.array_split(order, max(1, len(order) // joined)):
                takes = [read_take(*sources[i]) for i in part]
                if kind != "cuts, own rates":
                    rate = Fraction(int(kind.split()[1]))
                    takes = [resample(take, rate) for take in takes]
                if kind.startswith("cuts"):
                    truth = join_cuts(path, takes)
                else:
                    length = int(takes[0][1] / 2)
                    takes = [take for take in takes if len(take[0]) > 2 * length + 4]
                    truth = join_dissolves(path, takes, length)
                for name, detector in detectors.items():
                    found = [(t.start, t.end) for t in scan_shots(path, detector).transitions]
                    counts[name].append(score(truth, found))
                    left[name] += leaked(truth, found)
            for name in detectors:
                result[name][kind] = summary(counts[name])
                print(name, kind, result[name][kind], file=sys.stderr, flush=True)
                if kind.startswith("dissolves"):
                    result[name][kind]["dissolve_frames_in_shots"] = left[name]
    small = [path for path in generated if path.parent.name == "videophy2"]

    def decode_all() -> None:
        for path in small:
            for _ in decode(path):
                pass

    decoding = cpu_seconds(decode_all)
    for name, detector in detectors.items():
        scans = [scan_shots(path, detector) for path in generated]
        result[name]["generated, no cuts"] = {
            "videos": len(generated),
            "false": sum(len(scan.transitions) for scan in scans),
            "share_examined": round(
                sum(s.examined_frames for s in scans) / sum(s.frames for s in scans), 3
            ),
            "cpu_time_over_decoding": round(
                cpu_seconds(lambda d=detector: [scan_shots(path, d) for path in small])  # type: ignore[misc]
                / decoding,
                2,
            ),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[2] / "shared" / "videos"
    parser.add_argument("--videos", type=Path, default=default)
    parser.add_argument("--takes", type=int, default=24, help="takes per table")
    parser.add_argument("--joined", type=int, default=12, help="takes per joined file")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.videos.is_dir():
        parser.error(f"no videos at {options.videos}: pass --videos")
    result = measure(options.videos, options.takes, options.joined)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for detector, tables in result.items():
        print(detector)
        for kind, figures in tables.items():
            print(f"  {kind:20}", "  ".join(f"{key} {value}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
