"""The index of dedup: the kept clips of one embedding model under one policy.

It is brought in line with the lake's verdicts when a run starts; what an uncommitted attempt left in
it is removed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from winnow.pipeline.index import IndexType, MilvusIndex
from winnow.pipeline.lake import Lake
from winnow.pipeline.views import connect
from winnow.stages.dedup import Entry, ExactIndex, picture_pixels

_BATCH = 10_000


@dataclass(frozen=True)
class KeptClips:
    """The clips that the lake keeps under a policy, with vectors of one model. Picklable."""

    lake: Lake
    embedding: str
    policy: str

    def ids(self) -> list[str]:
        """Oldest first."""
        return [c for batch in self._batches("NULL") for c in batch["clip_id"].to_pylist()]

    def entries(self) -> Iterator[list[Entry]]:
        """Oldest first, some thousands at a time."""
        age = 0
        for batch in self._batches("e.vector"):
            flat = batch["vector"].flatten().to_numpy()
            vectors = flat.astype(np.float32, copy=False).reshape(len(batch), -1)
            names = ("clip_id", "border_width", "border_height", "width", "height")
            rows = zip(*(batch[name].to_pylist() for name in names), strict=True)
            yield [
                Entry(clip_id, vector, picture_pixels(*sizes), age + place)
                for place, ((clip_id, *sizes), vector) in enumerate(zip(rows, vectors, strict=True))
            ]
            age += len(batch)

    def _batches(self, vector: str) -> Iterator[pa.RecordBatch]:
        if not self.lake.exists():
            return
        with connect(self.lake) as connection:
            has_border = connection.execute(
                "SELECT count(*) FROM column_docs WHERE table_name = 'clips' "
                "AND column_name = 'border_width'"
            ).fetchall() == [(1,)]
            border = "c.border_" if has_border else "NULL::INTEGER AS border_"
            yield from connection.sql(
                f"""SELECT c.clip_id, {vector} AS vector, s.width, s.height,
                    {border}width, {border}height
                FROM verdicts v JOIN clips c USING (clip_id) JOIN sources s ON s.attempt_id = c.attempt_id
                JOIN embeddings e ON e.clip_id = c.clip_id
                WHERE v.policy = ? AND v.verdict = 'keep' AND e.model = ?
                QUALIFY row_number() OVER (PARTITION BY c.clip_id ORDER BY s.seq, e.attempt_id) = 1
                ORDER BY s.seq, c.start_frame, c.clip_id""",
                params=[self.policy, self.embedding],
            ).to_arrow_reader(_BATCH)


def ages(clip_ids: Sequence[str], held: dict[str, int]) -> dict[str, int]:
    """An age for each clip, oldest first: the one that it is held with where the order allows."""
    given: dict[str, int] = {}
    last = -1
    for clip_id in clip_ids:
        last = max(last + 1, held.get(clip_id, 0))
        given[clip_id] = last
    return given


@dataclass(frozen=True)
class OpenKeptIndex:
    """Opens the index of a run in Milvus, in line with the lake. Picklable."""

    kept: KeptClips
    uri: str
    token: str = ""
    index_type: IndexType = "FLAT"

    @property
    def collection(self) -> str:
        name = "kept_" + re.sub(r"\W", "_", f"{self.kept.embedding}__{self.kept.policy}")
        if "://" not in self.uri:
            return name
        # A server may be shared by several lakes.
        return f"{name}__{hashlib.sha256(self.kept.lake.uri.encode()).hexdigest()[:12]}"

    def bare(self) -> MilvusIndex:
        """The index as it is, open. Raises IndexUnavailable."""
        index = MilvusIndex(self.uri, self.collection, self.token, self.index_type)
        index.open()
        return index

    def __call__(self) -> MilvusIndex:
        index = self.bare()
        index.use_index_type()
        self.reconcile(index)
        return index

    def reconcile(self, index: MilvusIndex) -> None:
        """Remove what is not kept in the lake (an uncommitted attempt), add what is missing."""
        held = index.contents()
        wanted = ages(self.kept.ids(), held)
        extra = [clip_id for clip_id, age in held.items() if wanted.get(clip_id) != age]
        if len(extra) == len(held) and held:
            index.clear()
        else:
            index.remove(extra)
        missing = {clip_id: age for clip_id, age in wanted.items() if held.get(clip_id) != age}
        for entries in self.kept.entries() if missing else ():
            index.add_all(
                [Entry(e.clip_id, e.vector, e.pixels, missing[e.clip_id])
                 for e in entries if e.clip_id in missing]
            )  # fmt: skip
        index.flush()


@dataclass(frozen=True)
class LoadKeptIndex:
    """Reads the index of a run from the lake into memory. Picklable."""

    kept: KeptClips

    def __call__(self) -> ExactIndex:
        index = ExactIndex()
        for entries in self.kept.entries():
            for entry in entries:
                index.add(entry)
        return index
