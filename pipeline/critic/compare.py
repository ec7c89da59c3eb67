"""`winnow critic compare A B`: two evaluations of the same videos, paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from winnow.operators.errors import ConfigError
from winnow.pipeline.critic.bootstrap import COMPARED, Comparison
from winnow.pipeline.critic.bootstrap import compare as compare_judged
from winnow.pipeline.critic.figures import as_judged
from winnow.pipeline.critic.results import HEADER, RESULTS, Line, read_json, read_lines


def compare(a: Path, b: Path, names: Sequence[str] = COMPARED) -> dict[str, Any]:
    """What the evaluation in the folder `b` gains over that in `a`, as plain data.

    Of the videos that both have; how many only one has is said. Raises ConfigError where a folder
    holds no finished evaluation, or the two are of different data.
    """
    headers = [read_json(folder, HEADER) for folder in (a, b)]
    for folder in (a, b):
        read_json(folder, RESULTS)
    if headers[0].get("fingerprint") != headers[1].get("fingerprint"):
        raise ConfigError(
            f"{a} is of the data set {headers[0].get('dataset')} and {b} of "
            f"{headers[1].get('dataset')}, with other videos, truths or captions: two critics "
            "compare on the same data only"
        )
    of_a, of_b = ({line.example_id: line for line in read_lines(folder)} for folder in (a, b))
    both = sorted(of_a.keys() & of_b.keys())
    if not both:
        raise ConfigError(f"{a} and {b} have no video in common")
    lines_a, lines_b = [of_a[key] for key in both], [of_b[key] for key in both]
    _check_truths(lines_a, lines_b)
    comparison = compare_judged(
        np.array([line.truth for line in lines_a]),
        as_judged(lines_a),
        as_judged(lines_b),
        [line.group for line in lines_a],
        names,
        ids=(both, [line.example_id for line in lines_b]),
    )
    return {
        "a": _side(a, headers[0], len(of_a.keys() - of_b.keys())),
        "b": _side(b, headers[1], len(of_b.keys() - of_a.keys())),
        "dataset": headers[0].get("dataset"),
        **asdict(comparison),
        "verdict": verdict(comparison),
    }


def verdict(comparison: Comparison, level: float = 0.05) -> str:
    """One sentence: in which figures the two differ by more than chance."""
    sure = [d for d in comparison.differences if d.p_holm is not None and d.p_holm < level]
    if not sure:
        return "No figure differs by more than chance may explain."
    told = ", ".join(f"{d.metric} {d.difference:+.3f}" for d in sure)
    return f"B differs from A by more than chance (Holm, {level:g}): {told}."


def _check_truths(lines_a: Sequence[Line], lines_b: Sequence[Line]) -> None:
    other = [a for a, b in zip(lines_a, lines_b, strict=True) if a.truth != b.truth]
    if other:
        raise ConfigError(
            f"{len(other)} videos, such as {other[0].example_id}, have another truth in either "
            "evaluation: one of the two files was changed"
        )


def _side(folder: Path, header: dict[str, Any], alone: int) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "model": header.get("model"),
        "prompt": header.get("prompt"),
        "mode": header.get("mode"),
        "videos_of_this_one_only": alone,
    }
