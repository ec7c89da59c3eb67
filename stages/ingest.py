"""Ingest: what is this file? Content hash, container facts, prompt and generator metadata."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import ClassVar

from winnow.operators.errors import MediaError
from winnow.operators.media import Limits, check, hash_file, probe
from winnow.stages.records import Source
from winnow.stages.stage import Files, Stage


@dataclass
class Ingest(Stage):
    """Hashes and probes one file. Sidecars were read when the folder was listed."""

    name: ClassVar[str] = "ingest"
    files: Files
    limits: Limits = field(default_factory=Limits)
    settle_s: float = 120.0
    """A file that is cut off and changed this recently is taken for one still being written."""
    label: str = "ingest"

    def process(self, source: Source) -> None:
        try:
            self._identify(source)
        except MediaError as error:
            recent = time.time() - source.modified < self.settle_s
            if not (recent and error.kind in ("empty", "truncated")):
                raise
            source.postpone(f"{error}; it changed less than {self.settle_s:g} s ago")

    def _identify(self, source: Source) -> None:
        if source.bytes == 0:
            raise MediaError("empty", "the file has no bytes")
        check(None, source.bytes, self.limits)
        with self.files.local(source.key) as path:
            before = path.stat()
            source.source_id = hash_file(path)
            source.media = probe(path, self.limits)
            after = path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            source.postpone("the file changed while it was read")
            return
        check(source.media, source.bytes, self.limits)


@dataclass
class Claim(Stage):
    """Exact copies: the first file with some content is processed, later ones name it.

    `claimed` maps the content hash of every source that the lake already holds to its uri. One
    instance sees the sources in order, so which file is "the first" does not depend on timing.
    """

    name: ClassVar[str] = "claim"
    ordered: ClassVar[bool] = True
    claimed: dict[str, str]
    label: str = "claim"

    def process(self, source: Source) -> None:
        if source.source_id is None:
            return
        first = self.claimed.setdefault(source.source_id, source.uri)
        if first != source.uri:
            source.status, source.copy_of = "copy", first
