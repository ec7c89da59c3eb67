"""Policy: named SQL predicates over the columns of a clip decide what is kept.

One evaluator (DuckDB) decides inside a run, after every stage, and in `winnow refilter`. A rule
rejects where its predicate is true. Where it is NULL the clip's verdict is `error`, not `reject`: a
measure that failed is no low score. A rejected clip lists every rule that rejects it; a clip that no
rule rejects but some rule cannot judge is an error and lists those. A percentile rule rejects by the
clip's place among all clips of the lake, a ratio rule by its score against its input video's: only
refilter knows the whole lake, so a run leaves such rules open.

A policy may name a calibration of the critic; its rules may then use the columns of
pipeline/calibrated.py, which are computed while they decide.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from winnow.operators.critic.calibration import Calibration, load_calibration
from winnow.operators.errors import ConfigError
from winnow.operators.operator import Column
from winnow.operators.settings import Strict, find_config, parse_yaml, validate
from winnow.pipeline.calibrated import (
    PREFIX,
    calibrated_columns,
    check_calibrated,
    is_calibrated,
    needed_columns,
    with_calibrated,
)
from winnow.pipeline.percentiles import (
    Limit,
    Percentile,
    beyond_limit,
    join_limits,
    limit_tables,
    measure_limits,
)
from winnow.pipeline.predicates import check_expression
from winnow.pipeline.ratios import ABSENT, Ratio, beyond_ratio, join_input_scores


class Rule(Strict):
    """One reason to reject a clip: a predicate, a percentile of the lake, or a ratio to its input."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    reject: str = Field("", description="SQL predicate over the clip's columns; true rejects")
    percentile: Percentile | None = Field(
        None, description="in place of `reject`: the clip's place among all clips of the lake"
    )
    # Left out of what is written where there is none: it names the rules of older lakes too.
    ratio: Ratio | None = Field(
        None,
        exclude_if=lambda ratio: ratio is None,
        description="in place of `reject`: the clip's score against its input video's",
    )
    when: str | None = Field(
        None,
        description="SQL predicate: the rule applies where it is true. It does not narrow the "
        "population of a percentile",
    )
    reason: str = Field("", description="what is wrong with such a clip, for people")

    @model_validator(mode="after")
    def _one_way(self) -> Rule:
        if not self.over_lake and "reject" not in self.model_fields_set:
            raise ValueError("give the rule a predicate `reject`, or a `percentile`, or a `ratio`")
        if [bool(self.reject), self.percentile is not None, self.ratio is not None].count(True) > 1:
            raise ValueError("a rule has either `reject` or `percentile` or `ratio`")
        return self

    @property
    def over_lake(self) -> bool:
        """It is decided when all clips of the lake are known, not while a run streams."""
        return self.percentile is not None or self.ratio is not None

    @property
    def predicate(self) -> str:
        """What rejects, for people: SQL, or the percentile or ratio in words."""
        rejects = str(self.percentile or self.ratio or self.reject)
        return f"({self.when}) AND ({rejects})" if self.when else rejects


