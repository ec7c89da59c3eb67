"""Milvus indexes of clips, as milvus-lite inside the lake or on a server.

They are derived from the lake and may be deleted at any time. The index of dedup holds the kept
clips of one embedding model under one policy, and is reconciled with the lake's verdicts when a run
starts. The indexes of search (pipeline/search.py) hold all clips, by a vector or by their words.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from winnow.operators.errors import IndexUnavailable
from winnow.pipeline.lake import Lake
from winnow.pipeline.views import connect
from winnow.stages.dedup import SLACK, Entry, Neighbour, cosine, picture_pixels

NEIGHBOURS = 64
_BATCH = 1000
_SERVER_LIMIT = 16_384
"""Most hits that a Milvus server gives at once; milvus-lite has no limit."""
_PAGE = 10_000
_ALL = 2**31 - 1
_IDS = 1000
"""Clip ids in one filter of a server."""


def default_index_uri(lake: Lake) -> str:
    """Where milvus-lite keeps its files: in a local lake, else in the user's cache."""
    if lake.is_local:
        return str(Path(lake.uri) / "index" / "milvus.db")
    name = hashlib.sha256(lake.uri.encode()).hexdigest()[:16]
    return str(Path.home() / ".cache" / "winnow" / "index" / name / "milvus.db")


