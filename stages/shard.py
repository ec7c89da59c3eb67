"""Shard: which partition of the dataset does a kept clip belong to?"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar

from winnow.stages.records import Clip, Source
from winnow.stages.stage import Stage

AXES = ("content_type", "resolution", "aspect_ratio", "length")


@dataclass(frozen=True)
class Buckets:
    """Bucket edges of the dataset's axes (configs/taxonomy/shards.yaml).

    `resolution`: name to the least short side in pixels. `aspect_ratio`: name to width / height; the
    nearest in log ratio is taken. `length_s`: edges in seconds.
    """

    resolution: dict[str, int]
    aspect_ratio: dict[str, float]
    length_s: tuple[float, ...]

    def resolution_of(self, width: int, height: int) -> str:
        side = min(width, height)
        fitting = [(least, name) for name, least in self.resolution.items() if side >= least]
        return max(fitting)[1] if fitting else "smaller"

    def aspect_ratio_of(self, width: int, height: int) -> str:
        ratio = width / height
        return min(self.aspect_ratio, key=lambda name: max(ratio / self.aspect_ratio[name],
                                                           self.aspect_ratio[name] / ratio))  # fmt: skip

    def length_of(self, seconds: float) -> str:
        edges = self.length_s
        # A clip of 120 frames at 29.97 fps is a 4-second clip: do not split hairs at the edge.
        place = bisect_right(edges, seconds + 0.01)
        if place == 0:
            return f"0-{edges[0]:g}s"
        if place == len(edges):
            return f"{edges[-1]:g}s+"
        return f"{edges[place - 1]:g}-{edges[place]:g}s"


@dataclass
class Shard(Stage):
    """Names the partition of every clip that has media."""

    name: ClassVar[str] = "shard"
    buckets: Buckets
    label: str = "shard"

    def process(self, source: Source) -> None:
        for clip in source.clips:
            if clip.media is not None:
                clip.partition = self._partition(clip)

    def _partition(self, clip: Clip) -> dict[str, str]:
        assert clip.media is not None
        width, height = clip.media.width, clip.media.height
        return {
            "content_type": str(clip.columns.get("content_type_label") or "unknown"),
            "resolution": self.buckets.resolution_of(width, height),
            "aspect_ratio": self.buckets.aspect_ratio_of(width, height),
            "length": self.buckets.length_of(clip.duration_s),
        }
