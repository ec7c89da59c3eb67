"""`winnow export`. Heavy imports happen inside the command, so that --help answers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from winnow.pipeline.export import ExportResult

FAILED = 1
SHOWN_PROBLEMS = 20
SECONDS_BETWEEN_LINES = 30.0


class ExportFormat(StrEnum):
    webdataset = "webdataset"
    parquet = "parquet"
    jsonl = "jsonl"


def export(
    lake: Annotated[str, typer.Option("--lake", help="folder or object-store URL of the lake")],
    out: Annotated[str, typer.Option("--out", "-o", help="folder or object-store URL to fill")],
    policy: Annotated[
        str | None,
        typer.Option("--policy", "-p", help="whose kept clips; default: the latest run's policy"),
    ] = None,
    output: Annotated[ExportFormat, typer.Option("--format", "-f")] = ExportFormat.webdataset,
    by: Annotated[
        str, typer.Option("--by", help="axes that become folders, with commas between; or none")
    ] = "content_type,resolution,aspect_ratio,length",
    max_shard_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="default: 1 GB for tar shards, else 128 MiB (of rows as JSON)"),
    ] = None,
    as_of: Annotated[
        str | None,
        typer.Option(
            "--as-of", help="a version of the table sources, or a time such as 2026-11-20"
        ),
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing", help="finish without clips whose media are missing or damaged"
        ),
    ] = False,
    storage_option: Annotated[
        list[str] | None,
        typer.Option(
            "--storage-option", metavar="KEY=VALUE", help="object-store setting; repeatable"
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Export the kept clips of a policy as shards, with a manifest of all clips.

    Stopped or killed, it goes on where it was: the same lake version gives the same bytes.
    """
    from winnow.pipeline.export import ExportSettings
    from winnow.pipeline.export import export as write_export
    from winnow.pipeline.lake import Lake

    settings = ExportSettings(
        policy=policy,
        form=output.value,
        by=tuple(axis.strip() for axis in by.split(",") if axis.strip() not in ("", "none")),
        max_shard_bytes=max_shard_bytes,
        as_of=as_of,
        allow_missing=allow_missing,
    )
    opened = Lake(lake if "://" in lake else str(Path(lake).absolute()), _pairs(storage_option))
    target = out if "://" in out else str(Path(out).absolute())
    with _progress() as report:
        result = write_export(opened, target, settings, report)
    _show(result, json_output=json_output)
    if not result.complete:
        raise typer.Exit(FAILED)


def _show(result: ExportResult, *, json_output: bool) -> None:
    from dataclasses import asdict

    from winnow.pipeline.console import complain, print_json, say

    for problem in result.problems[:SHOWN_PROBLEMS]:
        complain(f"clip {problem.clip_id}: {problem.reason} ({problem.media_uri or 'no uri'})")
    if len(result.problems) > SHOWN_PROBLEMS:
        complain(f"and {len(result.problems) - SHOWN_PROBLEMS} more")
    if not result.complete:
        complain(
            "the export is not complete and has no index; none of these clips is in a shard. Bring "
            "the media back and run the same command again, or add --allow-missing to leave these "
            "clips out"
        )
    if result.media_without_hash:
        complain(
            f"{result.media_without_hash} clips are of an older version that recorded no hash of "
            "their media: only the size was compared"
        )
    if result.resumed_versions:
        complain(
            "the lake has moved on since this export began; it was finished as it began. Run the "
            "command again for the lake as it is now"
        )
    if json_output:
        print_json(asdict(result))
        return
    say(
        f"policy {result.policy}: {result.clips} clips in {len(result.shards)} shards, "
        f"{result.bytes} bytes, {result.kept_shards} shards were there already; in {result.out}"
    )


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, an occasional line elsewhere."""
    import sys
    import time

    from rich.console import Console
    from rich.progress import Progress

    from winnow.pipeline.console import complain

    if sys.stderr.isatty():
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("clips", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    told = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            complain(f"{done} of {total} clips exported")

    yield report


def _pairs(settings: list[str] | None) -> dict[str, str]:
    pairs = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise typer.BadParameter(
                f"{setting!r}: write it as KEY=VALUE", param_hint="--storage-option"
            )
        pairs[key] = value
    return pairs
