"""The cheap change signal: which stretches of a video could hold a cut or a dissolve at all.

It looks at 48x27 frames and asks two questions that camera and object motion rarely pass.
A cut: is the difference to the previous frame far above that of its neighbours, is the structure of
the picture gone, and is it still gone a few frames later (a flash comes back)?
A dissolve: are two frames some distance apart unlike each other, and is the frame halfway nearly
their mean? Cross-fades and fades are linear in time; motion that replaces the picture is not.
Both questions are scale free, so dark scenes count as much as bright ones.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

CONTEXT = 3
"""Frames on either side of a cut that must exist and differ; a flash of fewer frames is no cut."""

WINDOW = 100
STRIDE = 50
_MARGIN = (WINDOW - STRIDE) // 2

_SAME_STRUCTURE = 0.5
_LEAST_CHANGE = 4.0  # mean absolute difference of 8-bit RGB: below it is noise and compression
_SPIKE = 2.0

_DISSOLVE_REACHES = (2, 4, 7, 12)  # half lengths in frames: 0.5 s at 8 to 30 fps, 1 s at 24 fps
_DISSOLVE_SIMILARITY = 0.45
_DISSOLVE_LEAST_CHANGE = 6.0
_DISSOLVE_LINEARITY = 0.33

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_BLUR = 4.0  # pixels of 48x27: removes the brightness, keeps what is drawn


class Change:
    """Differences within one window of (n, 27, 48, 3) uint8 frames."""

    def __init__(self, frames: NDArray[np.uint8]) -> None:
        self._pixels = frames.reshape(len(frames), -1).astype(np.float32)
        luma = frames.astype(np.float32) @ _LUMA
        smooth = np.stack([cv2.GaussianBlur(image, (0, 0), _BLUR) for image in luma])
        self._structure = (luma - smooth).reshape(len(frames), -1)
        self._norm = np.linalg.norm(self._structure, axis=1)
        self.step = np.zeros(len(frames))
        """(n,) mean absolute RGB difference to the previous frame, 0..255; 0 for the first."""
        self.step[1:] = self._difference(slice(0, -1), slice(1, None))
        self.across = np.ones(len(frames))
        """(n,) similarity of frames n - CONTEXT and n + CONTEXT - 1, -1..1; 1 at the ends."""
        reach = 2 * CONTEXT - 1
        if len(frames) > reach:
            self.across[CONTEXT : CONTEXT - reach] = self._similarity(
                slice(0, -reach), slice(reach, None)
            )

    def _difference(self, first: slice, second: slice) -> NDArray[np.float64]:
        gap = np.abs(self._pixels[first] - self._pixels[second])
        return np.asarray(gap.mean(axis=1), np.float64)

    def _similarity(self, first: slice, second: slice) -> NDArray[np.float64]:
        # The last term keeps flat pictures, whose structure is only noise, from comparing.
        dot = np.einsum("ij,ij->i", self._structure[first], self._structure[second])
        scale = self._norm[first] * self._norm[second] + self._structure.shape[1]
        return np.asarray(dot / scale, np.float64)

    def cuts(self) -> NDArray[np.bool_]:
        """(n,) True where a hard cut may lie between frame n - 1 and n."""
        found = np.zeros(len(self.step), bool)
        # One other spike is allowed nearby: a stray frame between two shots makes two.
        around = np.stack([np.roll(self.step, shift) for shift in (-2, -1, 1, 2)])
        rival = np.sort(around, axis=0)[-2]
        next_to = np.ones(len(self.step))
        next_to[1:] = self._similarity(slice(0, -1), slice(1, None))
        found[CONTEXT : len(found) - CONTEXT + 1] = True
        found &= self.step > np.maximum(_LEAST_CHANGE, _SPIKE * rival)
        found &= (next_to < _SAME_STRUCTURE) & (self.across < _SAME_STRUCTURE)
        return found

    def dissolves(self) -> NDArray[np.bool_]:
        """(n,) True where frame n may lie in the middle of a dissolve or fade."""
        found = np.zeros(len(self.step), bool)
        for reach in _DISSOLVE_REACHES:
            if len(found) <= 2 * reach:
                break
            first, middle, last = slice(0, -2 * reach), slice(reach, -reach), slice(2 * reach, None)
            change = self._difference(first, last)
            unlike = (change > _DISSOLVE_LEAST_CHANGE) & (
                self._similarity(first, last) < _DISSOLVE_SIMILARITY
            )
            if unlike.any():
                mean = (self._pixels[first][unlike] + self._pixels[last][unlike]) / 2
                bend = np.abs(self._pixels[middle][unlike] - mean).mean(axis=1)
                found[reach + np.flatnonzero(unlike)] |= bend < _DISSOLVE_LINEARITY * change[unlike]
        return found
