"""Refilter: decide again over the whole lake from stored scores. No video is read.

A run whose policy has percentile or ratio rules ends with this too: only here are all clips known.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
from tenacity import RetryError

from winnow.operators.errors import ConfigError, LakeError
from winnow.pipeline.config import RunConfig
from winnow.pipeline.dataset_rows import share_media
from winnow.pipeline.decide import decide
from winnow.pipeline.input_clips import InputClips
from winnow.pipeline.lake import TABLES, Lake, arrow_schema, sequence_number
from winnow.pipeline.percentiles import Limit
from winnow.pipeline.policy import Policy
from winnow.pipeline.run import policy_hash
from winnow.pipeline.run_lock import Hold, hold_lake
from winnow.pipeline.views import connect, one_row


@dataclass
class RefilterResult:
    """What a refilter decided."""

    policy: str
    clips: int
    counts: dict[str, int] = field(default_factory=dict)
    changed: int = 0
    """Clips whose verdict differs from the latest one before."""
    kept_without_media: int = 0
    """Kept clips that were never encoded: no policy kept them before. `winnow materialize` makes
    their media."""
    shared: int = 0
    """Clips that were added to the policy's dataset with the media that another policy has."""
    limits: list[Limit] = field(default_factory=list)
    """Where the percentiles of the policy's rules lie, by rule and group."""
    not_calibrated: list[str] = field(default_factory=list)
    """For people: clips with a critic's judgement that no calibration of the policy is for."""
    inputs: InputClips | None = None
    """Which clips the policy's ratio rules compared with their input video; None without such."""


def refilter(
    lake: Lake,
    policy: Policy,
    *,
    dry_run: bool = False,
    config: RunConfig | None = None,
    wait: bool = False,
    told: Callable[[str], None] = lambda line: None,
) -> RefilterResult:
    """Apply a policy to every clip of the lake and append the verdicts, and rows of its dataset.

    A kept clip that has media of whatever policy goes into the policy's dataset.

    Near-duplicates are decided anew too, by the same rule, in the order of ingestion, with the
    embedding and threshold of `config`, by default that of the lake's latest run. The lake is held
    meanwhile, unless it is a dry run; with `wait`, another holder is waited for, and `told` so.
    Raises LakeBusy, LakeError, ConfigError.
    """
    lake.require()
    if dry_run:
        return _refilter(lake, policy, config, None)
    with hold_lake(lake, f"winnow refilter --policy {policy.name}", wait=wait, told=told) as hold:
        return refilter_held(lake, policy, hold, config)


def refilter_held(
    lake: Lake, policy: Policy, hold: Hold, config: RunConfig | None = None
) -> RefilterResult:
    """`refilter` by who holds the lake already.

    A run that is about to end and has no row in `runs` yet gives its own `config`.
    """
    return _refilter(lake, policy, config, hold)


def _refilter(
    lake: Lake, policy: Policy, config: RunConfig | None, hold: Hold | None
) -> RefilterResult:
    """Decide, and append the verdicts where the lake is held."""
    config = config or latest_config(lake)
    decisions = decide(lake, policy, config)
    table = decisions.table
    keep = pc.equal(table["verdict"], "keep")
    same = pc.fill_null(pc.equal(table["verdict"], table["old"]), False)
    counts = table["verdict"].value_counts().to_pylist()
    result = RefilterResult(
        policy.name,
        table.num_rows,
        counts={row["values"]: row["counts"] for row in counts},
        changed=table.num_rows - (pc.sum(same).as_py() or 0),
        kept_without_media=pc.sum(pc.and_not(keep, table["has_media"])).as_py() or 0,
        limits=decisions.limits,
        not_calibrated=decisions.not_calibrated,
        inputs=decisions.inputs,
    )
    if hold is not None and table.num_rows:
        hold.check()
        ready = table.select(["clip_id", "attempt_id"]).filter(pc.and_(keep, table["has_media"]))
        _append(lake, table, policy, policy_hash(policy, config))
        del decisions, table
        result.shared = share_media(lake, policy.name, ready)
    return result


def _append(lake: Lake, decided: pa.Table, policy: Policy, hashed: str) -> None:
    same = {
        "policy": policy.name, "policy_hash": hashed, "seq": sequence_number(),
        "decided_by": f"refilter-{uuid.uuid4().hex[:8]}",
    }  # fmt: skip
    schema = arrow_schema(TABLES["verdicts"])
    rows = pa.table(
        [
            pa.repeat(pa.scalar(same[f.name], f.type), decided.num_rows)
            if f.name in same
            else decided[f.name].cast(f.type)
            for f in schema
        ],
        schema=schema,
    )
    try:
        lake.append_table("verdicts", rows)
    except RetryError as error:
        raise LakeError(
            f"cannot write the verdicts to {lake.uri}: {error.last_attempt.exception()}. Nothing of "
            "them is there: run again when the storage answers"
        ) from error


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
