"""The indexes of search: what of the lake they hold, and how they are kept in line with it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from winnow.operators.embedding import SPACE
from winnow.operators.fingerprint import MODEL as FINGERPRINT
from winnow.pipeline.index import MilvusIndex, WordIndex, default_index_uri
from winnow.pipeline.lake import TABLES, Lake
from winnow.pipeline.views import connect
from winnow.stages.dedup import Entry

WORDS = "words"
"""The index over prompts and captions."""
_BATCH = 10_000
_NOT_INDEXED = {"verdicts", "dataset", "runs"}


@dataclass(frozen=True)
class IndexPlace:
    """Where the indexes of search are: by default milvus-lite's files beside the lake's tables."""

    uri: str | None = None
    token: str = ""

    def of(self, lake: Lake) -> str:
        return self.uri or str(Path(default_index_uri(lake)).with_name("search.db"))


HERE = IndexPlace()


@dataclass(frozen=True)
class SearchIndex:
    """One of the search indexes of a lake."""

    lake: Lake
    space: str
    """fingerprint_v1, semantic, or words."""
    model: str = ""
    """Identity of the backbone whose semantic vectors are comparable."""
    place: IndexPlace = HERE

    @property
    def collection(self) -> str:
        name = hashlib.sha256(f"{self.lake.uri} {self.model}".encode()).hexdigest()[:12]
        return f"{re.sub(r'[^a-z0-9]', '_', self.space)}_{name}"

    @property
    def said(self) -> str:
        return f"search by {self.space}" + (f" of {self.model}" if self.model else "")

    def bare(self) -> MilvusIndex:
        """The index as it is, open. Raises IndexUnavailable."""
        kind = WordIndex if self.space == WORDS else MilvusIndex
        index = kind(self.place.of(self.lake), self.collection, self.place.token)
        index.open()
        return index

    @contextmanager
    def opened(self) -> Iterator[MilvusIndex]:
        """The index, in line with the lake. Raises IndexUnavailable."""
        index = self.bare()
        try:
            state = self._state()
            if self._noted() != {**state, "entries": index.entries}:
                self.reconcile(index)
                self._note({**state, "entries": index.entries})
            yield index
        finally:
            index.close()

    def rebuild(self) -> int:
        """Drop the collection and make it from the lake. Returns the clips that it holds."""
        index = self.bare()
        try:
            state = self._state()
            index.clear()
            self.reconcile(index)
            entries = index.entries
            self._note({**state, "entries": entries})
            return entries
        finally:
            index.close()

    def reconcile(self, index: MilvusIndex) -> None:
        with self._wanted() as connection:
            wanted = dict(connection.execute("SELECT clip_id, digest FROM wanted").fetchall())
            held = index.contents()
            gone = sorted(held.keys() - wanted.keys())
            if held and len(gone) == len(held):
                index.clear()
            else:
                index.remove(gone)
            missing = sorted(c for c, digest in wanted.items() if held.get(c) != digest)
            for first in range(0, len(missing), _BATCH):
                rows = connection.execute(
                    "SELECT clip_id, content, digest FROM wanted "
                    "WHERE clip_id IN (SELECT unnest(?))",
                    [missing[first : first + _BATCH]],
                ).fetchall()
                if isinstance(index, WordIndex):
                    index.add_words(rows)
                else:
                    index.add_all(
                        [Entry(c, _array(vector), 0, digest) for c, vector, digest in rows]
                    )
            index.flush()

    def digests(self) -> dict[str, int]:
        """By clip id a digest of what the index should hold of it."""
        with self._wanted() as connection:
            return dict(connection.execute("SELECT clip_id, digest FROM wanted").fetchall())

    def content(self, clip_ids: list[str]) -> dict[str, Any]:
        """By clip id the vector or the text that the index should hold."""
        with self._wanted() as connection:
            return dict(
                connection.execute(
                    "SELECT clip_id, content FROM wanted WHERE clip_id IN (SELECT unnest(?))",
                    [clip_ids],
                ).fetchall()
            )

    @contextmanager
    def _wanted(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection with `wanted`: clip_id, content (vector or text), digest."""
        with connect(self.lake) as connection:
            if self.space == WORDS:
                query, parameters = _TEXTS, []
            else:
                measured = "c.embedding_model = ?" if self.space == SPACE else "true"
                query = _VECTORS.format(measured=measured)
                parameters = [self.space, *([self.model] if self.space == SPACE else [])]
            connection.execute(
                "CREATE TEMP TABLE wanted AS SELECT clip_id, content, "
                f"(hash(content) >> 1)::BIGINT AS digest FROM ({query})",
                parameters,
            )
            yield connection

    def _state(self) -> dict[str, Any]:
        """What the index depends on: the versions of the lake's tables."""
        state = {}
        for name in TABLES:
            table = None if name in _NOT_INDEXED else self.lake.open(name)
            if table is not None:
                state[name] = f"{table.metadata().id} {table.version()}"
        return {"tables": state}

    @property
    def _notes(self) -> Path:
        return Path(default_index_uri(self.lake)).with_name("search.json")

    def _all_notes(self) -> dict[str, Any]:
        try:
            notes = json.loads(self._notes.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}

    @property
    def _key(self) -> str:
        return f"{self.place.of(self.lake)} {self.collection}"

    def _noted(self) -> Any:
        return self._all_notes().get(self._key)

    def _note(self, state: dict[str, Any]) -> None:
        """Remember the state of the lake that the index shows: a search then need not compare."""
        self._notes.parent.mkdir(parents=True, exist_ok=True)
        written = self._notes.with_suffix(f".{os.getpid()}.part")
        written.write_text(json.dumps(self._all_notes() | {self._key: state}), "utf-8")
        written.replace(self._notes)


