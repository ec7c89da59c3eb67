"""`winnow policy tune`: a policy's rules against clips that a person has called good or bad.

The rules alone are judged, without dedup: a duplicate of a good clip is no bad clip. To reject is
what a rule does, so its precision is the share of bad clips among the labelled clips that it
rejects, and its recall the share of the bad clips that it rejects. A clip that a rule cannot judge is
neither rejected nor kept. Thresholds are sought on the labels that they are then measured by: try
them on other labels before you trust the last per cent.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
from numpy.typing import NDArray

from winnow.operators.errors import ConfigError
from winnow.pipeline.decide import declared_columns, open_lake
from winnow.pipeline.input_clips import find_input_clips
from winnow.pipeline.lake import Lake
from winnow.pipeline.policy import Evaluator, Policy, Rule
from winnow.pipeline.ratios import divide

Goal = Literal["reject", "keep"]
_SIDES = {
    "COMPARE_LESSTHAN": "<", "COMPARE_LESSTHANOREQUALTO": "<=",
    "COMPARE_GREATERTHAN": ">", "COMPARE_GREATERTHANOREQUALTO": ">=",
}  # fmt: skip
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


@dataclass(frozen=True, slots=True)
class Scored:
    """Labelled clips by what is said of them."""

    bad_rejected: int
    good_rejected: int
    bad_kept: int
    good_kept: int
    not_judged: int

    @property
    def precision(self) -> float | None:
        """Of rejecting bad: the share of bad among the rejected. None where nothing is rejected."""
        return _share(self.bad_rejected, self.bad_rejected + self.good_rejected)

    @property
    def recall(self) -> float | None:
        """Of rejecting bad: the share of the bad clips that are rejected, of those judged."""
        return _share(self.bad_rejected, self.bad_rejected + self.bad_kept)

    @property
    def keep_precision(self) -> float | None:
        """Of keeping good: the share of good among the kept."""
        return _share(self.good_kept, self.good_kept + self.bad_kept)

    @property
    def keep_recall(self) -> float | None:
        return _share(self.good_kept, self.good_kept + self.good_rejected)

    def as_dict(self) -> dict[str, Any]:
        names = ("precision", "recall", "keep_precision", "keep_recall")
        return asdict(self) | {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Threshold:
    """One comparison of a rule with a constant, and the constant that reaches the precision."""

    rule: str
    column: str
    side: str
    now: float
    then: float | None
    """None where no threshold reaches it."""
    scored: Scored
    """By this comparison alone, at `then`, or at `now` where there is none."""
    labelled: int
    """Labelled clips that it rests on: with the score, and where the rule applies."""
    of_input: bool = False
    """The numbers are ratios of the column to that of the input video."""

    @property
    def what(self) -> str:
        return f"{self.column} / the input's" if self.of_input else self.column


@dataclass
class Tuning:
    """What the labels say of a policy."""

    policy: str
    goal: Goal
    precision: float
    good: int
    bad: int
    unknown: list[str]
    """Ids and uris of the labels that no clip of the lake has."""
    unlabelled: int
    """Clips of the lake without a label."""
    whole: Scored
    rules: dict[str, Scored]
    thresholds: list[Threshold]
    not_tunable: list[str]
    """Rules without a comparison of one column, or of its ratio to the input's, with a constant."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "whole": self.whole.as_dict(),
            "rules": {name: scored.as_dict() for name, scored in self.rules.items()},
            "thresholds": [
                asdict(t) | {"scored": t.scored.as_dict()} for t in self.thresholds
            ],
        }  # fmt: skip


