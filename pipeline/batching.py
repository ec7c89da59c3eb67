"""Batches for a stage with a model: children decode what comes next while the model works.

The model lives in this process, the decoders in child processes: a poisonous file kills a decoder
and not the loaded weights.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from winnow.pipeline.isolation import IsolatedWorkers, Pending
from winnow.pipeline.roster import Beat
from winnow.pipeline.worker import Worker
from winnow.stages.records import Source
from winnow.stages.stage import BatchStage

AHEAD = 2  # batches that are decoded ahead


class BatchWorker:
    """Takes sources through a stage that wants batches, in order."""

    def __init__(
        self,
        worker: Worker,
        children: IsolatedWorkers | None,
        segment: int = 0,
        beat: Callable[[Beat], None] | None = None,
    ) -> None:
        """Without `children`, decoding happens here, between the batches."""
        (stage,) = worker.stages
        assert isinstance(stage, BatchStage)
        self._worker, self._children, self._segment = worker, children, segment
        self._stage = stage
        self._model = threading.Lock()
        self._busy_s = 0.0
        self._clips = 0
        self._first: float | None = None
        self._beat = beat

    def setup(self) -> None:
        """Load the model. Raises ModelUnavailable before anything is decoded."""
        with self._model:
            self._worker.setup()

    def close(self) -> None:
        self._worker.close()

    @property
    def beat(self) -> Beat:
        """What this worker has done so far, since its first source came."""
        alive_s = 0.0 if self._first is None else time.perf_counter() - self._first
        return Beat(self._stage.label, self._busy_s, alive_s, self._clips)

    def stream(self, sources: Iterable[Source]) -> Iterator[Source]:
        """Sources through the stage; batches form from what stands next to each other."""
        window: deque[Pending | tuple[Source, Any]] = deque()
        batch: list[tuple[Source, Any]] = []
        upstream = iter(sources)
        exhausted = False
        while True:
            while not exhausted and len(window) < AHEAD * self._stage.batch_clips:
                source = next(upstream, None)
                exhausted = source is None
                if source is not None:
                    window.append(self._submit(source))
            if not window:
                break
            ahead = window.popleft()
            batch.append(self._result(ahead))
            if self._complete(batch):
                yield from self._finish(batch)
                batch = []
        yield from self._finish(batch)

    def _submit(self, source: Source) -> Pending | tuple[Source, Any]:
        self._first = self._first or time.perf_counter()
        if not self._worker.has_work(source):
            return source, None
        if self._children is None:
            return self._worker.collect(source)
        return self._children.submit(self._segment, source)

    @staticmethod
    def _result(pending: Pending | tuple[Source, Any]) -> tuple[Source, Any]:
        result = pending.result() if isinstance(pending, Pending) else pending
        # A source that killed its decoder comes back as it is, failed.
        return (result, None) if isinstance(result, Source) else result

    def _complete(self, batch: list[tuple[Source, Any]]) -> bool:
        seen = [collected for _, collected in batch if collected is not None]
        return (
            sum(collected.clips for collected in seen) >= self._stage.batch_clips
            or sum(collected.pixels for collected in seen) >= self._stage.batch_pixels
            or len(batch) >= AHEAD * self._stage.batch_clips
        )

    def _finish(self, batch: list[tuple[Source, Any]]) -> Iterator[Source]:
        work = [(source, collected) for source, collected in batch if collected is not None]
        if work:
            with self._model:
                started = time.perf_counter()
                self._worker.measure(work)
                self._busy_s += time.perf_counter() - started
                self._clips += sum(collected.clips for _, collected in work)
            if self._beat is not None:
                self._beat(self.beat)
        for source, _ in batch:
            yield self._worker.finish(source)
