"""What plug-ins for perceptual quality share: seeded fragments, and DOVER's scores by name.

DOVER and VTSS may not be shipped (S-Lab 1.0 and Kuaishou's research licence forbid commercial use), so
they come as plug-ins that the user installs: see operators/registry.py. Two things go wrong in
published uses of them, and are done here once. Fragments are cut at random places: without a seed of
its own, a clip has another score every time, and another one in another batch. And the network
answers in the order of whatever mapping it was given: by position, technical and aesthetic are
swapped unnoticed.

Sources: Wu et al., "FAST-VQA: Efficient End-to-end Video Quality Assessment with Fragment Sampling"
(ECCV 2022) for fragments; Wu et al., "Exploring Video Quality Assessment on User Generated Contents
from Aesthetic and Technical Perspectives" (ICCV 2023) for DOVER. Written from the description.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from winnow.operators.errors import MeasureError

GRID = 7
PATCH = 32
ALIGNED = 32


def clip_seed(clip_id: str, purpose: str = "") -> int:
    """A 64-bit seed that belongs to a clip: the same in every run, batch, process and machine.

    `purpose` (the operator's name) makes seeds of different operators independent.
    """
    digest = hashlib.blake2b(f"{purpose}:{clip_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def frame_numbers(
    frames: int, seed: int, *, length: int = 32, interval: int = 2, clips: int = 3
) -> NDArray[np.int64]:
    """(clips, length) numbers of the frames to look at, of a clip of `frames` frames.

    Each row is `length` frames, `interval` apart, that begin at a random place within an equal part
    of the clip: DOVER's technical branch has 3 rows of 32 frames, 2 apart. A clip too short for a
    row is repeated from its start. Raises ValueError where there are no frames.
    """
    if frames < 1:
        raise ValueError("there are no frames to sample")
    random = np.random.default_rng(seed)
    span = (length - 1) * interval + 1
    begins = np.linspace(0, max(0, frames - span + 1), clips + 1)
    # One draw a row whatever the clip's length, so that nothing shifts what is drawn later.
    starts = (begins[:-1] + random.random(clips) * np.diff(begins)).astype(np.int64)
    numbers: NDArray[np.int64] = starts[:, None] + np.arange(length) * interval
    return numbers % frames


def fragments(
    frames: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
    seed: int,
    *,
    grid: int = GRID,
    size: int = PATCH,
    aligned: int = ALIGNED,
) -> NDArray[np.uint8]:
    """Patches of native resolution, one from each cell of a grid, put together to a small picture.

    `frames` are (n, height, width, 3) uint8 or n such images of one size; the result is (n, grid *
    size, grid * size, 3) uint8, by default 7 x 7 patches of 32 pixels: 224 x 224. Patches are not
    scaled, so that compression, noise and blur stay what they are. The place of a patch in its cell
    is drawn from `seed`, and stays for `aligned` frames in a row, so that motion stays motion.
    Frames smaller than the result are enlarged to fit it. Give the frames of one row of
    `frame_numbers`. Raises MeasureError where there are no frames or their sizes differ.
    """
    images = [np.asarray(frame) for frame in frames]
    if not images:
        raise MeasureError("there are no frames to take fragments of")
    if len({image.shape for image in images}) > 1:
        raise MeasureError("the frames of the clip have different sizes")
    side = grid * size
    random = np.random.default_rng(seed)
    # Places are drawn as shares of a cell's slack: the draw does not depend on the frame's size.
    places = random.random((-(-len(images) // aligned), grid, grid, 2))
    result = np.empty((len(images), side, side, 3), np.uint8)
    for number, image in enumerate(images):
        picture = _large_enough(image, side)
        tops = _corners(picture.shape[0], grid, size, places[number // aligned, :, :, 0])
        lefts = _corners(picture.shape[1], grid, size, places[number // aligned, :, :, 1].T).T
        for row in range(grid):
            for column in range(grid):
                top, left = tops[row, column], lefts[row, column]
                result[
                    number, row * size : (row + 1) * size, column * size : (column + 1) * size
                ] = picture[top : top + size, left : left + size]
    return result


def _large_enough(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    scale = side / min(height, width)
    if scale <= 1:
        return image
    target = (max(side, round(width * scale)), max(side, round(height * scale)))
    enlarged: NDArray[np.uint8] = np.asarray(
        cv2.resize(image, target, interpolation=cv2.INTER_LINEAR), np.uint8
    )
    return enlarged


def _corners(length: int, grid: int, size: int, places: NDArray[np.float64]) -> NDArray[np.int64]:
    """(grid, grid) first pixels along an axis, cells of that axis first; `places` are 0..1."""
    edges = np.arange(grid + 1) * length // grid
    slack = np.maximum(np.diff(edges) - size + 1, 1)[:, None]
    corners: NDArray[np.int64] = edges[:-1, None] + np.floor(places * slack).astype(np.int64)
    return corners


class QualityScores(NamedTuple):
    """Perceptual quality, each 0 (bad) to 1 (good)."""

    technical: float
    """Noise, blur, compression, exposure."""
    aesthetic: float
    """Composition, content, colour."""
    overall: float


def dover_fusion(*, technical: float, aesthetic: float) -> QualityScores:
    """DOVER's published scale of its two raw outputs, and their weighted sum.

    The raw outputs are given by name only: the model answers in the order of its input, which
    differs between its own scripts. Both are brought to the mean and spread of the authors' test
    set; earlier versions of their scripts have the sign of the aesthetic mean wrong.
    The scale is that of user-generated video: among generations, compare by percentile.
    Raises MeasureError where a raw output is not finite.
    """
    if not (math.isfinite(technical) and math.isfinite(aesthetic)):
        raise MeasureError(f"the model answered technical {technical} and aesthetic {aesthetic}")
    t = (technical - 0.1107) / 0.07355
    a = (aesthetic + 0.08285) / 0.03774
    return QualityScores(_sigmoid(t), _sigmoid(a), _sigmoid(0.6104 * t + 0.3896 * a))


def _sigmoid(x: float) -> float:
    # tanh does not overflow, however far out a raw output is.
    return 0.5 * (1 + math.tanh(x / 2))
