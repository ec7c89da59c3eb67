"""How well a critic agrees with people: every figure of an evaluation, from the same few arrays.

The truth is a score of 1 to 5; bad is what people scored 1 or 2, good what they scored 4 or 5. Truths
between the scores (means of raters) count as the nearest score, half upward, wherever scores are
counted, and as they are in errors and correlations.

An example without a judgement counts as wrong in every accuracy, recall and F1: a critic that is
silent on hard clips must not look better for it. Errors, correlations and rank figures can only be
had from the judged examples; `coverage` stands beside them.

What is not defined (a correlation with constant predictions, a rank figure with one class only, any
figure of nothing) is None, never 0 and never NaN.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from winnow.operators.critic.judgement import SCORES, Judgement

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

BAD = 2
"""The highest score that is bad."""
GOOD = 4
"""The lowest score that is good."""
BINS = 10
"""Of equal width over 0..1, for the calibration errors and the reliability diagrams."""
SMALL = 10
"""A subset with fewer examples says next to nothing."""

_DIGITS = 12
"""Scores that differ by less are ties: the last bits of a float depend on the order of its sums."""


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """A critic's word on n examples, as arrays; an example that it did not judge has none."""

    expectation: Floats
    """(n,) in 1..5; NaN where unjudged."""
    argmax: Ints
    """(n,) in 1..5; 0 where unjudged."""
    probabilities: Floats
    """(n, 5), rows summing to 1; NaN where there are none (also for a judge that only gave a score)."""

    def __post_init__(self) -> None:
        """Raises ValueError where the arrays contradict each other."""
        object.__setattr__(self, "expectation", np.asarray(self.expectation, dtype=np.float64))
        argmax = np.asarray(self.argmax)
        if argmax.size and argmax.dtype.kind not in "iu":
            raise ValueError("argmax must be whole numbers, 0 for an unjudged example")
        object.__setattr__(self, "argmax", argmax.astype(np.int64))
        object.__setattr__(self, "probabilities", np.asarray(self.probabilities, dtype=np.float64))
        n = len(self.argmax)
        if self.expectation.shape != (n,) or self.argmax.shape != (n,):
            raise ValueError("expectation and argmax must be one-dimensional and equally long")
        if self.probabilities.shape != (n, len(SCORES)):
            raise ValueError(f"probabilities must have the shape ({n}, {len(SCORES)})")
        if n and (self.argmax.min() < 0 or self.argmax.max() > SCORES[-1]):
            raise ValueError("argmax must be 1 to 5, or 0 for an unjudged example")
        if not np.array_equal(np.isnan(self.expectation), ~self.judged):
            raise ValueError("an example has an expectation if and only if it has an argmax")
        scores = self.expectation[self.judged]
        if not np.all((scores > 1 - 1e-6) & (scores < 5 + 1e-6)):
            raise ValueError("expectations must lie in 1..5")
        if not np.array_equal(
            np.isnan(self.probabilities).any(1), np.isnan(self.probabilities).all(1)
        ):
            raise ValueError("an example has five probabilities or none")
        if np.any(self.weighed & ~self.judged):
            raise ValueError("an unjudged example has no probabilities")
        chances = self.probabilities[self.weighed]
        if np.any(chances < 0) or np.any(np.abs(chances.sum(axis=1) - 1) > 1e-4):
            raise ValueError("probabilities must be 0 or more and sum to 1")

    def __len__(self) -> int:
        return len(self.argmax)

    @property
    def judged(self) -> Flags:
        """(n,)"""
        return self.argmax > 0

    @property
    def weighed(self) -> Flags:
        """(n,) judged, with probabilities."""
        return np.asarray(~np.isnan(self.probabilities[:, 0]))

    def only(self, which: Flags | Ints) -> Judged:
        """Those examples, by flag or by index."""
        return Judged(self.expectation[which], self.argmax[which], self.probabilities[which])

    @classmethod
    def of(cls, judgements: Sequence[Judgement | None]) -> Judged:
        """In the same order; None, and every status but `ok`, is unjudged."""
        n = len(judgements)
        expectation = np.full(n, np.nan)
        argmax = np.zeros(n, dtype=np.int64)
        probabilities = np.full((n, len(SCORES)), np.nan)
        for row, judgement in enumerate(judgements):
            if judgement is None or judgement.status != "ok" or judgement.probabilities is None:
                continue
            expectation[row] = judgement.score
            argmax[row] = judgement.argmax or 0
            probabilities[row] = judgement.probabilities
        return cls(expectation, argmax, probabilities)


