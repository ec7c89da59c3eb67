"""Fits a critic's calibration to clips that people rated. See calibration.py for what it holds.

Everything here is a function of its input: the same clips give the same numbers. Figures marked as
held out come from fits that saw no clip of the same prompt: clips of one prompt look alike, and a
fit that has seen one of them knows the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import ArrayLike, NDArray

from winnow.operators.critic.calibration import (
    COLDEST,
    DIGITS,
    HIGHEST_CUT,
    HOTTEST,
    LOWEST_CUT,
    Agreement,
    Calibration,
    CriticIdentity,
    Figures,
    FittedOn,
    Threshold,
    expectations,
    labels,
    precision_key,
    temper,
)
from winnow.operators.critic.judgement import SCORES
from winnow.operators.errors import ConfigError

LEAST_CLIPS = 30
FOLDS = 5
GOOD = 4
"""The lowest score that is called good."""
BINS = 10

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
CutPoints = tuple[float, float, float, float]


def fit(
    probabilities: ArrayLike,
    truth: ArrayLike,
    groups: Sequence[str],
    *,
    name: str,
    critic: CriticIdentity,
    dataset: str,
    fingerprint: str,
    precisions: Sequence[float] = (),
    confidence: float | None = 0.9,
    fitted_at: datetime | None = None,
    notes: Sequence[str] = (),
) -> Calibration:
    """Fit temperature, cut points and thresholds to judged and rated clips.

    `probabilities` (n, 5) of the scores 1 to 5; `truth` (n,) ratings 1..5, means of several raters
    are rounded half up as in VideoPhy-2; `groups` the prompt of each clip. For each of `precisions`
    the lowest limit is sought whose one-sided Clopper-Pearson bound of `confidence` reaches it (None:
    whose plain share does). Raises ConfigError where there is too little to fit to.
    """
    given = temper(probabilities, 1.0)
    rated = np.asarray(truth, np.float64).reshape(-1)
    prompts = np.asarray(list(groups), dtype=str)
    if not len(given) == len(rated) == len(prompts):
        raise ValueError(f"{len(given)} judgements, {len(rated)} ratings, {len(prompts)} groups")
    usable = np.isfinite(given[:, 0]) & (rated >= SCORES[0]) & (rated <= SCORES[-1])
    clips = _Clips(given[usable], _rounded(rated[usable]), prompts[usable])
    _check(clips, precisions)
    fitted = _fit(clips)
    folds, held = _held_out(clips)
    thresholds = tuple(
        _threshold(clips, fitted, held, precision, confidence) for precision in sorted(precisions)
    )
    return Calibration(
        name=name,
        fitted_at=fitted_at or datetime.now(UTC).replace(microsecond=0),
        fitted_on=FittedOn(
            dataset=dataset,
            fingerprint=fingerprint,
            examples=clips.count,
            groups=len(np.unique(clips.groups)),
            counts=_counts(clips.truth),
        ),
        critic=critic,
        temperature=fitted.temperature,
        cut_points=fitted.cut_points,
        thresholds=thresholds,
        figures=Agreement(
            before=_figures(clips.given, clips.given.argmax(axis=1) + SCORES[0], clips.truth),
            after=_figures(*fitted(clips), clips.truth),
            held_out=_figures_held_out(clips, held),
            folds=folds,
        ),
        notes=(*notes, *_remarks(clips, fitted)),
    )


@dataclass(frozen=True, slots=True)
class _Clips:
    given: Floats
    """(n, 5) probabilities as the critic gave them, without zeros."""
    truth: Ints
    groups: NDArray[np.str_]

    @property
    def count(self) -> int:
        return len(self.truth)

    def of(self, rows: Ints) -> _Clips:
        return _Clips(self.given[rows], self.truth[rows], self.groups[rows])


@dataclass(frozen=True, slots=True)
class _Fitted:
    temperature: float
    cut_points: CutPoints

    def __call__(self, clips: _Clips) -> tuple[Floats, Ints]:
        tempered = temper(clips.given, self.temperature)
        return tempered, labels(expectations(tempered), self.cut_points)


_HeldOut = list[tuple[_Clips, _Fitted, _Clips]]
"""Of each fold: the clips of the fit, the fit, the clips of other prompts."""


def _check(clips: _Clips, precisions: Sequence[float]) -> None:
    counts = ", ".join(f"{s}: {n}" for s, n in zip(SCORES, _counts(clips.truth), strict=True))
    if clips.count < LEAST_CLIPS:
        raise ConfigError(
            f"{clips.count} clips with a rating and a judgement are too few to calibrate on: at "
            f"least {LEAST_CLIPS} are needed, some hundreds are sensible"
        )
    if len(np.unique(clips.truth)) < 2:
        raise ConfigError(
            f"all clips have the same rating ({counts}): a calibration needs clips of several "
            "ratings, in the shares that the videos to judge have"
        )
    for precision in precisions:
        if not 0 < precision < 1:
            raise ConfigError(f"precision {precision:g}: give a share between 0 and 1, as 0.95")
    if len({precision_key(precision) for precision in precisions}) < len(precisions):
        raise ConfigError("a precision is given twice: " + ", ".join(map(str, precisions)))


def _fit(clips: _Clips) -> _Fitted:
    temperature = fit_temperature(clips.given, clips.truth)
    score = expectations(temper(clips.given, temperature))
    return _Fitted(temperature, fit_cut_points(score, clips.truth))


def fit_temperature(probabilities: ArrayLike, truth: ArrayLike) -> float:
    """The temperature with the least mean negative log likelihood of ratings 1..5.

    Within 0.05..100; at the upper end the probabilities say next to nothing of the ratings.
    """
    from scipy.optimize import minimize_scalar

    given, rated = np.asarray(probabilities), np.asarray(truth)
    found = minimize_scalar(
        lambda log_t: _nll(temper(given, float(np.exp(log_t))), rated),
        bounds=(np.log(COLDEST), np.log(HOTTEST)),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return float(np.clip(np.exp(found.x), COLDEST, HOTTEST))


def fit_cut_points(expectation: ArrayLike, truth: ArrayLike) -> CutPoints:
    """The four cut points on an expectation with the highest quadratic weighted kappa; exact.

    Kappa, because the accuracy of labels is mostly highest where rare ratings are never given: a
    label that is always 4 is no measure. Kappa counts how far off a label is, and is 0 for any
    constant. It is 1 - A/B, where A sums the squared errors of the labels and B what they would be
    if ratings were dealt out anew. Each is a sum over clips, so Dinkelbach's method (1967) finds the
    least ratio by minimising A - λB for falling λ, and each of these by dynamic programming.
    """
    score = np.asarray(expectation, np.float64).round(DIGITS)
    rated = np.asarray(truth, np.int64)
    values, place = np.unique(score, return_inverse=True)
    by_rating = np.zeros((len(values), len(SCORES)))
    np.add.at(by_rating, (place, rated - SCORES[0]), 1)
    squares = (np.array(SCORES)[:, None] - np.array(SCORES)[None, :]) ** 2.0
    error = _running(by_rating @ squares)
    dealt = _running(
        by_rating.sum(axis=1, keepdims=True) * (by_rating.sum(axis=0) / len(rated) @ squares)
    )
    # Any constant has the ratio 1. Where nothing is better, the one with the least error.
    always = int(squares.T.dot(by_rating.sum(axis=0)).argmin())
    edge = [0] * always + [len(values)] * (len(SCORES) - 1 - always)
    ratio, cuts = 1.0, (edge[0], edge[1], edge[2], edge[3])
    for _ in range(100):  # it takes about five; the ratio falls every time
        found = _least(error - ratio * dealt)
        if _total(error - ratio * dealt, found) > -1e-9 * len(rated):
            break
        cuts, ratio = found, _total(error, found) / _total(dealt, found)
    else:  # pragma: no cover
        raise AssertionError("the search for cut points does not end")
    edges = [_between(values, index) for index in cuts]
    return edges[0], edges[1], edges[2], edges[3]


def _running(cost: Floats) -> Floats:
    """(m + 1, 5): cost of giving a label to the lowest i values."""
    return np.vstack([np.zeros(cost.shape[1]), np.cumsum(cost, axis=0)])


def _total(running: Floats, cuts: tuple[int, ...]) -> float:
    """Cost of labels that change at the cuts (indices of values)."""
    edges = (0, *cuts, len(running) - 1)
    return float(
        sum(running[edges[k + 1], k] - running[edges[k], k] for k in range(running.shape[1]))
    )


def _least(running: Floats) -> tuple[int, int, int, int]:
    """The rising cuts of least cost; of equally good ones the lowest.

    The total is a sum over the cuts of what the lower label costs more than the higher up to there.
    """
    count = len(running)
    best = np.zeros(count)
    came_from = []
    for k in range(running.shape[1] - 1):
        here = best + running[:, k] - running[:, k + 1]
        best = np.minimum.accumulate(here)
        # Where the minimum stands still, the place where it was first reached.
        fresh = np.concatenate([[True], best[1:] < best[:-1]])
        came_from.append(np.maximum.accumulate(np.where(fresh, np.arange(count), 0)))
    cuts: list[int] = []
    index = count - 1
    for places in reversed(came_from):
        index = int(places[index])
        cuts.append(index)
    a, b, c, d = reversed(cuts)
    return a, b, c, d


def _between(values: Floats, index: int) -> float:
    """A cut below values[index], in the middle of the gap: the next clip may lie a little off."""
    if index == 0:
        return LOWEST_CUT
    if index == len(values):
        return HIGHEST_CUT
    return float((values[index - 1] + values[index]) / 2)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A limit on the probability of 4 or 5, and what it keeps of the clips that it was chosen on."""

    limit: float | None
    """None where no limit reaches the precision."""
    kept: int
    good: int
    best: float
    """The highest precision that any limit reaches, in the same sense (bound or plain share)."""


