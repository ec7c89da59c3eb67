"""Refilter by columns says what the rules say clip by clip, and dedup in blocks what it says alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from bench.lake import build, score_columns, strict
from tests.pipeline.lakes import rows
from winnow.operators.errors import LakeError
from winnow.operators.operator import Column
from winnow.pipeline import decide as deciding
from winnow.pipeline import replay as replaying
from winnow.pipeline.lake import Lake
from winnow.pipeline.policy import Evaluator, Policy, Rule, load_policy
from winnow.pipeline.refilter import refilter
from winnow.pipeline.replay import affected, replay
from winnow.stages.dedup import ExactIndex, resolve

CLIPS = 1500


@pytest.fixture
def drawn(tmp_path) -> Lake:
    return build(str(tmp_path / "lake"), CLIPS, dimensions=16)


def test_the_verdicts_are_those_of_the_predicates_clip_by_clip(drawn):
    policy = strict()
    refilter(drawn, policy)
    names = score_columns()
    evaluator = Evaluator(
        policy.model_copy(update={"rules": tuple(r for r in policy.rules if not r.percentile)}),
        [Column(name, pa.float64(), "") for name in names],
    )
    found = rows(drawn, f"SELECT verdict, reasons, {', '.join(names)} FROM clips_decided")
    clips = [dict(zip(names, row[2:], strict=True)) for row in found]
    for row, (rejecting, undecided) in zip(found, evaluator.rejects(clips), strict=True):
        verdict, reasons = row[0], row[1]
        ranked = "poor" in reasons
        plain = [reason for reason in reasons if reason not in ("poor", "duplicate")]
        if rejecting or (verdict == "reject" and ranked):
            assert (verdict, plain) == ("reject", rejecting)
        elif undecided or ranked:
            assert (verdict, plain) == ("error", undecided)
        else:
            assert verdict in ("keep", "duplicate")
    kinds = {row[0] for row in found}
    assert kinds == {"keep", "reject", "error", "duplicate"}


def test_more_rules_than_fit_a_number_are_told_apart(drawn):
    names = [f"score_{n}" for n in range(17)]
    rules = tuple(
        Rule(name=f"{name}_{n}", reject=f"{name} < {0.01 * (n + 1)}")
        for name in names
        for n in range(4)
    )
    refilter(drawn, Policy(name="many", rules=rules))
    found = rows(
        drawn, f"SELECT reasons, {', '.join(names)} FROM clips_decided WHERE verdict = 'reject'"
    )
    assert found
    for reasons, *scores in found:
        wanted = [
            f"{name}_{n}"
            for name, score in zip(names, scores, strict=True)
            for n in range(4)
            if score is not None and score < 0.01 * (n + 1)
        ]
        assert reasons == wanted


def alone(ids, vectors, pixels, failed, threshold):
    """The online rule, one clip after the other, with the exact index."""
    index, of, similarity = ExactIndex(), {}, {}
    for n, clip_id in enumerate(ids):
        outcome = resolve(clip_id, vectors[n], int(pixels[n]), index, threshold)
        if outcome.duplicate_of is not None:
            of[clip_id], similarity[clip_id] = outcome.duplicate_of, outcome.similarity
        for old in outcome.replaces if not failed[n] else ():
            of[old.clip_id], similarity[old.clip_id] = clip_id, old.similarity
    return of, similarity


def crowd(seed: int, clips: int = 300):
    """Vectors in a few clumps, so that there are chains, replacements and ties."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clips // 6, 12))
    vectors = centres[rng.integers(0, len(centres), clips)] + 0.25 * rng.standard_normal(
        (clips, 12)
    )
    vectors[::7] = vectors[3]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    ids = [f"{n * 7919 % 100003:06d}" for n in range(clips)]
    return ids, vectors, rng.integers(1, 4, clips), rng.random(clips) < 0.05


@pytest.mark.parametrize("block", [1, 7, 64, 1024])
@pytest.mark.parametrize("seed", range(4))
def test_dedup_in_blocks_is_dedup_one_by_one(seed, block, monkeypatch):
    monkeypatch.setattr(replaying, "BLOCK", block)
    monkeypatch.setattr(replaying, "KEPT_BLOCK", 3 * block)
    ids, vectors, pixels, failed = crowd(seed)
    found = replay(ids, vectors, pixels, failed, 0.9)
    of, similarity = alone(ids, vectors, pixels, failed, 0.9)
    assert {ids[n]: ids[found.of[n]] for n in np.flatnonzero(found.of >= 0)} == of
    for n in np.flatnonzero(found.of >= 0):
        assert found.similarity[n] == pytest.approx(similarity[ids[n]], abs=2e-6)


