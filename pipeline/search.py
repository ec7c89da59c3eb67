"""Search: the clips of a lake nearest to a text, a clip or a video, or with words about them.

The indexes behind it are Milvus, derived from the lake and brought in line with it before a search
where the lake has changed. They are not the index of dedup: that one belongs to a run while it lasts.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from winnow.operators.backbone import BackboneConfig
from winnow.operators.embedding import SPACE
from winnow.operators.errors import ConfigError, MediaError
from winnow.operators.fingerprint import MODEL as FINGERPRINT
from winnow.operators.models import Models
from winnow.pipeline.config import FilterConfig, RunConfig
from winnow.pipeline.lake import Lake
from winnow.pipeline.policy import Policy, predicate_columns
from winnow.pipeline.refilter import latest_config
from winnow.pipeline.search_index import HERE, WORDS, IndexPlace, SearchIndex
from winnow.pipeline.views import connect


@dataclass(frozen=True, slots=True)
class Hit:
    """A clip that was found."""

    clip_id: str
    similarity: float
    """Cosine of the two vectors; of a search by words, the BM25 score, which has no upper end."""
    uri: str
    start_s: float
    end_s: float
    verdict: str | None
    prompt: str | None


def search_text(
    lake: Lake,
    text: str,
    count: int = 10,
    *,
    models: str | None = None,
    where: str | None = None,
    place: IndexPlace = HERE,
) -> list[Hit]:
    """The clips whose frames lie nearest to a text, nearest first.

    The text is embedded by the backbone that the lake's latest run used; clips measured with another
    one are left out. Raises ConfigError where no run measured `embedding`, ModelUnavailable.
    """
    if not text.strip():
        raise ConfigError("--text is empty: say what to look for")
    lake.require()
    among = clips_where(lake, where)
    config = latest_config(lake)
    backbone = embedding_backbone(config)
    registry = Models.read(models or config.models)
    vector = backbone.load(registry).embed_texts([text])[0]
    identity = registry.get(backbone.model).identity
    return _nearest(SearchIndex(lake, SPACE, identity, place), vector, count, among)


def search_words(
    lake: Lake, words: str, count: int = 10, *, where: str | None = None, place: IndexPlace = HERE
) -> list[Hit]:
    """The clips whose prompt or captions hold the words, ranked by BM25. Words are taken as written.

    Raises ConfigError where there is nothing to look for.
    """
    if not re.search(r"\w", words):
        raise ConfigError("--words has no word: say what to look for")
    lake.require()
    among = clips_where(lake, where)
    return _nearest(SearchIndex(lake, WORDS, place=place), words, count, among)


def search_clip(
    lake: Lake,
    clip_id: str,
    count: int = 10,
    *,
    where: str | None = None,
    place: IndexPlace = HERE,
) -> list[Hit]:
    """The clips that look and move most like a clip of the lake, itself left out.

    Raises ConfigError where the lake has no such clip, or no fingerprint of it.
    """
    lake.require()
    among = clips_where(lake, where)
    index = SearchIndex(lake, FINGERPRINT, place=place)
    found = _nearest(index, fingerprint_of(lake, clip_id), count + 1, among)
    return [hit for hit in found if hit.clip_id != clip_id][:count]


def search_video(
    lake: Lake,
    video: str,
    count: int = 10,
    *,
    where: str | None = None,
    place: IndexPlace = HERE,
    options: dict[str, str] | None = None,
) -> list[Hit]:
    """The clips that look and move most like a video file: like the nearest of its shots.

    The file is split and measured in a child process, as in the lake's latest run. Raises
    ConfigError where no clip of the lake has a fingerprint, MediaError where the file is no video.
    """
    lake.require()
    among = clips_where(lake, where)
    with connect(lake) as connection:
        if not connection.execute(
            "SELECT 1 FROM embeddings WHERE model = ? LIMIT 1", [FINGERPRINT]
        ).fetchone():
            raise ConfigError(f"no clip of the lake has a fingerprint: {_MEASURE_IT}")
    vectors = measure_video(lake, video, options)
    best: dict[str, float] = {}
    with SearchIndex(lake, FINGERPRINT, place=place).opened() as index:
        for vector in vectors:
            for clip_id, similarity in index.nearest(vector, count, among):
                best[clip_id] = max(similarity, best.get(clip_id, -1.0))
    near = sorted(best.items(), key=lambda hit: (-hit[1], hit[0]))[:count]
    return _described(lake, near)


def measure_video(
    lake: Lake, video: str, options: dict[str, str] | None = None
) -> list[NDArray[np.float32]]:
    """The fingerprints of a video file's shots, measured in a child process."""
    from winnow.pipeline.engines.inline import run_inline
    from winnow.pipeline.planning import make_plan
    from winnow.pipeline.storage import Storage
    from winnow.stages.records import Source

    files = Storage.open(video, options=options)
    if files.single is None:
        raise ConfigError(f"--video {video}: name one video file")
    (file,) = files.find(("**/*",))
    config = _fingerprinting(latest_config(lake))
    nothing_rejects = Policy(name="search", rules=())
    plan = make_plan(config, nothing_rejects, files=files, media=files, lake=lake, claimed={})
    asked = Source(0, file.uri, file.key, file.size, file.modified, file.etag, uuid.uuid4().hex)
    (source,) = run_inline(plan, [asked])
    if source.status != "done":
        raise MediaError(
            source.error_kind or "unreadable", f"{video} cannot be measured: {source.error}"
        )
    found = [c.vectors[FINGERPRINT] for c in source.clips if FINGERPRINT in c.vectors]
    if not found:
        errors = {str(clip.columns.get("fingerprint_error")) for clip in source.clips}
        raise MediaError("unusable", f"{video} has no fingerprint: {'; '.join(sorted(errors))}")
    return found


