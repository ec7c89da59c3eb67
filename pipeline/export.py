"""Export: the kept clips of a policy as shards, with an index, and a manifest of every clip.

The index is written last: where it is, the export is whole. Until then `index.partial.json` says
what is being made and from which versions of the lake's tables, and beside every finished shard lies
its record. A repeated export takes up the same versions, keeps the shards that are whole, and
ends with the bytes that it would have had without the interruption.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from winnow.operators.errors import ConfigError, LakeError, StorageError
from winnow.pipeline.export_manifest import write_manifest
from winnow.pipeline.export_rows import (
    Snapshot,
    all_clips,
    kept_clips,
    kept_without_media,
    policy_name,
    score_columns,
    without_hash,
)
from winnow.pipeline.export_shards import (
    SHARD_BYTES,
    SHARD_NAME,
    SUFFIXES,
    Media,
    Problem,
    Shard,
    deal,
    entry_of,
    sha256_of,
    write_shard,
)
from winnow.pipeline.lake import Lake
from winnow.pipeline.storage import Storage
from winnow.pipeline.views import connect
from winnow.stages.shard import AXES

INDEX, PARTIAL, RECORD = "index.json", "index.partial.json", ".whole.json"
INDEX_LIMIT = 2**30
_DRAFTS = ".winnow-drafts"


@dataclass(frozen=True)
class ExportSettings:
    """What is to be exported, and how."""

    policy: str | None = None
    """Name of a policy with verdicts in the lake; None: the latest run's."""
    form: str = "webdataset"
    """webdataset, parquet or jsonl."""
    by: tuple[str, ...] = AXES
    """Axes of the dataset that become folders."""
    max_shard_bytes: int | None = None
    """A shard is not larger, unless a single clip is; for Parquet, of the rows as JSON."""
    as_of: str | None = None
    """Version of `sources`, or ISO 8601 time."""
    allow_missing: bool = False
    """Finish although media are missing, damaged or changed."""

    def check(self) -> None:
        """Raises ConfigError where a value is none of the allowed ones."""
        if self.form not in SUFFIXES:
            raise ConfigError(f"--format {self.form}: choose {', '.join(SUFFIXES)}")
        strange = [axis for axis in self.by if axis not in AXES]
        if strange or len(set(self.by)) < len(self.by):
            raise ConfigError(
                f"--by {','.join(self.by)}: choose some of {', '.join(AXES)}, each once, or none"
            )
        if self.max_shard_bytes is not None and self.max_shard_bytes < 1:
            raise ConfigError("--max-shard-bytes must be at least 1")


@dataclass
class ExportResult:
    """What an export made."""

    policy: str
    out: str
    versions: dict[str, int]
    complete: bool = False
    shards: list[dict[str, Any]] = field(default_factory=list)
    kept_shards: int = 0
    """Of them, those that were there already."""
    clips: int = 0
    bytes: int = 0
    manifest: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    media_without_hash: int = 0
    """Clips of whose media no hash is recorded, as an older version made them: not verified."""
    resumed_versions: bool = False
    """The lake has moved on since the export began; it was finished as it began."""


