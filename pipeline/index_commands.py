"""`winnow index`: make the derived indexes anew from the lake, and compare them with it."""

from __future__ import annotations

from typing import Annotated

import typer

from winnow.pipeline.query_commands import IndexOption, LakeOption, StorageOption, TokenOption

index_app = typer.Typer(help="Rebuild and check the vector indexes.", no_args_is_help=True)
FAILED = 1

WaitOption = Annotated[
    bool, typer.Option("--wait", help="where another process writes to the lake, wait for its end")
]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON list on stdout")]


@index_app.command()
def rebuild(
    lake: LakeOption,
    index: IndexOption = None,
    index_token: TokenOption = "",
    wait: WaitOption = False,
    storage_option: StorageOption = None,
    json_output: JsonOption = False,
) -> None:
    """Drop the indexes and make them from the lake. No run and no search may use them meanwhile."""
    from dataclasses import asdict

    from winnow.pipeline.cli import _lake, _pairs
    from winnow.pipeline.console import complain, print_json, say
    from winnow.pipeline.index_check import rebuild_indexes
    from winnow.pipeline.search_index import IndexPlace

    opened = _lake(lake, _pairs(storage_option))
    built = rebuild_indexes(opened, IndexPlace(index, index_token), wait=wait, told=complain)
    if json_output:
        print_json([asdict(one) for one in built])
        return
    for one in built:
        say(str(one))


@index_app.command()
def check(
    lake: LakeOption,
    index: IndexOption = None,
    index_token: TokenOption = "",
    storage_option: StorageOption = None,
    json_output: JsonOption = False,
) -> None:
    """Compare the indexes with the lake; exit code 1 where they differ."""
    from dataclasses import asdict

    from winnow.pipeline.cli import _lake, _pairs
    from winnow.pipeline.console import print_json, say
    from winnow.pipeline.index_check import check_indexes
    from winnow.pipeline.search_index import IndexPlace

    found = check_indexes(_lake(lake, _pairs(storage_option)), IndexPlace(index, index_token))
    if json_output:
        print_json([{**asdict(one), "agrees": one.agrees} for one in found])
    for one in found if not json_output else ():
        say(str(one))
    if not all(one.agrees for one in found):
        raise typer.Exit(FAILED)
