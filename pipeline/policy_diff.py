"""`winnow policy diff`: which clips two policies decide differently, and by which rules.

A policy is named by the verdicts that the lake holds of it, or by a file or a name in
configs/policies, which is then applied here and now without writing anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import duckdb

from winnow.operators.errors import ConfigError
from winnow.pipeline.config import RunConfig
from winnow.pipeline.decide import decide, open_lake
from winnow.pipeline.lake import Lake
from winnow.pipeline.policy import Policy, Rule, load_policy, predicate_columns, rejecting_columns
from winnow.pipeline.refilter import latest_config
from winnow.pipeline.run import policy_hash

DEDUP = "duplicate"


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two policies."""

    policy: str
    stored: bool
    """Its verdicts are those in the lake; else they were made for this comparison only."""
    clips: int
    """Clips that it has a verdict of."""
    rules: Policy | None = field(repr=False, default=None)
    """Unknown where no run and no file has the rules that made the stored verdicts."""


@dataclass(frozen=True, slots=True)
class RuleChange:
    """What a reason has to do with clips that enter or leave what is kept."""

    rule: str
    """A rule; `duplicate` for near-duplicates; a stage that failed."""
    removes: int
    """Clips that A keeps, and that B does not, this reason among B's."""
    removes_alone: int
    """Those of them that B has no other reason for."""
    admits: int
    """Clips that B keeps, and that A does not, this reason among A's."""
    admits_alone: int


@dataclass(frozen=True, slots=True)
class Example:
    """A clip that is decided differently."""

    clip_id: str
    uri: str
    start_s: float
    end_s: float
    before: str
    after: str
    reasons_before: tuple[str, ...]
    reasons_after: tuple[str, ...]
    scores: dict[str, Any]
    """The columns that the rules among its reasons read."""


@dataclass
class PolicyDiff:
    """How two policies differ over the clips that both have decided."""

    a: Side
    b: Side
    clips: int
    changed: int
    """Clips with another verdict."""
    other_reasons: int
    """Clips with the same verdict for other reasons."""
    matrix: dict[str, dict[str, int]]
    """Clips by the verdict of A, then of B."""
    rules: list[RuleChange]
    examples: list[Example]

    def as_dict(self) -> dict[str, Any]:
        content = asdict(self)
        for side in ("a", "b"):
            del content[side]["rules"]
        return content


def diff_policies(lake: Lake, a: str, b: str, *, examples: int = 3) -> PolicyDiff:
    """Compare the verdicts of two policies; `examples` is by kind of change.

    Raises ConfigError where a name is neither of stored verdicts nor of a policy.
    """
    lake.require()
    config = latest_config(lake)
    with open_lake(lake) as connection:
        sides = [_side(connection, lake, config, name, table)
                 for name, table in ((a, "side_a"), (b, "side_b"))]  # fmt: skip
        connection.execute(
            """CREATE TEMP TABLE pairs AS
            SELECT a.clip_id, a.verdict AS before, b.verdict AS after, a.reasons AS reasons_before,
                   b.reasons AS reasons_after
            FROM side_a a JOIN side_b b USING (clip_id)"""
        )
        counted = connection.execute(
            """SELECT before, after, count(*),
                   count(*) FILTER (list_sort(reasons_before) <> list_sort(reasons_after))
            FROM pairs GROUP BY ALL ORDER BY ALL"""
        ).fetchall()
        matrix: dict[str, dict[str, int]] = {}
        for before, after, clips, _ in counted:
            matrix.setdefault(before, {})[after] = clips
        return PolicyDiff(
            sides[0],
            sides[1],
            sum(clips for _, _, clips, _ in counted),
            changed=sum(clips for before, after, clips, _ in counted if before != after),
            other_reasons=sum(other for before, after, _, other in counted if before == after),
            matrix=matrix,
            rules=_rules(connection),
            examples=_examples(connection, sides, examples),
        )