def export(
    lake: Lake,
    out: str,
    settings: ExportSettings,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> ExportResult:
    """Write the shards, the manifest and the index of a policy's dataset under `out`.

    Media are verified by the recorded hash as they are copied: what is damaged goes into no shard.
    Without `allow_missing`, an export with problems has no index: repeated, it tries those clips
    again. With it, the manifest and the index say which kept clips are not there, and why.
    `report` is called with (clips done, clips in all). Raises ConfigError for wrong
    settings, for a place that holds another export, and for a policy without verdicts.
    """
    settings.check()
    if f"{out.rstrip('/')}/".startswith(f"{lake.uri.rstrip('/')}/"):
        raise ConfigError(f"--out {out} is inside the lake: give a place outside it")
    place = Storage.open(out, options=lake.options, create=True)
    if place.single is not None:
        raise ConfigError(f"--out {out} is a file: give a folder")
    present = Snapshot.of(lake, settings.as_of)
    with connect(present) as connection:
        policy = policy_name(connection, settings.policy)
    wanted = _identity(lake, policy, settings)
    known = _Known.read(place)
    known.check(wanted, out)
    snapshot = present
    if known.versions is not None and settings.as_of is None:
        snapshot = Snapshot(lake.uri, lake.options, versions=known.versions)
    result = ExportResult(policy, place.uri, snapshot.versions)
    result.resumed_versions = snapshot.versions != present.versions
    with _drafts(place) as folder, connect(snapshot) as connection:
        begun = {"export": wanted, "versions": snapshot.versions, "known": known.shards}
        _put(place, PARTIAL, begun, folder)
        place.delete(INDEX)
        try:
            _Exporter(lake, place, settings, connection, folder, known.shards, report).run(result)
        except duckdb.Error as error:
            raise LakeError(
                f"the lake cannot be read as it was when the export began: {error}. If its files "
                f"were vacuumed since, empty {out} and begin anew"
            ) from error
        if result.problems and not settings.allow_missing:
            # Done as far as it goes: the next one reads the lake as it is then, perhaps mended.
            made = {entry["name"]: entry for entry in result.shards}
            _put(place, PARTIAL, begun | {"versions": None, "known": known.shards | made}, folder)
            return result
        _put(place, INDEX, _index(result, wanted), folder)
        result.complete = True
        _tidy(place, {entry["name"] for entry in result.shards}, known.shards)
    return result


@dataclass
class _Exporter:
    """Makes the files of one export."""

    lake: Lake
    place: Storage
    settings: ExportSettings
    connection: duckdb.DuckDBPyConnection
    folder: Path
    known: Mapping[str, Mapping[str, Any]]
    report: Callable[[int, int], None]

    def run(self, result: ExportResult) -> None:
        scores = score_columns(self.connection)
        form, policy = self.settings.form, result.policy
        result.media_without_hash = without_hash(self.connection, policy)
        without = kept_without_media(self.connection, policy)
        result.problems += [
            Problem(clip_id, None, "kept, but it has no media: `winnow materialize` makes them")
            for clip_id in without
        ]
        media = Media(
            Storage.open(self.lake.media_uri, options=self.lake.options, create=True),
            self.lake.media_uri,
        )
        total = self._clips(policy)
        batches = kept_clips(self.connection, policy, self.settings.by, scores)
        limit = self.settings.max_shard_bytes or SHARD_BYTES[form]
        done = 0
        self.report(0, total)
        for shard in deal(batches, form, self.settings.by, scores, limit):
            plan = shard.plan()
            entry = self._whole(shard.name, plan)
            if entry is not None:
                result.kept_shards += 1
            else:
                entry = self._make(shard, plan, media, result.problems)
            if entry is not None:
                result.shards.append(dict(entry))
                result.clips += entry["clips"]
                result.bytes += entry["bytes"]
            done += len(shard.items)
            self.report(done, total)
        result.problems.sort(key=lambda problem: problem.clip_id)
        result.manifest = self._manifest(policy, scores, result.problems)

    def _clips(self, policy: str) -> int:
        query = "SELECT count(DISTINCT clip_id) FROM dataset WHERE policy = $policy"
        # fetchall: DuckDB refuses the next query while one is not read to its end.
        return int(self.connection.execute(query, {"policy": policy}).fetchall()[0][0])

    def _whole(self, name: str, plan: str) -> Mapping[str, Any] | None:
        """The index entry of a shard that is there as planned, whole and with every clip."""
        if not self.place.exists(name):
            return None
        for entry in (_read(self.place, name + RECORD), self.known.get(name)):
            # A shard without its missing clips has a plan of more clips: it is not what we want.
            if entry and entry.get("plan") == plan and self.place.hash(name) == entry.get("sha256"):
                return entry
        return None

    def _make(
        self, shard: Shard, plan: str, media: Media, problems: list[Problem]
    ) -> Mapping[str, Any] | None:
        draft = self.folder / "shard"
        found = write_shard(shard, draft, media)
        problems += found
        # None: the plan of a shard that lacks clips fits nothing, so that they are tried again.
        entry = entry_of(shard, draft, plan if not found else "", found)
        if entry["clips"] == 0:
            self.place.delete(shard.name)
            self.place.delete(shard.name + RECORD)
            return None
        self.place.put(draft, shard.name)
        _put(self.place, shard.name + RECORD, entry, self.folder)
        return entry

    def _manifest(
        self, policy: str, scores: Sequence[str], problems: Sequence[Problem]
    ) -> dict[str, Any]:
        name = "manifest.parquet" if self.settings.form == "parquet" else "manifest.jsonl"
        draft = self.folder / name
        left_out = {problem.clip_id: problem.reason for problem in problems}
        rows = all_clips(self.connection, policy, scores, left_out)
        counts = write_manifest(rows, scores, draft)
        self.place.put(draft, name)
        return {
            "name": name,
            "clips": sum(counts.values()),
            "verdicts": counts,
            "bytes": draft.stat().st_size,
            "sha256": sha256_of(draft),
        }


@dataclass
class _Known:
    """What an earlier export left at the place."""

    export: dict[str, Any] | None = None
    versions: dict[str, int] | None = None
    """Of an export that was interrupted: the tables' versions that it reads."""
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, place: Storage) -> _Known:
        index, partial = _read(place, INDEX), _read(place, PARTIAL)
        known = cls()
        for content in (index, partial):
            if content is None:
                continue
            if not isinstance(content.get("export"), dict):
                raise ConfigError(f"{place.uri} holds an {INDEX} that is not Winnow's: empty it")
            known.export = content["export"]
        if partial is not None:
            known.shards = partial["known"]
        if index is not None:
            known.shards |= {entry["name"]: entry for entry in index["shards"]}
        elif partial is not None:
            known.versions = partial["versions"]
        known.shards = {n: e for n, e in known.shards.items() if SHARD_NAME.fullmatch(n)}
        return known

    def check(self, wanted: dict[str, Any], out: str) -> None:
        """Raises ConfigError where the place holds another export."""
        if self.export is None or self.export == wanted:
            return
        differing = [key for key in wanted if self.export.get(key) != wanted[key]]
        told = ", ".join(f"{k} was {self.export.get(k)!r} and is {wanted[k]!r}" for k in differing)
        raise ConfigError(f"{out} holds another export ({told}): give another --out, or empty it")


