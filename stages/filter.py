"""Filter: one decode pass over a source measures every clip that is still alive."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from winnow.operators.errors import MeasureError
from winnow.operators.frames import SpanReader, decode
from winnow.operators.operator import (
    ClipView,
    Column,
    FrameChunk,
    Measurement,
    Needs,
    Operator,
    Sampling,
)
from winnow.stages.records import Clip, Source
from winnow.stages.stage import Files, Stage


def merge_needs(operators: Sequence[Operator]) -> Needs:
    """What the frame reader must provide so that every operator sees what it declared."""
    samples: list[Sampling] = []
    columns: list[str] = []
    for operator in operators:
        samples += [s for s in operator.needs.samples if s not in samples]
        columns += [c for c in operator.needs.columns if c not in columns]
    return Needs(
        luma=any(operator.needs.luma for operator in operators),
        motion_vectors=any(operator.needs.motion_vectors for operator in operators),
        samples=tuple(samples),
        columns=tuple(columns),
    )


class ClipMeasurements:
    """The operators of a stage at work on one clip, each failing on its own."""

    def __init__(self, operators: Sequence[Operator], view: ClipView) -> None:
        self.seconds = {operator.name: 0.0 for operator in operators}
        self._operators = {operator.name: operator for operator in operators}
        self._running: dict[str, Measurement] = {}
        self._errors: dict[str, str] = {}
        for operator in operators:
            self._guard(operator.name, lambda o=operator: self._start(o, view))

    def _start(self, operator: Operator, view: ClipView) -> None:
        self._running[operator.name] = operator.start(view)

    def _guard(self, name: str, action: Any) -> None:
        started = time.perf_counter()
        try:
            action()
        except MeasureError as error:
            self._drop(name, str(error))
        except Exception as error:  # the one place where an operator's fault becomes a row
            self._drop(name, f"{type(error).__name__}: {error}")
        finally:
            self.seconds[name] += time.perf_counter() - started

    def _drop(self, name: str, text: str) -> None:
        self._errors[name] = text[:500]
        self._running.pop(name, None)

    def update(self, chunk: FrameChunk) -> None:
        for name, measurement in list(self._running.items()):
            self._guard(name, lambda m=measurement: m.update(chunk))

    def fail_all(self, text: str) -> None:
        for name in list(self._running):
            self._drop(name, text)

    def finish(self, clip: Clip) -> None:
        """Write the columns into the clip: NULL and an error text for what failed."""
        for name, measurement in list(self._running.items()):
            self._guard(name, lambda n=name, m=measurement: self._write(n, m, clip))
        for name, operator in self._operators.items():
            if name in self._errors:
                clip.columns.update({column.name: None for column in operator.columns})
            clip.columns[f"{name}_error"] = self._errors.get(name)

    def _write(self, name: str, measurement: Measurement, clip: Clip) -> None:
        values = measurement.columns()
        check_values(self._operators[name], values)
        vectors = measurement.vectors()
        clip.columns.update(values)
        clip.vectors.update(vectors)


def check_values(operator: Operator, values: Mapping[str, Any]) -> None:
    """Raises MeasureError where the values are not those declared, or not finite."""
    declared = {column.name for column in operator.columns}
    if values.keys() != declared:
        differing = sorted(values.keys() ^ declared)
        raise MeasureError(f"wrote {differing} other than declared: a bug in {operator.name!r}")
    for column, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise MeasureError(f"{column} is {value}")


@dataclass
class Filter(Stage):
    """Runs operators over the clips that no rule has rejected yet."""

    name: ClassVar[str] = "filter"
    files: Files
    operators: tuple[Operator, ...]
    threads: int = 1
    label: str = "filter"

    def columns(self) -> tuple[Column, ...]:
        return tuple(
            column
            for operator in self.operators
            for column in (*operator.columns, operator.error_column())
        )

    def embeddings(self) -> tuple[str, ...]:
        return tuple(model for operator in self.operators for model in operator.embeddings)

    def versions(self) -> dict[str, str]:
        return {operator.name: str(operator.version) for operator in self.operators}

    def setup(self) -> None:
        for operator in self.operators:
            operator.setup()

    def wants(self, source: Source) -> bool:
        return any(self._open(source))

    def _open(self, source: Source) -> list[Clip]:
        """The clips to measure: alive, and not measured ahead by split."""
        written = [operator.error_column().name for operator in self.operators]
        return [clip for clip in source.clips
                if clip.alive and not all(name in clip.columns for name in written)]  # fmt: skip

    def process(self, source: Source) -> None:
        clips = self._open(source)
        if not clips:
            return
        measuring = Measuring(self.label, self.operators, source, clips)
        with self.files.local(source.key) as path:
            measuring.watch(path, self.threads)
        measuring.finish()


class Measuring:
    """One decode pass over a source, as operators see it that measure while it lasts."""

    def __init__(
        self, label: str, operators: Sequence[Operator], source: Source, clips: Sequence[Clip]
    ) -> None:
        if source.media is None:
            raise RuntimeError("a filter needs a source that ingest has probed")
        self.needs = merge_needs(operators)
        self._label, self._source, self._clips = label, source, clips
        self._measurements = [ClipMeasurements(operators, view_of(source, clip)) for clip in clips]
        self.reader = SpanReader(
            [clip.span for clip in clips],
            source.media.fps,
            self.needs,
            lambda k, chunk: self._measurements[k].update(chunk),
        )

    def watch(self, path: Path, threads: int) -> None:
        """Decode the file as far as the clips reach."""
        frames = decode(path, threads=threads, motion_vectors=self.needs.motion_vectors)
        for number, frame in enumerate(frames):
            if self.reader.done:
                break
            self.reader.see(number, frame)

    def finish(self) -> float:
        """Write the columns into the clips. Returns the seconds that the operators took."""
        total = 0.0
        for clip, measurement, frames in zip(
            self._clips, self._measurements, self.reader.close(), strict=True
        ):
            if frames < len(clip.span):
                measurement.fail_all(
                    f"only {frames} of the clip's {len(clip.span)} frames could be decoded"
                )
            measurement.finish(clip)
            for name, seconds in measurement.seconds.items():
                key = f"{self._label}/{name}"
                self._source.seconds[key] = self._source.seconds.get(key, 0.0) + seconds
                total += seconds
        return total


def view_of(source: Source, clip: Clip) -> ClipView:
    """What operators may know of a clip beforehand."""
    assert source.media is not None
    return ClipView(
        clip_id=clip.clip_id,
        frames=len(clip.span),
        fps=source.media.fps,
        width=source.media.width,
        height=source.media.height,
        codec=source.media.codec,
        coded_rotation=source.media.rotation,
        prompt=source.sidecar.prompt if source.sidecar else None,
        other_prompts=source.other_prompts,
        columns=clip.columns,
    )
