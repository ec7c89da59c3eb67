"""What an export reads: the lake as it was at one moment, its kept clips, and their text as JSON.

JSON has no NaN and no infinities: they become null. Times are ISO 8601 in UTC, keys are sorted,
floats have the shortest form that reads back equal, so the same rows give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from winnow.operators.errors import ConfigError, LakeError
from winnow.pipeline.lake import TABLES, Lake
from winnow.pipeline.policy import load_policy
from winnow.pipeline.time_travel import lake_as_of

BATCH_ROWS = 4096
# A clip in the middle of a backfill or an upgrade may have more than one row: the latest speaks.
_CLIPS = """
    SELECT * EXCLUDE (policy, verdict, reasons, duplicate_of, similarity) FROM clips_decided
    QUALIFY row_number() OVER (PARTITION BY clip_id ORDER BY source_seq DESC, attempt_id) = 1"""
_VERDICTS = """
    SELECT * FROM verdicts WHERE policy = $policy
    QUALIFY row_number() OVER (PARTITION BY clip_id ORDER BY seq DESC, attempt_id) = 1"""
_PRODUCT = """
    SELECT * FROM dataset WHERE policy = $policy
    QUALIFY row_number() OVER (PARTITION BY clip_id ORDER BY media_uri, attempt_id) = 1"""
_CAPTIONS = """
    SELECT clip_id, list({
        'window_number': window_number, 'start_s': start_s, 'end_s': end_s, 'length': length,
        'status': status, 'text': "text", 'flags': flags, 'model': model
    } ORDER BY window_number, length, model) AS captions
    FROM (SELECT * FROM captions QUALIFY row_number() OVER (
        PARTITION BY clip_id, window_number, length, model ORDER BY attempt_id) = 1)
    GROUP BY clip_id"""


@dataclass
class Snapshot(Lake):
    """A lake whose tables stay at the versions that they had at one moment."""

    versions: dict[str, int] = field(default_factory=dict)
    """By table its Delta version; a table that is missing here did not exist."""

    def open(self, table: str) -> DeltaTable | None:
        if table not in self.versions:
            return None
        try:
            return DeltaTable(
                self.table_uri(table),
                version=self.versions[table],
                storage_options=self.options or None,
            )
        except DeltaError as error:
            raise LakeError(
                f"version {self.versions[table]} of table {table} of {self.uri} cannot be opened: "
                f"{error}"
            ) from error

    @classmethod
    def of(cls, lake: Lake, as_of: str | None = None) -> Snapshot:
        """The lake as it is now, or as of a version of `sources`, or of an ISO 8601 time.

        Raises ConfigError or LakeError where there is no such version.
        """
        seen = lake if as_of is None else lake_as_of(lake, as_of)
        seen.require()
        # In the order of TABLES, commit points first: what they refer to is in what is opened later.
        opened = ((name, seen.open(name)) for name in TABLES)
        versions = {name: table.version() for name, table in opened if table is not None}
        return cls(lake.uri, lake.options, versions=versions)


def policy_name(connection: duckdb.DuckDBPyConnection, wanted: str | None) -> str:
    """The policy by the name that its verdicts carry; `wanted` is that, or a policy file.

    None means the policy of the latest run. Raises ConfigError where the lake has no such verdicts.
    """
    rows = connection.execute(
        "SELECT policy FROM verdicts GROUP BY policy ORDER BY max(seq) DESC"
    ).fetchall()
    known = [str(name) for (name,) in rows]
    if not known:
        raise ConfigError("the lake has no verdicts yet: make some with `winnow run`")
    if wanted is None:
        latest = connection.execute(
            "SELECT policy FROM runs ORDER BY finished_at DESC, run_id LIMIT 1"
        ).fetchall()
        return str(latest[0][0]) if latest and latest[0][0] in known else known[0]
    if wanted in known:
        return wanted
    is_file = wanted.endswith((".yaml", ".yml")) and Path(wanted).exists()
    name = load_policy(wanted).name if is_file else wanted
    if name in known:
        return name
    raise ConfigError(
        f"the lake has no verdicts of the policy {name!r}; it has {', '.join(sorted(known))}. Make "
        f"them with `winnow refilter --policy {wanted}`"
    )


def score_columns(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """What operators wrote on clips, pictures left out."""
    plain = {column.name for column in TABLES["clips"]}
    described = connection.execute(
        "SELECT column_name, column_type FROM (DESCRIBE clips)"
    ).fetchall()
    decided = connection.execute("SELECT column_name FROM (DESCRIBE clips_decided)").fetchall()
    known = {name for (name,) in decided}
    return sorted(n for n, kind in described if n not in plain and kind != "BLOB" and n in known)


def kept_clips(
    connection: duckdb.DuckDBPyConnection, policy: str, axes: Sequence[str], scores: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """The policy's dataset, ordered by the axes, then by clip_id. One row a clip."""
    order = "".join(f"coalesce(p.{axis}, 'unknown'), " for axis in axes)
    query = f"""
        WITH c AS ({_CLIPS}), v AS ({_VERDICTS}), p AS ({_PRODUCT}), t AS ({_CAPTIONS})
        SELECT clip_id, c.source_id, c.uri AS source_uri, c.start_s, c.end_s, c.start_frame,
               c.end_frame, c.prompt, c.generator, c.seed, c.group_key, c.run_id,
               v.policy, v.policy_hash, v.verdict, v.reasons,
               p.media_uri, p.bytes AS media_bytes, p.sha256 AS media_sha256,
               p.content_type, p.resolution, p.aspect_ratio, p.length, p.frames, p.fps, p.width, p.height,
               p.duration_s, p.stream_copied, t.captions, c.operator_versions{_selected(scores)}
        FROM p JOIN c USING (clip_id) JOIN v USING (clip_id) LEFT JOIN t USING (clip_id)
        ORDER BY {order}clip_id"""
    yield from _batches(connection, query, policy)


