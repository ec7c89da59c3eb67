"""Finds, for each clip of a lake, the clip of its input video that runs at the same time.

The sidecar of a generation names its input as the generator was told: a relative path for the most
part, from a folder that is not known. So the input is, of the sources in the lake, the one with
exactly that address; else the one that the path leads to from the generation's own folder; else the
one whose address ends with the whole path. Copies have the content of the first. Where sources of
different content fit equally, nobody can say which it was.

The counterpart is the input's clip with the longest time in common: a generation that follows a video
runs on the clock of its input.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from winnow.pipeline.ratios import ABSENT, AMBIGUOUS

NEEDED = ("_attempt", "_start", "_end")
"""Columns of the clips: their attempt, and their span in seconds."""


@dataclass(frozen=True, slots=True)
class InputClips:
    """The counterparts of all clips of a lake."""

    row: NDArray[np.int64]
    """Of each clip the row of its counterpart, ABSENT or AMBIGUOUS."""
    paired: int
    """Clips with a counterpart."""
    without: int
    """Clips of sources that name no input."""
    not_found: int
    """Clips whose input is no source of the lake with clips: an image, or not ingested."""
    no_overlap: int
    """Clips whose input has no clip at that time."""
    ambiguous: int
    """Clips whose input several sources of different content could be."""
    example: tuple[str, str, tuple[str, ...]] | None = None
    """Of the ambiguous: the address of a generation, its input as named, some that it could be."""

    def as_dict(self) -> dict[str, Any]:
        names = ("paired", "without", "not_found", "no_overlap", "ambiguous", "example")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        said = (
            f"compared with their input video: {self.paired} clips. Without: {self.without} name "
            f"none, of {self.not_found} it is not in the lake, of {self.no_overlap} it has no clip at "
            f"that time, of {self.ambiguous} several could be it"
        )
        if self.example is None:
            return said
        uri, named, fits = self.example
        return f"{said} (such as {uri}, whose input {named} fits {' and '.join(fits)})"


_WITH_CLIPS = "(SELECT * FROM sources WHERE status IN ('done', 'copy'))"


def find_input_clips(
    connection: duckdb.DuckDBPyConnection, clips: pa.Table, sources: str = _WITH_CLIPS
) -> InputClips:
    """The counterparts of `clips`, which are all of the lake, with the columns of NEEDED.

    `sources` is SQL for the sources that can have clips.
    """
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE _live AS
        SELECT attempt_id, source_id, uri, input_uri FROM {sources}"""
    )
    _match_sources(connection)
    place = pa.array(np.arange(clips.num_rows, dtype=np.int64))
    connection.register("_clips", clips.select(list(NEEDED)).append_column("_place", place))
    try:
        connection.execute(
            """CREATE OR REPLACE TEMP TABLE _named AS
            SELECT c._place, c._start, c._end, m.content, m.attempt_id IS NOT NULL AS matched
            FROM _clips c JOIN _open o ON o.attempt_id = c._attempt
            LEFT JOIN _matched m ON m.attempt_id = c._attempt"""
        )
        connection.execute(
            """CREATE OR REPLACE TEMP TABLE _theirs AS
            SELECT c._place, c._start, c._end, s.source_id FROM _clips c
            JOIN (FROM _live WHERE source_id IN (SELECT content FROM _matched)) s
              ON s.attempt_id = c._attempt"""
        )
    finally:
        connection.unregister("_clips")
    example = _example(connection)
    _drop(connection, "_live", "_open", "_matched")
    named = connection.sql(
        """SELECT _place, CASE WHEN NOT matched THEN 'not_found' WHEN content IS NULL THEN 'ambiguous'
               WHEN content IN (SELECT source_id FROM _theirs) THEN 'found' ELSE 'not_found' END AS state
        FROM _named"""
    ).to_arrow_table()
    pairs = connection.sql(
        """SELECT n._place AS ours, t._place AS theirs, t._start AS start,
                  least(n._end, t._end) - greatest(n._start, t._start) AS common
        FROM _named n JOIN _theirs t
          ON t.source_id = n.content AND t._start < n._end AND n._start < t._end"""
    ).to_arrow_table()
    _drop(connection, "_named", "_theirs")
    row = np.full(clips.num_rows, ABSENT, np.int64)
    ambiguous = named.filter(pc.equal(named["state"], "ambiguous"))["_place"].to_numpy()
    row[ambiguous] = AMBIGUOUS
    ours, theirs = pairs["ours"].to_numpy(), pairs["theirs"].to_numpy()
    # Of equally long ones the earlier: the choice must not depend on how the query ran.
    order = np.lexsort((theirs, pairs["start"].to_numpy(), -pairs["common"].to_numpy(), ours))
    best = order[np.flatnonzero(np.diff(ours[order], prepend=-1))]
    row[ours[best]] = theirs[best]
    counts = {n["values"]: n["counts"] for n in named["state"].value_counts().to_pylist()}
    return InputClips(
        row,
        paired=len(best),
        without=clips.num_rows - named.num_rows,
        not_found=counts.get("not_found", 0),
        no_overlap=counts.get("found", 0) - len(best),
        ambiguous=len(ambiguous),
        example=example,
    )


def _drop(connection: duckdb.DuckDBPyConnection, *tables: str) -> None:
    """Of a large lake they are a good part of the memory that deciding may take."""
    for table in tables:
        connection.execute(f"DROP TABLE {table}")


