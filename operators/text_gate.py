"""Where in a frame text may be, found without any model, so that OCR sees only those windows.

Text is a dense row of strokes, and a stroke has two sides: within the width of a few letters the
horizontal gradient is strong in both directions, about equally. Foliage and fabric have that too;
overlay text has it at the same place in the next sampled frame, whatever the scene does, and stands
out of the texture around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

Pixel = TypeVar("Pixel", bound=np.generic)
Gradient = NDArray[np.float32]
"""(2, h, w): horizontal and vertical derivative of luma, in grey levels per pixel."""
Map = NDArray[np.float32]
"""(h, w): one value per pixel or per cell."""

EDGE = 5.0
"""Grey levels per pixel under which a gradient is coding noise, not a stroke."""
DENSITY = 1.5
"""Least density of strokes (see `stroke_density`) that may be text; faint watermarks reach 2."""
HIGHEST = 0.3
"""Share of the frame's height above which a dense region is texture and not a line of text."""
STANDS_OUT = 1.6
"""Least density of text on texture as a multiple of the texture's median."""
ROUNDS = 3
"""How often a threshold is raised at most."""
VAIN = 2
"""After so many searches without a find, a place is searched again only if denser than ever."""
DENSER = 1.1
"""What denser means, as a multiple of the densest that was searched in vain."""
FAMILIAR = 0.6
"""Least likeness of a place to what was there when it was last searched, for not searching again."""
CELL = 4
"""Maps are kept on a grid of square cells of about this many pixels."""
NEIGHBOURHOOD = (7, 3)
"""Width and height in cells over which strokes are counted: a few letters of small text."""
SMALLEST = 6
"""A candidate has at least so many cells; one short word has more."""
CONTEXT = 32
"""Pixels around a candidate that the detector is shown."""
STRIDE = 32
"""The detector works on sizes that are multiples of this."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels, right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def area(self) -> int:
        return max(0, self.width) * max(0, self.height)

    def within(self, image: NDArray[Pixel]) -> NDArray[Pixel]:
        """The part of an image, or of a stack of images, under the box."""
        return image[..., self.top : self.bottom, self.left : self.right]

    def moved(self, right: int, down: int) -> Box:
        return Box(self.left + right, self.top + down, self.right + right, self.bottom + down)

    def intersection(self, other: Box) -> Box:
        return Box(
            max(self.left, other.left),
            max(self.top, other.top),
            min(self.right, other.right),
            min(self.bottom, other.bottom),
        )

    def hull(self, other: Box) -> Box:
        return Box(
            min(self.left, other.left),
            min(self.top, other.top),
            max(self.right, other.right),
            max(self.bottom, other.bottom),
        )

    def overlap(self, other: Box) -> float:
        """Intersection over union, 0..1."""
        common = self.intersection(other).area
        return common / (self.area + other.area - common) if common else 0.0

    def padded(self, pixels: int, width: int, height: int) -> Box:
        """Grown on every side, kept inside a frame of the given size."""
        return Box(
            max(0, self.left - pixels),
            max(0, self.top - pixels),
            min(width, self.right + pixels),
            min(height, self.bottom + pixels),
        )


def gradient(luma: NDArray[np.uint8]) -> Gradient:
    """Derivative of (h, w) luma as (2, h, w) float32, in grey levels per pixel."""
    # Scharr sums to 32 over a step of one grey level per pixel.
    horizontal = cv2.Scharr(luma, cv2.CV_32F, 1, 0, scale=1 / 32)
    vertical = cv2.Scharr(luma, cv2.CV_32F, 0, 1, scale=1 / 32)
    return np.stack([horizontal, vertical])


def steady(one: Gradient, other: Gradient) -> Gradient:
    """What two frames' gradients have in common: their mean where they agree, zero elsewhere.

    They agree where they differ by less than half of the weaker one.
    """
    weaker = np.minimum(_energy(one), _energy(other))
    agree = (_energy(one - other) < 0.25 * weaker) & (weaker > EDGE**2)
    return (one + other) * (np.float32(0.5) * agree.astype(np.float32))


def edge_energy(field: Gradient) -> float:
    """Sum of the squared gradient over all edges; coding noise does not count."""
    energy = _energy(field)
    return float(energy[energy > EDGE**2].sum())


def _energy(field: Gradient) -> Map:
    return np.asarray(field[0] ** 2 + field[1] ** 2, np.float32)


def in_cells(image: Map) -> Map:
    """The mean of every cell and its neighbourhood."""
    height, width = image.shape
    size = (max(1, width // CELL), max(1, height // CELL))
    cells = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.boxFilter(cells, -1, NEIGHBOURHOOD), np.float32)


def stroke_density(field: Gradient) -> Map:
    """Per cell how much stroke there is around it: high in text, near zero at plain edges.

    The mean horizontal gradient of the weaker of a stroke's two sides, in grey levels per pixel.
    """
    horizontal = field[0]
    rising = in_cells(np.maximum(horizontal, np.float32(0)))
    falling = in_cells(np.maximum(-horizontal, np.float32(0)))
    return np.asarray(cv2.min(rising, falling), np.float32)


class Searched:
    """What the detector has been shown of a clip, so that it need not look at the same thing twice.

    For every place the picture that was searched there last, how often it was searched in vain, and
    how dense the densest texture was that turned out to be no text.
    """

    def __init__(self, height: int, width: int) -> None:
        cells = (max(1, height // CELL), max(1, width // CELL))
        self._picture: Gradient = np.zeros((2, height, width), np.float32)
        self._vain = np.zeros(cells, np.int32)
        self._texture: Map = np.zeros(cells, np.float32)

    def remember(self, window: Box, field: Gradient, found: bool) -> None:
        """The detector was shown a window of a steady gradient, and found text in it or not."""
        window.within(self._picture)[...] = window.within(field)
        if found:
            return
        density = stroke_density(window.within(field))
        place = Box(
            window.left // CELL, window.top // CELL, -(-window.right // CELL),
            -(-window.bottom // CELL),
        )  # fmt: skip
        place.within(self._vain)[...] += 1
        texture = place.within(self._texture)
        np.maximum(texture, density.max(initial=0), out=texture)

    def knows(self, field: Gradient, density: Map) -> NDArray[np.bool_]:
        """Per cell whether searching there (again) is idle."""
        last = self._picture
        common = in_cells(field[0] * last[0] + field[1] * last[1])
        same = common >= FAMILIAR * in_cells(np.maximum(_energy(field), _energy(last)))
        hopeless = (self._vain >= VAIN) & (density <= DENSER * self._texture)
        return same | hopeless


def candidates(field: Gradient, searched: Searched) -> list[Box]:
    """Regions of a steady gradient (2, h, w) that may hold text and have not been searched yet.

    Boxes, in pixels, around connected stretches of dense strokes.
    """
    height, width = field.shape[1:]
    density = stroke_density(field)
    dense = _standing_out(density)
    if not dense.any():
        return []
    dense[searched.knows(field, density)] = 0
    _, _, stats, _ = cv2.connectedComponentsWithStats(dense)
    across, down = width / density.shape[1], height / density.shape[0]
    return [
        Box(
            int(left * across),
            int(top * down),
            int(np.ceil((left + wide) * across)),
            int(np.ceil((top + high) * down)),
        ).padded(0, width, height)
        for left, top, wide, high, cells in stats[1:].tolist()
        if cells >= SMALLEST
    ]


def _standing_out(density: Map) -> NDArray[np.uint8]:
    """Cells dense enough for text, 1 or 0.

    A line of text is not high. A dense region that is higher is texture, and text on it must stand
    out of it: its threshold is raised until what is left is gone or no higher than text.
    """
    dense: NDArray[np.uint8] = (density > DENSITY).astype(np.uint8)
    highest = HIGHEST * density.shape[0]
    for _ in range(ROUNDS):
        _, labels, stats, _ = cv2.connectedComponentsWithStats(dense)
        high = [k for k in range(1, len(stats)) if stats[k, cv2.CC_STAT_HEIGHT] > highest]
        if not high:
            break
        for k in high:
            region = labels == k
            level = STANDS_OUT * float(np.median(density[region]))
            dense[region & (density <= level)] = 0
    return dense


def windows(boxes: list[Box], width: int, height: int) -> list[Box]:
    """Windows for the detector around some boxes, joined where that costs few more pixels."""
    joined: list[Box] = []
    for box in boxes:
        window = _window(box, width, height)
        # A joined window may reach another one: go on until nothing joins it.
        while near := [w for w in joined if _worth_joining(w, window)]:
            joined = [w for w in joined if w not in near]
            for other in near:
                window = window.hull(other)
        joined.append(window)
    return joined


def _worth_joining(one: Box, other: Box) -> bool:
    return one.hull(other).area <= 1.1 * (one.area + other.area)


def _window(box: Box, width: int, height: int) -> Box:
    """The box with its context, in the network's stride, inside the frame."""
    box = box.padded(CONTEXT, width, height)
    left, right = _in_strides(box.left, box.right, width)
    top, bottom = _in_strides(box.top, box.bottom, height)
    return Box(left, top, right, bottom)


def _in_strides(start: int, end: int, limit: int) -> tuple[int, int]:
    length = min(limit, -(-(end - start) // STRIDE) * STRIDE)
    start = max(0, min(start, limit - length))
    return start, start + length
