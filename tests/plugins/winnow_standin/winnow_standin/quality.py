"""What a DOVER plug-in looks like, with a formula where the network would be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.operators.errors import MeasureError
from winnow.operators.models import Models
from winnow.operators.operator import (
    BatchMeasure,
    BatchOperator,
    Column,
    Measures,
    Needs,
    Sampling,
    SeenClip,
)
from winnow.operators.quality_scores import clip_seed, dover_fusion, fragments, frame_numbers


@dataclass(frozen=True)
class StandIn(BatchOperator):
    """Technical, aesthetic and overall quality in DOVER's form, by a formula: means nothing."""

    name: ClassVar[str] = "standin"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = tuple(
        Column(f"standin_{score}", pa.float64(), f"{score} quality", range="0..1",
               direction="higher is better", source="stand-in for DOVER (Wu et al. 2023)")
        for score in ("technical", "aesthetic", "overall")
    )  # fmt: skip

    rate: float = 8.0
    """Frames a second."""
    rows: int = 3
    """Runs of frames that fragments are cut from."""

    @property
    def sampling(self) -> Sampling:
        # Native size: scaled frames have lost what technical quality is about.
        return Sampling(self.rate, kind="rgb", minimum=4, maximum=32)

    @property
    def needs(self) -> Needs:
        return Needs(samples=(self.sampling,))

    def load(self, models: Models) -> BatchMeasure:
        # A real plug-in imports torch and loads its own checked weights here, not above.
        return _Scorer(self)


class _Scorer(BatchMeasure):
    def __init__(self, operator: StandIn) -> None:
        self._operator = operator

    def __call__(self, clips: Sequence[SeenClip]) -> list[Measures | MeasureError]:
        return [self._measured(clip) for clip in clips]

    def _measured(self, clip: SeenClip) -> Measures | MeasureError:
        images = [sample.image for sample in clip.samples[self._operator.sampling]]
        if not images:
            return MeasureError("no frame of the clip was sampled")
        seed = clip_seed(clip.view.clip_id, self._operator.name)
        rows = frame_numbers(len(images), seed, length=8, interval=1, clips=self._operator.rows)
        cut = [fragments([images[n] for n in row], seed + k) for k, row in enumerate(rows)]
        scores = dover_fusion(
            aesthetic=_colour(np.stack(images)),
            technical=float(np.mean([_detail(patches) for patches in cut])),
        )
        return Measures({f"standin_{name}": score for name, score in scores._asdict().items()})


def _detail(patches: NDArray[np.uint8]) -> float:
    """In place of the network on fragments: how much neighbouring pixels differ, 0..1."""
    return float(np.abs(np.diff(patches.astype(np.float32), axis=2)).mean() / 255)


def _colour(frames: NDArray[np.uint8]) -> float:
    """In place of the network on whole frames: how colourful they are, around DOVER's mean."""
    spread = frames.max(axis=3).astype(np.float32) - frames.min(axis=3)
    return float(spread.mean() / 255) * 0.1 - 0.1
