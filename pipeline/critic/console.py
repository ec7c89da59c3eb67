"""What a person sees of the critic on the terminal. All but results goes to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from rich.progress import Progress as Bars
from rich.table import Table

from winnow.operators.critic.calibration import Calibration
from winnow.pipeline.console import LINE_EVERY_S, say
from winnow.pipeline.critic.probe import ProbeResult
from winnow.pipeline.critic.probe_table import probe_table, remarks
from winnow.pipeline.critic.report import FIGURES, figure, rows

_errors = Console(stderr=True)
_output = Console(soft_wrap=True)


@contextmanager
def progress(what: str = "videos") -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, an occasional line elsewhere, called with (done, total)."""
    if not _errors.is_terminal:
        yield _lines(what)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Bars(*columns, console=_errors, transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _lines(what: str) -> Callable[[int, int], None]:
    last = -LINE_EVERY_S

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= LINE_EVERY_S:
            last = now
            _errors.print(f"{done} of {total} {what}", highlight=False)

    return report


def print_scores(found: Sequence[Mapping[str, Any]]) -> None:
    """Every file with its score and trace."""
    for one in found:
        name = escape(Path(one["video"]).name)
        if one["status"] != "ok":
            _output.print(f"[yellow]{one['status']}[/yellow]  {name}", highlight=False)
            if one.get("error"):
                say(f"  {one['error']}")
            continue
        odds = "  ".join(f"{n}: {p:.2f}" for n, p in enumerate(one["probabilities"], 1))
        _output.print(f"[bold]{one['score']:.2f}[/bold]  {name}", highlight=False)
        leaked = "" if one.get("leaked") is None else f"; {one['leaked']:.1%} beside them"
        say(f"  {odds}  (likeliest {one['argmax']}, entropy {one['entropy']:.2f}{leaked})")
        if one.get("samples"):
            votes = ", ".join("none" if vote is None else str(vote) for vote in one["samples"])
            say(f"  votes: {votes}")
        for note in one.get("notes") or ():
            say(f"  {note}")
        if one.get("trace"):
            say("  " + one["trace"].replace("\n", "\n  "))


def print_evaluation(results: Mapping[str, Any], folder: Path) -> None:
    """The figures beside the baselines, and what went wrong."""
    coverage = results["coverage"]
    table = Table(
        "figure", "critic", "95 % interval", "commonest", "always 4", "best blind", box=None
    )
    for row in rows(results):
        interval = "" if row.low is None else f"{figure(row.low)} to {figure(row.high)}"
        table.add_row(
            escape(FIGURES[row.name][0]),
            figure(row.value),
            interval,
            figure(row.blind.get("majority")),
            figure(row.blind.get("constant_4")),
            figure(row.best_blind),
        )
    _output.print(table)
    say(f"{coverage['judged']} of {coverage['chosen']} videos judged" + _failures(coverage))
    if coverage["without_truth"]:
        say(f"{coverage['without_truth']} examples without a truth are left out")
    speed = results["speed"]
    if speed["videos_per_s"]:
        say(f"{speed['videos_now']} videos in {speed['wall_s']:.1f} s")
    say(f"look: {folder / 'report.html'}")


def _failures(coverage: Mapping[str, Any]) -> str:
    if not coverage["failures"]:
        return ""
    return "; failed: " + ", ".join(f"{n} {kind}" for kind, n in coverage["failures"].items())


def print_comparison(found: Mapping[str, Any]) -> None:
    """The figures of both, what differs, and how sure that is."""
    for side in ("a", "b"):
        one = found[side]
        alone = one["videos_of_this_one_only"]
        left = f"; {alone} videos only here, left out" if alone else ""
        model = ", ".join(one["model"] or [])
        say(f"{side.upper()}: {one['folder']}: {model}, {one['mode']}, {one['prompt']}{left}")
    say(
        f"{found['n']} videos of {found['groups']} prompts, {found['judged_by_both']} judged by both"
    )
    table = Table("figure", "A", "B", "B - A", "95 % interval", "p", "p (Holm)", box=None)
    for one in found["differences"]:
        name = FIGURES.get(one["metric"], (one["metric"], ""))[0]
        interval = "" if one["low"] is None else f"{figure(one['low'])} to {figure(one['high'])}"
        table.add_row(
            escape(name),
            figure(one["a"]),
            figure(one["b"]),
            figure(one["difference"]),
            interval,
            figure(one["p_value"], 4),
            figure(one["p_holm"], 4),
        )
    _output.print(table)
    test = found["mcnemar"]
    say(
        f"right in A only: {test['only_a']}, in B only: {test['only_b']} "
        f"(McNemar p {test['p_value']:.4f})"
    )
    say(found["verdict"])


def print_probes(result: ProbeResult) -> None:
    """The table of probes, and what is to be read with it."""
    _output.print(probe_table(result))
    for remark in remarks(result):
        say(remark)


def print_calibration(made: Calibration) -> None:
    """What the fit changes, and what its thresholds keep."""
    on, figures = made.fitted_on, made.figures
    say(f"{made.critic}: {on.examples} rated videos of {on.groups} prompts of {on.dataset}")
    columns = [("before", figures.before), ("after", figures.after)]
    if figures.held_out is not None:
        columns.append(("held out", figures.held_out))
    table = Table("", *(name for name, _ in columns), box=None)
    for name in type(figures.before).model_fields:
        table.add_row(name, *(figure(getattr(each, name)) for _, each in columns))
    _output.print(table)
    cuts = ", ".join(f"{cut:.2f}" for cut in made.cut_points)
    say(f"temperature {made.temperature:.2f}; cut points {cuts}")
    for threshold in made.thresholds:
        say(threshold.text or f"precision {threshold.precision:g}: limit {threshold.limit}")
    for note in made.notes:
        say(note)