@dataclass
class MilvusIndex:
    """Kept clips in a Milvus collection, with strong consistency: it sees its own writes."""

    uri: str
    collection: str
    token: str = ""
    searched: ClassVar[str] = "vector"
    """The field that is searched."""
    content: ClassVar[str] = "vector"
    """The field that was given."""
    metric: ClassVar[str] = "COSINE"
    _client: Any = field(default=None, repr=False)
    _age: int | None = field(default=None, repr=False)

    def open(self, dimensions: int | None = None) -> None:
        """Connect, and create the collection where `dimensions` is given and it is missing."""
        from pymilvus import MilvusClient

        # It warns of what milvus-lite lacks and does not need (a server's clock for iterators).
        logging.getLogger("pymilvus").setLevel(logging.ERROR)
        if "://" not in self.uri:
            Path(self.uri).parent.mkdir(parents=True, exist_ok=True)
        with _explained(self.uri):
            self._client = MilvusClient(self.uri, token=self.token)
            if self._client.has_collection(self.collection):
                self._client.load_collection(self.collection)
            elif dimensions is not None:
                self._create(dimensions)

    def _create(self, dimensions: int) -> None:
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("clip_id", DataType.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimensions)
        schema.add_field("pixels", DataType.INT64)
        schema.add_field("age", DataType.INT64)
        indexes = self._client.prepare_index_params()
        # Dedup must not miss a neighbour: FLAT is exact. A server with many millions of clips
        # trades that for an approximate index by its own configuration.
        indexes.add_index("vector", index_type="FLAT", metric_type="COSINE")
        self._client.create_collection(
            self.collection, schema=schema, index_params=indexes, consistency_level="Strong"
        )

    @property
    def present(self) -> bool:
        return bool(self._client.has_collection(self.collection))

    def _rows(self, fields: list[str]) -> Iterator[dict[str, Any]]:
        if "://" not in self.uri:
            # milvus-lite reads everything for every page: one page.
            yield from self._client.query(
                self.collection, filter="", output_fields=fields, limit=_ALL,
                consistency_level="Strong",
            )  # fmt: skip
            return
        iterator = self._client.query_iterator(
            self.collection, batch_size=_PAGE, filter="", output_fields=fields
        )
        try:
            while batch := iterator.next():
                yield from batch
        finally:
            iterator.close()

    def search(self, vector: NDArray[np.float32], threshold: float) -> list[Neighbour]:
        with _explained(self.uri):
            if not self.present:
                return []
            (hits,) = self._client.search(
                self.collection,
                data=[vector.tolist()],
                limit=NEIGHBOURS,
                output_fields=["clip_id", "vector", "pixels", "age"],
                search_params={"metric_type": "COSINE", "params": {"radius": threshold - SLACK}},
                consistency_level="Strong",
            )
        # By the entity: where the hit itself keeps the key differs between servers.
        entities = [hit["entity"] for hit in hits]
        found = [
            Neighbour(
                fields["clip_id"],
                cosine(vector, np.array(fields["vector"], np.float32)),
                fields["pixels"],
                fields["age"],
            )
            for fields in entities
        ]
        return [near for near in found if near.similarity >= threshold]

    def nearest(
        self, query: Any, count: int, among: Collection[str] | None = None
    ) -> list[tuple[str, float]]:
        """(clip id, cosine) of the nearest clips, nearest first; equal ones by id.

        With `among`, only these clips are found, and as many as are wanted where there are so many.
        """
        if among is not None and not among:
            return []
        wanted = None if among is None else set(among)
        with _explained(self.uri):
            if not self.present:
                return []
            found = self._nearest_of(query, count, wanted)
        # By id where equally near: the order of an index is not the same twice.
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))[:count]

    def _nearest_of(
        self, query: Any, count: int, wanted: set[str] | None
    ) -> list[tuple[str, float]]:
        if wanted is None:
            return self._ask(query, count)
        # Filters of milvus-lite compare every row with every id: more hits than needed cost less.
        entries = self.entries
        most = _SERVER_LIMIT if "://" in self.uri else entries
        limit = min(max(4 * count, NEIGHBOURS), most)
        while True:
            hits = self._ask(query, limit)
            found = [hit for hit in hits if hit[0] in wanted]
            if len(found) >= count or len(hits) < limit or limit >= entries:
                return found
            if limit >= most:
                break
            limit = min(8 * limit, most)
        ids = sorted(wanted)
        return [
            hit
            for first in range(0, len(ids), _IDS)
            for hit in self._ask(query, count, ids[first : first + _IDS])
        ]

    def _ask(
        self, query: Any, limit: int, ids: Sequence[str] | None = None
    ) -> list[tuple[str, float]]:
        (hits,) = self._client.search(
            self.collection,
            data=[self._asked(query)],
            anns_field=self.searched,
            limit=max(1, limit),
            output_fields=["clip_id"],
            filter="" if ids is None else f"clip_id in {json.dumps(list(ids))}",
            search_params={"metric_type": self.metric},
            consistency_level="Strong",
        )
        # milvus-lite gives BM25 scores as distances, below zero; a server gives them as they are.
        signed = abs if self.metric == "BM25" else float
        return [
            (hit["entity"]["clip_id"], round(signed(float(hit["distance"])), 6)) for hit in hits
        ]

    def _asked(self, query: Any) -> Any:
        return query.tolist()

    @property
    def entries(self) -> int:
        """How many clips the collection holds."""
        with _explained(self.uri):
            if not self.present:
                return 0
            (row,) = self._client.query(
                self.collection, filter="", output_fields=["count(*)"], consistency_level="Strong"
            )
        return int(row["count(*)"])

    def stored(self, clip_ids: Sequence[str]) -> dict[str, Any]:
        """What the collection holds of some clips: by id the vector, or the words."""
        with _explained(self.uri):
            if not self.present or not clip_ids:
                return {}
            rows = self._client.get(
                self.collection, ids=list(clip_ids), output_fields=["clip_id", self.content]
            )
        return {row["clip_id"]: row[self.content] for row in rows}

    def add(self, entry: Entry) -> None:
        self.add_all([entry])

    def add_all(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        with _explained(self.uri):
            if not self.present:
                self._create(len(entries[0].vector))
            for start in range(0, len(entries), _BATCH):
                batch = [
                    {"clip_id": e.clip_id, "vector": e.vector.tolist(), "pixels": e.pixels,
                     "age": e.age}
                    for e in entries[start : start + _BATCH]
                ]  # fmt: skip
                self._client.upsert(self.collection, batch)
        if self._age is not None:
            self._age = max(self._age, *(entry.age + 1 for entry in entries))

    def remove(self, clip_ids: Sequence[str]) -> None:
        with _explained(self.uri):
            for start in range(0, len(clip_ids), _BATCH):
                self._client.delete(self.collection, ids=list(clip_ids[start : start + _BATCH]))

    def contents(self) -> dict[str, int]:
        """Age by clip id, of everything in the collection."""
        with _explained(self.uri):
            if not self.present:
                return {}
            return {row["clip_id"]: row["age"] for row in self._rows(["clip_id", "age"])}

    def clear(self) -> None:
        with _explained(self.uri):
            if self.present:
                self._client.drop_collection(self.collection)
        self._age = 0

    def next_age(self) -> int:
        if self._age is None:
            self._age = 1 + max(self.contents().values(), default=-1)
        return self._age

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


@dataclass
class WordIndex(MilvusIndex):
    """Clips by the words about them, ranked by BM25. `age` holds a digest of the text.

    milvus-lite counts how rare a word is within each of its segments of up to 100,000 clips.
    """

    searched: ClassVar[str] = "weights"
    content: ClassVar[str] = "words"
    metric: ClassVar[str] = "BM25"

    def _create(self, dimensions: int) -> None:
        from pymilvus import DataType, Function, FunctionType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("clip_id", DataType.VARCHAR, is_primary=True, max_length=64)
        # `plain_words` has made lower case of it and parted what the tokenizer would not.
        schema.add_field(
            "words", DataType.VARCHAR, max_length=WORDS_BYTES, enable_analyzer=True,
            analyzer_params={"tokenizer": "standard"},
        )  # fmt: skip
        schema.add_field("age", DataType.INT64)
        schema.add_field("weights", DataType.SPARSE_FLOAT_VECTOR)
        schema.add_function(
            Function("bm25", FunctionType.BM25, input_field_names=["words"],
                     output_field_names=["weights"])
        )  # fmt: skip
        indexes = self._client.prepare_index_params()
        indexes.add_index("weights", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
        self._client.create_collection(
            self.collection, schema=schema, index_params=indexes, consistency_level="Strong"
        )

    def add_words(self, texts: Sequence[tuple[str, str, int]]) -> None:
        """Add (clip id, text, digest); what is there of the same id is replaced."""
        with _explained(self.uri):
            if texts and not self.present:
                self._create(0)
            for start in range(0, len(texts), _BATCH):
                batch = [{"clip_id": clip_id, "words": plain_words(text), "age": digest}
                         for clip_id, text, digest in texts[start : start + _BATCH]]  # fmt: skip
                self._client.upsert(self.collection, batch)

    def _asked(self, query: Any) -> Any:
        return plain_words(query)


WORDS_BYTES = 65_535  # a field's longest


def plain_words(text: str) -> str:
    """A text as it is indexed and asked: compatible forms in lower case; Chinese and Japanese
    characters, which have no spaces between words, one by one. Cut off where a field ends."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    parted = re.sub(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff])", r" \1 ", folded)
    return " ".join(parted.split()).encode()[:WORDS_BYTES].decode(errors="ignore")


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except (MilvusException, OSError) as error:
        raise IndexUnavailable(
            f"the vector index at {uri} does not answer: {error}. If another run owns it, wait for "
            "that run; if the files are broken, delete them: the index is rebuilt from the lake"
        ) from error


@dataclass(frozen=True)
class OpenKeptIndex:
    """Opens the index of a run and brings it in line with the lake. Picklable."""

    lake: Lake
    uri: str
    token: str
    embedding: str
    policy: str

    @property
    def collection(self) -> str:
        name = "kept_" + re.sub(r"\W", "_", f"{self.embedding}__{self.policy}")
        if "://" not in self.uri:
            return name
        # A server may be shared by several lakes.
        return f"{name}__{hashlib.sha256(self.lake.uri.encode()).hexdigest()[:12]}"

    def __call__(self) -> MilvusIndex:
        index = MilvusIndex(self.uri, self.collection, self.token)
        index.open()
        self.reconcile(index)
        return index

    def reconcile(self, index: MilvusIndex) -> None:
        """Remove what is not kept in the lake (an uncommitted attempt), add what is missing."""
        wanted = {entry.clip_id: entry for entry in self.kept_entries()}
        held = index.contents()
        extra = [clip_id for clip_id, age in held.items()
                 if clip_id not in wanted or wanted[clip_id].age != age]  # fmt: skip
        if len(extra) == len(held) and held:
            index.clear()
        else:
            index.remove(extra)
        gone = set(extra)
        index.add_all([e for e in wanted.values() if e.clip_id not in held or e.clip_id in gone])

    def kept_entries(self) -> list[Entry]:
        """The kept clips of the lake under the policy, oldest first."""
        if not self.lake.exists():
            return []
        with connect(self.lake) as connection:
            has_border = connection.execute(
                "SELECT count(*) FROM column_docs WHERE table_name = 'clips' "
                "AND column_name = 'border_width'"
            ).fetchone() == (1,)
            border = "c.border_width, c.border_height" if has_border else "NULL, NULL"
            rows = connection.execute(
                f"""SELECT c.clip_id, e.vector, s.width, s.height, {border}
                FROM verdicts v JOIN clips c USING (clip_id) JOIN sources s ON s.attempt_id = c.attempt_id
                JOIN embeddings e ON e.clip_id = c.clip_id
                WHERE v.policy = ? AND v.verdict = 'keep' AND e.model = ?
                QUALIFY row_number() OVER (PARTITION BY c.clip_id ORDER BY s.seq, e.attempt_id) = 1
                ORDER BY s.seq, c.start_frame, c.clip_id""",
                [self.policy, self.embedding],
            ).fetchall()
        return [
            Entry(
                clip_id, np.array(vector, np.float32), picture_pixels(inner_w, inner_h, w, h), age
            )
            for age, (clip_id, vector, w, h, inner_w, inner_h) in enumerate(rows)
        ]
