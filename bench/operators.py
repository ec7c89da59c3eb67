"""What the cheap operators cost, as a share of decoding alone.

    python bench/operators.py [--repeat 5] [--json]     speed, decode-only and operators interleaved
    python bench/operators.py --table [--columns a,b]   every column of every video under the folder

`decode` is PyAV alone in one process with two frame threads. The others run on two workers with one
thread each, as the pipeline does: frame threads would make the motion vectors differ from run to
run (see open_video). Absolute figures depend on the machine and on what else runs there; the ratios,
taken within each repetition, are the measure.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import av
import cv2

from winnow.operators.border import Border
from winnow.operators.errors import MeasureError
from winnow.operators.exposure import Exposure
from winnow.operators.frames import Span, decode, read_spans
from winnow.operators.frozen import Frozen
from winnow.operators.motion import Motion
from winnow.operators.operator import ClipView, FrameChunk, Needs, Operator
from winnow.operators.sharpness import Sharpness
from winnow.operators.thumbnail import Thumbnail

VIDEOS = Path(__file__).resolve().parents[2] / "shared" / "videos" / "generated"
OPERATORS: tuple[Operator, ...] = (
    Border(), Motion(), Frozen(), Exposure(), Sharpness(), Thumbnail(),
)  # fmt: skip
THREADS = 2


def union(operators: Sequence[Operator]) -> Needs:
    """What all operators together want to be shown."""
    needs = [operator.needs for operator in operators]
    return Needs(
        luma=any(n.luma for n in needs),
        motion_vectors=any(n.motion_vectors for n in needs),
        samples=tuple(dict.fromkeys(sampling for n in needs for sampling in n.samples)),
    )


def count_frames(path: Path) -> int:
    return sum(1 for _ in decode(path, threads=THREADS))


def view_of(path: Path, frames: int) -> ClipView:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        fps = float(stream.average_rate or 0)
        return ClipView(path.stem, frames, fps, context.width, context.height, context.name)


def measure(
    view: ClipView, path: Path, operators: Sequence[Operator], spent: dict[str, float]
) -> dict[str, Any]:
    """Columns of one whole file; CPU seconds of each operator are added to `spent`."""
    measurements = {operator.name: operator.start(view) for operator in operators}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.thread_time()
        try:
            return work()
        finally:
            spent[name] = spent.get(name, 0.0) + time.thread_time() - began

    def receive(_: int, chunk: FrameChunk) -> None:
        for name, measurement in measurements.items():
            timed(name, partial(measurement.update, chunk))

    span = Span(0, view.frames)
    read_spans(path, [span], view.fps, union(operators), receive)
    columns: dict[str, Any] = {}
    for name, measurement in measurements.items():
        try:
            columns |= timed(name, measurement.columns)
        except MeasureError as error:
            columns[f"{name}_error"] = str(error)
    return columns


def decode_only(path: Path, view: ClipView) -> dict[str, float]:
    for _ in decode(path):
        pass
    return {}


def read_only(path: Path, view: ClipView) -> dict[str, float]:
    span = Span(0, view.frames)
    read_spans(path, [span], view.fps, union(OPERATORS), lambda _k, _chunk: None)
    return {}


def all_operators(path: Path, view: ClipView) -> dict[str, float]:
    spent: dict[str, float] = {}
    measure(view, path, OPERATORS, spent)
    return spent


def by_workers(
    pool: ProcessPoolExecutor,
    views: dict[Path, ClipView],
    work: Callable[[Path, ClipView], dict[str, float]],
) -> tuple[float, Counter[str]]:
    """Seconds for all files on two workers, and the CPU seconds that they report, summed."""
    began = time.perf_counter()
    spent: Counter[str] = Counter()
    for seconds in pool.map(work, views.keys(), views.values()):
        spent.update(seconds)
    return time.perf_counter() - began, spent


def by_frame_threads(views: dict[Path, ClipView]) -> float:
    """Seconds to decode all files in this process, one after the other, with two threads."""
    began = time.perf_counter()
    for path in views:
        count_frames(path)
    return time.perf_counter() - began


def benchmark(views: dict[Path, ClipView], repeat: int) -> dict[str, Any]:
    frames = sum(view.frames for view in views.values())
    # Longest first, so that the workers end together.
    views = dict(sorted(views.items(), key=lambda item: -item[1].frames * item[1].width))
    seconds: dict[str, list[float]] = {}
    spent: Counter[str] = Counter()
    works = {"decode_workers": decode_only, "reader": read_only, "operators": all_operators}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(THREADS, context, cv2.setNumThreads, (1,)) as pool:
        by_workers(pool, views, decode_only)  # the workers start and import
        for _ in range(repeat):
            seconds.setdefault("decode", []).append(by_frame_threads(views))
            for name, work in works.items():
                taken, reported = by_workers(pool, views, work)
                seconds.setdefault(name, []).append(taken)
                spent.update(reported)

    def ratio(name: str, base: str) -> float:
        pairs = zip(seconds[base], seconds[name], strict=True)
        return round(statistics.median(alone / with_work for alone, with_work in pairs), 3)

    return {
        "videos": len(views),
        "frames": frames,
        "repeat": repeat,
        "frames_per_second": {
            name: round(frames / statistics.median(taken)) for name, taken in seconds.items()
        },
        "of_decode_only": {name: ratio(name, "decode") for name in works},
        "of_decode_workers": {name: ratio(name, "decode_workers") for name in works},
        "operator_microseconds_per_frame": {
            name: round(taken / repeat / frames * 1e6, 1) for name, taken in spent.items()
        },
    }


def print_benchmark(result: dict[str, Any]) -> None:
    print(f"{result['videos']} videos, {result['frames']} frames, {result['repeat']} repetitions")
    print("| what | frames/s | of decode | of decode_workers |\n|---|---|---|---|")
    for name, rate in result["frames_per_second"].items():
        ratios = [result[f"of_{base}"].get(name) for base in ("decode_only", "decode_workers")]
        print(f"| {name} | {rate} |", " | ".join(f"{r:.2f}" if r else "" for r in ratios), "|")
    print("\n| operator | CPU µs per frame |\n|---|---|")
    for name, cost in result["operator_microseconds_per_frame"].items():
        print(f"| {name} | {cost} |")


def print_table(views: dict[Path, ClipView], wanted: list[str]) -> None:
    for path, view in views.items():
        columns = measure(view, path, OPERATORS, {})
        shown = {k: v for k, v in columns.items() if not wanted or k in wanted}
        print(f"{path.stem[:40]:40s}", *(f"{k}={_shown(v)}" for k, v in shown.items()))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{len(value)}B" if isinstance(value, bytes) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--videos", type=Path, help="folder of videos (default: the shared ones)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--table", action="store_true", help="print the columns of every video")
    parser.add_argument("--columns", default="", help="with --table: only these, by commas")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    # The speed target was set on the videophy2 clips; the table is of all generated videos.
    default = VIDEOS if arguments.table else VIDEOS / "videophy2"
    paths = sorted((arguments.videos or default).rglob("*.mp4"))
    if not paths:
        print(f"no videos under {arguments.videos or default}", file=sys.stderr)
        return 2
    views = {path: view_of(path, count_frames(path)) for path in paths}
    if arguments.table:
        print_table(views, [name for name in arguments.columns.split(",") if name])
        return 0
    result = benchmark(views, arguments.repeat)
    if arguments.json:
        print(json.dumps(result))
    else:
        print_benchmark(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
