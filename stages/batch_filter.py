"""Batch filter: operators with models, which see the clips of many sources at once.

A decode pass in a child process collects the frames that the operators and the backbone sample.
Where the model is, one backbone forward over the sampled frames serves every head.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from winnow.operators.backbone import Backbone, BackboneConfig
from winnow.operators.errors import ConfigError, MeasureError, WinnowError
from winnow.operators.models import Models
from winnow.operators.operator import (
    BatchMeasure,
    BatchOperator,
    Column,
    FrameEmbeddings,
    Measures,
    Sampling,
    SeenClip,
)
from winnow.stages.collect import CollectedClips, collect_clips
from winnow.stages.filter import check_values, merge_needs
from winnow.stages.records import Clip, Source
from winnow.stages.stage import BatchStage, Files


@dataclass
class BatchFilter(BatchStage):
    """Runs operators with models over the clips that no rule has rejected yet."""

    name: ClassVar[str] = "filter"
    files: Files
    operators: tuple[BatchOperator, ...]
    models: Models
    backbone: BackboneConfig | None = None
    threads: int = 1
    label: str = "filter"
    batch_clips: int = 16
    batch_pixels: int = 2**28
    _measures: dict[str, BatchMeasure] = field(default_factory=dict, repr=False)
    _backbone: Backbone | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        heads = [o.name for o in self.operators if o.needs.frame_embeddings]
        if heads and self.backbone is None:
            raise ConfigError(
                f"stages.{self.label}: the operators {', '.join(heads)} need embeddings of frames: "
                "give the stage a backbone (`backbone: {}` for the default one)"
            )
        for operator in self.operators:
            wanted = operator.needs.backbone
            if self.backbone is not None and wanted not in (None, self.backbone.model):
                raise ConfigError(
                    f"stages.{self.label}: the operator {operator.name!r} was made for the backbone "
                    f"{wanted!r}, not {self.backbone.model!r}: set backbone.model, or leave it out"
                )
        if self.backbone is not None and not heads:
            raise ConfigError(f"stages.{self.label}: no operator uses the backbone: leave it out")

    def __getstate__(self) -> dict[str, object]:
        # Plans travel to worker processes; weights stay where they were loaded.
        return self.__dict__ | {"_measures": {}, "_backbone": None}

    def columns(self) -> tuple[Column, ...]:
        return tuple(c for o in self.operators for c in (*o.columns, o.error_column()))

    def embeddings(self) -> tuple[str, ...]:
        return tuple(model for operator in self.operators for model in operator.embeddings)

    def needed_models(self) -> tuple[str, ...]:
        backbone = () if self.backbone is None else (self.backbone.model,)
        return tuple(
            dict.fromkeys((*backbone, *(name for o in self.operators for name in o.models())))
        )

    def versions(self) -> dict[str, str]:
        operators = {operator.name: str(operator.version) for operator in self.operators}
        made_by = {k: v for o in self.operators for k, v in o.made_by(self.models).items()}
        if self.backbone is not None:
            name = self.backbone.model
            made_by[f"model {name}"] = self.models.get(name).identity
        return operators | made_by

    def setup(self) -> None:
        if self.backbone is not None:
            self._backbone = self.backbone.load(self.models)
        self._measures = {o.name: o.load(self.models) for o in self.operators}

    def close(self) -> None:
        for measure in self._measures.values():
            measure.close()
        self._measures, self._backbone = {}, None

    def wants(self, source: Source) -> bool:
        return any(clip.alive for clip in source.clips)

    def _frames(self) -> Sampling | None:
        """The frames that the backbone sees."""
        return None if self.backbone is None else self.backbone.sampling(self.models)

    def collect(self, source: Source) -> CollectedClips | None:
        clips = [clip for clip in source.clips if clip.alive]
        if not clips:
            return None
        needs, frames = merge_needs(self.operators), self._frames()
        if frames is not None and frames not in needs.samples:
            needs = replace(needs, samples=(*needs.samples, frames))
        with self.files.local(source.key) as path:
            return collect_clips(path, source, clips, needs, self.threads)

    def measure(self, batch: Sequence[tuple[Source, CollectedClips]]) -> None:
        clips, seen = [], []
        for source, collected in batch:
            alive = {clip.clip_id: clip for clip in source.clips}
            for item, error in zip(collected.seen, collected.errors, strict=True):
                # By id: the answer must land on the clip that the frames came from.
                clip = alive[item.view.clip_id]
                if error is None:
                    clips.append(clip)
                    seen.append(item)
                else:
                    for operator in self.operators:
                        write(operator, MeasureError(error), clip)
        spent: dict[str, float] = {}
        started = time.perf_counter()
        seen = self._embedded(seen)
        if self._backbone is not None:
            spent["backbone"] = time.perf_counter() - started
        for operator in self.operators:
            started = time.perf_counter()
            for clip, answer in zip(
                clips, answers(operator, self._measures[operator.name], seen), strict=True
            ):
                write(operator, answer, clip)
            spent[operator.name] = time.perf_counter() - started
        self._book(batch, spent)

    def _embedded(self, seen: list[SeenClip]) -> list[SeenClip]:
        """The clips with the backbone's embeddings: one forward a sampled frame, for all heads."""
        frames = self._frames()
        if self._backbone is None or frames is None or not seen:
            return seen
        groups = [clip.samples[frames] for clip in seen]
        vectors = self._backbone.embed_frames([s.image for group in groups for s in group])
        ends = np.cumsum([len(group) for group in groups])
        return [
            SeenClip(
                clip.view,
                clip.samples,
                FrameEmbeddings(
                    vectors[end - len(group) : end],
                    np.array([sample.seconds for sample in group], np.float64),
                    self._backbone,
                ),
            )
            for clip, group, end in zip(seen, groups, ends, strict=True)
        ]

    def _book(
        self, batch: Sequence[tuple[Source, CollectedClips]], spent: dict[str, float]
    ) -> None:
        """Each source bears its clips' share of the time."""
        total = sum(collected.clips for _, collected in batch)
        for source, collected in batch:
            for name, seconds in spent.items():
                key = f"{self.label}/{name}"
                share = seconds * collected.clips / total
                source.seconds[key] = source.seconds.get(key, 0.0) + share


