"""Where clips were lost: step by step through the filters, and rule by rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from winnow.pipeline.report_rules import Rulebook, RuleShown
from winnow.pipeline.report_values import share
from winnow.pipeline.report_views import CLIPS, Views


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
    """How often one reason is given. `share` is of all clips, `bar` of the most frequent reason."""

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


def funnel(lake: Views, book: Rulebook) -> list[Step]:
    """Files, then clips: each is lost once, at the first step that it fails."""
    steps: list[Step] = []
    length = lake.column("sources", "duration_s")
    sources, source_seconds, done, done_seconds = lake.rows(
        f"SELECT count(*), sum({length}), count(*) FILTER (status = 'done'), "
        f"sum({length}) FILTER (status = 'done') FROM sources"
    )[0]
    others = lake.rows(
        "SELECT status, count(*) FROM sources WHERE status <> 'done' GROUP BY 1 ORDER BY 2 DESC, 1"
    )
    steps.append(Step("sources", "file", sources, source_seconds, 1.0, 1.0))
    steps.append(
        Step(
            "readable, each once",
            "file",
            done,
            done_seconds,
            share(done, sources),
            1.0,
            " · ".join(f"{count:,} {status}" for status, count in others),
        )
    )
    left, left_seconds = lake.rows(f"SELECT count(*), sum({lake.seconds}) FROM {CLIPS}")[0]
    total = left
    steps.append(Step("clips", "clip", total, left_seconds, 1.0 if total else 0.0, 1.0))

    lost = [("measured without error", *_lost_to(lake, "error", "unmeasured"))]
    undecided = _lost_to(lake, "undecided", "without a verdict")
    if undecided[0]:
        lost.append(("decided", *undecided))
    lost += _lost_to_rules(lake, book)
    lost.append(("not a duplicate", *_lost_to(lake, "duplicate", "duplicates")))
    for label, count, seconds, why in lost:
        before = share(left, total)
        left, left_seconds = left - count, (left_seconds or 0.0) - seconds
        steps.append(Step(label, "clip", left, left_seconds, share(left, total), before, why))
    kept = steps[-1]
    steps.append(Step("kept", "clip", kept.count, kept.seconds, kept.share, kept.share))
    return steps


def _lost_to(lake: Views, verdict: str, words: str) -> tuple[int, float, str]:
    count, seconds = lake.rows(
        f"SELECT count(*), sum({lake.seconds}) FROM {CLIPS} WHERE verdict_shown = ?",
        [verdict],
    )[0]
    return count, float(seconds or 0), f"{count:,} {words}" if count else ""


def _lost_to_rules(lake: Views, book: Rulebook) -> list[tuple[str, int, float, str]]:
    """Per filter, in the order of the policy, the clips whose first failed rule is there."""
    order: list[str] = []
    for rule in book.rules:
        if (name := _filter_of(lake, book, rule)) not in order:
            order.append(name)
    place = {
        reason: order.index(_filter_of(lake, book, rules[0]))
        for reason, rules in book.of_reason.items()
    }
    found = lake.rows(
        f"""
        WITH place AS (SELECT unnest(?::VARCHAR[]) AS reason, unnest(?::INTEGER[]) AS step),
        why AS (
            SELECT clip_id, {lake.seconds} AS seconds, unnest(
                CASE WHEN len(reasons) > 0 THEN reasons ELSE ['no reason given'] END
            ) AS reason
            FROM {CLIPS} WHERE verdict_shown = 'reject'
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


def _filter_of(lake: Views, book: Rulebook, rule: RuleShown) -> str:
    """Name of the funnel's step that a rule belongs to."""
    if rule.stage:
        return rule.stage
    operators = [lake.operator(column) for column in book.columns_of(rule)]
    return next((o for o in operators if o), "shots and length")


def reasons(lake: Views, book: Rulebook) -> list[ReasonCount]:
    """Every reason of the verdicts and every rule, the most frequent first.

    A clip with the verdict `error` names the rules that could not judge it: counted apart.
    """
    found = lake.rows(
        f"""
        SELECT reason, count(*) FILTER (verdict_shown <> 'error'),
            count(*) FILTER (alone AND verdict_shown = 'reject'),
            count(*) FILTER (verdict_shown = 'error'),
            mode(verdict_shown ORDER BY verdict_shown) FILTER (verdict_shown <> 'error')
        FROM (
            SELECT DISTINCT clip_id, verdict_shown, len(list_distinct(reasons)) = 1 AS alone,
                unnest(reasons) AS reason
            FROM {CLIPS}
        ) WHERE reason IS NOT NULL GROUP BY 1
        """
    )
    total = lake.number(f"SELECT count(*) FROM {CLIPS}")
    most = max((row[1] for row in found), default=0)
    counted = [
        ReasonCount(
            reason=reason,
            rules=book.of_reason.get(reason, []),
            clips=clips,
            share=share(clips, total),
            only=only,
            unjudged=unjudged,
            bar=share(clips, most),
            verdict=verdict or "error",
        )
        for reason, clips, only, unjudged, verdict in found
    ]
    met = {rule.name for row in counted for rule in row.rules}
    counted += [
        ReasonCount(rule.name, [rule], 0, 0.0, 0, 0, 0.0, "reject")
        for rule in book.rules
        if rule.name not in met
    ]
    return sorted(counted, key=lambda row: (-row.clips, -row.unjudged, row.reason))[:200]
