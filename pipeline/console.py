"""What a person sees on the terminal: progress, results, tables. All but results goes to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)
from rich.table import Table

from winnow.pipeline.run import Progress, RunResult
from winnow.stages.records import Source

if TYPE_CHECKING:
    from winnow.pipeline.doctor import Finding
    from winnow.pipeline.search import Hit

LINE_EVERY_S = 15.0
_errors = Console(stderr=True)
_output = Console(soft_wrap=True)


def say(text: str) -> None:
    """A line for people on stdout."""
    _output.print(escape(text), highlight=False)


def complain(text: str) -> None:
    """A line for people on stderr."""
    _errors.print(escape(text), highlight=False)


def print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2, default=str) + "\n")


@contextmanager
def run_progress() -> Iterator[Progress]:
    """Progress of a run: a bar on a terminal, an occasional line elsewhere."""
    if not _errors.is_terminal:
        yield Progress(_lines(), complain)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Bars(*columns, console=_errors, transient=True) as bars:
        task = bars.add_task("starting", total=None)

        def report(done: int, total: int, source: Source | None) -> None:
            name = "sources" if source is None else source.key[-40:]
            bars.update(task, completed=done, total=total, description=escape(name))

        yield Progress(report, complain)


def _lines() -> Any:
    last = time.monotonic()

    def report(done: int, total: int, source: Source | None) -> None:
        nonlocal last
        now = time.monotonic()
        if source is None or done == total or now - last >= LINE_EVERY_S:
            last = now
            _errors.print(f"{done} of {total} sources", highlight=False)

    return report


def print_run(result: RunResult, lake: str) -> None:
    """The ledger of a run, and how to look further."""
    extra = []
    if result.skipped:
        extra.append(f"{result.skipped} files were already in the lake")
    if result.not_generations:
        extra.append(f"{result.not_generations} control or mask videos are no generations")
    if result.not_readable:
        extra.append(f"{len(result.not_readable)} entries of the input could not be taken up")
    if result.ledger.sources_in == 0:
        say("nothing to do: " + ("; ".join(extra) or "no file matches the patterns of ingest"))
        _list_unreadable(result)
        return
    for line in result.ledger.lines():
        say(line)
    if failures := result.ledger.failures:
        say("failed: " + ", ".join(f"{n} {kind}" for kind, n in failures.items()))
        if "internal" in failures:
            say("`internal` is a fault of Winnow, not of the file: see the column sources.error")
    for line in extra:
        say(line)
    _list_unreadable(result)
    for pool in result.workers:
        busy = "" if pool["busy_share"] is None else f", its model busy {pool['busy_share']:.0%}"
        say(f"stage {pool['stage']}: up to {pool['most_at_once']} workers at once{busy}")
    say(f"{result.wall_s:.1f} s; the ledger balances; run {result.run_id}")
    say(f"look: winnow report --lake {lake} --out report.html")


def _list_unreadable(result: RunResult) -> None:
    for key, reason in result.not_readable[:10]:
        _errors.print(f"not taken up: {escape(key)}: {escape(reason)}", highlight=False)


def print_models(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("model", "role", "MB", "licence", "from", "here", box=None)
    for row in rows:
        gated = " (gated)" if row["gated"] else ""
        table.add_row(
            row["name"],
            row["role"],
            str(row["size_mb"] or ""),
            escape(row["licence"]) + gated,
            escape(row["identity"]),
            "yes" if row["present"] else "no",
        )
    _output.print(table)


def print_hits(hits: Sequence[Hit]) -> None:
    if not hits:
        say("no clip of the lake has a semantic vector of that backbone yet")
        return
    table = Table("similarity", "verdict", "from", "to", "uri", "prompt", box=None)
    for hit in hits:
        table.add_row(
            f"{hit.similarity:.3f}",
            hit.verdict or "",
            f"{hit.start_s:.2f}",
            f"{hit.end_s:.2f}",
            escape(hit.uri),
            escape((hit.prompt or "")[:60]),
        )
    _output.print(table)


def print_operators(described: Sequence[dict[str, Any]]) -> None:
    table = Table("operator", "v", "column", "unit", "range", "meaning", box=None)
    for operator in described:
        for number, column in enumerate(operator["columns"]):
            table.add_row(
                operator["name"] if number == 0 else "",
                str(operator["version"]) if number == 0 else "",
                column["name"],
                column["unit"],
                escape(column["range"]),
                escape(column["meaning"]),
            )
    _output.print(table)


def print_findings(findings: Sequence[Finding]) -> None:
    marks = {"ok": "[green]ok  [/green]", "gap": "[yellow]gap [/yellow]", "bad": "[red]bad [/red]"}
    for finding in findings:
        _output.print(f"{marks[finding.state]} {escape(finding.subject)}: {escape(finding.found)}",
                      highlight=False)  # fmt: skip
        if finding.cost:
            _output.print(f"     {escape(finding.cost)}", highlight=False)
