"""The index of dedup gives the exact answer at once, whenever the server shows what it was given."""

import numpy as np
import pytest

from tests.pipeline.lakes import config, facts
from tests.pipeline.test_index import kept, opener, server
from winnow.pipeline import index as index_module
from winnow.pipeline.index import MilvusIndex
from winnow.pipeline.index_check import check_indexes, rebuild_indexes
from winnow.pipeline.kept_index import LoadKeptIndex, ages
from winnow.pipeline.lake import Lake
from winnow.pipeline.run import run
from winnow.stages.dedup import Entry, ExactIndex

__all__ = ["server"]

SIZE = 32


class Late:
    """A client of Milvus whose writes come to light only when a search waits for them."""

    def __init__(self, client):
        self._client, self._waiting = client, []
        self.waited = 0

    def __getattr__(self, name):
        return getattr(self._client, name)

    def upsert(self, *args, **named):
        self._waiting.append((self._client.upsert, args, named))

    def delete(self, *args, **named):
        self._waiting.append((self._client.delete, args, named))

    def search(self, *args, consistency_level, **named):
        if consistency_level == "Strong":
            self.waited += 1
            for write, given, more in self._waiting:
                write(*given, **more)
            self._waiting.clear()
        return self._client.search(*args, consistency_level=consistency_level, **named)


@pytest.fixture
def opened(tmp_path):
    index = MilvusIndex(str(tmp_path / "m.db"), "kept")
    index.open(SIZE)
    yield index
    index.close()


def near(rng, vector, spread=0.05):
    moved = vector + spread * rng.standard_normal(SIZE)
    return (moved / np.linalg.norm(moved)).astype(np.float32)


def found(index, vector, threshold=0.9):
    return sorted(
        (n.clip_id, n.similarity, n.pixels, n.age) for n in index.search(vector, threshold)
    )


@pytest.mark.parametrize("recent", [1, 7, 1000])
def test_a_late_server_answers_as_the_exact_index_does(opened, monkeypatch, recent):
    monkeypatch.setattr(index_module, "RECENT", recent)
    opened._client = late = Late(opened._client)
    exact, rng = ExactIndex(), np.random.default_rng(2)
    centres = [near(rng, np.zeros(SIZE)) for _ in range(5)]
    there = []
    answers = 0
    for step in range(150):
        vector = near(rng, centres[rng.integers(5)])
        if there and rng.random() < 0.3:
            gone = there.pop(rng.integers(len(there)))
            for index in (opened, exact):
                index.remove([gone])
        else:
            # Now and then a clip that was there before, with another vector.
            name = f"c{step if rng.random() < 0.8 else rng.integers(step + 1)}"
            entry = Entry(name, vector, int(rng.integers(9)), step)
            there = [*(other for other in there if other != name), name]
            for index in (opened, exact):
                index.add(entry)
        asked = near(rng, centres[rng.integers(5)])
        assert found(opened, asked) == found(exact, asked)
        answers += len(found(exact, asked))
    assert answers > 300
    assert late.waited <= 150 // recent + 1


def test_all_neighbours_are_found_however_many(opened):
    rng = np.random.default_rng(4)
    centre = near(rng, np.zeros(SIZE))
    entries = [Entry(f"c{n:03}", near(rng, centre, 0.01), 9, n) for n in range(700)]
    opened.add_all(entries)
    assert [clip_id for clip_id, *_ in found(opened, centre)] == [e.clip_id for e in entries]


def test_many_clips_leave_the_memtable_of_milvus_lite(opened, monkeypatch):
    monkeypatch.setattr(index_module, "RECENT", 10)
    flushed = []
    monkeypatch.setattr(opened._client, "flush", flushed.append)
    rng = np.random.default_rng(5)
    for n in range(25):
        opened.add(Entry(f"c{n}", near(rng, np.zeros(SIZE)), 9, n))
    assert len(flushed) == 2


def test_an_index_of_another_type_is_indexed_anew(server):
    rng = np.random.default_rng(6)
    centre = near(rng, np.zeros(SIZE))
    flat = MilvusIndex(server, "typed")
    flat.open(SIZE)
    flat.add_all([Entry(f"c{n}", near(rng, centre, 0.02), 9, n) for n in range(40)])
    flat.close()
    for index_type in ("HNSW", "HNSW", "FLAT"):
        index = MilvusIndex(server, "typed", index_type=index_type)
        index.open()
        index.use_index_type()
        described = index._client.describe_index("typed", "vector")
        assert described["index_type"] == index_type
        assert len(found(index, centre)) == index.entries == 40
        index.close()


def test_ages_change_only_where_the_order_wants_it():
    assert ages(["a", "b", "c"], {}) == {"a": 0, "b": 1, "c": 2}
    assert ages(["a", "c", "d"], {"a": 0, "b": 1, "c": 2}) == {"a": 0, "c": 2, "d": 3}
    assert ages(["a", "x", "b", "c"], {"a": 0, "b": 1, "c": 5}) == {"a": 0, "x": 1, "b": 2, "c": 5}
    assert ages(["b", "a"], {"a": 0, "b": 1}) == {"b": 1, "a": 2}


def test_an_index_in_memory_decides_as_milvus_does_and_leaves_nothing(videos, lake, tmp_path):
    other = Lake(str(tmp_path / "lake"))
    in_memory = config("stages.dedup.index.kind=memory")
    run(in_memory, str(videos), other, limit=4)
    run(in_memory, str(videos), other)
    assert facts(other)["verdicts"] == facts(lake)["verdicts"]
    loaded = LoadKeptIndex(opener(other).kept)()
    assert loaded.entries == len(kept(other)) > 0
    # There is no index of dedup to check or to rebuild.
    assert [one.index for one in check_indexes(other) if one.index.startswith("dedup")] == []
    assert not any(one.index.startswith("dedup") for one in rebuild_indexes(other))
