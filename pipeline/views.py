"""SQL over a lake: DuckDB views of what is committed.

`raw_<table>` are the append-only tables; the views without prefix show each source's latest attempt,
the clips of committed attempts, the latest verdict of each clip and policy, and the kept clips.
"""

from __future__ import annotations

import duckdb
import pyarrow as pa

from winnow.operators.errors import LakeError
from winnow.pipeline.lake import TABLES, Lake, arrow_schema

_COMMITTED = "attempt_id IN (SELECT attempt_id FROM sources)"

VIEWS: dict[str, str] = {
    # A source that failed or was incomplete is superseded by any later row of the same uri; a done
    # one only by the same content, because a file may be overwritten by another generation.
    "sources": """
        SELECT * FROM raw_sources
        QUALIFY row_number() OVER (
            PARTITION BY uri, CASE WHEN status IN ('done', 'copy') THEN source_id END
            ORDER BY seq DESC, attempt_id) = 1
          AND (status IN ('done', 'copy')
               OR seq = max(seq) OVER (PARTITION BY uri))""",
    "clips": f"SELECT * FROM raw_clips WHERE {_COMMITTED}",
    "embeddings": f"SELECT * FROM raw_embeddings WHERE {_COMMITTED}",
    "captions": f"SELECT * FROM raw_captions WHERE {_COMMITTED}",
    "verdicts": """
        SELECT * FROM raw_verdicts
        WHERE attempt_id IN (SELECT attempt_id FROM raw_sources)
          AND clip_id IN (SELECT clip_id FROM clips)
        QUALIFY row_number() OVER (PARTITION BY clip_id, policy ORDER BY seq DESC) = 1""",
    "latest_verdicts": """
        SELECT * FROM verdicts
        QUALIFY row_number() OVER (PARTITION BY clip_id ORDER BY seq DESC) = 1""",
    "dataset": f"""
        SELECT d.* FROM raw_dataset d
        JOIN verdicts v ON v.clip_id = d.clip_id AND v.policy = d.policy AND v.verdict = 'keep'
        WHERE d.{_COMMITTED}""",
    "clips_decided": """
        SELECT c.*, s.uri, s.fps, s.width, s.height, s.variable_frame_rate, s.prompt, s.generator,
               s.seed, s.group_key, s.duration_s AS source_duration_s, s.seq AS source_seq, s.run_id,
               v.policy, v.verdict, v.reasons, v.duplicate_of, v.similarity
        FROM clips c
        JOIN sources s USING (attempt_id)
        LEFT JOIN latest_verdicts v USING (clip_id)""",
    "runs": "SELECT * FROM raw_runs",
}


def connect(lake: Lake, *, locked: bool = True) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the lake's views.

    With `locked`, SQL can read the lake's tables and nothing else on the machine.
    Raises LakeError where there is no lake.
    """
    lake.require()
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    described = []
    for table, columns in TABLES.items():
        dataset = lake.dataset(table)
        data = arrow_schema(columns).empty_table() if dataset is None else dataset
        connection.register(f"raw_{table}", data)
        described += [
            (table, f.name, *(_text(f, key) for key in ("meaning", "unit", "range", "direction")))
            for f in data.schema
        ]
    for name, query in VIEWS.items():
        connection.execute(f"CREATE TEMP VIEW {name} AS {query}")
    docs = ("table_name", "column_name", "meaning", "unit", "range", "direction")
    rows = [dict(zip(docs, row, strict=True)) for row in described]
    connection.register(
        "raw_docs", pa.Table.from_pylist(rows, pa.schema([(k, pa.string()) for k in docs]))
    )
    connection.execute("CREATE TEMP VIEW column_docs AS SELECT * FROM raw_docs")
    if locked:
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
    return connection


def _text(field: pa.Field, key: str) -> str | None:
    value = (field.metadata or {}).get(key.encode())
    return None if value is None else value.decode()


def one_row(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[object, ...]:
    row = connection.execute(query).fetchone()
    if row is None:
        raise LakeError("the lake answered a count with no row")
    return row
