"""The books of a lake: whether every file and every clip is accounted for, and what failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from winnow.pipeline.report_values import file_name, short
from winnow.pipeline.report_views import CLIPS, Views, quoted


@dataclass(frozen=True, slots=True)
class Ledger:
    """One line of the books: what came in, where it went, and what is missing."""

    what: str
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
class ErrorGroup:
    """Errors of one kind or of one operator."""

    what: str
    count: int
    examples: Sequence[tuple[str, str]]
    """(file or clip, message)"""


def verdicts(lake: Views) -> tuple[dict[str, int], dict[str, float]]:
    """Clips and seconds of video by verdict."""
    found = lake.rows(
        f"SELECT verdict_shown, count(*), sum({lake.seconds}) FROM {CLIPS} GROUP BY 1"
    )
    return {r[0]: r[1] for r in found}, {r[0]: float(r[2] or 0) for r in found}


def books(lake: Views, listed: int | None) -> Books:
    """Balance the books; `listed` is how many files the newest run found, None where unknown."""
    statuses = dict(lake.rows("SELECT status, count(*) FROM sources GROUP BY 1"))
    decided, _ = verdicts(lake)
    sources = sum(statuses.values())
    faults = []
    clips = lake.number("SELECT count(*) FROM clips")
    for fault, sql in (
        (
            "{} clips have no verdict",
            f"SELECT count(*) FROM {CLIPS} WHERE verdict_shown = 'undecided'",
        ),
        (
            "{} clips are missing among the decided ones",
            f"SELECT count(*) FROM clips ANTI JOIN {CLIPS} USING (clip_id)",
        ),
        (
            "{} clips were decided twice",
            f"SELECT count(*) - count(DISTINCT clip_id) FROM {CLIPS}",
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
        if count := lake.number(sql):
            faults.append(fault.format(f"{count:,}"))
    if listed is not None and listed > sources:
        faults.append(
            f"the last run listed {listed:,} files, but only {sources:,} have a row: "
            "it was stopped, or rows went missing"
        )
    return Books(
        lines=(
            Ledger(
                "sources",
                max(sources, listed or 0),
                [(k, statuses.get(k, 0)) for k in ("done", "copy", "failed", "incomplete")],
            ),
            Ledger(
                "clips",
                clips,
                [(k, decided.get(k, 0)) for k in ("keep", "reject", "duplicate", "error")],
            ),
        ),
        faults=faults,
    )


def policies(lake: Views) -> list[str]:
    """Names of the policies that decided the clips, at most twenty."""
    found = lake.rows(
        f"SELECT DISTINCT policy FROM {CLIPS} WHERE policy IS NOT NULL ORDER BY 1 LIMIT 20"
    )
    return [str(row[0]) for row in found]


def source_errors(lake: Views) -> list[ErrorGroup]:
    """Files without clips by the kind of their error, with up to four examples each."""
    found = lake.rows(
        """
        SELECT coalesce(error_kind, status), count(*),
            list((uri, coalesce(error, '')) ORDER BY uri)[:4]
        FROM sources WHERE status IN ('failed', 'incomplete')
        GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 50
        """
    )
    return [
        ErrorGroup(kind, count, [_example(file_name(e[0] or ""), e[1]) for e in examples])
        for kind, count, examples in found
    ]


def operator_errors(lake: Views) -> list[ErrorGroup]:
    """Errors by operator, and the failures of stages where the lake keeps them."""
    groups = []
    columns = {operator: f"{operator}_error" for operator in sorted(lake.operators)}
    columns["a stage"] = "failure"
    for operator, name in columns.items():
        column = quoted(name)
        if lake.columns["clips_decided"].get(name) != "VARCHAR":
            continue
        found = lake.rows(
            f"SELECT {column}, count(*), min(uri) FROM {CLIPS} WHERE {column} IS NOT NULL "
            "GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 4"
        )
        total = lake.number(f"SELECT count({column}) FROM {CLIPS}")
        if found:
            examples = [
                _example(f"{count:,} × e.g. {file_name(uri or '')}", error)
                for error, count, uri in found
            ]
            groups.append(ErrorGroup(operator, total, examples))
    return groups


def _example(where: str, message: str) -> tuple[str, str]:
    return where, short(message, 300)