def choose_limit(
    good: ArrayLike, truth: ArrayLike, precision: float, confidence: float | None = 0.9
) -> Chosen:
    """The lowest limit on the probability of 4 or 5 that reaches a precision: it keeps the most.

    `confidence` is that of the lower Clopper-Pearson bound which must reach the precision; None asks
    for the plain share. Clips of equal probability are kept or left together. The lowest of many
    limits flatters a little, and clips of one prompt are less than as many independent ones: what
    `Threshold.held_out` says is the honest figure.
    """
    probability = np.asarray(good, np.float64).round(DIGITS)
    is_good = np.asarray(truth) >= GOOD
    values, place = np.unique(-probability, return_inverse=True)  # falling
    kept = np.cumsum(np.bincount(place)).astype(np.float64)
    right = np.cumsum(np.bincount(place, weights=is_good)).astype(np.float64)
    reached = lower_bound(right, kept, confidence)
    fitting = np.flatnonzero(reached >= precision)
    best = float(reached.max(initial=0.0))
    if not len(fitting):
        return Chosen(None, 0, 0, best)
    last = int(fitting[-1])
    low = -values[last]
    below = -values[last + 1] if last + 1 < len(values) else None
    limit = 0.0 if below is None else float((low + below) / 2)
    return Chosen(limit, int(kept[last]), int(right[last]), best)