def _side(
    connection: duckdb.DuckDBPyConnection, lake: Lake, config: RunConfig, name: str, table: str
) -> Side:
    """Make the table of one policy's verdicts: clip_id, verdict, reasons."""
    held = connection.execute(
        """SELECT arg_max(policy_hash, seq) FROM raw_verdicts WHERE policy = ?
        AND attempt_id IN (SELECT attempt_id FROM raw_sources)""",
        [name],
    ).fetchall()[0][0]
    if held is not None:
        connection.execute(
            f"""CREATE TEMP TABLE {table} AS
            SELECT clip_id, arg_max(verdict, seq) AS verdict, arg_max(reasons, seq) AS reasons
            FROM raw_verdicts WHERE policy = ? AND attempt_id IN (SELECT attempt_id FROM raw_sources)
              AND clip_id IN (SELECT clip_id FROM clips)
            GROUP BY clip_id""",
            [name],
        )
        rules = _stored_rules(connection, name, held, config)
        return Side(name, stored=True, clips=_count(connection, table), rules=rules)
    try:
        policy = load_policy(name)
    except ConfigError as error:
        known = connection.execute("SELECT DISTINCT policy FROM raw_verdicts ORDER BY 1").fetchall()
        raise ConfigError(
            f"the lake has no verdicts of a policy {name!r} (it has: "
            f"{', '.join(known_name for (known_name,) in known) or 'none'}), and: {error}"
        ) from error
    decided = decide(lake, policy, config).table.select(["clip_id", "verdict", "reasons"])
    connection.register(f"{table}_decided", decided)
    connection.execute(f"CREATE TEMP VIEW {table} AS FROM {table}_decided")
    return Side(policy.name, stored=False, clips=decided.num_rows, rules=policy)


def _count(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    return int(connection.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0])


def _stored_rules(
    connection: duckdb.DuckDBPyConnection, name: str, hashed: str, config: RunConfig
) -> Policy | None:
    """The policy whose verdicts are stored: of a run, or a file that has not changed since."""
    rows = connection.execute(
        "SELECT DISTINCT policy_rules, config FROM raw_runs WHERE policy = ?", [name]
    ).fetchall()
    for rules, run_config in rows:
        policy = Policy.model_validate_json(rules)
        if policy_hash(policy, RunConfig.model_validate_json(run_config)) == hashed:
            return policy
    try:
        policy = load_policy(name)
    except ConfigError:
        return None
    return policy if policy_hash(policy, config) == hashed else None


def _rules(connection: duckdb.DuckDBPyConnection) -> list[RuleChange]:
    """By reason, those first that move most clips."""
    rows = connection.execute(
        """WITH moved AS (
            SELECT unnest(reasons_after) AS rule, 1 AS removes,
                   (len(reasons_after) = 1)::INT AS removes_alone, 0 AS admits, 0 AS admits_alone
            FROM pairs WHERE before = 'keep' AND after <> 'keep'
            UNION ALL
            SELECT unnest(reasons_before), 0, 0, 1, (len(reasons_before) = 1)::INT
            FROM pairs WHERE before <> 'keep' AND after = 'keep')
        SELECT rule, sum(removes)::BIGINT, sum(removes_alone)::BIGINT, sum(admits)::BIGINT,
               sum(admits_alone)::BIGINT
        FROM moved GROUP BY rule ORDER BY sum(removes + admits) DESC, rule"""
    ).fetchall()
    return [RuleChange(*row) for row in rows]


