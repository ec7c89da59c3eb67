"""`winnow materialize`: the media of a policy's dataset, from the command line."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from winnow.pipeline.materialize import MaterializeResult


def materialize(
    lake: Annotated[str, typer.Option("--lake", help="folder or object-store URL of the lake")],
    policy: Annotated[
        str, typer.Option("--policy", "-p", help="name of verdicts in the lake, or its file")
    ],
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", help="has the stages; default: that of the latest run"),
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
    limit: Annotated[int | None, typer.Option(min=1, help="make at most N clips")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="count only, make nothing")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="where a run writes to the lake, wait for its end")
    ] = False,
    storage_option: Annotated[
        list[str] | None,
        typer.Option("--storage-option", metavar="KEY=VALUE", help="object-store setting"),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Make the media of clips that a policy keeps and no run has encoded, from their sources."""
    from winnow.pipeline.backfill import latest_settings
    from winnow.pipeline.cli import _lake, _pairs
    from winnow.pipeline.config import load_config
    from winnow.pipeline.console import print_json, run_progress
    from winnow.pipeline.materialize import materialize as make

    options = _pairs(storage_option)
    opened = _lake(lake, options)
    changes = list(overrides or [])
    if engine or ray_address:
        changes.append(f"engine={engine or 'ray'}")
    opened.require()
    settings = load_config(config, changes) if config else latest_settings(opened, changes)
    with run_progress() as progress:
        result = make(
            opened, policy, config=settings, limit=limit, dry_run=dry_run,
            ray_address=ray_address, progress=progress, options=options, wait=wait,
        )  # fmt: skip
    if json_output:
        print_json(as_json(result))
    else:
        print_materialized(result, lake)
    if result.useless:
        from winnow.pipeline.console import complain

        complain("no clip could be made")
        raise typer.Exit(1)


def command_for(lake: str, policy: str) -> str:
    """The command that makes what a policy's dataset lacks."""
    return f"winnow materialize --lake {shlex.quote(lake)} --policy {shlex.quote(policy)}"


def as_json(result: MaterializeResult) -> dict[str, Any]:
    """A materialisation as one JSON object."""
    return {
        "materialize_id": result.materialize_id,
        "policy": result.policy,
        "kept": result.kept,
        "present": result.present,
        "shared": result.shared,
        "clips": result.asked,
        **result.counts,
        "later": result.later,
        "sources": result.sources,
        "captioned": result.captioned,
        "without_content_type": result.without_type,
        "problems": result.problems,
        "examples": result.examples,
        "written": not result.dry_run,
        "wall_s": round(result.wall_s, 3),
    }


def print_materialized(result: MaterializeResult, lake: str) -> None:
    """The same for people."""
    from winnow.pipeline.console import complain, say

    say(
        f"policy {result.policy} keeps {result.kept} clips: {result.present} in its dataset, "
        f"{result.shared} with media of another policy, {result.asked + result.later} without media"
    )
    if result.dry_run:
        say(f"{result.asked} clips of {result.sources} sources would be made; nothing was written")
        return
    if result.asked:
        say(result.line)
    if result.captioned:
        say(f"{result.captioned} clips have captions now")
    if result.without_type:
        say(f"{result.without_type} clips have no content type: they lie under `unknown`")
    if result.problems:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(result.problems.items()))
        say(f"what could not be made: {kinds}")
    for place, reason in result.examples:
        complain(f"{place}: {reason}")
    if result.later:
        say(f"{result.later} clips are left for later: {command_for(lake, result.policy)}")
    say(f"{result.wall_s:.1f} s; the ledger balances; {result.materialize_id}")
