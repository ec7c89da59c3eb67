"""Overlay text: subtitles, titles and watermarks that lie on the picture and not in the scene.

Generators learn captions and logos from their training videos. Overlay text differs from a sign or a
label in that it stays at the same place in the image while the scene moves, so that is what is
measured: text regions that stay, found by RapidOCR's detector (no recognition) in the few windows
where strokes persist from one sampled frame to the next. Text that moves with the scene is not
counted. Where the whole picture stands still the two cannot be told apart by motion; then only text
at a caption's or a watermark's place counts as overlay.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray
from winnow.operators.text_gate import (
    Box,
)

HEIGHT = 352
"""Height in pixels at which frames are searched; text of 3 % of the frame is 10 pixels high then."""


@dataclass(frozen=True, slots=True)
class Detection:
    """One text line that the detector found."""

    box: Box
    score: float


class TextDetector:
    """RapidOCR's text detector (PP-OCR, DBNet) on one thread; its weights are in its wheel."""

    def __init__(self) -> None:
        # Imported here: it takes a second and a `winnow --help` must not pay for it.
        from rapidocr import RapidOCR

        logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)
        self._engine = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,
                "Global.use_rec": False,
                # The default scales every picture to a 736-pixel short side. Frames come in the
                # size that suits the network here, so it must not scale the windows at all.
                "Det.limit_type": "min",
                "Det.limit_side_len": 32,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def __call__(self, luma: NDArray[np.uint8]) -> list[Detection]:
        """Upright text lines in a (h, w) picture."""
        found = self._engine(cv2.cvtColor(luma, cv2.COLOR_GRAY2BGR))
        if found.boxes is None:
            return []
        detections = []
        for corners, score in zip(found.boxes, found.scores, strict=True):
            left, top = np.floor(corners.min(axis=0)).astype(int).tolist()
            right, bottom = np.ceil(corners.max(axis=0)).astype(int).tolist()
            box = Box(left, top, right, bottom)
            # A slanted line fills its bounding box badly; overlay text is level.
            if box.area and cv2.contourArea(corners.astype(np.float32)) >= 0.7 * box.area:
                detections.append(Detection(box, float(score)))
        return detections


@cache
def detector() -> TextDetector:
    """The detector of this process."""
    return TextDetector()