def _fingerprinting(config: RunConfig) -> RunConfig:
    """The configuration cut down to what a fingerprint needs, split as the lake's clips were."""
    operators = next(
        (s.operators for s in config.stages
         if isinstance(s, FilterConfig) and "fingerprint" in s.operators),
        {},
    )  # fmt: skip
    ingest, split = config.stage("ingest"), config.stage("split")
    measured = FilterConfig(
        stage="filter", label="search", operators={"fingerprint": operators.get("fingerprint", {})}
    )
    ingest = ingest.model_copy(update={"settle_s": 0.0001})  # a file being written is not awaited
    return config.model_copy(
        update={"stages": (ingest, split, measured), "isolate": True, "engine": "inline"}
    )


def embedding_backbone(config: RunConfig) -> BackboneConfig:
    """The backbone of the stage that measures `embedding`. Raises ConfigError where none does."""
    for stage in config.stages:
        if isinstance(stage, FilterConfig) and "embedding" in stage.operators and stage.backbone:
            return stage.backbone
    raise ConfigError(
        "the lake's latest run measured no semantic vectors: run with the operator `embedding` in a "
        "filter stage that has a backbone (`--config gpu`)"
    )


def clips_where(lake: Lake, where: str | None) -> set[str] | None:
    """Ids of the clips for which an SQL predicate over `clips_decided` is true; None for all.

    Raises ConfigError where it is no such predicate. It reads one clip's columns and nothing else.
    """
    if where is None:
        return None
    reads = predicate_columns(where, "--where")
    with connect(lake) as connection:
        described = connection.execute("DESCRIBE clips_decided").fetchall()
        known = {name.lower() for name, *_ in described}
        for column in sorted(reads - known):
            near = get_close_matches(column, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"--where: clips_decided has no column {column!r}. {hint}"
                "`winnow sql --describe clips_decided` lists them"
            )
        try:
            predicate = f"SELECT ({where}\n) FROM clips_decided"
            kind = connection.execute(f"DESCRIBE {predicate}").fetchall()[0][1]
            if kind != "BOOLEAN":
                raise ConfigError(f"--where: {where!r} is {kind}, not true or false")
            rows = connection.execute(
                f"SELECT clip_id FROM clips_decided WHERE ({where}\n)"
            ).fetchall()
        except duckdb.Error as error:
            raise ConfigError(f"--where: {error}") from error
    return {clip_id for (clip_id,) in rows}


def fingerprint_of(lake: Lake, clip_id: str) -> NDArray[np.float32]:
    """The fingerprint of a clip. Raises ConfigError where there is no such clip, or none of it."""
    with connect(lake) as connection:
        known = connection.execute("SELECT 1 FROM clips WHERE clip_id = ?", [clip_id]).fetchone()
        row = connection.execute(
            "SELECT vector FROM embeddings WHERE model = ? AND clip_id = ? "
            "ORDER BY attempt_id DESC LIMIT 1",
            [FINGERPRINT, clip_id],
        ).fetchone()
    if known is None:
        raise ConfigError(
            f"there is no clip {clip_id!r} in {lake.uri}: "
            '`winnow sql "SELECT clip_id, uri FROM clips_decided"` lists them'
        )
    if row is None:
        raise ConfigError(f"the clip {clip_id} has no fingerprint: {_MEASURE_IT}")
    return np.array(row[0], np.float32)


_MEASURE_IT = "`winnow measure --operators fingerprint` adds it"


def _nearest(index: SearchIndex, query: Any, count: int, among: set[str] | None) -> list[Hit]:
    with index.opened() as opened:
        near = opened.nearest(query, count, among)
    return _described(index.lake, near)


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
