"""Collect: the frames that models are to see, taken from a source in one decode pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from winnow.operators.errors import MediaError
from winnow.operators.frames import read_spans
from winnow.operators.operator import Collecting, Needs, SeenClip
from winnow.stages.filter import view_of
from winnow.stages.records import Clip, Source


@dataclass(slots=True)
class CollectedClips:
    """What one decode pass took from the clips of a source that are alive."""

    seen: list[SeenClip]
    errors: list[str | None]
    """For each clip, why its frames are not all there."""

    @property
    def clips(self) -> int:
        return len(self.seen)

    @property
    def pixels(self) -> int:
        return sum(clip.pixels for clip in self.seen)


def collect_clips(
    path: Path, source: Source, clips: Sequence[Clip], needs: Needs, threads: int = 1
) -> CollectedClips:
    """Sample the clips' frames as `needs` asks. Raises MediaError where the file cannot be read."""
    if source.media is None:
        raise MediaError("internal", "a stage collects frames of a source that was not probed")
    taken = [Collecting(view_of(source, clip), needs) for clip in clips]
    frames = read_spans(
        path,
        [clip.span for clip in clips],
        source.media.fps,
        needs,
        lambda k, chunk: taken[k].update(chunk),
        threads=threads,
    )
    errors = [
        None if got == len(clip.span)
        else f"only {got} of the clip's {len(clip.span)} frames could be decoded"
        for got, clip in zip(frames, clips, strict=True)
    ]  # fmt: skip
    return CollectedClips([collecting.seen for collecting in taken], errors)