# Of several vectors of a clip (two runs at once took up the same file) any one will do.
_VECTORS = """
    SELECT e.clip_id, e.vector AS content
    FROM embeddings e JOIN clips c ON c.clip_id = e.clip_id
    WHERE e.model = ? AND {measured}
    QUALIFY row_number() OVER (PARTITION BY e.clip_id ORDER BY e.attempt_id DESC) = 1"""

# The prompt of a clip and what was captioned of it; each text once, in a fixed order.
_TEXTS = """
    SELECT clip_id, string_agg(words, chr(10) ORDER BY part, words) AS content
    FROM (
        SELECT DISTINCT c.clip_id, 0 AS part, s.prompt AS words
        FROM clips c JOIN sources s USING (attempt_id)
        UNION
        SELECT DISTINCT clip_id, 1 + window_number, text FROM captions
        WHERE status IN ('ok', 'truncated') AND clip_id IN (SELECT clip_id FROM clips)
    ) WHERE trim(words) <> '' GROUP BY clip_id"""


def search_indexes(lake: Lake, place: IndexPlace = HERE) -> list[SearchIndex]:
    """The search indexes that there is something for in the lake."""
    found = []
    with connect(lake) as connection:
        models = {
            m for (m,) in connection.execute("SELECT DISTINCT model FROM embeddings").fetchall()
        }
        if FINGERPRINT in models:
            found.append(SearchIndex(lake, FINGERPRINT, place=place))
        if SPACE in models:
            backbones = connection.execute(
                "SELECT DISTINCT embedding_model FROM clips WHERE embedding_model IS NOT NULL ORDER BY 1"
            ).fetchall()
            found += [SearchIndex(lake, SPACE, identity, place) for (identity,) in backbones]
        if connection.execute(f"SELECT 1 FROM ({_TEXTS}) LIMIT 1").fetchone():
            found.append(SearchIndex(lake, WORDS, place=place))
    return found


def _array(vector: Any) -> NDArray[np.float32]:
    return np.array(vector, np.float32)
