"""The geometry of the critic's charts: plain SVG that the page styles, as in report_charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.operators.critic.judgement import SCORES

SIDE, MARGIN = 240.0, 26.0
WIDTH, HEIGHT, TOP, GROUND = 360.0, 170.0, 20.0, 146.0
BINS = 16
"""Of the expectation, 1..5 in quarters."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar with its count above and a text for who points at it."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    count: int
    tip: str


@dataclass(frozen=True, slots=True)
class Dot:
    """A bin of a reliability diagram; its area grows with its examples."""

    x: float
    y: float
    radius: float
    tip: str


def distribution(truth: Sequence[int], predicted: Sequence[int]) -> list[Bar]:
    """For every score the truths and the predictions side by side, and the unjudged at the end."""
    top = max([*truth, *predicted, 1])
    pitch = WIDTH / (len(SCORES) + 1)
    bars = []
    for place, label in enumerate([*(str(score) for score in SCORES), "unjudged"]):
        pair = (("truth", truth[place]),) if place < len(truth) else ()
        for kind, count in (*pair, ("predicted", predicted[place])):
            height = _height(count, top)
            left = place * pitch + pitch * 0.12 + (pitch * 0.38 if kind == "predicted" else 0.0)
            words = "people said" if kind == "truth" else "the critic said"
            bars.append(
                Bar(
                    left, GROUND - height, pitch * 0.34, height, kind, count,
                    f"{words} {label}: {count}" if place < len(truth) else f"unjudged: {count}",
                )
            )  # fmt: skip
    return bars


def expectations(scores: Sequence[float]) -> list[Bar]:
    """Histogram of the scores 1..5, in quarters."""
    counts = [0] * BINS
    step = (SCORES[-1] - SCORES[0]) / BINS
    for score in scores:
        counts[min(BINS - 1, max(0, math.floor((score - SCORES[0]) / step)))] += 1
    top, pitch = max([*counts, 1]), WIDTH / BINS
    return [
        Bar(
            k * pitch + 0.5, GROUND - _height(count, top), pitch - 1, _height(count, top),
            "predicted", count, f"{1 + k * step:g} to {1 + (k + 1) * step:g}: {count}",
        )
        for k, count in enumerate(counts)
    ]  # fmt: skip


def reliability(bins: Sequence[Mapping[str, Any]]) -> list[Dot]:
    """The bins that hold examples; x predicted, y observed, in a square of SIDE with MARGIN."""
    most = max((one["n"] for one in bins), default=0)
    return [
        Dot(
            place(one["predicted"]),
            SIDE - place(one["observed"]),
            3 + 8 * math.sqrt(one["n"] / most),
            f"{one['n']} videos: predicted {one['predicted']:.2f}, observed {one['observed']:.2f}",
        )
        for one in bins
        if one["n"]
    ]


def place(share: float) -> float:
    """0..1 along an axis of the square."""
    return MARGIN + share * (SIDE - 2 * MARGIN)


def _height(count: int, top: int) -> float:
    # One video among thousands must still be seen.
    return max((GROUND - TOP) * count / top, 1.5) if count else 0.0