def _identity(lake: Lake, policy: str, settings: ExportSettings) -> dict[str, Any]:
    return {
        "lake": lake.uri,
        "policy": policy,
        "filter": "verdict = 'keep'",
        "format": settings.form,
        "by": list(settings.by),
        "max_shard_bytes": settings.max_shard_bytes or SHARD_BYTES[settings.form],
    }


def _index(result: ExportResult, identity: dict[str, Any]) -> dict[str, Any]:
    return {
        "export": identity,
        "versions": result.versions,
        "shards": result.shards,
        "clips": result.clips,
        "bytes": result.bytes,
        "manifest": result.manifest,
        "media_without_hash": result.media_without_hash,
        "problems": [asdict(problem) for problem in result.problems],
    }


def _tidy(place: Storage, made: set[str], known: Mapping[str, Any]) -> None:
    """Remove the records, and shards of an earlier state of this export."""
    records = [file.key for file in place.find([f"**/*{RECORD}"])]
    old = {key.removesuffix(RECORD) for key in records} | set(known)
    for name in sorted(old - made):
        if SHARD_NAME.fullmatch(name):
            place.delete(name)
    for key in records:
        if SHARD_NAME.fullmatch(key.removesuffix(RECORD)):
            place.delete(key)
    place.delete(PARTIAL)


def _read(place: Storage, key: str) -> dict[str, Any] | None:
    if not place.exists(key):
        return None
    try:
        content = json.loads(place.read(key, INDEX_LIMIT))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise StorageError(f"{place.uri_of(key)} is damaged: delete it and export again")
    return content


def _put(place: Storage, key: str, content: Mapping[str, Any], folder: Path) -> None:
    draft = folder / "note.json"
    draft.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8")
    place.put(draft, key)


@contextmanager
def _drafts(place: Storage) -> Iterator[Path]:
    """A folder for what is being written: on the disk of a local export, else a temporary one.

    What a killed export left unfinished is removed.
    """
    if "://" in place.uri:
        with tempfile.TemporaryDirectory(prefix="winnow-export-") as name:
            yield Path(name)
        return
    root = Path(place.uri)
    for part in root.rglob(".*.part"):  # of a put that was killed
        part.unlink(missing_ok=True)
    folder = root / _DRAFTS
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
