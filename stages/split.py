"""Split: a source becomes clips, one per shot, none longer than the maximum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.operators.errors import MediaError
from winnow.operators.frames import Span
from winnow.operators.media import MediaInfo
from winnow.operators.operator import Column
from winnow.operators.shots import Detector, ShotScan, scan_shots
from winnow.stages.filter import Filter, Measuring
from winnow.stages.records import Clip, Source, clip_identity
from winnow.stages.stage import Files, Stage

COLUMNS = (
    Column("duration_s", pa.float64(), "length of the clip", "s", ">= 0"),
    Column("clip_frames", pa.int32(), "frames in the clip", "frames", ">= 1"),
    Column("shots_in_source", pa.int32(), "shots that the detector saw in the whole source", "shots",
           ">= 1", "lower is better"),
    Column("shot_index", pa.int32(), "which shot of its source the clip belongs to", "", ">= 0"),
)  # fmt: skip

# Frames before the first key frame cannot be decoded where a stream was cut in an open GOP.
LOST_FRAMES = 2


def divide(span: Span, seconds: NDArray[np.float64], end_s: float, longest_s: float) -> list[Span]:
    """Divide a shot into equal spans none of which lasts longer than `longest_s`.

    `seconds` are the presentation times of all frames, `end_s` the time at which the source ends.
    """
    bounds = np.append(seconds, end_s)
    length = bounds[span.end] - bounds[span.start]
    parts = max(1, math.ceil(length / longest_s - 1e-6))
    while True:
        # Cut at the frames nearest to equal times: right for a variable frame rate as well.
        targets = bounds[span.start] + length * np.arange(1, parts) / parts
        cuts = np.searchsorted(seconds[: span.end], targets - 1e-9)
        edges = [span.start, *(int(cut) for cut in cuts), span.end]
        spans = [Span(a, b) for a, b in pairwise(edges) if b > a]
        fits = all(bounds[s.end] - bounds[s.start] <= longest_s + 1e-6 for s in spans)
        if fits or parts > len(span):
            return spans
        parts += 1


@dataclass
class Split(Stage):
    """Finds shots and cuts them to length. Short shots stay as rows: the policy has a rule.

    A generated video is nearly always one shot. With `ahead`, the filter stage that follows, a file
    short enough to be one clip is measured in the same decode pass; should the detector then see
    several shots, the measures are thrown away and the filter measures the clips in its own pass.
    """

    name: ClassVar[str] = "split"
    files: Files
    detector: Detector
    longest_s: float = 60.0
    threads: int = 1
    label: str = "split"
    ahead: Filter | None = None

    def columns(self) -> tuple[Column, ...]:
        return COLUMNS

    def setup(self) -> None:
        if self.ahead is not None:
            self.ahead.setup()

    def process(self, source: Source) -> None:
        media, source_id = source.media, source.source_id
        if media is None or source_id is None:
            raise RuntimeError("split needs a source that ingest has probed")
        measuring, whole = None, self._whole(source_id, media)
        if self.ahead is not None and whole is not None:
            measuring = Measuring(self.ahead.label, self.ahead.operators, source, [whole])
        with self.files.local(source.key) as path:
            scan = scan_shots(
                path,
                self.detector,
                threads=self.threads,
                listener=measuring.reader.see if measuring else None,
                motion_vectors=measuring.needs.motion_vectors if measuring else False,
            )
        if scan.frames == 0:
            raise MediaError("corrupt", "no frame of the video can be decoded")
        if media.frames - scan.frames > LOST_FRAMES:
            raise MediaError(
                "corrupt", f"only {scan.frames} of {media.frames} frames can be decoded"
            )
        if scan.damaged_frames:
            raise MediaError(
                "corrupt", f"{scan.damaged_frames} of {scan.frames} frames are damaged"
            )
        source.clips = list(self._clips(source_id, scan, media))
        if measuring is not None and whole is not None and len(source.clips) == 1:
            (clip,) = source.clips
            if clip.span == whole.span:
                measured = measuring.finish()
                clip.columns |= whole.columns
                clip.vectors |= whole.vectors
                # The operators' time is the filter's, not the shot detector's.
                self._book(source, measured)

    def _book(self, source: Source, measured: float) -> None:
        assert self.ahead is not None
        source.seconds[self.ahead.label] = source.seconds.get(self.ahead.label, 0.0) + measured
        source.seconds[self.label] = source.seconds.get(self.label, 0.0) - measured

    def _whole(self, source_id: str, media: MediaInfo) -> Clip | None:
        """The file as one clip, where it is short enough to be one."""
        if media.frames <= 0 or media.duration_s > self.longest_s:
            return None
        span = Span(0, media.frames)
        return Clip(clip_identity(source_id, span), span, 0.0, media.duration_s)

    def _clips(self, source_id: str, scan: ShotScan, media: MediaInfo) -> Iterator[Clip]:
        frame_s = 1.0 / media.fps if media.fps > 0 else 0.0
        # The container knows how long the last frame is shown, which matters at an uneven rate.
        last = float(scan.seconds[-1])
        end_s = media.duration_s if media.duration_s > last else last + frame_s
        bounds = np.append(scan.seconds, end_s)
        # Where all frames belong to transitions, the file is one clip that the policy can judge.
        shots, count = scan.shots, len(scan.shots)
        if not shots:
            shots, count = [Span(0, scan.frames)], len(scan.transitions) + 1
        for index, shot in enumerate(shots):
            for span in divide(shot, scan.seconds, end_s, self.longest_s):
                start, end = float(bounds[span.start]), float(bounds[span.end])
                yield Clip(
                    clip_id=clip_identity(source_id, span),
                    span=span,
                    start_s=round(start, 6),
                    end_s=round(end, 6),
                    columns={
                        "duration_s": round(end - start, 6),
                        "clip_frames": len(span),
                        "shots_in_source": count,
                        "shot_index": index,
                    },
                )
