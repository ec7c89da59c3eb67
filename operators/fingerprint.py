"""Fingerprint: a 256-d descriptor of a clip's layout and motion, for near-duplicates by cosine.

No learned model. Every frame is projected on low-frequency cosines of its own width and height (so
size does not matter), with a window that fades toward the edges (so small crops hardly matter).
The projections are averaged over equal parts of the clip's own time (so frame rate does not
matter). Of these, the mean over time is the layout, and the cosines over time are the motion; each
part is flattened, compressed, normalised, and the two are joined with weights. A clip without
motion above coding noise is described by its layout alone.

What the cosine means, measured by bench/fingerprint.py on the clips that the weights were set on:
copies that were re-encoded, rescaled, cropped by up to 3 % a side, brightened or changed in frame
rate stay above 0.87, different clips below 0.53. Advice to the dedup stage: duplicates from 0.80
on. A scene with another motion is not a duplicate; where hardly anything moves, there is no other
motion, and two halves of such a clip are duplicates. A mirrored or reversed clip is not a
duplicate, unless its motion is its own mirror image or its own reverse. Black borders are not
removed: a bordered copy may be missed, so crop first if it shall count.

Sources of the method: 3-D DCT video hashing (Coskun, Sankur, Memon, "Spatio-temporal transform
based video hashing", IEEE Trans. Multimedia 2006); power normalisation (Perronnin et al., ECCV
2010). The weights were set on the clips of bench/fingerprint.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

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
)

MODEL = "fingerprint_v1"
DIMENSIONS = 256

# What follows is the identity of fingerprint_v1: vectors made with other numbers do not compare.
_FREQUENCIES = 9
_TIME_BINS = 48
_TIME_FREQUENCIES = 5
_MOTION_PLACES = 38
_LAYOUT_PLACES = DIMENSIONS - _TIME_FREQUENCIES * _MOTION_PLACES
_MOTION_WEIGHT = 0.65
_MOTION_NOISE = 0.2  # grey levels; x264 at CRF 35 disturbs a still clip by 0.07
_COMPRESSION = 0.8

# Beyond this many knots the timeline halves itself; 256 are still five to a time bin.
_MAX_KNOTS = 512

_SOURCE = "Winnow; after Coskun et al. 2006 (3-D DCT video hash)"


def _places(count: int, *, skip_mean: bool) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Vertical and horizontal frequency of the `count` lowest cosines, lowest first."""
    pairs = sorted(
        ((v, h) for v in range(_FREQUENCIES) for h in range(_FREQUENCIES)),
        key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair),
    )[skip_mean : count + skip_mean]
    vertical, horizontal = np.array(pairs, dtype=np.intp).T
    return vertical, horizontal


_LAYOUT = _places(_LAYOUT_PLACES, skip_mean=True)  # the mean is brightness: not part of the layout
_MOTION = _places(_MOTION_PLACES, skip_mean=False)  # its change over time is part of the motion

# Pictures hold less of a frequency the higher it is; these weights even that out.
_LAYOUT_WEIGHTS = np.hypot(*_LAYOUT)
_MOTION_WEIGHTS = (
    np.arange(1, _TIME_FREQUENCIES + 1)[:, None] ** 0.25
    * ((1 + _MOTION[0] ** 2 + _MOTION[1] ** 2) ** 0.25)[None]
)
_TIME_COSINES = (
    np.cos(
        np.pi
        * np.arange(1, _TIME_FREQUENCIES + 1)[:, None]
        * (np.arange(_TIME_BINS) + 0.5)
        / _TIME_BINS
    )
    * np.sqrt(2)
    / _TIME_BINS
)


@lru_cache(maxsize=32)
def _windowed_cosines(length: int) -> NDArray[np.float32]:
    """(frequencies, length): cosines over a side of the frame, faded to zero at both ends.

    A crop displaces a picture most at its edges, so the edges count least.
    """
    place = (np.arange(length) + 0.5) / length
    window = 1 - (2 * place - 1) ** 2
    cosines = np.cos(np.pi * np.arange(_FREQUENCIES)[:, None] * place) * np.sqrt(2)
    cosines[0] = 1
    faded: NDArray[np.float32] = (cosines * window / window.sum()).astype(np.float32)
    return faded