class _Rules(Strict):
    """A named list of rules."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    description: str = ""
    rules: tuple[Rule, ...]
    calibration_any_model: bool = Field(
        False,
        description="apply the calibration to the probabilities of any model, prompt and mode, not "
        "only of those that it was fitted to",
    )

    def model_post_init(self, _: Any) -> None:
        names = [rule.name for rule in self.rules]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rules are called {name!r}")


class Policy(_Rules):
    """A named list of rules, with the calibrations of the critic that they use."""

    calibration: tuple[Calibration, ...] = ()
    """Whole, not by name: the policy as it was is kept with the run."""

    @model_validator(mode="after")
    def _one_calibration_each(self) -> Policy:
        of = [(c.critic.model, c.critic.prompt, c.critic.mode) for c in self.calibration]
        if len(set(of)) < len(of):
            raise ValueError("two calibrations are for the same model, prompt and mode")
        if self.calibration_any_model and len(of) != 1:
            raise ValueError("`calibration_any_model` needs exactly one `calibration`")
        return self

    @property
    def needs_population(self) -> bool:
        """Some rule is decided over the whole lake, after the run."""
        return any(rule.over_lake for rule in self.rules)

    @property
    def needs_inputs(self) -> bool:
        """Some rule compares clips with their input video: see pipeline/input_clips.py."""
        return any(rule.ratio is not None for rule in self.rules)


class PolicyFile(_Rules):
    """A policy as it is written: it may stand on another one."""

    extends: str | None = Field(None, description="path or name of the policy that this adds to")
    without: tuple[str, ...] = Field((), description="rules of that policy to leave out")
    rules: tuple[Rule, ...] = ()
    calibration: str | tuple[str, ...] | None = Field(
        None,
        description="file that `winnow critic calibrate` wrote, or several for several models, "
        "prompts or modes; relative to this policy's folder, else to the working directory",
    )

    def over(self, base: Policy | None, origin: str) -> Policy:
        """This policy's rules over those of its base: a rule of the same name takes its place.

        A calibration takes the place of the base's.
        """
        rules = {rule.name: rule for rule in base.rules} if base is not None else {}
        for name in self.without:
            if name not in rules:
                raise ConfigError(
                    f"{origin}: without: {base.name if base else self.name} has no rule {name!r}"
                )
            del rules[name]
        rules |= {rule.name: rule for rule in self.rules}
        calibration, any_model = self._calibrations(origin), self.calibration_any_model
        if base is not None and "calibration" not in self.model_fields_set:
            calibration = base.calibration
            if "calibration_any_model" not in self.model_fields_set:
                any_model = base.calibration_any_model
        content = {
            "name": self.name,
            "description": self.description,
            "rules": tuple(rules.values()),
            "calibration": calibration,
            "calibration_any_model": any_model,
        }
        return validate(Policy, content, origin)

    def _calibrations(self, origin: str) -> tuple[Calibration, ...]:
        written = self.calibration or ()
        files = (written,) if isinstance(written, str) else written
        folder = Path(origin).parent
        # An absolute path stays what it is.
        found = [folder / name if (folder / name).is_file() else Path(name) for name in files]
        return tuple(load_calibration(path) for path in found)


def load_policy(name: str) -> Policy:
    """Read a policy: a path, or a name in configs/policies. Raises ConfigError."""
    return _load_policy(name, ())


def _load_policy(name: str, above: tuple[str, ...]) -> Policy:
    if name in above:
        raise ConfigError(f"policies extend each other in a circle: {' -> '.join((*above, name))}")
    text, origin = find_config(name, "policies")
    written = validate(PolicyFile, parse_yaml(text, origin), origin)
    if written.extends is None:
        if written.without or "rules" not in written.model_fields_set:
            raise ConfigError(f"{origin}: give `rules`, or name a policy that this one `extends`")
        return written.over(None, origin)
    return written.over(_load_policy(written.extends, (*above, name)), origin)


# Facts of the source that a rule may use beside the clip's own columns.
SOURCE_COLUMNS = (
    Column("fps", pa.float64(), "frame rate of the source", "1/s", "> 0"),
    Column("width", pa.int32(), "upright width of the source", "pixels", ">= 1"),
    Column("height", pa.int32(), "upright height of the source", "pixels", ">= 1"),
    Column("variable_frame_rate", pa.bool_(), "frame times are uneven"),
    Column("prompt", pa.string(), "prompt that the video was made from"),
    Column("generator", pa.string(), "world model that made the video, where a sidecar says so"),
    Column("input_uri", pa.string(), "video or image that it was made from, as the sidecar has it"),
)


def predicate_columns(predicate: str, where: str) -> set[str]:
    """The columns that an SQL predicate reads.

    Raises ConfigError where the text is not one expression, or is made of more than
    pipeline/predicates.py allows: a predicate sees one clip and nothing else.
    """
    if not predicate.strip():
        raise ConfigError(f"{where}: the predicate is empty")
    with duckdb.connect() as connection:
        row = connection.execute(
            "SELECT json_serialize_sql('SELECT (' || ? || chr(10) || ')')", [predicate]
        ).fetchone()
    try:
        tree = json.loads(row[0]) if row else {}
    except RecursionError as error:
        raise ConfigError(f"{where}: the predicate is nested too deep") from error
    if tree.get("error"):
        raise ConfigError(f"{where}: not a valid SQL predicate: {tree.get('error_message')}")
    statements = tree["statements"]
    node = statements[0]["node"] if len(statements) == 1 else {}
    selected = node.get("select_list", [])
    plain = node.get("from_table", {}).get("type") == "EMPTY" and len(selected) == 1
    if not plain or node.get("where_clause"):
        raise ConfigError(f"{where}: write one SQL expression over a clip's columns, no query")
    check_expression(selected, where)
    columns: set[str] = set()
    for reference in _kinds(selected, "COLUMN_REF"):
        columns.add(reference["column_names"][-1].lower())
    return columns


def rejecting_columns(rule: Rule, where: str) -> set[str]:
    """Lower-case names of the columns that a rule rejects by, apart from its `when`.

    Raises ConfigError where the predicate is none.
    """
    if rule.percentile is not None:
        return rule.percentile.columns
    if rule.ratio is not None:
        return {rule.ratio.column.lower()}
    return predicate_columns(rule.reject, where)


def _kinds(tree: Any, kind: str) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        if tree.get("class") == kind:
            yield tree
        for value in tree.values():
            yield from _kinds(value, kind)
    elif isinstance(tree, list):
        for value in tree:
            yield from _kinds(value, kind)


def sandboxed(threads: int = 1) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection that can neither read nor write anything outside its own tables."""
    connection = duckdb.connect()
    connection.execute(f"SET threads = {threads:d}")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


