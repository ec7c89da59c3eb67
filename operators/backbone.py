"""The vision backbone: one CLIP-like model whose frame embeddings serve many heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from winnow.operators.models import Models
from winnow.operators.operator import Sampling, Square
from winnow.operators.settings import Strict


class BackboneConfig(Strict):
    """Which backbone a filter stage has, and which frames it sees."""

    model: str = "clip-vit-l-14"
    rate: float = Field(2.0, gt=0, description="frames a second")
    minimum: int = Field(4, ge=1, description="least frames a clip, where it has them")
    maximum: int = Field(32, ge=1, description="most frames a clip")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_pixels: int = Field(
        128 * 224 * 224, ge=1, description="pixels of one forward; halved where memory runs out"
    )

    def sampling(self, models: Models) -> Sampling:
        """The frames to sample, as the model's image processor wants them."""
        model = models.get(self.model)
        assert model.image_size is not None
        return Sampling(
            self.rate,
            kind="rgb",
            minimum=self.minimum,
            maximum=self.maximum,
            fit=Square(model.image_size, model.crop),
        )

    def load(self, models: Models) -> Backbone:
        """Load the model. Raises ModelUnavailable."""
        raise NotImplementedError


class Backbone(ABC):
    """A loaded vision backbone."""

    model: str
    dimensions: int
    logit_scale: float
    """What cosines are multiplied by before a softmax over texts."""
    frames_seen: int = 0
    """Frames that went through the image tower; one forward a sampled frame."""

    @abstractmethod
    def embed_frames(self, frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """(n, d) embeddings of length 1 of square RGB frames (side, side, 3)."""

    @abstractmethod
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, d) embeddings of length 1; texts seen before are remembered."""
