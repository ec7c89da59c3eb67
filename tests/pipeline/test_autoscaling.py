"""Pools of workers with a model grow and shrink with a cluster, and nothing is lost on the way."""

from __future__ import annotations

import gc
import threading
import time
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pytest

from tests.conftest import scene, write_video
from winnow.operators.models import Models
from winnow.operators.operator import (
    BatchMeasure,
    BatchOperator,
    Column,
    Measures,
    Needs,
    Sampling,
    SeenClip,
)
from winnow.operators.shots import NoDetector
from winnow.pipeline.config import load_config
from winnow.pipeline.engines.inline import run_inline
from winnow.pipeline.engines.ray import RayEngine
from winnow.pipeline.plan import Placement, Plan
from winnow.pipeline.policy import Policy
from winnow.pipeline.roster import Roster
from winnow.pipeline.storage import Storage
from winnow.stages.batch_filter import BatchFilter
from winnow.stages.ingest import Claim, Ingest
from winnow.stages.records import Source
from winnow.stages.split import Split

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
    ),
]  # fmt: skip

SAMPLING = Sampling(8, kind="rgb")
FILES = 160


@dataclass(frozen=True)
class Glow(BatchOperator):
    """Mean brightness, by a model that takes its time over a clip."""

    name: ClassVar[str] = "glow"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (Column("glow_mean", pa.float64(), "mean"),)

    clip_s: float = 0.25
    workers: str = ""
    """A folder. Until three workers have signed there, batches take longer: a busy machine is slow to
    add workers."""

    @property
    def needs(self) -> Needs:
        return Needs(samples=(SAMPLING,))

    def load(self, models: Models) -> BatchMeasure:
        if self.workers:
            (Path(self.workers) / uuid.uuid4().hex).touch()
        return Glowing(self.clip_s, self.workers)


class Glowing(BatchMeasure):
    def __init__(self, clip_s: float, workers: str) -> None:
        self._clip_s = clip_s
        self._workers = workers

    def __call__(self, clips: Sequence[SeenClip]) -> list:
        time.sleep(self._clip_s * len(clips))
        if self._workers and not grown(self._workers):
            time.sleep(2)
        return [
            Measures({"glow_mean": sum(float(s.image.mean()) for s in clip.samples[SAMPLING])})
            for clip in clips
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for n in range(FILES):
        write_video(folder / f"{n:03}.mp4", scene(n, 8, 64, 36))
    (folder / "050b.mp4").write_bytes(b"no video")
    return folder


def grown(workers: str) -> bool:
    return len(list(Path(workers).iterdir())) >= 3


def make(folder: Path, clip_s: float, workers: str = "") -> tuple[Plan, list[Source]]:
    files = Storage.open(str(folder))
    placements = (
        Placement(Ingest(files, settle_s=0)),
        Placement(Claim({}), isolated=False),
        Placement(Split(files, NoDetector(kind="none"))),
        Placement(
            BatchFilter(
                files, (Glow(clip_s, workers),), Models(models={}), label="glow", batch_clips=4
            ),
            workers_min=1,
            workers_max=3,
            cpus=0.1,
            gpus=1,
        ),
    )
    plan = Plan(load_config("cpu"), Policy(name="none", rules=()), placements)
    sources = [
        Source(n, file.uri, file.key, file.size, file.modified, None, str(n))
        for n, file in enumerate(files.find(("*.mp4",), ()))
    ]
    return plan, sources


def outcome(sources: Sequence[Source]) -> list[tuple]:
    return [
        (s.key, s.status, s.error_kind, [(c.clip_id, c.columns.get("glow_mean"), c.columns.get("glow_error"))
                                         for c in s.clips])
        for s in sources
    ]  # fmt: skip


def test_a_pool_follows_the_cluster_and_loses_nothing_with_a_node(folder, tmp_path):
    from ray.cluster_utils import Cluster

    plan, sources = make(folder, 0.25, str(tmp_path))
    leaving = None
    expected = outcome(list(run_inline(*make(folder, 0.0))))
    roster, done = Roster(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8})
        try:
            cluster.add_node(num_cpus=1, num_gpus=1)
            with RayEngine(cluster.address, 4) as engine:
                for source in engine.run(plan, sources, roster):
                    done.append(source)
                    if len(done) == 8:
                        more = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
                    if len(done) >= 90 and leaving is None and grown(str(tmp_path)):
                        leaving = threading.Thread(
                            target=cluster.remove_node, args=(more[0], False), daemon=True
                        )
                        leaving.start()
        finally:
            cluster.shutdown()
            gc.collect()
    assert outcome(done) == expected
    (pool,) = roster.rows()
    sizes = [size for _, size in pool["size_over_time"]]
    assert pool["nodes"] == pool["most_at_once"] == 3, pool
    assert sizes[0] == 1, pool
    shrank = [at for at, size in pool["size_over_time"][sizes.index(3) :] if size < 3]
    assert shrank[-1] - shrank[0] > 1, pool
    # The last words of a worker whose node went are lost: the roster is no ledger.
    assert pool["clips"] >= 0.9 * FILES
    assert 0 < pool["busy_share"] <= 1
