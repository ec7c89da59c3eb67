"""Frames that repeat the one before, and stretches in which the picture stands still."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.operators.errors import MeasureError
from winnow.operators.operator import ClipView, Column, FrameChunk, Measurement, Needs, Operator

KEY_PICTURE = 1  # AV_PICTURE_TYPE_I


def largest_tile_difference(a: NDArray[np.uint8], b: NDArray[np.uint8], tile: int) -> float:
    """Mean absolute difference in the tile (any position) where two images differ most, 0..255.

    A small thing that moves stands out in its own tile, however large the still frame around it.
    """
    side = min(tile, *a.shape)
    sums = np.asarray(
        cv2.boxFilter(
            cv2.absdiff(a, b),
            cv2.CV_16U if side <= 16 else cv2.CV_32F,
            (side, side),
            normalize=False,
            borderType=cv2.BORDER_CONSTANT,
        )
    )
    return float(np.max(sums)) / float(side * side)


@dataclass(frozen=True)
class Frozen(Operator):
    """Duplicated frames and freezes.

    A frame duplicates the one before when no tile of the small luma differs by more than
    `tolerance`, or by `key_tolerance` at a key frame, where the codec codes a still picture anew.
    A freeze is a run of such frames that also all look like the frame it began with, so that slow
    drift does not add up to a freeze. Its length is the time from its first frame to its last: 0 in
    a clip that moves. Content of a low frame rate padded by repeating frames has many duplicates
    and no freeze. Raises MeasureError for a clip of one frame.
    """

    name: ClassVar[str] = "frozen"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "frozen_ratio",
            pa.float64(),
            "share of the frames that stand still in a freeze of at least `shortest_s`",
            unit="share",
            range="0..1",
            direction="lower is better",
            source="after ffmpeg freezedetect, by tile rather than by frame",
        ),
        Column(
            "frozen_duplicate_ratio",
            pa.float64(),
            "share of the frames that repeat the frame before, freeze or not",
            unit="share",
            range="0..1",
            direction="lower is better",
        ),
        Column(
            "frozen_longest_s",
            pa.float64(),
            "longest time without any visible change",
            unit="s",
            range="0..",
            direction="lower is better",
        ),
        Column(
            "frozen_longest_start_s",
            pa.float64(),
            "when the longest freeze begins, from the clip's first frame; 0 where nothing freezes",
            unit="s",
            range="0..",
        ),
        Column(
            "frozen_tail_s",
            pa.float64(),
            "time that the clip has stood still when it ends",
            unit="s",
            range="0..",
            direction="lower is better",
        ),
    )

    tolerance: float = 1.5
    """Mean absolute difference within a tile that coding noise may cause, in grey levels of 255."""
    key_tolerance: float = 8.0
    """The same at a single key frame; between stills that are not the same it is far more."""
    tile: int = 8
    """Side of a tile, in pixels of the small luma (long side 160)."""
    shortest_s: float = 0.25
    """Shortest freeze that counts into `frozen_ratio`."""

    @property
    def needs(self) -> Needs:
        return Needs(luma=True)

    def start(self, view: ClipView) -> Measurement:
        return _FrozenMeasurement(self)


class _FrozenMeasurement(Measurement):
    def __init__(self, operator: Frozen) -> None:
        self._operator = operator
        self._frames = 0
        self._duplicates = 0
        self._frozen = 0
        self._longest_s = 0.0
        self._longest_start_s = 0.0
        self._previous: NDArray[np.uint8] | None = None
        self._previous_is_key = False
        # The run that is going on: its first picture, frame number and time, and its last time;
        # the picture as last coded by a key frame, which the frames after it are held against.
        self._first: NDArray[np.uint8] | None = None
        self._reference: NDArray[np.uint8] | None = None
        self._first_number = 0
        self._first_s = 0.0
        self._last_s = 0.0

    def update(self, chunk: FrameChunk) -> None:
        if chunk.luma is None or not len(chunk):
            return
        for seconds, is_key, luma in zip(
            chunk.seconds.tolist(),
            (chunk.pictures == KEY_PICTURE).tolist(),
            chunk.luma,
            strict=True,
        ):
            # In a stream of key frames only, each is coded like the one before.
            if not self._continues(luma, is_key and not self._previous_is_key):
                self._close()
                self._first = self._reference = luma
                self._first_number = self._frames
                self._first_s = seconds
            self._last_s = seconds
            self._previous = luma
            self._previous_is_key = is_key
            self._frames += 1
        # The chunk's array lives on with a view of it, so keep copies.
        self._previous = chunk.luma[-1].copy()
        if self._first is not None and self._reference is not None:
            self._first = self._first.copy()
            self._reference = self._reference.copy()

    def _continues(self, luma: NDArray[np.uint8], coded_anew: bool) -> bool:
        if self._previous is None or self._first is None or self._reference is None:
            return False
        operator = self._operator
        tolerance = operator.key_tolerance if coded_anew else operator.tolerance
        if largest_tile_difference(luma, self._previous, operator.tile) > tolerance:
            return False
        self._duplicates += 1
        held_against = self._first if coded_anew else self._reference
        same = largest_tile_difference(luma, held_against, operator.tile) <= tolerance
        if same and coded_anew:
            self._reference = luma
        return same

    def _close(self) -> None:
        """Count the run that ended with the frame before."""
        length = self._last_s - self._first_s
        if length >= self._operator.shortest_s - 1e-6:
            self._frozen += self._frames - 1 - self._first_number
        if length > self._longest_s:
            self._longest_s = length
            self._longest_start_s = self._first_s

    def columns(self) -> dict[str, Any]:
        if self._frames < 2:
            raise MeasureError("a freeze needs at least two frames to show")
        self._close()
        steps = self._frames - 1
        return {
            "frozen_ratio": self._frozen / steps,
            "frozen_duplicate_ratio": self._duplicates / steps,
            "frozen_longest_s": self._longest_s,
            "frozen_longest_start_s": self._longest_start_s,
            "frozen_tail_s": self._last_s - self._first_s,
        }
