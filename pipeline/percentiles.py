"""Percentile rules: reject the worst share of a population, instead of what lies beyond a constant.

For scores whose scale means little by itself (DOVER, VTSS: published pipelines drop the lowest 15 %,
not what is below a number). The population is every committed clip of the lake that has the score,
whatever else is wrong with it, taken apart by the columns of `by`. While a run streams there is no
population yet: these rules are left open, and are decided over the whole lake by refilter.
A lake that grows moves its percentiles, and with them the verdicts of clips decided before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa
from pydantic import Field, model_validator

from winnow.operators.errors import ConfigError
from winnow.operators.settings import Strict


class Percentile(Strict):
    """A clip is rejected where its score lies strictly beyond this percentile of its group.

    Between two ranks the percentile is interpolated, as in `numpy.percentile`. Clips that tie with
    it stay, so that scores that are all equal reject nothing. A clip without the score cannot be
    judged. A NULL in a column of `by` (no generator named) makes a group of its own.
    """

    column: str = Field(description="the score, a column of numbers")
    below: float | None = Field(None, gt=0, lt=100, description="percentile; lower scores reject")
    above: float | None = Field(None, gt=0, lt=100, description="percentile; higher scores reject")
    by: tuple[str, ...] = Field((), description="columns that divide the population into groups")
    least: int = Field(
        20, ge=2, description="a group with fewer scores rejects nothing: its percentiles are noise"
    )

    @model_validator(mode="after")
    def _one_side(self) -> Percentile:
        if (self.below is None) == (self.above is None):
            raise ValueError("give one of `below` and `above`")
        return self

    def __str__(self) -> str:
        side = (
            f"below percentile {self.below:g}" if self.below else f"above percentile {self.above:g}"
        )
        within = f" within {', '.join(self.by)}" if self.by else ""
        return f"{self.column} {side}{within}"

    @property
    def columns(self) -> set[str]:
        """Lower-case names of the columns that it reads."""
        return {name.lower() for name in (self.column, *self.by)}

    def check(self, schema: pa.Schema, where: str) -> None:
        """Raises ConfigError where the columns, which exist, are not of a kind to do this with."""
        kinds = {field.name.lower(): field.type for field in schema}
        score = kinds[self.column.lower()]
        if not pa.types.is_integer(score) and not pa.types.is_floating(score):
            raise ConfigError(f"{where}: {self.column!r} is {score}: a percentile needs numbers")
        for name in self.by:
            if pa.types.is_nested(kinds[name.lower()]):
                raise ConfigError(
                    f"{where}: `by` {name!r} is {kinds[name.lower()]}: group by single values"
                )


@dataclass(frozen=True, slots=True)
class Limit:
    """Where a percentile lies in one group of the lake."""

    rule: str
    group: dict[str, Any]
    """The group's value of each column of `by`."""
    scores: int
    """Clips of the group that have the score."""
    value: float
    applied: bool
    """False where the group is too small, and rejects nothing."""

    def __str__(self) -> str:
        group = ", ".join(f"{k} {v}" for k, v in self.group.items()) or "all clips"
        small = "" if self.applied else ": too few to reject any"
        return f"rule {self.rule}, {group}: limit {self.value:.6g} of {self.scores} scores{small}"


def measure_limits(
    connection: duckdb.DuckDBPyConnection, rule: str, percentile: Percentile, table: str
) -> list[Limit]:
    """Make the temporary table `table` of a rule's limits by group, over the table `clips`."""
    connection.execute(f"CREATE OR REPLACE TEMP TABLE {table} AS {_limits_query(percentile)}")
    rows = connection.execute(f"SELECT * FROM {table} ORDER BY ALL").fetchall()
    return [
        Limit(
            rule,
            dict(zip(percentile.by, groups, strict=True)),
            scores,
            value,
            scores >= percentile.least,
        )
        for *groups, scores, value in rows
    ]


def _limits_query(percentile: Percentile) -> str:
    """One row a group: its values, the number of scores, the percentile.

    Not quantile_cont: DuckDB's interpolation between two equal scores can end an ulp beside them,
    and would then reject all of them or none. The difference form is exact there.
    """
    share = percentile.below if percentile.below is not None else percentile.above
    groups = "".join(f'"{name}" AS "_by_{n}", ' for n, name in enumerate(percentile.by))
    names = "".join(f'"_by_{n}", ' for n in range(len(percentile.by)))
    # percent * (n - 1) / 100 in this order: whole percentages then hit whole ranks exactly.
    return f"""
        WITH scored AS (SELECT {groups}{_score(percentile)} AS _score FROM clips),
        sorted AS (SELECT {names}list_sort(list(_score)) AS _sorted FROM scored
                   WHERE _score IS NOT NULL {f"GROUP BY {names.rstrip(', ')}" if names else ""}),
        placed AS (SELECT *, {share!r}::DOUBLE * (len(_sorted) - 1) / 100 AS _place FROM sorted),
        ranked AS (SELECT *, _sorted[floor(_place)::BIGINT + 1] AS _lower,
                   _sorted[ceil(_place)::BIGINT + 1] AS _upper FROM placed
                   WHERE len(_sorted) > 0)
        SELECT {names}len(_sorted) AS _scores,
               _lower + (_upper - _lower) * (_place - floor(_place)) AS _limit FROM ranked"""


def _score(percentile: Percentile) -> str:
    """The score as a DOUBLE; NULL where it is no finite number."""
    number = f'CAST(clips."{percentile.column}" AS DOUBLE)'
    return f"CASE WHEN isfinite({number}) THEN {number} END"


def join_limits(percentile: Percentile, table: str) -> str:
    """SQL that gives each of `clips` the limits of its group."""
    same = [f'clips."{name}" IS NOT DISTINCT FROM {table}."_by_{n}"'
            for n, name in enumerate(percentile.by)]  # fmt: skip
    return f"LEFT JOIN {table} ON {' AND '.join(same) or 'true'}"


def beyond_limit(percentile: Percentile, table: str) -> str:
    """SQL: true where the score lies beyond its group's limit, NULL where there is no score."""
    sign = "<" if percentile.below is not None else ">"
    score = _score(percentile)
    return (
        f"CASE WHEN {score} IS NULL THEN NULL WHEN {table}._scores < {percentile.least} THEN false "
        f"ELSE {score} {sign} {table}._limit END"
    )


def limit_tables(names: Sequence[str]) -> dict[str, str]:
    """The temporary table of each percentile rule."""
    return {name: f"_limits_{n}" for n, name in enumerate(names)}
