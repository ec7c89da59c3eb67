"""Peak memory of every process of a run on 1080p video, and whether it grows with its length."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import imageio_ffmpeg
import psutil

WINNOW = Path(sys.executable).parent / "winnow"


TAKE_S = 20


def draw(path: Path, seconds: int) -> None:
    """A moving 1080p picture at 30 fps: a take of 20 s, again and again."""
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    take = path.with_name("take.mkv")
    source = f"mandelbrot=s=1920x1080:r=30:end_scale=0.3,noise=alls=6:allf=t,trim=duration={TAKE_S}"
    subprocess.run(
        [ffmpeg, "-v", "error", "-y", "-f", "lavfi", "-i", source, "-c:v", "libx264",
         "-preset", "ultrafast", "-pix_fmt", "yuv420p", str(take)],
        check=True,
    )  # fmt: skip
    subprocess.run(
        [ffmpeg, "-v", "error", "-y", "-stream_loop", str(seconds // TAKE_S - 1), "-i", str(take),
         "-c", "copy", str(path)],
        check=True,
    )  # fmt: skip
    take.unlink()


def peak(folder: Path, seconds: int) -> dict[str, object]:
    (folder / f"in{seconds}").mkdir()
    draw(folder / f"in{seconds}" / "v.mp4", seconds)
    command = [WINNOW, "run", "--input", folder / f"in{seconds}", "--lake", folder / f"lake{seconds}",
               "--set", "stages.transcode.crf=30", "--json"]  # fmt: skip
    started = time.perf_counter()
    process = psutil.Popen([str(c) for c in command], stdout=subprocess.DEVNULL)
    largest: dict[str, int] = {}
    while process.poll() is None:
        for member in (process, *_children(process)):
            try:
                name = Path(member.name()).name
                largest[name] = max(largest.get(name, 0), member.memory_info().rss)
            except psutil.Error:
                continue
        time.sleep(0.02)
    return {
        "seconds": seconds,
        "wall_s": round(time.perf_counter() - started, 1),
        "exit": process.returncode,
        "peak_mib": {name: round(value / 2**20) for name, value in largest.items()},
        "largest_mib": round(max(largest.values()) / 2**20),
    }


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, nargs="+", default=[20, 60, 180])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as folder:
        results = [peak(Path(folder), seconds) for seconds in arguments.seconds]
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    for r in results:
        print(f"{r['seconds']:4} s of 1080p: largest process {r['largest_mib']} MiB {r['peak_mib']}, "
              f"{r['wall_s']} s")  # fmt: skip


if __name__ == "__main__":
    main()
