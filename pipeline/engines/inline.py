"""The inline engine: this process, with child processes for work on media. No Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby

from winnow.pipeline.isolation import IsolatedWorkers, Pending
from winnow.pipeline.plan import Plan
from winnow.pipeline.worker import Worker
from winnow.stages.records import Source


def run_inline(plan: Plan, sources: Iterable[Source]) -> Iterator[Source]:
    """Take sources through the plan, a window of them at a time."""
    segments = _segments(plan)
    children = [(w, timeout) for w, isolated, timeout in segments if isolated]
    processes = max((p.workers_max for p in plan.placements if p.isolated), default=1)
    if not plan.config.isolate:
        stream = iter(sources)
        for worker, _, _ in segments:
            worker.setup()
            stream = map(worker, stream)
        yield from _closing(stream, [worker for worker, _, _ in segments])
        return
    pool = IsolatedWorkers(
        [worker for worker, _ in children],
        processes,
        [timeout for _, timeout in children],
        plan.config.attempts,
    )
    here: list[Worker] = []
    finished = False
    try:
        stream = iter(sources)
        number = 0
        for worker, isolated, _ in segments:
            if isolated:
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


def _segments(plan: Plan) -> list[tuple[Worker, bool, float]]:
    """Consecutive stages that run in the same place, as (worker, isolated, time limit)."""
    segments = []
    numbered = enumerate(plan.placements)
    for isolated, group in groupby(numbered, key=lambda item: item[1].isolated):
        members = list(group)
        first, last = members[0][0], members[-1][0] + 1
        timeout = sum(placement.timeout_s for _, placement in members)
        segments.append((Worker.of(plan, first, last), isolated, timeout))
    return segments


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
