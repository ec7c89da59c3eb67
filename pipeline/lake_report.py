"""Joins a lake with its latest run's rules and writes the report."""

from __future__ import annotations

import json
from pathlib import Path

from winnow.pipeline.lake import Lake
from winnow.pipeline.policy import Policy
from winnow.pipeline.report import RuleShown, write_report
from winnow.pipeline.views import connect


def write_lake_report(lake: Lake, out: Path) -> Path:
    """Write the report of a lake; returns its path. Raises LakeError where there is no lake."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with connect(lake) as connection:
        row = connection.execute("SELECT arg_max(policy_rules, started_at) FROM runs").fetchone()
        text = row[0] if row else None
        policy = Policy.model_validate(json.loads(text)) if text else None
        rules = [
            RuleShown(
                rule.name,
                rule.reason,
                rule.predicate,
                # Calibrated columns are computed when deciding; what they stand on is the critic's.
                stage="physics" if "physics_calibrated" in rule.predicate else "",
            )
            for rule in (policy.rules if policy else ())
        ]
        write_report(connection, rules, out, title=lake.uri)
    return out.absolute()