@dataclass(frozen=True, slots=True)
class Judged:
    """What the rules say of many clips: few distinct outcomes, and which of them each clip has."""

    outcome: NDArray[np.int64]
    """For each clip its place in `outcomes`."""
    outcomes: list[tuple[list[str], list[str]]]
    """The rules that reject, and those that cannot judge."""
    limits: list[Limit]
    """Where the percentiles lie."""


class Evaluator:
    """Applies a policy to clips whose columns are declared.

    `threads` are those that work on a whole table; a run's stages have their own processes.
    Raises ConfigError at construction where a rule names a column that nobody writes or its
    predicate does not yield a truth value.
    """

    def __init__(self, policy: Policy, columns: Sequence[Column], *, threads: int = 1) -> None:
        self.policy = policy
        self.columns = tuple(columns)
        self._schema = pa.schema([(c.name, c.type) for c in (*SOURCE_COLUMNS, *columns)
                                  if not pa.types.is_binary(c.type)])  # fmt: skip
        self._names = {name.lower(): name for name in self._schema.names}
        taken = sorted(name for name in self._names if is_calibrated(name))
        if taken and policy.calibration:
            raise ConfigError(
                f"policy {policy.name}: the column {taken[0]!r} is written by a stage: rename it, for "
                f"{PREFIX}* are the columns of a calibration"
            )
        self._connection = sandboxed(threads)
        # The calls of a Ray actor overlap, and DuckDB refuses a second query on one connection.
        self._asking = threading.Lock()
        self._calibrated: dict[str, set[str]] = {}
        self.reads = {rule.name: self._check(rule) for rule in policy.rules}
        """By rule the measured columns that it reads, in lower case."""

    def _check(self, rule: Rule) -> set[str]:
        where = f"policy {self.policy.name}, rule {rule.name}"
        known = {name.lower() for name in self._schema.names}
        reads = rejecting_columns(rule, where)
        if rule.when is not None:
            reads |= predicate_columns(rule.when, where)
        policy = self.policy
        self._calibrated[rule.name] = used = {c for c in reads - known if is_calibrated(c)}
        for column in sorted(used):
            check_calibrated(column, policy.calibration, where)
        if used:
            reads = (reads - used) | needed_columns(
                policy.calibration, policy.calibration_any_model
            )
        for column in sorted(reads - known):
            near = get_close_matches(column, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"{where}: no stage or operator writes the column {column!r}. {hint}"
                "Add the operator to a filter stage or drop the rule"
            )
        if rule.percentile is not None:
            rule.percentile.check(self._all_columns(), where)
        if rule.ratio is not None:
            rule.ratio.check(self._all_columns(), where)
        predicates = (None if rule.over_lake else rule.reject, rule.when)
        try:
            self._show(self._schema.empty_table(), [rule])
            for predicate in (p for p in predicates if p is not None):
                described = f"DESCRIBE SELECT ({predicate}\n) FROM clips"
                kind = self._connection.execute(described).fetchall()[0][1]
                if kind != "BOOLEAN":
                    raise ConfigError(f"{where}: {predicate!r} is {kind}, not true or false")
            self._judge([rule], []).fetchall()
        except duckdb.Error as error:
            raise ConfigError(f"{where}: {error}") from error
        finally:
            self._hide()
        return reads

    def _all_columns(self) -> pa.Schema:
        calibrated = calibrated_columns(self.policy.calibration)
        return pa.schema([*self._schema, *((c.name, c.type) for c in calibrated)])

    def _with_calibrated(self, measured: str, rules: Sequence[Rule]) -> str:
        """SQL: the relation with what a calibration adds, where one of the rules reads it."""
        wanted = set[str]().union(*(self._calibrated[rule.name] for rule in rules))
        policy = self.policy
        return with_calibrated(
            measured, sorted(wanted), policy.calibration, policy.calibration_any_model
        )

    def _show(
        self, table: pa.Table, rules: Sequence[Rule], inputs: NDArray[np.int64] | None = None
    ) -> None:
        """Make `clips` of a table, as the rules are to see it, its rows numbered."""
        if inputs is None:
            inputs = np.full(table.num_rows, ABSENT, np.int64)
        for name, numbers in (("_row", np.arange(table.num_rows)), ("_input", inputs)):
            table = table.append_column(name, pa.array(numbers, pa.int64()))
        self._connection.register("measured", table)
        seen = self._with_calibrated("measured", rules)
        self._connection.execute(f"CREATE OR REPLACE TEMP VIEW clips AS FROM {seen}")

    def _hide(self) -> None:
        self._connection.execute("DROP VIEW IF EXISTS clips")
        self._connection.unregister("measured")

    def rejects(
        self, rows: Sequence[Mapping[str, Any]], written: set[str] | None = None
    ) -> list[tuple[list[str], list[str]]]:
        """For each clip the rules that reject it and the rules that cannot judge it.

        With `written`, only rules whose columns are all in it are asked (in the middle of a run).
        Rules over the whole lake are never asked here: a few clips are not their population.
        """
        source = {column.name.lower() for column in SOURCE_COLUMNS}
        rules = [
            rule
            for rule in self.policy.rules
            if not rule.over_lake
            and (written is None or self.reads[rule.name] <= (written | source))
        ]
        if not rows or not rules:
            return [([], []) for _ in rows]
        # A few rows go as parameters: building an Arrow table would import pandas into every worker.
        reads = sorted(set().union(*(self.reads[rule.name] for rule in rules)))
        fields = [self._schema.field(self._names[name]) for name in reads]
        cells = ", ".join(f'CAST(? AS {_sql_type(f.type)}) AS "{f.name}"' for f in fields)
        clips = self._with_calibrated(f"(SELECT {cells or '1'})", rules)
        selected = ", ".join(_judgement(rule) for rule in rules)
        query = f"SELECT {selected} FROM {clips} AS clips"
        answers = []
        with self._asking:
            for row in rows:
                parameters = [_parameter(row.get(f.name), f.type) for f in fields]
                answers += self._connection.execute(query, parameters).fetchall()
        return _sort(rules, answers)

    def judge(
        self, table: pa.Table, rules: Sequence[Rule], inputs: NDArray[np.int64] | None = None
    ) -> tuple[list[tuple[list[str], list[str]]], list[Limit]]:
        """`rejects` for an Arrow table, in its order: `judge_all`, clip by clip."""
        judged = self.judge_all(table, rules, inputs)
        return [judged.outcomes[place] for place in judged.outcome.tolist()], judged.limits

    def judge_all(
        self, table: pa.Table, rules: Sequence[Rule], inputs: NDArray[np.int64] | None = None
    ) -> Judged:
        """What the rules say of an Arrow table that has the columns that they read, in its order.

        The table is the population of percentile rules. `inputs` has for each of its rows the row
        of its input video's clip (`InputClips.row`), which ratio rules compare it with; without
        it none has an input.
        """
        limits: list[Limit] = []
        if not rules:
            return Judged(np.zeros(table.num_rows, np.int64), [([], [])], limits)
        try:
            self._show(table, rules, inputs)
            answers = self._judge(rules, limits, " ORDER BY clips._row").to_arrow_table()
        finally:
            self._hide()
        return Judged(*_distinct(rules, answers), limits)

    def _judge(
        self, rules: Sequence[Rule], limits: list[Limit], order: str = ""
    ) -> duckdb.DuckDBPyRelation:
        """The rules' answers for every row of the table `clips`; percentiles go into `limits`."""
        ranking = {rule.name: rule.percentile for rule in rules if rule.percentile is not None}
        tables = limit_tables(list(ranking))
        joins = []
        for name, percentile in ranking.items():
            limits += measure_limits(self._connection, name, percentile, tables[name])
            joins.append(join_limits(percentile, tables[name]))
        compared = {rule.name: rule.ratio for rule in rules if rule.ratio is not None}
        joins.append(join_input_scores(list(compared.values())))
        place = {name: number for number, name in enumerate(compared)}
        selected = ", ".join(
            f"{_judgement(rule, tables, place)} AS _{n}" for n, rule in enumerate(rules)
        )
        return self._connection.sql(f"SELECT {selected} FROM clips {' '.join(joins)}{order}")


