"""A strip of small frames, for people who look through the report."""

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

QUALITIES = (80, 65, 50, 35, 20)
MOST_BYTES = 15_000
WIDEST_ASPECT = 3  # a frame wider than this is scaled down to fit, rather than stretch the strip


@dataclass(frozen=True)
class Thumbnail(Operator):
    """A few frames, evenly spread over the clip, side by side as one JPEG of at most 15 kB.

    A clip with fewer frames gives a shorter strip. Raises MeasureError for a clip without frames.
    """

    name: ClassVar[str] = "thumbnail"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (
        Column("thumbnail_jpeg", pa.binary(), "frames of the clip side by side, as a JPEG"),
    )

    frames: int = 4
    """Frames in the strip."""
    height: int = 90
    """Height of the strip in pixels."""

    @property
    def needs(self) -> Needs:
        return Needs(samples=(self._sampling,))

    @property
    def _sampling(self) -> Sampling:
        # The count does not grow with the clip: no rate, only the minimum.
        return Sampling(0.0, "rgb", self.height, minimum=self.frames)

    def start(self, view: ClipView) -> Measurement:
        return _ThumbnailMeasurement(self._sampling, self.height)


class _ThumbnailMeasurement(Measurement):
    def __init__(self, sampling: Sampling, height: int) -> None:
        self._sampling = sampling
        self._height = height
        self._images: list[NDArray[np.uint8]] = []

    def update(self, chunk: FrameChunk) -> None:
        for sample in chunk.samples.get(self._sampling, ()):
            self._images.append(self._fitted(sample.image))

    def _fitted(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width = image.shape[:2]
        widest = WIDEST_ASPECT * self._height
        if width > widest:
            height = max(1, round(height * widest / width))
            image = shrink(image, (widest, height))
        # Frames of one clip that differ in height cannot stand side by side; black fills the rest.
        missing = max(0, self._height - height)
        above = missing // 2
        return np.pad(image, ((above, missing - above), (0, 0), (0, 0)))[: self._height]

    def columns(self) -> dict[str, Any]:
        if not self._images:
            raise MeasureError("no frame of the clip was sampled")
        strip = cv2.cvtColor(np.hstack(self._images), cv2.COLOR_RGB2BGR)
        encoded = b""
        for quality in QUALITIES:
            done, data = cv2.imencode(".jpg", strip, [cv2.IMWRITE_JPEG_QUALITY, quality])
            if not done:
                raise MeasureError("the thumbnail could not be encoded as a JPEG")
            encoded = data.tobytes()
            if len(encoded) <= MOST_BYTES:
                break
        return {"thumbnail_jpeg": encoded}
