"""Joins a lake with its latest run's rules and writes the report."""

from __future__ import annotations

import json
from pathlib import Path

from winnow.pipeline.lake import Lake
from winnow.pipeline.policy import Policy
from winnow.pipeline.report import RuleShown, simple_threshold, write_report
from winnow.pipeline.views import connect


def write_lake_report(lake: Lake, out: Path) -> Path:
    """Write the report of a lake; returns its path. Raises LakeError where there is no lake."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with connect(lake) as connection:
        row = connection.execute("SELECT arg_max(policy_rules, started_at) FROM runs").fetchone()
        text = row[0] if row else None
        policy = Policy.model_validate(json.loads(text)) if text else None
        rules = [
            shown
            for rule in (policy.rules if policy else ())
            for shown in _shown(rule.name, rule.reason, rule.reject)
        ]
        write_report(connection, rules, out, title=f"Winnow: {lake.uri}")
    return out.absolute()


def _shown(name: str, reason: str, predicate: str) -> list[RuleShown]:
    thresholds = simple_threshold(predicate)
    return [
        RuleShown(name, reason, predicate, column, threshold, side)
        for column, threshold, side in thresholds or [(None, None, None)]
    ]
