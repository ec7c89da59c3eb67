"""`winnow sql`: one query over a lake or several, in the format that its reader wants."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from winnow.operators.errors import ConfigError
from winnow.pipeline.lake import TABLES, Lake
from winnow.pipeline.time_travel import is_version, lake_as_of
from winnow.pipeline.views import connect

SHOWN_ROWS = 200


VIEWS_TOLD = (
    "sources, clips, verdicts, latest_verdicts, dataset, embeddings, captions, measurements, backfills, "
    "runs, clips_decided"
)
_NAME = re.compile(r"([A-Za-z_]\w*)=(.+)", re.DOTALL)
_RESERVED = {"memory", "main", "temp", "system", "pg_catalog", "information_schema"}
_SCHEMA = pa.schema(
    [(n, pa.string()) for n in ("table", "column", "type", "meaning", "unit", "range", "direction")]
)


def named_lakes(given: Sequence[str]) -> dict[str, str]:
    """Name and URI of each `--lake`: one lake has no name, several are written NAME=URI.

    Raises ConfigError where names are missing, doubled, or DuckDB's own.
    """
    named = []
    for uri in given:
        match = _NAME.fullmatch(uri)
        named.append((match[1], match[2]) if match else ("", uri))
    if len(named) > 1 and not all(name for name, _ in named):
        raise ConfigError(
            "several lakes in one query need names: --lake old=/data/old --lake new=s3://bucket/new"
        )
    names = [name.lower() for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two lakes are called {name!r}: give each a name of its own")
        if name in _RESERVED:
            raise ConfigError(f"a lake cannot be called {name!r}: DuckDB uses the name itself")
    return dict(named)


def connect_lakes(lakes: Mapping[str, Lake]) -> duckdb.DuckDBPyConnection:
    """A locked connection over several lakes: each lake's views stand under its name."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    for name, lake in lakes.items():
        connection.execute(f"ATTACH ':memory:' AS \"{name}\"")
        with connect(lake) as alone:
            views = alone.execute(
                "SELECT view_name, sql FROM duckdb_views() WHERE NOT internal ORDER BY view_oid"
            ).fetchall()
            for view, query in views:
                if view.startswith("raw_"):
                    _show_raw(connection, alone, lake, name, view)
                else:
                    # Not temporary: its tables are then looked for beside it, in its own lake.
                    connection.execute(f'USE "{name}"')
                    connection.execute(query.replace("CREATE TEMP VIEW", "CREATE VIEW", 1))
    connection.execute("USE memory")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def _show_raw(
    connection: duckdb.DuckDBPyConnection,
    alone: duckdb.DuckDBPyConnection,
    lake: Lake,
    name: str,
    view: str,
) -> None:
    table = view.removeprefix("raw_")
    data = lake.dataset(table) if table in TABLES else None
    if data is None:
        data = alone.sql(f"FROM {view}").to_arrow_table()  # small: documentation, or no row at all
    connection.register(f"{view}_of_{name}", data)
    connection.execute(f'CREATE VIEW "{name}".main.{view} AS FROM "{view}_of_{name}"')


def open_lakes(lakes: Mapping[str, Lake], as_of: str | None) -> duckdb.DuckDBPyConnection:
    """A locked connection over the lakes, now or as they were."""
    if as_of is not None:
        if len(lakes) > 1 and is_version(as_of):
            raise ConfigError(
                "--as-of: a version is one of one lake; give a time for several lakes"
            )
        lakes = {name: lake_as_of(lake, as_of) for name, lake in lakes.items()}
    if list(lakes) == [""]:
        return connect(lakes[""])
    return connect_lakes(lakes)


def write_query(
    lake: Lake | Mapping[str, Lake],
    query: str,
    form: str,
    out: Path | None,
    as_of: str | None = None,
) -> None:
    """Run a query and write its result to a file or stdout. Raises ConfigError for wrong SQL.

    The views of several lakes stand under the lakes' names: `old.clips`.
    """
    lakes = {"": lake} if isinstance(lake, Lake) else lake
    _check_form(form, out)
    with open_lakes(lakes, as_of) as connection:
        try:
            result = connection.sql(query)
            table = pa.table({}) if result is None else result.to_arrow_table()
        except (duckdb.Error, OSError) as error:
            raise ConfigError(f"the query cannot be run: {error}\n{_hint(lakes, as_of)}") from error
    write_table(table, form, out)


def _hint(lakes: Mapping[str, Lake], as_of: str | None) -> str:
    under = (
        ""
        if list(lakes) == [""]
        else f", each under {' and '.join(lakes)}: {next(iter(lakes))}.clips"
    )
    past = "" if as_of is None else (
        "; where files are missing, `lake vacuum` has removed those of that version"
    )  # fmt: skip
    return f"views: {VIEWS_TOLD}{under}; `winnow sql --describe` explains their columns{past}"


