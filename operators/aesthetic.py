"""Aesthetics: how much people would like the look of the frames, by LAION's improved predictor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.operators.backbone import Head
from winnow.operators.errors import ConfigError
from winnow.operators.models import Model, Models
from winnow.operators.operator import (
    BatchMeasure,
    BatchOperator,
    ClipView,
    Column,
    FrameEmbeddings,
    Measures,
    Needs,
)

_SOURCE = "LAION improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE"
_LAYER = re.compile(r"layers\.(\d+)\.(weight|bias)")


def _column(name: str, meaning: str) -> Column:
    return Column(
        f"aesthetic_{name}",
        pa.float64(),
        f"aesthetic score, {meaning}",
        unit="rating",
        range="about 1..10",
        direction="higher is better",
        source=_SOURCE,
    )


@dataclass(frozen=True)
class Aesthetic(BatchOperator):
    """Rating of the sampled frames as people gave it to pictures, on a scale of about 1 to 10.

    The score of a frame is an affine function of its CLIP ViT-L/14 embedding: the published network
    has five linear layers and nothing between them but dropout, so they fold into one.
    """

    name: ClassVar[str] = "aesthetic"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (
        _column("mean", "mean over the sampled frames"),
        _column("min", "lowest of the sampled frames"),
        _column("p10", "10th percentile of the sampled frames"),
        _column("p50", "median of the sampled frames"),
        _column("p90", "90th percentile of the sampled frames"),
    )

    model: str = "laion-aesthetic-v2"
    """The head, by its name in the registry of models."""
    backbone: str = "clip-vit-l-14"
    """The backbone that the head was trained on: of another one's embeddings it knows nothing."""

    @property
    def needs(self) -> Needs:
        return Needs(frame_embeddings=True, backbone=self.backbone)

    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def load(self, models: Models) -> BatchMeasure:
        weights, bias = folded(read_layers(models.get(self.model)), self.model)
        return _Aesthetic(self, weights, bias)


class _Aesthetic(Head):
    def __init__(self, operator: Aesthetic, weights: NDArray[np.float64], bias: float) -> None:
        self._operator, self._weights, self._bias = operator, weights, bias

    def measure(self, view: ClipView, frames: FrameEmbeddings) -> Measures:
        head, backbone = self._operator, frames.backbone
        if backbone.model != head.backbone or backbone.dimensions != len(self._weights):
            raise ConfigError(
                f"the aesthetic head {head.model!r} was trained on {len(self._weights)} dimensions "
                f"of {head.backbone!r}, but the stage's backbone is {backbone.model!r} with "
                f"{backbone.dimensions}: set the stage's backbone.model to {head.backbone!r}, or "
                "leave out the operator `aesthetic`"
            )
        scores = frames.vectors.astype(np.float64) @ self._weights + self._bias
        low, middle, high = np.percentile(scores, (10, 50, 90)).tolist()
        return Measures(
            {
                "aesthetic_mean": float(scores.mean()),
                "aesthetic_min": float(scores.min()),
                "aesthetic_p10": low,
                "aesthetic_p50": middle,
                "aesthetic_p90": high,
            }
        )


def read_layers(model: Model) -> dict[str, NDArray[np.float64]]:
    """The tensors of the model's only weights file. Raises ModelUnavailable."""
    files = model.weights()
    if len(files) != 1:
        raise model.unavailable(f"must have one file of weights, not {len(files)}")
    import torch
    from safetensors.torch import load_file

    try:
        if files[0].suffix == ".safetensors":
            tensors: Any = load_file(files[0])
        else:
            tensors = torch.load(files[0], map_location="cpu", weights_only=True)
        return {name: tensor.numpy().astype(np.float64) for name, tensor in tensors.items()}
    except Exception as error:  # a damaged pickle may raise anything
        text = " ".join(str(error).split())[:300]
        raise model.unavailable(f"has a file that cannot be read, {files[0]} ({text})") from error


def folded(
    tensors: Mapping[str, NDArray[np.float64]], name: str
) -> tuple[NDArray[np.float64], float]:
    """(d,) weights and a bias that do the work of linear layers with nothing between them.

    `tensors` are `layers.<n>.weight` (out, in) and `layers.<n>.bias` (out,), applied by ascending
    n; the last has one output. Raises ConfigError where they are something else.
    """
    layers: dict[int, dict[str, NDArray[np.float64]]] = {}
    for key, tensor in tensors.items():
        matched = _LAYER.fullmatch(key)
        if matched is None:
            raise ConfigError(f"the model {name!r} is no chain of linear layers: it has {key!r}")
        layers.setdefault(int(matched[1]), {})[matched[2]] = tensor
    try:
        last = layers[max(layers, default=-1)]["weight"]
        weights, bias = np.eye(len(last)), np.zeros(len(last))
        for _, layer in sorted(layers.items(), reverse=True):
            weights, bias = weights @ layer["weight"], bias + weights @ layer["bias"]
        return weights.reshape(weights.shape[-1]), float(bias.item())
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"the model {name!r} is no chain of linear layers with one output: {error}"
        ) from error
