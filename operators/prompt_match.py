"""Prompt match: does the clip show what its prompt asked for, from start to end?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

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
    SeenClip,
)

_SOURCE = "CLIPScore (Hessel et al. 2021), without its factor"


@dataclass(frozen=True)
class PromptMatch(BatchOperator):
    """Cosine between the frames and the clip's prompt, alone and against other prompts of the run.

    All columns are NULL for a clip without a prompt. The backbone sees the beginning of a long
    prompt only (some 50 words). Cosines of different backbones cannot be compared; for CLIP
    ViT-L/14 a fitting prompt has about 0.2 to 0.35.
    """

    name: ClassVar[str] = "prompt_match"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "prompt_match_mean",
            pa.float64(),
            "cosine of the frames to the clip's prompt, mean over time; NULL without a prompt",
            unit="cosine",
            range="-1..1",
            direction="higher is better",
            source=_SOURCE,
        ),
        Column(
            "prompt_match_min",
            pa.float64(),
            "the same for the frame that matches least; NULL without a prompt",
            unit="cosine",
            range="-1..1",
            direction="higher is better",
            source=_SOURCE,
        ),
        Column(
            "prompt_match_trend",
            pa.float64(),
            "mean cosine of the last third of the frames minus that of the first: negative where the "
            "clip leaves its prompt; NULL without a prompt or with fewer than three frames",
            unit="cosine",
            range="-2..2",
            direction="higher is better",
        ),
        Column(
            "prompt_match_margin",
            pa.float64(),
            "`prompt_match_mean` minus that of the best-matching other prompt of the run: negative "
            "where another prompt fits better; NULL without a prompt or without other prompts",
            unit="cosine",
            range="-2..2",
            direction="higher is better",
        ),
        Column(
            "prompt_match_rank_share",
            pa.float64(),
            "share of the run's other prompts that match less than the clip's own: 1 is the best "
            "rank; NULL without a prompt or without other prompts",
            unit="share",
            range="0..1",
            direction="higher is better",
        ),
    )

    @property
    def needs(self) -> Needs:
        return Needs(frame_embeddings=True)

    def load(self, models: Models) -> BatchMeasure:
        return _PromptMatch()


class _PromptMatch(Head):
    def __call__(self, clips: Sequence[SeenClip]) -> list[Measures | MeasureError]:
        # The texts of all clips in few forwards; clip by clip they are then remembered.
        for clip in clips[:1]:
            if clip.embeddings is not None:
                texts = [text for seen in clips for text in _texts(seen.view)]
                clip.embeddings.backbone.embed_texts(list(dict.fromkeys(texts)))
        return super().__call__(clips)

    def measure(self, view: ClipView, frames: FrameEmbeddings) -> Measures:
        columns: dict[str, Any] = dict.fromkeys(column.name for column in PromptMatch.columns)
        texts = _texts(view)
        if not texts:
            return Measures(columns)
        embedded = frames.backbone.embed_texts(texts).astype(np.float64)
        cosines = frames.vectors.astype(np.float64) @ embedded.T
        own, others = cosines[:, 0], cosines[:, 1:].mean(axis=0)
        mean = float(own.mean())
        columns |= {"prompt_match_mean": mean, "prompt_match_min": float(own.min())}
        third = len(own) // 3
        if third:
            columns["prompt_match_trend"] = float(own[-third:].mean() - own[:third].mean())
        if len(others):
            columns["prompt_match_margin"] = mean - float(others.max())
            columns["prompt_match_rank_share"] = float((others < mean).mean())
        return Measures(columns)


def _texts(view: ClipView) -> list[str]:
    """The clip's prompt and then the others, each once; empty without a prompt."""
    own = " ".join((view.prompt or "").split())
    if not own:
        return []
    others = (" ".join(prompt.split()) for prompt in view.other_prompts)
    return list(dict.fromkeys([own, *(prompt for prompt in others if prompt)]))
