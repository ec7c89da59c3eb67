"""Decide over the whole lake from stored scores, for `winnow refilter` and `winnow policy`.

A million clips are decided as columns: the rules by one query of the policy's evaluator, the verdicts
once for each distinct outcome, dedup by pipeline/replay.py.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from winnow.operators.errors import LakeError
from winnow.operators.operator import Column
from winnow.pipeline.calibrated import not_calibrated
from winnow.pipeline.config import DedupConfig, RunConfig
from winnow.pipeline.input_clips import InputClips, find_input_clips
from winnow.pipeline.lake import Lake
from winnow.pipeline.percentiles import Limit
from winnow.pipeline.policy import SOURCE_COLUMNS, Evaluator, Judged, Policy
from winnow.pipeline.replay import Duplicates, affected, replay
from winnow.pipeline.views import connect
from winnow.pipeline.worker import verdict

EXACT_CLIPS = 200_000
"""Up to so many clips with an embedding, dedup is decided anew from the beginning."""
MEMORY = "1GB"
"""What DuckDB may hold; it writes the rest to disk."""

# Bookkeeping of the clips table: everything else there is for rules.
_SKIPPED = ("source_id", "attempt_id", "operator_versions", "source_seq", "run_id", "uri")
_DECIDED = ("policy", "verdict", "reasons", "duplicate_of", "similarity")
_FROM_SOURCE = {
    "fps": "fps", "width": "width", "height": "height", "prompt": "prompt", "seed": "seed",
    "variable_frame_rate": "variable_frame_rate", "generator": "generator", "group_key": "group_key",
    "source_duration_s": "duration_s", "input_uri": "input_uri",
}  # fmt: skip


@dataclass
class Decisions:
    """What a policy says of every clip of a lake, in the order of ingestion."""

    table: pa.Table
    """Columns clip_id, attempt_id, verdict, reasons, duplicate_of, similarity; `old`, the verdict
    before, and `has_media`, of whatever policy."""
    limits: list[Limit]
    not_calibrated: list[str]
    inputs: InputClips | None
    """Which clips the policy's ratio rules compared; None where it has none."""


def decide(lake: Lake, policy: Policy, config: RunConfig) -> Decisions:
    """Apply a policy to every clip of the lake; writes nothing. Raises LakeError, ConfigError."""
    dedup = config.stage("dedup")
    with open_lake(lake) as connection:
        declared = declared_columns(connection)
        evaluator = Evaluator(policy, declared, threads=os.cpu_count() or 1)
        table = _read(connection, policy, evaluator, [c.name for c in declared])
        inputs = None
        if policy.needs_inputs:
            inputs = find_input_clips(connection, table)
        judged = evaluator.judge_all(table, policy.rules, None if inputs is None else inputs.row)
        passed = np.array([not a and not b for a, b in judged.outcomes], np.bool_)
        duplicates = Duplicates.none(table.num_rows)
        if dedup is not None:
            duplicates = _deduplicate(connection, table, passed[judged.outcome], dedup)
    without = [] if policy.calibration_any_model else not_calibrated(table, policy.calibration)
    return Decisions(_verdicts(table, judged, duplicates), judged.limits, without, inputs)


def open_lake(lake: Lake) -> duckdb.DuckDBPyConnection:
    """The lake's tables, for our own queries: bounded memory, the rest goes to disk."""
    connection = connect(lake, locked=False)
    connection.execute("SET memory_limit = ?", [MEMORY])
    connection.execute("SET temp_directory = ?", [tempfile.gettempdir()])
    connection.execute("SET preserve_insertion_order = false")
    return connection


def declared_columns(connection: duckdb.DuckDBPyConnection) -> list[Column]:
    """The columns that rules may read, apart from those of the source that every run knows."""
    source = {column.name for column in SOURCE_COLUMNS}
    schema = connection.sql("SELECT * FROM clips_decided LIMIT 0").to_arrow_table().schema
    return [Column(f.name, f.type, "") for f in schema if f.name not in {*source, *_SKIPPED}]


