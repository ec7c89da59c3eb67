"""Child processes for work on untrusted media: one that dies or hangs costs one source, not the run.

A pool of children holds the stages; a source that kills its child or exceeds the time limit is tried
again in a fresh one, and then quarantined with kind `crashed` or `timeout`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from pebble import ProcessExpired, ProcessPool

from winnow.operators.errors import MediaError
from winnow.pipeline.worker import Worker
from winnow.stages.records import Source

_workers: list[Child] = []
TASKS_PER_CHILD = 2000  # a fresh process now and then, against leaks in native libraries


@dataclass(frozen=True)
class Child:
    """What a child process does with a source: all of a worker's stages, or decoding for a model."""

    worker: Worker
    collects: bool = False

    def __call__(self, source: Source) -> Any:
        return self.worker.collect(source) if self.collects else self.worker(source)

    def setup(self) -> None:
        if not self.collects:
            self.worker.setup()


def begin(workers: Sequence[Child]) -> None:
    """Runs in the child. It ends when its parent does, and leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    import cv2

    cv2.setNumThreads(1)  # parallelism is by process
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _workers[:] = workers


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _work(segment: int, source: Source) -> Any:
    return _workers[segment](source)


def _setup(segment: int) -> None:
    _workers[segment].setup()
    gc.freeze()  # what is loaded now stays: collections while decoding need not walk it again


class IsolatedWorkers:
    """Runs sources through workers in child processes. Order of results is the caller's business."""

    def __init__(
        self, workers: Sequence[Child], processes: int, timeouts: Sequence[float], attempts: int
    ) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._attempts = attempts
        self._processes = processes
        self._timeouts = timeouts
        self._workers = workers
        self._pool: Any = ProcessPool(
            max_workers=processes,
            max_tasks=TASKS_PER_CHILD,
            initializer=begin,
            initargs=[list(workers)],
            context=multiprocessing.get_context("spawn"),
        )

    def warm_up(self) -> None:
        """Let a child start and load its stages while nothing has come to do yet.

        Nobody waits for it: what goes wrong here goes wrong again, and is told, with the first source.
        """
        for segment in range(len(self._workers)):
            for _ in range(self._processes):
                self._pool.schedule(_setup, args=[segment])

    def submit(self, segment: int, source: Source) -> Pending:
        return Pending(self, segment, source)

    def schedule(self, segment: int, source: Source) -> Future[Any]:
        future: Future[Any] = self._pool.schedule(
            _work, args=[segment, source], timeout=self._timeouts[segment]
        )
        return future

    def attempt(self, segment: int, source: Source, future: Future[Any]) -> Any:
        """What came back, after as many tries as allowed; else the source, as failed."""
        for tries_left in reversed(range(self._attempts)):
            try:
                return future.result()
            except TimeoutError:
                limit = self._timeouts[segment]
                error = MediaError(
                    "timeout", f"{self._where(segment)} took longer than {limit:g} s"
                )
            except ProcessExpired as expired:
                error = MediaError(
                    "crashed",
                    f"{self._where(segment)} killed its worker process "
                    f"({exit_text(expired.exitcode)})",
                )
            if tries_left:
                future = self.schedule(segment, source)
        lost = replace(source)
        lost.fail(error)
        return lost

    def _where(self, segment: int) -> str:
        return "/".join(stage.label for stage in self._workers[segment].worker.stages)

    def close(self, *, now: bool = False) -> None:
        if now:
            self._pool.stop()
        else:
            self._pool.close()
        self._pool.join()


class Pending:
    """A source on its way through a child process."""

    def __init__(self, workers: IsolatedWorkers, segment: int, source: Source) -> None:
        self._workers, self._segment, self._source = workers, segment, source
        self._future = workers.schedule(segment, source)

    def result(self) -> Any:
        return self._workers.attempt(self._segment, self._source, self._future)


def exit_text(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
