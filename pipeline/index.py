"""Milvus indexes of clips, as milvus-lite inside the lake or on a server.

They are derived from the lake and may be deleted at any time. The index of dedup
(pipeline/kept_index.py) holds the kept clips; those of search (pipeline/search_index.py) hold all
clips, by a vector or by their words.
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
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from winnow.operators.errors import IndexUnavailable
from winnow.pipeline.lake import Lake
from winnow.stages.dedup import SLACK, Entry, ExactIndex, Neighbour, cosine

IndexType = Literal["FLAT", "HNSW"]
BUILT: dict[str, dict[str, int]] = {"FLAT": {}, "HNSW": {"M": 16, "efConstruction": 200}}
"""How the vectors of an index of each type are arranged."""
_LEAST_EF = 128
RECENT = 1000
"""Clips that are also held in memory, before a search waits for the server to show them."""

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
    """Kept clips in a Milvus collection. It sees its own writes at once.

    A server shows a write to a search only after its next tick, a fifth of a second later. What this
    process wrote lately is therefore searched in memory, and the rest on the server without waiting;
    every thousand writes one search does wait. The answers are those of strong consistency, provided
    that nobody else writes to the collection meanwhile.
    """

    uri: str
    collection: str
    token: str = ""
    index_type: IndexType = "FLAT"
    """Of a collection that is created here. FLAT compares with every clip; HNSW may miss a few."""
    searched: ClassVar[str] = "vector"
    """The field that is searched."""
    content: ClassVar[str] = "vector"
    """The field that was given."""
    metric: ClassVar[str] = "COSINE"
    _client: Any = field(default=None, repr=False)
    _age: int | None = field(default=None, repr=False)
    _recent: ExactIndex = field(default_factory=ExactIndex, repr=False)
    _removed: set[str] = field(default_factory=set, repr=False)
    """Removed since the server was last waited for: it may still find them."""
    _waited: bool = field(default=False, repr=False)
    """A search has seen everything that is neither in `_recent` nor in `_removed`."""
    _unflushed: int = field(default=0, repr=False)

    @property
    def _embedded(self) -> bool:
        return "://" not in self.uri

    def open(self, dimensions: int | None = None) -> None:
        """Connect, and create the collection where `dimensions` is given and it is missing."""
        from pymilvus import MilvusClient

        # It warns of what milvus-lite lacks and does not need (a server's clock for iterators).
        logging.getLogger("pymilvus").setLevel(logging.ERROR)
        if self._embedded:
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
        self._describe_index(indexes)
        self._client.create_collection(
            self.collection, schema=schema, index_params=indexes, consistency_level="Strong"
        )

    def _describe_index(self, indexes: Any) -> None:
        indexes.add_index(
            "vector", index_type=self.index_type, metric_type="COSINE",
            params=BUILT[self.index_type],
        )  # fmt: skip

    def use_index_type(self) -> None:
        """Index the collection anew where it was made with another index type than is wanted."""
        with _explained(self.uri):
            if not self.present:
                return
            (name,) = self._client.list_indexes(self.collection, field_name="vector")
            found = self._client.describe_index(self.collection, name)["index_type"]
            if found == self.index_type:
                return
            self._client.release_collection(self.collection)
            self._client.drop_index(self.collection, name)
            indexes = self._client.prepare_index_params()
            self._describe_index(indexes)
            self._client.create_index(self.collection, indexes)
            self._client.load_collection(self.collection)

    @property
    def present(self) -> bool:
        return bool(self._client.has_collection(self.collection))

    def _rows(self, fields: list[str]) -> Iterator[dict[str, Any]]:
        if self._embedded:
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
        found = self._recent.search(vector, threshold)
        with _explained(self.uri):
            hits = self._near(vector, threshold) if self.present else []
        for fields in hits:
            clip_id = fields["clip_id"]
            if clip_id in self._removed or clip_id in self._recent:
                continue  # as it was before
            similarity = cosine(vector, np.array(fields["vector"], np.float32))
            if similarity >= threshold:
                found.append(Neighbour(clip_id, similarity, fields["pixels"], fields["age"]))
        return found

    def _near(self, vector: NDArray[np.float32], threshold: float) -> list[dict[str, Any]]:
        """The fields of all clips of the collection that may reach the threshold."""
        limit = NEIGHBOURS
        while True:
            params: dict[str, Any] = {"radius": threshold - SLACK}
            if self.index_type == "HNSW":
                params["ef"] = max(_LEAST_EF, 2 * limit)
            (hits,) = self._client.search(
                self.collection,
                data=[vector.tolist()],
                limit=limit,
                output_fields=["clip_id", "vector", "pixels", "age"],
                search_params={"metric_type": "COSINE", "params": params},
                consistency_level="Bounded" if self._waited else "Strong",
            )
            self._waited = True
            if len(hits) < limit or limit == _SERVER_LIMIT:
                # By the entity: where the hit itself keeps the key differs between servers.
                return [hit["entity"] for hit in hits]
            limit = min(8 * limit, _SERVER_LIMIT)

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
        most = entries if self._embedded else _SERVER_LIMIT
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
        self._upsert([entry])
        self._recent.add(entry)
        self._removed.discard(entry.clip_id)
        self._forget()

    def add_all(self, entries: Sequence[Entry]) -> None:
        """Add many clips; `flush` when they are all there."""
        if not entries:
            return
        self._upsert(entries)
        self._recent.remove([e.clip_id for e in entries if e.clip_id in self._recent])
        self._removed.difference_update(entry.clip_id for entry in entries)
        self._waited = False

    def flush(self) -> None:
        """Have what was written lately indexed, where it is much.

        milvus-lite compares with unflushed clips one by one, in Python; a server builds its index
        of what is flushed.
        """
        if self._unflushed >= RECENT:
            with _explained(self.uri):
                self._client.flush(self.collection)
            self._unflushed = 0

    def _forget(self) -> None:
        """Let the collection answer for what was written lately, once it is much."""
        if self._recent.entries + len(self._removed) >= RECENT:
            self._recent, self._removed, self._waited = ExactIndex(), set(), False
        if self._embedded:  # a server does it in its own time
            self.flush()

    def _upsert(self, entries: Sequence[Entry]) -> None:
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
        self._unflushed += len(entries)
        if self._age is not None:
            self._age = max(self._age, *(entry.age + 1 for entry in entries))

    def remove(self, clip_ids: Sequence[str]) -> None:
        with _explained(self.uri):
            for start in range(0, len(clip_ids), _BATCH):
                self._client.delete(self.collection, ids=list(clip_ids[start : start + _BATCH]))
        self._recent.remove([clip_id for clip_id in clip_ids if clip_id in self._recent])
        self._removed.update(clip_ids)
        self._forget()

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
        self._recent, self._removed, self._waited = ExactIndex(), set(), False
        self._age = self._unflushed = 0

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
        self._unflushed += len(texts)

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
