"""How much a clip moves, from the codec's motion vectors or, where there are none, optical flow.

Speeds are fractions of the frame diagonal per second, so neither size nor frame rate matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.operators.errors import MeasureError
from winnow.operators.operator import ClipView, Column, FrameChunk, Measurement, Needs, Operator

MACROBLOCK_BITS = 4  # every codec that exports vectors keeps a block within one macroblock
MACROBLOCK = 1 << MACROBLOCK_BITS
FLOW_CELL = 4  # pixels of small luma, about as fine as macroblocks
FLOW_MIN_SIDE = 32  # OpenCV's DIS reads outside smaller or flatter frames, and crashes
FLOW_MAX_ASPECT = 4
PAST = 0  # AVMotionVector.source is negative for a reference in the past
B_PICTURES = (3, 7)  # AV_PICTURE_TYPE_B, _BI

_SPEED = "frame diagonals per second"


class Interval(NamedTuple):
    """The motion measured between two frames."""

    start_s: float
    end_s: float
    speed: NDArray[np.float64]
    """(cells,) mean speed in each cell of the frame, in diagonals per second."""
    cover: NDArray[np.float64]
    """(cells,) share of each cell that was measured, 0..1."""
    camera: float
    """Speed of the median motion: what the frame as a whole does."""


@dataclass(frozen=True)
class Motion(Operator):
    """Speed and extent of motion over the whole clip.

    Codec vectors weigh by block area; intra-coded blocks have no vector and count as not measured.
    The codec does not say which reference a vector points to, only its direction, so a frame is
    measured where the picture types leave one answer: see `_CodecMotion`. Where the codec exports
    no vectors (HEVC, VP9, AV1, intra-only codecs) DIS optical flow on small luma takes over.
    A clip of one frame has no motion to measure and raises MeasureError.
    """

    name: ClassVar[str] = "motion"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "motion_mean",
            pa.float64(),
            "mean speed over the frame and the clip",
            unit=_SPEED,
            range="0..; 0 is a still, about 0.1 is lively",
            source="codec motion vectors as in cosmos-curator, DIS flow (Kroeger et al. 2016)",
        ),
        Column(
            "motion_p95",
            pa.float64(),
            "speed that the mean over the frame exceeds in 5 % of the clip's time",
            unit=_SPEED,
            range="0..",
        ),
        Column(
            "motion_min_half",
            pa.float64(),
            "mean speed of the calmer half of the clip: low where one half stands still",
            unit=_SPEED,
            range="0..",
        ),
        Column(
            "motion_area",
            pa.float64(),
            "share of the frame that moves, on average over the clip faster than `moving`",
            unit="share",
            range="0..1",
        ),
        Column(
            "motion_camera",
            pa.float64(),
            "share of the motion that the whole frame makes together: 1 for a pan, 0 for a zoom",
            unit="share",
            range="0..1",
        ),
        Column(
            "motion_method",
            pa.string(),
            "where the motion was read from",
            range="codec or flow",
        ),
    )

    moving: float = 0.005
    """Mean speed, in diagonals per second, above which a part of the frame counts as moving."""
    flow_rate: float = 10.0
    """Most frame pairs a second that optical flow looks at."""

    @property
    def needs(self) -> Needs:
        return Needs(luma=True, motion_vectors=True)

    def start(self, view: ClipView) -> Measurement:
        return _MotionMeasurement(self, view)


class _MotionMeasurement(Measurement):
    def __init__(self, operator: Motion, view: ClipView) -> None:
        self._operator = operator
        self._view = view
        self._undecided: list[FrameChunk] = []
        self._method: _CodecMotion | _FlowMotion | None = None
        self._frames = 0
        self._summaries: list[tuple[float, float, float, float, float]] = []
        self._distance: NDArray[np.float64] | float = 0.0
        self._seconds: NDArray[np.float64] | float = 0.0

    def update(self, chunk: FrameChunk) -> None:
        self._frames += len(chunk)
        if self._method is None:
            self._undecided.append(chunk)
            if self._frames < 2:
                return
            self._method = self._choose()
            chunks, self._undecided = self._undecided, []
        else:
            chunks = [chunk]
        for ready in chunks:
            for interval in self._method.measure(ready):
                self._add(interval)

    def _choose(self) -> _CodecMotion | _FlowMotion:
        """By what came, not by the codec's name: builds of FFmpeg differ in what they export."""
        for chunk in self._undecided:
            if any(vectors is not None for vectors in chunk.vectors or ()):
                return _CodecMotion(self._view)
        return _FlowMotion(self._operator.flow_rate)

    def _add(self, interval: Interval) -> None:
        start, end, speed, cover, camera = interval
        weight = cover * (end - start)
        total = float(weight.sum())
        if total <= 0:
            return
        mean = float(weight @ speed) / total
        self._summaries.append((start, end, mean, total / len(cover), min(camera, mean)))
        self._distance = self._distance + weight * speed
        self._seconds = self._seconds + weight

    def columns(self) -> dict[str, Any]:
        if self._frames < 2:
            raise MeasureError("motion needs at least two frames, the clip has one")
        if self._method is not None and not self._summaries:
            for interval in self._method.finish():
                self._add(interval)
        if not self._summaries:
            raise MeasureError("no two frames of the clip could be compared: no usable vectors")
        start, end, mean, weight, camera = np.array(self._summaries).T
        moved = float(weight @ mean)
        middle = (start.min() + end.max()) / 2
        early = np.clip((middle - start) / (end - start), 0, 1)
        halves = [
            float(part @ mean / part.sum())
            for part in (weight * early, weight * (1 - early))
            if part.sum() > 0
        ]
        cell_seconds = np.asarray(self._seconds)
        speeds = np.asarray(self._distance) / np.maximum(cell_seconds, 1e-9)
        return {
            "motion_mean": moved / float(weight.sum()),
            "motion_p95": float(np.percentile(mean, 95, weights=weight, method="inverted_cdf")),
            "motion_min_half": min(halves),
            "motion_area": float(np.mean(speeds > self._operator.moving)),
            "motion_camera": float(weight @ camera) / moved if moved > 0 else 0.0,
            "motion_method": "codec" if isinstance(self._method, _CodecMotion) else "flow",
        }


