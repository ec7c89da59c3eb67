"""What a vision-language model is asked and what it answers, whatever the backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from winnow.operators.operator import Sample

Status = Literal["ok", "truncated", "refused", "error"]


@dataclass(frozen=True, slots=True)
class Video:
    """Sampled frames of one window of a clip, all of one size."""

    frames: Sequence[NDArray[np.uint8]]
    """(h, w, 3) RGB each, already within the pixel budget."""
    indices: Sequence[int]
    """Number of each frame in the clip."""
    seconds: Sequence[float]
    """Time of each frame from the clip's first."""
    source_fps: float
    """Frame rate of the clip."""

    @classmethod
    def of(cls, samples: Sequence[Sample], source_fps: float) -> Video:
        return cls(
            [sample.image for sample in samples],
            [sample.index for sample in samples],
            [sample.seconds for sample in samples],
            source_fps,
        )

    @property
    def fps(self) -> float:
        """Rate of the sampled frames themselves; 0 for one frame."""
        span = self.seconds[-1] - self.seconds[0] if self.seconds else 0.0
        return (len(self.seconds) - 1) / span if span > 0 else 0.0

    @property
    def pixels(self) -> int:
        """Pixels of one frame."""
        return int(self.frames[0].shape[0] * self.frames[0].shape[1]) if self.frames else 0


@dataclass(frozen=True, slots=True)
class Request:
    """One question about one window of one clip."""

    clip_id: str
    window: int
    video: Video
    user: str
    system: str = ""
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    schema: dict[str, Any] | None = None
    """JSON schema of the answer; enforced where the backend can, never relied upon."""
    choices: tuple[str, ...] = ()
    """Answers of one token each, to be weighed: the answer is one of them, with probabilities."""
    purpose: str = ""
    """Tells apart requests about the same window."""

    @property
    def key(self) -> tuple[str, int, str]:
        """What the answer must carry back."""
        return self.clip_id, self.window, self.purpose


@dataclass(slots=True)
class Answer:
    """What came of one request."""

    key: tuple[str, int, str]
    status: Status
    text: str = ""
    error: str | None = None
    probabilities: dict[str, float] = field(default_factory=dict)
    """By choice, renormalised over the choices."""
    leaked: float | None = None
    """Probability of the first token that lay outside the choices."""
    tokens_in: int | None = None
    tokens_out: int | None = None
    frames: int = 0
    fps: float = 0.0
    pixels: int = 0
    model: str = ""
    """Repository and revision, or the server's model name."""
    attempts: int = 1
    seconds: float = 0.0
