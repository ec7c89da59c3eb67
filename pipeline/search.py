"""Search: the clips of a lake nearest to a text, by the semantic vectors of the vision backbone.

The index behind it is Milvus, derived from `embeddings` and brought in line with the lake before
every search. It is not the index of dedup: that one belongs to a run while it lasts.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from winnow.operators.backbone import BackboneConfig
from winnow.operators.embedding import SPACE
from winnow.operators.errors import ConfigError
from winnow.operators.models import Models
from winnow.pipeline.config import FilterConfig, RunConfig
from winnow.pipeline.index import MilvusIndex, default_index_uri
from winnow.pipeline.lake import Lake
from winnow.pipeline.refilter import latest_config
from winnow.pipeline.views import connect
from winnow.stages.dedup import Entry

_BATCH = 10_000


@dataclass(frozen=True, slots=True)
class Hit:
    """A clip that was found."""

    clip_id: str
    similarity: float
    """Cosine of the text's and the clip's vector."""
    uri: str
    start_s: float
    end_s: float
    verdict: str | None
    prompt: str | None


def search_text(lake: Lake, text: str, count: int = 10, *, models: str | None = None) -> list[Hit]:
    """The clips whose frames lie nearest to a text, nearest first.

    The text is embedded by the backbone that the lake's latest run used; clips measured with another
    one are left out. Raises ConfigError where no run measured `embedding`, ModelUnavailable.
    """
    if not text.strip():
        raise ConfigError("--text is empty: say what to look for")
    lake.require()
    config = latest_config(lake)
    backbone = embedding_backbone(config)
    registry = Models.read(models or config.models)
    vector = backbone.load(registry).embed_texts([text])[0]
    identity = registry.get(backbone.model).identity
    index = SemanticIndex(lake, identity).open()
    try:
        near = index.nearest(vector, count)
    finally:
        index.close()
    return _described(lake, near)


def embedding_backbone(config: RunConfig) -> BackboneConfig:
    """The backbone of the stage that measures `embedding`. Raises ConfigError where none does."""
    for stage in config.stages:
        if isinstance(stage, FilterConfig) and "embedding" in stage.operators and stage.backbone:
            return stage.backbone
    raise ConfigError(
        "the lake's latest run measured no semantic vectors: run with the operator `embedding` in a "
        "filter stage that has a backbone (`--config gpu`)"
    )


@dataclass(frozen=True)
class SemanticIndex:
    """The search index of one lake and one backbone."""

    lake: Lake
    model: str
    """Identity of the backbone whose vectors are comparable."""

    def open(self) -> MilvusIndex:
        """The index, in line with the lake. Raises IndexUnavailable."""
        uri = str(Path(default_index_uri(self.lake)).with_name("search.db"))
        name = hashlib.sha256(f"{self.lake.uri} {self.model}".encode()).hexdigest()[:12]
        index = MilvusIndex(uri, f"{re.sub(r'[^a-z]', '_', SPACE)}_{name}")
        index.open()
        self._reconcile(index)
        return index

    def _reconcile(self, index: MilvusIndex) -> None:
        with connect(self.lake) as connection:
            connection.execute(
                """CREATE TEMP TABLE wanted AS SELECT e.clip_id, e.attempt_id
                FROM embeddings e JOIN clips c USING (clip_id, attempt_id)
                WHERE e.model = ? AND c.embedding_model = ?""",
                [SPACE, self.model],
            )
            wanted = {r[0] for r in connection.execute("SELECT clip_id FROM wanted").fetchall()}
            held = set(index.contents())
            index.remove(sorted(held - wanted))
            missing = sorted(wanted - held)
            for first in range(0, len(missing), _BATCH):
                rows = connection.execute(
                    """SELECT clip_id, any_value(vector) FROM embeddings
                    JOIN wanted USING (clip_id, attempt_id)
                    WHERE model = ? AND clip_id IN (SELECT unnest(?)) GROUP BY clip_id""",
                    [SPACE, missing[first : first + _BATCH]],
                ).fetchall()
                index.add_all([Entry(clip, _array(vector), 0, 0) for clip, vector in rows])


def _array(vector: Any) -> NDArray[np.float32]:
    return np.array(vector, np.float32)


def _described(lake: Lake, near: list[tuple[str, float]]) -> list[Hit]:
    with connect(lake) as connection:
        rows = connection.execute(
            """SELECT clip_id, uri, start_s, end_s, verdict, prompt FROM clips_decided
            WHERE clip_id IN (SELECT unnest(?))""",
            [[clip_id for clip_id, _ in near]],
        ).fetchall()
    facts = {clip_id: rest for clip_id, *rest in rows}
    return [Hit(clip_id, similarity, *facts[clip_id]) for clip_id, similarity in near
            if clip_id in facts]  # fmt: skip
