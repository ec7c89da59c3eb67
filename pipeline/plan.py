"""The plan of a run: its stages, constructed, in order, with the means that each gets."""

from __future__ import annotations

from dataclasses import dataclass

from winnow.operators.operator import Column
from winnow.pipeline.config import RunConfig
from winnow.pipeline.policy import Policy
from winnow.stages.dedup import Dedup
from winnow.stages.stage import Stage


@dataclass(frozen=True)
class Placement:
    """A stage and the means that it gets."""

    stage: Stage
    workers_min: int = 1
    workers_max: int = 1
    cpus: float = 0.1
    gpus: float = 0.0
    timeout_s: float = 600.0
    isolated: bool = True
    """It reads or writes untrusted media: a child process does the work."""


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do, checked before anything is read."""

    config: RunConfig
    policy: Policy
    placements: tuple[Placement, ...]

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(placement.stage for placement in self.placements)

    @property
    def clip_columns(self) -> tuple[Column, ...]:
        """The columns of `clips` that the stages write, in order of writing."""
        return tuple(column for stage in self.stages for column in stage.columns())

    @property
    def versions(self) -> dict[str, str]:
        return {name: v for stage in self.stages for name, v in stage.versions().items()}

    @property
    def dedup(self) -> Dedup | None:
        return next((stage for stage in self.stages if isinstance(stage, Dedup)), None)