@dataclass(frozen=True, slots=True)
class Detection:
    """How well a class (bad or good) is found. Positive are the examples whose truth is in it."""

    positives: int
    """By the truth, judged or not."""
    auroc: float | None
    """Of the judged, ranked by the expectation; 0.5 is chance."""
    average_precision: float | None
    """Of the judged, ranked by the expectation; chance is the share of positives."""
    precision: float | None
    """Of the examples whose argmax is in the class."""
    recall: float | None
    """Of all positives; the unjudged are missed."""
    f1: float | None
    tp: int
    fp: int
    fn: int
    """Unjudged positives included."""
    tn: int
    """Judged ones only."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Of a reliability diagram: the predictions in (low, high], 0 in the first."""

    low: float
    high: float
    n: int
    predicted: float | None
    """Mean of the probabilities in it."""
    observed: float | None
    """Share of the examples in it of which it was true."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Of one critic on one set of examples; `dataclasses.asdict` is ready for JSON."""

    n: int
    judged: int
    weighed: int
    """Judged ones that have probabilities: what the calibration figures are of."""
    coverage: float | None
    """judged / n"""
    failures: dict[str, int]
    """Statuses of the unjudged, where statuses were given."""

    accuracy: float | None
    """Share of all n whose argmax is the truth; unjudged is wrong."""
    accuracy_of_judged: float | None
    within_one: float | None
    """Share of all n whose argmax is at most one score off; unjudged is wrong."""
    within_one_of_judged: float | None

    mae: float | None
    """Mean of |expectation - truth|."""
    mae_argmax: float | None
    bias: float | None
    """Mean of expectation - truth; above 0 the critic is too kind."""
    pearson: float | None
    """Of expectation and truth."""
    pearson_argmax: float | None
    """Of argmax and truth: what is comparable with published figures, which are of single digits."""
    spearman: float | None
    """Of expectation and truth, ties at their average rank."""
    spearman_argmax: float | None
    kappa: float | None
    """Cohen's, quadratic weights, over the five scores; 0 for a constant prediction."""

    bad: Detection
    good: Detection

    rps: float | None
    """Ranked probability score: mean over the four cuts of the scale of the squared error of the
    cumulative probability, 0 (sure and right) to 1."""
    brier_bad: float | None
    brier_good: float | None
    """Squared error of P(4) + P(5)."""
    ece_good: float | None
    """Expected calibration error of P(4) + P(5)."""
    ece_argmax: float | None
    """Expected calibration error of the argmax's own probability."""
    reliability_good: tuple[Bin, ...]
    reliability_argmax: tuple[Bin, ...]

    confusion: tuple[tuple[int, ...], ...]
    """5 rows by the true score; 6 columns by the argmax, the last unjudged."""
    truth_counts: tuple[int, ...]
    """Of the scores 1 to 5."""
    predicted_counts: tuple[int, ...]
    """Of the scores 1 to 5, then the unjudged."""


OVER_ALL = (
    "coverage", "accuracy", "within_one",
    "bad.precision", "bad.recall", "bad.f1", "good.precision", "good.recall", "good.f1",
)  # fmt: skip
"""Figures in which an unjudged example has its part."""
OVER_JUDGED = (
    "accuracy_of_judged", "within_one_of_judged", "mae", "mae_argmax", "bias",
    "pearson", "pearson_argmax", "spearman", "spearman_argmax", "kappa",
    "bad.auroc", "bad.average_precision", "good.auroc", "good.average_precision",
)  # fmt: skip
OVER_WEIGHED = ("rps", "brier_bad", "brier_good", "ece_good", "ece_argmax")
"""Figures of the examples with probabilities."""
SCALARS = OVER_ALL + OVER_JUDGED + OVER_WEIGHED
"""Every figure that is one number, by the name that `value` takes."""
LOWER_IS_BETTER = frozenset({"mae", "mae_argmax", *OVER_WEIGHED})
"""Of the rest higher is better, but for `bias`, which is best at 0."""


