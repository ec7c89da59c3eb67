import numpy as np
import pytest

from winnow.operators.errors import IndexUnavailable
from winnow.pipeline.index import MilvusIndex
from winnow.pipeline.replay import replay
from winnow.stages.dedup import Entry, ExactIndex, cosine, resolve


def vector(*values: float) -> np.ndarray:
    v = np.array([*values, *([0.0] * (8 - len(values)))], np.float32)
    return v / np.linalg.norm(v)


A, NEAR_A, B = vector(1), vector(1, 0.1), vector(0, 1)


def outcomes(clips, index=None, threshold=0.95):
    index = index or ExactIndex()
    return [resolve(name, v, pixels, index, threshold) for name, v, pixels in clips]


def test_the_older_clip_stays():
    first, second, third = outcomes([("a", A, 100), ("b", B, 100), ("c", NEAR_A, 100)])
    assert (first.duplicate_of, second.duplicate_of) == (None, None)
    assert third.duplicate_of == "a"
    assert third.similarity == pytest.approx(float(A @ NEAR_A), abs=1e-6)


def test_a_clip_of_higher_resolution_replaces_the_older_ones():
    index = ExactIndex()
    small, large, again = outcomes([("a", A, 100), ("b", NEAR_A, 400), ("c", A, 100)], index)
    assert small.duplicate_of is None
    assert large.duplicate_of is None
    assert [n.clip_id for n in large.replaces] == ["a"]
    assert again.duplicate_of == "b"


def test_a_clip_is_no_duplicate_of_itself():
    index = ExactIndex()
    outcomes([("a", A, 100)], index)
    assert resolve("a", A, 100, index, 0.95).duplicate_of is None


def test_ties_go_to_the_older():
    index = ExactIndex()
    index.add(Entry("z", A, 100, 0))
    index.add(Entry("a", A, 100, 1))
    assert resolve("new", A, 100, index, 0.95).duplicate_of == "z"


def test_milvus_decides_as_the_exact_index_does(tmp_path):
    random = np.random.default_rng(3)
    centres = random.normal(size=(12, 64))
    clips = []
    for n in range(80):
        v = centres[random.integers(12)] + random.normal(size=64) * 0.12
        clips.append((f"c{n}", (v / np.linalg.norm(v)).astype(np.float32),
                      int(random.choice([100, 200]))))  # fmt: skip
    milvus = MilvusIndex(str(tmp_path / "m.db"), "kept")
    milvus.open()
    try:
        exact = outcomes(clips, threshold=0.975)
        served = outcomes(clips, milvus, threshold=0.975)
    finally:
        milvus.close()
    assert any(o.replaces for o in exact)
    assert [(o.duplicate_of, [n.clip_id for n in o.replaces]) for o in exact] == [
        (o.duplicate_of, [n.clip_id for n in o.replaces]) for o in served
    ]


def test_every_index_states_the_same_similarity(tmp_path):
    """Each searches with its own arithmetic: a verdict must not depend on which one it was."""
    rng = np.random.default_rng(11)
    base = rng.standard_normal(256).astype(np.float32)
    near = base + 0.2 * rng.standard_normal((40, 256)).astype(np.float32)
    vectors = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)
    exact, milvus = ExactIndex(), MilvusIndex(str(tmp_path / "index.db"), "kept")
    milvus.open()
    entries = [Entry(f"{n:02d}", v, 100, n) for n, v in enumerate(vectors[1:])]
    milvus.add_all(entries)
    for entry in entries:
        exact.add(entry)
    threshold = float(np.median(vectors[1:] @ vectors[0]))
    found = [
        sorted((n.clip_id, n.similarity) for n in index.search(vectors[0], threshold))
        for index in (exact, milvus)
    ]
    assert found[0] == found[1]
    assert 10 < len(found[0]) < 30
    replayed = replay(
        [f"{n:02d}" for n in range(2)], vectors[:2], np.full(2, 9), np.zeros(2, bool), 0.5
    )
    assert replayed.similarity[1] == cosine(vectors[1], vectors[0])
    milvus.close()


def test_a_server_that_is_not_there_is_named():
    index = MilvusIndex("http://127.0.0.1:9", "kept")
    with pytest.raises(IndexUnavailable, match=r"127\.0\.0\.1:9"):
        index.open()
