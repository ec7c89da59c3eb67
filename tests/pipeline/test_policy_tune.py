"""A policy against labels, and the thresholds that these ask for."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import typer.testing

from bench.lake import build
from tests.pipeline.lakes import rows
from winnow.operators.errors import ConfigError
from winnow.pipeline.policy import Policy, Rule
from winnow.pipeline.policy_commands import policy_app
from winnow.pipeline.policy_tune import _threshold, as_text, read_labels, tune

CLIPS = 400


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return build(str(tmp_path_factory.mktemp("drawn") / "lake"), CLIPS)


@pytest.fixture(scope="module")
def scores(drawn):
    found = rows(drawn, "SELECT clip_id, score_0 FROM clips WHERE score_0 IS NOT NULL ORDER BY 1")
    return dict(found)


def policy(*rejects: str, when: str | None = None) -> Policy:
    return Policy(
        name="p",
        rules=tuple(Rule(name=f"r{n}", reject=r, when=when) for n, r in enumerate(rejects)),
    )


def test_precision_and_recall_are_counted_by_hand(drawn, scores):
    labels = {clip: value > 0.3 for clip, value in scores.items()}
    found = tune(drawn, policy("score_0 < 0.5", "score_0 > 0.9"), labels, 0.9)
    bad = sum(value <= 0.3 for value in scores.values())
    low = sum(value < 0.5 for value in scores.values())
    high = sum(value > 0.9 for value in scores.values())
    assert found.rules["r0"].precision == bad / low
    assert found.rules["r0"].recall == 1
    assert found.rules["r1"].precision == 0
    assert found.whole.precision == bad / (low + high)
    assert found.whole.good_kept == len(scores) - low - high
    assert found.unlabelled == CLIPS - len(scores)


@pytest.mark.parametrize(("reject", "side"), [("score_0 < 0.5", 1), ("0.5 < score_0", -1)])
def test_labels_that_a_threshold_divides_are_divided(drawn, scores, reject, side):
    labels = {clip: side * value > side * 0.3 for clip, value in scores.items()}
    (found,) = tune(drawn, policy(reject), labels, 1.0).thresholds
    values = sorted(scores.values())
    below, above = max(v for v in values if v <= 0.3), min(v for v in values if v > 0.3)
    assert below < found.then < above
    assert (found.scored.precision, found.scored.recall) == (1, 1)
    assert found.labelled == len(scores)


def brute(values, good, side, precision, goal):
    """The best by trying every split."""
    best = None
    for limit in [*(v - 0.5 for v in values), *(v + 0.5 for v in values)]:
        gone = values < limit if side == "<" else values > limit
        chosen = gone if goal == "reject" else ~gone
        right = (~good if goal == "reject" else good)[chosen].sum()
        if chosen.any() and right >= precision * chosen.sum():
            best = max(best or 0, int(chosen.sum()))
    return best


@pytest.mark.parametrize("goal", ["reject", "keep"])
@pytest.mark.parametrize("side", ["<", ">"])
@pytest.mark.parametrize("seed", range(6))
def test_no_other_threshold_rejects_or_keeps_more(goal, side, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 12, 40).astype(float)
    good = rng.random(40) < (values + 2) / 16
    found = _threshold(values, good, side, 0.8, goal)
    best = brute(values, good, side, 0.8, goal)
    if found is None:
        assert best is None
        return
    gone = values < found if side == "<" else values > found
    assert int((gone if goal == "reject" else ~gone).sum()) == best


def test_a_precision_out_of_reach_is_said(drawn, scores):
    found = tune(drawn, policy("score_0 < 0.5"), dict.fromkeys(scores, True), 0.9)
    assert found.thresholds[0].then is None
    assert "no threshold reaches it" in as_text(found)


def test_a_rule_is_tuned_where_it_applies(drawn, scores):
    labels = {clip: value > 0.3 for clip, value in scores.items()}
    held = rows(drawn, "SELECT count(*) FROM clips WHERE score_0 IS NOT NULL AND score_1 > 0.5")
    (found,) = tune(drawn, policy("score_0 < 0.5", when="score_1 > 0.5"), labels, 0.9).thresholds
    assert found.labelled == held[0][0] < len(scores)


def test_terms_of_or_are_tuned_and_other_rules_are_named(drawn, scores):
    made = policy("score_0 < 0.1 OR score_1 >= 0.9", "score_0 < score_1")
    found = tune(drawn, made, dict.fromkeys(scores, False), 0.9)
    assert [(t.column, t.side) for t in found.thresholds] == [("score_0", "<"), ("score_1", ">=")]
    assert found.not_tunable == ["r1"]


def test_a_score_that_is_missing_is_not_judged(drawn):
    null = [c for (c,) in rows(drawn, "SELECT clip_id FROM clips WHERE score_2 IS NULL")]
    some = [c for (c,) in rows(drawn, "SELECT clip_id FROM clips WHERE score_2 > 0.5 LIMIT 5")]
    found = tune(drawn, policy("score_2 < 0.5"), dict.fromkeys([*null, *some], True), 0.9)
    assert (found.rules["r0"].not_judged, found.rules["r0"].good_kept) == (len(null), 5)
    assert math.isclose(found.rules["r0"].keep_precision, 1)


def test_uris_and_unknown_names(drawn, tmp_path):
    (uri,) = rows(drawn, "SELECT uri FROM sources LIMIT 1")[0]
    path = tmp_path / "labels.csv"
    path.write_text(f"uri,label\n{uri},Good\nnosuch.mp4,bad\n\n")
    found = tune(drawn, policy("score_0 < 2"), read_labels(path), 0.9)
    assert (found.good, found.bad, found.unknown) == (1, 0, ["nosuch.mp4"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "clip_id,label"),
        ("name,label\na,good\n", "clip_id,label"),
        ("clip_id,label\na,fine\n", "line 2: the label is 'fine'"),
        ("clip_id,label\na,good\na,bad\n", "both good and bad"),
    ],
)
def test_labels_that_say_nothing_are_refused(tmp_path, text, words):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_labels(path)


def test_the_commands(drawn, scores, tmp_path):
    path, rules = tmp_path / "labels.csv", tmp_path / "p.yaml"
    path.write_text("clip_id,label\n" + "".join(
        f"{clip},{'good' if value > 0.3 else 'bad'}\n" for clip, value in scores.items()))  # fmt: skip
    rules.write_text("name: p\nrules: [{name: low, reject: score_0 < 0.5}]\n")
    call = ["tune", "--lake", drawn.uri, "--labels", str(path), "--policy", str(rules)]
    done = typer.testing.CliRunner().invoke(policy_app, [*call, "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["rules"]["low"]["recall"] == 1
    done = typer.testing.CliRunner().invoke(policy_app, call, catch_exceptions=False)
    assert "95 % bad among what is rejected" in done.stdout
    both = ["diff", str(rules), str(rules), "--lake", drawn.uri, "--json"]
    done = typer.testing.CliRunner().invoke(policy_app, both, catch_exceptions=False)
    assert json.loads(done.stdout)["changed"] == 0
