"""Sharpness and block edges, from frames of native height."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.operators.errors import MeasureError
from winnow.operators.frames import shrink
from winnow.operators.operator import (
    ClipView,
    Column,
    FrameChunk,
    Measurement,
    Needs,
    Operator,
    Sampling,
)

TILES = 8  # a side
SMALLEST_TILE = 8  # pixels a side; frames with less are judged as one tile
# Energy of the coarse Laplacian that coding noise reaches by itself in a heavily blurred picture:
# without it, the noise that the blur left alone would read as fine detail.
NOISE = 64.0
BLOCK = 8


def detail_ratio(luma: NDArray[np.uint8], height: int) -> float:
    """How much fine detail a frame has for the coarse detail it has.

    Energy of the Laplacian at the common `height` over that of the same frame at half the size, in
    the quarter of the tiles with the most coarse detail: a background out of focus is no defect,
    and contrast, which scales both energies, matters only where noise is as strong.
    """
    rows, columns = luma.shape
    scale = min(1.0, height / rows)
    fine = shrink(luma, (max(1, round(columns * scale)), max(1, round(rows * scale))))
    rows, columns = fine.shape
    if min(rows, columns) < 2:
        return 0.0
    coarse = shrink(fine, (columns // 2, rows // 2))
    tiles = TILES if min(coarse.shape) >= TILES * SMALLEST_TILE else 1
    fine_energy = _laplacian_energy(fine, tiles)
    coarse_energy = _laplacian_energy(coarse, tiles)
    count = max(1, len(coarse_energy) // 4)
    judged = np.argpartition(coarse_energy, -count)[-count:]
    return float(fine_energy[judged].mean() / (coarse_energy[judged].mean() + NOISE))


def _laplacian_energy(luma: NDArray[np.uint8], tiles: int) -> NDArray[np.float32]:
    """(tiles * tiles,) mean squared Laplacian of each tile, without what is left at the edges."""
    rows, columns = luma.shape
    laplacian = cv2.Laplacian(luma, cv2.CV_16S)[: rows // tiles * tiles, : columns // tiles * tiles]
    squared = cv2.multiply(laplacian, laplacian, dtype=cv2.CV_32F)
    energy = cv2.resize(squared, (tiles, tiles), interpolation=cv2.INTER_AREA)
    return np.asarray(energy, np.float32).ravel()


def blockiness(luma: NDArray[np.uint8]) -> float:
    """Mean step across the lines of the 8-pixel grid over that across all other lines, less 1.

    The stronger of the two axes; 0 where the grid does not show, or the frame is flat.
    """
    shown = [0.0]
    if min(luma.shape) < 2 * BLOCK:
        return 0.0
    for step, axis in (
        (cv2.absdiff(luma[:, 1:], luma[:, :-1]), 0),
        (cv2.absdiff(luma[1:], luma[:-1]), 1),
    ):
        lines = cv2.reduce(step, axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel()
        on_grid = np.arange(len(lines)) % BLOCK == BLOCK - 1
        between = lines[~on_grid].mean()
        if between > 0:
            shown.append(float(lines[on_grid].mean() / between) - 1)
    return max(shown)


@dataclass(frozen=True)
class Sharpness(Operator):
    """Sharpness of sampled frames, apart from their contrast and from their resolution.

    Blur is judged relative to the frame: the same scene blurred by 1 % of its height reads the same
    at 480 and at 1080 lines. Raises MeasureError for a clip of which no frame was sampled.
    """

    name: ClassVar[str] = "sharpness"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "sharpness_mean",
            pa.float64(),
            "fine over coarse detail where the frame has most of it, mean over the sampled frames",
            unit="ratio of energies",
            range="0 flat, below 0.13 blurred, 0.2..0.6 usual, 1 noise",
            direction="higher is better",
            source="variance of Laplacian (Pech-Pacheco et al. 2000), as a ratio of two scales",
        ),
        Column(
            "sharpness_min",
            pa.float64(),
            "the same of the least sharp sampled frame",
            unit="ratio of energies",
            range="0..",
            direction="higher is better",
        ),
        Column(
            "sharpness_blockiness",
            pa.float64(),
            "how much stronger steps are on the 8-pixel grid than between, mean over the frames",
            unit="relative excess",
            range="0 no grid, 0.2 visible blocks",
            direction="lower is better",
            source="after Wang, Bovik and Evan 2000",
        ),
    )

    rate: float = 2.0
    """Frames a second to look at."""
    height: int = 240
    """Height at which fine detail is judged."""

    @property
    def needs(self) -> Needs:
        return Needs(samples=(self._sampling,))

    @property
    def _sampling(self) -> Sampling:
        return Sampling(self.rate, "luma", minimum=4)

    def start(self, view: ClipView) -> Measurement:
        return _SharpnessMeasurement(self._sampling, self.height)


class _SharpnessMeasurement(Measurement):
    def __init__(self, sampling: Sampling, height: int) -> None:
        self._sampling = sampling
        self._height = height
        self._ratios: list[float] = []
        self._blockiness = 0.0

    def update(self, chunk: FrameChunk) -> None:
        for sample in chunk.samples.get(self._sampling, ()):
            self._ratios.append(detail_ratio(sample.image, self._height))
            self._blockiness += blockiness(sample.image)

    def columns(self) -> dict[str, Any]:
        if not self._ratios:
            raise MeasureError("no frame of the clip was sampled")
        return {
            "sharpness_mean": float(np.mean(self._ratios)),
            "sharpness_min": min(self._ratios),
            "sharpness_blockiness": self._blockiness / len(self._ratios),
        }
