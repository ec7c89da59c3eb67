"""`winnow lake compact` and `winnow lake vacuum`: fewer files, and none that nothing refers to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError

from winnow.operators.errors import LakeError, StorageError
from winnow.pipeline.lake import PARTITIONS, TABLES, Lake
from winnow.pipeline.lake_check import ATTEMPTED, COMMIT_POINTS, present_tables
from winnow.pipeline.run_lock import Hold, hold_lake
from winnow.pipeline.storage import Storage

KEEP_HOURS = 168.0


@dataclass(frozen=True)
class Compacted:
    """Data files of one table, before and after."""

    table: str
    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int


def compact(
    lake: Lake, *, wait: bool = False, told: Callable[[str], None] = lambda line: None
) -> list[Compacted]:
    """Merge the small files of every table. What the views show does not change.

    The old files stay for readers of older versions until a vacuum. The lake is held meanwhile: an
    append would not conflict, but a column that a run or a backfill adds would. Raises LakeBusy,
    LakeError.
    """
    lake.require()
    with hold_lake(lake, "winnow lake compact", wait=wait, told=told) as hold:
        return _compact(lake, hold)


def _compact(lake: Lake, hold: Hold) -> list[Compacted]:
    done = []
    for name in TABLES:
        table = lake.open(name)
        if table is None:
            continue
        before = _live_files(table)
        if len(before) > 1:
            hold.check()
            try:
                table.optimize.compact(
                    commit_properties=CommitProperties(custom_metadata={"winnow": "compact"})
                )
            except DeltaError as error:
                raise LakeError(
                    f"cannot compact {name} of {lake.uri}: {error}. Nothing is lost: try again"
                ) from error
        after = _live_files(table)
        done.append(
            Compacted(name, len(before), len(after), sum(before.values()), sum(after.values()))
        )
    return done


def _live_files(table: DeltaTable) -> dict[str, int]:
    """Size by path of the files that make up the latest version."""
    actions = pa.table(table.get_add_actions(flatten=True))
    return dict(zip(actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True))


@dataclass(frozen=True)
class LeftRows:
    """Rows of a table whose attempts never committed."""

    table: str
    rows: int
    attempts: tuple[str, ...]


@dataclass(frozen=True)
class LeftFile:
    """A file that nothing refers to: of a table, or encoded media."""

    place: str
    bytes: int


@dataclass
class Vacuum:
    """What a vacuum removes, or would remove."""

    keep_hours: float
    removed: bool = False
    rows: list[LeftRows] = field(default_factory=list)
    table_files: dict[str, list[LeftFile]] = field(default_factory=dict)
    """By table, files that no version younger than `keep_hours` needs."""
    media: list[LeftFile] = field(default_factory=list)
    """Encoded files that no row of `dataset` names."""

    @property
    def bytes(self) -> int:
        """Bytes of the files; those of rows are freed by a later vacuum."""
        files = [file for files in self.table_files.values() for file in files]
        return sum(file.bytes for file in (*files, *self.media))

    @property
    def empty(self) -> bool:
        return not (self.rows or self.media or any(self.table_files.values()))


def vacuum(
    lake: Lake,
    *,
    yes: bool = False,
    keep_hours: float = KEEP_HOURS,
    wait: bool = False,
    told: Callable[[str], None] = lambda line: None,
) -> Vacuum:
    """List what nothing refers to any more and is older than `keep_hours`; with `yes`, remove it.

    Rows of attempts that never committed are deleted; their files, like others that a compaction
    replaced, go with the first vacuum after `keep_hours` more. Versions of the tables that need a
    removed file can no longer be read (`--as-of`), also by an export that began with them. The lake
    is held meanwhile, so no run can be in progress. Raises LakeBusy, LakeError.
    """
    if not 0 <= keep_hours < 24 * 36_500:
        raise LakeError(f"cannot keep {keep_hours:g} hours: give 0 or more")
    lake.require()
    if not yes:
        return _find(lake, keep_hours)
    with hold_lake(lake, "winnow lake vacuum", wait=wait, told=told) as hold:
        found = _find(lake, keep_hours)
        hold.check()
        _delete_rows(lake, found.rows)
        for name in found.table_files:
            table = lake.open(name)
            assert table is not None
            _vacuum_files(lake, name, table, keep_hours, dry_run=False)
        if found.media:
            media = Storage.open(lake.media_uri, options=lake.options)
            for file in found.media:
                media.delete(file.place)
        found.removed = True
        return found


def _find(lake: Lake, keep_hours: float) -> Vacuum:
    found = Vacuum(keep_hours)
    before = datetime.now(UTC) - timedelta(hours=keep_hours)
    # Media first: what a row names when rows are read later was there before.
    media = list(_media_files(lake))
    # Attempts commit last: read before what is committed, a row of a run in progress looks left.
    stored = {name: _attempts(lake, name) for name in present_tables(ATTEMPTED)}
    named = _media_named(lake)
    committed = _committed(lake)
    for name, attempts in stored.items():
        left = {a: rows for a, (rows, written) in attempts.items()
                if a not in committed and written < before}  # fmt: skip
        if left:
            found.rows.append(LeftRows(name, sum(left.values()), tuple(sorted(left))))
    removed = {a for rows in found.rows if rows.table == "dataset" for a in rows.attempts}
    kept_names = {_name(uri) for uri, attempt in named if attempt not in removed}
    found.media = [
        LeftFile(key, size)
        for key, size, modified in media
        if modified < before.timestamp() and _name(key) not in kept_names
    ]
    for name in TABLES:
        table = lake.open(name)
        if table is None:
            continue
        paths = _vacuum_files(lake, name, table, keep_hours, dry_run=True)
        if paths:
            sizes = _sizes(lake, name)
            found.table_files[name] = [
                LeftFile(path, sizes.get(_unescaped(path), 0)) for path in paths
            ]
    return found


def _name(address: str) -> str:
    """A clip's media is told by its file's name: the same in a lake that was copied or moved."""
    return address.rpartition("/")[2]


def _committed(lake: Lake) -> set[str]:
    attempts: set[str] = set()
    for name in present_tables(COMMIT_POINTS):
        data = lake.dataset(name)
        if data is not None:
            for batch in data.to_batches(columns=["attempt_id"]):
                attempts.update(batch["attempt_id"].to_pylist())
    return attempts


def _attempts(lake: Lake, name: str) -> dict[str, tuple[int, datetime]]:
    """By attempt that has rows in a table: their number, and when the latest was written.

    The time is that of the file: later than the row where a compaction moved it, so never too early.
    """
    table = lake.open(name)
    if table is None:
        return {}
    actions = pa.table(table.get_add_actions(flatten=True))
    paths = map(_unescaped, actions["path"].to_pylist())
    written = dict(zip(paths, actions["modification_time"].to_pylist(), strict=True))
    found: dict[str, tuple[int, datetime]] = {}
    for fragment in table.to_pyarrow_dataset(filesystem=lake.files(name)).get_fragments():
        milliseconds = written.get(_unescaped(str(fragment.path)))
        # A file of unknown age is taken for young.
        time = datetime.now(UTC)
        if milliseconds is not None:
            time = datetime.fromtimestamp(milliseconds / 1000, UTC)
        counts = pc.value_counts(fragment.to_table(columns=["attempt_id"])["attempt_id"])
        for entry in counts.to_pylist():
            rows, latest = found.get(entry["values"], (0, time))
            found[entry["values"]] = (rows + entry["counts"], max(latest, time))
    return found


def _media_named(lake: Lake) -> list[tuple[str, str]]:
    """(media uri, attempt) of every row of the dataset, of committed attempts or not."""
    data = lake.dataset("dataset")
    if data is None:
        return []
    table = data.to_table(columns=["media_uri", "attempt_id"])
    pairs = zip(table["media_uri"].to_pylist(), table["attempt_id"].to_pylist(), strict=True)
    return [(uri, attempt) for uri, attempt in pairs if uri]


def _media_files(lake: Lake) -> Iterator[tuple[str, int, float]]:
    """(key, bytes, time of writing) of all encoded files, half-written ones included."""
    try:
        storage = Storage.open(lake.media_uri, options=lake.options)
    except StorageError:
        return  # nothing was ever encoded
    for file in storage.find(["**"]):
        yield file.key, file.size, file.modified
    if lake.is_local:  # a listing leaves out what a killed run was just writing
        root = Path(storage.uri)
        for draft in root.glob("**/.*.part"):
            if draft.is_file() and not draft.is_symlink():
                status = draft.stat()
                yield draft.relative_to(root).as_posix(), status.st_size, status.st_mtime


def _delete_rows(lake: Lake, left: list[LeftRows]) -> None:
    """Write the tables anew without some attempts.

    Not by Delta's own DELETE: delta-rs marks the text of what it rewrites as `string_view` in the
    file, and pyarrow, which the views read with, cannot filter that by a string.
    """
    for rows in left:
        table = lake.open(rows.table)
        assert table is not None
        data = table.to_pyarrow_dataset(filesystem=lake.files(rows.table))
        kept = ~pc.field("attempt_id").isin(rows.attempts)
        batches = data.scanner(filter=kept).to_reader()
        try:
            write_deltalake(
                table,
                batches,
                mode="overwrite",
                partition_by=PARTITIONS.get(rows.table),
                commit_properties=CommitProperties(custom_metadata={"winnow": "vacuum"}),
            )
        except DeltaError as error:
            raise LakeError(
                f"cannot remove rows of {rows.table} in {lake.uri}: {error}. Nothing is lost: try again"
            ) from error


def _vacuum_files(
    lake: Lake, name: str, table: DeltaTable, keep_hours: float, *, dry_run: bool
) -> list[str]:
    try:
        return table.vacuum(
            # Delta counts whole hours: rather keep longer.
            retention_hours=-int(-keep_hours // 1),
            dry_run=dry_run,
            enforce_retention_duration=False,
            # Files that no version ever named too; but not what is being written this hour.
            full=keep_hours >= 1,
        )
    except DeltaError as error:
        raise LakeError(f"cannot vacuum {name} of {lake.uri}: {error}") from error


def _sizes(lake: Lake, name: str) -> dict[str, int]:
    storage = Storage.open(lake.table_uri(name), options=lake.options)
    return {_unescaped(file.key): file.size for file in storage.find(["**"])}


def _unescaped(path: str) -> str:
    """Delta escapes what partition values hold, once or twice, as the place asks for."""
    while (plain := unquote(path)) != path:
        path = plain
    return path.lstrip("/")


def as_json(found: Vacuum) -> dict[str, Any]:
    """A vacuum as one JSON object."""
    return {
        "removed": found.removed,
        "keep_hours": found.keep_hours,
        "bytes": found.bytes,
        "uncommitted": [
            {"table": rows.table, "rows": rows.rows, "attempts": len(rows.attempts)}
            for rows in found.rows
        ],
        "table_files": {
            name: [{"path": file.place, "bytes": file.bytes} for file in files]
            for name, files in found.table_files.items()
        },
        "media": [{"key": file.place, "bytes": file.bytes} for file in found.media],
    }
