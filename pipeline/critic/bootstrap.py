"""How sure the figures of an evaluation are: intervals, and the difference of two critics.

Clips of one prompt (or action) resemble each other, so whole groups are drawn, never single clips:
otherwise the intervals come out too narrow. Every figure is computed for hundreds of resamples at once,
as a function of how often each example was drawn; `tests/pipeline/critic/test_metrics.py` holds these
forms against `measure`, which asks scipy and scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from winnow.pipeline.critic.metrics import (
    BAD,
    BINS,
    GOOD,
    OVER_ALL,
    OVER_JUDGED,
    SCALARS,
    Flags,
    Floats,
    Ints,
    Judged,
    as_truth,
    bin_of,
    check_names,
    measure,
    nearest_score,
    ranked_probability_scores,
    value,
    without_noise,
)

UNDEFINED_SHARE = 0.05
"""With more undefined resamples than this there is no interval: the rest would be a selection."""
COMPARED = (
    "accuracy", "within_one", "mae", "pearson", "spearman", "kappa",
    "bad.auroc", "bad.f1", "good.auroc", "good.f1", "rps", "ece_good",
)  # fmt: skip
"""What `compare` reports by default. Each further metric costs the others power (Holm)."""

_CELLS_AT_ONCE = 400_000
"""Resamples times examples that are computed together: some 3 MB an array, which caches hold."""
_ROUNDING = 1e-25
"""Variance."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Of one figure.

    A calibration error is never negative, and resampling adds noise to every bin: its interval lies too
    high, with few examples above the value itself.
    """

    value: float | None
    low: float | None
    high: float | None
    """None where the figure is undefined, in more than UNDEFINED_SHARE of the resamples too, or where
    there is one group only."""
    undefined: int
    """Resamples in which it was."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one figure of two critics, on the same examples."""

    metric: str
    n: int
    """Examples that it is of: all for figures in which an unjudged example has its part; for the others
    those that both critics judged, so that neither gains by silence."""
    a: float | None
    b: float | None
    difference: float | None
    """b - a"""
    low: float | None
    high: float | None
    p_value: float | None
    """Two-sided, by swapping the critics within whole groups."""
    p_holm: float | None
    """Holm's correction over the metrics of this comparison."""


@dataclass(frozen=True, slots=True)
class McNemar:
    """Exact test of exact accuracy; it takes examples as independent, groups or not."""

    only_a: int
    """Examples that a has right and b has wrong; unjudged is wrong."""
    only_b: int
    p_value: float


@dataclass(frozen=True, slots=True)
class Comparison:
    n: int
    judged_by_both: int
    groups: int
    resamples: int
    permutations: int
    """Where there are so few groups that every swap can be tried, their number."""
    differences: tuple[Difference, ...]
    mcnemar: McNemar


