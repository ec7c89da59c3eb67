"""The critic's calibration in SQL: columns that exist while a policy decides, and in no table.

A policy that names a `calibration` may use, beside the columns of the clip,
    physics_calibrated_score     expectation, 1..5
    physics_calibrated_label     1..5, by the cut points
    physics_calibrated_good      probability that people rate the clip 4 or 5
    physics_calibrated_bad       probability that they rate it 1 or 2
    physics_calibrated_keep_95   whether `good` reaches the limit for a precision of 95 %
They are computed from physics_p1..p5, so a new calibration is a refilter. They are NULL, and the
verdict `error`, where the critic gave no probabilities, or where another model, prompt or mode gave
them than the calibration was fitted to. The same arithmetic in numpy: `calibrated` in
operators/critic/calibration.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches

import pyarrow as pa

from winnow.operators.critic.calibration import DIGITS, FLOOR, TOLERANCE, Calibration
from winnow.operators.critic.judgement import SCORES
from winnow.operators.errors import ConfigError
from winnow.operators.operator import Column, Direction

PREFIX = "physics_calibrated_"
KEEP = f"{PREFIX}keep_"
_PROBABILITIES = tuple(f"physics_p{score}" for score in SCORES)
_IDENTITY = {"physics_model": "model", "physics_prompt": "prompt", "physics_mode": "mode"}
"""Columns of a clip and the field of the critic that they must equal."""

_WEIGHTS = tuple(f"_physics_w{score}" for score in SCORES)
_SUM = " + ".join(_WEIGHTS)


def is_calibrated(column: str) -> bool:
    """Whether a column is one of these, by its name in lower case."""
    return column.startswith(PREFIX)


def calibrated_columns(calibrations: Sequence[Calibration]) -> tuple[Column, ...]:
    """What a policy with these calibrations may use."""
    if not calibrations:
        return ()
    keys = [{threshold.key for threshold in c.thresholds} for c in calibrations]
    higher: Direction = "higher is better"
    return (
        Column(f"{PREFIX}score", pa.float64(), "expected rating", "", "1..5", higher),
        Column(f"{PREFIX}label", pa.int32(), "rating by the cut points", "", "1..5", higher),
        Column(f"{PREFIX}good", pa.float64(), "probability of 4 or 5", "", "0..1", higher),
        Column(f"{PREFIX}bad", pa.float64(), "probability of 1 or 2", "", "0..1",
               "lower is better"),
        *(
            Column(f"{KEEP}{key}", pa.bool_(), f"a precision of {key.replace('_', '.')} % is reached")
            for key in sorted(set.intersection(*keys))
        ),
    )  # fmt: skip


def needed_columns(calibrations: Sequence[Calibration], any_model: bool) -> set[str]:
    """Columns of the clip that all of these are computed from."""
    return {*_PROBABILITIES, *(() if any_model or not calibrations else _IDENTITY)}


def check_calibrated(column: str, calibrations: Sequence[Calibration], where: str) -> None:
    """Raises ConfigError where the calibrations do not give a column that a rule uses."""
    if not calibrations:
        raise ConfigError(
            f"{where}: {column!r} needs a calibration: add `calibration: FILE` to the policy, a file "
            "that `winnow critic calibrate` wrote"
        )
    known = [c.name for c in calibrated_columns(calibrations)]
    if column not in known:
        if column.startswith(KEEP):
            raise ConfigError(
                f"{where}: {column!r}: no such limit in {_names(calibrations)}, which has "
                f"{', '.join(n for n in known if n.startswith(KEEP)) or 'none'}: fit it with that "
                "precision"
            )
        near = get_close_matches(column, known, n=1)
        raise ConfigError(
            f"{where}: a calibration gives no {column!r}: "
            + (f"did you mean {near[0]!r}?" if near else f"it gives {', '.join(known)}")
        )
    for calibration in calibrations:
        for threshold in calibration.thresholds:
            if column == f"{KEEP}{threshold.key}" and threshold.limit is None:
                raise ConfigError(
                    f"{where}: {column!r}: the calibration {calibration}: {threshold.text}"
                )


def _names(calibrations: Sequence[Calibration]) -> str:
    return " and ".join(str(calibration) for calibration in calibrations)


def with_calibrated(
    measured: str, wanted: Collection[str], calibrations: Sequence[Calibration], any_model: bool
) -> str:
    """SQL: the relation `measured` with the columns that are wanted of these.

    Of several calibrations, each row has the one that was fitted to its model, prompt and mode.
    """
    if not wanted:
        return f"(SELECT * FROM {measured})"
    given = [f"CAST({name} AS DOUBLE)" for name in _PROBABILITIES]
    # NaN is the largest number in DuckDB, and `least` and `greatest` pass over NULL: the sum is asked
    # first, which is NULL or NaN as soon as one of them is.
    usable = (
        f"abs({' + '.join(given)} - 1) < {_double(TOLERANCE)} AND least({', '.join(given)}) >= 0"
    )
    fitted = " ".join(
        f"WHEN {'true' if any_model else _is_of(calibration)} THEN {number}"
        for number, calibration in enumerate(calibrations, 1)
    )
    power = _pick([1 / calibration.temperature for calibration in calibrations])
    weights = ", ".join(
        f"pow(greatest({p}, {_double(FLOOR)}), {power}) AS {w}"
        for p, w in zip(given, _WEIGHTS, strict=True)
    )
    score = " + ".join(f"{s} * {w}" for s, w in zip(SCORES, _WEIGHTS, strict=True))
    return f"""(
        SELECT *, {", ".join(f'{_expression(name, calibrations)} AS "{name}"' for name in wanted)}
        FROM (SELECT *, ({score}) / ({_SUM}) AS _physics_score,
                     (_physics_w4 + _physics_w5) / ({_SUM}) AS _physics_good,
                     (_physics_w1 + _physics_w2) / ({_SUM}) AS _physics_bad
        FROM (SELECT *, {weights}
        FROM (SELECT *, CASE WHEN {usable} THEN CASE {fitted} END END AS _physics_fitted
        FROM {measured}))))"""


def _expression(name: str, calibrations: Sequence[Calibration]) -> str:
    which = name.removeprefix(PREFIX)
    if which in ("score", "good", "bad"):
        return f"_physics_{which}"
    if which == "label":
        cuts = [_pick([c.cut_points[k] for c in calibrations]) for k in range(len(SCORES) - 1)]
        above = (f"CAST(round(_physics_score, {DIGITS}) >= {cut} AS INTEGER)" for cut in cuts)
        return f"1 + {' + '.join(above)}"
    limits = [
        threshold.limit
        for calibration in calibrations
        for threshold in calibration.thresholds
        if name == f"{KEEP}{threshold.key}" and threshold.limit is not None
    ]
    return f"round(_physics_good, {DIGITS}) >= {_pick(limits)}"


def _is_of(calibration: Calibration) -> str:
    """SQL: a row's probabilities are those of the critic that the calibration was fitted to."""
    return " AND ".join(
        f"{column} = {_text(getattr(calibration.critic, field))}"
        for column, field in _IDENTITY.items()
    )


