"""The whole `winnow run` on the videophy2 clips four times over: 108 files, dedup off, start included.

The files are copies with a few bytes of metadata added, so that none is an exact copy of another.
NeMo Curator's CPU pipeline took 103 s for a part of this work on two cores (notes/measured.md).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from winnow.operators.settings import find_config

CURATOR_S = 103.0
WINNOW = Path(sys.executable).parent / "winnow"


def multiply(videos: Path, folder: Path, times: int) -> int:
    """Copies of every mp4, each with its own `free` box at the end; returns how many."""
    count = 0
    for video in sorted(videos.glob("*.mp4")):
        content = video.read_bytes()
        for k in range(times):
            box = (9).to_bytes(4, "big") + b"free" + bytes([k])
            (folder / f"{k}-{video.name[:80]}.mp4").write_bytes(content + box)
            count += 1
    return count


def without_dedup(folder: Path) -> Path:
    config = yaml.safe_load(find_config("cpu")[0])
    config["stages"] = [s for s in config["stages"] if s["stage"] != "dedup"]
    path = folder / "no_dedup.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def measure(videos: Path, engine: str, times: int = 4) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as name:
        folder = Path(name)
        (folder / "in").mkdir()
        files = multiply(videos, folder / "in", times)
        command = [WINNOW, "run", "--config", without_dedup(folder), "--engine", engine, "--json",
                   "--input", folder / "in", "--lake", folder / "lake"]  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        wall = time.perf_counter() - started
        result = json.loads(done.stdout)
    return {
        "engine": engine,
        "files": files,
        "clips": result["clips"],
        "verdicts": result["verdicts"],
        "wall_s": round(wall, 2),
        "clips_per_s": round(result["clips"] / wall, 2),
        "of_curator": round(wall / CURATOR_S, 3),
        "stages": result["stages"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=Path, default=Path("../shared/videos/generated/videophy2"))
    parser.add_argument("--engine", choices=("inline", "ray"), action="append")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = [measure(arguments.videos, e) for e in arguments.engine or ("inline", "ray")]
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    for r in results:
        print(f"{r['engine']}: {r['files']} files in {r['wall_s']} s = {r['clips_per_s']} clips/s, "
              f"{r['of_curator']} of NeMo Curator's {CURATOR_S:.0f} s")  # fmt: skip
        for stage in r["stages"]:
            print(f"   {stage['stage']:24} {stage['seconds']:8.2f} s")


if __name__ == "__main__":
    main()
