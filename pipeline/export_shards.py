"""Shards of an export: clips are dealt into files of bounded size, in an order that never varies.

A tar shard has for every clip the members <clip_id>.mp4, .json and .txt, as `webdataset` reads them,
with fixed times, owners and modes. A shard is made in a draft and put under its name when whole.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet

from winnow.operators.errors import LakeError, StorageError
from winnow.pipeline.export_rows import caption_text, json_text, map_columns, rows_of
from winnow.pipeline.storage import Storage

SUFFIXES = {"webdataset": "tar", "parquet": "parquet", "jsonl": "jsonl"}
SHARD_BYTES = {"webdataset": 10**9, "parquet": 128 * 2**20, "jsonl": 128 * 2**20}
SHARD_NAME = re.compile(r"(?:[A-Za-z0-9._=-]+/)*(?:shard|part)-\d{6,}\.(?:tar|parquet|jsonl)")
UNKNOWN = "unknown"
_CLIP_ID = re.compile(r"[A-Za-z0-9_-]{1,90}")
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE


@dataclass(frozen=True, slots=True)
class Problem:
    """A kept clip that could not be exported, and why."""

    clip_id: str
    media_uri: str | None
    reason: str


@dataclass(slots=True)
class Item:
    """A clip as it goes into a shard."""

    clip_id: str
    media_uri: str
    media_bytes: int | None
    media_sha256: str | None
    json: bytes
    text: bytes
    row: dict[str, Any]

    @property
    def tar_bytes(self) -> int:
        sizes = (self.media_bytes or 0, len(self.json), len(self.text))
        return sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in sizes)


@dataclass(slots=True)
class Shard:
    """The clips that belong into one file."""

    name: str
    items: list[Item]
    schema: pa.Schema = field(repr=False)

    def plan(self) -> str:
        """A hash of what the shard is to hold: equal plans give equal bytes."""
        digest = hashlib.sha256(f"1|{self.name}".encode())
        if self.name.endswith(".parquet"):
            digest.update(f"{pa.__version__}|{self.schema}".encode())
        for item in self.items:
            head = f"|{item.clip_id}|{item.media_uri}|{item.media_bytes}|{len(item.json)}|"
            digest.update(head.encode() + item.json + item.text)
        return digest.hexdigest()


def folder_name(axis: str, value: str | None) -> str:
    """`axis=value`, safe in any path; different values never share a folder.

    What is no plain letter, digit, dot, dash or underscore becomes an underscore, and a hash of the
    value is added.
    """
    value = UNKNOWN if value is None else value
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", value)[:60]
    if plain != value or not plain or plain.startswith(".") or re.search(r"-[0-9a-f]{8}$", plain):
        plain = f"{plain.lstrip('.')}-{hashlib.sha256(value.encode()).hexdigest()[:8]}"
    return f"{axis}={plain}"


def deal(
    batches: Iterable[pa.RecordBatch],
    form: str,
    axes: Sequence[str],
    scores: Iterable[str],
    limit: int,
) -> Iterator[Shard]:
    """Clips into shards, in their order; one that is larger than the limit by itself is alone."""
    scored = frozenset(scores)
    stem, suffix = "shard" if form == "webdataset" else "part", SUFFIXES[form]
    folder, number, size = "", 0, 0
    items: list[Item] = []
    schema = pa.schema([])
    for batch in batches:
        schema = batch.schema
        maps = map_columns(schema)
        for row in rows_of(batch):
            item = _item(row, scored, maps)
            place = "".join(folder_name(axis, row[axis]) + "/" for axis in axes)
            weight = item.tar_bytes if form == "webdataset" else len(item.json) + 1
            full = _file_bytes(form, size + weight) > limit
            if items and (full or place != folder):
                yield Shard(f"{folder}{stem}-{number:06d}.{suffix}", items, schema)
                number, items, size = number + 1 if place == folder else 0, [], 0
            folder = place
            items.append(item)
            size += weight
    if items:
        yield Shard(f"{folder}{stem}-{number:06d}.{suffix}", items, schema)


def _file_bytes(form: str, members: int) -> int:
    """A tar ends with two empty blocks and is filled up to a whole record."""
    return -(-(members + 2 * _BLOCK) // _RECORD) * _RECORD if form == "webdataset" else members


def _item(row: dict[str, Any], scores: frozenset[str], maps: frozenset[str]) -> Item:
    if not _CLIP_ID.fullmatch(row["clip_id"]):
        raise LakeError(f"{row['clip_id']!r} is no clip_id: it cannot name the members of a shard")
    return Item(
        row["clip_id"],
        row["media_uri"] or "",
        row["media_bytes"],
        row["media_sha256"],
        json_text(row, scores, maps).encode("utf-8", "backslashreplace"),
        caption_text(row).encode("utf-8", "backslashreplace"),
        row,
    )


@dataclass
class Media:
    """The encoded clips of a lake. Nothing outside its media folder is read, whatever a uri says."""

    storage: Storage
    root: str

    def key(self, uri: str) -> str | None:
        """The key of a media uri; a lake that was moved or copied has its media beside it."""
        prefix = self.root.rstrip("/") + "/"
        if uri.startswith(prefix):
            return uri.removeprefix(prefix)
        return uri.rpartition("/media/")[2] if "/media/" in uri else None

    def problem(self, item: Item) -> str | None:
        """Why the media cannot be had, if so."""
        key = self.key(item.media_uri)
        if key is None:
            return f"the media are not below {self.root}"
        return None if self.storage.exists(key) else "the media are missing"

    def local(self, item: Item) -> AbstractContextManager[Path]:
        key = self.key(item.media_uri)
        assert key is not None
        return self.storage.local(key)


def write_shard(shard: Shard, draft: Path, media: Media) -> list[Problem]:
    """Write a shard into a draft file; returns the clips that had to be left out."""
    if shard.name.endswith(".tar"):
        return _write_tar(shard, draft, media)
    if shard.name.endswith(".jsonl"):
        with draft.open("wb") as file:
            for item in shard.items:
                file.write(item.json + b"\n")
    else:
        table = pa.Table.from_pylist([item.row for item in shard.items], schema=shard.schema)
        pyarrow.parquet.write_table(table, draft, compression="zstd")
    return []


def _write_tar(shard: Shard, draft: Path, media: Media) -> list[Problem]:
    problems = []
    with tarfile.open(draft, "w", format=tarfile.USTAR_FORMAT) as tar:
        for item in shard.items:
            start = tar.offset
            try:
                reason = media.problem(item) or _add_clip(tar, item, media)
            except (_Unreadable, StorageError) as error:
                reason = f"the media cannot be read: {error}"
            if reason is not None:
                _take_back(tar, start)
                problems.append(Problem(item.clip_id, item.media_uri, reason))
    return problems


def _add_clip(tar: tarfile.TarFile, item: Item, media: Media) -> str | None:
    """Add the members of a clip. Its media are hashed as they are copied: the content that was
    checked is the content that is there. Returns why the clip must be taken back, if so."""
    with _open(item, media) as file:
        size = file.size
        if item.media_bytes is not None and size != item.media_bytes:
            return f"the media changed: {size} bytes, not {item.media_bytes}"
        # In order of the suffixes' reading: a reader that streams has the clip first.
        _add(tar, f"{item.clip_id}.mp4", size, file)
        found = file.digest.hexdigest()
    if item.media_sha256 is not None and found != item.media_sha256:
        return f"the media are damaged: SHA-256 recorded {item.media_sha256}, found {found}"
    _add(tar, f"{item.clip_id}.json", len(item.json), io.BytesIO(item.json))
    _add(tar, f"{item.clip_id}.txt", len(item.text), io.BytesIO(item.text))
    return None


def _add(tar: tarfile.TarFile, name: str, size: int, file: _Readable) -> None:
    member = tarfile.TarInfo(name)  # no owner, time 0
    member.size, member.mode = size, 0o644
    tar.addfile(member, file)  # type: ignore[arg-type]  # it only reads


def _take_back(tar: tarfile.TarFile, start: int) -> None:
    """Cut a draft back to where it was before a clip, as if that had never been added."""
    assert tar.fileobj is not None
    tar.fileobj.seek(start)
    tar.fileobj.truncate()  # type: ignore[attr-defined]  # a plain file
    tar.offset = start


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Unreadable(Exception):
    """The media of one clip; what goes wrong with the draft is another thing."""


@dataclass
class _Hashing:
    """Reads a file once, for a copy and its hash."""

    file: BinaryIO
    size: int
    digest: Any = field(default_factory=hashlib.sha256)

    def read(self, size: int, /) -> bytes:
        try:
            chunk = self.file.read(size)
        except OSError as error:
            raise _Unreadable(error.strerror or str(error)) from error
        if len(chunk) < size:
            raise _Unreadable("the file became shorter meanwhile")
        self.digest.update(chunk)
        return chunk


@contextmanager
def _open(item: Item, media: Media) -> Iterator[_Hashing]:
    with ExitStack() as stack:
        try:
            path = stack.enter_context(media.local(item))
            file = stack.enter_context(path.open("rb"))
            size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise _Unreadable(error.strerror or str(error)) from error
        yield _Hashing(file, size)


def entry_of(
    shard: Shard, draft: Path, plan: str, problems: Sequence[Problem]
) -> Mapping[str, Any]:
    """What the index says of a shard."""
    return {
        "name": shard.name,
        "clips": len(shard.items) - len(problems),
        "bytes": draft.stat().st_size,
        "sha256": sha256_of(draft),
        "plan": plan,
    }


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
