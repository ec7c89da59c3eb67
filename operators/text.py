"""Overlay text: subtitles, titles and watermarks that lie on the picture and not in the scene.

Generators learn captions and logos from their training videos. Overlay text differs from a sign or
a label in that it stays at the same place in the image while the scene moves, so that is what is
measured: text regions that stay, found by RapidOCR's detector (no recognition) in the few windows
where strokes persist from one sampled frame to the next. Text that moves with the scene is not
counted. Where the whole picture stands still the two cannot be told apart by motion; then only text
at a caption's or a watermark's place counts as overlay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.operators.errors import MeasureError, ModelUnavailable
from winnow.operators.operator import (
    ClipView,
    Column,
    FrameChunk,
    Measurement,
    Needs,
    Operator,
    Sampling,
)
from winnow.operators.text_gate import (
    STRIDE,
    Box,
    Gradient,
    Searched,
    candidates,
    edge_energy,
    gradient,
    steady,
    windows,
)
from winnow.operators.text_tracks import Track, union_share

HEIGHT = 352
"""Height at which frames are searched: text of 3 % of the frame has 10 pixels, enough to detect."""
ENLARGED = 2.0
"""How much smaller frames are enlarged at most."""
STEADY_FRAMES = 3
"""Sampled frames in a row in which strokes must persist before the detector is asked."""
LINE_HEIGHT = (0.015, 0.25)
"""Least and greatest height of a text box, as a share of the frame's; others are no lines."""
LINE_ASPECT = 1.2
"""Least width of a text box as a multiple of its height: a short logo has that."""
LEVEL = 0.7
"""Least share of its upright bounding box that a detection fills; slanted ones fill less."""
SAME_TEXT = 0.5
"""Overlap from which on two boxes are the same text."""
LASTING = 0.6
"""Share of the clip from which on text in a corner is a watermark and not a line of text."""
BLANK = 0.5
"""Mean squared gradient under which a picture is blank, and can be called neither still nor not."""

_SOURCE = "RapidOCR PP-OCR text detection; tracks by the presence of their gradient"


class TextDetector:
    """RapidOCR's text detector (PP-OCR, a DBNet) on one thread; its weights are in its wheel."""

    def __init__(self) -> None:
        # Imported here: it takes a second that `winnow --help` must not pay.
        from rapidocr import RapidOCR

        self._engine = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,
                "Global.use_rec": False,
                # By default it scales everything to a 736-pixel short side. Windows come in the
                # size that suits the network, so the limit is set where it never applies.
                "Det.limit_type": "min",
                "Det.limit_side_len": 32,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def __call__(self, luma: NDArray[np.uint8]) -> list[Box]:
        """Boxes of the level text lines in a (h, w) picture."""
        found: Any = self._engine(cv2.cvtColor(luma, cv2.COLOR_GRAY2BGR))
        if found.boxes is None:
            return []
        boxes = []
        for corners in found.boxes:
            left, top = np.floor(corners.min(axis=0)).astype(int).tolist()
            right, bottom = np.ceil(corners.max(axis=0)).astype(int).tolist()
            box = Box(left, top, right, bottom)
            if box.area and cv2.contourArea(corners.astype(np.float32)) >= LEVEL * box.area:
                boxes.append(box)
        return boxes


@cache
def detector() -> TextDetector:
    """The detector of this process. Raises ModelUnavailable."""
    try:
        loaded = TextDetector()
        loaded(np.zeros((STRIDE, STRIDE), np.uint8))  # the network is loaded by its first use
    except Exception as error:
        raise ModelUnavailable(
            "the text detector cannot be loaded (reinstall rapidocr and onnxruntime, or leave out "
            f"the operator `text`): {error}"
        ) from error
    return loaded


