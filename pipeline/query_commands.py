"""`winnow sql` and `winnow search`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

LakeOption = Annotated[str, typer.Option("--lake", help="folder or object-store URL of the lake")]
LakesOption = Annotated[
    list[str],
    typer.Option(
        "--lake",
        metavar="[NAME=]URI",
        help="folder or object-store URL of the lake; several, each with a name: NAME.clips",
    ),
]
StorageOption = Annotated[
    list[str] | None,
    typer.Option("--storage-option", metavar="KEY=VALUE", help="object-store setting; repeatable"),
]
IndexOption = Annotated[
    str | None,
    typer.Option("--index", help="a Milvus server's URL; default: milvus-lite beside the tables"),
]
TokenOption = Annotated[
    str, typer.Option("--index-token", envvar="WINNOW_INDEX_TOKEN", help="that server's token")
]


class Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"
    parquet = "parquet"


def sql(
    lake: LakesOption,
    query: Annotated[
        str | None, typer.Argument(help="a SELECT over the lake's views; with --describe, a view")
    ] = None,
    output: Annotated[Format, typer.Option("--format", "-f")] = Format.table,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write to a file")] = None,
    describe: Annotated[
        bool, typer.Option("--describe", help="explain the columns of a view, or of all")
    ] = False,
    as_of: Annotated[
        str | None,
        typer.Option(
            "--as-of",
            metavar="VERSION|TIME",
            help="the lake as it was: a version of `sources`, or a time (UTC where it does not say)",
        ),
    ] = None,
    storage_option: StorageOption = None,
) -> None:
    """Query a lake or several by SQL; --describe lists the views and their columns."""
    from winnow.operators.errors import ConfigError
    from winnow.pipeline.cli import _lake, _pairs
    from winnow.pipeline.query import named_lakes, write_description, write_query

    options = _pairs(storage_option)
    lakes = {name: _lake(uri, options) for name, uri in named_lakes(lake).items()}
    if describe:
        write_description(lakes, query, output.value, out, as_of)
    elif query is None:
        raise ConfigError("write a query, or --describe for what there is to query")
    else:
        write_query(lakes, query, output.value, out, as_of)


def search(
    lake: LakeOption,
    text: Annotated[
        str | None, typer.Option("--text", "-t", help="clips that show what a text says")
    ] = None,
    video: Annotated[
        str | None, typer.Option("--video", help="clips that look and move like a video file")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option("--clip", metavar="ID", help="clips that look and move like a clip"),
    ] = None,
    words: Annotated[
        str | None, typer.Option("--words", "-w", help="clips with words in prompt or captions")
    ] = None,
    count: Annotated[int, typer.Option("-k", min=1, max=1000, help="how many clips")] = 10,
    where: Annotated[
        str | None,
        typer.Option(metavar="SQL", help="only clips for which this is true, over clips_decided"),
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="a models file; default: the one of the lake's latest run")
    ] = None,
    index: IndexOption = None,
    index_token: TokenOption = "",
    storage_option: StorageOption = None,
    json_output: Annotated[bool, typer.Option("--json", help="one JSON list on stdout")] = False,
) -> None:
    """Find clips: by a text, a video, a clip, or words about them."""
    from dataclasses import asdict

    from winnow.operators.errors import ConfigError
    from winnow.pipeline import search as by
    from winnow.pipeline.cli import _lake, _pairs
    from winnow.pipeline.console import print_hits, print_json, say
    from winnow.pipeline.search_index import IndexPlace

    if sum(one is not None for one in (text, video, clip, words)) != 1:
        raise ConfigError("say what to look for: one of --text, --video, --clip and --words")
    options = _pairs(storage_option)
    opened, place = _lake(lake, options), IndexPlace(index, index_token)
    if text is not None:
        hits = by.search_text(opened, text, count, models=models, where=where, place=place)
    elif video is not None:
        hits = by.search_video(opened, video, count, where=where, place=place, options=options)
    elif clip is not None:
        hits = by.search_clip(opened, clip, count, where=where, place=place)
    else:
        hits = by.search_words(opened, str(words), count, where=where, place=place)
    if json_output:
        print_json([asdict(hit) for hit in hits])
    elif hits:
        print_hits(hits)
    else:
        say("no clip was found")
