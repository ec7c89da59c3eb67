"""Drift: how far, how fast and how abruptly the look of a clip leaves that of its start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from winnow.operators.backbone import Head
from winnow.operators.embedding import pooled
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

ENDS_S = 1.0
"""Length of the start and of the end that are compared; at most half of the clip each."""


@dataclass(frozen=True)
class Drift(BatchOperator):
    """Change of the frame embeddings over a clip.

    World models that run on lose the scene that they started from: colours saturate, objects turn
    into others. A scene that changes on purpose drifts too: compare clips of one kind, or with the
    control video. All columns are NULL where fewer than two frames were sampled.
    """

    name: ClassVar[str] = "drift"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "drift_total",
            pa.float64(),
            "cosine distance between the mean embeddings of the first and of the last second",
            unit="1 - cosine",
            range="0..2",
            direction="lower is better",
        ),
        Column(
            "drift_step_max",
            pa.float64(),
            "largest cosine distance between consecutive sampled frames: a jump; it depends on the "
            "backbone's sampling rate",
            unit="1 - cosine",
            range="0..2",
            direction="lower is better",
        ),
        Column(
            "drift_slope",
            pa.float64(),
            "growth of the cosine distance to the first second, as a line through all frames",
            unit="1 - cosine per second",
            direction="lower is better",
            source="least squares",
        ),
    )

    @property
    def needs(self) -> Needs:
        return Needs(frame_embeddings=True)

    def load(self, models: Models) -> BatchMeasure:
        return _Drift()


class _Drift(Head):
    def measure(self, view: ClipView, frames: FrameEmbeddings) -> Measures:
        columns: dict[str, Any] = dict.fromkeys(column.name for column in Drift.columns)
        vectors, seconds = frames.vectors.astype(np.float64), frames.seconds
        span = float(seconds[-1] - seconds[0])
        if len(vectors) < 2 or span <= 0:
            return Measures(columns)
        ends = min(ENDS_S, span / 2)
        start, _ = pooled(frames.vectors[seconds < seconds[0] + ends])
        end, _ = pooled(frames.vectors[seconds > seconds[-1] - ends])
        distances = 1 - vectors @ start
        steps = 1 - np.einsum("nd,nd->n", vectors[:-1], vectors[1:])
        times = seconds - seconds.mean()
        columns |= {
            "drift_total": max(0.0, float(1 - start @ end)),
            "drift_step_max": max(0.0, float(steps.max())),
            "drift_slope": float(times @ distances / (times @ times)),
        }
        return Measures(columns)
