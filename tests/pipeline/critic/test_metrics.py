"""Every figure against scipy, scikit-learn or arithmetic by hand; the silent examples; the resampling."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    cohen_kappa_score,
    confusion_matrix,
    mean_absolute_error,
    precision_recall_fscore_support,
    roc_auc_score,
)

from winnow.operators.critic.judgement import Judgement
from winnow.pipeline.critic.bootstrap import COMPARED, compare, holm, intervals, weighted
from winnow.pipeline.critic.metrics import (
    SCALARS,
    Judged,
    Metrics,
    as_table,
    baselines,
    by,
    constant,
    measure,
    value,
)


def scored(scores: Sequence[int | None]) -> Judged:
    """A judge who is sure of each score; None: silent."""
    one_hot = np.full((len(scores), 5), np.nan)
    for row, score in enumerate(scores):
        if score is not None:
            one_hot[row] = np.arange(1, 6) == score
    expectation = np.array([np.nan if score is None else float(score) for score in scores])
    return Judged(expectation, np.array([score or 0 for score in scores], dtype=int), one_hot)


def of_chances(probabilities: np.ndarray, silent: np.ndarray | None = None) -> Judged:
    probabilities = np.array(probabilities, dtype=float)
    expectation = probabilities @ np.arange(1, 6)
    argmax = probabilities.argmax(axis=1) + 1
    if silent is not None:
        probabilities[silent] = np.nan
        expectation[silent] = np.nan
        argmax[silent] = 0
    return Judged(expectation, argmax, probabilities)


def random_case(seed: int, n: int, kind: str) -> tuple[np.ndarray, Judged]:
    """Truth and judgements of one of the kinds that real results come in."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(1, 6, n).astype(float)
    chances = rng.dirichlet(np.full(5, 0.7), n)
    if kind == "votes":  # of four samples: many ties
        chances = rng.multinomial(4, np.full(5, 0.2), size=n) / 4
    if kind == "constant":
        chances = np.tile(chances[:1], (n, 1))
    if kind == "one class":
        truth[:] = truth[:1]
    if kind == "means of raters":
        truth = rng.integers(2, 11, n) / 2
    silent = rng.random(n) < 0.3 if kind == "missing" else None
    return truth, of_chances(chances, silent)


KINDS = ("smooth", "votes", "constant", "one class", "means of raters", "missing")