def _examples(
    connection: duckdb.DuckDBPyConnection, sides: Sequence[Side], count: int
) -> list[Example]:
    """The same clips each time: those with the least ids, which are hashes."""
    if count < 1:
        return []
    connection.execute(
        f"""CREATE TEMP TABLE shown AS
        SELECT p.* FROM (
            SELECT unnest(min(clip_id, {count:d})) AS clip_id FROM pairs WHERE before <> after
            GROUP BY before, after) JOIN pairs p USING (clip_id)"""
    )
    reads = [_reads(side.rules) for side in sides]
    known = {
        name.lower(): name
        for (name,) in connection.execute(
            "SELECT column_name FROM (DESCRIBE SELECT * FROM clips_decided)"
        ).fetchall()
    }
    rows = connection.sql(
        """SELECT * EXCLUDE (attempt_id, uri), s.uri AS _uri, p.* EXCLUDE (clip_id)
        FROM (SELECT * FROM clips WHERE clip_id IN (SELECT clip_id FROM shown)) c
        JOIN (SELECT attempt_id, uri, fps, width, height, variable_frame_rate, prompt, generator,
                     input_uri, seed, group_key, duration_s AS source_duration_s FROM sources) s
          USING (attempt_id)
        JOIN shown p USING (clip_id) ORDER BY before, after, clip_id"""
    ).to_arrow_table()
    found = []
    for row in rows.to_pylist():
        named = {
            column
            for rules, reasons in zip(
                reads, (row["reasons_before"], row["reasons_after"]), strict=True
            )
            for reason in reasons or ()
            for column in rules.get(reason, ())
        }
        columns = sorted(known[column] for column in named if column in known)
        found.append(
            Example(
                row["clip_id"], row["_uri"], row["start_s"], row["end_s"], row["before"], row["after"],
                tuple(row["reasons_before"] or ()), tuple(row["reasons_after"] or ()),
                {column: row[column] for column in columns if column in row},
            )
        )  # fmt: skip
    return found


def _reads(policy: Policy | None) -> dict[str, set[str]]:
    """By rule the columns that it reads, in lower case."""
    return {rule.name: rule_columns(rule) for rule in (policy.rules if policy else ())}


def rule_columns(rule: Rule) -> set[str]:
    """Lower-case names of the columns that a rule reads."""
    when = predicate_columns(rule.when, rule.name) if rule.when is not None else set()
    return rejecting_columns(rule, rule.name) | when


def as_text(diff: PolicyDiff) -> str:
    """For people: the matrix, the rules, the examples."""
    a, b = diff.a, diff.b
    title = f"{_called(a)} -> {_called(b)}: {diff.changed} of {diff.clips} clips change"
    lines = [
        title + (f", {diff.other_reasons} more for other reasons" if diff.other_reasons else "")
    ]
    for side in (a, b):
        if side.clips != diff.clips:
            lines.append(
                f"{side.policy} has verdicts of {side.clips} clips: only the {diff.clips} that both "
                "have are compared"
            )
    afters = sorted({after for row in diff.matrix.values() for after in row})
    lines += ["", _row([f"{a.policy} \\ {b.policy}", *afters])]
    lines += [
        _row([before, *(str(row.get(after, 0)) for after in afters)])
        for before, row in diff.matrix.items()
    ]
    if diff.rules:
        lines += ["", _row(["reason", "leave", "alone", "enter", "alone"])]
        lines += [
            _row(
                [r.rule, *(str(n) for n in (r.removes, r.removes_alone, r.admits, r.admits_alone))]
            )
            for r in diff.rules
        ]
        lines.append(
            f"leave: kept by {a.policy} and not by {b.policy}, for this reason; enter: the other way "
            "round; alone: for no other reason"
        )
    for example in diff.examples:
        before = _said(example.before, example.reasons_before)
        after = _said(example.after, example.reasons_after)
        lines += [
            "",
            f"{before} -> {after}: {example.uri} {example.start_s:g}-{example.end_s:g} s",
            f"  clip {example.clip_id}",
        ]
        if example.scores:
            lines.append("  " + ", ".join(f"{k} {_shown(v)}" for k, v in example.scores.items()))
    unknown = [side.policy for side in (a, b) if side.rules is None]
    if unknown and diff.examples:
        lines += [
            "",
            f"the rules behind the stored verdicts of {' and '.join(unknown)} are in no run and no "
            "file: their scores are not shown",
        ]
    return "\n".join(lines)


def _called(side: Side) -> str:
    return f"{side.policy} ({'as stored' if side.stored else 'applied now'})"


def _said(verdict: str, reasons: Sequence[str]) -> str:
    return f"{verdict} ({', '.join(reasons)})" if reasons and reasons != (DEDUP,) else verdict


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "NULL" if value is None else str(value)


def _row(cells: Sequence[str]) -> str:
    return f"{cells[0]:<24}" + "".join(f"{cell:>12}" for cell in cells[1:])