@dataclass(frozen=True)
class Text(Operator):
    """Overlay text that stays in place for at least three sampled frames (a second).

    Method: the gradients of consecutive sampled frames are compared pixel by pixel; where dense
    strokes persist in three frames, the detector searches a window around them, unless it has
    searched the same picture there before. Every box found is then followed through the clip by
    the presence of its strokes. Text that is shown for less than a second is missed, and so is
    text that moves, scrolls or is slanted. In a still picture text that is neither in a corner nor
    at a caption's place counts as part of the scene (a sign, a label), a centred title too.
    All columns are NULL for clips of fewer than three frames. Raises MeasureError where fewer than
    three sampled frames of a longer clip arrive.
    """

    name: ClassVar[str] = "text"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "text_area_share",
            pa.float64(),
            "share of the frame under text that stays in place, mean over the sampled frames",
            unit="share",
            range="0..1",
            direction="lower is better",
            source=_SOURCE,
        ),
        Column(
            "text_area_share_max",
            pa.float64(),
            "the same, in the sampled frame that has most",
            unit="share",
            range="0..1",
            direction="lower is better",
            source=_SOURCE,
        ),
        Column(
            "text_frame_share",
            pa.float64(),
            "share of the sampled frames with text that stays in place",
            unit="share",
            range="0..1",
            direction="lower is better",
            source=_SOURCE,
        ),
        Column(
            "text_track_s",
            pa.float64(),
            "longest time that one text stays at the same place in the image",
            unit="s",
            range="0..",
            direction="lower is better",
            source=_SOURCE,
        ),
        Column(
            "text_overlay_area_share",
            pa.float64(),
            "share of the frame under overlay text, mean over the sampled frames: text that stays "
            "while the scene moves, or at a caption's or watermark's place in a still scene",
            unit="share",
            range="0..1",
            direction="lower is better",
            source=_SOURCE,
        ),
        Column(
            "text_line_s",
            pa.float64(),
            "longest time that one overlay text stays (subtitle, title, lower third), without "
            "text that lies in a corner for 60 % of the clip or more",
            unit="s",
            range="0..",
            direction="lower is better",
            source=_SOURCE,
        ),
        Column(
            "text_corner_share",
            pa.float64(),
            "greatest share of the clip for which one text stays in a corner (watermark, logo)",
            unit="share",
            range="0..1",
            direction="lower is better",
            source=_SOURCE,
        ),
        Column(
            "text_stillness",
            pa.float64(),
            "how much of the picture's edges outside text stays from one sampled frame to the "
            "next, mean; near 1 nothing moves, and overlay and scene text look alike; "
            "0 for blank pictures",
            unit="share",
            range="0..1",
            source="this operator",
        ),
        Column(
            "text_frames_sampled",
            pa.int32(),
            "frames that were looked at",
            unit="frames",
            range="3..",
        ),
        Column(
            "text_frames_searched",
            pa.int32(),
            "frames in which the detector was asked, in some window",
            unit="frames",
            range="0..",
        ),
    )

    rate: float = 2.0
    """Sampled frames a second; text must stay for three of them."""
    still: float = 0.5
    """Stillness from which on a scene is still, so that only its place tells overlay text."""

    @property
    def needs(self) -> Needs:
        return Needs(samples=(self._sampling,))

    @property
    def _sampling(self) -> Sampling:
        return Sampling(rate=self.rate, kind="luma", height=HEIGHT, minimum=4)

    def setup(self) -> None:
        detector()

    def start(self, view: ClipView) -> TextMeasurement:
        return TextMeasurement(view.frames, view.duration_s, self._sampling, self.still)