def read_labels(path: Path) -> dict[str, bool]:
    """Whether a clip is good, by clip id or uri. Raises ConfigError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"the labels {path} cannot be read: {error}") from error
    key = next((k for k in ("clip_id", "uri") if rows and k in rows[0]), None)
    if key is None or "label" not in rows[0]:
        raise ConfigError(
            f"{path}: give a line `clip_id,label` or `uri,label`, and labels below it"
        )
    labels: dict[str, bool] = {}
    for number, row in enumerate(rows, 2):
        name, label = (row[key] or "").strip(), (row["label"] or "").strip().lower()
        if not name and not label:
            continue
        if label not in ("good", "bad"):
            raise ConfigError(f"{path}, line {number}: the label is {label!r}: write good or bad")
        if labels.setdefault(name, label == "good") != (label == "good"):
            raise ConfigError(f"{path}, line {number}: {name} is called both good and bad")
    return labels


def tune(
    lake: Lake, policy: Policy, labels: dict[str, bool], precision: float, goal: Goal = "reject"
) -> Tuning:
    """Precision and recall of a policy's rules, and the thresholds that reach a precision.

    With the goal `reject` a threshold rejects as much as it may while `precision` of what it rejects
    is bad; with `keep` it rejects as little as it must so that `precision` of what it keeps is good.
    Percentile rules rank over the whole lake; ratio rules find their inputs in it. Raises ConfigError.
    """
    if not 0 < precision <= 1:
        raise ConfigError(f"the precision is {precision:g}: give a share above 0, at most 1")
    with open_lake(lake) as connection:
        declared = declared_columns(connection)
        evaluator = Evaluator(policy, declared, threads=2)
        good, unknown, total = _labelled(connection, labels)
        reads = sorted(set().union(*evaluator.reads.values()))
        whole_lake = "" if policy.needs_population else "WHERE l.good IS NOT NULL"
        cells = "".join(f', d."{name}"' for name in reads)
        if policy.needs_inputs:
            cells += ", d.attempt_id AS _attempt, d.start_s AS _start, d.end_s AS _end"
        table = connection.sql(
            f"""SELECT l.good AS _good{cells} FROM clips_decided d
            LEFT JOIN labelled l USING (clip_id) {whole_lake} ORDER BY d.clip_id"""
        ).to_arrow_table()
        inputs = None
        if policy.needs_inputs:
            inputs = find_input_clips(connection, table).row
    judged = evaluator.judge_all(table, policy.rules, inputs)
    has_label = table["_good"].is_valid().to_numpy()
    is_good = table["_good"].fill_null(False).to_numpy()[has_label]
    outcome = judged.outcome[has_label]
    rules = {
        rule.name: _scored(_answers(judged.outcomes, rule.name)[outcome], is_good)
        for rule in policy.rules
    }
    whole = np.array([1 if a else -1 if b else 0 for a, b in judged.outcomes], np.int8)
    part = table.filter(table["_good"].is_valid())
    thresholds, not_tunable = [], []
    for rule in policy.rules:
        found = list(_comparisons(rule))
        if not found:
            not_tunable.append(rule.name)
        for column, side, now in found:
            name = next((n for n in part.schema.names if n.lower() == column), None)
            if name is None:  # a column of a calibration
                not_tunable.append(rule.name)
                continue
            scores = _numbers(part[name])
            if inputs is not None and rule.ratio is not None:
                scores = _finite(divide(_numbers(table[name]), inputs)[has_label])
            counted = np.isfinite(scores) & _applies(evaluator, rule, part)
            then = _threshold(scores[counted], is_good[counted], side, precision, goal)
            at = now if then is None else then
            answers = np.where(counted, _beyond(scores, side, at).astype(np.int8), -1)
            thresholds.append(
                Threshold(rule.name, name, side, now, then,
                          _scored(answers[counted], is_good[counted]), int(counted.sum()),
                          of_input=rule.ratio is not None)
            )  # fmt: skip
    return Tuning(
        policy.name, goal, precision, int(good), len(is_good) - int(good), unknown,
        total - len(is_good), _scored(whole[outcome], is_good), rules, thresholds,
        list(dict.fromkeys(not_tunable)),
    )  # fmt: skip


def _labelled(
    connection: duckdb.DuckDBPyConnection, labels: dict[str, bool]
) -> tuple[int, list[str], int]:
    """Make the table of labelled clips; returns (good clips, unknown names, clips in the lake)."""
    import pyarrow as pa

    connection.register(
        "given", pa.table({"name": pa.array(list(labels), pa.string()),
                           "good": pa.array(list(labels.values()), pa.bool_())})
    )  # fmt: skip
    connection.execute(
        """CREATE TEMP TABLE labelled AS
        WITH held AS (SELECT c.clip_id, s.uri FROM clips c JOIN sources s USING (attempt_id))
        SELECT h.clip_id, bool_and(g.good) AS good, bool_or(g.good) AS also, list(g.name) AS names
        FROM held h JOIN given g ON g.name = h.clip_id OR g.name = h.uri GROUP BY h.clip_id"""
    )
    both = connection.execute("SELECT names FROM labelled WHERE good <> also").fetchall()
    if both:
        raise ConfigError(f"one clip is called both good and bad: {', '.join(both[0][0])}")
    known = {n for (n,) in connection.execute("SELECT unnest(names) FROM labelled").fetchall()}
    if not known:
        raise ConfigError("none of the labels belongs to a clip of this lake")
    ((good,),) = connection.execute("SELECT count(*) FILTER (good) FROM labelled").fetchall()
    ((total,),) = connection.execute("SELECT count(*) FROM clips").fetchall()
    return good, [name for name in labels if name not in known], total


def _answers(outcomes: Sequence[tuple[list[str], list[str]]], rule: str) -> NDArray[np.int8]:
    """1 rejects, 0 does not, -1 cannot say, by outcome."""
    return np.array([1 if rule in a else -1 if rule in b else 0 for a, b in outcomes], np.int8)


def _scored(answers: NDArray[np.int8], good: NDArray[np.bool_]) -> Scored:
    def count(answer: int, is_good: bool) -> int:
        return int(((answers == answer) & (good == is_good)).sum())

    return Scored(count(1, False), count(1, True), count(0, False), count(0, True),
                  int((answers == -1).sum()))  # fmt: skip


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _comparisons(rule: Rule) -> Iterator[tuple[str, str, float]]:
    """(column, side, constant) of a rule that is one such comparison, or several joined by OR."""
    if rule.ratio is not None:
        yield from ((rule.ratio.column.lower(), side, at) for side, at in rule.ratio.limits)
    if rule.over_lake:
        return
    with duckdb.connect() as connection:
        ((text,),) = connection.execute(
            "SELECT json_serialize_sql('SELECT (' || ? || chr(10) || ')')", [rule.reject]
        ).fetchall()
    (tree,) = json.loads(text)["statements"][0]["node"]["select_list"]
    for node in tree["children"] if tree.get("type") == "CONJUNCTION_OR" else [tree]:
        side = _SIDES.get(node.get("type"))
        if side is None:
            continue
        left, right = node["left"], node["right"]
        if right.get("class") == "COLUMN_REF":
            left, right, side = right, left, _TURNED[side]
        literal = right.get("literal") or {}
        if left.get("class") == "COLUMN_REF" and literal.get("kind") in ("NUMERIC", "INTEGER"):
            yield left["column_names"][-1].lower(), side, float(literal["text"])


def _numbers(column: Any) -> NDArray[np.float64]:
    import pyarrow as pa

    return np.asarray(column.cast(pa.float64()).fill_null(math.nan).to_numpy(), np.float64)


def _finite(ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    """Infinite ratios as a number beyond all others: thresholds lie between two numbers."""
    largest = float(np.max(ratios, initial=1.0, where=np.isfinite(ratios)))
    return np.where(np.isposinf(ratios), 2 * largest, ratios)


def _applies(evaluator: Evaluator, rule: Rule, table: Any) -> NDArray[np.bool_]:
    """Where the rule's `when` is true."""
    if rule.when is None:
        return np.ones(table.num_rows, np.bool_)
    alone = Policy(name="when", rules=(Rule(name="applies", reject=rule.when),))
    asked = Evaluator(alone, evaluator.columns)
    judged = asked.judge_all(table, alone.rules)
    return np.asarray(_answers(judged.outcomes, "applies")[judged.outcome] == 1, np.bool_)