def _read(
    connection: duckdb.DuckDBPyConnection, policy: Policy, evaluator: Evaluator, known: list[str]
) -> pa.Table:
    """Every clip, in the order of ingestion, with what the rules and dedup read."""
    reads = {name for names in evaluator.reads.values() for name in names}
    reads |= {"width", "height", "border_width", "border_height"}
    if policy.calibration:
        reads |= {"physics_p1", "physics_model", "physics_prompt", "physics_mode"}
    names = [n for n in (*known, *(c.name for c in SOURCE_COLUMNS)) if n.lower() in reads]
    decided = [n for n in _DECIDED if n in names]
    cells = [
        f'v."{name}"' if name in _DECIDED
        else f's."{_FROM_SOURCE[name]}" AS "{name}"' if name in _FROM_SOURCE
        else f'c."{name}"'
        for name in names
    ]  # fmt: skip
    if policy.needs_inputs:
        cells += ["c.start_s AS _start", "c.end_s AS _end"]
    latest = ", ".join(f'arg_max_null("{n}", seq) AS "{n}"' for n in {*decided, "verdict"})
    return connection.sql(
        f"""SELECT c.clip_id AS _clip_id, c.attempt_id AS _attempt, v.verdict AS _old,
               split_part(c.failure, ':', 1) AS _failed,
               c.clip_id IN (
                   SELECT clip_id FROM raw_dataset
                   WHERE attempt_id IN (SELECT attempt_id FROM raw_sources)) AS _media,
               {", ".join(cells)}
        FROM clips c JOIN sources s ON s.attempt_id = c.attempt_id
        LEFT JOIN (
            SELECT clip_id, {latest} FROM raw_verdicts
            WHERE attempt_id IN (SELECT attempt_id FROM raw_sources) GROUP BY clip_id
        ) v ON v.clip_id = c.clip_id
        ORDER BY s.seq, c.start_frame, c.clip_id"""
    ).to_arrow_table()


