"""Refilter: decide again over the whole lake from stored scores. No video is read.

A run whose policy has percentile rules ends with this too: only here is their population known.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa

from winnow.operators.errors import ConfigError
from winnow.operators.operator import Column
from winnow.pipeline.calibrated import not_calibrated
from winnow.pipeline.config import DedupConfig, RunConfig
from winnow.pipeline.lake import Lake, sequence_number
from winnow.pipeline.percentiles import Limit
from winnow.pipeline.policy import SOURCE_COLUMNS, Evaluator, Policy
from winnow.pipeline.run import policy_hash
from winnow.pipeline.views import connect, one_row
from winnow.pipeline.worker import verdict
from winnow.stages.dedup import ExactIndex, picture_pixels, resolve
from winnow.stages.records import Decision

# Bookkeeping of the clips table: everything else there is for rules.
_SKIPPED = ("source_id", "attempt_id", "operator_versions", "source_seq", "run_id", "uri")


@dataclass
class RefilterResult:
    """What a refilter decided."""

    policy: str
    clips: int
    counts: dict[str, int] = field(default_factory=dict)
    changed: int = 0
    """Clips whose verdict differs from the latest one before."""
    kept_without_media: int = 0
    """Newly kept clips whose media no run has made yet: a duplicate whose better copy is rejected
    now may become the one to keep, and was never encoded."""
    limits: list[Limit] = field(default_factory=list)
    """Where the percentiles of the policy's rules lie, by rule and group."""
    not_calibrated: list[str] = field(default_factory=list)
    """For people: clips with a critic's judgement that no calibration of the policy is for."""


def refilter(
    lake: Lake, policy: Policy, *, dry_run: bool = False, config: RunConfig | None = None
) -> RefilterResult:
    """Apply a policy to every clip of the lake and append the verdicts.

    Near-duplicates are decided anew too, by the same rule, in the order of ingestion, with the
    embedding and threshold of `config`, by default that of the lake's latest run. A run that is
    about to end and has no row in `runs` yet gives its own. Raises LakeError, ConfigError.
    """
    lake.require()
    config = config or latest_config(lake)
    dedup = config.stage("dedup")
    with connect(lake) as connection:
        table = connection.sql(
            f"""SELECT * EXCLUDE ({", ".join(_SKIPPED)}), source_seq AS _seq, attempt_id AS _attempt
            FROM clips_decided ORDER BY source_seq, start_frame, clip_id"""
        ).to_arrow_table()
        vectors = _vectors(connection, dedup)
        with_media = {
            row[0] for row in connection.execute("SELECT clip_id FROM raw_dataset").fetchall()
        }
    decisions, limits = _decide(table, policy, dedup, vectors)
    clip_ids = table["clip_id"].to_pylist()
    result = RefilterResult(
        policy.name,
        table.num_rows,
        limits=limits,
        not_calibrated=not_calibrated(table, policy.calibration)
        if not policy.calibration_any_model
        else [],
    )
    rows = []
    for clip_id, attempt, decision, old in zip(
        clip_ids,
        table["_attempt"].to_pylist(),
        decisions,
        table["verdict"].to_pylist(),
        strict=True,
    ):
        result.counts[decision.verdict] = result.counts.get(decision.verdict, 0) + 1
        result.changed += decision.verdict != old
        result.kept_without_media += decision.verdict == "keep" and clip_id not in with_media
        rows.append(
            {
                "clip_id": clip_id,
                "attempt_id": attempt,
                "policy": policy.name,
                "policy_hash": policy_hash(policy, config),
                "verdict": decision.verdict,
                "reasons": list(decision.reasons),
                "duplicate_of": decision.duplicate_of,
                "similarity": decision.similarity,
            }
        )
    if not dry_run and rows:
        seq, decided_by = sequence_number(), f"refilter-{uuid.uuid4().hex[:8]}"
        lake.append("verdicts", [row | {"seq": seq, "decided_by": decided_by} for row in rows])
    return result


def latest_config(lake: Lake) -> RunConfig:
    """The configuration of the lake's latest run."""
    with connect(lake) as connection:
        row = one_row(
            connection,
            "SELECT coalesce(arg_max(config, started_at), '') FROM runs",
        )
    if not row[0]:
        raise ConfigError(f"no run has finished in {lake.uri} yet: finish one with `winnow run`")
    return RunConfig.model_validate(json.loads(str(row[0])))


def _vectors(
    connection: duckdb.DuckDBPyConnection, dedup: DedupConfig | None
) -> dict[str, np.ndarray]:
    if dedup is None:
        return {}
    rows = connection.execute(
        "SELECT clip_id, vector FROM embeddings WHERE model = ?", [dedup.embedding]
    ).fetchall()
    return {clip_id: np.array(vector, np.float32) for clip_id, vector in rows}


def _decide(
    table: pa.Table, policy: Policy, dedup: DedupConfig | None, vectors: dict[str, np.ndarray]
) -> tuple[list[Decision], list[Limit]]:
    names = [n for n in table.schema.names if not n.startswith("_")]
    source = {column.name for column in SOURCE_COLUMNS}
    columns = [
        Column(name, table.schema.field(name).type, "") for name in names if name not in source
    ]
    evaluator = Evaluator(policy, columns)
    judged, limits = evaluator.judge(table, policy.rules)
    index = ExactIndex()
    decisions: dict[str, Decision] = {}
    wanted = ["clip_id", "width", "height", "failure"]
    wanted += [n for n in ("border_width", "border_height") if n in table.schema.names]
    for row, (rejecting, undecided) in zip(table.select(wanted).to_pylist(), judged, strict=True):
        clip_id = row["clip_id"]
        duplicate_of = similarity = None
        vector = vectors.get(clip_id)
        if dedup is not None and vector is not None and not rejecting and not undecided:
            pixels = picture_pixels(
                row.get("border_width"), row.get("border_height"), row["width"], row["height"]
            )
            outcome = resolve(clip_id, vector, pixels, index, dedup.threshold)
            duplicate_of, similarity = outcome.duplicate_of, outcome.similarity
            # As in a run: a better copy that could not be made replaces nothing.
            for old in outcome.replaces if row["failure"] is None else ():
                decisions[old.clip_id] = Decision(
                    "duplicate", ("duplicate",), clip_id, old.similarity
                )
        decisions[clip_id] = verdict(rejecting, undecided, row["failure"], duplicate_of, similarity)
    return [decisions[clip_id] for clip_id in table["clip_id"].to_pylist()], limits