class TextMeasurement(Measurement):
    """Overlay text of one clip."""

    def __init__(self, frames: int, duration_s: float, sampling: Sampling, still: float) -> None:
        self._frames = frames
        self._duration_s = duration_s
        self._sampling = sampling
        self._still = still
        self._sampled = 0
        self._asked = 0
        self._stillness: list[float] = []
        self._tracks: list[Track] = []
        self._luma: NDArray[np.uint8] | None = None
        self._gradient: Gradient | None = None
        self._steady: Gradient | None = None
        self._searched: Searched | None = None

    def update(self, chunk: FrameChunk) -> None:
        for sample in chunk.samples[self._sampling]:
            self._look(_at_search_height(sample.image))

    def _look(self, luma: NDArray[np.uint8]) -> None:
        number = self._sampled
        self._sampled += 1
        before, self._luma = self._luma, luma
        earlier, self._gradient = self._gradient, gradient(luma)
        if before is None or earlier is None:
            return
        pair = steady(earlier, self._gradient)
        for track in self._tracks:
            track.follow(number, self._gradient)
        earlier_pair, self._steady = self._steady, pair
        if earlier_pair is None:
            return
        # What stays in two pairs that share a frame stays in three.
        mean = np.asarray(cv2.addWeighted(before, 0.5, luma, 0.5, 0), np.uint8)
        self._find(mean, steady(earlier_pair, pair), number)
        # Only now, because the text just found is no part of the scene.
        stillness = self._still_share(self._gradient, pair)
        self._stillness.append(stillness)
        for track in self._tracks:
            if track.numbers[-1] == number:
                track.stillness.append(stillness)

    def _find(self, image: NDArray[np.uint8], lasting: Gradient, number: int) -> None:
        """Search for new text where strokes last.

        `image` is the mean of two frames: what moves behind the text fades in it, text does not.
        """
        height, width = image.shape
        if self._searched is None:
            self._searched = Searched(height, width)
        boxes = windows(candidates(lasting, self._searched), width, height)
        self._asked += bool(boxes)
        for window in boxes:
            found = self._search(image, window)
            self._searched.remember(window, lasting, bool(found))
            for box in found:
                self._begin(box, number, lasting)

    def _search(self, image: NDArray[np.uint8], window: Box) -> list[Box]:
        height, width = image.shape
        lowest, highest = (share * height for share in LINE_HEIGHT)
        found = []
        for part in detector()(np.ascontiguousarray(window.within(image))):
            box = part.moved(window.left, window.top).padded(0, width, height)
            if lowest <= box.height <= highest and box.width >= LINE_ASPECT * box.height:
                found.append(box)
        return found

    def _begin(self, box: Box, number: int, lasting: Gradient) -> None:
        height, width = lasting.shape[1:]
        strokes = box.within(lasting).copy()
        known = any(
            track.numbers[-1] == number and track.box.overlap(box) > SAME_TEXT
            for track in self._tracks
        )
        if strokes.any() and not known:
            numbers = list(range(number - STEADY_FRAMES + 1, number + 1))
            self._tracks.append(Track(box, width, height, strokes, numbers))

    def _still_share(self, seen: Gradient, stays: Gradient) -> float:
        """How much of the edges outside known text stays, 0..1; 0 for a blank picture."""
        # Every fourth pixel both ways is plenty for a share.
        seen, stays = seen[:, ::4, ::4].copy(), stays[:, ::4, ::4].copy()
        for track in self._tracks:
            box = track.box
            place = np.s_[:, box.top // 4 : box.bottom // 4 + 1, box.left // 4 : box.right // 4 + 1]
            seen[place] = stays[place] = 0
        edges = edge_energy(seen)
        return min(1.0, edge_energy(stays) / edges) if edges > BLANK * seen[0].size else 0.0

    def columns(self) -> dict[str, Any]:
        if self._sampled < STEADY_FRAMES:
            if self._frames >= STEADY_FRAMES:
                raise MeasureError(f"only {self._sampled} of the sampled frames could be read")
            return {column.name: None for column in Text.columns}
        sampled = self._sampled
        step_s = self._duration_s / sampled
        shares = self._area_shares(self._tracks)
        overlay = [track for track in self._tracks if track.is_overlay(self._still)]
        corner = [track for track in overlay if track.in_corner]
        # What comes and goes in a corner is a lower third or a caption, not a watermark.
        lasts = LASTING * sampled
        lines = [t for t in overlay if not t.in_corner or len(t.numbers) < lasts]
        return {
            "text_area_share": float(np.mean(shares)),
            "text_area_share_max": float(np.max(shares)),
            "text_frame_share": float(np.mean(np.array(shares) > 0)),
            "text_track_s": step_s * max((track.longest for track in self._tracks), default=0),
            "text_overlay_area_share": float(np.mean(self._area_shares(overlay))),
            "text_line_s": step_s * max((track.longest for track in lines), default=0),
            "text_corner_share": max((len(track.numbers) for track in corner), default=0) / sampled,
            "text_stillness": float(np.mean(self._stillness)),
            "text_frames_sampled": sampled,
            "text_frames_searched": self._asked,
        }

    def _area_shares(self, tracks: list[Track]) -> list[float]:
        """Share of the frame under some tracks, for every sampled frame."""
        boxes: dict[int, list[Box]] = {}
        for track in tracks:
            for number in track.numbers:
                boxes.setdefault(number, []).append(track.box)
        assert self._gradient is not None
        height, width = self._gradient.shape[1:]
        return [
            union_share(boxes[number], width, height) if number in boxes else 0.0
            for number in range(self._sampled)
        ]


def _at_search_height(luma: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames come no larger than asked for; small ones are enlarged for the detector's sake."""
    height, width = luma.shape
    factor = min(HEIGHT / height, ENLARGED)
    if factor <= 1:
        return luma
    size = (round(width * factor), round(height * factor))
    return np.asarray(cv2.resize(luma, size, interpolation=cv2.INTER_LINEAR), np.uint8)
