"""Runs a stage on a source: times it, turns errors into rows, lets the policy mark clips."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from typing import Any

from winnow.operators.errors import MediaError, StorageError, WinnowError
from winnow.pipeline.plan import Plan
from winnow.pipeline.policy import Evaluator
from winnow.stages.records import Clip, Decision, Source
from winnow.stages.stage import Stage


def policy_row(source: Source, clip: Clip) -> dict[str, Any]:
    """The columns that a rule may read, of one clip."""
    media, sidecar = source.media, source.sidecar
    row: dict[str, Any] = dict(clip.columns)
    if media is not None:
        row |= {
            "fps": media.fps,
            "width": media.width,
            "height": media.height,
            "variable_frame_rate": media.variable_frame_rate,
        }
    if sidecar is not None:
        row |= {"prompt": sidecar.prompt, "generator": sidecar.generator}
    return row


@dataclass
class Worker:
    """Some consecutive stages of a plan, set up on first use in whatever process this is."""

    plan: Plan
    first: int
    last: int

    def __post_init__(self) -> None:
        self._ready = False
        self._evaluator: Evaluator | None = None

    def __getstate__(self) -> tuple[Plan, int, int]:
        return self.plan, self.first, self.last

    def __setstate__(self, state: tuple[Plan, int, int]) -> None:
        self.plan, self.first, self.last = state
        self.__post_init__()

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.plan.stages[self.first : self.last]

    def setup(self) -> None:
        """Load what the stages need, once."""
        if self._ready:
            return
        for stage in self.stages:
            stage.setup()
        self._evaluator = Evaluator(self.plan.policy, self.plan.clip_columns)
        self._ready = True

    def __call__(self, source: Source) -> Source:
        """Take a source through the stages. Any error becomes the source's status."""
        self.setup()
        for offset, stage in enumerate(self.stages):
            if not source.pending:
                break
            self._step(stage, source)
            written = {column.name.lower() for earlier in self.plan.stages[: self.first + offset + 1]
                       for column in earlier.columns()}  # fmt: skip
            if stage.columns() and source.pending:
                self._mark(source, written)
        if self.last == len(self.plan.stages):
            self.decide(source)
        return source

    def _step(self, stage: Stage, source: Source) -> None:
        started = time.perf_counter()
        try:
            stage.process(source)
        except MediaError as error:
            source.fail(error)
        except StorageError as error:
            source.fail(MediaError("unreadable", str(error)))
        except WinnowError:
            raise  # the lake, the index or a model is at fault, not the source: the run must stop
        except Exception as error:  # a fault of ours must not take down the run nor lose the row
            where = traceback.extract_tb(error.__traceback__)[-1]
            source.fail(
                MediaError(
                    "internal",
                    f"{stage.label}: {type(error).__name__}: {error} "
                    f"({where.filename.rsplit('/', 1)[-1]}:{where.lineno})",
                )
            )
        spent = time.perf_counter() - started
        source.seconds[stage.label] = source.seconds.get(stage.label, 0.0) + spent

    def _mark(self, source: Source, written: set[str]) -> None:
        assert self._evaluator is not None
        clips = [clip for clip in source.clips if clip.alive]
        judged = self._evaluator.rejects([policy_row(source, clip) for clip in clips], written)
        for clip, (rejecting, undecided) in zip(clips, judged, strict=True):
            clip.rejected = bool(rejecting or undecided)

    def decide(self, source: Source) -> None:
        """The verdict of every clip, from all its columns, by the one evaluator."""
        assert self._evaluator is not None
        if source.pending:
            source.status = "done"
        judged = self._evaluator.rejects([policy_row(source, clip) for clip in source.clips])
        for clip, (rejecting, undecided) in zip(source.clips, judged, strict=True):
            clip.decision = verdict(
                rejecting,
                undecided,
                clip.failure,
                clip.decision.duplicate_of,
                clip.decision.similarity,
            )

    def close(self) -> None:
        if self._ready:
            for stage in self.stages:
                stage.close()
            self._ready = False


def verdict(
    rejecting: list[str],
    undecided: list[str],
    failure: str | None,
    duplicate_of: str | None,
    similarity: float | None,
) -> Decision:
    """One verdict from what the rules, the stages and dedup say, in that order of weight."""
    if rejecting:
        return Decision("reject", tuple(rejecting))
    if undecided:
        return Decision("error", tuple(undecided))
    if failure is not None:
        return Decision("error", (failure.partition(":")[0],))
    if duplicate_of is not None:
        return Decision("duplicate", ("duplicate",), duplicate_of, similarity)
    return Decision("keep")
