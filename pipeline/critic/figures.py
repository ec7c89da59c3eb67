"""The figures of an evaluation, from its lines: what results.json holds."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from winnow.operators.critic.judgement import SCORES
from winnow.pipeline.critic.bootstrap import intervals
from winnow.pipeline.critic.datasets import Dataset
from winnow.pipeline.critic.metrics import (
    LOWER_IS_BETTER,
    SCALARS,
    Floats,
    Judged,
    Metrics,
    Subset,
    as_table,
    baselines,
    by,
    constant,
    measure,
    value,
)
from winnow.pipeline.critic.results import Line
from winnow.pipeline.critic.seeds import seeds

CHANCE = {"pearson": 0.0, "pearson_argmax": 0.0, "spearman": 0.0, "spearman_argmax": 0.0, "kappa": 0.0,
          "bad.auroc": 0.5, "good.auroc": 0.5}  # fmt: skip
"""What a judge that has not looked reaches where its own figure is not defined."""
PACKAGES = ("winnow-video", "numpy", "scipy", "scikit-learn", "torch", "transformers", "openai", "vllm",
            "av")  # fmt: skip


def figures(lines: Sequence[Line], dataset: Dataset) -> dict[str, Any]:
    """Everything that can be said of the lines, as plain data.

    A line without a score counts as wrong wherever a figure is over all videos, whatever the reason.
    """
    truth = np.array([line.truth for line in lines])
    judged = as_judged(lines)
    statuses = [line.status for line in lines]
    metrics = measure(truth, judged, statuses=statuses)
    return {
        "coverage": {
            "examples": len(dataset.examples),
            "without_truth": sum(example.truth is None for example in dataset.examples),
            "chosen": metrics.n,
            "judged": metrics.judged,
            "failures": metrics.failures,
            "problems": [str(problem) for problem in dataset.problems],
        },
        "metrics": asdict(metrics),
        "intervals": {
            name: asdict(interval)
            for name, interval in intervals(truth, judged, [line.group for line in lines]).items()
        },
        "baselines": {name: as_table(one) for name, one in baselines(truth).items()},
        "best_blind": best_blind(truth),
        "generators": subsets(by(truth, judged, [ln.generator for ln in lines], statuses=statuses)),
        "actions": subsets(by(truth, judged, [ln.action for ln in lines], statuses=statuses)),
        "hard": subsets(by(truth, judged, [_hardness(ln) for ln in lines], statuses=statuses)),
        "seeds": seeds(lines),
        "modes": dict(sorted(Counter(ln.mode for ln in lines if ln.status == "ok").items())),
        "versions": versions(),
    }


def best_blind(truth: Floats) -> dict[str, float]:
    """The best that can be had of each figure without looking at a video, one and the same answer
    for all of them: always the same score, or the frequencies of the truth."""
    n = len(truth)
    judges = [measure(truth, constant(n, score)) for score in SCORES]
    judges += baselines(truth).values()
    best: dict[str, float] = {}
    for name in SCALARS:
        reached = [found for one in judges if (found := value(one, name)) is not None]
        if name in CHANCE:
            reached.append(CHANCE[name])
        if reached:
            best[name] = min(reached) if name in LOWER_IS_BETTER else max(reached)
    return best


def as_judged(lines: Sequence[Line]) -> Judged:
    """The scores of the lines, in order; what has none is unjudged."""
    n = len(lines)
    expectation, argmax = np.full(n, np.nan), np.zeros(n, np.int64)
    probabilities = np.full((n, 5), np.nan)
    for row, line in enumerate(lines):
        if line.status == "ok":
            expectation[row], argmax[row] = line.score or 0.0, line.argmax or 0
            probabilities[row] = line.probabilities
    return Judged(expectation, argmax, probabilities)


def subsets(found: Sequence[Subset]) -> list[dict[str, Any]]:
    """Subsets as plain data; [] where nothing has a label."""
    if all(subset.label is None for subset in found):
        return []
    return [{"label": one.label, "is_small": one.is_small, **brief(one.metrics)} for one in found]


def brief(metrics: Metrics) -> dict[str, Any]:
    """The figures that are one number, with the counts that they are of."""
    scores = np.arange(1, 6)
    return {
        "n": metrics.n,
        "judged": metrics.judged,
        "failures": metrics.failures,
        "truth_mean": float(scores @ metrics.truth_counts / metrics.n) if metrics.n else None,
        **as_table(metrics),
    }


def versions() -> dict[str, str]:
    """Of what made the scores and the figures, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardness(line: Line) -> str | None:
    return None if line.is_hard is None else "hard" if line.is_hard else "other"
