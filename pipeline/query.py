"""`winnow sql`: one query over the lake, in the format that its reader wants."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from winnow.operators.errors import ConfigError
from winnow.pipeline.lake import Lake
from winnow.pipeline.views import connect

SHOWN_ROWS = 200


def write_query(lake: Lake, query: str, form: str, out: Path | None) -> None:
    """Run a query and write its result to a file or stdout. Raises ConfigError for wrong SQL."""
    if form == "parquet" and out is None:
        raise ConfigError("parquet is binary: name a file with --out")
    with connect(lake) as connection:
        try:
            result = connection.sql(query)
            table = pa.table({}) if result is None else result.to_arrow_table()
        except duckdb.Error as error:
            raise ConfigError(
                f"the query cannot be run: {error}\nviews: sources, clips, verdicts, dataset, "
                "embeddings, runs, clips_decided, column_docs; DESCRIBE <view> lists its columns"
            ) from error
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
