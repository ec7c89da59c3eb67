"""The distribution of every score: binned in SQL, with the thresholds of the rules on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from winnow.pipeline.report_charts import Chart, Spread, binning, chart
from winnow.pipeline.report_rules import Comparison, Rulebook
from winnow.pipeline.report_values import share, short
from winnow.pipeline.report_views import CLIPS, ColumnDoc, Views, quoted

# What is longer, or nearly always different, is no class: bars would say nothing of it.
_LONGEST_WORD = 100
_MOST_WORDS = 200


@dataclass(frozen=True, slots=True)
class Score:
    """One column with its distribution."""

    column: str
    operator: str
    """Who wrote it, empty for what is known of every clip."""
    doc: ColumnDoc
    chart: Chart | None
    """None for a column of words."""
    categories: Sequence[tuple[str, Mapping[str, int], float]]
    """(word, clips by verdict, its bar as a share of the longest)"""
    missing: int
    median: float | None
    rules: Sequence[str]


def scores(lake: Views, book: Rulebook) -> tuple[list[Score], list[Score], list[tuple[str, str]]]:
    """Scores with a rule, scores without, and columns that have nothing to draw."""
    spreads = _spreads(lake)
    judged: list[Score] = []
    other: list[Score] = []
    silent: list[tuple[str, str]] = []
    for name in lake.score_columns():
        kind = lake.columns["clips_decided"][name]
        if kind == "BOOLEAN":
            _add_words(lake, book, name, judged, other, silent)
            continue
        finite, missing, spread, median = spreads[name]
        marks = book.marks.get(name, [])
        if finite == 0:
            silent.append((name, "never measured"))
            continue
        if spread.minimum == spread.maximum and not marks:
            silent.append((name, f"always {spread.minimum:g}"))
            continue
        score = Score(
            column=name,
            operator=lake.operator(name),
            doc=lake.doc(name),
            chart=_chart(lake, name, spread, marks),
            categories=(),
            missing=missing,
            median=median,
            rules=book.names_of_column.get(name, []),
        )
        (judged if marks else other).append(score)
    for name in lake.word_columns():
        _add_words(lake, book, name, judged, other, silent)
    return judged, other, silent


def _spreads(lake: Views) -> dict[str, tuple[int, int, Spread, float | None]]:
    names = [n for n in lake.score_columns() if lake.columns["clips_decided"][n] != "BOOLEAN"]
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
    row = lake.rows(f"SELECT {', '.join(parts)} FROM {CLIPS}")[0]
    spreads: dict[str, tuple[int, int, Spread, float | None]] = {}
    for index, name in enumerate(names):
        finite, missing, quantiles, low, high, whole = row[index * 6 : index * 6 + 6]
        if not finite:
            spreads[name] = (0, missing, Spread(0, 0, 0, 0, False), None)
            continue
        spread = Spread(quantiles[0], quantiles[2], low, high, bool(whole))
        spreads[name] = (finite, missing, spread, quantiles[1])
    return spreads


def _chart(lake: Views, name: str, spread: Spread, marks: Sequence[Comparison]) -> Chart:
    bins = binning(spread, marks)
    column = quoted(name)
    found = lake.rows(
        f"SELECT {bins.sql(column)}, verdict_shown, count(*) FROM {CLIPS} "
        f"WHERE isfinite({column}::DOUBLE) GROUP BY ALL"
    )
    counts: dict[int, dict[str, int]] = defaultdict(dict)
    for number, verdict, count in found:
        counts[number][verdict] = count
    return chart(bins, counts, marks)


def _add_words(
    lake: Views,
    book: Rulebook,
    name: str,
    judged: list[Score],
    other: list[Score],
    silent: list[tuple[str, str]],
) -> None:
    column = quoted(name)
    different, longest = lake.rows(
        f"SELECT count(DISTINCT {column}), max(length({column}::VARCHAR)) FROM {CLIPS}"
    )[0]
    if different > 1 and (longest > _LONGEST_WORD or different > _MOST_WORDS):
        silent.append((name, f"is free text, {different:,} different ones"))
        return
    found = lake.rows(
        f"SELECT {column}::VARCHAR, verdict_shown, count(*) FROM {CLIPS} "
        f"WHERE {column} IN (SELECT {column} FROM {CLIPS} WHERE {column} IS NOT NULL "
        f"GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 8) GROUP BY ALL ORDER BY 1"
    )
    if not found:
        silent.append((name, "never measured"))
        return
    by_word: dict[str, dict[str, int]] = defaultdict(dict)
    for word, verdict, count in found:
        by_word[word][verdict] = count
    if len(by_word) == 1 and name not in book.names_of_column:
        silent.append((name, f"always {short(next(iter(by_word)), 60)}"))
        return
    most = max(sum(counts.values()) for counts in by_word.values())
    missing = lake.number(f"SELECT count(*) FROM {CLIPS} WHERE {column} IS NULL")
    words = sorted(by_word.items(), key=lambda item: -sum(item[1].values()))
    rules = [r.name for r in book.rules if name in book.columns_of(r)]
    score = Score(
        column=name,
        operator=lake.operator(name),
        doc=lake.doc(name),
        chart=None,
        categories=[(short(w, 60), c, share(sum(c.values()), most)) for w, c in words],
        missing=missing,
        median=None,
        rules=rules,
    )
    (judged if rules else other).append(score)
