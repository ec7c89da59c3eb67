"""The plan of a run: its stages, constructed, in order, with the means that each gets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from winnow.operators.operator import Column
from winnow.pipeline.config import RunConfig
from winnow.pipeline.policy import Policy
from winnow.stages.dedup import Dedup
from winnow.stages.stage import BatchStage, Stage


@dataclass(frozen=True)
class Placement:
    """A stage and the means that it gets."""

    stage: Stage
    workers_min: int = 1
    workers_max: int = 1
    cpus: float = 0.1
    gpus: float = 0.0
    timeout_s: float = 600.0
    decoders: int = 1
    """Processes that decode for one worker with a model."""
    isolated: bool = True
    """It reads or writes untrusted media: a child process does the work."""


@dataclass(frozen=True)
class Segment:
    """Consecutive stages that one worker carries out: [first, last) of the plan."""

    first: int
    last: int
    placements: tuple[Placement, ...]

    @property
    def isolated(self) -> bool:
        return self.placements[0].isolated

    @property
    def batches(self) -> BatchStage | None:
        """The stage that takes batches, where this segment is one."""
        stage = self.placements[0].stage
        return stage if isinstance(stage, BatchStage) else None

    @property
    def decoders(self) -> int:
        """Child processes of one worker."""
        return self.placements[0].decoders

    @property
    def single(self) -> bool:
        """One worker does it all, in order."""
        return self.workers_max == 1

    @property
    def timeout_s(self) -> float:
        return sum(placement.timeout_s for placement in self.placements)

    @property
    def cpus(self) -> float:
        return max(placement.cpus for placement in self.placements)

    @property
    def gpus(self) -> float:
        return self.placements[0].gpus

    @property
    def workers_min(self) -> int:
        return max(placement.workers_min for placement in self.placements)

    @property
    def workers_max(self) -> int:
        return max(placement.workers_max for placement in self.placements)


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
    def segments(self) -> tuple[Segment, ...]:
        """Neighbours share a worker where they need the same: fewer processes, fewer hand-overs."""

        def needs(item: tuple[int, Placement]) -> tuple[bool, float, int | None]:
            number, placement = item
            # A stage with a model has a worker of its own: it takes batches.
            alone = number if isinstance(placement.stage, BatchStage) else None
            return placement.isolated, placement.gpus, alone

        segments = []
        for _, group in groupby(enumerate(self.placements), key=needs):
            members = list(group)
            placements = tuple(placement for _, placement in members)
            segments.append(Segment(members[0][0], members[-1][0] + 1, placements))
        return tuple(segments)

    @property
    def clip_columns(self) -> tuple[Column, ...]:
        """The columns of `clips` that the stages write, in order of writing."""
        return tuple(column for stage in self.stages for column in stage.columns())

    @property
    def versions(self) -> dict[str, str]:
        return {name: v for stage in self.stages for name, v in stage.versions().items()}

    @property
    def needed_models(self) -> tuple[str, ...]:
        """Names of the models that the stages load."""
        names = [n for s in self.stages if isinstance(s, BatchStage) for n in s.needed_models()]
        return tuple(dict.fromkeys(names))

    @property
    def dedup(self) -> Dedup | None:
        return next((stage for stage in self.stages if isinstance(stage, Dedup)), None)