def lower_bound(right: Floats, kept: Floats, confidence: float | None) -> Floats:
    """One-sided lower Clopper-Pearson bound on a share of `right` in `kept`; the share where None.

    Source: Clopper and Pearson 1934, by the quantile of a beta distribution.
    """
    if confidence is None:
        share: Floats = right / np.maximum(kept, 1)
        return share
    from scipy.special import betaincinv

    bound = betaincinv(np.maximum(right, 0.5), kept - right + 1, 1 - confidence)
    return np.where(right > 0, bound, 0.0)


def _threshold(
    clips: _Clips,
    fitted: _Fitted,
    held: _HeldOut,
    precision: float,
    confidence: float | None,
) -> Threshold:
    def good(which: _Clips, by: _Fitted) -> Floats:
        probability: Floats = by(which)[0][:, GOOD - 1 :].sum(axis=1)
        return probability

    chosen = choose_limit(good(clips, fitted), clips.truth, precision, confidence)
    kept = right = of = 0
    for seen, fold, unseen in held:
        limit = choose_limit(good(seen, fold), seen.truth, precision, confidence).limit
        passed = (
            np.zeros(unseen.count, bool)
            if limit is None
            else good(unseen, fold).round(DIGITS) >= limit
        )
        kept += int(passed.sum())
        right += int((unseen.truth[passed] >= GOOD).sum())
        of += unseen.count
    return Threshold(
        precision=precision,
        confidence=confidence,
        limit=chosen.limit,
        kept=chosen.kept / clips.count,
        found=chosen.good / chosen.kept if chosen.kept else None,
        held_out=right / kept if kept and chosen.limit is not None else None,
        held_out_kept=kept / of if of and chosen.limit is not None else None,
        text=_say(chosen, clips, precision, confidence, (right, kept, of)),
    )


