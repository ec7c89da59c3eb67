"""Content type: which kind of video a clip is, by zero-shot classification of its frames."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, WithJsonSchema

from winnow.operators.backbone import Backbone, Head
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
from winnow.operators.settings import Strict, find_config, parse_yaml, validate


def _label(text: str) -> str:
    if text == "unknown":
        raise ValueError("`unknown` is for clips that were not classified")
    return text


Label = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$"), AfterValidator(_label)]
"""Lower case without blanks, as it names a partition of the dataset."""
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


class Taxonomy(Strict):
    """Labels, each with texts that describe frames of that kind."""

    name: str
    texts: dict[Label, Annotated[tuple[Text, ...], Field(min_length=1)]] = Field(min_length=2)

    @classmethod
    def read(cls, name: str = "content_types") -> Taxonomy:
        """A taxonomy by path, or by name in configs/taxonomy. Raises ConfigError."""
        text, origin = find_config(name, "taxonomy")
        return validate(cls, {"name": name, "texts": parse_yaml(text, origin)}, origin)


def _by_name(value: Any) -> Any:
    return Taxonomy.read(value) if isinstance(value, str) else value


TaxonomyByName = Annotated[
    Taxonomy,
    # Read where the configuration is: a worker on another machine may not have the file.
    BeforeValidator(_by_name),
    WithJsonSchema(
        {"type": "string", "default": "content_types", "description": "path, or a shipped name"}
    ),
]


@dataclass(frozen=True)
class ContentType(BatchOperator):
    """The kind of video that a clip's frames look like, out of a taxonomy.

    The texts of a label are embedded, averaged and normalised; each frame has a softmax over the
    labels, and the clip the mean of its frames' probabilities. They sum to 1 over the taxonomy,
    whether or not any label fits well.
    """

    name: ClassVar[str] = "content_type"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "content_type_label",
            pa.string(),
            "the most probable label of the taxonomy",
            source="zero-shot classification with ensembled prompts (CLIP, Radford et al. 2021)",
        ),
        Column(
            "content_type_probability",
            pa.float64(),
            "probability of that label, mean over the sampled frames",
            unit="probability",
            range="0..1",
        ),
        Column(
            "content_type_margin",
            pa.float64(),
            "that probability minus the one of the second label: small where the kind is unclear",
            unit="probability",
            range="0..1",
        ),
        Column(
            "content_type_probabilities",
            pa.map_(pa.string(), pa.float32()),
            "probability of every label of the taxonomy",
            unit="probability",
            range="0..1",
        ),
    )

    taxonomy: TaxonomyByName = field(default_factory=Taxonomy.read)
    """The labels and their texts: a file of your own, or the name of a shipped one."""

    @property
    def needs(self) -> Needs:
        return Needs(frame_embeddings=True)

    def load(self, models: Models) -> BatchMeasure:
        return _ContentType(self.taxonomy)


class _ContentType(Head):
    def __init__(self, taxonomy: Taxonomy) -> None:
        self._taxonomy = taxonomy
        self._classes: tuple[Backbone, NDArray[np.float64]] | None = None

    def measure(self, view: ClipView, frames: FrameEmbeddings) -> Measures:
        cosines = frames.vectors.astype(np.float64) @ self._embedded(frames.backbone).T
        logits = frames.backbone.logit_scale * cosines
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
        labels = list(self._taxonomy.texts)
        second, first = np.argsort(shares, kind="stable")[-2:]
        return Measures(
            {
                "content_type_label": labels[first],
                "content_type_probability": float(shares[first]),
                "content_type_margin": float(shares[first] - shares[second]),
                "content_type_probabilities": list(zip(labels, shares.tolist(), strict=True)),
            }
        )

    def _embedded(self, backbone: Backbone) -> NDArray[np.float64]:
        """(labels, d) vectors of length 1, embedded once."""
        if self._classes is None or self._classes[0] is not backbone:
            groups = self._taxonomy.texts.values()
            vectors = backbone.embed_texts([text for group in groups for text in group])
            ends = np.cumsum([len(group) for group in groups])
            means = np.stack(
                [
                    vectors[end - len(group) : end].mean(axis=0, dtype=np.float64)
                    for group, end in zip(groups, ends, strict=True)
                ]
            )
            means /= np.linalg.norm(means, axis=1, keepdims=True)
            self._classes = backbone, means
        return self._classes[1]
