"""`winnow measure`: the backfill from the command line."""

from __future__ import annotations

from typing import Annotated

import typer


def measure(
    lake: Annotated[str, typer.Option("--lake", help="folder or object-store URL of the lake")],
    operators: Annotated[
        list[str], typer.Option("--operators", "-O", help="names, with commas between; repeatable")
    ],
    where: Annotated[
        str, typer.Option("--where", "-w", help="SQL predicate over clips_decided; default: all")
    ] = "",
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", help="has the settings; default: that of the latest run"),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one setting")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="inline or ray; overrides the configuration")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", help="a Ray cluster; default: start Ray here")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="measure again where it failed before")
    ] = False,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="where another process writes to the lake, wait for its end"),
    ] = False,
    storage_option: Annotated[
        list[str] | None,
        typer.Option("--storage-option", metavar="KEY=VALUE", help="object-store setting"),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Run new or newer operators on the clips of a lake. Nothing is split again."""
    from winnow.pipeline.backfill import backfill, latest_settings
    from winnow.pipeline.cli import _lake, _pairs
    from winnow.pipeline.config import load_config
    from winnow.pipeline.console import complain, print_json, run_progress, say

    names = [name.strip() for text in operators for name in text.split(",") if name.strip()]
    options = _pairs(storage_option)
    opened = _lake(lake, options)
    changes = list(overrides or [])
    if engine or ray_address:
        changes.append(f"engine={engine or 'ray'}")
    opened.require()
    settings = load_config(config, changes) if config else latest_settings(opened, changes)
    with run_progress() as progress:
        result = backfill(
            opened, names, where=where, config=settings, retry_failed=retry_failed,
            ray_address=ray_address, progress=progress, options=options, wait=wait,
        )  # fmt: skip
    if json_output:
        print_json(
            {
                "backfill_id": result.backfill_id,
                "operators": result.operators,
                "clips": result.asked,
                **result.counts,
                "measurements": result.measurements,
                "problems": result.problems,
                "examples": result.examples,
                "wall_s": round(result.wall_s, 3),
            }
        )
    else:
        made = ", ".join(f"{name} v{version}" for name, version in result.operators.items())
        say(f"{made}: {result.line}")
        if result.problems:
            kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(result.problems.items()))
            say(f"sources that could not be measured: {kinds}")
        for uri, reason in result.examples:
            complain(f"{uri}: {reason}")
        say(f"{result.wall_s:.1f} s; the ledger balances; {result.backfill_id}")
        if result.measurements:
            say(f"decide by the new columns: winnow refilter --lake {lake} --policy P")
    if result.useless:
        complain("nothing could be measured")
        raise typer.Exit(1)
