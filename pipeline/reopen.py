"""Reopen: the file of a source that the lake knows, found again by its address and its content."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from winnow.operators.errors import MediaError, StorageError
from winnow.operators.media import hash_file, probe
from winnow.pipeline.storage import READ_LIMIT, Storage
from winnow.stages.records import Source
from winnow.stages.stage import Stage


@dataclass(frozen=True)
class SourceFiles:
    """Files by their full addresses, wherever each of them lies. Their keys are their uris."""

    options: dict[str, str] = field(default_factory=dict, repr=False)
    """Settings of the object stores, as of `Storage.open`."""

    def _place(self, uri: str) -> tuple[Storage, str]:
        """The storage around a file, and its key there. MediaError `vanished` where it is gone."""
        if "://" not in uri:
            if not Path(uri).is_file():
                raise MediaError("vanished", f"the file is no longer there: {uri}")
            # Opened on the file itself: the run that listed it has followed its links.
            storage = Storage.open(uri)
            return storage, storage.single or Path(uri).name
        folder, _, key = uri.rpartition("/")
        storage = Storage.open(f"{folder}/", options=self.options, create=True)
        if not storage.exists(key):
            raise MediaError("vanished", f"the object is no longer there: {uri}")
        return storage, key

    @contextmanager
    def local(self, key: str) -> Iterator[Path]:
        storage, name = self._place(key)
        with storage.local(name) as path:
            yield path

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        storage, name = self._place(key)
        return storage.read(name, limit)

    def exists(self, key: str) -> bool:
        try:
            self._place(key)
        except (MediaError, StorageError):
            return False
        return True


@dataclass
class Reopen(Stage):
    """Hashes and probes a file again. Without the content that was split, its spans mean nothing."""

    name: ClassVar[str] = "reopen"
    files: SourceFiles
    label: str = "reopen"

    def process(self, source: Source) -> None:
        with self.files.local(source.key) as path:
            size = path.stat().st_size
            if size != source.bytes:
                raise MediaError(
                    "changed", f"the file has {size} bytes and had {source.bytes} when it was split"
                )
            if hash_file(path) != source.source_id:
                raise MediaError("changed", "the file has another content than when it was split")
            source.media = probe(path)
