"""SQL over a lake: DuckDB views of what is committed.

`raw_<table>` are the append-only tables; the views without prefix show each source's latest attempt,
the clips of committed attempts, the latest verdict of each clip and policy, and the kept clips.

Where `winnow measure` measured a clip later, `clips` shows the operator's newest measurement: all its
columns together, its error included. `raw_clips` keeps what the run measured, `measurements` the rest.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence

import duckdb
import pyarrow as pa

from winnow.operators.errors import LakeError
from winnow.pipeline.lake import TABLES, Lake, arrow_schema

_COMMITTED = "attempt_id IN (SELECT attempt_id FROM sources)"

# A source that failed or was incomplete is superseded by any later row of the same uri; a done one
# only by the same content, because a file may be overwritten by another generation. Only files that
# have several rows can be: a window over a million rows that have no rival costs seconds.
_CONTESTED = """
    SELECT * FROM raw_sources WHERE hash(uri) IN (
        SELECT hash(uri) FROM raw_sources GROUP BY 1 HAVING count(*) > 1)
    QUALIFY row_number() OVER (
            PARTITION BY uri, CASE WHEN status IN ('done', 'copy') THEN source_id END
            ORDER BY seq DESC, attempt_id) = 1
        AND (status IN ('done', 'copy') OR seq = max(seq) OVER (PARTITION BY uri))"""


def _newest_verdicts(key: Sequence[str], columns: Iterable[str]) -> str:
    """The latest verdict of each `key`. Aggregates, of which DuckDB computes what is asked for."""
    cells = (
        _identifier(name)
        if name in key
        else "max(seq) AS seq"
        if name == "seq"
        else f"arg_max_null({_identifier(name)}, seq) AS {_identifier(name)}"
        for name in columns
    )
    return f"""
        SELECT {", ".join(cells)} FROM raw_verdicts
        WHERE attempt_id IN (SELECT attempt_id FROM raw_sources)
        GROUP BY {", ".join(key)}"""


def _views(sources: str, clips: str, embeddings: str, verdicts: Collection[str]) -> dict[str, str]:
    """By name, in the order of creation. `clips` are those of all attempts, committed or not."""
    of_policy = _newest_verdicts(("clip_id", "policy"), verdicts)
    of_clip = _newest_verdicts(("clip_id",), verdicts)
    return {
        "sources": sources,
        "backfills": "SELECT * FROM raw_backfills",
        "measurements": """
            SELECT * FROM raw_measurements
            WHERE attempt_id IN (SELECT attempt_id FROM raw_backfills)""",
        "clips": f"SELECT * FROM ({clips}) WHERE {_COMMITTED}",
        "embeddings": embeddings,
        "captions": f"SELECT * FROM raw_captions WHERE {_COMMITTED}",
        "verdicts": f"SELECT * FROM ({of_policy}) SEMI JOIN clips USING (clip_id)",
        "latest_verdicts": f"SELECT * FROM ({of_clip}) SEMI JOIN clips USING (clip_id)",
        "dataset": f"""
            SELECT d.* FROM raw_dataset d
            JOIN ({of_policy}) v
              ON v.clip_id = d.clip_id AND v.policy = d.policy AND v.verdict = 'keep'
            WHERE d.{_COMMITTED}""",
        "clips_decided": f"""
            SELECT c.*, s.uri, s.fps, s.width, s.height, s.variable_frame_rate, s.prompt,
                   s.generator, s.input_uri, s.seed, s.group_key, s.duration_s AS source_duration_s,
                   s.seq AS source_seq, s.run_id,
                   v.policy, v.verdict, v.reasons, v.duplicate_of, v.similarity
            FROM ({clips}) c
            JOIN sources s USING (attempt_id)
            LEFT JOIN ({of_clip}) v USING (clip_id)""",
        "runs": "SELECT * FROM raw_runs",
    }


# The measurement of an operator that counts, of each clip.
_NEWEST = """
    SELECT * FROM measurements
    SEMI JOIN (
        SELECT clip_id, operator, arg_max(attempt_id, seq) AS attempt_id
        FROM measurements WHERE {condition} GROUP BY clip_id, operator
    ) newest USING (clip_id, operator, attempt_id)
    WHERE {condition}"""

_EMBEDDINGS_OVERLAID = f"""
    SELECT e.* FROM raw_embeddings e
    LEFT JOIN (
        SELECT clip_id, attempt_id, unnest(embeddings) AS model
        FROM ({_NEWEST.format(condition="true")})
    ) newest USING (clip_id, model)
    WHERE CASE WHEN newest.clip_id IS NULL THEN e.{_COMMITTED}
          ELSE e.attempt_id = newest.attempt_id END"""


def columns_by_operator(
    declared: Iterable[tuple[str, Collection[str]]], present: Collection[str]
) -> dict[str, list[str]]:
    """The columns of `clips` that belong to each operator measured later, of all its versions.

    `declared` are operators with columns as measured, `present` all columns there are. A column
    that no measured version declares belongs to the operator with the longest name it starts with:
    so that what a newer version measures no more is not shown beside the newer version's columns.
    """
    owner = {column: operator for operator, columns in declared for column in columns}
    measured = set(owner.values())
    known = measured | {name[: -len("_error")] for name in present if name.endswith("_error")}
    groups: dict[str, list[str]] = {operator: [] for operator in sorted(measured)}
    for column in present:
        if column not in owner:
            fits = [name for name in known if column.startswith(f"{name}_")]
            owner[column] = max(fits, key=len, default="")
        if owner[column] in groups:
            groups[owner[column]].append(column)
    return groups


def _clips_overlaid(
    declared: Iterable[tuple[str, Collection[str]]], in_clips: list[str], measured: list[str]
) -> str:
    """The clips of a lake with measurements, of all attempts."""
    bookkeeping = {column.name for table in ("clips", "measurements") for column in TABLES[table]}
    present = [n for n in dict.fromkeys((*in_clips, *measured)) if n not in bookkeeping]
    replaced, added, joins, versions = [], [], [], []
    for number, (operator, columns) in enumerate(columns_by_operator(declared, present).items()):
        m, literal = f"m{number}", _literal(operator)
        newest = _NEWEST.format(condition=f"operator = {literal}")
        joins.append(f"LEFT JOIN ({newest}) {m} ON {m}.clip_id = c.clip_id")
        versions.append(
            f"CASE WHEN {m}.clip_id IS NOT NULL THEN map {{{literal}: {m}.operator_version}} END"
        )
        for column in columns:
            name = _identifier(column)
            new = f"{m}.{name}" if column in measured else "NULL"
            if column in in_clips:
                replaced.append(
                    f"CASE WHEN {m}.clip_id IS NULL THEN c.{name} ELSE {new} END AS {name}"
                )
            else:  # a backfill has just added it: this connection's `clips` is a moment older
                added.append(f"{new} AS {name}")
    all_versions = ", ".join(("c.operator_versions", *versions))
    replaced.append(f"map_concat({all_versions}) AS operator_versions")
    return f"""
        SELECT {", ".join((f"c.* REPLACE ({', '.join(replaced)})", *added))}
        FROM raw_clips c
        {" ".join(joins)}"""


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


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
    for name, query in _queries(connection).items():
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


def _queries(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """The views, each as cheap as this lake allows.

    A lake where no source was superseded, and nothing measured later, pays nothing for the
    possibility.
    """
    rows, uris = one_row(connection, "SELECT count(*), count(DISTINCT hash(uri)) FROM raw_sources")
    sources = "SELECT * FROM raw_sources"
    if rows != uris:
        # What is left of the files with several rows; every such file has at least one row there.
        connection.execute(f"CREATE TEMP TABLE contested AS {_CONTESTED}")
        sources += """ WHERE hash(uri) NOT IN (SELECT hash(uri) FROM contested)
            UNION ALL FROM contested"""
    clips = "SELECT * FROM raw_clips"
    embeddings = f"SELECT * FROM raw_embeddings WHERE {_COMMITTED}"
    batches = connection.execute("SELECT DISTINCT operators FROM raw_backfills").fetchall()
    if batches:
        declared = [
            (operator, tuple(made["columns"]))
            for (text,) in batches
            for operator, made in json.loads(text).items()
        ]
        clips = _clips_overlaid(
            declared, *(_columns(connection, f"raw_{t}") for t in ("clips", "measurements"))
        )
        embeddings = _EMBEDDINGS_OVERLAID
    return _views(sources, clips, embeddings, _columns(connection, "raw_verdicts"))


def _columns(connection: duckdb.DuckDBPyConnection, table: str) -> list[str]:
    return [str(row[0]) for row in connection.execute(f"DESCRIBE {table}").fetchall()]


def _text(field: pa.Field, key: str) -> str | None:
    value = (field.metadata or {}).get(key.encode())
    return None if value is None else value.decode()


def one_row(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[object, ...]:
    row = connection.execute(query).fetchone()
    if row is None:
        raise LakeError("the lake answered a count with no row")
    return row
