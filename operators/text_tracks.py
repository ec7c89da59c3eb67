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
"""Least likeness to the known strokes at which text counts as present."""
GAP = 1
"""Sampled frames that text may miss (a flash, a passing object) without having been away."""
CORNER = 0.15
"""Distance from two edges of the frame, as a share of its sides, within which a corner box begins."""
CORNER_WIDTH = 0.45
"""Greatest width of a corner box as a share of the frame's; a wider one is a line of text."""
CAPTION_TOP = 0.7
"""Share of the frame's height below which captions and lower thirds lie."""


def presence(strokes: Gradient, seen: Gradient) -> float:
    """How much a gradient runs along known strokes: 1 the same strokes, about 0 another picture.

    The cosine between the two where the strokes are; what the scene adds between them does not
    count, nor does the contrast, which changes with what lies behind the text.
    """
    behind = np.where(strokes != 0, seen, np.float32(0))
    scale = float(np.sqrt(np.vdot(strokes, strokes) * np.vdot(behind, behind)))
    return float(np.vdot(strokes, behind)) / scale if scale > 0 else 0.0


@dataclass(slots=True)
class Track:
    """One text box at one place in a frame of `width` by `height` pixels."""

    box: Box
    width: int
    height: int
    strokes: Gradient
    """The gradient under the box when the text was found."""
    numbers: list[int]
    """The sampled frames in which the text is there, in order."""
    stillness: list[float] = field(default_factory=list)
    """How still the rest of the picture was when the text was there, from where it was found."""

    def follow(self, number: int, seen: Gradient) -> None:
        """Look for the text in the gradient of sampled frame `number`."""
        if presence(self.strokes, self.box.within(seen)) >= PRESENT:
            self.numbers.append(number)

    @property
    def longest(self) -> int:
        """Most sampled frames in a row with the text in them, short gaps bridged."""
        best = run = 1
        for before, number in zip(self.numbers, self.numbers[1:], strict=False):
            gap = number - before
            run = run + gap if gap <= 1 + GAP else 1
            best = max(best, run)
        return best

    @property
    def in_corner(self) -> bool:
        """Whether the box lies where watermarks lie: small, near two edges of the frame."""
        left, top, right, bottom = self._shares()
        beside = min(left, 1 - right) <= CORNER and right - left <= CORNER_WIDTH
        return beside and min(top, 1 - bottom) <= CORNER

    @property
    def in_caption_place(self) -> bool:
        """Whether the box lies where captions and lower thirds lie: low in the frame."""
        _, top, _, bottom = self._shares()
        return (top + bottom) / 2 >= CAPTION_TOP

    def is_overlay(self, still: float) -> bool:
        """Whether the text lies on the picture and not in the scene.

        Text that stays while the scene moves does. In a still picture (stillness from `still` on)
        only its place can tell.
        """
        moves = not self.stillness or float(np.mean(self.stillness)) < still
        return moves or self.in_corner or self.in_caption_place

    def _shares(self) -> tuple[float, float, float, float]:
        box = self.box
        return (
            box.left / self.width, box.top / self.height,
            box.right / self.width, box.bottom / self.height,
        )  # fmt: skip


def union_share(boxes: list[Box], width: int, height: int) -> float:
    """Share of a frame that some boxes cover together, 0..1."""
    covered: NDArray[np.bool_] = np.zeros((height, width), np.bool_)
    for box in boxes:
        covered[box.top : box.bottom, box.left : box.right] = True
    return float(covered.mean())