def _beyond(scores: NDArray[np.float64], side: str, limit: float) -> NDArray[np.bool_]:
    compared = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}
    return np.asarray(compared[side](scores, limit), np.bool_)


def _threshold(
    scores: NDArray[np.float64], good: NDArray[np.bool_], side: str, precision: float, goal: Goal
) -> float | None:
    """The threshold that reaches the precision; between two scores, with few digits."""
    sign = 1.0 if side.startswith("<") else -1.0
    order = np.argsort(sign * scores, kind="stable")
    ranked, bad = sign * scores[order], ~good[order]
    ends = np.flatnonzero(np.diff(ranked, append=np.inf) > 0)  # equal scores stay together
    rejected, bad_rejected = ends + 1, np.cumsum(bad)[ends] if len(ends) else ends
    if goal == "reject":
        reached = np.flatnonzero(bad_rejected >= precision * rejected - 1e-9)
        if not len(reached):
            return None
        end = int(ends[reached[-1]])
    else:
        kept = len(ranked) - rejected
        good_kept = kept - (bad.sum() - bad_rejected)
        if len(ranked) and (~bad).sum() >= precision * len(ranked) - 1e-9:
            # It need not reject any: just short of the first score.
            return _plain(sign * (ranked[0] - max(1.0, abs(ranked[0]))), sign * ranked[0])
        reached = np.flatnonzero((kept > 0) & (good_kept >= precision * kept - 1e-9))
        if not len(reached):
            return None
        end = int(ends[reached[0]])
    after = ranked[end + 1] if end + 1 < len(ranked) else ranked[end] + max(1.0, abs(ranked[end]))
    return _plain(sign * ranked[end], sign * after)


