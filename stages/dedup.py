"""Dedup: the online rule. Each new clip is compared with the clips kept before it.

Among near-duplicates the older clip stays, unless the new one has more pixels than all that it
duplicates: then it replaces them. Clips are taken in listing order and ties are broken by age and
id, so the outcome does not depend on timing. `resolve` is the rule alone, shared by the stage and by
`winnow refilter`; the index behind it may be Milvus or exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from winnow.stages.records import Demotion, Source
from winnow.stages.stage import Stage


@dataclass(frozen=True, slots=True)
class Entry:
    """A kept clip in the index."""

    clip_id: str
    vector: NDArray[np.float32]
    pixels: int
    """Picture size without borders: what "higher resolution" compares."""
    age: int
    """Place in the order of keeping; smaller is older."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    clip_id: str
    similarity: float
    pixels: int
    age: int


SLACK = 1e-5
"""An index searches with its own arithmetic: candidates are taken so much below the threshold."""


def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The cosine similarity that verdicts state: 6 decimals, the same whatever index found the pair."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    lengths = float(np.sqrt((a @ a) * (b @ b)))
    return round(float(a @ b) / lengths, 6) if lengths else 0.0


class KeptIndex(Protocol):
    """The kept clips, searchable by `cosine`; sees its own writes at once."""

    def search(self, vector: NDArray[np.float32], threshold: float) -> Sequence[Neighbour]: ...

    def add(self, entry: Entry) -> None: ...

    def remove(self, clip_ids: Sequence[str]) -> None: ...

    def next_age(self) -> int: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the rule says of one clip: kept, or a duplicate; and whom it replaces."""

    duplicate_of: str | None = None
    similarity: float | None = None
    replaces: tuple[Neighbour, ...] = ()


def resolve(
    clip_id: str, vector: NDArray[np.float32], pixels: int, index: KeptIndex, threshold: float
) -> Outcome:
    """Apply the online rule to one clip and update the index."""
    near = [n for n in index.search(vector, threshold) if n.clip_id != clip_id]
    stronger = [n for n in near if n.pixels >= pixels]
    if stronger:
        first = min(stronger, key=lambda n: (-n.similarity, n.age, n.clip_id))
        return Outcome(first.clip_id, first.similarity)
    index.remove([n.clip_id for n in near])
    index.add(Entry(clip_id, vector, pixels, index.next_age()))
    return Outcome(replaces=tuple(sorted(near, key=lambda n: (n.age, n.clip_id))))


_BLOCK = 65_536
"""Vectors in one matrix of `ExactIndex`: it grows without copying what it has."""


class ExactIndex:
    """Kept clips in memory, searched exactly: 4 bytes a float, one matrix product a search."""

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.float32]] = []
        self._ids: list[str | None] = []
        self._pixels: list[int] = []
        self._ages: list[int] = []
        self._rows: dict[str, int] = {}

    @property
    def entries(self) -> int:
        return len(self._rows)

    def __contains__(self, clip_id: str) -> bool:
        return clip_id in self._rows

    def search(self, vector: NDArray[np.float32], threshold: float) -> list[Neighbour]:
        found = []
        for number, block in enumerate(self._blocks):
            first = number * _BLOCK
            similarities = block[: len(self._ids) - first] @ vector
            for place in np.flatnonzero(similarities >= threshold - SLACK).tolist():
                row = first + place
                clip_id = self._ids[row]
                if clip_id is None:
                    continue
                similarity = cosine(vector, block[place])
                if similarity >= threshold:
                    found.append(Neighbour(clip_id, similarity, self._pixels[row], self._ages[row]))
        return found

    def add(self, entry: Entry) -> None:
        """Add a clip; one of the same id is replaced."""
        if entry.clip_id in self._rows:
            self.remove([entry.clip_id])
        row = len(self._ids)
        number, place = divmod(row, _BLOCK)
        if number == len(self._blocks):
            self._blocks.append(np.zeros((_BLOCK, len(entry.vector)), np.float32))
        self._blocks[number][place] = entry.vector
        self._ids.append(entry.clip_id)
        self._pixels.append(entry.pixels)
        self._ages.append(entry.age)
        self._rows[entry.clip_id] = row

    def remove(self, clip_ids: Sequence[str]) -> None:
        for clip_id in clip_ids:
            row = self._rows.pop(clip_id)
            self._ids[row] = None
            self._blocks[row // _BLOCK][row % _BLOCK] = 0

    def next_age(self) -> int:
        return len(self._ids)

    def close(self) -> None:
        for kept in (self._blocks, self._ids, self._pixels, self._ages, self._rows):
            kept.clear()


def picture_pixels(
    inner_width: int | None, inner_height: int | None, width: int, height: int
) -> int:
    """Pixels of the picture inside black borders, where `border` measured them."""
    if inner_width is None or inner_height is None:
        return width * height
    return inner_width * inner_height


@dataclass
class Dedup(Stage):
    """Marks near-duplicates among the clips still alive. Owns the index: one instance a run."""

    name: ClassVar[str] = "dedup"
    ordered: ClassVar[bool] = True
    open_index: Callable[[], KeptIndex]
    embedding: str
    threshold: float
    label: str = "dedup"
    _index: KeptIndex | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, object]:
        # Plans travel to worker processes; an open index stays with its owner.
        return self.__dict__ | {"_index": None}

    def setup(self) -> None:
        self._index = self.open_index()

    def process(self, source: Source) -> None:
        assert self._index is not None
        assert source.media is not None
        for clip in source.clips:
            vector = clip.vectors.get(self.embedding)
            if not clip.alive or vector is None:
                continue
            inner = clip.columns.get("border_width"), clip.columns.get("border_height")
            pixels = picture_pixels(*inner, source.media.width, source.media.height)
            outcome = resolve(clip.clip_id, vector, pixels, self._index, self.threshold)
            clip.decision.duplicate_of = outcome.duplicate_of
            clip.decision.similarity = outcome.similarity
            source.demotions += [
                Demotion(old.clip_id, clip.clip_id, old.similarity) for old in outcome.replaces
            ]

    def close(self) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None
