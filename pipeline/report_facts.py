"""What the report says, read from the views of a lake: every figure is one SQL aggregate.

Nothing here grows with the number of clips: scores are binned in DuckDB, galleries are capped, and
only the clips that are shown are fetched as rows.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import duckdb

from winnow.operators.errors import LakeError
from winnow.pipeline.report_charts import (
    Chart,
    Comparison,
    Spread,
    binning,
    chart,
    comparisons,
)

VIEWS = ("sources", "clips", "verdicts", "dataset", "clips_decided", "runs")

# Who, where and when of a clip; everything else that is a number is a score.
_NOT_SCORES = {
    "start_s",
    "end_s",
    "start_frame",
    "end_frame",
    "similarity",
    "row_number",
}
_NUMBER = re.compile(r"^(U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|UINTEGER|FLOAT|DOUBLE|DECIMAL\(.*\))$")
_WORK = "winnow_report_clips"


@dataclass(frozen=True, slots=True)
class RuleShown:
    """A rule of the policy as the report shows it.

    `predicate` is the SQL that rejects. `column`, `threshold` and `side` (where the rejected values
    lie) may be given for one threshold; the report reads all others out of the predicate. A rule
    may come several times, once for each threshold. `stage` names the filter stage in the funnel;
    without it the rules are grouped by the operator whose columns they read.
    """

    name: str
    reason: str
    predicate: str
    column: str | None = None
    threshold: float | None = None
    side: Literal["above", "below"] | None = None
    stage: str = ""

    def comparisons(self) -> tuple[Comparison, ...]:
        """Every threshold of this rule that can be drawn."""
        found = comparisons(self.predicate)
        if self.column is None or self.threshold is None or self.side is None:
            return found
        if any((c.column, c.threshold, c.side) == self._simple() for c in found):
            return found
        return (Comparison(self.column, float(self.threshold), self.side), *found)

    def _simple(self) -> tuple[str | None, float | None, str | None]:
        return self.column, self.threshold, self.side


# --- what the page is given ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ledger:
    """One line of the books: what came in, where it went, and what is missing."""

    what: str
    total_word: str
    total: int
    parts: Sequence[tuple[str, int]]

    @property
    def missing(self) -> int:
        return self.total - sum(count for _, count in self.parts)


@dataclass(frozen=True, slots=True)
class Books:
    """The ledger with the checks that go beyond its sums."""

    lines: Sequence[Ledger]
    faults: Sequence[str]

    @property
    def balanced(self) -> bool:
        return not self.faults and all(line.missing == 0 for line in self.lines)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the funnel. `share` is of the first step in the same unit."""

    label: str
    unit: Literal["file", "clip"]
    count: int
    seconds: float | None
    share: float
    before: float
    lost: str = ""


@dataclass(frozen=True, slots=True)
class ReasonCount:
    reason: str
    rules: Sequence[RuleShown]
    clips: int
    share: float
    only: int
    """Rejected clips that have this reason and no other."""
    unjudged: int
    """Clips with the verdict error that this rule could not judge."""
    bar: float
    verdict: str
    """The verdict that most of these clips have."""


@dataclass(frozen=True, slots=True)
class ColumnDoc:
    """What the lake says of a column; empty where it says nothing."""

    meaning: str = ""
    unit: str = ""
    range: str = ""
    direction: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """One column with its distribution."""

    column: str
    operator: str
    doc: ColumnDoc
    chart: Chart | None
    categories: Sequence[tuple[str, Mapping[str, int], float]]
    missing: int
    median: float | None
    rules: Sequence[str]


@dataclass(frozen=True, slots=True)
class ShownScore:
    column: str
    value: Any
    fails: bool
    limit: str = ""


@dataclass(slots=True)
class ShownClip:
    """One card of a gallery."""

    clip_id: str
    verdict: str
    file: str
    uri: str
    prompt: str
    generator: str
    start_s: float | None
    end_s: float | None
    reasons: Sequence[str]
    """As stored in the verdict."""
    meanings: Mapping[str, str]
    """In words, for reasons stored as the name of a rule."""
    scores: Sequence[ShownScore]
    thumbnail: bytes | None
    similarity: float | None = None
    duplicate_of: str | None = None
    original: ShownClip | None = None


@dataclass(frozen=True, slots=True)
class Gallery:
    verdict: str
    total: int
    clips: Sequence[ShownClip]
    order: str


@dataclass(frozen=True, slots=True)
class ErrorGroup:
    what: str
    count: int
    examples: Sequence[tuple[str, str]]
    """(file or clip, message)"""


@dataclass(frozen=True, slots=True)
class StageSpeed:
    stage: str
    part: bool
    """True for a part of the stage before it."""
    seconds: float
    share: float
    records: int | None
    clips: int | None
    frames: int | None


@dataclass(frozen=True, slots=True)
class Run:
    run_id: str
    started: str
    finished: str
    engine: str
    policy: str
    sources_in: int | None
    wall_s: float | None
    config: Any = None
    versions: Sequence[tuple[str, str]] = ()
    stages: Sequence[StageSpeed] = ()