def _verdicts(table: pa.Table, judged: Judged, duplicates: Duplicates) -> pa.Table:
    """One row a clip, by worker.verdict: asked once for what is said of many clips alike."""
    kinds = pc.fill_null(table["_failed"], "\0").combine_chunks().dictionary_encode()
    failures = [None if k == "\0" else k for k in kinds.dictionary.to_pylist()]
    doubled = duplicates.of >= 0
    key = (judged.outcome * max(1, len(failures)) + kinds.indices.to_numpy()) * 2 + doubled
    distinct, inverse = np.unique(key, return_inverse=True)
    said = []
    for value in distinct.tolist():
        outcome, failure = divmod(value // 2, max(1, len(failures)))
        rejecting, undecided = judged.outcomes[outcome]
        stays = "" if value % 2 else None
        said.append(verdict(rejecting, undecided, failures[failure], stays, None))
    take = pa.array(inverse)
    duplicate = np.array([d.verdict == "duplicate" for d in said], np.bool_)[inverse]
    clip_ids = table["_clip_id"].combine_chunks()
    stays = pa.array(duplicates.of, mask=~duplicate)
    return pa.table({
        "clip_id": clip_ids,
        "attempt_id": table["_attempt"],
        "verdict": pa.array([d.verdict for d in said], pa.string()).take(take),
        "reasons": pa.array([list(d.reasons) for d in said], pa.list_(pa.string())).take(take),
        "duplicate_of": clip_ids.take(stays),
        "similarity": pa.array(duplicates.similarity, mask=~duplicate),
        "old": table["_old"],
        "has_media": table["_media"],
    })  # fmt: skip


def _deduplicate(
    connection: duckdb.DuckDBPyConnection,
    table: pa.Table,
    passed: NDArray[np.bool_],
    dedup: DedupConfig,
) -> Duplicates:
    """Which clips that pass every rule are near-duplicates of which."""
    found = Duplicates.none(table.num_rows)
    connection.register("_passed", pa.table({
        "clip_id": table["_clip_id"], "attempt_id": table["_attempt"],
        "place": np.arange(table.num_rows),
    }).filter(pa.array(passed)))  # fmt: skip
    embedded = "embeddings e JOIN _passed p USING (clip_id) WHERE e.model = $model"
    model = {"model": dedup.embedding}
    ((clips, length),) = connection.execute(
        f"SELECT count(*), coalesce(max(len(e.vector)), 0) FROM {embedded}", model
    ).fetchall()
    if not clips:
        return found
    seeds: NDArray[np.int64] | None = None
    if clips > EXACT_CLIPS:
        seeds = _changed(connection, table, passed, found)
        if seeds is not None and not len(seeds):
            return found
    rows = connection.sql(
        f"SELECT p.place, e.vector FROM {embedded}", params=model
    ).to_arrow_reader(BATCH)
    places, vectors = _matrix(rows, clips, length)
    if seeds is None:
        chosen = np.arange(len(places))
    else:
        chosen = affected(vectors, np.flatnonzero(np.isin(places, seeds)), dedup.threshold)
    places, vectors = places[chosen], vectors if seeds is None else vectors[chosen]
    part = table.take(pa.array(places))
    decided = replay(
        part["_clip_id"].to_pylist(), vectors, _pixels(part),
        part["_failed"].is_valid().to_numpy(), dedup.threshold,
    )  # fmt: skip
    found.of[places] = np.where(decided.of >= 0, places[decided.of], -1)
    found.similarity[places] = decided.similarity
    return found


BATCH = 20_000


def _matrix(
    rows: pa.RecordBatchReader, clips: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Places in ascending order, and the vector of each."""
    places, vectors = np.zeros(clips, np.int64), np.zeros((clips, length), np.float32)
    at = 0
    for batch in rows:
        end = at + batch.num_rows
        flat = batch.column(1).flatten().to_numpy()
        if len(flat) != batch.num_rows * length:
            raise LakeError(
                "the embeddings of one model differ in length: dedup cannot compare them"
            )
        places[at:end], vectors[at:end] = batch.column(0), flat.reshape(-1, length)
        at = end
    order = np.argsort(places, kind="stable")
    if np.all(order[1:] > order[:-1]):
        return places, vectors
    return places[order], vectors[order]


def _pixels(table: pa.Table) -> NDArray[np.int64]:
    """`picture_pixels` of every row."""
    whole = pc.multiply(table["width"].cast(pa.int64()), table["height"].cast(pa.int64()))
    if {"border_width", "border_height"} <= set(table.schema.names):
        inner = pc.multiply(
            table["border_width"].cast(pa.int64()), table["border_height"].cast(pa.int64())
        )
        whole = pc.coalesce(inner, whole)
    return np.asarray(pc.fill_null(whole, 0).to_numpy(), np.int64)


def _changed(
    connection: duckdb.DuckDBPyConnection,
    table: pa.Table,
    passed: NDArray[np.bool_],
    found: Duplicates,
) -> NDArray[np.int64] | None:
    """Clips whose dedup must be looked at again; the others' is put into `found`.

    A clip's place among duplicates depends on the clips near it that pass the rules. So an earlier
    decision over the same clips, with the same embedding and threshold, still holds, unless clips
    pass now that did not, or that a clip duplicates passes no more. Returns None where no policy has
    decided all clips of the lake: then nothing is known.
    """
    named = connection.execute(
        """SELECT policy FROM raw_verdicts WHERE clip_id IN (SELECT clip_id FROM raw_clips)
        GROUP BY policy HAVING count(DISTINCT clip_id) >= ? ORDER BY max(seq) DESC LIMIT 1""",
        [table.num_rows],
    ).fetchall()
    if not named:
        return None
    connection.register("_all", pa.table({
        "clip_id": table["_clip_id"], "place": np.arange(table.num_rows),
        "failed": table["_failed"],
    }))  # fmt: skip
    rows = connection.sql(
        """WITH before AS (
            SELECT clip_id, arg_max_null(verdict, seq) AS verdict, arg_max_null(reasons, seq) AS reasons,
                   arg_max_null(duplicate_of, seq) AS stays,
                   arg_max_null(similarity, seq) AS similarity
            FROM raw_verdicts WHERE policy = $policy
              AND attempt_id IN (SELECT attempt_id FROM raw_sources)
            GROUP BY clip_id)
        SELECT a.place, coalesce(o.place, -1) AS stays, coalesce(b.similarity, 'nan') AS similarity,
               b.verdict IN ('keep', 'duplicate')
                 OR (b.verdict = 'error' AND a.failed IS NOT NULL AND b.reasons = [a.failed]) AS passed
        FROM _all a JOIN before b USING (clip_id) LEFT JOIN _all o ON o.clip_id = b.stays""",
        params={"policy": named[0][0]},
    ).to_arrow_table()
    place = rows["place"].to_numpy()
    before, stays = np.zeros(table.num_rows, np.bool_), np.full(table.num_rows, -1, np.int64)
    before[place], stays[place] = rows["passed"].to_numpy(), rows["stays"].to_numpy()
    gone = before & ~passed
    lost = (stays >= 0) & gone[stays]
    seeds = passed & (~before | lost)
    holds = passed & ~seeds & (stays >= 0)
    found.of[holds] = stays[holds]
    similarity = np.full(table.num_rows, np.nan)
    similarity[place] = rows["similarity"].to_numpy()
    found.similarity[holds] = similarity[holds]
    return np.flatnonzero(seeds)
