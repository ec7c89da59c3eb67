"""The inline engine: this process, with child processes for work on media. No Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from winnow.pipeline.batching import BatchWorker
from winnow.pipeline.isolation import Child, IsolatedWorkers, Pending
from winnow.pipeline.plan import Plan
from winnow.pipeline.roster import Roster
from winnow.pipeline.worker import Worker
from winnow.stages.records import Source


def run_inline(
    plan: Plan, sources: Iterable[Source], roster: Roster | None = None
) -> Iterator[Source]:
    """Take sources through the plan, a window of them at a time."""
    roster = roster or Roster()
    segments = [(Worker.of(plan, s.first, s.last), s) for s in plan.segments]
    isolated = [(worker, s) for worker, s in segments if s.isolated and plan.config.isolate]
    here: list[Worker | BatchWorker] = []
    pool: IsolatedWorkers | None = None
    processes = max((s.workers_max for _, s in isolated if not s.batches), default=1)
    processes = max([processes, *(s.decoders for _, s in isolated if s.batches)])
    if isolated:
        pool = IsolatedWorkers(
            [Child(worker, collects=s.batches is not None) for worker, s in isolated],
            processes,
            [s.timeout_s for _, s in isolated],
            plan.config.attempts,
        )
        pool.warm_up()
    finished = False
    try:
        stream = iter(sources)
        number = 0
        for worker, segment in segments:
            children = pool if segment.isolated else None
            if segment.batches:
                batching = BatchWorker(worker, children, number, roster.hear)
                batching.setup()
                here.append(batching)
                stream = batching.stream(stream)
            elif children is not None:
                stream = _parallel(children, number, worker, stream, window=4 * processes)
            else:
                here.append(worker)
                worker.setup()
                stream = map(worker, stream)
            number += children is not None
        yield from stream
        finished = True
    finally:
        if pool is not None:
            pool.close(now=not finished)
        for one in here:
            one.close()


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
