"""Text that stays at the same place in the image, followed without OCR.

Once the detector has found a box, its strokes are known: the gradient under the box. In every later
frame the strokes are there or not, which a projection tells for a fraction of the detector's price
and more sharply than the overlap of two detections: text that moved by a stroke's width is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from winnow.operators.text_gate import Box, Gradient

PRESENT = 0.6
"""Least share of the known strokes that must be there for text to count as present."""
GAP = 1
"""Sampled frames that a track may miss (a flash, a passing object) without ending."""


def presence(strokes: Gradient, seen: Gradient) -> float:
    """How much of the known strokes a gradient contains: 1 all of it, about 0 another picture.

    The projection on the strokes; what the scene adds between them does not count.
    """
    energy = float(np.vdot(strokes, strokes))
    return float(np.vdot(strokes, seen)) / energy if energy > 0 else 0.0


def likeness(one: Gradient, other: Gradient) -> float:
    """How alike two gradients are: 1 equal; anything new in either of them lowers it."""
    energy = max(float(np.vdot(one, one)), float(np.vdot(other, other)))
    return float(np.vdot(one, other)) / energy if energy > 0 else 0.0


@dataclass(slots=True)
class Track:
    """One text box at one place, from sampled frame `first` to sampled frame `last`."""

    box: Box
    strokes: Gradient
    first: int
    last: int
    score: float
    stillness: list[float] = field(default_factory=list)
    """How still the rest of the picture was, for every step of this track."""

    @property
    def samples(self) -> int:
        return self.last - self.first + 1

    def follow(self, number: int, seen: Gradient, stillness: float) -> bool:
        """Look for the text in sampled frame `number`; False when the track has ended."""
        if presence(self.strokes, self.box.within(seen)) >= PRESENT:
            self.last = number
            self.stillness.append(stillness)
        return number - self.last <= GAP


@dataclass(slots=True)
class Region:
    """A candidate region that the detector has seen, so that it need not see it again."""

    box: Box
    strokes: Gradient
    first: int
    looks: int = 1

    def same(self, box: Box, seen: Gradient) -> bool:
        """Whether a candidate of a later frame is this region with the same picture in it."""
        covered = self.box.intersection(box).area >= 0.7 * box.area
        return covered and likeness(self.strokes, self.box.within(seen)) >= PRESENT


def union_share(boxes: list[Box], width: int, height: int) -> float:
    """Share of a frame that some boxes cover together, 0..1."""
    covered: NDArray[np.bool_] = np.zeros((height, width), np.bool_)
    for box in boxes:
        covered[box.top : box.bottom, box.left : box.right] = True
    return float(covered.mean())
