"""The semantic vector of a clip: for near-duplicates in meaning, and for search by text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.operators.backbone import Head
from winnow.operators.errors import MeasureError
from winnow.operators.models import Models
from winnow.operators.operator import (
    BatchMeasure,
    BatchOperator,
    ClipView,
    Column,
    FrameEmbeddings,
    Measures,
    Needs,
)

SPACE = "semantic"
"""Name of the vector in `embeddings`, whichever backbone made it: `embedding_model` tells which."""


@dataclass(frozen=True)
class Embedding(BatchOperator):
    """The mean of a clip's frame embeddings, as one vector of length 1.

    Vectors can be compared where `embedding_model` is the same: another backbone is another space.
    Texts embedded by that backbone lie in the same space.
    """

    name: ClassVar[str] = "embedding"
    version: ClassVar[int] = 1
    embeddings: ClassVar[tuple[str, ...]] = (SPACE,)
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "embedding_spread",
            pa.float64(),
            "mean cosine distance of the sampled frames to the clip's vector: 0 where all look alike",
            unit="1 - cosine",
            range="0..1",
        ),
        Column("embedding_frames", pa.int32(), "sampled frames behind the vector", unit="frames"),
        Column(
            "embedding_model",
            pa.string(),
            "repository and revision of the backbone: compare vectors of the same one only",
        ),
    )

    @property
    def needs(self) -> Needs:
        return Needs(frame_embeddings=True)

    def load(self, models: Models) -> BatchMeasure:
        return _Embedding()


class _Embedding(Head):
    def measure(self, view: ClipView, frames: FrameEmbeddings) -> Measures:
        vector, length = pooled(frames.vectors)
        columns = {
            # Of unit vectors, the mean cosine to their mean is the length of that mean.
            "embedding_spread": float(np.clip(1 - length, 0, 1)),
            "embedding_frames": len(frames.vectors),
            "embedding_model": frames.backbone.identity,
        }
        return Measures(columns, {SPACE: vector.astype(np.float32)})


def pooled(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
    """The direction of the mean of (n, d) unit vectors, and the length of that mean.

    Raises MeasureError where the vectors cancel out.
    """
    mean = vectors.mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(mean))
    if length < 1e-6:
        raise MeasureError("the frames' embeddings cancel out: they have no mean direction")
    return mean / length, length