def value(metrics: Metrics, name: str) -> float | None:
    """The figure of that name, one of SCALARS. Raises ValueError for any other."""
    check_names((name,))
    owner: object = metrics
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner if isinstance(owner, float) else None


def as_table(metrics: Metrics, names: Sequence[str] = SCALARS) -> dict[str, float | None]:
    """The figures that are one number, by name."""
    return {name: value(metrics, name) for name in names}


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is not in SCALARS."""
    unknown = sorted(set(names) - set(SCALARS))
    if unknown:
        raise ValueError(f"no such metric: {', '.join(unknown)}; there are {', '.join(SCALARS)}")


def as_truth(truth: ArrayLike) -> Floats:
    """(n,) checked. Raises ValueError where one is missing or not in 1..5."""
    array = np.asarray(truth, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError("the truth must be one-dimensional")
    if not np.all((array >= 1) & (array <= 5)):  # NaN fails both
        raise ValueError("every truth must be in 1..5; leave out the examples that have none")
    return without_noise(array)


def without_noise(scores: Floats) -> Floats:
    """Rounded to what is surely more than the noise of summation, so that ties are ties."""
    return np.round(scores, _DIGITS)


def nearest_score(truth: Floats) -> Ints:
    """1..5; halves go up."""
    return np.floor(truth + 0.5).astype(np.int64)


def bin_of(probability: Floats) -> Ints:
    """Index of the bin (low, high] of BINS; 0 is in the first."""
    # Sums of probabilities such as 0.1 + 0.2 belong on the edge, not beyond it.
    place = np.ceil(np.round(probability * BINS, _DIGITS - 3)).astype(np.int64) - 1
    return np.clip(place, 0, BINS - 1)


def measure(truth: ArrayLike, judged: Judged, *, statuses: Sequence[str] | None = None) -> Metrics:
    """All figures of a critic's judgements against the truth of the same examples.

    `truth` is (n,), 1..5. `statuses` are those of the judgements, for the count of failures.
    Raises ValueError where lengths differ, a truth is no score, or a status contradicts a judgement.
    """
    scores = as_truth(truth)
    if len(scores) != len(judged):
        raise ValueError(f"{len(scores)} truths and {len(judged)} judgements")
    failures = _failures(judged, statuses)
    n, has = len(scores), judged.judged
    rounded = nearest_score(scores)
    confusion = _confusion(rounded, judged.argmax)
    hits = int(np.trace(confusion[:, :5]))
    near = int(sum(np.trace(confusion[:, :5], k) for k in (-1, 0, 1)))

    true, nearest, argmax = scores[has], rounded[has], judged.argmax[has].astype(np.float64)
    expectation = without_noise(judged.expectation[has])
    bad, good = nearest <= BAD, nearest >= GOOD
    weighed = judged.weighed
    chances, classes = judged.probabilities[weighed], rounded[weighed]
    confidence = chances[np.arange(len(chances)), judged.argmax[weighed] - 1]
    p_good, was_good = chances[:, GOOD - 1 :].sum(axis=1), classes >= GOOD
    p_bad, was_bad = chances[:, :BAD].sum(axis=1), classes <= BAD
    reliability_good = _reliability(p_good, was_good)
    reliability_argmax = _reliability(confidence, classes == judged.argmax[weighed])
    return Metrics(
        n=n,
        judged=int(has.sum()),
        weighed=int(weighed.sum()),
        coverage=_ratio(int(has.sum()), n),
        failures=failures,
        accuracy=_ratio(hits, n),
        accuracy_of_judged=_ratio(hits, int(has.sum())),
        within_one=_ratio(near, n),
        within_one_of_judged=_ratio(near, int(has.sum())),
        mae=_mean(np.abs(expectation - true)),
        mae_argmax=_mean(np.abs(argmax - true)),
        bias=_mean(expectation - true),
        pearson=_pearson(expectation, true),
        pearson_argmax=_pearson(argmax, true),
        spearman=_spearman(expectation, true),
        spearman_argmax=_spearman(argmax, true),
        kappa=_kappa(nearest, judged.argmax[has]),
        bad=_detection(confusion, slice(0, BAD), bad, -expectation),
        good=_detection(confusion, slice(GOOD - 1, 5), good, expectation),
        rps=_mean(ranked_probability_scores(classes, chances)),
        brier_bad=_mean((p_bad - was_bad) ** 2),
        brier_good=_mean((p_good - was_good) ** 2),
        ece_good=_calibration_error(reliability_good),
        ece_argmax=_calibration_error(reliability_argmax),
        reliability_good=reliability_good,
        reliability_argmax=reliability_argmax,
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        truth_counts=tuple(int(count) for count in confusion.sum(axis=1)),
        predicted_counts=tuple(int(count) for count in confusion.sum(axis=0)),
    )


@dataclass(frozen=True, slots=True)
class Subset:
    """The examples of one generator, action, ..."""

    label: str | None
    """None: of those that have no label."""
    metrics: Metrics
    is_small: bool
    """Fewer than SMALL examples: to be shown with that remark or not at all."""


def by(
    truth: ArrayLike,
    judged: Judged,
    labels: Sequence[str | None],
    *,
    statuses: Sequence[str] | None = None,
) -> tuple[Subset, ...]:
    """Measured apart for each label, in the order of the labels, the unlabelled last."""
    scores = as_truth(truth)
    if not len(scores) == len(judged) == len(labels):
        raise ValueError(f"{len(scores)} truths, {len(judged)} judgements, {len(labels)} labels")
    members: dict[str | None, list[int]] = {}
    for row, label in enumerate(labels):
        members.setdefault(label, []).append(row)
    subsets = []
    for label in sorted(members, key=lambda label: (label is None, label or "")):
        rows = np.asarray(members[label], dtype=np.int64)
        theirs = None if statuses is None else [statuses[row] for row in members[label]]
        metrics = measure(scores[rows], judged.only(rows), statuses=theirs)
        subsets.append(Subset(label, metrics, is_small=len(rows) < SMALL))
    return tuple(subsets)


@dataclass(frozen=True, slots=True)
class Baseline:
    """A judge that has not looked at any video."""

    name: str
    meaning: str
    judged: Judged = field(repr=False)


def baselines(truth: ArrayLike) -> dict[str, Metrics]:
    """What can be had on this truth without looking: a critic must be better than each of these."""
    return {one.name: measure(truth, one.judged) for one in blind_judges(truth)}


def blind_judges(truth: ArrayLike) -> tuple[Baseline, ...]:
    """The judges of `baselines`; the first and the last know the distribution of the truth."""
    scores = as_truth(truth)
    n = len(scores)
    if not n:
        return ()
    counts = np.bincount(nearest_score(scores), minlength=6)[1:]
    most = int(counts.argmax()) + 1
    shares = np.tile(counts / n, (n, 1))
    spread = Judged(shares @ np.asarray(SCORES, dtype=np.float64), np.full(n, most), shares)
    return (
        Baseline("majority", f"always {most}, the most frequent truth", constant(n, most)),
        Baseline("constant_4", "always 4", constant(n, 4)),
        Baseline("frequencies", "always the frequencies of the truth as probabilities", spread),
    )


def constant(n: int, score: int) -> Judged:
    """The same score for everything, with certainty."""
    probabilities = np.zeros((n, len(SCORES)))
    probabilities[:, score - 1] = 1
    return Judged(np.full(n, float(score)), np.full(n, score), probabilities)


def ranked_probability_scores(classes: Ints, chances: Floats) -> Floats:
    """(n,) 0..1, of true scores (n,) and probabilities (n, 5). Epstein 1969, divided by the 4 cuts."""
    cuts = np.asarray(SCORES[:-1])
    happened = classes[:, None] <= cuts[None, :]
    squared = (chances.cumsum(axis=1)[:, :-1] - happened) ** 2
    return np.asarray(squared.mean(axis=1), dtype=np.float64)


def _failures(judged: Judged, statuses: Sequence[str] | None) -> dict[str, int]:
    if statuses is None:
        return {}
    if len(statuses) != len(judged):
        raise ValueError(f"{len(statuses)} statuses and {len(judged)} judgements")
    for row, (status, has) in enumerate(zip(statuses, judged.judged, strict=True)):
        if (status == "ok") != has:
            raise ValueError(
                f"example {row} has status {status} and {'a' if has else 'no'} judgement"
            )
    return dict(sorted(Counter(status for status in statuses if status != "ok").items()))


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None


def _is_constant(values: NDArray[np.float64] | Ints) -> bool:
    """Also of none or one."""
    return len(values) < 2 or bool((values == values[0]).all())


def _pearson(predicted: Floats, true: Floats) -> float | None:
    if _is_constant(predicted) or _is_constant(true):
        return None
    from scipy.stats import pearsonr  # half a second that --help must not pay

    return float(pearsonr(predicted, true).statistic)


def _spearman(predicted: Floats, true: Floats) -> float | None:
    if _is_constant(predicted) or _is_constant(true):
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(predicted, true).statistic)


def _kappa(true: Ints, predicted: Ints) -> float | None:
    if len(true) < 2 or (_is_constant(true) and np.array_equal(true, predicted)):
        return None
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(true, predicted, labels=list(SCORES), weights="quadratic"))


def _confusion(true: Ints, argmax: Ints) -> Ints:
    """(5, 6), the unjudged in the last column."""
    column = np.where(argmax > 0, argmax - 1, 5)
    return np.bincount((true - 1) * 6 + column, minlength=30).reshape(5, 6).astype(np.int64)


def _detection(confusion: Ints, within: slice, positive: Flags, ranking: Floats) -> Detection:
    positives = int(confusion[within].sum())
    tp = int(confusion[within, within].sum())
    fp = int(confusion[:, within].sum()) - tp
    fn = positives - tp
    tn = int(confusion[:, :5].sum()) - int(confusion[within, :5].sum()) - fp
    auroc = average_precision = None
    if not _is_constant(positive.astype(np.int64)):
        from sklearn.metrics import average_precision_score, roc_auc_score

        auroc = float(roc_auc_score(positive, ranking))
        average_precision = float(average_precision_score(positive, ranking))
    return Detection(
        positives=positives,
        auroc=auroc,
        average_precision=average_precision,
        precision=_ratio(tp, tp + fp),
        recall=_ratio(tp, positives),
        f1=_ratio(2 * tp, 2 * tp + fp + fn),
        tp=tp,
        fp=fp,
        fn=fn,
        tn=tn,
    )


def _reliability(probability: Floats, was_true: Flags) -> tuple[Bin, ...]:
    place = bin_of(probability)
    bins = []
    for k in range(BINS):
        inside = place == k
        bins.append(
            Bin(
                low=k / BINS,
                high=(k + 1) / BINS,
                n=int(inside.sum()),
                predicted=_mean(probability[inside]),
                observed=_mean(was_true[inside].astype(np.float64)),
            )
        )
    return tuple(bins)


def _calibration_error(bins: Sequence[Bin]) -> float | None:
    """Mean over the examples of |predicted - observed| of their bin (Naeini et al., AAAI 2015)."""
    n = sum(one.n for one in bins)
    if not n:
        return None
    gaps = (
        one.n * abs(one.predicted - one.observed)
        for one in bins
        if one.predicted is not None and one.observed is not None
    )
    return sum(gaps, 0.0) / n
