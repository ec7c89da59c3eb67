"""The ray engine: Ray Data. Each stage is an actor pool that grows and shrinks with its load.

Order is preserved, because the stages that own state (claim, dedup) and the commit depend on it.
Rows between stages are pickled records of a few kilobytes. Inside an actor, work on media happens in
a child process, so that a poisonous file costs neither the actor nor a retry of its whole block.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from winnow.operators.errors import WorkerError
from winnow.pipeline.isolation import IsolatedWorkers
from winnow.pipeline.plan import Placement, Plan
from winnow.pipeline.worker import Worker
from winnow.stages.records import Source

Batch = dict[str, Any]


class StageActor:
    """One stage in one Ray actor."""

    def __init__(self, worker: Worker, *, isolated: bool, timeout_s: float, attempts: int) -> None:
        self._worker = worker
        self._children: IsolatedWorkers | None = None
        if isolated:
            self._children = IsolatedWorkers([worker], 1, [timeout_s], attempts)

    def __call__(self, batch: Batch) -> Batch:
        return pack([self._one(source) for source in unpack(batch)])

    def _one(self, source: Source) -> Source:
        if self._children is not None and self._worker.wants(source):
            return self._children.submit(0, source).result()
        return self._worker(source)


def pack(sources: Sequence[Source]) -> Batch:
    records = np.empty(len(sources), object)
    records[:] = [pickle.dumps(source, pickle.HIGHEST_PROTOCOL) for source in sources]
    return {"record": records}


def unpack(batch: Batch) -> list[Source]:
    return [pickle.loads(record) for record in batch["record"]]


def run_ray(plan: Plan, sources: Sequence[Source], address: str | None = None) -> Iterator[Source]:
    """Take sources through the plan on Ray, and give them back in order."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    started = _start(address, plan)
    try:
        context = DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        workers = max((p.workers_max for p in plan.placements), default=1)
        block = max(1, min(16, math.ceil(len(sources) / (8 * workers))))
        blocks = max(1, math.ceil(len(sources) / block))
        rows = [{"record": record} for record in pack(sources)["record"]]
        dataset: Any = ray.data.from_items(rows, override_num_blocks=blocks)
        for number, placement in enumerate(plan.placements):
            dataset = dataset.map_batches(
                StageActor,
                fn_constructor_args=(Worker.of(plan, number, number + 1),),
                fn_constructor_kwargs={
                    "isolated": placement.isolated and plan.config.isolate,
                    "timeout_s": placement.timeout_s,
                    "attempts": plan.config.attempts,
                },
                batch_size=None,
                compute=_pool(placement, ActorPoolStrategy),
                num_cpus=placement.cpus,
                **({"num_gpus": placement.gpus} if placement.gpus else {}),
            )
        for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
            yield from unpack(batch)
    except ray.exceptions.RayError as error:
        raise WorkerError(f"Ray could not carry out the plan: {error}") from error
    finally:
        if started:
            ray.shutdown()


def _pool(placement: Placement, strategy: Any) -> Any:
    if placement.workers_min == placement.workers_max:
        return strategy(size=placement.workers_max)
    return strategy(min_size=placement.workers_min, max_size=placement.workers_max)


def _start(address: str | None, plan: Plan) -> bool:
    """Connect to a cluster, or start Ray here. True where it must be shut down again."""
    import ray

    if ray.is_initialized():
        return False
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return True
    # Every pool must be able to hold its least number of actors at once, or the stream stands still
    # with some pools waiting for CPUs that others hold.
    needed = sum(p.cpus * p.workers_min for p in plan.placements)
    cpus = max(os.cpu_count() or 1, math.ceil(needed))
    ray.init(
        num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    return True
