"""Dedup decided anew from stored embeddings: the online rule of stages/dedup.py, in blocks.

The clips come in the order of ingestion. A block of them is compared with the clips kept so far by
matrix products, and the rule itself is asked only of clips that have a near neighbour. This is exact,
and quadratic in the clips that stay: 200,000 clips of 256 floats take minutes. In a larger lake only
what may have changed is decided anew, see `affected`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from winnow.stages.dedup import SLACK, Entry, Neighbour, cosine, resolve

BLOCK = 1024
KEPT_BLOCK = 8192


@dataclass
class Duplicates:
    """By clip, in the order given: the place of the clip that stays, -1 where it is none."""

    of: NDArray[np.int64]
    similarity: NDArray[np.float64]

    @classmethod
    def none(cls, clips: int) -> Duplicates:
        return cls(np.full(clips, -1, np.int64), np.full(clips, np.nan))


def replay(
    ids: Sequence[str],
    vectors: NDArray[np.float32],
    pixels: NDArray[np.int64],
    failed: NDArray[np.bool_],
    threshold: float,
) -> Duplicates:
    """Apply the online rule to clips in the order of ingestion.

    `vectors` has a row of length 1 for each clip. A clip of which a stage `failed` replaces nothing
    by name, as in a run: its better copy could not be made.
    """
    found = Duplicates.none(len(vectors))
    index = _BlockIndex(ids, vectors, pixels)
    for start in range(0, len(vectors), BLOCK):
        end = min(start + BLOCK, len(vectors))
        index.near = _near(vectors, start, end, np.flatnonzero(index.kept[:start]), threshold)
        index.kept[start:end] = True
        # A clip is in the index only when its turn has come.
        waiting = sorted(index.near)
        index.kept[waiting] = False
        for place in waiting:
            index.current = place
            outcome = resolve(ids[place], vectors[place], int(pixels[place]), index, threshold)
            if outcome.duplicate_of is not None and outcome.similarity is not None:
                found.of[place] = index.places[outcome.duplicate_of]
                found.similarity[place] = outcome.similarity
            for old in outcome.replaces if not failed[place] else ():
                found.of[index.places[old.clip_id]] = place
                found.similarity[index.places[old.clip_id]] = old.similarity
    return found


@dataclass
class _BlockIndex:
    """The kept clips, as `resolve` sees them: near ones of a clip are known before it is asked."""

    ids: Sequence[str]
    vectors: NDArray[np.float32]
    pixels: NDArray[np.int64]
    near: dict[int, list[NDArray[np.int64]]] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    current: int = 0

    def __post_init__(self) -> None:
        self.kept = np.zeros(len(self.vectors), np.bool_)

    def search(self, vector: NDArray[np.float32], threshold: float) -> list[Neighbour]:
        places = np.concatenate(self.near[self.current])
        places = places[self.kept[places] & (places < self.current)]
        found = []
        for place in places.tolist():
            similarity = cosine(vector, self.vectors[place])
            if similarity >= threshold:
                self.places[self.ids[place]] = place
                found.append(Neighbour(self.ids[place], similarity, int(self.pixels[place]), place))
        return found

    def add(self, entry: Entry) -> None:
        self.kept[self.current] = True

    def remove(self, clip_ids: Sequence[str]) -> None:
        self.kept[[self.places[clip_id] for clip_id in clip_ids]] = False

    def next_age(self) -> int:
        return self.current

    def close(self) -> None:
        self.near.clear()


def _near(
    vectors: NDArray[np.float32],
    start: int,
    end: int,
    kept: NDArray[np.int64],
    threshold: float,
) -> dict[int, list[NDArray[np.int64]]]:
    """By clip of a block that has any: near clips among the kept ones, and before it in the block."""
    block = vectors[start:end]
    near: dict[int, list[NDArray[np.int64]]] = {}
    for first in range(0, len(kept), KEPT_BLOCK):
        others = kept[first : first + KEPT_BLOCK]
        _gather(near, block @ vectors[others].T >= threshold - SLACK, start, others)
    within = np.tril(block @ block.T >= threshold - SLACK, -1)
    _gather(near, within, start, np.arange(start, end))
    return near


def _gather(
    near: dict[int, list[NDArray[np.int64]]],
    hits: NDArray[np.bool_],
    start: int,
    others: NDArray[np.int64],
) -> None:
    for row in np.flatnonzero(hits.any(axis=1)).tolist():
        near.setdefault(start + row, []).append(others[hits[row]])


def affected(
    vectors: NDArray[np.float32], seeds: NDArray[np.int64], threshold: float
) -> NDArray[np.int64]:
    """The clips whose dedup may come out otherwise because that of the `seeds` may.

    All that a chain of near neighbours links to a seed; places in ascending order.
    """
    reached = np.zeros(len(vectors), np.bool_)
    reached[seeds] = True
    frontier = np.flatnonzero(reached)
    while len(frontier):
        before = reached.copy()
        for start in range(0, len(frontier), BLOCK):
            block = vectors[frontier[start : start + BLOCK]]
            for first in range(0, len(vectors), KEPT_BLOCK):
                others = vectors[first : first + KEPT_BLOCK]
                hits = (block @ others.T >= threshold - SLACK).any(axis=0)
                reached[first : first + KEPT_BLOCK] |= hits
        frontier = np.flatnonzero(reached & ~before)
    return np.flatnonzero(reached)
