"""The inline engine: this process, with child processes for work on media. No Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from winnow.pipeline.isolation import IsolatedWorkers, Pending
from winnow.pipeline.plan import Plan
from winnow.pipeline.worker import Worker
from winnow.stages.records import Source


def run_inline(plan: Plan, sources: Iterable[Source]) -> Iterator[Source]:
    """Take sources through the plan, a window of them at a time."""
    segments = [(Worker.of(plan, s.first, s.last), s) for s in plan.segments]
    isolated = [(worker, s.timeout_s) for worker, s in segments if s.isolated]
    processes = max((s.workers_max for s in plan.segments if s.isolated), default=1)
    if not plan.config.isolate:
        stream = iter(sources)
        for worker, _ in segments:
            worker.setup()
            stream = map(worker, stream)
        yield from _closing(stream, [worker for worker, _ in segments])
        return
    pool = IsolatedWorkers(
        [worker for worker, _ in isolated],
        processes,
        [timeout_s for _, timeout_s in isolated],
        plan.config.attempts,
    )
    pool.warm_up()
    here: list[Worker] = []
    finished = False
    try:
        stream = iter(sources)
        number = 0
        for worker, place in segments:
            if place.isolated:
                stream = _parallel(pool, number, worker, stream, window=4 * processes)
                number += 1
            else:
                here.append(worker)
                worker.setup()
                stream = map(worker, stream)
        yield from stream
        finished = True
    finally:
        pool.close(now=not finished)
        for worker in here:
            worker.close()


def _parallel(
    pool: IsolatedWorkers, segment: int, worker: Worker, stream: Iterator[Source], window: int
) -> Iterator[Source]:
    pending: deque[Pending | Source] = deque()
    for source in stream:
        # A source that is settled (failed, copy) has nothing to do in a child.
        work = worker.wants(source)
        pending.append(pool.submit(segment, source) if work else source)
        if len(pending) >= window:
            yield _result(pending.popleft())
    while pending:
        yield _result(pending.popleft())


def _result(pending: Pending | Source) -> Source:
    return pending if isinstance(pending, Source) else pending.result()


def _closing(stream: Iterator[Source], workers: list[Worker]) -> Iterator[Source]:
    try:
        yield from stream
    finally:
        for worker in workers:
            worker.close()