def reference(truth: np.ndarray, judged: Judged) -> dict[str, float | None]:
    """The figures from scipy and scikit-learn, straight from their definitions; None: undefined."""
    nearest = np.floor(truth + 0.5).astype(int)
    has, weighed = judged.argmax > 0, ~np.isnan(judged.probabilities[:, 0])
    t, e, a = truth[has], judged.expectation[has], judged.argmax[has]
    p, near = judged.probabilities, nearest[has]
    found: dict[str, float | None] = dict.fromkeys(SCALARS)
    found["coverage"] = has.mean()
    # A silent example predicts a score that no truth has.
    found["accuracy"] = float(np.mean(judged.argmax == nearest))
    found["within_one"] = float(np.mean(np.abs(np.where(has, judged.argmax, 99) - nearest) <= 1))
    for name, truth_in, said_in in (
        ("bad", nearest <= 2, has & (judged.argmax <= 2)),
        ("good", nearest >= 4, judged.argmax >= 4),
    ):
        precision, recall, f1, _ = precision_recall_fscore_support(
            truth_in, said_in, average="binary", zero_division=np.nan
        )
        found[f"{name}.precision"], found[f"{name}.recall"], found[f"{name}.f1"] = (
            precision,
            recall,
            f1,
        )
    if len(t):
        found["accuracy_of_judged"] = float(np.mean(a == near))
        found["within_one_of_judged"] = float(np.mean(np.abs(a - near) <= 1))
        found["mae"], found["mae_argmax"] = mean_absolute_error(t, e), mean_absolute_error(t, a)
        found["bias"] = float(np.mean(e - t))
    if len(t) > 1:
        # Constant: scipy warns, and gives NaN.
        for name, x in (("", e), ("_argmax", a)):
            if np.ptp(x) > 1e-9 and np.ptp(t) > 0:
                found[f"pearson{name}"] = pearsonr(x, t).statistic
                found[f"spearman{name}"] = spearmanr(np.round(x, 12), t).statistic
        if not (np.ptp(near) == 0 and np.array_equal(near, a)):
            found["kappa"] = cohen_kappa_score(near, a, labels=[1, 2, 3, 4, 5], weights="quadratic")
    for name, positive, ranking in (
        ("bad", near <= 2, -np.round(e, 12)),
        ("good", near >= 4, np.round(e, 12)),
    ):
        if len(set(positive)) == 2:
            found[f"{name}.auroc"] = roc_auc_score(positive, ranking)
            found[f"{name}.average_precision"] = average_precision_score(positive, ranking)
    if weighed.any():
        q, y = p[weighed], nearest[weighed]
        cumulative = np.clip(q.cumsum(axis=1), 0, 1)
        found["rps"] = np.mean(
            [brier_score_loss(y <= k, cumulative[:, k - 1], pos_label=True) for k in (1, 2, 3, 4)]
        )
        good = np.clip(q[:, 3] + q[:, 4], 0, 1)
        found["brier_good"] = brier_score_loss(y >= 4, good, pos_label=True)
        found["brier_bad"] = brier_score_loss(
            y <= 2, np.clip(q[:, 0] + q[:, 1], 0, 1), pos_label=True
        )
        found["ece_good"] = calibration_error(y >= 4, good)
        likeliest = judged.argmax[weighed]
        sure = np.clip(q[np.arange(len(q)), likeliest - 1], 0, 1)
        found["ece_argmax"] = calibration_error(y == likeliest, sure)
    return {name: None if v is None or math.isnan(v) else float(v) for name, v in found.items()}


def calibration_error(was_true: np.ndarray, probability: np.ndarray) -> float:
    probability = np.round(probability, 12)
    observed, predicted = calibration_curve(was_true, probability, n_bins=10, pos_label=True)
    edges = np.round(np.linspace(0, 1, 11), 12)
    place = np.searchsorted(edges[1:-1], probability)
    counts = np.bincount(place, minlength=10)
    return float(np.sum(counts[counts > 0] * np.abs(observed - predicted)) / len(probability))


def agree(found: float | None, expected: float | None, what: str) -> None:
    if expected is None or found is None:
        assert found is expected, what
    else:
        assert found == pytest.approx(expected, abs=1e-9), what


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.sampled_from(KINDS))
def test_every_figure_equals_its_reference(seed, n, kind):
    truth, judged = random_case(seed, n, kind)
    expected = reference(truth, judged)
    metrics = measure(truth, judged)
    for name in SCALARS:
        agree(value(metrics, name), expected[name], f"{name} of {kind}")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from(KINDS))
def test_weights_count_an_example_as_often_as_they_say(seed, n, kind):
    """The vectorised forms against `measure` of the examples written out."""
    truth, judged = random_case(seed, n, kind)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=4)
    weights[3] = 0
    found = weighted(truth, judged, weights)
    for resample, counts in enumerate(weights):
        rows = np.repeat(np.arange(n), counts)
        expected = measure(truth[rows], judged.only(rows))
        for name in SCALARS:
            number = found[name][resample]
            agree(None if np.isnan(number) else number, value(expected, name), f"{name} of {kind}")


