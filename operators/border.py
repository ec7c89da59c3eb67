"""Black borders (letterbox, pillarbox, padding) and the crop box without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.operators.errors import MeasureError
from winnow.operators.operator import (
    ClipView,
    Column,
    FrameChunk,
    Measurement,
    Needs,
    Operator,
    Sampling,
)

LIT_LINE = 0.01  # share of lit pixels that makes a line picture; fewer are coding noise
LIT_FRAME = 0.1  # share of lit pixels below which a frame is too dark to tell border from night
EDGE_LINES = 4  # lines within which the picture must begin, and coding rings into the border
NARROWEST, WIDEST = 0.02, 0.5  # share of an axis that borders may take


@dataclass(frozen=True)
class Border(Operator):
    """The box that holds the picture, where flat black borders surround it.

    A border is a run of lines at the frame's edge that are black in nearly all sampled frames and
    equally black all over and all the time, and where the picture begins at a straight line, along
    most of its length. A dark scene fails one of these, a night sky usually each. Frames too dark
    to judge have no say. An axis with borders of less than 2 % or more than 50 % is left alone.
    Raises MeasureError for a clip of which no frame was sampled.
    """

    name: ClassVar[str] = "border"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "border_found",
            pa.bool_(),
            "the clip has black borders",
            source="after ffmpeg cropdetect, with agreement over frames",
        ),
        Column("border_x", pa.int32(), "left edge of the crop box, upright", unit="pixels"),
        Column("border_y", pa.int32(), "top edge of the crop box, upright", unit="pixels"),
        Column(
            "border_width",
            pa.int32(),
            "width of the crop box, even where a border was found; else the frame's",
            unit="pixels",
        ),
        Column(
            "border_height",
            pa.int32(),
            "height of the crop box, even where a border was found; else the frame's",
            unit="pixels",
        ),
        Column(
            "border_share",
            pa.float64(),
            "share of the frame's area outside the crop box",
            unit="share",
            range="0..1",
            direction="lower is better",
        ),
    )

    rate: float = 2.0
    """Frames a second to look at."""
    limit: int = 20
    """Brightest luma (0..255) that counts as black."""
    flatness: float = 3.0
    """Most that the mean luma of border lines may differ, over lines and frames, in grey levels."""
    straight: float = 0.5
    """Share of the picture's length that must be lit where it begins, in some frame."""
    agreement: float = 0.9
    """Share of the frames in which a line must be black."""

    @property
    def needs(self) -> Needs:
        return Needs(samples=(self._sampling,))

    @property
    def _sampling(self) -> Sampling:
        return Sampling(self.rate, "luma", minimum=4)

    def start(self, view: ClipView) -> Measurement:
        return _BorderMeasurement(self, self._sampling)


class _Lines:
    """What was seen of the rows, or of the columns, of a clip's frames."""

    def __init__(self, count: int) -> None:
        self.lit_frames = np.zeros(count, np.int64)
        self.most_lit = np.zeros(count)
        self.darkest = np.full(count, np.inf)
        self.brightest = np.zeros(count)

    def see(self, lit: NDArray[np.float64], mean: NDArray[np.float64]) -> None:
        """Take one frame: each line's share of lit pixels, and its mean luma."""
        self.lit_frames += lit > LIT_LINE
        np.maximum(self.most_lit, lit, out=self.most_lit)
        # Frames in which the line is picture must not spoil its flatness as a border.
        dark = lit <= LIT_LINE
        np.minimum(self.darkest, mean, out=self.darkest, where=dark)
        np.maximum(self.brightest, mean, out=self.brightest, where=dark)

    def picture(self, frames: int, agreement: float) -> tuple[int, int]:
        """First line of the picture and the line after its last."""
        lit = np.flatnonzero(self.lit_frames > frames * (1 - agreement))
        return (int(lit[0]), int(lit[-1]) + 1) if len(lit) else (0, len(self.lit_frames))

    def confirmed(self, start: int, end: int, length: float, operator: Border) -> tuple[int, int]:
        """The picture's lines once a doubtful border at either side is taken for picture.

        `length` is how long the picture's lines are, as a share of the frame's.
        """
        count = len(self.lit_frames)
        needed = operator.straight * length
        if not self._is_border(slice(0, max(0, start - EDGE_LINES)), operator.flatness) or (
            self.most_lit[start : start + EDGE_LINES].max() < needed
        ):
            start = 0
        if not self._is_border(slice(end + EDGE_LINES, count), operator.flatness) or (
            self.most_lit[max(0, end - EDGE_LINES) : end].max() < needed
        ):
            end = count
        taken = 1 - (end - start) / count
        return (start, end) if NARROWEST <= taken <= WIDEST else (0, count)

    def _is_border(self, lines: slice, flatness: float) -> bool:
        brightest, darkest = self.brightest[lines], self.darkest[lines]
        return len(darkest) == 0 or bool(brightest.max() - darkest.min() <= flatness)


class _BorderMeasurement(Measurement):
    def __init__(self, operator: Border, sampling: Sampling) -> None:
        self._operator = operator
        self._sampling = sampling
        self._size: tuple[int, int] | None = None
        self._judged = 0

    def update(self, chunk: FrameChunk) -> None:
        for sample in chunk.samples.get(self._sampling, ()):
            self._see(sample.image)

    def _see(self, luma: NDArray[np.uint8]) -> None:
        height, width = luma.shape
        if self._size is None:
            self._size = (height, width)
            self._rows, self._columns = _Lines(height), _Lines(width)
        lit = np.asarray(
            cv2.threshold(luma, self._operator.limit, 1, cv2.THRESH_BINARY)[1], np.uint8
        )
        lit_columns = _sums(lit, 0) / height
        if (height, width) != self._size or lit_columns.mean() < LIT_FRAME:
            return
        self._judged += 1
        self._columns.see(lit_columns, _sums(luma, 0) / height)
        self._rows.see(_sums(lit, 1) / width, _sums(luma, 1) / width)

    def columns(self) -> dict[str, Any]:
        if self._size is None:
            raise MeasureError("no frame of the clip was sampled")
        height, width = self._size
        left, right, top, bottom = self._box(height, width) if self._judged else (
            0, width, 0, height,
        )  # fmt: skip
        found = (left, right, top, bottom) != (0, width, 0, height)
        if found:
            left, top = left + left % 2, top + top % 2
            right, bottom = right - (right - left) % 2, bottom - (bottom - top) % 2
        return {
            "border_found": found,
            "border_x": left,
            "border_y": top,
            "border_width": right - left,
            "border_height": bottom - top,
            "border_share": 1 - (right - left) * (bottom - top) / (width * height),
        }

    def _box(self, height: int, width: int) -> tuple[int, int, int, int]:
        agreement = self._operator.agreement
        top, bottom = self._rows.picture(self._judged, agreement)
        left, right = self._columns.picture(self._judged, agreement)
        rows = self._rows.confirmed(top, bottom, (right - left) / width, self._operator)
        columns = self._columns.confirmed(left, right, (bottom - top) / height, self._operator)
        return (*columns, *rows)


def _sums(image: NDArray[np.uint8], axis: int) -> NDArray[np.float64]:
    """Sums along an axis: 0 gives one per column, 1 one per row."""
    sums = cv2.reduce(image, axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S)
    return np.asarray(sums, np.float64).ravel()
