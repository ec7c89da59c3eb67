"""Settings of the physics critic."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from winnow.operators.critic.rubric import Rubric, RubricFile
from winnow.operators.operator import Budget, Sampling
from winnow.operators.settings import Strict
from winnow.operators.vlm.backend import TransformersSettings, VlmSettings
from winnow.operators.vlm.chat import TEMPORAL_PATCH
from winnow.operators.vlm.windows import SLACK

Mode = Literal["direct", "reasoning", "cascade"]

FEWEST_FRAMES = 4
"""Of a clip: motion cannot be judged by less."""
LONGEST_S = 60
"""Frames and windows of a longer clip are stretched: what is collected of one clip has a bound."""
_PATCH_14 = ("reason1", "qwen2.5", "qwen2_5", "qwen2-5")


class CriticSettings(Strict):
    """How clips are shown to the critic and what it is asked."""

    vlm: VlmSettings = Field(
        default_factory=lambda: TransformersSettings(model="cosmos-reason2-8b"),
        description="the model and how it is reached",
    )
    mode: Mode = Field(
        "direct",
        description="direct: the probabilities of the five digits as the first token; reasoning: "
        "votes of written answers; cascade: direct for all, reasoning near a threshold",
    )
    prompt: RubricFile = Field(
        default_factory=lambda: Rubric.read("direct"),
        description="the rubric; without one `direct`, in mode reasoning `reasoning`",
    )
    reasoning_prompt: RubricFile = Field(
        default_factory=lambda: Rubric.read("reasoning"),
        description="the rubric of a cascade's reasoning",
    )
    fps: float = Field(16.0, gt=0, description="frames a second that the model is shown")
    pixels: int = Field(
        8192 * 28 * 28,
        ge=2**16,
        description="most pixels of a window; two frames, which the models merge, count as one, as "
        "in qwen-vl-utils and so in the published recipes",
    )
    frame_pixels: int = Field(
        2**17, ge=2**10, description="most pixels of one frame; fewer where `pixels` demands it"
    )
    multiple: Literal[28, 32] | None = Field(
        None,
        description="of a frame's sides: 28 for Qwen2.5-VL and so Cosmos-Reason1, 32 for Qwen3-VL; "
        "by the model's name where it is not given",
    )
    most_s: float = Field(
        10.0,
        gt=0,
        description="longest clip that is judged as a whole; a longer one is cut into equal windows, "
        "and the worst of them is its judgement",
    )
    samples: int = Field(3, ge=1, le=64, description="reasoning: answers to each window")
    temperature: float = Field(0.6, ge=0, description="reasoning")
    max_tokens: int = Field(2048, ge=1, description="reasoning: longest answer")
    seed: int = Field(
        1, ge=0, description="reasoning: with a clip's id it makes the samples' seeds"
    )
    thresholds: tuple[float, ...] = Field(
        (3.5,), description="cascade: the scores at which policies decide"
    )
    margin: float = Field(
        0.5, ge=0, description="cascade: reason about clips whose score is so near a threshold"
    )
    most_entropy: float = Field(
        1.3, ge=0, description="cascade: or whose probabilities have this entropy, 0..1.61 nats"
    )
    budget_requests: int | None = Field(
        None, ge=0, description="most requests of this worker; what they do not cover is unscored"
    )
    budget_s: float | None = Field(
        None, ge=0, description="seconds of this worker's model, after which nothing more is asked"
    )

    @model_validator(mode="before")
    @classmethod
    def _rubric_of_the_mode(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("mode") == "reasoning":
            return {"prompt": "reasoning", **content}
        return content

    @model_validator(mode="after")
    def _fits_together(self) -> CriticSettings:
        if self.prompt.reasoning != (self.mode == "reasoning"):
            wanted = "asks" if self.mode == "reasoning" else "does not ask"
            raise ValueError(
                f"mode {self.mode} needs a prompt that {wanted} for a reasoning, which "
                f"{self.prompt.name!r} does{' not' if not self.prompt.reasoning else ''}: see its "
                "key `reasoning`"
            )
        if not self.reasoning_prompt.reasoning:
            raise ValueError(
                f"reasoning_prompt: {self.reasoning_prompt.name!r} asks for no reasoning: see its "
                "key `reasoning`"
            )
        if self.mode != "direct" and self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"at temperature 0 the {self.samples} samples would be one and the same: set "
                "samples: 1 or a temperature"
            )
        return self

    @field_validator("thresholds")
    @classmethod
    def _on_the_scale(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for threshold in value:
            if not 1 <= threshold <= 5:
                raise ValueError(f"the threshold {threshold:g} is no score from 1 to 5")
        return value

    @property
    def side(self) -> int:
        """What the sides of a frame are multiples of."""
        if self.multiple is not None:
            return self.multiple
        return 28 if any(part in self.vlm.model.lower() for part in _PATCH_14) else 32

    @property
    def most_frames(self) -> int:
        """Frames of a window, at most."""
        return max(FEWEST_FRAMES, math.ceil(self.fps * self.most_s * (1 + SLACK)))

    def sampling(self) -> Sampling:
        """The frames that are taken from a clip; a window may be scaled down further."""
        most = max(FEWEST_FRAMES, math.ceil(self.fps * LONGEST_S))
        fit = Budget(self.frame_pixels, self.side)
        return Sampling(self.fps, "rgb", minimum=FEWEST_FRAMES, maximum=most, fit=fit)

    def fit(self, frames: int) -> Budget:
        """The size of a frame in a window of so many."""
        pairs = max(1, math.ceil(frames / TEMPORAL_PATCH))
        return Budget(min(self.frame_pixels, self.pixels // pairs), self.side)
