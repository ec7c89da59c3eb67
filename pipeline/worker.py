"""Runs a stage on a source: times it, turns errors into rows, lets the policy mark clips."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from winnow.operators.errors import MediaError, StorageError, WinnowError
from winnow.operators.operator import Column
from winnow.pipeline.plan import Plan
from winnow.pipeline.policy import Evaluator, Policy
from winnow.stages.records import Clip, Decision, Source
from winnow.stages.stage import BatchStage, Stage


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
        row |= {
            "prompt": sidecar.prompt,
            "generator": sidecar.generator,
            "input_uri": sidecar.input_path,
        }
    return row


@dataclass
class Worker:
    """Some consecutive stages of a plan, set up on first use in whatever process this is.

    It holds no more of the plan than it needs: what a child process must import follows from it.
    """

    stages: tuple[Stage, ...]
    policy: Policy
    columns: tuple[Column, ...]
    """Every clip column of the plan."""
    earlier: frozenset[str] = frozenset()
    """Lower-case names of the columns that stages before these write."""
    decides: bool = False
    """These are the last stages: the verdict follows them."""
    _evaluator: Evaluator | None = field(default=None, repr=False)
    _ready: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def of(cls, plan: Plan, first: int, last: int) -> Worker:
        """The worker for the stages [first, last) of a plan."""
        return cls(
            plan.stages[first:last],
            plan.policy,
            plan.clip_columns,
            frozenset(c.name.lower() for stage in plan.stages[:first] for c in stage.columns()),
            last == len(plan.stages),
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_evaluator": None, "_ready": set()}

    def wants(self, source: Source) -> bool:
        """Whether any of the stages has something to do for the source."""
        return self.decides or self.has_work(source)

    def has_work(self, source: Source) -> bool:
        """The same, verdicts apart."""
        return source.pending and any(stage.wants(source) for stage in self.stages)

    @property
    def evaluator(self) -> Evaluator:
        if self._evaluator is None:
            self._evaluator = Evaluator(self.policy, self.columns)
        return self._evaluator

    def setup(self) -> None:
        """Set every stage up now, so that what is missing is said before any work."""
        for stage in self.stages:
            self._setup(stage)

    def _setup(self, stage: Stage) -> None:
        if stage.label not in self._ready:
            stage.setup()
            self._ready.add(stage.label)

    def __call__(self, source: Source) -> Source:
        """Take a source through the stages. Any error becomes the source's status."""
        written = set(self.earlier)
        for stage in self.stages:
            if not source.pending:
                break
            if stage.wants(source):
                self._setup(stage)
                with self._guarded(stage, source):
                    stage.process(source)
            columns = {column.name.lower() for column in stage.columns()}
            written |= columns
            if columns and source.pending:
                self._mark(source, written)
        if self.decides:
            self.decide(source)
        return source

    @contextmanager
    def _guarded(self, stage: Stage, source: Source) -> Iterator[None]:
        """Time a stage's work on a source; an error becomes the source's status."""
        started = time.perf_counter()
        try:
            yield
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

    def collect(self, source: Source) -> tuple[Source, Any]:
        """For a stage that takes batches: decode what it is to see, in a child process."""
        (stage,) = self.stages
        assert isinstance(stage, BatchStage)
        decoding = f"{stage.label} decoding"
        if decoding not in self._ready:
            stage.setup_collecting()
            self._ready.add(decoding)
        collected = None
        with self._guarded(stage, source):
            collected = stage.collect(source)
        return source, collected if source.pending else None

    def measure(self, batch: Sequence[tuple[Source, Any]]) -> None:
        """For a stage that takes batches: give it one, and mark clips by the policy."""
        (stage,) = self.stages
        assert isinstance(stage, BatchStage)
        self._setup(stage)
        started = time.perf_counter()
        try:
            stage.measure(batch)
        except WinnowError:
            raise
        except Exception:
            # Which source is at fault shows when each is alone; the others must not pay.
            for source, collected in batch:
                with self._guarded(stage, source):
                    stage.measure([(source, collected)])
        else:
            clips = sum(collected.clips for _, collected in batch) or 1
            spent = time.perf_counter() - started
            for source, collected in batch:
                share = spent * collected.clips / clips
                source.seconds[stage.label] = source.seconds.get(stage.label, 0.0) + share

    def finish(self, source: Source) -> Source:
        """What follows a stage's work on a source: the policy's marks, the verdict at the end."""
        columns = {c.name.lower() for stage in self.stages for c in stage.columns()}
        if columns and source.pending:
            self._mark(source, columns | self.earlier)
        if self.decides:
            self.decide(source)
        return source

    def _mark(self, source: Source, written: set[str]) -> None:
        clips = [clip for clip in source.clips if clip.alive]
        judged = self.evaluator.rejects([policy_row(source, clip) for clip in clips], written)
        for clip, (rejecting, undecided) in zip(clips, judged, strict=True):
            clip.rejected = bool(rejecting or undecided)

    def decide(self, source: Source) -> None:
        """The verdict of every clip, from all its columns, by the one evaluator."""
        if source.pending:
            source.status = "done"
        judged = self.evaluator.rejects([policy_row(source, clip) for clip in source.clips])
        for clip, (rejecting, undecided) in zip(source.clips, judged, strict=True):
            clip.decision = verdict(
                rejecting,
                undecided,
                clip.failure,
                clip.decision.duplicate_of,
                clip.decision.similarity,
            )
        # A better copy that could not be made after all replaces nothing.
        kept = {clip.clip_id for clip in source.clips if clip.decision.verdict == "keep"}
        source.demotions = [d for d in source.demotions if d.duplicate_of in kept]

    def close(self) -> None:
        for stage in self.stages:
            if stage.label in self._ready:
                stage.close()
        self._ready.clear()


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