def test_by_hand():
    metrics = measure([1, 2, 3, 4, 5], scored([1, 1, 4, 4, 2]))
    assert metrics.accuracy == 2 / 5
    assert metrics.within_one == 4 / 5
    assert metrics.mae == metrics.mae_argmax == pytest.approx((0 + 1 + 1 + 0 + 3) / 5)
    assert metrics.bias == pytest.approx((0 - 1 + 1 + 0 - 3) / 5)
    assert metrics.confusion == (
        (1, 0, 0, 0, 0, 0),
        (1, 0, 0, 0, 0, 0),
        (0, 0, 0, 1, 0, 0),
        (0, 0, 0, 1, 0, 0),
        (0, 1, 0, 0, 0, 0),
    )
    assert (metrics.bad.tp, metrics.bad.fp, metrics.bad.fn, metrics.bad.tn) == (2, 1, 0, 2)
    assert (metrics.good.tp, metrics.good.fp, metrics.good.fn, metrics.good.tn) == (1, 1, 1, 2)
    assert metrics.bad.precision == 2 / 3
    assert metrics.bad.recall == 1
    assert metrics.bad.f1 == pytest.approx(0.8)
    # Of the six pairs of a bad and another, by expectation: 1 < 4, 4, 2 twice.
    assert metrics.bad.auroc == 1
    # Of good (4, 2) and others (1, 1, 4): 4>1, 4>1, 4=4, 2>1, 2>1, 2<4.
    assert metrics.good.auroc == pytest.approx(4.5 / 6)
    # Sure of a score k off: k of the four cuts are wrong.
    assert metrics.rps == pytest.approx((0 + 1 + 1 + 0 + 3) / 4 / 5)
    assert metrics.predicted_counts == (2, 1, 0, 2, 0, 0)


def test_reliability_by_hand():
    chances = [[0, 0, 0.7, 0.1, 0.2], [0, 0.2, 0.5, 0.3, 0], [0.7, 0, 0.3, 0, 0]]
    metrics = measure([5, 3, 1], of_chances(np.array(chances)))
    full = {one.high: one for one in metrics.reliability_good if one.n}
    # 0.1 + 0.2, a bit more than 0.3 in floats, and 0.3 meet on the edge of (0.2, 0.3].
    counted = [(edge, one.n, one.observed) for edge, one in full.items()]
    assert counted == [(0.1, 1, 0), (0.3, 2, 0.5)]
    assert metrics.ece_good == pytest.approx((1 * 0 + 2 * 0.2) / 3)
    # (0.4, 0.5]: 0.5 and right; (0.6, 0.7]: 0.7 twice, right once.
    assert metrics.ece_argmax == pytest.approx((1 * 0.5 + 2 * 0.2) / 3)
    assert sum(one.n for one in metrics.reliability_argmax) == 3


def test_the_nearest_score_of_a_truth_between_scores():
    metrics = measure([2.5, 3.5, 1.4], scored([3, 4, 1]))
    assert metrics.accuracy == 1
    assert metrics.mae == pytest.approx((0.5 + 0.5 + 0.4) / 3)
    assert metrics.truth_counts == (1, 0, 1, 1, 0)


