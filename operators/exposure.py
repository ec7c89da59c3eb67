"""Brightness, clipping, contrast and flicker of a clip, from small luma."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.operators.errors import MeasureError
from winnow.operators.operator import ClipView, Column, FrameChunk, Measurement, Needs, Operator

LEVELS = np.arange(256) / 255


@dataclass(frozen=True)
class Exposure(Operator):
    """Exposure of all frames of a clip. Black borders count: they are part of the picture."""

    name: ClassVar[str] = "exposure"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "exposure_mean",
            pa.float64(),
            "mean luma",
            unit="share of full scale",
            range="0 black..1 white",
        ),
        Column(
            "exposure_black",
            pa.float64(),
            "share of the pixels that are no brighter than `black`",
            unit="share",
            range="0..1",
            direction="lower is better",
            source="ffmpeg blackdetect's pix_th",
        ),
        Column(
            "exposure_black_frames",
            pa.float64(),
            "share of the frames that are black: at least `black_frame` of their pixels are",
            unit="share",
            range="0..1",
            direction="lower is better",
            source="ffmpeg blackdetect",
        ),
        Column(
            "exposure_white",
            pa.float64(),
            "share of the pixels that are at least `white`: clipped highlights",
            unit="share",
            range="0..1",
            direction="lower is better",
        ),
        Column(
            "exposure_contrast",
            pa.float64(),
            "95th minus 5th percentile of the luma of all frames",
            unit="share of full scale",
            range="0..1",
            direction="higher is better",
        ),
        Column(
            "exposure_flicker",
            pa.float64(),
            "mean absolute second difference of the frames' mean luma; steady fades count as 0",
            unit="share of full scale per frame",
            range="0..2",
            direction="lower is better",
        ),
    )

    black: float = 0.1
    """Brightest luma that counts as black, as a share of full scale."""
    white: float = 0.98
    """Darkest luma that counts as clipped, as a share of full scale."""
    black_frame: float = 0.98
    """Share of black pixels that makes a frame black."""

    @property
    def needs(self) -> Needs:
        return Needs(luma=True)

    def start(self, view: ClipView) -> Measurement:
        return _ExposureMeasurement(self)


class _ExposureMeasurement(Measurement):
    def __init__(self, operator: Exposure) -> None:
        self._operator = operator
        self._histogram = np.zeros(256)
        self._black_frames = 0
        self._frames = 0
        self._means = np.zeros(0)
        self._bends = 0.0

    def update(self, chunk: FrameChunk) -> None:
        if chunk.luma is None or not len(chunk):
            return
        histograms = np.stack([_histogram(luma) for luma in chunk.luma])
        pixels = chunk.luma[0].size
        is_black = self._operator.black >= LEVELS
        black = histograms[:, is_black].sum(axis=1) / pixels
        self._black_frames += int(np.count_nonzero(black >= self._operator.black_frame))
        self._histogram += histograms.sum(axis=0)
        self._frames += len(chunk)
        # Two means of the chunk before, so that second differences run across its end.
        means = np.concatenate([self._means, histograms @ LEVELS / pixels])
        self._bends += float(np.abs(np.diff(means, 2)).sum())
        self._means = means[-2:]

    def columns(self) -> dict[str, Any]:
        if not self._frames:
            raise MeasureError("the clip has no frames")
        share = self._histogram / self._histogram.sum()
        low, high = np.searchsorted(np.cumsum(share), (0.05, 0.95))
        return {
            "exposure_mean": float(share @ LEVELS),
            "exposure_black": float(share[self._operator.black >= LEVELS].sum()),
            "exposure_black_frames": self._black_frames / self._frames,
            "exposure_white": float(share[self._operator.white <= LEVELS].sum()),
            "exposure_contrast": float(LEVELS[high] - LEVELS[low]),
            "exposure_flicker": self._bends / max(1, self._frames - 2),
        }


def _histogram(luma: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.asarray(cv2.calcHist([luma], [0], None, [256], [0, 256]), np.float32).ravel()
