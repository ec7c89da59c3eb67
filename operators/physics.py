"""The physics critic as an operator: does a clip obey physics, on the scale 1 to 5 of VideoPhy-2?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa

from winnow.operators.critic.critic import Critic, Examined, Shown
from winnow.operators.critic.judgement import SCORES
from winnow.operators.critic.settings import CriticSettings
from winnow.operators.errors import MeasureError
from winnow.operators.models import Models
from winnow.operators.operator import (
    BatchMeasure,
    BatchOperator,
    Column,
    Measures,
    Needs,
    SeenClip,
)
from winnow.operators.vlm.messages import Video

_SCALE = "scale, criteria and question of VideoPhy-2 (arXiv 2503.06800)"
_MEAN = "mean of the digits' probabilities rather than the likeliest digit (arXiv 2503.03064)"
_UNLESS = "NULL unless status is ok"


@dataclass(frozen=True)
class Physics(BatchOperator):
    """Asks a vision-language model how well a clip obeys physics, from 1 (not at all) to 5 (fully).

    A clip longer than `most_s` is judged in equal windows, and its worst window is its judgement. An
    answer without a clear score is a status of its own and never a score; so is a clip that the
    budget left out. Raises MeasureError where the model was asked and gave no answer at all.
    """

    name: ClassVar[str] = "physics"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "physics_score",
            pa.float64(),
            "how well the clip obeys physics: the mean of the scores 1 to 5, weighted by their "
            "probabilities; of a clip longer than `most_s`, which is judged in equal windows, that "
            f"of the window with the lowest, as a violation anywhere counts; {_UNLESS}",
            range="1..5",
            direction="higher is better",
            source=f"{_SCALE}; {_MEAN}",
        ),
        *(
            Column(
                f"physics_p{score}",
                pa.float64(),
                f"probability of the score {score}: as the first token, among the five digits, or in "
                f"reasoning mode its share of the readable samples; {_UNLESS}",
                range="0..1",
            )
            for score in SCORES
        ),
        Column(
            "physics_argmax",
            pa.int32(),
            f"the likeliest score, of equally likely ones the lowest; {_UNLESS}",
            range="1..5",
            direction="higher is better",
            source=_SCALE,
        ),
        Column(
            "physics_entropy",
            pa.float64(),
            f"uncertainty of the five probabilities; {_UNLESS}",
            unit="nats",
            range="0..1.61",
        ),
        Column(
            "physics_leaked",
            pa.float64(),
            "direct mode: probability that the first token is none of the five digits; high where "
            f"the model wants to say something else first; {_UNLESS}",
            range="0..1",
            direction="lower is better",
        ),
        Column(
            "physics_status",
            pa.string(),
            "ok; unparsed: no clear score in what the model wrote, or in most of its samples; "
            "refused; error: a window or most of its samples got no answer; unscored: the budget was "
            "spent before, which is no pass; of a clip in windows what went wrong with most of those "
            "without a score, as one of them is enough to leave the clip without one",
        ),
        Column("physics_mode", pa.string(), "what the score comes from: direct or reasoning"),
        Column(
            "physics_direct_score",
            pa.float64(),
            "the score of direct mode, also where a cascade's reasoning took its place",
            range="1..5",
            direction="higher is better",
            source=f"{_SCALE}; {_MEAN}",
        ),
        Column(
            "physics_samples",
            pa.list_(pa.int32()),
            "reasoning: the score of each sample, NULL in the place of one that held none",
        ),
        Column(
            "physics_trace", pa.string(), "reasoning: text of the first sample that led to a score"
        ),
        Column(
            "physics_notes",
            pa.list_(pa.string()),
            "why there is no score; that a reasoning was due and the budget did not allow it, or that "
            "it led to no score",
        ),
        Column("physics_windows", pa.int32(), "windows that the clip was judged in", range="1.."),
        Column(
            "physics_worst_window_start_s",
            pa.float64(),
            f"start of the window that the score is from; {_UNLESS}",
            unit="s",
            range="0..",
        ),
        Column(
            "physics_fps", pa.float32(), "mean rate of the frames shown", unit="1/s", range="0.."
        ),
        Column("physics_frames", pa.int32(), "frames shown, of all windows", unit="frames"),
        Column("physics_pixels", pa.int32(), "most pixels of one frame shown", unit="pixels"),
        Column("physics_prompt", pa.string(), "name and hash of the rubric"),
        Column("physics_model", pa.string(), "the model that answered, with its revision"),
    )

    critic: CriticSettings = field(default_factory=CriticSettings)
    """The model, how clips are shown to it and what it is asked."""

    @property
    def needs(self) -> Needs:
        return Needs(samples=(self.critic.sampling(),))

    def models(self) -> tuple[str, ...]:
        return self.critic.vlm.models()

    def load(self, models: Models) -> PhysicsMeasure:
        return PhysicsMeasure(Critic.open(self.critic, models))


class PhysicsMeasure(BatchMeasure):
    """The critic with its model loaded."""

    def __init__(self, critic: Critic) -> None:
        self._critic = critic

    def __call__(self, clips: Sequence[SeenClip]) -> list[Measures | MeasureError]:
        return [_measures(examined) for examined in self._critic.examine(self._shown(clips))]

    def close(self) -> None:
        self._critic.close()

    def _shown(self, clips: Sequence[SeenClip]) -> list[Shown]:
        sampling = self._critic.settings.sampling()
        return [
            Shown(
                clip.view.clip_id,
                Video.of(clip.samples.get(sampling, []), clip.view.fps),
                clip.view.prompt,
                clip.view.duration_s,
            )
            for clip in clips
        ]


def _measures(examined: Examined) -> Measures | MeasureError:
    judgement = examined.judgement
    if not examined.answered:
        return MeasureError(judgement.error or "the VLM gave no answer")
    probabilities = judgement.probabilities or (None,) * len(SCORES)
    notes = [*([judgement.error] if judgement.error else []), *judgement.notes]
    asked = judgement.status != "unscored"
    columns: dict[str, Any] = {
        "score": judgement.score,
        **{f"p{score}": p for score, p in zip(SCORES, probabilities, strict=True)},
        "argmax": judgement.argmax,
        "entropy": judgement.entropy,
        "leaked": judgement.leaked,
        "status": judgement.status,
        "mode": judgement.mode if asked else None,
        "direct_score": examined.direct_score,
        "samples": list(judgement.samples) or None,
        "trace": judgement.trace,
        "notes": notes or None,
        "windows": examined.windows,
        "worst_window_start_s": examined.worst_start_s,
        "fps": judgement.fps if asked else None,
        "frames": judgement.frames if asked else None,
        "pixels": judgement.pixels if asked else None,
        "prompt": judgement.prompt or None,
        "model": judgement.model or None,
    }
    return Measures({f"{Physics.name}_{measure}": value for measure, value in columns.items()})