def intervals(
    truth: ArrayLike,
    judged: Judged,
    groups: Sequence[str] | None = None,
    names: Sequence[str] = SCALARS,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Percentile bootstrap of each named figure, resampling whole groups.

    `groups` names the prompt of each example; None: each example is a group. The same seed gives the
    same intervals, whatever other figures are asked for and, with groups, in whatever order the examples
    come. With fewer than some twenty groups any bootstrap is optimistic. Raises ValueError for lengths
    that differ, unknown names, and a level not in 0..1.
    """
    check_names(names)
    _check(level, resamples)
    scores = as_truth(truth)
    group = _group_index(groups, len(scores))
    metrics = measure(scores, judged)
    drawn = _drawn(_sample(scores, judged), group, names, resamples, seed)
    found = {}
    for name in names:
        point = value(metrics, name)
        low, high, undefined = _percentiles(drawn[name], level)
        if point is None or _count(group) < 2:
            low = high = None
        found[name] = Interval(point, low, high, undefined)
    return found


def compare(
    truth: ArrayLike,
    a: Judged,
    b: Judged,
    groups: Sequence[str] | None = None,
    names: Sequence[str] = COMPARED,
    *,
    ids: tuple[Sequence[str], Sequence[str]] | None = None,
    resamples: int = 1000,
    permutations: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Two critics on the same examples, paired: what does b gain over a, and may it be chance?

    Intervals are grouped percentile bootstraps of b - a. The p-values are of a permutation test: under
    the null hypothesis the two are interchangeable on each prompt, so their judgements are swapped
    within whole groups. `ids` are the example ids of either side, to be sure. Raises ValueError where
    the two are not of the same examples in the same order, and as `intervals` does.
    """
    check_names(names)
    _check(level, resamples)
    scores = as_truth(truth)
    if not len(scores) == len(a) == len(b):
        raise ValueError(
            f"not the same examples: {len(scores)} truths, {len(a)} judgements of a, {len(b)} of b"
        )
    if ids is not None:
        _check_same(*ids, n=len(scores))
    group = _group_index(groups, len(scores))
    found: dict[str, Difference] = {}
    everything = np.ones(len(scores), dtype=bool)
    families = (
        (everything, set(OVER_ALL)),
        (a.judged & b.judged, set(OVER_JUDGED)),
        (a.weighed & b.weighed, set(SCALARS) - set(OVER_ALL) - set(OVER_JUDGED)),
    )
    for rows, family in families:
        wanted = [name for name in names if name in family]
        pair = _Pair(scores[rows], a.only(rows), b.only(rows), _compact(group[rows]))
        found |= pair.differences(wanted, resamples, permutations, seed, level)
    corrected = holm([found[name].p_value for name in names])
    return Comparison(
        n=len(scores),
        judged_by_both=int((a.judged & b.judged).sum()),
        groups=_count(group),
        resamples=resamples,
        permutations=len(_swaps(_count(group), permutations, seed)),
        differences=tuple(
            replace(found[name], p_holm=p) for name, p in zip(names, corrected, strict=True)
        ),
        mcnemar=_mcnemar(nearest_score(scores), a, b),
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (1979) of those that are there; the family-wise error is bounded."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for step, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - step)))
        corrected[place] = highest
    return corrected


def weighted(
    truth: ArrayLike, judged: Judged, weights: NDArray[np.number], names: Sequence[str] = SCALARS
) -> dict[str, Floats]:
    """Each named figure with every example counted as often as its weight says.

    `weights` is (resamples, n), whole numbers of 0 or more. Returns (resamples,) for each name, NaN
    where undefined: what `measure` gives for the examples repeated so often.
    """
    check_names(names)
    return _figures(_sample(as_truth(truth), judged), np.asarray(weights, dtype=np.float64), names)


@dataclass(frozen=True, slots=True)
class _Order:
    """Of values: their order and their ties, found once for all resamples."""

    order: Ints
    starts: Ints
    """(distinct values,) where in the order each begins."""
    place: Ints
    """(n,) index of the distinct value that each has."""

    @classmethod
    def of(cls, values: Floats) -> _Order:
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        is_new = np.ones(len(values), dtype=bool)
        is_new[1:] = ordered[1:] != ordered[:-1]
        place = np.empty(len(values), dtype=np.int64)
        place[order] = np.cumsum(is_new) - 1
        return cls(order, np.flatnonzero(is_new), place)

    def tied(self, weights: Floats) -> Floats:
        """(resamples, distinct values): weight of each value, ascending."""
        if not len(self.starts):
            return np.zeros((len(weights), 0))
        return np.add.reduceat(weights[:, self.order], self.starts, axis=1)


@dataclass(frozen=True, slots=True)
class _Sample:
    """What does not change from one resample to the next."""

    cells: Floats
    """(n, 30) one-hot: true score times argmax or unjudged."""
    judged: Flags
    true: Floats
    """Of the judged, as all that follow."""
    expectation: Floats
    argmax: Floats
    by_true: _Order
    by_expectation: _Order
    by_argmax: _Order
    is_bad: Flags
    is_good: Flags
    weighed: Flags
    """(n,), of all"""
    rps: Floats
    """Of the weighed, as all that follow."""
    brier_bad: Floats
    brier_good: Floats
    gaps_good: Floats
    """(weighed, BINS): probability - outcome, in its bin."""
    gaps_argmax: Floats


def _sample(truth: Floats, judged: Judged) -> _Sample:
    if len(truth) != len(judged):
        raise ValueError(f"{len(truth)} truths and {len(judged)} judgements")
    nearest = nearest_score(truth)
    column = np.where(judged.judged, judged.argmax - 1, 5)
    cells = np.zeros((len(truth), 30))
    cells[np.arange(len(truth)), (nearest - 1) * 6 + column] = 1
    has, weighed = judged.judged, judged.weighed
    true, expectation = truth[has], without_noise(judged.expectation[has])
    argmax = judged.argmax[has].astype(np.float64)
    chances, classes = judged.probabilities[weighed], nearest[weighed]
    likeliest = judged.argmax[weighed]
    p_bad, p_good = chances[:, :BAD].sum(axis=1), chances[:, GOOD - 1 :].sum(axis=1)
    confidence = chances[np.arange(len(chances)), likeliest - 1]
    return _Sample(
        cells=cells,
        judged=has,
        true=true,
        expectation=expectation,
        argmax=argmax,
        by_true=_Order.of(true),
        by_expectation=_Order.of(expectation),
        by_argmax=_Order.of(argmax),
        is_bad=nearest[has] <= BAD,
        is_good=nearest[has] >= GOOD,
        weighed=weighed,
        rps=ranked_probability_scores(classes, chances),
        brier_bad=(p_bad - (classes <= BAD)) ** 2,
        brier_good=(p_good - (classes >= GOOD)) ** 2,
        gaps_good=_gaps(p_good, classes >= GOOD),
        gaps_argmax=_gaps(confidence, classes == likeliest),
    )


def _gaps(probability: Floats, was_true: Flags) -> Floats:
    gaps = np.zeros((len(probability), BINS))
    gaps[np.arange(len(probability)), bin_of(probability)] = probability - was_true
    return gaps


class _Resampled:
    """The figures of a sample under weights (resamples, n), each found when first asked for."""

    def __init__(self, sample: _Sample, weights: Floats) -> None:
        self.sample = sample
        self.weights = weights

    @cached_property
    def confusion(self) -> Floats:
        """(resamples, 5, 6)"""
        return np.asarray((self.weights @ self.sample.cells).reshape(-1, 5, 6))

    @cached_property
    def n(self) -> Floats:
        return np.asarray(self.weights.sum(axis=1))

    @cached_property
    def of_judged(self) -> Floats:
        """(resamples, judged)"""
        every = bool(self.sample.judged.all())
        return self.weights if every else self.weights[:, self.sample.judged]

    @cached_property
    def n_judged(self) -> Floats:
        return np.asarray(self.of_judged.sum(axis=1))

    @cached_property
    def of_weighed(self) -> Floats:
        every = bool(self.sample.weighed.all())
        return self.weights if every else self.weights[:, self.sample.weighed]

    def coverage(self) -> Floats:
        return _divide(self.n_judged, self.n)

    def hits(self, off: int) -> Floats:
        """Judged examples whose argmax is at most so far off."""
        within = np.abs(np.subtract.outer(np.arange(5), np.arange(5))) <= off
        return np.asarray((self.confusion[:, :, :5] * within).sum(axis=(1, 2)))

    def mean_of_judged(self, figures: Floats) -> Floats:
        return _divide(self.of_judged @ figures, self.n_judged)

    def mean_of_weighed(self, figures: Floats) -> Floats:
        return _divide(self.of_weighed @ figures, self.of_weighed.sum(axis=1))

    def pearson(self, predicted: Floats) -> Floats:
        x, y = self.about_mean(predicted), self.about_mean(self.sample.true)
        vx, vy = (np.einsum("rn,rn,rn->r", self.of_judged, z, z) for z in (x, y))
        # Of a constant nothing is left but rounding: less than the differences that scores can have.
        vx[vx <= self.n_judged * _ROUNDING] = 0
        vy[vy <= self.n_judged * _ROUNDING] = 0
        return _divide(np.einsum("rn,rn,rn->r", self.of_judged, x, y), np.sqrt(vx * vy))

    def about_mean(self, figures: Floats) -> Floats:
        """(resamples, judged): less the mean of each resample."""
        return figures[None, :] - np.nan_to_num(self.mean_of_judged(figures))[:, None]

    def ranks(self, order: _Order) -> Floats:
        """(resamples, judged): average ranks, less their mean; of undrawn examples without meaning."""
        by_expectation = order is self.sample.by_expectation
        counts = self.ties if by_expectation else order.tied(self.of_judged)
        middle = counts.cumsum(axis=1) - (counts - 1) / 2 - (self.n_judged[:, None] + 1) / 2
        return np.asarray(middle[:, order.place])

    @cached_property
    def ties(self) -> Floats:
        """(resamples, distinct expectations): examples that have each, ascending."""
        return self.sample.by_expectation.tied(self.of_judged)

    @cached_property
    def ranks_of_expectation(self) -> Floats:
        return self.ranks(self.sample.by_expectation)

    @cached_property
    def ranks_of_true(self) -> Floats:
        return self.ranks(self.sample.by_true)

    def spearman(self, ranks: Floats) -> Floats:
        drawn, other = self.of_judged, self.ranks_of_true
        weighed_ranks = drawn * ranks
        vx = np.einsum("rn,rn->r", weighed_ranks, ranks)
        vy = np.einsum("rn,rn,rn->r", drawn, other, other)
        return _divide(np.einsum("rn,rn->r", weighed_ranks, other), np.sqrt(vx * vy))

    def kappa(self) -> Floats:
        seen = self.confusion[:, :, :5]
        penalty = np.subtract.outer(np.arange(5), np.arange(5)) ** 2
        rows, columns = seen.sum(axis=2), seen.sum(axis=1)
        found = (seen * penalty).sum(axis=(1, 2))
        expected = _divide(np.einsum("ri,rj,ij->r", rows, columns, penalty), self.n_judged)
        kappa = 1 - _divide(found, expected)
        return np.where(self.n_judged < 2, np.nan, kappa)

    def auroc(self, positive: Flags, sign: int) -> Floats:
        """From the sum of ranks (Mann and Whitney); sign -1 where low expectations are positive."""
        hits = self.of_judged @ positive.astype(np.float64)
        others = self.n_judged - hits
        ranks = np.einsum(
            "rn,rn->r", self.of_judged[:, positive], self.ranks_of_expectation[:, positive]
        )
        # Centred ranks sum to 0 over all, so that chance is 0.
        return 0.5 + sign * _divide(ranks, hits * others)

    def average_precision(self, positive: Flags, sign: int) -> Floats:
        """Sum over the thresholds of the recall gained times the precision there."""
        counts = self.ties[:, ::-sign]
        gained = self.sample.by_expectation.tied(self.of_judged * positive)[:, ::-sign]
        found, seen = gained.cumsum(axis=1), counts.cumsum(axis=1)
        precision = np.divide(found, seen, out=np.zeros_like(found), where=seen > 0)
        hits = gained.sum(axis=1)
        hits[hits == self.n_judged] = 0  # one class only
        return _divide((gained * precision).sum(axis=1), hits)

    def detection(self, within: slice) -> tuple[Floats, Floats, Floats]:
        """True positives, positives, predicted positives."""
        rows = self.confusion[:, within]
        return (
            rows[:, :, within].sum(axis=(1, 2)),
            rows.sum(axis=(1, 2)),
            self.confusion[:, :, within].sum(axis=(1, 2)),
        )

    def calibration_error(self, gaps: Floats) -> Floats:
        total = np.abs(self.of_weighed @ gaps).sum(axis=1)
        return _divide(total, self.of_weighed.sum(axis=1))


_BAD, _GOOD = slice(0, BAD), slice(GOOD - 1, 5)


def _precision(drawn: _Resampled, within: slice) -> Floats:
    tp, _, predicted = drawn.detection(within)
    return _divide(tp, predicted)


def _recall(drawn: _Resampled, within: slice) -> Floats:
    tp, positives, _ = drawn.detection(within)
    return _divide(tp, positives)


def _f1(drawn: _Resampled, within: slice) -> Floats:
    tp, positives, predicted = drawn.detection(within)
    return _divide(2 * tp, positives + predicted)


_FORMS: dict[str, Callable[[_Resampled], Floats]] = {
    "coverage": _Resampled.coverage,
    "accuracy": lambda r: _divide(r.hits(0), r.n),
    "within_one": lambda r: _divide(r.hits(1), r.n),
    "bad.precision": lambda r: _precision(r, _BAD),
    "bad.recall": lambda r: _recall(r, _BAD),
    "bad.f1": lambda r: _f1(r, _BAD),
    "good.precision": lambda r: _precision(r, _GOOD),
    "good.recall": lambda r: _recall(r, _GOOD),
    "good.f1": lambda r: _f1(r, _GOOD),
    "accuracy_of_judged": lambda r: _divide(r.hits(0), r.n_judged),
    "within_one_of_judged": lambda r: _divide(r.hits(1), r.n_judged),
    "mae": lambda r: r.mean_of_judged(np.abs(r.sample.expectation - r.sample.true)),
    "mae_argmax": lambda r: r.mean_of_judged(np.abs(r.sample.argmax - r.sample.true)),
    "bias": lambda r: r.mean_of_judged(r.sample.expectation - r.sample.true),
    "pearson": lambda r: r.pearson(r.sample.expectation),
    "pearson_argmax": lambda r: r.pearson(r.sample.argmax),
    "spearman": lambda r: r.spearman(r.ranks_of_expectation),
    "spearman_argmax": lambda r: r.spearman(r.ranks(r.sample.by_argmax)),
    "kappa": _Resampled.kappa,
    "bad.auroc": lambda r: r.auroc(r.sample.is_bad, -1),
    "bad.average_precision": lambda r: r.average_precision(r.sample.is_bad, -1),
    "good.auroc": lambda r: r.auroc(r.sample.is_good, 1),
    "good.average_precision": lambda r: r.average_precision(r.sample.is_good, 1),
    "rps": lambda r: r.mean_of_weighed(r.sample.rps),
    "brier_bad": lambda r: r.mean_of_weighed(r.sample.brier_bad),
    "brier_good": lambda r: r.mean_of_weighed(r.sample.brier_good),
    "ece_good": lambda r: r.calibration_error(r.sample.gaps_good),
    "ece_argmax": lambda r: r.calibration_error(r.sample.gaps_argmax),
}


def _figures(sample: _Sample, weights: Floats, names: Sequence[str]) -> dict[str, Floats]:
    drawn = _Resampled(sample, weights)
    return {name: _FORMS[name](drawn) for name in names}


def _drawn(
    sample: _Sample, group: Ints, names: Sequence[str], resamples: int, seed: int
) -> dict[str, Floats]:
    """(resamples,) of each figure."""
    parts = [
        _figures(sample, counts[:, group], names)
        for counts in _draws(_count(group), len(group), resamples, seed)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _draws(groups: int, n: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Some resamples at a time: how often each group was drawn."""
    rng = np.random.default_rng((seed, 0))
    for rows in _chunks(resamples, n):
        if groups:
            drawn = rng.multinomial(groups, np.full(groups, 1 / groups), size=rows)
            yield drawn.astype(np.float64)
        else:
            yield np.zeros((rows, 0))


def _swaps(groups: int, permutations: int, seed: int) -> Floats:
    """(permutations, groups) of 0 and 1: all there are where those are not more."""
    if groups < 60 and 2**groups <= permutations:
        every = np.arange(2**groups)[:, None] >> np.arange(groups)[None, :]
        return np.asarray(every & 1, dtype=np.float64)
    rng = np.random.default_rng((seed, 1))
    return rng.integers(0, 2, size=(permutations, groups)).astype(np.float64)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two critics on the same examples."""

    truth: Floats
    a: Judged
    b: Judged
    group: Ints

    def differences(
        self, names: Sequence[str], resamples: int, permutations: int, seed: int, level: float
    ) -> dict[str, Difference]:
        if not names:
            return {}
        of_a, of_b = measure(self.truth, self.a), measure(self.truth, self.b)
        drawn = [
            _drawn(_sample(self.truth, one), self.group, names, resamples, seed)
            for one in (self.a, self.b)
        ]
        permuted = self._permuted(names, permutations, seed)
        is_exact = 2 ** min(_count(self.group), 60) <= permutations
        found = {}
        for name in names:
            a, b = value(of_a, name), value(of_b, name)
            difference = low = high = p_value = None
            if a is not None and b is not None:
                difference = b - a
                if _count(self.group) > 1:
                    low, high, _ = _percentiles(drawn[1][name] - drawn[0][name], level)
                    p_value = _p_value(difference, permuted[name], is_exact)
            found[name] = Difference(
                name, len(self.truth), a, b, difference, low, high, p_value, p_holm=None
            )
        return found

    def _permuted(self, names: Sequence[str], permutations: int, seed: int) -> dict[str, Floats]:
        """(permutations,) of each difference under swaps of the critics within groups."""
        both = _sample(np.concatenate((self.truth, self.truth)), _stacked(self.a, self.b))
        swaps = _swaps(_count(self.group), permutations, seed)
        parts: dict[str, list[Floats]] = {name: [] for name in names}
        done = 0
        for rows in _chunks(len(swaps), 2 * len(self.truth)):
            swapped = swaps[done : done + rows, self.group]
            done += rows
            first = _figures(both, np.concatenate((1 - swapped, swapped), axis=1), names)
            second = _figures(both, np.concatenate((swapped, 1 - swapped), axis=1), names)
            for name in names:
                parts[name].append(second[name] - first[name])
        return {name: np.concatenate(parts[name]) for name in names}


def _p_value(difference: float, permuted: Floats, is_exact: bool) -> float | None:
    """Share of the swaps whose difference is at least as large, on either side."""
    defined = permuted[~np.isnan(permuted)]
    if len(defined) < (1 - UNDEFINED_SHARE) * len(permuted):
        return None
    as_large = int((np.abs(defined) >= abs(difference) - 1e-10).sum())
    # All swaps include the one that was observed; of drawn ones it must be counted with them, or p could be 0.
    more = 0 if is_exact else 1
    return (as_large + more) / (len(defined) + more)


def _percentiles(drawn: Floats, level: float) -> tuple[float | None, float | None, int]:
    undefined = int(np.isnan(drawn).sum())
    if undefined > UNDEFINED_SHARE * len(drawn):
        return None, None, undefined
    low, high = np.quantile(drawn[~np.isnan(drawn)], ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high), undefined


def _mcnemar(nearest: Ints, a: Judged, b: Judged) -> McNemar:
    from scipy.stats import binomtest  # half a second that --help must not pay

    right_a, right_b = a.argmax == nearest, b.argmax == nearest
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    differ = only_a + only_b
    p_value = float(binomtest(only_a, differ, 0.5).pvalue) if differ else 1.0
    return McNemar(only_a, only_b, p_value)


def _stacked(a: Judged, b: Judged) -> Judged:
    return Judged(
        np.concatenate((a.expectation, b.expectation)),
        np.concatenate((a.argmax, b.argmax)),
        np.concatenate((a.probabilities, b.probabilities)),
    )


def _group_index(groups: Sequence[str] | None, n: int) -> Ints:
    """(n,) 0, 1, ... in the order of the groups' names."""
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise ValueError(f"{n} truths and {len(groups)} groups")
    place = {name: index for index, name in enumerate(sorted(set(groups)))}
    return np.asarray([place[name] for name in groups], dtype=np.int64)


def _compact(group: Ints) -> Ints:
    """Numbered without gaps: of groups that lost all their examples nothing can be drawn."""
    return np.unique(group, return_inverse=True)[1].astype(np.int64)


def _count(group: Ints) -> int:
    return int(group.max()) + 1 if len(group) else 0


def _chunks(rows: int, n: int) -> Iterator[int]:
    most = max(1, _CELLS_AT_ONCE // max(1, n))
    for done in range(0, rows, most):
        yield min(most, rows - done)


def _divide(above: Floats, below: Floats) -> Floats:
    """NaN where there is nothing to divide by."""
    return np.asarray(np.divide(above, below, out=np.full(len(above), np.nan), where=below != 0))


def _check(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"the level must lie between 0 and 1, it is {level}")
    if resamples < 1:
        raise ValueError("at least one resample is needed")


def _check_same(ids_a: Sequence[str], ids_b: Sequence[str], n: int) -> None:
    if len(ids_a) != n or len(ids_b) != n:
        raise ValueError(f"{n} truths, {len(ids_a)} ids of a and {len(ids_b)} of b")
    for row, (one, other) in enumerate(zip(ids_a, ids_b, strict=True)):
        if one != other:
            raise ValueError(
                f"not the same examples: the {row + 1}. is {one} in a and {other} in b"
            )
