"""Run every benchmark one after the other; `make bench`."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from pathlib import Path

BENCHMARKS = ("operators", "whole_run", "memory", "shots", "fingerprint", "models", "lake", "index")
OUT = Path(__file__).parent / "out"


def main() -> None:
    OUT.mkdir(exist_ok=True)
    results: dict[str, object] = {
        "machine": platform.platform(),
        "python": platform.python_version(),
    }
    for name in sys.argv[1:] or BENCHMARKS:
        started = time.perf_counter()
        print(f"== {name}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", f"bench.{name}", "--json"],
            stdout=subprocess.PIPE, text=True, check=False, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        print(done.stdout, f"({time.perf_counter() - started:.0f} s)", flush=True)
        try:
            results[name] = json.loads(done.stdout)
        except ValueError:
            results[name] = {"failed": done.stdout[-2000:]}
    (OUT / "results.json").write_text(json.dumps(results, indent=1))
    print(f"written: {OUT / 'results.json'}")


if __name__ == "__main__":
    main()