def _sort(
    rules: Sequence[Rule], answers: Sequence[tuple[Any, ...]]
) -> list[tuple[list[str], list[str]]]:
    """The rules that reject and those that cannot say, from each row's answers."""
    return [
        (
            [rule.name for rule, answer in zip(rules, row, strict=True) if answer is True],
            [rule.name for rule, answer in zip(rules, row, strict=True) if answer is None],
        )
        for row in answers
    ]


def _distinct(
    rules: Sequence[Rule], answers: pa.Table
) -> tuple[NDArray[np.int64], list[tuple[list[str], list[str]]]]:
    """Each row's place among the distinct rows of answers, and what these say."""
    place = np.zeros(answers.num_rows, np.int64)
    for n, column in enumerate(answers.columns):
        answer = column.cast(pa.int8()).fill_null(2).to_numpy()
        place = place * 3 + answer
        if n % 32 == 31:  # before 3 ** n leaves 64 bits
            place = np.unique(place, return_inverse=True)[1]
    _, first, place = np.unique(place, return_index=True, return_inverse=True)
    found = answers.take(pa.array(first)).to_pydict().values()
    return place, _sort(rules, list(zip(*found, strict=True)))


_SQL_TYPES = {
    pa.float64(): "DOUBLE", pa.float32(): "FLOAT", pa.bool_(): "BOOLEAN", pa.string(): "VARCHAR",
    pa.int64(): "BIGINT", pa.int32(): "INTEGER", pa.int16(): "SMALLINT", pa.int8(): "TINYINT",
}  # fmt: skip


