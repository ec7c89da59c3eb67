"""What the tests of whole runs share: a fast configuration, and what a lake holds."""

from __future__ import annotations

from winnow.pipeline.config import RunConfig, load_config
from winnow.pipeline.lake import Lake
from winnow.pipeline.views import connect

FAST = ["isolate=false", "stages.split.detector.kind=none", "stages.cheap.operators.text={}"]


def config(*more: str) -> RunConfig:
    return load_config("cpu", [*FAST, *more])


def rows(lake: Lake, query: str) -> list[tuple]:
    with connect(lake) as connection:
        return connection.execute(query).fetchall()


def facts(lake: Lake) -> dict[str, list]:
    """Everything that must not depend on when or how the run happened."""
    columns = rows(lake, "SELECT column_name FROM (DESCRIBE clips)")
    scores = [c for (c,) in columns if c not in ("attempt_id", "thumbnail_jpeg")]
    return {
        "sources": rows(lake, "SELECT uri, source_id, status, error_kind, error, copy_of, frames, "
                              "fps, prompt FROM sources ORDER BY uri"),
        "clips": rows(lake, f"SELECT {', '.join(scores)} FROM clips ORDER BY clip_id"),
        "verdicts": rows(lake, "SELECT clip_id, policy, verdict, reasons, duplicate_of, similarity "
                               "FROM verdicts ORDER BY clip_id"),
        "dataset": rows(lake, "SELECT clip_id, media_uri.regexp_replace('.*/media/', ''), content_type, "
                              "resolution, aspect_ratio, length, frames, sha256 FROM dataset ORDER BY clip_id"),
        "embeddings": rows(lake, "SELECT clip_id, model, vector FROM embeddings ORDER BY 1, 2"),
    }  # fmt: skip