class TestFaultD:
    """Fault d of the published scripts: unparsed answers dropped from the accuracy."""

    def test_silence_is_a_miss(self):
        truth = [4, 4, 2, 5, 1, 3]
        answers: list[int | None] = [4, None, None, 5, None, 2]
        metrics = measure(truth, scored(answers))
        published = np.mean([a == t for a, t in zip(answers, truth, strict=True) if a is not None])
        assert published == 2 / 3
        assert metrics.accuracy == 2 / 6
        assert metrics.accuracy_of_judged == published
        assert metrics.within_one == 3 / 6
        assert metrics.within_one_of_judged == 1
        assert (metrics.n, metrics.judged, metrics.coverage) == (6, 3, 0.5)
        assert metrics.bad.recall == 0
        assert metrics.good.recall == 2 / 3
        assert [row[5] for row in metrics.confusion] == [1, 1, 0, 1, 0]
        assert metrics.predicted_counts == (0, 1, 0, 1, 1, 3)

    def test_more_silence_never_raises_what_counts_all(self):
        truth, judged = random_case(5, 200, "smooth")
        before = measure(truth, judged)
        right = judged.argmax == truth
        answers = [int(a) if ok else None for a, ok in zip(judged.argmax, right, strict=True)]
        after = measure(truth, scored(answers))
        assert after.accuracy_of_judged == 1
        assert after.accuracy == before.accuracy
        assert after.bad.recall <= before.bad.recall

    def test_a_critic_that_said_nothing(self):
        metrics = measure([1, 4, 5], scored([None, None, None]))
        assert (metrics.accuracy, metrics.coverage, metrics.bad.recall) == (0, 0, 0)
        assert (metrics.mae, metrics.accuracy_of_judged, metrics.rps) == (None, None, None)

    def test_failures_are_counted_by_status(self):
        statuses = ["ok", "unparsed", "error", "unparsed"]
        metrics = measure([1, 2, 3, 4], scored([1, None, None, None]), statuses=statuses)
        assert metrics.failures == {"error": 1, "unparsed": 2}

    def test_a_status_that_contradicts_the_judgement(self):
        with pytest.raises(ValueError, match="example 1 has status ok and no judgement"):
            measure([1, 2], scored([1, None]), statuses=["ok", "ok"])


def test_fault_f_a_truth_of_2_or_4_is_a_positive_too():
    """Fault f: the published binary metrics compare buckets of predictions with truth 1 and 5 only."""
    truth, said = [1, 2, 2, 3, 4, 4, 5], [1, 2, 2, 3, 4, 4, 5]

    def published(predicted_in: set[int], positive: int) -> float:
        tp = sum(s in predicted_in and t == positive for s, t in zip(said, truth, strict=True))
        return tp / sum(s in predicted_in for s in said)

    metrics = measure(truth, scored(said))
    # Each answer is right, and the published precision is a third.
    assert published({1, 2}, 1) == published({4, 5}, 5) == 1 / 3
    for found in (metrics.bad, metrics.good):
        assert (found.positives, found.precision, found.recall, found.f1) == (3, 1, 1, 1)

    truth, said = [2, 2, 4, 4], [4, 4, 2, 2]
    # All wrong, and the published counts know of no positive that was missed.
    assert sum(t == 1 or t == 5 for t in truth) == 0
    metrics = measure(truth, scored(said))
    assert (metrics.bad.fn, metrics.bad.recall) == (2, 0)
    assert (metrics.good.fn, metrics.good.recall) == (2, 0)


class TestUndefined:
    def test_constant_predictions(self):
        metrics = measure([1, 2, 4, 5], constant(4, 4))
        assert metrics.pearson is metrics.spearman is metrics.pearson_argmax is None
        assert metrics.kappa == 0
        assert metrics.bad.auroc == metrics.good.auroc == 0.5
        assert metrics.bad.precision is None
        assert metrics.bad.f1 == 0

    def test_one_class(self):
        metrics = measure([4, 4, 4], scored([3, 4, 5]))
        assert metrics.pearson is metrics.spearman is None
        assert metrics.good.auroc is metrics.good.average_precision is metrics.bad.auroc is None
        assert metrics.bad.recall is metrics.bad.f1 is None

    def test_perfect_agreement_on_one_score_is_no_kappa(self):
        assert measure([4, 4], scored([4, 4])).kappa is None

    def test_one_example(self):
        metrics = measure([4], scored([4]))
        assert metrics.accuracy == 1
        assert metrics.kappa is metrics.pearson is metrics.good.auroc is None

    def test_no_example(self):
        table = as_table(measure([], scored([])))
        assert set(table.values()) == {None}

    def test_expectations_that_differ_by_rounding_only_are_ties(self):
        probabilities = np.array([[0.1, 0.2, 0.3, 0.4, 0.0]] * 3)
        judged = of_chances(probabilities)
        noisy = Judged(
            judged.expectation + np.array([0, 4e-16, -4e-16]), judged.argmax, judged.probabilities
        )
        metrics = measure([2, 4, 5], noisy)
        assert metrics.spearman is None
        assert metrics.good.auroc == 0.5

    def test_a_judge_without_probabilities_has_no_calibration(self):
        metrics = measure(
            [2, 4], Judged(np.array([2.0, 3.6]), np.array([2, 4]), np.full((2, 5), np.nan))
        )
        assert (metrics.accuracy, metrics.judged, metrics.weighed) == (1, 2, 0)
        assert metrics.rps is metrics.ece_good is metrics.ece_argmax is metrics.brier_bad is None
        assert all(one.n == 0 and one.observed is None for one in metrics.reliability_good)


