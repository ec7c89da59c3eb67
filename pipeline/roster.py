"""The roster: which workers with a model there were while a run went on, and how busy they were."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Beat:
    """A worker's sign of life."""

    label: str
    busy_s: float
    """Time that its model has worked so far."""
    alive_s: float
    """Time since its first source came."""
    clips: int
    worker: str = "inline"
    node: str = "local"


@dataclass
class _Member:
    since: float
    last: float
    node: str
    busy_s: float = 0.0
    worked_s: float = 0.0
    """Life at the end of the last batch: what comes after is waiting for the run's end."""
    clips: int = 0


@dataclass
class Roster:
    """Collects beats and tells pool sizes over time."""

    clock: Callable[[], float] = time.monotonic
    _members: dict[tuple[str, str], _Member] = field(default_factory=dict)
    _started: float | None = None

    def hear(self, beat: Beat) -> None:
        now = self.clock()
        if self._started is None:
            self._started = now
        key = (beat.label, beat.worker)
        member = self._members.setdefault(key, _Member(now, now, beat.node))
        member.last = now
        if beat.busy_s > member.busy_s:
            member.busy_s, member.worked_s, member.clips = beat.busy_s, beat.alive_s, beat.clips

    def state(self) -> tuple[float | None, dict[tuple[str, str], _Member]]:
        """For handing over to another roster, from another process."""
        return self._started, self._members

    def take_over(self, state: tuple[float | None, dict[tuple[str, str], _Member]]) -> None:
        self._started, self._members = state

    def rows(self) -> list[dict[str, Any]]:
        """By stage: the pool's size whenever it changed, its workers, and the share of busy time."""
        start = self._started or 0.0
        rows = []
        for label in dict.fromkeys(label for label, _ in self._members):
            members = {w: m for (stage, w), m in self._members.items() if stage == label}
            events = sorted(
                (
                    event
                    for m in members.values()
                    for event in ((m.since - start, 1), (m.last - start, -1))
                ),
                key=lambda event: (event[0], -event[1]),  # one that was heard once was there once
            )
            size, sizes = 0, []
            for at, change in events:
                size += change
                sizes.append([round(at, 2), size])
            lived = sum(m.worked_s for m in members.values())
            busy = sum(m.busy_s for m in members.values())
            rows.append(
                {
                    "stage": label,
                    "workers": len(members),
                    "most_at_once": max((size for _, size in sizes), default=0),
                    "nodes": len({m.node for m in members.values()}),
                    "size_over_time": sizes,
                    "clips": sum(m.clips for m in members.values()),
                    "busy_s": round(busy, 3),
                    "busy_share": round(busy / lived, 4) if lived > 0 else None,
                }
            )
        return rows