@dataclass(frozen=True, slots=True)
class GeneratorCount:
    name: str
    clips: int
    verdicts: Mapping[str, int]
    top_reason: str


@dataclass(frozen=True, slots=True)
class Partition:
    name: str
    clips: int
    seconds: float | None
    size: int | None


@dataclass(slots=True)
class Facts:
    """Everything on the page."""

    runs: Sequence[Run]
    policies: Sequence[str]
    books: Books
    verdicts: Mapping[str, int]
    seconds: Mapping[str, float]
    clips: int
    funnel: Sequence[Step]
    reasons: Sequence[ReasonCount]
    judged: Sequence[Score]
    other: Sequence[Score]
    silent: Sequence[tuple[str, str]]
    galleries: Sequence[Gallery]
    generators: Sequence[GeneratorCount]
    generators_left: int
    partitions: Sequence[Partition]
    partitions_left: int
    source_errors: Sequence[ErrorGroup]
    operator_errors: Sequence[ErrorGroup]
    speed: Run | None
    speed_of_lake: bool
    details: Mapping[str, Any] = field(default_factory=dict)


# --- reading -------------------------------------------------------------------------------------


def quoted(name: str) -> str:
    """A column name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def gather(
    connection: duckdb.DuckDBPyConnection, rules: Sequence[RuleShown], *, clips_per_gallery: int
) -> Facts:
    """Read all figures of the report.

    Raises LakeError where one of the views is missing.
    """
    lake = _Lake(connection, tuple(rules))
    with lake.scores_at_hand():
        runs = lake.runs()
        speed = next((run for run in runs if run.stages), None)
        of_lake = False
        if speed is None and (stages := lake.stages_of_sources()):
            speed, of_lake = Run("", "", "", "", "", None, None, stages=stages), True
        verdicts, seconds = lake.verdicts()
        judged, other, silent = lake.scores()
        galleries = lake.galleries(clips_per_gallery)
        generators, generators_left = lake.generators()
        partitions, partitions_left = lake.partitions()
        return Facts(
            runs=runs,
            policies=lake.policies(),
            books=lake.books(runs),
            verdicts=verdicts,
            seconds=seconds,
            clips=lake.number("SELECT count(*) FROM clips"),
            funnel=lake.funnel(),
            reasons=lake.reasons(),
            judged=judged,
            other=other,
            silent=silent,
            galleries=galleries,
            generators=generators,
            generators_left=generators_left,
            partitions=partitions,
            partitions_left=partitions_left,
            source_errors=lake.source_errors(),
            operator_errors=lake.operator_errors(),
            speed=speed,
            speed_of_lake=of_lake,
            details=lake.details(galleries),
        )


class _Lake:
    """The views of one lake, with the names of their columns."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, rules: tuple[RuleShown, ...]) -> None:
        self._connection = connection
        self._values: dict[str, dict[str, Any]] = {}
        self._columns = {view: self._describe(view) for view in VIEWS}
        self._operators = sorted(
            (c.removesuffix("_error") for c in self._columns["clips"] if c.endswith("_error")),
            key=len,
            reverse=True,
        )
        self._docs = self._column_docs()
        self._marks: dict[str, list[Comparison]] = defaultdict(list)
        self._rules_of_column: dict[str, list[str]] = defaultdict(list)
        written = {name.lower(): name for name in self._columns["clips"]}
        for rule in rules:
            for told in rule.comparisons():
                mark = told._replace(column=written.get(told.column.lower(), told.column))
                if mark not in self._marks[mark.column]:
                    self._marks[mark.column].append(mark)
                if rule.name not in self._rules_of_column[mark.column]:
                    self._rules_of_column[mark.column].append(rule.name)
        # A rule that came once for each of its thresholds is still one rule.
        self._rules = tuple({rule.name: rule for rule in reversed(rules)}.values())[::-1]
        # A verdict may carry the name of a rule or its reason.
        self._rules_of_reason: dict[str, list[RuleShown]] = defaultdict(list)
        for rule in self._rules:
            self._rules_of_reason[rule.name].append(rule)
            if rule.reason != rule.name:
                self._rules_of_reason[rule.reason].append(rule)

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self._connection.execute(sql, list(parameters)).fetchall()

    def number(self, sql: str) -> int:
        return int(self.rows(sql)[0][0] or 0)

    def _describe(self, view: str) -> dict[str, str]:
        try:
            return {row[0]: str(row[1]) for row in self.rows(f"DESCRIBE {quoted(view)}")}
        except duckdb.CatalogException as error:
            raise LakeError(
                f"the lake has no view {view!r}, so no report can be made of it; "
                f"needed are {', '.join(VIEWS)}"
            ) from error

    def _column_docs(self) -> dict[str, ColumnDoc]:
        try:
            found = self.rows(
                "SELECT column_name, meaning, unit, range, direction FROM column_docs "
                "WHERE table_name = 'clips'"
            )
        except duckdb.Error:
            # Documentation only: an older lake has none, and the page does without.
            return {}
        return {row[0]: ColumnDoc(*(str(told or "") for told in row[1:])) for row in found}

    def _column(self, view: str, name: str, otherwise: str = "NULL") -> str:
        """SQL for a column that may not be there."""
        return quoted(name) if name in self._columns[view] else otherwise

    @contextmanager
    def scores_at_hand(self) -> Iterator[None]:
        """Copy clips without their pictures and vectors into memory: it is read once a column."""
        taken = [
            quoted(name)
            for name, kind in self._columns["clips_decided"].items()
            if kind != "BLOB" and (name == "reasons" or not kind.endswith("]"))
        ]
        self._connection.execute(
            f"CREATE OR REPLACE TEMP TABLE {_WORK} AS "
            f"SELECT {', '.join(taken)}, coalesce(verdict, 'undecided') AS verdict_shown "
            "FROM clips_decided"
        )
        try:
            yield
        finally:
            self._connection.execute(f"DROP TABLE IF EXISTS {_WORK}")

    # The run --------------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        """All runs, the newest first, at most twenty."""
        column = self._column
        found = self.rows(
            f"""
            SELECT run_id, started_at::VARCHAR, {column("runs", "finished_at")}::VARCHAR,
                {column("runs", "engine")}, {column("runs", "policy")},
                {column("runs", "sources_in")}, {column("runs", "wall_s")},
                {column("runs", "config")}, {column("runs", "versions")},
                {column("runs", "stages")}
            FROM runs ORDER BY started_at DESC NULLS LAST LIMIT 20
            """
        )
        return [
            Run(
                run_id=str(row[0] or ""),
                started=_instant(row[1]),
                finished=_instant(row[2]),
                engine=str(row[3] or ""),
                policy=str(row[4] or ""),
                sources_in=row[5],
                wall_s=row[6],
                config=_without_secrets(_from_json(row[7])),
                versions=_flat(_from_json(row[8])),
                stages=_stage_speeds(_from_json(row[9])),
            )
            for row in found
        ]

    def stages_of_sources(self) -> list[StageSpeed]:
        """Seconds by stage summed over the sources, for a lake whose runs kept none."""
        if "seconds" not in self._columns["sources"]:
            return []
        found = self.rows(
            """
            SELECT entry.key, sum(entry.value), count(*) FROM (
                SELECT unnest(map_entries(to_json(seconds)::MAP(VARCHAR, DOUBLE))) AS entry
                FROM sources WHERE seconds IS NOT NULL
            ) GROUP BY 1 ORDER BY 2 DESC
            """
            if self._columns["sources"]["seconds"] not in ("VARCHAR", "JSON")
            else """
            SELECT entry.key, sum(entry.value), count(*) FROM (
                SELECT unnest(map_entries(seconds::JSON::MAP(VARCHAR, DOUBLE))) AS entry
                FROM sources WHERE json_valid(seconds)
            ) GROUP BY 1 ORDER BY 2 DESC
            """
        )
        return _stage_speeds([{"stage": r[0], "seconds": r[1], "records": r[2]} for r in found])

    # The books ------------------------------------------------------------------------------------

    def books(self, runs: Sequence[Run]) -> Books:
        statuses = dict(self.rows("SELECT status, count(*) FROM sources GROUP BY 1"))
        verdicts, _ = self.verdicts()
        sources = sum(statuses.values())
        faults = []
        clips = self.number("SELECT count(*) FROM clips")
        for fault, sql in (
            (
                "{} clips have no verdict",
                f"SELECT count(*) FROM {_WORK} WHERE verdict_shown = 'undecided'",
            ),
            (
                "{} clips are missing among the decided ones",
                f"SELECT count(*) FROM clips ANTI JOIN {_WORK} USING (clip_id)",
            ),
            (
                "{} clips were decided twice",
                f"SELECT count(*) - count(DISTINCT clip_id) FROM {_WORK}",
            ),
            (
                "{} verdicts belong to no clip",
                "SELECT count(*) FROM verdicts ANTI JOIN clips USING (clip_id)",
            ),
            ("{} clips are there twice", "SELECT count(*) - count(DISTINCT clip_id) FROM clips"),
            (
                "{} clips belong to no source that is done",
                "SELECT count(*) FROM clips ANTI JOIN "
                "(SELECT * FROM sources WHERE status = 'done') AS done USING (source_id)",
            ),
        ):
            if count := self.number(sql):
                faults.append(fault.format(f"{count:,}"))
        listed = runs[0].sources_in if runs else None
        if listed is not None and listed > sources:
            faults.append(
                f"the last run listed {listed:,} files, but only {sources:,} have a row: "
                "it was stopped, or rows went missing"
            )
        return Books(
            lines=(
                Ledger(
                    "sources",
                    "in",
                    max(sources, listed or 0),
                    [(k, statuses.get(k, 0)) for k in ("done", "copy", "failed", "incomplete")],
                ),
                Ledger(
                    "clips",
                    "clips",
                    clips,
                    [(k, verdicts.get(k, 0)) for k in ("keep", "reject", "duplicate", "error")],
                ),
            ),
            faults=faults,
        )

    def policies(self) -> list[str]:
        found = self.rows(
            f"SELECT DISTINCT policy FROM {_WORK} WHERE policy IS NOT NULL ORDER BY 1 LIMIT 20"
        )
        return [str(row[0]) for row in found]

    def verdicts(self) -> tuple[dict[str, int], dict[str, float]]:
        found = self.rows(
            f"SELECT verdict_shown, count(*), sum({self._seconds()}) FROM {_WORK} GROUP BY 1"
        )
        return {r[0]: r[1] for r in found}, {r[0]: float(r[2] or 0) for r in found}

    def _seconds(self) -> str:
        if "duration_s" in self._columns["clips"]:
            return "duration_s"
        return "(end_s - start_s)"

    def _operator(self, column: str) -> str:
        return next((o for o in self._operators if column.startswith(f"{o}_")), "")

    def _rule_columns(self, rule: RuleShown) -> list[str]:
        named = [rule.column] if rule.column else [c.column for c in rule.comparisons()]
        words = re.findall(r"[A-Za-z_]\w*", re.sub(r"'[^']*'", " ", rule.predicate))
        return [c for c in (*named, *words) if c in self._columns["clips"]]

    def _filter_of(self, rule: RuleShown) -> str:
        """Name of the funnel's step that a rule belongs to."""
        if rule.stage:
            return rule.stage
        operators = [self._operator(column) for column in self._rule_columns(rule)]
        return next((o for o in operators if o), "shots and length")

    def funnel(self) -> list[Step]:
        steps: list[Step] = []
        length = self._column("sources", "duration_s")
        sources, source_seconds, done, done_seconds = self.rows(
            f"SELECT count(*), sum({length}), count(*) FILTER (status = 'done'), "
            f"sum({length}) FILTER (status = 'done') FROM sources"
        )[0]
        others = self.rows(
            "SELECT status, count(*) FROM sources WHERE status <> 'done' GROUP BY 1 ORDER BY 2 DESC"
        )
        steps.append(Step("sources", "file", sources, source_seconds, 1.0, 1.0))
        steps.append(
            Step(
                "readable, each once",
                "file",
                done,
                done_seconds,
                _share(done, sources),
                1.0,
                " · ".join(f"{count:,} {status}" for status, count in others),
            )
        )
        left, left_seconds = self.rows(f"SELECT count(*), sum({self._seconds()}) FROM {_WORK}")[0]
        total = left
        steps.append(Step("clips", "clip", total, left_seconds, 1.0 if total else 0.0, 1.0))

        lost = [("measured without error", *self._lost_to("error", "unmeasured"))]
        undecided = self._lost_to("undecided", "without a verdict")
        if undecided[0]:
            lost.append(("decided", *undecided))
        lost += self._lost_to_rules()
        lost.append(("not a duplicate", *self._lost_to("duplicate", "duplicates")))
        for label, count, seconds, why in lost:
            before = _share(left, total)
            left, left_seconds = left - count, (left_seconds or 0.0) - seconds
            steps.append(Step(label, "clip", left, left_seconds, _share(left, total), before, why))
        kept = steps[-1]
        steps.append(Step("kept", "clip", kept.count, kept.seconds, kept.share, kept.share))
        return steps

    def _lost_to(self, verdict: str, words: str) -> tuple[int, float, str]:
        count, seconds = self.rows(
            f"SELECT count(*), sum({self._seconds()}) FROM {_WORK} WHERE verdict_shown = ?",
            [verdict],
        )[0]
        return count, float(seconds or 0), f"{count:,} {words}" if count else ""

    def _lost_to_rules(self) -> list[tuple[str, int, float, str]]:
        """Per filter, in the order of the policy, the clips whose first failed rule is there."""
        order: list[str] = []
        for rule in self._rules:
            if (name := self._filter_of(rule)) not in order:
                order.append(name)
        place = {
            reason: order.index(self._filter_of(rules[0]))
            for reason, rules in self._rules_of_reason.items()
        }
        found = self.rows(
            f"""
            WITH place AS (SELECT unnest(?::VARCHAR[]) AS reason, unnest(?::INTEGER[]) AS step),
            why AS (
                SELECT clip_id, {self._seconds()} AS seconds, unnest(
                    CASE WHEN len(reasons) > 0 THEN reasons ELSE ['no reason given'] END
                ) AS reason
                FROM {_WORK} WHERE verdict_shown = 'reject'
            ),
            placed AS (
                SELECT clip_id, seconds, reason, coalesce(step, {len(order)}) AS step,
                    min(coalesce(step, {len(order)})) OVER (PARTITION BY clip_id) AS first
                FROM why LEFT JOIN place USING (reason)
            ),
            clip AS (SELECT clip_id, first AS step, any_value(seconds) AS seconds
                FROM placed GROUP BY ALL),
            cause AS (SELECT step, reason, count(DISTINCT clip_id) AS clips
                FROM placed WHERE step = first GROUP BY ALL)
            SELECT step, count(*), sum(seconds), (
                SELECT list(reason ORDER BY clips DESC, reason) FROM cause
                WHERE cause.step = clip.step
            ), (
                SELECT list(clips ORDER BY clips DESC, reason) FROM cause
                WHERE cause.step = clip.step
            )
            FROM clip GROUP BY step
            """,
            [list(place), list(place.values())],
        )
        by_step = {row[0]: row for row in found}
        steps = []
        for index, name in enumerate([*order, "other rules"]):
            if index not in by_step:
                if index < len(order):
                    steps.append((f"passed {name}", 0, 0.0, ""))
                continue
            _, count, seconds, reasons, clips = by_step[index]
            why = [f"{n:,} {reason}" for reason, n in zip(reasons, clips, strict=True)]
            more = f" · {len(why) - 4} more reasons" if len(why) > 4 else ""
            steps.append((f"passed {name}", count, float(seconds or 0), " · ".join(why[:4]) + more))
        return steps

    def reasons(self) -> list[ReasonCount]:
        """Every reason of the verdicts and every rule, the most frequent first.

        A clip with the verdict `error` names the rules that could not judge it: counted apart.
        """
        found = self.rows(
            f"""
            SELECT reason, count(*) FILTER (verdict_shown <> 'error'),
                count(*) FILTER (alone AND verdict_shown = 'reject'),
                count(*) FILTER (verdict_shown = 'error'),
                mode(verdict_shown ORDER BY verdict_shown) FILTER (verdict_shown <> 'error')
            FROM (
                SELECT DISTINCT clip_id, verdict_shown, len(list_distinct(reasons)) = 1 AS alone,
                    unnest(reasons) AS reason
                FROM {_WORK}
            ) WHERE reason IS NOT NULL GROUP BY 1
            """
        )
        total = self.number(f"SELECT count(*) FROM {_WORK}")
        most = max((row[1] for row in found), default=0)
        counted = [
            ReasonCount(
                reason=reason,
                rules=self._rules_of_reason.get(reason, []),
                clips=clips,
                share=_share(clips, total),
                only=only,
                unjudged=unjudged,
                bar=_share(clips, most),
                verdict=verdict or "error",
            )
            for reason, clips, only, unjudged, verdict in found
        ]
        met = {rule.name for row in counted for rule in row.rules}
        counted += [
            ReasonCount(rule.name, [rule], 0, 0.0, 0, 0, 0.0, "reject")
            for rule in self._rules
            if rule.name not in met
        ]
        return sorted(counted, key=lambda row: (-row.clips, -row.unjudged, row.reason))[:200]

    # Scores ---------------------------------------------------------------------------------------

    def score_columns(self) -> list[str]:
        """Numbers and truth values that say something about a clip, in the order of the table."""
        return [
            name
            for name, kind in self._columns["clips_decided"].items()
            if (_NUMBER.match(kind) or kind == "BOOLEAN")
            and name in self._columns["clips"]
            and name not in _NOT_SCORES
            and not name.endswith("_version")
        ]

    def _word_columns(self) -> list[str]:
        """Text columns of operators (a class, a method), not identities and not errors."""
        return [
            name
            for name, kind in self._columns["clips_decided"].items()
            if kind in ("VARCHAR",)
            and name in self._columns["clips"]
            and self._operator(name)
            and not name.endswith(("_error", "_version"))
        ]

    def scores(self) -> tuple[list[Score], list[Score], list[tuple[str, str]]]:
        """Scores with a rule, scores without, and columns that have nothing to draw."""
        spreads = self._spreads()
        judged: list[Score] = []
        other: list[Score] = []
        silent: list[tuple[str, str]] = []
        for name in self.score_columns():
            kind = self._columns["clips_decided"][name]
            if kind == "BOOLEAN":
                self._add_words(name, judged, other, silent)
                continue
            finite, missing, spread, median = spreads[name]
            marks = self._marks.get(name, [])
            if finite == 0:
                silent.append((name, "never measured"))
                continue
            if spread.minimum == spread.maximum and not marks:
                silent.append((name, f"always {spread.minimum:g}"))
                continue
            score = Score(
                column=name,
                operator=self._operator(name),
                doc=self._docs.get(name, ColumnDoc()),
                chart=self._chart(name, spread, marks),
                categories=(),
                missing=missing,
                median=median,
                rules=self._rules_of_column.get(name, []),
            )
            (judged if marks else other).append(score)
        for name in self._word_columns():
            self._add_words(name, judged, other, silent)
        return judged, other, silent

    def _spreads(self) -> dict[str, tuple[int, int, Spread, float | None]]:
        names = [n for n in self.score_columns() if self._columns["clips_decided"][n] != "BOOLEAN"]
        if not names:
            return {}
        parts = []
        for name in names:
            column = f"{quoted(name)}::DOUBLE"
            only = f"FILTER (isfinite({column}))"
            parts += [
                f"count(*) {only}",
                f"count(*) - count(*) {only}",
                f"quantile_cont({column}, [0.005, 0.5, 0.995]) {only}",
                f"min({column}) {only}",
                f"max({column}) {only}",
                f"bool_and({column} = floor({column})) {only}",
            ]
        row = self.rows(f"SELECT {', '.join(parts)} FROM {_WORK}")[0]
        spreads: dict[str, tuple[int, int, Spread, float | None]] = {}
        for index, name in enumerate(names):
            finite, missing, quantiles, low, high, whole = row[index * 6 : index * 6 + 6]
            if not finite:
                spreads[name] = (0, missing, Spread(0, 0, 0, 0, False), None)
                continue
            spread = Spread(quantiles[0], quantiles[2], low, high, bool(whole))
            spreads[name] = (finite, missing, spread, quantiles[1])
        return spreads

    def _chart(self, name: str, spread: Spread, marks: Sequence[Comparison]) -> Chart:
        bins = binning(spread, marks)
        column = quoted(name)
        found = self.rows(
            f"SELECT {bins.sql(column)}, verdict_shown, count(*) FROM {_WORK} "
            f"WHERE isfinite({column}::DOUBLE) GROUP BY ALL"
        )
        counts: dict[int, dict[str, int]] = defaultdict(dict)
        for number, verdict, count in found:
            counts[number][verdict] = count
        return chart(bins, counts, marks)

    def _add_words(
        self, name: str, judged: list[Score], other: list[Score], silent: list[tuple[str, str]]
    ) -> None:
        column = quoted(name)
        found = self.rows(
            f"SELECT {column}::VARCHAR, verdict_shown, count(*) FROM {_WORK} "
            f"WHERE {column} IN (SELECT {column} FROM {_WORK} WHERE {column} IS NOT NULL "
            f"GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 8) GROUP BY ALL ORDER BY 1"
        )
        if not found:
            silent.append((name, "never measured"))
            return
        by_word: dict[str, dict[str, int]] = defaultdict(dict)
        for word, verdict, count in found:
            by_word[word][verdict] = count
        if len(by_word) == 1 and name not in self._rules_of_column:
            silent.append((name, f"always {_short(next(iter(by_word)), 60)}"))
            return
        most = max(sum(counts.values()) for counts in by_word.values())
        missing = self.number(f"SELECT count(*) FROM {_WORK} WHERE {column} IS NULL")
        words = sorted(by_word.items(), key=lambda item: -sum(item[1].values()))
        rules = [r.name for r in self._rules if name in self._rule_columns(r)]
        score = Score(
            column=name,
            operator=self._operator(name),
            doc=self._docs.get(name, ColumnDoc()),
            chart=None,
            categories=[(_short(w, 60), c, _share(sum(c.values()), most)) for w, c in words],
            missing=missing,
            median=None,
            rules=rules,
        )
        (judged if rules else other).append(score)

    # Galleries ------------------------------------------------------------------------------------

    def galleries(self, size: int) -> list[Gallery]:
        # Every reason gets its examples: the clips are taken from the reasons in turn.
        in_turn = f"""
            SELECT clip_id FROM (
                SELECT clip_id, min(turn) AS turn FROM (
                    SELECT clip_id, row_number() OVER (
                        PARTITION BY reason ORDER BY md5(clip_id)
                    ) AS turn
                    FROM (SELECT clip_id, unnest(
                        CASE WHEN len(reasons) > 0 THEN reasons ELSE [''] END
                    ) AS reason FROM {_WORK} WHERE verdict_shown = ?)
                ) GROUP BY 1
            ) ORDER BY turn, md5(clip_id) LIMIT ?
        """
        least_alike = (
            f"SELECT clip_id FROM {_WORK} WHERE verdict_shown = ? "
            "ORDER BY similarity NULLS FIRST, clip_id LIMIT ?"
        )
        mixed = (
            f"SELECT clip_id FROM {_WORK} WHERE verdict_shown = ? "
            "ORDER BY md5(clip_id), clip_id LIMIT ?"
        )
        chosen = [
            ("reject", in_turn, "an even sample over the reasons"),
            ("duplicate", least_alike, "the least alike first"),
            ("keep", mixed, "a fixed random sample"),
            ("error", in_turn, "an even sample over the reasons"),
        ]
        totals, _ = self.verdicts()
        ids = {
            verdict: [row[0] for row in self.rows(sql, [verdict, max(size, 0)])]
            for verdict, sql, _ in chosen
        }
        cards = self._cards([clip_id for taken in ids.values() for clip_id in taken])
        originals = self._cards(sorted({c.duplicate_of for c in cards.values() if c.duplicate_of}))
        for card in cards.values():
            if card.verdict == "duplicate" and card.duplicate_of:
                card.original = originals.get(card.duplicate_of)
        return [
            Gallery(verdict, totals.get(verdict, 0), [cards[i] for i in ids[verdict]], order)
            for verdict, _, order in chosen
        ]

    def _cards(self, clip_ids: Sequence[str]) -> dict[str, ShownClip]:
        if not clip_ids:
            return {}
        scores = self.score_columns()
        select = ", ".join(f"any_value({quoted(name)})" for name in scores)
        column = self._column
        found = self.rows(
            f"""
            SELECT clip_id, any_value(verdict_shown), any_value(uri),
                any_value({column("clips_decided", "prompt")}),
                any_value({column("clips_decided", "generator")}),
                any_value(start_s), any_value(end_s), any_value(reasons), any_value(similarity),
                any_value(duplicate_of){", " + select if scores else ""}
            FROM {_WORK} WHERE list_contains(?::VARCHAR[], clip_id) GROUP BY clip_id
            """,
            [list(clip_ids)],
        )
        pictures = self._thumbnails(clip_ids)
        cards = {}
        for row in found:
            clip_id, verdict, uri, prompt, generator, start, end, reasons, alike, first = row[:10]
            values = dict(zip(scores, row[10:], strict=True))
            reasons = [str(r) for r in reasons or [] if r is not None]
            cards[clip_id] = ShownClip(
                clip_id=clip_id,
                verdict=verdict,
                file=_file_name(uri or ""),
                uri=_without_password(_short(uri or "", 1000)),
                prompt=_short(prompt or "", 2000),
                generator=_short(generator or "", 100),
                start_s=start,
                end_s=end,
                reasons=[_short(r, 300) for r in reasons[:20]],
                meanings={
                    rule.name: rule.reason for rule in self._rules if rule.name != rule.reason
                },
                scores=self._shown_scores(values, reasons),
                thumbnail=pictures.get(clip_id),
                similarity=alike,
                duplicate_of=first,
            )
            self._values[clip_id] = values
        return cards

    def _shown_scores(self, values: Mapping[str, Any], reasons: Sequence[str]) -> list[ShownScore]:
        """The scores that rules look at, those that failed first."""
        blamed = [
            mark
            for reason in reasons
            for rule in self._rules_of_reason.get(reason, [])
            for mark in rule.comparisons()
        ]
        shown: dict[str, ShownScore] = {}
        for mark in blamed:
            value = values.get(mark.column)
            if mark.column not in values or (mark.column in shown and shown[mark.column].fails):
                continue
            fails = value is not None and _beyond(value, mark)
            shown[mark.column] = ShownScore(mark.column, value, fails, mark.words if fails else "")
        for name in self._marks:
            if name in values and name not in shown:
                shown[name] = ShownScore(name, values[name], False)
        return sorted(shown.values(), key=lambda score: not score.fails)

    def _thumbnails(self, clip_ids: Sequence[str]) -> dict[str, bytes]:
        if "thumbnail_jpeg" not in self._columns["clips"]:
            return {}
        found = self.rows(
            "SELECT clip_id, thumbnail_jpeg FROM clips "
            "WHERE list_contains(?::VARCHAR[], clip_id) AND thumbnail_jpeg IS NOT NULL",
            [list(clip_ids)],
        )
        return {row[0]: bytes(row[1]) for row in found}

    def details(self, galleries: Sequence[Gallery]) -> dict[str, Any]:
        """All scores of the clips shown, for the page's detail view."""
        columns = self.score_columns()
        shown = [clip.clip_id for gallery in galleries for clip in gallery.clips]
        return {
            "columns": [
                {
                    "name": name,
                    "operator": self._operator(name),
                    "meaning": self._docs.get(name, ColumnDoc()).meaning,
                    "unit": self._docs.get(name, ColumnDoc()).unit,
                    "limits": [
                        {
                            "words": m.words if m.alone else f"{m.words} with another condition",
                            "side": m.side,
                            "threshold": m.threshold,
                            "inclusive": m.inclusive,
                            "alone": m.alone,
                        }
                        for m in self._marks.get(name, [])
                    ],
                }
                for name in columns
            ],
            "clips": {
                clip_id: [_plain(self._values[clip_id].get(name)) for name in columns]
                for clip_id in shown
            },
        }

    # Groups, errors -------------------------------------------------------------------------------

    def generators(self, limit: int = 20) -> tuple[list[GeneratorCount], int]:
        if "generator" not in self._columns["clips_decided"]:
            return [], 0
        found = self.rows(
            f"""
            SELECT generator, verdict_shown, count(*) FROM {_WORK}
            WHERE generator IN (SELECT generator FROM {_WORK} WHERE generator IS NOT NULL
                GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT {limit})
            GROUP BY ALL
            """
        )
        tops = dict(
            self.rows(
                f"""
                SELECT generator, arg_max(reason, (clips, reason)) FROM (
                    SELECT generator, reason, count(*) AS clips
                    FROM (SELECT generator, unnest(reasons) AS reason FROM {_WORK}
                        WHERE verdict_shown = 'reject') GROUP BY ALL
                ) GROUP BY 1
                """
            )
        )
        counts: dict[str, dict[str, int]] = defaultdict(dict)
        for name, verdict, count in found:
            counts[name][verdict] = count
        ordered = sorted(counts.items(), key=lambda item: (-sum(item[1].values()), item[0]))
        total = self.number(f"SELECT count(DISTINCT generator) FROM {_WORK}")
        return [
            GeneratorCount(_short(n, 100), sum(c.values()), c, _short(tops.get(n) or "", 100))
            for n, c in ordered
        ], max(total - limit, 0)

    def partitions(self, limit: int = 12) -> tuple[list[Partition], int]:
        keys = ("content_type", "resolution", "aspect_ratio", "length")
        length = (
            f"sum({quoted('frames')} / nullif({quoted('fps')}, 0))"
            if {"frames", "fps"} <= set(self._columns["dataset"])
            else "NULL"
        )
        names = ", ".join(
            f"{self._column('dataset', k)}::VARCHAR AS k{i}" for i, k in enumerate(keys)
        )
        found = self.rows(
            f"SELECT {names}, count(*), {length}, sum({self._column('dataset', 'bytes')}) "
            "FROM dataset GROUP BY 1, 2, 3, 4 ORDER BY 5 DESC, 1, 2, 3, 4"
        )
        shown = [
            Partition(" · ".join(str(k) for k in row[:4] if k is not None), row[4], row[5], row[6])
            for row in found[:limit]
        ]
        return shown, max(len(found) - limit, 0)

    def source_errors(self) -> list[ErrorGroup]:
        found = self.rows(
            """
            SELECT coalesce(error_kind, status), count(*),
                list((uri, coalesce(error, '')) ORDER BY uri)[:4]
            FROM sources WHERE status IN ('failed', 'incomplete')
            GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 50
            """
        )
        return [
            ErrorGroup(kind, count, [_example(_file_name(e[0] or ""), e[1]) for e in examples])
            for kind, count, examples in found
        ]

    def operator_errors(self) -> list[ErrorGroup]:
        """Errors by operator, and the failures of stages where the lake keeps them."""
        groups = []
        columns = {operator: f"{operator}_error" for operator in sorted(self._operators)}
        columns["a stage"] = "failure"
        for operator, name in columns.items():
            column = quoted(name)
            if self._columns["clips_decided"].get(name) != "VARCHAR":
                continue
            found = self.rows(
                f"SELECT {column}, count(*), min(uri) FROM {_WORK} WHERE {column} IS NOT NULL "
                "GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 4"
            )
            total = self.number(f"SELECT count({column}) FROM {_WORK}")
            if found:
                examples = [
                    _example(f"{count:,} × e.g. {_file_name(uri or '')}", error)
                    for error, count, uri in found
                ]
                groups.append(ErrorGroup(operator, total, examples))
        return groups