def test_confusion_equals_scikit_learn():
    truth, judged = random_case(3, 200, "missing")
    table = confusion_matrix(truth, np.where(judged.argmax, judged.argmax, 6), labels=range(1, 7))
    assert measure(truth, judged).confusion == tuple(map(tuple, table[:5].tolist()))


def test_json():
    truth, judged = random_case(3, 40, "missing")
    text = json.dumps(asdict(measure(truth, judged)), allow_nan=False)
    assert json.loads(text)["bad"]["positives"] == int((truth <= 2).sum())


class TestJudged:
    def test_of_judgements(self):
        judged = Judged.of(
            [
                Judgement("ok", (0.5, 0.5, 0, 0, 0)),
                Judgement("unparsed"),
                Judgement("error", (0, 0, 0, 0, 1.0)),  # a score that came with a failure is none
                None,
            ]
        )
        assert judged.argmax.tolist() == [1, 0, 0, 0]
        assert judged.expectation[0] == 1.5
        assert np.isnan(judged.expectation[1:]).all()
        assert judged.weighed.tolist() == [True, False, False, False]

    @pytest.mark.parametrize(
        ("expectation", "argmax", "probabilities", "message"),
        [
            ([3.0], [0], [[np.nan] * 5], "if and only if"),
            ([np.nan], [3], [[np.nan] * 5], "if and only if"),
            ([0.0], [1], [[np.nan] * 5], "1..5"),
            ([3.0], [6], [[np.nan] * 5], "argmax must be 1 to 5"),
            ([3.0], [3.0], [[np.nan] * 5], "whole numbers"),
            ([3.0], [3], [[0, 0, 0.5, 0, 0]], "sum to 1"),
            ([3.0], [3], [[-0.5, 0, 1.5, 0, 0]], "0 or more"),
            ([3.0], [3], [[np.nan, 0, 1, 0, 0]], "five probabilities or none"),
            ([np.nan], [0], [[0, 0, 1, 0, 0]], "unjudged example has no"),
            ([3.0, 3.0], [3], [[0, 0, 1, 0, 0]], "equally long"),
            ([3.0], [3], [[0, 0, 1, 0]], "shape"),
        ],
    )
    def test_contradictions_are_refused(self, expectation, argmax, probabilities, message):
        with pytest.raises(ValueError, match=message):
            Judged(np.array(expectation), np.array(argmax), np.array(probabilities))


@pytest.mark.parametrize("truth", [[0, 3], [3, 6], [np.nan, 3], [[1, 2]]])
def test_a_truth_that_is_no_score_is_refused(truth):
    with pytest.raises(ValueError, match="truth"):
        measure(truth, scored([3, 3]))


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="3 truths and 2 judgements"):
        measure([1, 2, 3], scored([1, 2]))
    with pytest.raises(ValueError, match="2 truths and 1 groups"):
        intervals([1, 2], scored([1, 2]), ["a"])
    with pytest.raises(ValueError, match="1 labels"):
        by([1, 2], scored([1, 2]), ["a"])


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"no such metric: auroc; there are .*good\.auroc"):
        intervals([1, 2], scored([1, 2]), names=["auroc"])