def answers(
    operator: BatchOperator, measure: BatchMeasure, seen: Sequence[SeenClip]
) -> list[Measures | MeasureError]:
    """One answer a clip. A batch that raises is tried clip by clip, so that one pays for one."""
    try:
        measured = measure(seen) if seen else []
        if len(measured) != len(seen):
            raise MeasureError(
                f"{len(measured)} answers for {len(seen)} clips: a bug in {operator.name!r}"
            )
        return measured
    except WinnowError as error:
        if not isinstance(error, MeasureError):
            raise  # a model or server is at fault, not the clip: the run must stop
        failure: Exception = error
    except Exception as error:  # the one place where a model's fault becomes a row
        failure = error
    if len(seen) == 1:
        text = str(failure)
        if not isinstance(failure, MeasureError):
            text = f"{type(failure).__name__}: {text}"
        return [MeasureError(text)]
    return [answer for clip in seen for answer in answers(operator, measure, [clip])]


def write(operator: BatchOperator, answer: Measures | MeasureError, clip: Clip) -> None:
    """Write an answer into a clip: NULL and an error text for what failed."""
    if isinstance(answer, Measures):
        try:
            check_values(operator, answer.columns)
        except MeasureError as error:
            answer = error
    error_column = operator.error_column().name
    if isinstance(answer, Measures):
        clip.columns.update(answer.columns)
        clip.vectors.update(answer.vectors)
        clip.columns[error_column] = None
    else:
        clip.columns.update({column.name: None for column in operator.columns})
        clip.columns[error_column] = str(answer)[:500]
