"""What the critic says of one clip, and the arithmetic of five probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

SCORES = (1, 2, 3, 4, 5)
"""The scale of VideoPhy-2: 1 numerous violations of physics, 5 none."""
CHOICES = tuple(str(score) for score in SCORES)

Status = Literal["ok", "unparsed", "refused", "error", "unscored"]
"""`unscored`: the budget was spent before; that is no pass."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The critic's word on one clip. Without status `ok` there is no score, and none is made up."""

    status: Status
    probabilities: tuple[float, ...] | None = None
    """Of the scores 1 to 5, summing to 1: of the first token in direct mode, of the samples' votes in
    reasoning mode."""
    leaked: float | None = None
    """Direct mode: probability that the model gave to anything but a score."""
    trace: str | None = None
    """Reasoning mode: the text of the first sample that led to a score."""
    samples: tuple[int | None, ...] = ()
    """Reasoning mode: the score of each sample, None where it had none."""
    mode: Literal["direct", "reasoning"] = "direct"
    """The mode that the score comes from; of a cascade the last one that was used."""
    error: str | None = None
    fps: float = 0.0
    frames: int = 0
    pixels: int = 0
    """Of one frame."""
    prompt: str = ""
    """Name and hash."""
    model: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = field(default=())
    """For people: e.g. that a reasoning was wished and the budget did not allow it."""

    @property
    def score(self) -> float | None:
        """The expectation, 1..5."""
        return None if self.probabilities is None else expectation(self.probabilities)

    @property
    def argmax(self) -> int | None:
        """The likeliest score; of equally likely ones the lowest."""
        found = self.probabilities
        if found is None:
            return None
        return SCORES[max(range(len(SCORES)), key=lambda k: (found[k], -k))]

    @property
    def entropy(self) -> float | None:
        """Uncertainty in nats, 0..ln 5."""
        return None if self.probabilities is None else entropy(self.probabilities)


def expectation(probabilities: Sequence[float]) -> float:
    """Sum of score times probability, 1..5."""
    return math.fsum(s * p for s, p in zip(SCORES, probabilities, strict=True))


def entropy(probabilities: Sequence[float]) -> float:
    """In nats, 0..ln 5."""
    return -math.fsum(p * math.log(p) for p in probabilities if p > 0)