def test_baselines():
    truth = [4, 4, 4, 3, 3, 5, 1, 2]
    blind = baselines(truth)
    assert blind["majority"].accuracy == blind["constant_4"].accuracy == 3 / 8
    assert blind["majority"].good.auroc == 0.5
    # Who knows the frequencies is calibrated by construction.
    assert blind["frequencies"].ece_good == pytest.approx(0)
    assert blind["frequencies"].bias == pytest.approx(0)
    assert blind["frequencies"].rps < blind["majority"].rps
    assert baselines([1, 1, 5])["majority"].accuracy == 2 / 3
    assert baselines([1, 1, 5])["constant_4"].accuracy == 0
    assert baselines([]) == {}


def test_by_label():
    truth = [4] * 10 + [2, 3, 5]
    answers: list[int | None] = [4] * 5 + [5] * 5 + [None, 3, 5]
    labels = ["wan"] * 10 + ["sora", None, None]
    statuses = ["ok"] * 10 + ["refused", "ok", "ok"]
    sora, wan, unlabelled = by(truth, scored(answers), labels, statuses=statuses)
    assert (wan.label, wan.is_small, wan.metrics.accuracy) == ("wan", False, 0.5)
    assert (sora.label, sora.is_small, sora.metrics.accuracy) == ("sora", True, 0)
    assert sora.metrics.failures == {"refused": 1}
    assert (unlabelled.label, unlabelled.metrics.n, unlabelled.metrics.accuracy) == (None, 2, 1)


def prompts(n: int, of: int) -> list[str]:
    return [f"prompt {row // of}" for row in range(n)]


class TestIntervals:
    def test_they_hold_the_figure_and_repeat(self):
        truth, judged = random_case(1, 120, "missing")
        first = intervals(truth, judged, prompts(120, 4), resamples=200, seed=3)
        assert first == intervals(truth, judged, prompts(120, 4), resamples=200, seed=3)
        assert first != intervals(truth, judged, prompts(120, 4), resamples=200, seed=4)
        metrics = measure(truth, judged)
        for name, one in first.items():
            assert one.value == value(metrics, name)
            assert one.low < one.high, name
        one = first["accuracy"]
        assert one.low <= one.value <= one.high

    def test_neither_other_names_nor_the_order_of_examples_matters(self):
        truth, judged = random_case(1, 90, "votes")
        groups = prompts(90, 3)
        expected = intervals(truth, judged, groups, resamples=100)["kappa"]
        mixed = np.random.default_rng(0).permutation(90)
        again = intervals(
            truth[mixed], judged.only(mixed), [groups[k] for k in mixed], ["kappa"], resamples=100
        )["kappa"]
        assert (again.low, again.high) == pytest.approx((expected.low, expected.high), abs=1e-12)

    def test_whole_groups_are_drawn(self):
        """Forty copies of each of ten clips say as much as ten clips, not as four hundred."""
        rng = np.random.default_rng(2)
        rows = np.repeat(np.arange(10), 40)
        truth, judged = (
            rng.integers(1, 6, 10).astype(float),
            of_chances(rng.dirichlet(np.ones(5), 10)),
        )
        few = intervals(truth, judged, prompts(10, 1), ["mae"])["mae"]
        many = intervals(truth[rows], judged.only(rows), prompts(400, 40), ["mae"])["mae"]
        careless = intervals(truth[rows], judged.only(rows), None, ["mae"])["mae"]
        assert (many.low, many.high) == pytest.approx((few.low, few.high))
        assert careless.high - careless.low < (few.high - few.low) / 4

    def test_the_width_is_that_of_the_normal_approximation(self):
        n = 2000
        answers = [4 if row % 3 else 1 for row in range(n)]
        one = intervals([4] * n, scored(answers), None, ["accuracy"])["accuracy"]
        expected = 2 * 1.96 * math.sqrt(2 / 9 / n)
        assert one.high - one.low == pytest.approx(expected, rel=0.1)

    def test_none_where_too_many_resamples_are_undefined(self):
        """One good clip of six: a third of the resamples have none, and the rest would be a selection."""
        judged = scored([1, 2, 3, 2, 1, 5])
        found = intervals([1, 2, 3, 2, 1, 5], judged, None, ["good.auroc", "accuracy"])
        one = found["good.auroc"]
        assert (one.value, one.low, one.high) == (1, None, None)
        assert 250 < one.undefined < 420
        assert found["accuracy"].low == 1

    def test_none_for_a_single_group(self):
        one = intervals([1, 2, 4], scored([1, 2, 3]), ["a"] * 3, ["accuracy"])["accuracy"]
        assert (one.value, one.low, one.high) == (2 / 3, None, None)

    def test_nothing_to_draw_from(self):
        assert intervals([], scored([]), [], ["accuracy"], resamples=5)["accuracy"].low is None

    @pytest.mark.parametrize("level", [0, 1, 95])
    def test_the_level_is_a_share(self, level):
        with pytest.raises(ValueError, match="level"):
            intervals([1, 2], scored([1, 2]), level=level)


