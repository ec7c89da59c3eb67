"""The stages with a model: their workers in the course of a run, and which models those loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.pipeline.report_charts import steps
from winnow.pipeline.report_values import short

_MODEL = "model "
_MOST_CHANGES = 20_000


@dataclass(frozen=True, slots=True)
class Pool:
    """The workers of one stage. `path` is their number over time, as an SVG path."""

    stage: str
    workers: int
    most_at_once: int
    nodes: int
    clips: int
    busy: float | None
    """Share of the workers' time in which their model worked."""
    path: str


@dataclass(frozen=True, slots=True)
class Pools:
    """Pools of one run on one axis of time, 0 to `seconds`, and one of workers, 0 to `top`."""

    pools: Sequence[Pool]
    seconds: float
    top: int


@dataclass(frozen=True, slots=True)
class ModelUsed:
    """A model of a run: its name, where it is from, and its revision (empty where unknown)."""

    name: str
    origin: str
    revision: str


def pools(told: Any) -> Pools | None:
    """The pools of `runs.workers`; None where the run had none, or the column is no list of them."""
    if not isinstance(told, list):
        return None
    rows = [row for row in told if isinstance(row, Mapping)][:50]
    changes = [_changes(row.get("size_over_time")) for row in rows]
    if not rows:
        return None
    seconds = max((at for sizes in changes for at, _ in sizes), default=0.0)
    top = max(1, *(size for sizes in changes for _, size in sizes), 1)
    shown = [
        Pool(
            stage=short(str(row.get("stage") or "?"), 60),
            workers=_whole(row.get("workers")),
            most_at_once=_whole(row.get("most_at_once")),
            nodes=_whole(row.get("nodes")),
            clips=_whole(row.get("clips")),
            busy=_finite(row.get("busy_share")),
            path=steps(sizes, seconds, top),
        )
        for row, sizes in zip(rows, changes, strict=True)
    ]
    return Pools(shown, seconds, top)


def models(versions: Any) -> list[ModelUsed]:
    """The models among the versions of a run: `model <name>`, and `<stage> model` of a server's."""
    told = versions.get("operators") if isinstance(versions, Mapping) else None
    if not isinstance(told, Mapping):
        return []
    named = {str(k): str(v) for k, v in told.items()}
    registered = {k.removeprefix(_MODEL): v for k, v in named.items() if k.startswith(_MODEL)}
    found = [_used(name, identity) for name, identity in registered.items()]
    # A stage whose model is of the registry names it a second time.
    found += [
        _used(f"of the stage {key.removesuffix(' model')}", identity)
        for key, identity in named.items()
        if key.endswith(" model") and identity not in registered.values()
    ]
    return found[:50]


def _used(name: str, identity: str) -> ModelUsed:
    origin, at, revision = identity.rpartition("@")
    return ModelUsed(
        short(name, 100), short(origin if at else identity, 300), short(revision if at else "", 300)
    )


def _changes(told: Any) -> list[tuple[float, int]]:
    """(seconds, workers from then on), in order of time."""
    sizes = []
    for change in told[:_MOST_CHANGES] if isinstance(told, list) else ():
        if isinstance(change, list) and len(change) == 2:
            at, size = _finite(change[0]), _finite(change[1])
            if at is not None and size is not None and at >= 0:
                sizes.append((at, max(int(size), 0)))
    return sorted(sizes, key=lambda change: change[0])


def _finite(value: Any) -> float | None:
    usable = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if usable else None


def _whole(value: Any) -> int:
    return int(_finite(value) or 0)
