"""How the clips spread over generators, and the dataset over its partitions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from winnow.pipeline.report_values import short
from winnow.pipeline.report_views import CLIPS, Views, quoted


@dataclass(frozen=True, slots=True)
class GeneratorCount:
    """The clips of one generator, and why most of its rejected ones were."""

    name: str
    clips: int
    verdicts: Mapping[str, int]
    top_reason: str


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition of the dataset: `seconds` of video, `size` in bytes."""

    name: str
    clips: int
    seconds: float | None
    size: int | None


def generators(lake: Views, limit: int = 20) -> tuple[list[GeneratorCount], int]:
    """The generators with most clips, and how many more there are."""
    if "generator" not in lake.columns["clips_decided"]:
        return [], 0
    found = lake.rows(
        f"""
        SELECT generator, verdict_shown, count(*) FROM {CLIPS}
        WHERE generator IN (SELECT generator FROM {CLIPS} WHERE generator IS NOT NULL
            GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT {limit})
        GROUP BY ALL
        """
    )
    tops = dict(
        lake.rows(
            f"""
            SELECT generator, arg_max(reason, (clips, reason)) FROM (
                SELECT generator, reason, count(*) AS clips
                FROM (SELECT generator, unnest(reasons) AS reason FROM {CLIPS}
                    WHERE verdict_shown = 'reject') GROUP BY ALL
            ) GROUP BY 1
            """
        )
    )
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for name, verdict, count in found:
        counts[name][verdict] = count
    ordered = sorted(counts.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    total = lake.number(f"SELECT count(DISTINCT generator) FROM {CLIPS}")
    return [
        GeneratorCount(short(n, 100), sum(c.values()), c, short(tops.get(n) or "", 100))
        for n, c in ordered
    ], max(total - limit, 0)


def partitions(lake: Views, limit: int = 12) -> tuple[list[Partition], int]:
    """The partitions with most clips, and how many more there are."""
    keys = ("content_type", "resolution", "aspect_ratio", "length")
    length = (
        f"sum({quoted('frames')} / nullif({quoted('fps')}, 0))"
        if {"frames", "fps"} <= set(lake.columns["dataset"])
        else "NULL"
    )
    names = ", ".join(f"{lake.column('dataset', k)}::VARCHAR AS k{i}" for i, k in enumerate(keys))
    found = lake.rows(
        f"SELECT {names}, count(*), {length}, sum({lake.column('dataset', 'bytes')}) "
        "FROM dataset GROUP BY 1, 2, 3, 4 ORDER BY 5 DESC, 1, 2, 3, 4"
    )
    shown = [
        Partition(" · ".join(str(k) for k in row[:4] if k is not None), row[4], row[5], row[6])
        for row in found[:limit]
    ]
    return shown, max(len(found) - limit, 0)
