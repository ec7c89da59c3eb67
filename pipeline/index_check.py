"""The derived indexes of a lake: made anew, and compared with what they are derived from."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from winnow.operators.errors import ConfigError
from winnow.pipeline.index import (
    IndexType,
    MilvusIndex,
    WordIndex,
    default_index_uri,
    plain_words,
)
from winnow.pipeline.kept_index import KeptClips, OpenKeptIndex
from winnow.pipeline.lake import Lake
from winnow.pipeline.refilter import latest_config
from winnow.pipeline.run_lock import hold_lake
from winnow.pipeline.search_index import HERE, IndexPlace, SearchIndex, search_indexes
from winnow.pipeline.views import connect

SAMPLE = 200
"""Clips whose vectors or words are compared."""
CLOSE = 1e-5


@dataclass(frozen=True, slots=True)
class Built:
    """An index that was made anew."""

    index: str
    clips: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.index}: {self.clips} clips, {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class Checked:
    """An index beside the lake."""

    index: str
    clips: int
    """What it should hold."""
    missing: int = 0
    extra: int = 0
    differing: int = 0
    """Of `sampled` clips, those with another vector or other words than the lake's."""
    sampled: int = 0
    made: bool = True
    """False for an index of search that nobody has searched in yet."""

    @property
    def agrees(self) -> bool:
        return not self.made or not (self.missing or self.extra or self.differing)

    def __str__(self) -> str:
        if not self.made:
            return f"{self.index}: not made yet; the first search makes it, of {self.clips} clips"
        if self.agrees:
            return f"{self.index}: {self.clips} clips, agrees ({self.sampled} compared)"
        return (
            f"{self.index}: {self.missing} of {self.clips} clips missing, {self.extra} too many, "
            f"{self.differing} of {self.sampled} compared differ; `winnow index rebuild` mends it"
        )


def rebuild_indexes(
    lake: Lake,
    place: IndexPlace = HERE,
    *,
    wait: bool = False,
    told: Callable[[str], None] = lambda line: None,
) -> list[Built]:
    """Drop the indexes of dedup and search and make them from the lake.

    The lake is held meanwhile: a Milvus server, unlike a file, would let a run search in an index that
    is half made. Raises LakeBusy, IndexUnavailable.
    """
    lake.require()
    with hold_lake(lake, "winnow index rebuild", wait=wait, told=told):
        return _rebuild(lake, place)


def _rebuild(lake: Lake, place: IndexPlace) -> list[Built]:
    built = []
    kept = kept_index(lake, place)
    if kept is not None:
        started = time.perf_counter()
        index = kept.bare()
        try:
            index.clear()
            kept.reconcile(index)
            built.append(_built(_said(kept), index.entries, started))
        finally:
            index.close()
    for searched in search_indexes(lake, place):
        started = time.perf_counter()
        built.append(_built(searched.said, searched.rebuild(), started))
    return built


def _built(name: str, clips: int, started: float) -> Built:
    return Built(name, clips, round(time.perf_counter() - started, 3))


def check_indexes(lake: Lake, place: IndexPlace = HERE) -> list[Checked]:
    """Compare the indexes of dedup and search with the lake. Raises IndexUnavailable.

    An index of search that is behind the lake differs from it too, though the next search mends it.
    """
    lake.require()
    checked = []
    kept = kept_index(lake, place)
    if kept is not None:
        ids = kept.kept.ids()
        sampled = set(_sample(ids))
        sample = {
            e.clip_id: e.vector for es in kept.kept.entries() for e in es if e.clip_id in sampled
        }
        index = kept.bare()
        try:
            counted = _compared(index, ids, sample)
            checked.append(Checked(_said(kept), len(ids), *counted, len(sample)))
        finally:
            index.close()
    return checked + [_check_search(searched) for searched in search_indexes(lake, place)]


def _check_search(searched: SearchIndex) -> Checked:
    wanted = searched.digests()
    index = searched.bare()
    try:
        if not index.present:
            return Checked(searched.said, len(wanted), made=False)
        content = searched.content(_sample(wanted))
        counted = _compared(index, wanted, content)
        return Checked(searched.said, len(wanted), *counted, len(content))
    finally:
        index.close()


def _compared(
    index: MilvusIndex, wanted: Collection[str], sample: Mapping[str, Any]
) -> tuple[int, int, int]:
    """Numbers of clips missing, too many, and of the sample with another content."""
    held = index.contents().keys()
    stored = index.stored(sorted(held & sample.keys()))
    differing = sum(not _same(index, sample[c], value) for c, value in stored.items())
    return len(set(wanted) - held), len(held - set(wanted)), differing


def _same(index: MilvusIndex, wanted: Any, stored: Any) -> bool:
    if isinstance(index, WordIndex):
        return bool(plain_words(wanted) == stored)
    a, b = np.asarray(wanted, np.float32), np.asarray(stored, np.float32)
    return a.shape == b.shape and bool(np.allclose(a, b, atol=CLOSE))


def _sample(clip_ids: Collection[str]) -> list[str]:
    """The same clips each time, for the same lake."""
    return random.Random(0).sample(sorted(clip_ids), min(SAMPLE, len(clip_ids)))


def kept_index(lake: Lake, place: IndexPlace = HERE) -> OpenKeptIndex | None:
    """The index of dedup of the lake's latest run; None where it has none, or had it in memory."""
    try:
        dedup = latest_config(lake).stage("dedup")
    except ConfigError:  # no run has finished yet
        return None
    if dedup is None or dedup.index.kind == "memory":
        return None
    with connect(lake) as connection:
        (policy,) = connection.execute("SELECT arg_max(policy, started_at) FROM runs").fetchall()[0]
    uri = place.uri or dedup.index.uri or default_index_uri(lake)
    # milvus-lite is always exact, whatever the run's server was told.
    index_type: IndexType = dedup.index.index_type if "://" in uri else "FLAT"
    kept = KeptClips(lake, dedup.embedding, policy)
    return OpenKeptIndex(kept, uri, place.token, index_type)


def _said(kept: OpenKeptIndex) -> str:
    return f"dedup by {kept.kept.embedding} under policy {kept.kept.policy}"
