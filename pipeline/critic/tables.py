"""A sheet of labels as people keep it: CSV, TSV or XLSX, read as it is found.

What cannot be read costs a note, not the sheet. Nothing in a sheet is computed: of a formula the
value counts that the spreadsheet program stored, of a link its target.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

from winnow.operators.errors import ConfigError

MOST_BYTES = 512 * 2**20
"""Of a sheet, unpacked: a small archive can hold a large bomb."""

_SHEETS = (".xlsx", ".xlsm")
_DELIMITERS = (",", ";", "\t")
_LINK = re.compile(
    r'=\s*HYPERLINK\(\s*"((?:[^"]|"")*)"\s*(?:[,;]\s*"((?:[^"]|"")*)"\s*)?.*\)\s*', re.I | re.S
)


@dataclass(frozen=True, slots=True)
class Row:
    number: int
    """As a spreadsheet program counts: the header is row 1."""
    cells: dict[str, Any]
    """By column: text, a number, a truth value, or None where the cell is empty."""
    links: dict[str, str]
    """By column: where the cell links to."""


@dataclass(frozen=True, slots=True)
class Table:
    columns: tuple[str, ...]
    """As the header has them; `column_3` for one that has no name but content."""
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_table(path: Path, is_header: Callable[[Sequence[str]], bool]) -> Table:
    """Read a sheet. `is_header` knows the header of the right sheet, read with the right delimiter.

    Raises ConfigError for a file that is not there, is no table, or breaks off in a quoted cell.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(
                f"{path} is larger than {MOST_BYTES} bytes: that is no sheet of labels"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if path.suffix.lower() in _SHEETS:
        return _read_workbook(path, raw, is_header)
    if raw.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise ConfigError(f"{path} is a spreadsheet: save it as .xlsx, or export it as CSV")
    return _read_text(path, raw, is_header)


# --- text ------------------------------------------------------------------------------------------


def _read_text(path: Path, raw: bytes, is_header: Callable[[Sequence[str]], bool]) -> Table:
    text, problems = _decode(raw)
    delimiter = next((d for d in _DELIMITERS if is_header(_first_record(text, d))), _DELIMITERS[0])
    records, notes = _records(path, text, delimiter)
    numbered = enumerate(([(cell, None) for cell in record] for record in records), start=1)
    return _tabulate(numbered, [*problems, *notes])


def _first_record(text: str, delimiter: str) -> list[str]:
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        return next((record for record in reader if any(cell.strip() for cell in record)), [])
    except csv.Error:
        return []


def _decode(raw: bytes) -> tuple[str, list[str]]:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", errors="replace"), []
    try:
        return raw.decode("utf-8-sig"), []
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        text = raw.decode("utf-8-sig", errors="replace")
        return text, [
            f"bytes that are not UTF-8 were replaced by \N{REPLACEMENT CHARACTER}, first in line {line}"
        ]


def _records(path: Path, text: str, delimiter: str) -> tuple[list[list[str]], list[str]]:
    notes: list[str] = []
    for strict in (True, False):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)
        try:
            return list(reader), notes
        except csv.Error as error:
            place = f"{path}: line {reader.line_num}: {error}"
            # A quote that is never closed would swallow all the rows behind it.
            if not strict or "end of data" in str(error) or "field limit" in str(error):
                raise ConfigError(f"{place}: correct the quotes of that row") from error
            notes.append(f"line {reader.line_num}: {error}; its quotes are read as they stand")
    raise AssertionError


# --- workbooks -------------------------------------------------------------------------------------


def _read_workbook(path: Path, raw: bytes, is_header: Callable[[Sequence[str]], bool]) -> Table:
    import openpyxl

    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > MOST_BYTES:
            raise ConfigError(f"{path} unpacks to {unpacked} bytes: that is no sheet of labels")
        with warnings.catch_warnings():
            # It warns of decoration that it does not keep.
            warnings.simplefilter("ignore")
            formulas = openpyxl.load_workbook(io.BytesIO(raw), data_only=False)
            values = openpyxl.load_workbook(io.BytesIO(raw), data_only=True)
    except ConfigError:
        raise
    except Exception as error:  # openpyxl lets through whatever a damaged file makes of its parser
        raise ConfigError(f"{path} cannot be read as a spreadsheet: {error}") from error
    first: Table | None = None
    for name in formulas.sheetnames:
        sheet, stored = formulas[name], values[name]
        if not hasattr(sheet, "iter_rows"):  # a chart
            continue
        problems: list[str] = []
        table = _tabulate(_workbook_rows(sheet, stored, problems), problems)
        if is_header(table.columns):
            return table
        first = first or table
    return first or Table(())


def _workbook_rows(
    sheet: Any, stored: Any, problems: list[str]
) -> Iterator[tuple[int, list[tuple[Any, str | None]]]]:
    pairs = zip(sheet.iter_rows(), stored.iter_rows(), strict=True)
    for number, (cells, results) in enumerate(pairs, start=1):
        row = []
        for cell, result in zip(cells, results, strict=True):
            value, link = _plain(result.value), None
            if cell.data_type == "f":
                link, text = _linked(cell.value)
                value = text if value is None else value
                if value is None and link is None:
                    problems.append(
                        f"{cell.coordinate} is a formula without a stored value: open the sheet in "
                        f"a spreadsheet program and save it"
                    )
            elif (hyperlink := getattr(cell, "hyperlink", None)) is not None:
                link = hyperlink.target
            row.append((value, link))
        yield number, row


def _plain(value: Any) -> Any:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return str(value) if isinstance(value, timedelta) else value


# --- both ------------------------------------------------------------------------------------------


def _linked(value: Any) -> tuple[str | None, str | None]:
    """The target and the text of a HYPERLINK formula."""
    if not isinstance(value, str) or (found := _LINK.fullmatch(value)) is None:
        return None, None
    target, text = found[1].replace('""', '"'), found[2]
    return target, text.replace('""', '"') if text is not None else target


def _tabulate(
    numbered: Iterable[tuple[int, Sequence[tuple[Any, str | None]]]], problems: list[str]
) -> Table:
    """Name the columns by the first row that is not empty, and the cells by their columns."""
    names: list[str | None] | None = None
    columns: list[str] = []
    rows: list[Row] = []
    for number, cells in numbered:
        if all(_is_empty(value) and link is None for value, link in cells):
            continue
        if names is None:
            names = _headings([value for value, _ in cells], problems)
            columns = [name for name in names if name is not None]
            continue
        row = Row(number, {}, {})
        for place, (value, link) in enumerate(cells):
            if place >= len(names):
                if not _is_empty(value):
                    problems.append(f"row {number} has more cells than the header: {value!r:.60}")
                continue
            if isinstance(value, str):
                target, text = _linked(value)
                value, link = (text, target) if target is not None else (value.strip(), link)
            name = names[place]
            if name is None:
                if _is_empty(value):
                    continue
                # Only a nameless column with content needs a name.
                name = names[place] = f"column_{place + 1}"
                columns.append(name)
            row.cells[name] = None if _is_empty(value) else value
            if link:
                row.links[name] = link.strip()
        rows.append(row)
    return Table(tuple(columns), rows, problems)


def _headings(values: list[Any], problems: list[str]) -> list[str | None]:
    names: list[str | None] = []
    for place, value in enumerate(values, start=1):
        name = None if _is_empty(value) else str(value).strip()
        if name is not None and name in names:
            name = f"{name}_{place}"
            problems.append(f"two columns have one name: the second is called {name}")
        names.append(name)
    return names


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())