def _pick(numbers: Sequence[float]) -> str:
    """SQL: the number that belongs to the row's calibration; NULL where it has none."""
    return f"[{', '.join(_double(number) for number in numbers)}][_physics_fitted]"


def _double(number: float) -> str:
    """A DOUBLE literal; without an exponent DuckDB would read a DECIMAL."""
    text = repr(float(number))
    return text if "e" in text else f"{text}e0"


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def not_calibrated(clips: pa.Table, calibrations: Sequence[Calibration]) -> list[str]:
    """Of judged clips the critics that none of the calibrations is for, each with its clips' count."""
    counted = _PROBABILITIES[0]
    if not calibrations or not {counted, *_IDENTITY} <= set(clips.schema.names):
        return []
    known = {
        tuple(str(getattr(c.critic, field)) for field in _IDENTITY.values()) for c in calibrations
    }
    groups = clips.group_by(list(_IDENTITY)).aggregate([(counted, "count")]).to_pylist()
    found = [
        (row[f"{counted}_count"], tuple(str(row[column]) for column in _IDENTITY)) for row in groups
    ]
    return [
        f"{count} clips were judged by {', '.join(critic)}: the policy's calibration is for "
        f"{_names(calibrations)}"
        for count, critic in sorted(found, reverse=True)
        if count and critic not in known
    ]