def write_description(
    lake: Lake | Mapping[str, Lake],
    table: str | None,
    form: str,
    out: Path | None,
    as_of: str | None = None,
) -> None:
    """Write what the columns mean, of one view or of all. Raises ConfigError for an unknown view."""
    lakes = {"": lake} if isinstance(lake, Lake) else lake
    _check_form(form, out)
    with open_lakes(lakes, as_of) as connection:
        rows = [
            row
            for name in lakes
            for row in _described(connection, f"{name}." if name else "", table)
        ]
    columns = list(zip(*rows, strict=True)) or [()] * len(_SCHEMA)
    write_table(pa.table([list(c) for c in columns], schema=_SCHEMA), form, out)


def _described(
    connection: duckdb.DuckDBPyConnection, prefix: str, table: str | None
) -> list[tuple[str | None, ...]]:
    views = [
        name
        for (name,) in connection.execute(
            "SELECT view_name FROM duckdb_views() WHERE NOT internal AND database_name = ? "
            "AND NOT starts_with(view_name, 'raw_') ORDER BY view_oid",
            [prefix.rstrip(".") or "temp"],
        ).fetchall()
    ]
    if table is not None:
        wanted = table.lower().removeprefix(prefix.lower())
        if wanted not in views:
            near = get_close_matches(wanted, views, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"there is no view {table!r}. {hint}There are: {', '.join(views)}")
        views = [wanted]
    docs: dict[tuple[str, str], tuple[str, ...]] = {
        (row[0], row[1]): row[2:]
        for row in connection.execute(
            "SELECT table_name, column_name, meaning, unit, range, direction "
            f"FROM {prefix}column_docs"
        ).fetchall()
    }
    rows: list[tuple[str | None, ...]] = []
    for view in views:
        for name, kind, *_ in connection.execute(f"DESCRIBE {prefix}{view}").fetchall():
            told = _documented(docs, view, name)
            rows.append((f"{prefix}{view}", name, kind, *told))
    return rows


# Views of several tables: where their columns come from, and what they were called there.
_ORIGINS = ("clips", "sources", "verdicts", "dataset", "embeddings", "captions", "runs")
_RENAMED = {"source_duration_s": ("sources", "duration_s"), "source_seq": ("sources", "seq")}
_OF_DOCS = {
    "table_name": "a view or table of the lake",
    "column_name": "its column",
    "meaning": "what the column says",
    "unit": "its unit",
    "range": "the values that it takes",
    "direction": "whether more of it is better",
}


def _documented(
    docs: Mapping[tuple[str, str], tuple[str, ...]], view: str, column: str
) -> tuple[str | None, ...]:
    """Meaning, unit, range and direction of a view's column."""
    if view == "column_docs":
        return _OF_DOCS.get(column), None, None, None
    tables = (view, "verdicts") if view.endswith("verdicts") else (view, *_ORIGINS)
    places = [(table, column) for table in tables]
    if column in _RENAMED:
        places.insert(0, _RENAMED[column])
    return next((docs[place] for place in places if place in docs), (None,) * 4)


def _check_form(form: str, out: Path | None) -> None:
    if form == "parquet" and out is None:
        raise ConfigError("parquet is binary: name a file with --out")


def write_table(table: pa.Table, form: str, out: Path | None) -> None:
    """Write an Arrow table as `form` (table, json, csv, parquet) to a file or stdout."""
    _check_form(form, out)
    if form == "parquet":
        assert out is not None
        pyarrow.parquet.write_table(table, out)
    elif form == "csv":
        _write_csv(table, out)
    elif form == "json":
        text = json.dumps(table.to_pylist(), default=_plain, indent=1) + "\n"
        _write_text(text, out)
    else:
        _write_text(_as_text(table), out)


def _plain(value: object) -> object:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


def _write_text(text: str, out: Path | None) -> None:
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text, "utf-8")


def _write_csv(table: pa.Table, out: Path | None) -> None:
    # CSV has no lists: they go as JSON text.
    columns = [
        pa.array([None if v is None else json.dumps(v, default=_plain) for v in column.to_pylist()])
        if pa.types.is_nested(column.type) or pa.types.is_binary(column.type)
        else column
        for column in table.columns
    ]
    flat = pa.table(columns, names=table.column_names)
    if out is None:
        sys.stdout.flush()
        pyarrow.csv.write_csv(flat, sys.stdout.buffer)
    else:
        pyarrow.csv.write_csv(flat, out)


def _as_text(table: pa.Table) -> str:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(*table.column_names, box=None)
    for row in table.slice(0, SHOWN_ROWS).to_pylist():
        shown.add_row(*(escape(_cell(value)) for value in row.values()))
    console = Console(
        soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 10_000
    )
    with console.capture() as capture:
        console.print(shown)
        if table.num_rows > SHOWN_ROWS:
            console.print(
                f"{SHOWN_ROWS} of {table.num_rows} rows; --format json|csv|parquet for all"
            )
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, list):
        return "[" + ", ".join(_cell(v) for v in value[:8]) + (", …]" if len(value) > 8 else "]")
    return str(value)