def _plain(a: float, b: float) -> float:
    """The number with the fewest digits strictly between two numbers."""
    low, high = min(a, b), max(a, b)
    middle = low + (high - low) / 2
    for digits in range(1, 17):
        rounded = float(f"{middle:.{digits}g}")
        if low < rounded < high:
            return rounded
    return middle


def as_text(tuning: Tuning) -> str:
    """For people."""
    lines = [
        f"policy {tuning.policy} against {tuning.good} good and {tuning.bad} bad clips; "
        f"{tuning.unlabelled} clips of the lake have no label",
        *(f"no clip of this lake: {name}" for name in tuning.unknown[:20]),
    ]
    if len(tuning.unknown) > 20:
        lines.append(f"and {len(tuning.unknown) - 20} more that are no clip of this lake")
    lines += [
        "",
        "precision: bad among the labelled clips that are rejected; recall: rejected among the bad",
        f"{'rule':<24}{'precision':>10}{'recall':>8}{'rejected bad':>14}{'good':>6}{'not judged':>12}",
    ]
    lines += [
        _line(name, s) for name, s in (*tuning.rules.items(), ("the whole policy", tuning.whole))
    ]
    lines.append(
        f"kept by the whole policy: {tuning.whole.good_kept} good, {tuning.whole.bad_kept} bad "
        f"(precision of keeping good {_percent(tuning.whole.keep_precision)})"
    )
    what = "bad among what is rejected" if tuning.goal == "reject" else "good among what is kept"
    lines += ["", f"thresholds for {100 * tuning.precision:g} % {what}, each comparison by itself:"]
    for t in tuning.thresholds:
        s = t.scored
        counts = (
            f"rejects {s.bad_rejected} bad and {s.good_rejected} good, keeps {s.good_kept} good and "
            f"{s.bad_kept} bad, of {t.labelled} labelled clips"
        )
        said = (
            f"no threshold reaches it; now {t.now:g} {counts}"
            if t.then is None
            else f"{t.what} {t.side} {t.then!r} (now {t.now:g}): {counts}"
        )
        lines.append(f"{t.rule}: {said if t.then is not None else f'{t.what} {t.side}: {said}'}")
    if tuning.not_tunable:
        lines.append(
            "no comparison of a column with a constant to tune: " + ", ".join(tuning.not_tunable)
        )
    return "\n".join(lines)


def _line(name: str, s: Scored) -> str:
    return (
        f"{name:<24}{_percent(s.precision):>10}{_percent(s.recall):>8}{s.bad_rejected:>14}"
        f"{s.good_rejected:>6}{s.not_judged:>12}"
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"