def all_clips(
    connection: duckdb.DuckDBPyConnection,
    policy: str,
    scores: Sequence[str],
    left_out: Mapping[str, str],
) -> Iterator[pa.RecordBatch]:
    """Every clip of the lake with the policy's verdict, NULL where it has none, by clip_id.

    `left_out` are kept clips that could not be exported, with the reason.
    """
    reasons = {"clip_id": list(left_out), "not_exported": list(left_out.values())}
    schema = pa.schema([("clip_id", pa.string()), ("not_exported", pa.string())])
    connection.register("left_out", pa.table(reasons, schema))
    query = f"""
        WITH c AS ({_CLIPS}), v AS ({_VERDICTS}), p AS ({_PRODUCT})
        SELECT clip_id, c.source_id, c.uri AS source_uri, c.start_s, c.end_s, c.start_frame,
               c.end_frame, c.prompt, c.generator, c.seed, c.group_key, c.failure,
               v.policy, v.policy_hash, v.verdict, v.reasons, v.duplicate_of, v.similarity,
               p.media_uri, p.sha256 AS media_sha256, l.not_exported{_selected(scores)}
        FROM c LEFT JOIN v USING (clip_id) LEFT JOIN p USING (clip_id)
        LEFT JOIN left_out l USING (clip_id)
        ORDER BY clip_id"""
    yield from _batches(connection, query, policy)


def kept_without_media(connection: duckdb.DuckDBPyConnection, policy: str) -> list[str]:
    """Clips that the policy keeps and that are not in its dataset."""
    rows = connection.execute(
        f"""SELECT clip_id FROM ({_VERDICTS}) v
            WHERE verdict = 'keep' AND NOT EXISTS (
                SELECT 1 FROM dataset d WHERE d.policy = $policy AND d.clip_id = v.clip_id)
            ORDER BY clip_id""",
        {"policy": policy},
    ).fetchall()
    return [str(clip_id) for (clip_id,) in rows]


def without_hash(connection: duckdb.DuckDBPyConnection, policy: str) -> int:
    """Clips of the policy's dataset that an older version made, of whose media no hash is recorded."""
    rows = connection.execute(
        f"SELECT count(*) FROM ({_PRODUCT}) WHERE sha256 IS NULL", {"policy": policy}
    ).fetchall()
    return int(rows[0][0])


def _selected(scores: Sequence[str]) -> str:
    return "".join(', c."{}"'.format(name.replace('"', '""')) for name in scores)


def _batches(
    connection: duckdb.DuckDBPyConnection, query: str, policy: str
) -> Iterator[pa.RecordBatch]:
    yield from connection.sql(query, params={"policy": policy}).to_arrow_reader(BATCH_ROWS)


def rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The batch's rows; a map is a list of pairs, as Arrow has it."""
    yield from batch.to_pylist()


def json_text(row: Mapping[str, Any], scores: frozenset[str], maps: frozenset[str]) -> str:
    """A row as one line of JSON without the line's end; the scores go under a key of their own."""
    content: dict[str, Any] = {"scores": {}}
    for name, value in row.items():
        target = content["scores"] if name in scores else content
        target[name] = dict(value) if name in maps and value is not None else value
    try:
        return _dumps(content)
    except ValueError:
        return _dumps(_finite(content))


def _dumps(content: Any) -> str:
    return json.dumps(
        content,
        ensure_ascii=False,
        allow_nan=False,
        sort_keys=True,
        separators=(",", ":"),
        default=_plain,
    )


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        if value.tzinfo is None:
            value = value.replace(tzinfo=UTC)
        return value.astimezone(UTC).isoformat(timespec="microseconds")
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def map_columns(schema: pa.Schema) -> frozenset[str]:
    return frozenset(column.name for column in schema if pa.types.is_map(column.type))


def caption_text(row: Mapping[str, Any]) -> str:
    """The best text for a clip: whole captions of its windows in order of time, else the prompt.

    Of the lengths the one that has a whole caption for the most windows is taken; medium goes before
    long and long before short where they have equally many. Of several models the first by name.
    """
    texts: dict[str, dict[int, str]] = {"medium": {}, "long": {}, "short": {}}
    for caption in row["captions"] or ():
        if caption["status"] == "ok" and caption["text"] and caption["length"] in texts:
            texts[caption["length"]].setdefault(caption["window_number"], caption["text"].strip())
    best = max(texts.values(), key=len)
    return " ".join(best[window] for window in sorted(best)) or row["prompt"] or ""