class TestCompare:
    def critics(self, n: int = 300) -> tuple[np.ndarray, Judged, Judged]:
        """One that sees something, one that guesses."""
        rng = np.random.default_rng(8)
        truth = rng.integers(1, 6, n).astype(float)
        seeing = np.exp(-0.5 * (np.arange(1, 6) - truth[:, None] - rng.normal(0, 1, (n, 1))) ** 2)
        return (
            truth,
            of_chances(rng.dirichlet(np.ones(5), n)),
            of_chances(seeing / seeing.sum(axis=1, keepdims=True)),
        )

    def test_a_better_critic_is_seen(self):
        truth, guessing, seeing = self.critics()
        found = compare(truth, guessing, seeing, prompts(300, 3), resamples=200, permutations=400)
        assert [one.metric for one in found.differences] == list(COMPARED)
        for one in found.differences:
            assert one.difference == one.b - one.a
            assert one.low <= one.difference <= one.high
            assert one.p_value <= one.p_holm
        figures = {one.metric: one for one in found.differences}
        assert figures["kappa"].low > 0.2
        assert figures["kappa"].p_value == 1 / 401
        assert figures["mae"].high < 0
        assert found.mcnemar.p_value < 1e-6
        assert found.groups == 100

    def test_the_sides_are_symmetric(self):
        truth, a, b = self.critics(60)
        one_way = compare(truth, a, b, resamples=100, permutations=200)
        other_way = compare(truth, b, a, resamples=100, permutations=200)
        for first, second in zip(one_way.differences, other_way.differences, strict=True):
            assert first.difference == -second.difference
            assert (first.low, first.p_value) == (pytest.approx(-second.high), second.p_value)

    def test_a_critic_against_itself(self):
        truth, a, _ = self.critics(60)
        found = compare(truth, a, a, prompts(60, 2), resamples=50, permutations=50)
        for one in found.differences:
            assert (one.difference, one.low, one.high, one.p_value, one.p_holm) == (0, 0, 0, 1, 1)
        assert (found.mcnemar.only_a, found.mcnemar.only_b, found.mcnemar.p_value) == (0, 0, 1)

    def test_few_groups_have_all_their_swaps_tried(self):
        """Five clips, b right in each and a in none: of the 32 swaps two are as extreme."""
        truth = [1, 2, 3, 4, 5]
        found = compare(truth, scored([2, 3, 4, 5, 4]), scored(truth), None, ["accuracy"])
        assert found.permutations == 32
        assert found.differences[0].p_value == 2 / 32
        assert found.mcnemar.p_value == 2 / 32

    def test_groups_are_swapped_whole(self):
        """As before, each clip there three times: no more is known than before."""
        truth = np.repeat([1, 2, 3, 4, 5], 3)
        a = scored(np.repeat([2, 3, 4, 5, 4], 3).tolist())
        b = scored(truth.tolist())
        found = compare(truth, a, b, prompts(15, 3), ["accuracy"])
        assert found.differences[0].p_value == 2 / 32
        careless = compare(truth, a, b, None, ["accuracy"])
        assert careless.differences[0].p_value < 0.002

    def test_p_values_are_uniform_where_nothing_differs(self):
        rng = np.random.default_rng(11)
        truth = rng.integers(1, 6, 80).astype(float)
        found = []
        for run in range(60):
            a, b = (of_chances(rng.dirichlet(np.ones(5), 80)) for _ in range(2))
            result = compare(truth, a, b, None, ["mae"], resamples=2, permutations=100, seed=run)
            found.append(result.differences[0].p_value)
        assert 0.35 < np.mean(found) < 0.65
        assert np.mean(np.array(found) < 0.1) < 0.25

    def test_silence_gains_nothing(self):
        """b is a, but silent wherever it would be wrong by far."""
        truth, a, _ = self.critics()
        silent = np.abs(a.expectation - truth) > 1.5
        b = of_chances(a.probabilities, silent)
        assert measure(truth, b).mae < measure(truth, a).mae
        found = compare(truth, a, b, resamples=50, permutations=50)
        figures = {one.metric: one for one in found.differences}
        assert figures["mae"].n == found.judged_by_both == int((~silent).sum())
        assert figures["mae"].difference == figures["kappa"].difference == 0
        assert figures["accuracy"].n == 300
        assert figures["bad.f1"].difference < 0

    def test_prompts_without_a_common_judgement_are_not_drawn(self):
        """Else resamples would hold fewer examples than there are, and some of them none."""
        truth, a, b = self.critics(60)
        groups, common = prompts(60, 3), np.arange(60) % 20 < 3
        b = of_chances(b.probabilities, ~common)
        whole = compare(truth, a, b, groups, ["mae"], resamples=100, permutations=100)
        only = [name for name, has in zip(groups, common, strict=True) if has]
        part = compare(
            truth[common], a.only(common), b.only(common), only, ["mae"],
            resamples=100, permutations=100,
        )  # fmt: skip
        assert whole.differences == part.differences

    def test_a_figure_that_one_side_lacks(self):
        """Constant predictions have no correlation: there is no difference, and no share in Holm's count."""
        truth, a, _ = self.critics(40)
        found = compare(truth, a, constant(40, 4), None, ["pearson", "accuracy"], permutations=50)
        pearson, accuracy = found.differences
        assert pearson.b is pearson.difference is pearson.p_value is pearson.p_holm is None
        assert accuracy.p_holm == accuracy.p_value

    def test_no_example_judged_by_both(self):
        found = compare([1, 4], scored([1, None]), scored([None, 4]), None, permutations=4)
        assert found.judged_by_both == 0
        figures = {one.metric: one for one in found.differences}
        assert (figures["mae"].n, figures["mae"].difference) == (0, None)
        assert figures["accuracy"].difference == 0

    def test_other_examples_are_refused(self):
        with pytest.raises(ValueError, match="not the same examples"):
            compare([1, 2], scored([1, 2]), scored([1]))
        with pytest.raises(ValueError, match=r"the 2\. is y in a and z in b"):
            compare([1, 2], scored([1, 2]), scored([1, 2]), ids=(["x", "y"], ["x", "z"]))


def test_holm_by_hand():
    assert holm([0.01, None, 0.04, 0.03]) == [0.03, None, 0.06, 0.06]
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_a_full_test_set_takes_seconds():
    """The target is 20 s for all figures on one core; here is room for a busy machine."""
    import time

    truth, judged = random_case(0, 3400, "missing")
    started = time.process_time()
    found = intervals(truth, judged, prompts(3400, 6))
    assert time.process_time() - started < 20
    assert len(found) == len(SCALARS)


def test_metrics_name_every_scalar():
    metrics: Metrics = measure([1, 5, 2, 4], scored([1, 4, 3, 2]))
    assert all(isinstance(number, float) for number in as_table(metrics).values())
