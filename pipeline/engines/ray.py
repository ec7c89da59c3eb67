"""The ray engine: Ray Data. Stages are actor pools that grow and shrink with their load.

Neighbouring stages that need the same share an actor (`Plan.segments`).
Order is preserved, because the stages that own state (claim, dedup) and the commit depend on it.
Rows between stages are pickled records of a few kilobytes. Inside an actor, work on media happens in
a child process, so that a poisonous file costs neither the actor nor a retry of its whole block.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import pickle
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np

from winnow.operators.errors import ConfigError, WinnowError, WorkerError
from winnow.pipeline.batching import BatchWorker
from winnow.pipeline.isolation import Child, IsolatedWorkers
from winnow.pipeline.plan import Plan, Segment
from winnow.pipeline.roster import Beat, Roster
from winnow.pipeline.worker import Worker
from winnow.stages.records import Source

Batch = dict[str, Any]

BEAT_S = 0.5

# An actor costs Ray seconds of CPU time to start and some 250 MB; a child process a third of that.
PROCESSES_PER_ACTOR = 4


class Step:
    """A segment of the plan in an actor: in child processes, or in the actor itself."""

    def __init__(self, worker: Worker, segment: Segment, plan: Plan) -> None:
        self.worker = worker
        self.isolated = segment.isolated and plan.config.isolate
        self.batches = segment.batches is not None
        if self.batches:
            self.processes = segment.decoders
        else:
            self.processes = min(PROCESSES_PER_ACTOR, segment.workers_max)
        self.timeout_s = segment.timeout_s
        self.attempts = plan.config.attempts
        self._children: IsolatedWorkers | None = None
        self.batching: BatchWorker | None = None

    def start(self, beat: Callable[[Beat], None] | None = None) -> None:
        if self.isolated:
            # A child would import the script that this process runs, which is Ray's and heavy.
            vars(sys.modules["__main__"]).pop("__file__", None)
            self._children = IsolatedWorkers(
                [Child(self.worker, collects=self.batches)],
                self.processes,
                [self.timeout_s],
                self.attempts,
            )
            self._children.warm_up()
        if self.batches:
            self.batching = BatchWorker(self.worker, self._children, beat=beat)
            self.batching.setup()

    def __call__(self, sources: Sequence[Source]) -> list[Source]:
        if self.batching is not None:
            return list(self.batching.stream(sources))
        if self._children is None:
            return [self.worker(source) for source in sources]
        pending = [
            self._children.submit(0, source) if self.worker.wants(source) else source
            for source in sources
        ]
        # What a worker does not want it only passes on, with the policy's mark.
        return [self.worker(p) if isinstance(p, Source) else p.result() for p in pending]


class StageActor:
    """Neighbouring segments in one Ray actor."""

    def __init__(self, steps: Sequence[Step], roster: Any = None) -> None:
        self._steps = steps
        self._fault: WinnowError | None = None
        beat = _beats(roster)
        try:
            for step in steps:
                step.start(beat)
        except WinnowError as error:
            self._fault = error
        workers = [step.batching for step in steps if step.batching is not None]
        if workers:
            threading.Thread(target=_keep_beating, args=(workers, beat), daemon=True).start()

    def __call__(self, batch: Batch) -> Batch:
        """The batch, worked on; or what makes the run stop, handed on in its place.

        Raised here, an error would reach the driver as a page of text about Ray's tasks.
        """
        sources = unpack(batch)
        fault = self._fault or next((s for s in sources if isinstance(s, WinnowError)), None)
        if fault is not None:
            return pack([fault])
        try:
            for step in self._steps:
                sources = step(sources)
        except WinnowError as error:
            return pack([error])
        return pack(sources)


def _beats(roster: Any) -> Callable[[Beat], None]:
    """Carries this actor's signs of life to the run's roster."""
    import ray

    context = ray.get_runtime_context()
    actor, node = context.get_actor_id() or "", context.get_node_id()

    def beat(sign: Beat) -> None:
        if roster is not None:
            roster.hear.remote(replace(sign, worker=actor, node=node))

    return beat


def _keep_beating(workers: Sequence[BatchWorker], beat: Callable[[Beat], None]) -> None:
    while True:
        for worker in workers:
            beat(worker.beat)
        time.sleep(BEAT_S)


def pack(sources: Sequence[Source | WinnowError]) -> Batch:
    records = np.empty(len(sources), object)
    records[:] = [pickle.dumps(source, pickle.HIGHEST_PROTOCOL) for source in sources]
    return {"record": records}


def unpack(batch: Batch) -> list[Any]:
    return [pickle.loads(record) for record in batch["record"]]


class RayEngine:
    """Ray, connected or started here, for the time of a `with` block."""

    def __init__(self, address: str | None, stages: int) -> None:
        self._address = address
        self._stages = stages
        self._ours = False

    def __enter__(self) -> RayEngine:
        # Starting Ray is waiting for other processes; importing Ray Data is work for this one.
        # Its C++ core complains on stderr of how Ray Data starts its own actors.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        importing = threading.Thread(target=importlib.import_module, args=("ray.data",))
        importing.start()
        import ray

        if not ray.is_initialized():
            self._ours = True
            ray.init(
                address=self._address or "local",
                # With every pool at its least there must be CPUs left, or the stream stands still
                # with some pools waiting for what others hold. The shares are Ray's book-keeping:
                # the system's scheduler shares the cores.
                num_cpus=None if self._address else (os.cpu_count() or 1) + 2 * self._stages,
                include_dashboard=None if self._address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        importing.join()
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            import ray

            ray.shutdown()

    def require_gpus(self, plan: Plan) -> None:
        """A cluster may still grow GPUs; this machine does not. Raises ConfigError."""
        import ray

        wanted = max((segment.gpus for segment in plan.segments), default=0.0)
        resources: Any = ray.cluster_resources  # untyped
        if self._address is None and wanted > resources().get("GPU", 0):
            labels = ", ".join(p.stage.label for p in plan.placements if p.gpus)
            raise ConfigError(
                f"the stages {labels} ask for GPUs and Ray sees none on this machine: give the "
                "address of a cluster (--ray-address), set `gpus` of these stages to 0 to compute "
                "on the CPU, or take a profile without models (--config cpu)"
            )

    def run(
        self, plan: Plan, sources: Sequence[Source], roster: Roster | None = None
    ) -> Iterator[Source]:
        """Take sources through the plan, and give them back in order."""
        import ray

        try:
            listening: Any = None
            if any(segment.batches for segment in plan.segments):
                listening = ray.remote(num_cpus=0)(Roster).options(**_beside_driver()).remote()
            yield from _stream(plan, sources, listening)
            if roster is not None and listening is not None:
                roster.take_over(ray.get(listening.state.remote()))
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise WorkerError(
                f"Ray could not carry out the plan ({type(error).__name__}: {reason}). What was "
                "committed is in the lake: run the same command again to go on"
            ) from error


def _beside_driver() -> dict[str, Any]:
    """Where state lives that the run cannot do without: with the driver, it is lost with it only.

    Where that node has no room (a head node without CPUs), anywhere else.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}


