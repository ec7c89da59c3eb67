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
from winnow.operators.operator import Column
from winnow.operators.shots import Detector, scan_shots
from winnow.stages.records import Clip, Source, clip_identity
from winnow.stages.stage import Files, Stage

COLUMNS = (
    Column("duration_s", pa.float64(), "length of the clip", "s", ">= 0"),
    Column("clip_frames", pa.int32(), "frames in the clip", "frames", ">= 1"),
    Column("shots_in_source", pa.int32(), "shots that the detector saw in the whole source", "shots",
           ">= 1", "lower is better"),
    Column("shot_index", pa.int32(), "which shot of its source the clip belongs to", "", ">= 0"),
)  # fmt: skip


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
    """Finds shots and cuts them to length. Short shots stay as rows: the policy has a rule."""

    name: ClassVar[str] = "split"
    files: Files
    detector: Detector
    longest_s: float = 60.0
    threads: int = 1
    label: str = "split"

    def columns(self) -> tuple[Column, ...]:
        return COLUMNS

    def process(self, source: Source) -> None:
        if source.media is None or source.source_id is None:
            raise RuntimeError("split needs a source that ingest has probed")
        with self.files.local(source.key) as path:
            scan = scan_shots(path, self.detector, threads=self.threads)
        if scan.frames == 0:
            raise MediaError("corrupt", "no frame of the video can be decoded")
        if scan.frames < 0.9 * source.media.frames and source.media.frames - scan.frames > 2:
            raise MediaError(
                "corrupt",
                f"only {scan.frames} of {source.media.frames} frames can be decoded",
            )
        source.clips = list(self._clips(source.source_id, scan.shots, scan.seconds, source))

    def _clips(
        self, source_id: str, shots: list[Span], seconds: NDArray[np.float64], source: Source
    ) -> Iterator[Clip]:
        assert source.media is not None
        frame_s = 1.0 / source.media.fps if source.media.fps > 0 else 0.0
        # The container knows how long the last frame is shown, which matters at an uneven rate.
        known = source.media.duration_s
        end_s = known if known > float(seconds[-1]) else float(seconds[-1]) + frame_s
        bounds = np.append(seconds, end_s)
        for index, shot in enumerate(shots):
            for span in divide(shot, seconds, end_s, self.longest_s):
                start, end = float(bounds[span.start]), float(bounds[span.end])
                yield Clip(
                    clip_id=clip_identity(source_id, span),
                    span=span,
                    start_s=round(start, 6),
                    end_s=round(end, 6),
                    columns={
                        "duration_s": round(end - start, 6),
                        "clip_frames": len(span),
                        "shots_in_source": len(shots),
                        "shot_index": index,
                    },
                )