# --- small conversions ---------------------------------------------------------------------------

_SECRET = re.compile(
    r"secret|token|password|passwd|credential|(access|api|account|private|signing)_?key|sas\b", re.I
)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _beyond(value: Any, mark: Comparison) -> bool:
    if mark.inclusive and value == mark.threshold:
        return True
    return bool(value < mark.threshold if mark.side == "below" else value > mark.threshold)


def _instant(text: str | None) -> str:
    return re.sub(r"\.\d+", "", text or "").removesuffix("+00") + (
        " UTC" if (text or "").endswith("+00") else ""
    )


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _flat(versions: Any, before: str = "") -> list[tuple[str, str]]:
    if not isinstance(versions, Mapping):
        return []
    found: list[tuple[str, str]] = []
    for key, value in versions.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{before}{key} ")
        else:
            found.append((f"{before}{key}", _short(str(value), 60)))
    return found[:200]


def _stage_speeds(stages: Any) -> list[StageSpeed]:
    """Stages in order, each followed by its parts (`cheap/motion` is a part of `cheap`)."""
    if not isinstance(stages, list):
        return []
    told = [stage for stage in stages if isinstance(stage, Mapping)][:200]
    names = [str(stage.get("stage") or "?") for stage in told]
    parents = [name.rsplit("/", 1)[0] if "/" in name else "" for name in names]
    parents = [parent if parent in names else "" for parent in parents]
    # The time of a part is inside the time of its stage.
    total = sum(
        float(stage.get("seconds") or 0)
        for stage, parent in zip(told, parents, strict=True)
        if not parent
    )
    order = sorted(
        range(len(told)),
        key=lambda i: (names.index(parents[i] or names[i]), bool(parents[i]), i),
    )
    return [
        StageSpeed(
            stage=names[i].removeprefix(f"{parents[i]}/") if parents[i] else names[i],
            part=bool(parents[i]),
            seconds=float(told[i].get("seconds") or 0),
            share=_share(float(told[i].get("seconds") or 0), total),
            records=told[i].get("records"),
            clips=told[i].get("clips"),
            frames=told[i].get("frames"),
        )
        for i in order
    ]


def _without_secrets(value: Any) -> Any:
    """A configuration that can be shown: a report is passed around more freely than a config."""
    if isinstance(value, Mapping):
        return {
            str(k): "(hidden)" if _SECRET.search(str(k)) and v else _without_secrets(v)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [_without_secrets(v) for v in value]
    return _without_password(value) if isinstance(value, str) else value


def _without_password(text: str) -> str:
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1", text)


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _file_name(uri: str) -> str:
    return _short(uri.rstrip("/").rsplit("/", 1)[-1], 200)


def _example(where: str, message: str) -> tuple[str, str]:
    return where, _short(message, 300)


def _plain(value: Any) -> Any:
    """A value for JSON: short numbers, no NaN."""
    if value is None or isinstance(value, bool | str | int):
        return value
    number = float(value)
    return float(f"{number:.5g}") if math.isfinite(number) else str(number)
