"""Ratio rules: a generation is judged by how its score compares with its input video's.

For generations that follow a video (Transfer follows one frame by frame): what is little motion for a
race is much for a chess game, and the input shows which of them it is. The input is itself a source of
the lake, measured like every other; pipeline/input_clips.py finds it, and in it the clip that runs at
the same time. Both are known when all clips are: a run leaves these rules open, as it does percentiles,
and they are decided over the whole lake.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from winnow.operators.errors import ConfigError
from winnow.operators.settings import Strict

ABSENT = -1
"""In place of a clip's counterpart: the lake has none."""
AMBIGUOUS = -2
"""In place of a clip's counterpart: several sources of different content could be the input."""


class Ratio(Strict):
    """A clip is rejected where its score, divided by its input video's, lies strictly beyond.

    Only scores of 0 or more have a ratio, where 0 says that nothing of it is there: a negative
    score, a missing one and one that is no finite number cannot be judged, on either side. Where
    the input's score is 0 the ratio is 1 if the clip's is 0 too, as for any two equal scores, and
    infinite if it is not: beyond every `above`, and below nothing.
    """

    column: str = Field(description="the score, a column of numbers of 0 or more")
    to: Literal["input"] = Field(
        "input", description="what it is divided by: that score of the input video's clip"
    )
    below: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="ratio; lower ones reject"
    )
    above: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="ratio; higher ones reject"
    )
    absent: Literal["error", "pass"] = Field(
        "error",
        description="verdict on a clip whose input video is not in the lake, or not at that time; one "
        "that several sources could be is always an error",
    )

    @model_validator(mode="after")
    def _some_side(self) -> Ratio:
        if self.below is None and self.above is None:
            raise ValueError("give `below`, `above`, or both")
        if self.below is not None and self.above is not None and self.below > self.above:
            raise ValueError("`below` is more than `above`: every ratio would reject")
        return self

    def __str__(self) -> str:
        sides = [
            f"{side} {limit:g} times"
            for side, limit in (("below", self.below), ("above", self.above))
            if limit is not None
        ]
        return f"{self.column} {' or '.join(sides)} that of the input video"

    @property
    def limits(self) -> list[tuple[Literal["<", ">"], float]]:
        """On which sides of which ratios it rejects."""
        sides: list[tuple[Literal["<", ">"], float | None]] = [
            ("<", self.below), (">", self.above)
        ]  # fmt: skip
        return [(side, limit) for side, limit in sides if limit is not None]

    def check(self, schema: pa.Schema, where: str) -> None:
        """Raises ConfigError where the column, which exists, is not of a kind to do this with."""
        kinds = {field.name.lower(): field.type for field in schema}
        score = kinds[self.column.lower()]
        if not pa.types.is_integer(score) and not pa.types.is_floating(score):
            raise ConfigError(f"{where}: {self.column!r} is {score}: a ratio needs numbers")


# The table `clips` has the columns `_row`, its number, and `_input`, the row of the counterpart.
_SIDE = "_of_input"


def join_input_scores(ratios: Sequence[Ratio]) -> str:
    """SQL that gives each of `clips` the scores of its counterpart; empty for no rules."""
    if not ratios:
        return ""
    # Under names of their own: the predicates of other rules name columns without a table.
    scores = ", ".join(f'{_score("clips", r)} AS "_input_{n}"' for n, r in enumerate(ratios))
    return (
        f"LEFT JOIN (SELECT clips._row AS _input_row, {scores} FROM clips) {_SIDE} "
        f"ON {_SIDE}._input_row = clips._input"
    )


def beyond_ratio(ratio: Ratio, number: int) -> str:
    """SQL: true where the ratio lies beyond, NULL where it cannot be judged.

    `number` is the rule's place among those given to `join_input_scores`.
    """
    ours, theirs = _score("clips", ratio), f'{_SIDE}."_input_{number}"'
    divided = (
        f"CASE WHEN {theirs} > 0 THEN {ours} / {theirs} "
        f"WHEN {ours} > 0 THEN 'inf'::DOUBLE ELSE 1e0 END"
    )
    beyond = " OR ".join(f"({divided}) {side} {limit!r}::DOUBLE" for side, limit in ratio.limits)
    absent = "false" if ratio.absent == "pass" else "NULL"
    return (
        f"CASE WHEN clips._input = {ABSENT} THEN {absent} "
        f"WHEN {ours} IS NULL OR {theirs} IS NULL THEN NULL ELSE {beyond} END"
    )


def _score(table: str, ratio: Ratio) -> str:
    """The score as a DOUBLE; NULL where it is no finite number of 0 or more."""
    number = f'CAST({table}."{ratio.column}" AS DOUBLE)'
    return f"CASE WHEN isfinite({number}) AND {number} >= 0 THEN {number} END"


def divide(scores: NDArray[np.float64], inputs: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each row the ratio of its score to that of the row in `inputs`; NaN where there is none."""
    # + 0.0, for -0.0 would make a ratio of -infinity.
    usable = np.where(np.isfinite(scores) & (scores >= 0), scores + 0.0, np.nan)
    theirs = np.where(inputs >= 0, usable[inputs], np.nan) if len(usable) else usable
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray(np.where((usable == 0) & (theirs == 0), 1.0, usable / theirs))