def _sql_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"{_sql_type(kind.value_type)}[]"
    if pa.types.is_map(kind):
        return f"MAP({_sql_type(kind.key_type)}, {_sql_type(kind.item_type)})"
    return _SQL_TYPES.get(kind, "VARCHAR")


def _parameter(value: Any, kind: pa.DataType) -> Any:
    """A cell as DuckDB takes it: a map, pairs or a dict as for Arrow, as lists of keys and values."""
    if value is None or not pa.types.is_map(kind):
        return value
    pairs = dict(value)
    return {"key": list(pairs), "value": list(pairs.values())}


def _judgement(
    rule: Rule, limits: Mapping[str, str] | None = None, compared: Mapping[str, int] | None = None
) -> str:
    """SQL: true rejects, false does not, NULL cannot say. A `when` that is false settles it.

    A predicate that cannot be computed for a clip, such as a CAST of a text that is no number, is NULL
    for that clip: it must not take down the run. `limits` names the table of each percentile rule,
    `compared` the place of each ratio rule.
    """
    if rule.percentile is not None:
        reject = beyond_limit(rule.percentile, (limits or {})[rule.name])
    elif rule.ratio is not None:
        reject = beyond_ratio(rule.ratio, (compared or {})[rule.name])
    else:
        reject = f"CAST(TRY(({rule.reject}\n)) AS BOOLEAN)"
    if rule.when is None:
        return reject
    when = f"CAST(TRY(({rule.when}\n)) AS BOOLEAN)"
    return f"CASE WHEN {when} THEN {reject} WHEN NOT {when} THEN false ELSE NULL END"