def _project(luma: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(n, frequencies, frequencies) of (n, h, w) luma; place (0, 0) holds the frame's mean."""
    vertical = _windowed_cosines(luma.shape[1])
    horizontal = _windowed_cosines(luma.shape[2])
    pixels = luma.astype(np.float32)
    mean = pixels.mean(axis=(1, 2))
    projected = vertical @ pixels @ horizontal.T
    # The window makes cosines see the mean: taken out, so that brightness changes nothing.
    projected -= mean[:, None, None] * np.outer(vertical.sum(axis=1), horizontal.sum(axis=1))
    projected[:, 0, 0] = mean
    return projected.astype(np.float64)


@dataclass(frozen=True, slots=True)
class _Timeline:
    """The integral over time of a piecewise constant signal, in bounded memory.

    Kept as knots (time, integral so far). Dropping a knot loses nothing at the others, so a long
    clip is thinned to every other knot whenever there are too many.
    """

    times: NDArray[np.float64]
    integrals: NDArray[np.float64]

    @classmethod
    def empty(cls) -> _Timeline:
        return cls(np.zeros(1), np.zeros((1, _FREQUENCIES**2)))

    def extended(self, values: NDArray[np.float64], durations: NDArray[np.float64]) -> _Timeline:
        """With (n, frequencies, frequencies) more values, each held for its duration in seconds."""
        areas = values.reshape(len(values), _FREQUENCIES**2) * durations[:, None]
        times = np.append(self.times, self.times[-1] + np.cumsum(durations))
        integrals = np.concatenate((self.integrals, self.integrals[-1] + np.cumsum(areas, axis=0)))
        while len(times) > _MAX_KNOTS:
            last = len(times) - 1
            kept = np.append(np.arange(0, last, 2), last)
            times, integrals = times[kept], integrals[kept]
        return _Timeline(times, integrals)

    def averages(self, bins: int) -> NDArray[np.float64]:
        """(bins, frequencies, frequencies) averages over equal parts of the whole time."""
        edges = np.linspace(0, self.times[-1], bins + 1)
        left = np.clip(np.searchsorted(self.times, edges, side="right") - 1, 0, len(self.times) - 2)
        share = (edges - self.times[left]) / (self.times[left + 1] - self.times[left])
        at_edges = (
            self.integrals[left] * (1 - share)[:, None] + self.integrals[left + 1] * share[:, None]
        )
        averages: NDArray[np.float64] = np.diff(at_edges, axis=0) / (edges[1] - edges[0])
        return averages.reshape(bins, _FREQUENCIES, _FREQUENCIES)


def _compressed(weighted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit vector in which a few large entries do not outweigh all others; zeros stay zeros."""
    compressed: NDArray[np.float64] = np.sign(weighted) * np.abs(weighted) ** _COMPRESSION
    length = np.linalg.norm(compressed)
    return compressed / length if length > 0 else compressed


class _FingerprintMeasurement(Measurement):
    def __init__(self, view: ClipView, minimum_energy: float) -> None:
        self._minimum_energy = minimum_energy
        self._frame_s = 1 / view.fps if view.fps > 0 else 1.0
        self._timeline = _Timeline.empty()
        # How long a frame is shown is known when the next one comes.
        self._held: tuple[float, NDArray[np.float64]] | None = None

    def update(self, chunk: FrameChunk) -> None:
        if chunk.luma is None:
            raise MeasureError("fingerprint was shown frames without luma")
        if not len(chunk):
            return
        times, values = chunk.seconds, _project(chunk.luma)
        if self._held is not None:
            times = np.append(self._held[0], times)
            values = np.concatenate((self._held[1][None], values))
        durations = np.diff(times)
        # Broken timestamps (repeated, going back) count as one nominal frame.
        durations = np.where(durations > 0, durations, self._frame_s)
        self._timeline = self._timeline.extended(values[:-1], durations)
        self._held = (float(times[-1]), values[-1])

    def columns(self) -> dict[str, Any]:
        layout, motion = self._parts()
        energy = self._energy(layout, motion)
        return {
            "fingerprint_energy": energy,
            "fingerprint_motion": float(np.linalg.norm(motion)),
            "fingerprint_usable": energy >= self._minimum_energy,
        }

    def vectors(self) -> dict[str, NDArray[np.float32]]:
        layout, motion = self._parts()
        if self._energy(layout, motion) < self._minimum_energy:
            return {}
        moving = float(np.sum(motion**2))
        share = _MOTION_WEIGHT * moving / (moving + _MOTION_NOISE**2)
        joined = np.concatenate(
            (
                np.sqrt(1 - share) * _compressed(layout * _LAYOUT_WEIGHTS),
                np.sqrt(share) * _compressed((motion * _MOTION_WEIGHTS).ravel()),
            )
        )
        # One part may be all zeros (a flickering flat clip has no layout).
        return {MODEL: (joined / np.linalg.norm(joined)).astype(np.float32)}

    @staticmethod
    def _energy(layout: NDArray[np.float64], motion: NDArray[np.float64]) -> float:
        return float(np.hypot(np.linalg.norm(layout), np.linalg.norm(motion)))

    def _parts(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Layout (places,) and motion (time frequencies, places), in grey levels."""
        if self._held is None:
            raise MeasureError("the clip has no frames to take a fingerprint of")
        whole = self._timeline.extended(self._held[1][None], np.array([self._frame_s]))
        parts = whole.averages(_TIME_BINS)
        return parts.mean(axis=0)[_LAYOUT], _TIME_COSINES @ parts[:, _MOTION[0], _MOTION[1]]


@dataclass(frozen=True)
class Fingerprint(Operator):
    """Spatio-temporal descriptor for near-duplicate search: see the module's text.

    `vectors()` gives {"fingerprint_v1": (256,) float32, length 1}, or nothing for a clip with less
    structure than `minimum_energy` grey levels: black and flat clips have no fingerprint, so they
    cannot be each other's duplicates by their noise.
    """

    name: ClassVar[str] = "fingerprint"
    version: ClassVar[int] = 1
    embeddings: ClassVar[tuple[str, ...]] = (MODEL,)
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "fingerprint_energy", pa.float32(),
            "how much large-scale structure there is for a fingerprint: layout and motion together",
            unit="grey levels", range="0 (flat) to about 128", source=_SOURCE,
        ),
        Column(
            "fingerprint_motion", pa.float32(),
            "the part of it that changes over the clip; below about 0.2 the fingerprint is layout",
            unit="grey levels", range="0 (still) to about 128", source=_SOURCE,
        ),
        Column(
            "fingerprint_usable", pa.bool_(),
            "false where the clip has too little structure and therefore no fingerprint",
            direction="higher is better", source=_SOURCE,
        ),
    )  # fmt: skip

    minimum_energy: float = 1.0

    @property
    def needs(self) -> Needs:
        return Needs(luma=True)

    def start(self, view: ClipView) -> Measurement:
        return _FingerprintMeasurement(view, self.minimum_energy)
