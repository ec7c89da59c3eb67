"""The runs of a lake: when and how each went, and where its time was spent."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.pipeline.report_pools import ModelUsed, Pools, models, pools
from winnow.pipeline.report_values import from_json, share, short, without_secrets
from winnow.pipeline.report_views import Views


@dataclass(frozen=True, slots=True)
class StageSpeed:
    """What a stage took and did. `share` is of the seconds of all stages."""

    stage: str
    part: bool
    """True for a part of the stage before it."""
    seconds: float
    share: float
    records: int | None
    clips: int | None
    frames: int | None


@dataclass(frozen=True, slots=True)
class Run:
    """One run, its configuration without secrets."""

    run_id: str
    started: str
    finished: str
    engine: str
    policy: str
    sources_in: int | None
    wall_s: float | None
    config: Any = None
    versions: Sequence[tuple[str, str]] = ()
    stages: Sequence[StageSpeed] = ()
    pools: Pools | None = None
    models: Sequence[ModelUsed] = ()


def runs(lake: Views) -> list[Run]:
    """All runs, the newest first, at most twenty."""
    column = lake.column
    found = lake.rows(
        f"""
        SELECT run_id, started_at::VARCHAR, {column("runs", "finished_at")}::VARCHAR,
            {column("runs", "engine")}, {column("runs", "policy")},
            {column("runs", "sources_in")}, {column("runs", "wall_s")},
            {column("runs", "config")}, {column("runs", "versions")},
            {column("runs", "stages")}, {column("runs", "workers")}
        FROM runs ORDER BY started_at DESC NULLS LAST LIMIT 20
        """
    )
    return [
        Run(
            run_id=str(row[0] or ""),
            started=_instant(row[1]),
            finished=_instant(row[2]),
            engine=str(row[3] or ""),
            policy=str(row[4] or ""),
            sources_in=row[5],
            wall_s=row[6],
            config=without_secrets(from_json(row[7])),
            versions=_flat(from_json(row[8])),
            stages=_stage_speeds(from_json(row[9])),
            pools=pools(from_json(row[10])),
            models=models(from_json(row[8])),
        )
        for row in found
    ]


def stages_of_sources(lake: Views) -> list[StageSpeed]:
    """Seconds by stage summed over the sources, for a lake whose runs kept none."""
    if "seconds" not in lake.columns["sources"]:
        return []
    found = lake.rows(
        """
        SELECT entry.key, sum(entry.value), count(*) FROM (
            SELECT unnest(map_entries(to_json(seconds)::MAP(VARCHAR, DOUBLE))) AS entry
            FROM sources WHERE seconds IS NOT NULL
        ) GROUP BY 1 ORDER BY 2 DESC
        """
        if lake.columns["sources"]["seconds"] not in ("VARCHAR", "JSON")
        else """
        SELECT entry.key, sum(entry.value), count(*) FROM (
            SELECT unnest(map_entries(seconds::JSON::MAP(VARCHAR, DOUBLE))) AS entry
            FROM sources WHERE json_valid(seconds)
        ) GROUP BY 1 ORDER BY 2 DESC
        """
    )
    return _stage_speeds([{"stage": r[0], "seconds": r[1], "records": r[2]} for r in found])


def _instant(text: str | None) -> str:
    return re.sub(r"\.\d+", "", text or "").removesuffix("+00") + (
        " UTC" if (text or "").endswith("+00") else ""
    )


def _flat(versions: Any, before: str = "") -> list[tuple[str, str]]:
    if not isinstance(versions, Mapping):
        return []
    found: list[tuple[str, str]] = []
    for key, value in versions.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{before}{key} ")
        else:
            found.append((f"{before}{key}", short(str(value), 60)))
    return found[:200]


def _stage_speeds(stages: Any) -> list[StageSpeed]:
    """Stages in order, each followed by its parts (`cheap/motion` is a part of `cheap`)."""
    if not isinstance(stages, list):
        return []
    told = [stage for stage in stages if isinstance(stage, Mapping)][:200]
    names = [str(stage.get("stage") or "?") for stage in told]
    parents = [name.rsplit("/", 1)[0] if "/" in name else "" for name in names]
    parents = [parent if parent in names else "" for parent in parents]
    # The time of a part is inside the time of its stage.
    total = sum(
        float(stage.get("seconds") or 0)
        for stage, parent in zip(told, parents, strict=True)
        if not parent
    )
    order = sorted(
        range(len(told)),
        key=lambda i: (names.index(parents[i] or names[i]), bool(parents[i]), i),
    )
    return [
        StageSpeed(
            stage=names[i].removeprefix(f"{parents[i]}/") if parents[i] else names[i],
            part=bool(parents[i]),
            seconds=float(told[i].get("seconds") or 0),
            share=share(float(told[i].get("seconds") or 0), total),
            records=told[i].get("records"),
            clips=told[i].get("clips"),
            frames=told[i].get("frames"),
        )
        for i in order
    ]