def _stream(plan: Plan, sources: Sequence[Source], roster: Any) -> Iterator[Source]:
    import ray
    from ray.data import DataContext

    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    workers = max(segment.workers_max for segment in plan.segments)
    block = max(1, min(16, len(sources) // (8 * workers)))
    rows = [{"record": record} for record in pack(sources)["record"]]
    blocks = math.ceil(len(sources) / block)
    dataset: Any = ray.data.from_items(rows, override_num_blocks=blocks)
    with warnings.catch_warnings():
        # Ray 2.60 announces an end to options such as max_restarts and names nothing in their place.
        warnings.filterwarnings("ignore", message=".*ray_remote_args", category=DeprecationWarning)
        for segments in _actors(plan):
            steps = [Step(Worker.of(plan, s.first, s.last), s, plan) for s in segments]
            dataset = dataset.map_batches(
                StageActor,
                fn_constructor_args=(steps, roster),
                **_means(segments, steps),
            )
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        for source in unpack(batch):
            if isinstance(source, WinnowError):
                raise source  # a worker's word on a model, the index or the lake
            yield source


def _actors(plan: Plan) -> list[list[Segment]]:
    """The segments by actor: neighbours that are one worker each share one, in order all the same."""
    actors: list[list[Segment]] = []
    for single, group in groupby(
        plan.segments, key=lambda s: s.single and not s.gpus and not s.batches
    ):
        members = list(group)
        actors += [members] if single else [[segment] for segment in members]
    return actors


def _means(segments: Sequence[Segment], steps: Sequence[Step]) -> dict[str, Any]:
    """Ray's resources of a pool of such actors, each holding some workers."""
    from ray.data import ActorPoolStrategy

    each = steps[0].processes
    least = math.ceil(max(s.workers_min for s in segments) / each)
    most = math.ceil(max(s.workers_max for s in segments) / each)
    means: dict[str, Any] = {"num_cpus": each * max(s.cpus for s in segments), "batch_size": None}
    if batches := segments[0].batches:
        # Small blocks are put together into full batches for the model.
        means["batch_size"] = batches.batch_clips
    if gpus := max(s.gpus for s in segments):
        means["num_gpus"] = gpus
    if any(stage.ordered for step in steps for stage in step.worker.stages):
        # What such an actor knows of this run dies with it. A run that stops is finished by the
        # next one; a run that goes on with half a memory would take copies for originals.
        # (`ray_remote_args_fn` would do too, but then Ray Data waits for the dead actor for ever.)
        means |= {"max_restarts": 0, "max_task_retries": 0, **_beside_driver()}
    size: dict[str, Any] = (
        {"size": most} if least == most else {"min_size": least, "max_size": most}
    )
    if len(steps) == 1 and steps[0].isolated:
        # While the last source of one block is at work, the other children begin the next; while
        # the model works on one block, the children decode the next.
        size["max_concurrent_calls_per_actor"] = 2
        size["max_tasks_in_flight_per_actor"] = 4
        size["enable_true_multi_threading"] = True
    return means | {"compute": ActorPoolStrategy(**size)}
