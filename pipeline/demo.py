"""`winnow demo`: draws videos of which it knows the truth, filters them, and compares."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from winnow.operators.errors import ConfigError, WinnowError
from winnow.pipeline.config import load_config
from winnow.pipeline.console import print_json, run_progress, say
from winnow.pipeline.lake import Lake
from winnow.pipeline.lake_report import write_lake_report
from winnow.pipeline.run import run
from winnow.pipeline.samples import Planted, draw_samples
from winnow.pipeline.views import connect

MARKER = "winnow-demo"


@dataclass(frozen=True, slots=True)
class Compared:
    """One planted sample and what the run made of it."""

    planted: Planted
    found: str
    agrees: bool


def run_demo(folder: Path, engine: str, *, json_output: bool) -> None:
    """Draw, run, compare, report. Raises WinnowError where something planted was not found."""
    started = time.perf_counter()
    _empty(folder)
    samples, lake_folder = folder / "samples", folder / "lake"
    progress_line = Console(stderr=True)
    progress_line.print("drawing sample videos", highlight=False)
    planted = draw_samples(samples, progress=lambda text: progress_line.print(escape(text)))
    drawn = time.perf_counter() - started
    lake = Lake(str(lake_folder.absolute()))
    # The broken samples are as fresh as if they were still being written; they are not.
    config = load_config("cpu", [f"engine={engine}", "stages.ingest.settle_s=0"])
    with run_progress() as progress:
        result = run(config, str(samples), lake, progress=progress)
    compared = compare(lake, samples, planted)
    report = write_lake_report(lake, folder / "report.html")
    wrong = [c for c in compared if not c.agrees]
    if json_output:
        print_json(
            {
                "samples": [
                    {"name": c.planted.name, "defect": c.planted.defect, "planted": c.planted.expect,
                     "found": c.found, "agrees": c.agrees} for c in compared
                ],
                "agree": len(compared) - len(wrong),
                "report": str(report),
                "lake": lake.uri,
                "drawn_s": round(drawn, 2),
                "wall_s": round(time.perf_counter() - started, 2),
                "ledger": result.ledger.lines(),
            }
        )  # fmt: skip
    else:
        _print(compared)
        for line in result.ledger.lines():
            say(line)
        say(f"{len(compared) - len(wrong)} of {len(compared)} samples found as planted; "
            f"drawn in {drawn:.0f} s, filtered in {result.wall_s:.0f} s")  # fmt: skip
        say(f"lake:   {lake.uri}")
        say(f"report: {report}")
    if wrong:
        raise WinnowError(f"{len(wrong)} samples were not found as planted")


def _empty(folder: Path) -> None:
    """Make the folder, or clear one that an earlier demo made; never anything else."""
    import shutil

    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).is_file()):
            raise ConfigError(f"{folder} is not empty and no earlier demo: choose another --out")
        for name in ("samples", "lake"):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("made by `winnow demo`, which may clear it\n")


def compare(lake: Lake, samples: Path, planted: list[Planted]) -> list[Compared]:
    """What the lake says of every planted sample, beside what was planted."""
    root = str(samples.absolute()) + "/"
    clips: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with connect(lake) as connection:
        sources = connection.execute(
            "SELECT uri, status, error_kind, copy_of FROM sources"
        ).fetchall()
        owners = dict(connection.execute("SELECT clip_id, uri FROM clips_decided").fetchall())
        for uri, verdict, reasons, duplicate_of in connection.execute(
            "SELECT uri, verdict, reasons, duplicate_of FROM clips_decided ORDER BY start_frame"
        ).fetchall():
            clips[uri].append(
                {"verdict": verdict, "reasons": reasons, "of": owners.get(duplicate_of)}
            )
    by_name = {uri.removeprefix(root): (status, kind, copy_of, clips[uri])
               for uri, status, kind, copy_of in sources}  # fmt: skip
    return [_compare(sample, by_name.get(sample.name), root) for sample in planted]


def _compare(
    sample: Planted, found: tuple[str, str | None, str | None, list[dict[str, Any]]] | None,
    root: str,
) -> Compared:  # fmt: skip
    if found is None:
        return Compared(sample, "missing", False)
    status, kind, copy_of, clips = found
    wanted, _, detail = sample.expect.partition(":")
    if status == "failed":
        return Compared(sample, f"failed:{kind}", sample.expect == f"failed:{kind}")
    if status == "copy":
        text = f"copy:{(copy_of or '').removeprefix(root)}"
        return Compared(sample, text, sample.expect == text)
    if status == "incomplete":
        return Compared(sample, "incomplete", wanted == "incomplete")
    texts, agrees = [], bool(clips)
    for clip in clips:
        if clip["verdict"] == "duplicate":
            text = f"duplicate:{(clip['of'] or '').removeprefix(root)}"
            agrees &= sample.expect == text
        elif clip["verdict"] == "keep":
            text = "keep"
            agrees &= wanted == "keep"
        else:
            text = f"{clip['verdict']}:{','.join(clip['reasons'])}"
            agrees &= wanted == clip["verdict"] and detail in clip["reasons"]
        texts.append(text)
    return Compared(sample, "; ".join(dict.fromkeys(texts)), agrees)


def _print(compared: list[Compared]) -> None:
    table = Table("", "sample", "what was planted", "planted", "found", box=None)
    for c in compared:
        mark = "[green]✓[/green]" if c.agrees else "[red]✗[/red]"
        table.add_row(mark, escape(c.planted.name), escape(c.planted.defect),
                      escape(c.planted.expect), escape(c.found))  # fmt: skip
    width = None if sys.stdout.isatty() else 200
    Console(width=width).print(table)
