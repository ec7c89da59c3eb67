"""Policy: named SQL predicates over the columns of a clip decide what is kept.

One evaluator (DuckDB) decides inside a run, after every stage, and in `winnow refilter`. A rule
rejects where its predicate is true. Where it is NULL the clip's verdict is `error`, not `reject`: a
measure that failed is no low score. A rejected clip lists every rule that rejects it; a clip that no
rule rejects but some rule cannot judge is an error and lists those.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import duckdb
import pyarrow as pa
from pydantic import Field

from winnow.operators.errors import ConfigError
from winnow.operators.operator import Column
from winnow.operators.settings import Strict, find_config, parse_yaml, validate


class Rule(Strict):
    """One reason to reject a clip."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    reject: str = Field(description="SQL predicate over the clip's columns; true rejects")
    when: str | None = Field(None, description="SQL predicate: the rule applies where it is true")
    reason: str = Field("", description="what is wrong with such a clip, for people")


class Policy(Strict):
    """A named list of rules."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    description: str = ""
    rules: tuple[Rule, ...]

    def model_post_init(self, _: Any) -> None:
        names = [rule.name for rule in self.rules]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rules are called {name!r}")


def load_policy(name: str) -> Policy:
    """Read a policy: a path, or a name in configs/policies. Raises ConfigError."""
    text, origin = find_config(name, "policies")
    return validate(Policy, parse_yaml(text, origin), origin)


# Facts of the source that a rule may use beside the clip's own columns.
SOURCE_COLUMNS = (
    Column("fps", pa.float64(), "frame rate of the source", "1/s", "> 0"),
    Column("width", pa.int32(), "upright width of the source", "pixels", ">= 1"),
    Column("height", pa.int32(), "upright height of the source", "pixels", ">= 1"),
    Column("variable_frame_rate", pa.bool_(), "frame times are uneven"),
    Column("prompt", pa.string(), "prompt that the video was made from"),
    Column("generator", pa.string(), "world model that made the video, where a sidecar says so"),
)


def predicate_columns(predicate: str, where: str) -> set[str]:
    """The columns that an SQL predicate reads.

    Raises ConfigError where the text is not one expression, or holds a subquery: a predicate sees
    one clip and nothing else.
    """
    if not predicate.strip():
        raise ConfigError(f"{where}: the predicate is empty")
    with duckdb.connect() as connection:
        row = connection.execute(
            "SELECT json_serialize_sql('SELECT (' || ? || chr(10) || ')')", [predicate]
        ).fetchone()
    tree = json.loads(row[0]) if row else {}
    if tree.get("error"):
        raise ConfigError(f"{where}: not a valid SQL predicate: {tree.get('error_message')}")
    statements = tree["statements"]
    node = statements[0]["node"] if len(statements) == 1 else {}
    selected = node.get("select_list", [])
    plain = node.get("from_table", {}).get("type") == "EMPTY" and len(selected) == 1
    if not plain or node.get("where_clause") or any(_kinds(selected, "SUBQUERY")):
        raise ConfigError(f"{where}: write one SQL expression over a clip's columns, no query")
    columns: set[str] = set()
    for reference in _kinds(selected, "COLUMN_REF"):
        columns.add(reference["column_names"][-1].lower())
    return columns


def _kinds(tree: Any, kind: str) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        if tree.get("class") == kind:
            yield tree
        for value in tree.values():
            yield from _kinds(value, kind)
    elif isinstance(tree, list):
        for value in tree:
            yield from _kinds(value, kind)


def sandboxed() -> duckdb.DuckDBPyConnection:
    """A DuckDB connection that can neither read nor write anything outside its own tables."""
    connection = duckdb.connect()
    connection.execute("SET threads = 1")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


class Evaluator:
    """Applies a policy to clips whose columns are declared.

    Raises ConfigError at construction where a rule names a column that nobody writes or its
    predicate does not yield a truth value.
    """

    def __init__(self, policy: Policy, columns: Sequence[Column]) -> None:
        self.policy = policy
        self._schema = pa.schema([(c.name, c.type) for c in (*SOURCE_COLUMNS, *columns)
                                  if not pa.types.is_binary(c.type)])  # fmt: skip
        self._names = {name.lower(): name for name in self._schema.names}
        self._connection = sandboxed()
        self.reads = {rule.name: self._check(rule) for rule in policy.rules}

    def _check(self, rule: Rule) -> set[str]:
        where = f"policy {self.policy.name}, rule {rule.name}"
        known = {name.lower() for name in self._schema.names}
        reads: set[str] = set()
        for predicate in (p for p in (rule.reject, rule.when) if p is not None):
            reads |= predicate_columns(predicate, where)
        for column in sorted(reads - known):
            near = get_close_matches(column, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"{where}: no stage or operator writes the column {column!r}. {hint}"
                "Add the operator to a filter stage or drop the rule"
            )
        empty = self._schema.empty_table()
        self._connection.register("clips", empty)
        try:
            for predicate in (p for p in (rule.reject, rule.when) if p is not None):
                described = f"DESCRIBE SELECT ({predicate}\n) FROM clips"
                kind = self._connection.execute(described).fetchall()[0][1]
                if kind != "BOOLEAN":
                    raise ConfigError(f"{where}: {predicate!r} is {kind}, not true or false")
            self._connection.execute(f"SELECT {_judgement(rule)} FROM clips")
        except duckdb.Error as error:
            raise ConfigError(f"{where}: {error}") from error
        finally:
            self._connection.unregister("clips")
        return reads

    def rejects(
        self, rows: Sequence[Mapping[str, Any]], written: set[str] | None = None
    ) -> list[tuple[list[str], list[str]]]:
        """For each clip the rules that reject it and the rules that cannot judge it.

        With `written`, only rules whose columns are all in it are asked (in the middle of a run).
        """
        source = {column.name.lower() for column in SOURCE_COLUMNS}
        rules = [
            rule
            for rule in self.policy.rules
            if written is None or self.reads[rule.name] <= (written | source)
        ]
        if not rows or not rules:
            return [([], []) for _ in rows]
        # A few rows go as parameters: building an Arrow table would import pandas into every worker.
        reads = sorted(set().union(*(self.reads[rule.name] for rule in rules)))
        fields = [self._schema.field(self._names[name]) for name in reads]
        cells = ", ".join(f'CAST(? AS {_sql_type(f.type)}) AS "{f.name}"' for f in fields)
        query = f"SELECT {{}} FROM (SELECT {cells or '1'}) AS clips"
        selected = ", ".join(_judgement(rule) for rule in rules)
        answers = []
        for row in rows:
            parameters = [row.get(f.name) for f in fields]
            answers += self._connection.execute(query.format(selected), parameters).fetchall()
        return _sort(rules, answers)

    def judge(self, table: pa.Table, rules: Sequence[Rule]) -> list[tuple[list[str], list[str]]]:
        """`rejects` for an Arrow table that has the declared columns."""
        self._connection.register("clips", table)
        try:
            selected = ", ".join(_judgement(rule) for rule in rules)
            answers = self._connection.execute(f"SELECT {selected} FROM clips").fetchall()
        finally:
            self._connection.unregister("clips")
        return _sort(rules, answers)


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


_SQL_TYPES = {
    pa.float64(): "DOUBLE", pa.float32(): "FLOAT", pa.bool_(): "BOOLEAN", pa.string(): "VARCHAR",
    pa.int64(): "BIGINT", pa.int32(): "INTEGER", pa.int16(): "SMALLINT", pa.int8(): "TINYINT",
}  # fmt: skip


def _sql_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"{_sql_type(kind.value_type)}[]"
    return _SQL_TYPES.get(kind, "VARCHAR")


def _judgement(rule: Rule) -> str:
    """SQL: true rejects, false does not, NULL cannot say. A `when` that is false settles it."""
    reject = f"CAST(({rule.reject}\n) AS BOOLEAN)"
    if rule.when is None:
        return reject
    when = f"CAST(({rule.when}\n) AS BOOLEAN)"
    return f"CASE WHEN {when} THEN {reject} WHEN NOT {when} THEN false ELSE NULL END"
