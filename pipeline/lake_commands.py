"""`winnow lake`: check, compact and vacuum."""

from __future__ import annotations

from typing import Annotated

import typer

lake_app = typer.Typer(help="Check a lake and keep it tidy.", no_args_is_help=True)

LISTED = 20
"""Files of a vacuum that are named on the terminal; --json names all."""

LakeOption = Annotated[str, typer.Option("--lake", help="folder or object-store URL of the lake")]
StorageOption = Annotated[
    list[str] | None,
    typer.Option("--storage-option", metavar="KEY=VALUE", help="object-store setting; repeatable"),
]
WaitOption = Annotated[
    bool, typer.Option("--wait", help="where another process writes to the lake, wait for its end")
]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]


@lake_app.command("check")
def check(
    lake: LakeOption,
    deep: Annotated[
        bool, typer.Option("--deep", help="hash and decode all media, hash the sources again")
    ] = False,
    storage_option: StorageOption = None,
    json_output: JsonOption = False,
) -> None:
    """Verify that nothing is missing, doubled or dangling. Exit code 1 where something is."""
    from dataclasses import asdict

    from winnow.pipeline.cli import _lake, _pairs
    from winnow.pipeline.console import print_json, say
    from winnow.pipeline.lake_check import check_lake

    result = check_lake(_lake(lake, _pairs(storage_option)), deep=deep)
    if json_output:
        print_json({"sound": result.sound, **asdict(result)})
    else:
        for finding in result.violations:
            say(f"wrong  {finding}")
        for finding in result.notes:
            say(f"note   {finding}")
        for table, rows in result.uncommitted.items():
            say(
                f"note   {table}: {rows} rows of attempts that never committed; nobody sees them, "
                "`winnow lake vacuum` removes them"
            )
        totals = ", ".join(f"{count} {table}" for table, count in result.rows.items() if count)
        verdict = "sound" if result.sound else f"{len(result.violations)} kinds of things are wrong"
        say(f"{verdict}: {totals or 'an empty lake'}")
    if not result.sound:
        raise typer.Exit(1)


@lake_app.command("compact")
def compact(
    lake: LakeOption,
    wait: WaitOption = False,
    storage_option: StorageOption = None,
    json_output: JsonOption = False,
) -> None:
    """Merge the small files of the tables. Nothing that a query shows changes."""
    from dataclasses import asdict

    from winnow.pipeline.cli import _lake, _pairs
    from winnow.pipeline.console import complain, print_json, say
    from winnow.pipeline.lake_maintenance import compact as merge

    done = merge(_lake(lake, _pairs(storage_option)), wait=wait, told=complain)
    if json_output:
        print_json([asdict(table) for table in done])
        return
    for table in done:
        if table.files_before != table.files_after:
            say(
                f"{table.table}: {table.files_before} files of {_size(table.bytes_before)} became "
                f"{table.files_after} of {_size(table.bytes_after)}"
            )
    if all(table.files_before == table.files_after for table in done):
        say("nothing to compact")
    else:
        say("the old files stay for older versions until `winnow lake vacuum`")


@lake_app.command("vacuum")
def vacuum(
    lake: LakeOption,
    yes: Annotated[bool, typer.Option("--yes", help="remove what is listed")] = False,
    keep_hours: Annotated[
        float, typer.Option("--keep-hours", min=0, help="leave alone what is younger")
    ] = 168.0,
    wait: WaitOption = False,
    storage_option: StorageOption = None,
    json_output: JsonOption = False,
) -> None:
    """List what nothing refers to any more: old table files, unfinished rows, unused media."""
    from winnow.pipeline.cli import _lake, _pairs
    from winnow.pipeline.console import complain, print_json, say
    from winnow.pipeline.lake_maintenance import as_json
    from winnow.pipeline.lake_maintenance import vacuum as remove

    found = remove(
        _lake(lake, _pairs(storage_option)),
        yes=yes,
        keep_hours=keep_hours,
        wait=wait,
        told=complain,
    )
    if json_output:
        print_json(as_json(found))
        return
    for rows in found.rows:
        say(f"{rows.table}: {rows.rows} rows of {len(rows.attempts)} attempts never committed")
    for name, files in found.table_files.items():
        total = _size(sum(file.bytes for file in files))
        say(f"{name}: {len(files)} files, {total}, that only older versions need")
    for file in found.media[:LISTED]:
        say(f"media: {file.place}, {_size(file.bytes)}")
    if found.media:
        total = _size(sum(file.bytes for file in found.media))
        say(f"media: {len(found.media)} files, {total}, that no row of the dataset names")
    if found.empty:
        say(f"nothing older than {keep_hours:g} hours is left over")
    elif yes:
        say(f"removed: {_size(found.bytes)}")
    else:
        say(f"nothing was removed: {_size(found.bytes)} would be, with --yes")
    if found.table_files:
        past = "can no longer be read" if yes else "will not be readable then"
        say(f"versions of the tables that were replaced over {keep_hours:g} hours ago {past}")


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