class _CodecMotion:
    """Intervals from codec vectors.

    A vector spans the time to its reference frame, which FFmpeg does not name. What the picture
    types leave certain:
    - a P frame refers to the I or P frame before it in display order (an encoder with several
      references may reach further back for some blocks: they read a little too fast);
    - the first of a run of B frames has that same frame right before it.
    The further B frames refer either to it or to a B frame in between (b-pyramid), and guessing
    wrong would scale their motion by up to the length of the run. They are left out: the P frame
    that follows spans their time, so that the intervals still cover the whole clip.
    """

    def __init__(self, view: ClipView) -> None:
        turned = view.coded_rotation % 180 != 0
        width, height = (view.height, view.width) if turned else (view.width, view.height)
        self._columns = -(-width // MACROBLOCK)
        self._rows = -(-height // MACROBLOCK)
        self._diagonal = float(np.hypot(width, height))
        self._anchor_s: float | None = None
        self._after_anchor = False

    def measure(self, chunk: FrameChunk) -> Iterator[Interval]:
        vectors = chunk.vectors or [None] * len(chunk)
        for seconds, picture, found in zip(
            chunk.seconds.tolist(), chunk.pictures.tolist(), vectors, strict=True
        ):
            between = picture in B_PICTURES
            certain = not between or self._after_anchor
            if found is not None and certain and self._anchor_s is not None:
                interval = self._interval(found, self._anchor_s, seconds)
                if interval is not None:
                    yield interval
            self._after_anchor = not between
            if not between:
                self._anchor_s = seconds

    def finish(self) -> Iterator[Interval]:
        yield from ()

    def _interval(self, found: NDArray[Any], start: float, end: float) -> Interval | None:
        if end <= start:
            return None
        past = np.flatnonzero(found["source"] < PAST)
        if not len(past):
            return None

        def field(name: str) -> NDArray[np.float32]:
            # Field by field: selecting whole records is many times slower.
            return found[name].astype(np.float32)[past]

        scale = np.maximum(field("motion_scale"), np.float32(1))
        x = field("motion_x") / scale
        y = field("motion_y") / scale
        area = field("w") * field("h")
        column = np.clip(found["dst_x"][past] >> MACROBLOCK_BITS, 0, self._columns - 1)
        row = np.clip(found["dst_y"][past] >> MACROBLOCK_BITS, 0, self._rows - 1)
        cell = row.astype(np.intp) * self._columns + column
        cells = self._rows * self._columns

        def total(values: NDArray[Any]) -> NDArray[np.float64]:
            return np.bincount(cell, values, cells).astype(np.float64, copy=False)

        covered = total(area)
        divisor = np.maximum(covered, 1)
        rate = 1 / ((end - start) * self._diagonal)
        measured = np.flatnonzero(covered)
        median_x = _median((total(area * x) / divisor)[measured])
        median_y = _median((total(area * y) / divisor)[measured])
        return Interval(
            start,
            end,
            speed=total(area * np.sqrt(x * x + y * y)) / divisor * rate,
            cover=np.minimum(covered / MACROBLOCK**2, 1),
            camera=float(np.hypot(median_x, median_y)) * rate,
        )


class _FlowMotion:
    """Intervals from optical flow on small luma, one after the other without gaps."""

    def __init__(self, rate: float) -> None:
        self._shortest_s = 1 / rate
        self._flow: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._held: tuple[float, NDArray[np.uint8]] | None = None
        self._last: tuple[float, NDArray[np.uint8]] | None = None

    def measure(self, chunk: FrameChunk) -> Iterator[Interval]:
        if chunk.luma is None:
            return
        for seconds, luma in zip(chunk.seconds.tolist(), chunk.luma, strict=True):
            self._last = (seconds, luma)
            if self._held is None:
                self._held = self._last
            elif seconds - self._held[0] >= self._shortest_s * 0.99:
                yield self._interval(self._held, self._last)
                self._held = self._last
        # The chunk's array lives on with a view of it, so keep copies.
        if self._held is not None and self._last is not None:
            self._held = (self._held[0], self._held[1].copy())
            self._last = (self._last[0], self._last[1].copy())

    def finish(self) -> Iterator[Interval]:
        """The one interval of a clip too short for any at the flow's rate."""
        if self._held is not None and self._last is not None and self._last[0] > self._held[0]:
            yield self._interval(self._held, self._last)

    def _interval(
        self, before: tuple[float, NDArray[np.uint8]], after: tuple[float, NDArray[np.uint8]]
    ) -> Interval:
        height, width = after[1].shape
        below = max(FLOW_MIN_SIDE, -(-width // FLOW_MAX_ASPECT)) - height
        beside = max(FLOW_MIN_SIDE, -(-height // FLOW_MAX_ASPECT)) - width
        first, second = (
            cv2.copyMakeBorder(
                image, 0, max(0, below), 0, max(0, beside), borderType=cv2.BORDER_REPLICATE
            )
            for image in (before[1], after[1])
        )
        flow = self._flow.calc(first, second, None)[:height, :width]
        cells = (max(1, width // FLOW_CELL), max(1, height // FLOW_CELL))
        size = cv2.magnitude(flow[..., 0], flow[..., 1])
        speed = cv2.resize(size, cells, interpolation=cv2.INTER_AREA).astype(np.float64).ravel()
        median_x, median_y = (_median(flow[::2, ::2, axis].ravel()) for axis in (0, 1))
        rate = 1 / ((after[0] - before[0]) * float(np.hypot(width, height)))
        return Interval(
            before[0],
            after[0],
            speed=speed * rate,
            cover=np.ones_like(speed),
            camera=float(np.hypot(median_x, median_y)) * rate,
        )


def _median(values: NDArray[Any]) -> float:
    """The upper median; NumPy's spends most of its time on checks that do not matter here."""
    middle = len(values) // 2
    return float(np.partition(values, middle)[middle])