def test_what_a_change_reaches_is_all_that_neighbours_link_to_it():
    _, vectors, *_ = crowd(1)
    near = vectors @ vectors.T >= 0.9
    reached = {5}
    while True:
        grown = set(np.flatnonzero(near[sorted(reached)].any(axis=0)).tolist())
        if grown == reached:
            break
        reached = grown
    assert affected(vectors, np.array([5]), 0.9).tolist() == sorted(reached)


def facts(lake: Lake, policy: str):
    return rows(lake, "SELECT clip_id, verdict, reasons, duplicate_of, round(similarity, 4) "
                      f"FROM verdicts WHERE policy = '{policy}' ORDER BY 1")  # fmt: skip


def test_a_large_lake_looks_again_only_where_something_changed(drawn, monkeypatch):
    refilter(drawn, load_policy("generated"))
    policies = [strict(), Policy(name="all", rules=(Rule(name="r", reject="false"),)), strict()]
    for policy in policies:
        exact = refilter(drawn, policy)
        before = facts(drawn, policy.name)
        assert exact.counts["duplicate"] > 0
        # Forget that decision, and make it again from that of another policy.
        drawn.open("verdicts").delete(f"policy = '{policy.name}'")
        monkeypatch.setattr(deciding, "EXACT_CLIPS", 10)
        assert refilter(drawn, policy).counts == exact.counts
        assert facts(drawn, policy.name) == before
        monkeypatch.undo()


def test_a_large_lake_that_nobody_has_decided_is_decided_exactly(drawn, monkeypatch):
    monkeypatch.setattr(deciding, "EXACT_CLIPS", 10)
    assert refilter(drawn, load_policy("generated")).counts["duplicate"] > 0


def test_embeddings_of_unlike_length_are_refused(drawn):
    (clip, attempt, model) = rows(drawn, "SELECT clip_id, attempt_id, model FROM embeddings "
                                         "JOIN clips USING (clip_id, attempt_id) LIMIT 1")[0]  # fmt: skip
    drawn.append("embeddings", [
        {"clip_id": clip, "attempt_id": attempt, "model": model, "vector": [1.0]}
    ])  # fmt: skip
    with pytest.raises(LakeError, match="differ in length"):
        refilter(drawn, Policy(name="all", rules=(Rule(name="r", reject="false"),)))


def test_an_attempt_that_never_committed_is_not_decided(drawn):
    (row,) = rows(drawn, "SELECT clip_id, source_id FROM clips LIMIT 1")
    drawn.append("clips", [{"clip_id": "x", "source_id": row[1], "attempt_id": "never"}])
    drawn.append("verdicts", [
        {"clip_id": row[0], "attempt_id": "never", "policy": "p", "verdict": "reject", "seq": 9}
    ])  # fmt: skip
    result = refilter(drawn, Policy(name="p", rules=(Rule(name="r", reject="verdict = 'reject'"),)))
    assert result.clips == CLIPS
    assert result.counts == {"error": CLIPS}


def test_a_source_that_was_done_again_counts_once(drawn):
    (row,) = rows(drawn, "SELECT uri, source_id, width, height, clip_id FROM sources "
                         "JOIN clips USING (attempt_id, source_id) LIMIT 1")  # fmt: skip
    drawn.append("clips", [{"clip_id": row[4], "source_id": row[1], "attempt_id": "again"}])
    drawn.append("sources", [
        {"uri": row[0], "source_id": row[1], "attempt_id": "again", "status": "done", "seq": 10**9,
         "width": row[2], "height": row[3]}
    ])  # fmt: skip
    result = refilter(drawn, Policy(name="all", rules=(Rule(name="r", reject="false"),)))
    assert result.clips == CLIPS
    attempt = rows(drawn, f"SELECT attempt_id FROM raw_verdicts WHERE clip_id = '{row[4]}'")
    assert attempt == [("again",)]