def _say(
    chosen: Chosen,
    clips: _Clips,
    precision: float,
    confidence: float | None,
    held: tuple[int, int, int],
) -> str:
    sure = "" if confidence is None else f", sure to {confidence:.4g}"
    if chosen.limit is None:
        base = float((clips.truth >= GOOD).mean())
        return (
            f"no limit keeps clips of which {precision:.4g} are rated 4 or 5{sure}: the best of "
            f"these {clips.count} clips reaches {chosen.best:.4g}, all of them together {base:.4g}. "
            "Rate more clips, lower the precision, or use a better critic"
        )
    text = (
        f"P(4 or 5) >= {chosen.limit:.6g} keeps {chosen.kept / clips.count:.1%} of the clips, of "
        f"which {chosen.good / chosen.kept:.1%} are rated 4 or 5 (wished {precision:.4g}{sure})"
    )
    right, kept, of = held
    if kept:
        text += f"; of prompts unseen by the fit {kept / of:.1%}, of which {right / kept:.1%} are"
    elif of:
        text += "; fitted on a part of the prompts it is out of reach: rate more clips"
    return text


def _held_out(clips: _Clips) -> tuple[int, _HeldOut]:
    """(folds, each with its fit); none where there are too few prompts, or ratings in a fold."""
    found: _HeldOut = []
    for seen, unseen in _folds(clips):
        if len(np.unique(clips.truth[seen])) < 2:
            return 0, []
        part = clips.of(seen)
        found.append((part, _fit(part), clips.of(unseen)))
    return len(found), found


def _folds(clips: _Clips) -> Iterator[tuple[Ints, Ints]]:
    count = min(FOLDS, len(np.unique(clips.groups)))
    if count < 2:
        return
    from sklearn.model_selection import GroupKFold

    yield from GroupKFold(n_splits=count).split(clips.given, groups=clips.groups)


def _figures_held_out(clips: _Clips, held: _HeldOut) -> Figures | None:
    if not held:
        return None
    answers = [fold(unseen) for _, fold, unseen in held]
    return _figures(
        np.concatenate([tempered for tempered, _ in answers]),
        np.concatenate([label for _, label in answers]),
        np.concatenate([unseen.truth for _, _, unseen in held]),
    )


def _figures(probabilities: Floats, label: Ints, truth: Ints) -> Figures:
    likeliest = probabilities.argmax(axis=1) + SCORES[0]
    return Figures(
        nll=_nll(probabilities, truth),
        ece_argmax=calibration_error(probabilities.max(axis=1), likeliest == truth),
        ece_good=calibration_error(probabilities[:, GOOD - 1 :].sum(axis=1), truth >= GOOD),
        mae=float(np.abs(expectations(probabilities) - truth).mean()),
        accuracy=float((label == truth).mean()),
        kappa=weighted_kappa(truth, label),
    )


def _nll(probabilities: Floats, truth: NDArray[np.int64]) -> float:
    return float(-np.log(probabilities[np.arange(len(truth)), truth - SCORES[0]]).mean())


def calibration_error(probability: Floats, happened: NDArray[np.bool_]) -> float:
    """Mean distance, over ten equal bins and weighted by clips, of probability and frequency.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    # (low, high], as in pipeline/critic/metrics.py; rounded, for 0.1 * 3 is a little above 0.3.
    bins = np.clip(np.ceil((probability * BINS).round(DIGITS)).astype(np.int64) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=probability - happened, minlength=BINS)
    return float(np.abs(gaps).sum() / len(probability))


def weighted_kappa(truth: Ints, label: Ints) -> float:
    """Quadratic weighted kappa: 1 agreement, 0 chance, also where all are the same (Cohen 1968)."""
    error = float(((truth - label) ** 2).sum())
    counts = np.bincount(truth, minlength=SCORES[-1] + 1)
    distance = (np.arange(len(counts))[:, None] - label[None, :]) ** 2
    dealt = float(counts @ distance.sum(axis=1)) / len(truth)
    return 1 - error / dealt if dealt > 0 else 0.0


def _remarks(clips: _Clips, fitted: _Fitted) -> Iterator[str]:
    if fitted.temperature > 0.99 * HOTTEST:
        yield (
            "the temperature is at its upper end: the critic's probabilities say next to nothing "
            "of these ratings"
        )
    if fitted.temperature < 1.01 * COLDEST:
        yield "the temperature is at its lower end: are these the clips that the critic learned on?"
    given = set(fitted(clips)[1].tolist())
    never = [str(score) for score in SCORES if score not in given]
    if never:
        yield f"the label is never {' or '.join(never)}: the ratings give no reason for it"


def _rounded(truth: Floats) -> Ints:
    return np.floor(truth + 0.5).astype(np.int64)


def _counts(truth: Ints) -> tuple[int, int, int, int, int]:
    a, b, c, d, e = (int((truth == score).sum()) for score in SCORES)
    return a, b, c, d, e