def normal_path(named: str) -> str:
    """An input's path without `.`, without what `..` undoes, and without `file://`."""
    named = named.removeprefix("file://")
    if "://" in named:
        return named
    return "/" * named.startswith("/") + posixpath.normpath(named).lstrip("/")


_REST = "path[3 * up + 1:]"


def _match_sources(connection: duckdb.DuckDBPyConnection) -> None:
    """Make `_matched`: by attempt the content of its input; NULL where several fit.

    Three ways, each for what the one before left open, and each an equality of texts: however many
    sources share a file name, they are not compared with each other.
    """
    _read_names(connection)
    connection.execute(
        """CREATE OR REPLACE TEMP TABLE _matched
        (attempt_id VARCHAR, content VARCHAR, low VARCHAR, high VARCHAR)"""
    )
    addresses = "SELECT uri AS key, source_id FROM _live"
    _match(connection, "SELECT attempt_id, source_id, path AS key FROM _open", addresses)
    beside = f"""
        SELECT attempt_id, source_id,
               array_to_string(folder[:len(folder) - up], '/') || '/' || {_REST} AS key
        FROM (SELECT *, string_split(uri, '/')[:-2] AS folder FROM _open WHERE up IS NOT NULL)
        WHERE up < len(folder)"""
    _match(connection, beside, addresses)
    # The last segments of an address, as many as any path has; not all of them: that is no ending.
    endings = f"""
        SELECT array_to_string(parts[len(parts) - length + 1:], '/') AS key, source_id
        FROM (SELECT source_id, string_split(uri, '/') AS parts FROM _live
              WHERE split_part(uri, '/', -1) IN (SELECT split_part(path, '/', -1) FROM _open)) s,
             (SELECT DISTINCT len(string_split({_REST}, '/')) AS length FROM _open
              WHERE up IS NOT NULL) lengths
        WHERE length < len(parts)"""
    relative = f"SELECT attempt_id, source_id, {_REST} AS key FROM _open WHERE up IS NOT NULL"
    _match(connection, relative, endings)


def _read_names(connection: duckdb.DuckDBPyConnection) -> None:
    """Make `_open`: the sources that name an input, and how.

    `path` is the input's; where that is relative, it begins with `up` steps out of a folder, `../`.
    """
    irregular = connection.execute(
        """SELECT DISTINCT input_uri FROM _live WHERE starts_with(input_uri, 'file://')
        OR (NOT contains(input_uri, '://') AND (contains(input_uri, '//')
            OR contains('/' || input_uri || '/', '/./') OR contains('/' || input_uri || '/', '/../')))"""
    ).fetchall()
    paths = pa.table({"named": pa.array([n for (n,) in irregular], pa.string()),
                      "path": pa.array([normal_path(n) for (n,) in irregular], pa.string())})  # fmt: skip
    connection.register("_normal", paths)
    connection.execute(
        r"""CREATE OR REPLACE TEMP TABLE _open AS
        SELECT attempt_id, source_id, uri, path, length(climbs) // 3 AS up
        FROM (SELECT *, CASE WHEN NOT starts_with(path, '/') AND NOT contains(path, '://')
                             THEN CASE WHEN starts_with(path, '../')
                             THEN regexp_extract(path, '^(\.\./)*') ELSE '' END END AS climbs
              FROM (SELECT s.attempt_id, s.source_id, s.uri,
                           coalesce(n.path, s.input_uri) AS path
                    FROM _live s LEFT JOIN _normal n ON n.named = s.input_uri
                    WHERE s.input_uri IS NOT NULL))"""
    )
    connection.unregister("_normal")


def _match(connection: duckdb.DuckDBPyConnection, wanted: str, known: str) -> None:
    """Add to `_matched` what has the same key; a video is no input of its own."""
    connection.execute(
        f"""INSERT INTO _matched
        WITH wanted AS (
            SELECT * FROM ({wanted})
            WHERE attempt_id NOT IN (SELECT attempt_id FROM _matched)),
        fitting AS (
            SELECT key, min(source_id) AS low, max(source_id) AS high,
                   count(DISTINCT source_id) AS contents
            FROM ({known}) WHERE key IN (SELECT key FROM wanted) GROUP BY key)
        SELECT attempt_id,
               CASE WHEN contents = 1 OR (contents = 2 AND high = source_id) THEN low
                    WHEN contents = 2 AND low = source_id THEN high END,
               low, high
        FROM wanted JOIN fitting USING (key) WHERE contents > 1 OR low <> source_id"""
    )


def _example(connection: duckdb.DuckDBPyConnection) -> tuple[str, str, tuple[str, ...]] | None:
    """The first, by its address, of those that several sources fit."""
    rows = connection.execute(
        """SELECT l.uri, l.input_uri, l.source_id, low, high FROM _matched JOIN _live l USING (attempt_id)
        WHERE content IS NULL ORDER BY l.uri, attempt_id LIMIT 1"""
    ).fetchall()
    if not rows:
        return None
    uri, named, own, low, high = rows[0]
    fits = connection.execute(
        """SELECT min(uri) FROM _live WHERE source_id IN (?, ?) AND source_id <> ?
        GROUP BY source_id ORDER BY 1""",
        [low, high, own],
    ).fetchall()
    return uri, named, tuple(str(address) for (address,) in fits)
