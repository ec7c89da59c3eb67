"""The views of one lake as the report reads them, with what is known of their columns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import duckdb

from winnow.operators.errors import LakeError

VIEWS = ("sources", "clips", "verdicts", "dataset", "clips_decided", "runs")

OPTIONAL_VIEWS = ("captions",)
"""Views that an older lake does not have."""

CLIPS = "winnow_report_clips"
"""The decided clips while a report is made: without pictures, with `verdict_shown`."""

ANSWERS = "vlm_filter_answers"
"""Whole answers of the VLM filter's model."""

TRACE = "physics_trace"
"""What the critic's model wrote before its score."""

# Kilobytes a clip: read for the clips shown, never counted.
_AT_LENGTH = {ANSWERS, TRACE}

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

_LONG = re.compile(r"^(BLOB|MAP|STRUCT|JSON)|\]$")


@dataclass(frozen=True, slots=True)
class ColumnDoc:
    """What the lake says of a column; empty where it says nothing."""

    meaning: str = ""
    unit: str = ""
    range: str = ""
    direction: str = ""


def quoted(name: str) -> str:
    """A column name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


class Views:
    """The views of one lake, with the names of their columns.

    Raises LakeError where one of the views is missing.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self.columns = {view: self._describe(view) for view in VIEWS}
        """Types by name, for each view; none for an optional view that is not there."""
        for view in OPTIONAL_VIEWS:
            with suppress(LakeError):
                self.columns[view] = self._describe(view)
            self.columns.setdefault(view, {})
        self.operators = sorted(
            (c.removesuffix("_error") for c in self.columns["clips"] if c.endswith("_error")),
            key=len,
            reverse=True,
        )
        """Names of operators, the longest first."""
        self._docs = self._column_docs()

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        return self._connection.execute(sql, list(parameters)).fetchall()

    def number(self, sql: str) -> int:
        """The one number a query gives, 0 for NULL."""
        return int(self.rows(sql)[0][0] or 0)

    def column(self, view: str, name: str) -> str:
        """SQL for a column that may not be there."""
        return quoted(name) if name in self.columns[view] else "NULL"

    @property
    def seconds(self) -> str:
        """SQL for the length of a clip."""
        return "duration_s" if "duration_s" in self.columns["clips"] else "(end_s - start_s)"

    def operator(self, column: str) -> str:
        """The operator that wrote a column, empty where none did."""
        return next((o for o in self.operators if column.startswith(f"{o}_")), "")

    def doc(self, column: str) -> ColumnDoc:
        """What the lake says of a column of the clips."""
        return self._docs.get(column, ColumnDoc())

    def score_columns(self) -> list[str]:
        """Numbers and truth values that say something about a clip, in the order of the table."""
        return [
            name
            for name, kind in self.columns["clips_decided"].items()
            if (_NUMBER.match(kind) or kind == "BOOLEAN")
            and name in self.columns["clips"]
            and name not in _NOT_SCORES
            and not name.endswith("_version")
        ]

    def word_columns(self) -> list[str]:
        """Text columns of operators (a class, a method), not identities and not errors."""
        return [
            name
            for name, kind in self.columns["clips_decided"].items()
            if kind == "VARCHAR"
            and name not in _AT_LENGTH
            and name in self.columns["clips"]
            and self.operator(name)
            and not name.endswith(("_error", "_version"))
        ]

    @contextmanager
    def clips_at_hand(self) -> Iterator[None]:
        """Have the clips in the table CLIPS, without what is long: pictures, lists, maps, answers.

        They are copied because every column of them is read by a query of its own.
        """
        taken = [
            quoted(name)
            for name, kind in self.columns["clips_decided"].items()
            if name == "reasons" or (name not in _AT_LENGTH and not _LONG.search(kind))
        ]
        self._connection.execute(
            f"CREATE OR REPLACE TEMP TABLE {CLIPS} AS "
            f"SELECT {', '.join(taken)}, coalesce(verdict, 'undecided') AS verdict_shown "
            "FROM clips_decided"
        )
        try:
            yield
        finally:
            self._connection.execute(f"DROP TABLE IF EXISTS {CLIPS}")

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
