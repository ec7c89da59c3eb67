"""Cuts a clip's sampled frames into windows of a few seconds, each short enough for one request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from winnow.operators.operator import Sample

SLACK = 0.02
"""A clip this much longer than whole windows has no window more: 121 frames at 24/s are 5 s."""


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive sampled frames of a clip; times are seconds from the clip's first frame."""

    number: int
    """Place of the window in the clip, from 0."""
    start_s: float
    end_s: float
    """Exclusive, but for the last window of a clip."""
    samples: tuple[Sample, ...]


def cut(
    samples: Sequence[Sample], duration_s: float, longest_s: float, most: int | None = None
) -> list[Window]:
    """Windows of equal length, `longest_s` at most, that together cover the clip.

    `samples` are in the order of time. A window has at least one of them: where frame times are so
    uneven that none falls into a window, that number is missing. Of more than `most` samples in one
    window (uneven times again), `most` are taken, evenly.
    """
    if not samples:
        return []
    length_s = max(duration_s, samples[-1].seconds)
    count = max(1, math.ceil(length_s / longest_s - SLACK))
    edges = [length_s * (number / count) for number in range(count + 1)]
    seconds = [sample.seconds for sample in samples]
    firsts = [0, *np.searchsorted(seconds, edges[1:-1]).tolist(), len(samples)]
    return [
        Window(number, edges[number], edges[number + 1], _thinned(samples[first:end], most))
        for number, (first, end) in enumerate(pairwise(firsts))
        if end > first
    ]


def _thinned(samples: Sequence[Sample], most: int | None) -> tuple[Sample, ...]:
    if most is None or len(samples) <= most:
        return tuple(samples)
    return tuple(samples[int((number + 0.5) * len(samples) / most)] for number in range(most))
