"""Batches for a model: formed in order, decoded in children, each clip paying for itself only."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from tests.conftest import scene, write_video
from winnow.operators.errors import ConfigError, MeasureError, ModelUnavailable
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
from winnow.pipeline.plan import Placement, Plan
from winnow.pipeline.planning import check_config
from winnow.pipeline.policy import Policy, Rule
from winnow.pipeline.roster import Beat, Roster
from winnow.pipeline.storage import Storage
from winnow.stages.batch_filter import BatchFilter
from winnow.stages.ingest import Claim, Ingest
from winnow.stages.records import Source
from winnow.stages.split import Split

SAMPLING = Sampling(4, kind="rgb")
PROMPTS = {"clip 2": "poison", "clip 4": "unmeasurable"}


@dataclass(frozen=True)
class Glow(BatchOperator):
    """Mean brightness; chokes on what it is told to choke on."""

    name: ClassVar[str] = "glow"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (Column("glow_mean", pa.float64(), "mean"),)

    poison: float = -1.0
    sizes: list[int] = field(default_factory=list, compare=False)

    @property
    def needs(self) -> Needs:
        return Needs(samples=(SAMPLING,))

    def load(self, models: Models) -> BatchMeasure:
        return Glowing(self)


class Glowing(BatchMeasure):
    def __init__(self, operator: Glow) -> None:
        self._operator = operator

    def __call__(self, clips: Sequence[SeenClip]) -> list[Any]:
        self._operator.sizes.append(len(clips))
        answers: list[Any] = []
        for clip in clips:
            mean = float(clip.samples[SAMPLING][0].image.mean())
            if clip.view.frames == 9:
                raise RuntimeError("the model chokes")
            if clip.view.frames == 10:
                answers.append(MeasureError("nothing to see"))
            elif clip.view.frames == 11:
                answers.append(Measures({"glow_mean": float("nan")}))
            elif clip.view.frames == 13:
                raise ModelUnavailable("the server is gone")
            else:
                answers.append(Measures({"glow_mean": mean}))
        return answers


@dataclass
class Deadly(BatchFilter):
    """Its decoder dies over one file."""

    def collect(self, source: Source) -> Any:
        if source.key == "2.mp4":
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().collect(source)


def make(
    folder: Path, lengths: Sequence[int], kind: type[BatchFilter] = BatchFilter, **settings: Any
) -> tuple[Plan, list[Source], Glow]:
    for n, frames in enumerate(lengths):
        if not (folder / f"{n}.mp4").exists():
            write_video(folder / f"{n}.mp4", scene(n, frames, 64, 36))
    files, glow = Storage.open(str(folder)), Glow()
    isolate = settings.pop("isolate", False)
    rules = settings.pop("rules", ())
    filter_stage = kind(files, (glow,), Models(models={}), label="glow", **settings)
    placements = (
        Placement(Ingest(files, settle_s=0)),
        Placement(Claim({}), isolated=False),
        Placement(Split(files, NoDetector(kind="none"))),
        Placement(filter_stage, decoders=2, timeout_s=30),
    )
    config = load_config("cpu", [f"isolate={str(isolate).lower()}", "attempts=1"])
    plan = Plan(config, Policy(name="none", rules=rules), placements)
    sources = [
        Source(n, file.uri, file.key, file.size, file.modified, None, str(n))
        for n, file in enumerate(files.find(("*.mp4",), ()))
    ]
    return plan, sources, glow


def column(sources: Sequence[Source], name: str) -> list[Any]:
    return [clip.columns[name] for source in sources for clip in source.clips]


def test_batches_fill_up_in_order_and_do_not_change_a_score(tmp_path):
    plan, sources, glow = make(tmp_path, [8] * 7, batch_clips=3)
    done = list(run_inline(plan, sources))
    assert [s.key for s in done] == [f"{n}.mp4" for n in range(7)]
    assert glow.sizes == [3, 3, 1]
    plan, sources, glow = make(tmp_path, [8] * 7, batch_clips=16, batch_pixels=1)
    assert column(list(run_inline(plan, sources)), "glow_mean") == column(done, "glow_mean")
    assert glow.sizes == [1] * 7, "the pixel budget closes a batch too"


def test_a_clip_that_chokes_the_model_pays_alone(tmp_path):
    plan, sources, _ = make(tmp_path, [8, 9, 8, 10, 11, 8], batch_clips=6)
    done = list(run_inline(plan, sources))
    assert [value is None for value in column(done, "glow_mean")] == [
        False, True, False, True, True, False,
    ]  # fmt: skip
    assert column(done, "glow_error") == [
        None, "RuntimeError: the model chokes", None, "nothing to see", "glow_mean is nan", None,
    ]  # fmt: skip
    assert {source.status for source in done} == {"done"}


def test_a_model_that_is_gone_stops_the_run(tmp_path):
    plan, sources, _ = make(tmp_path, [8, 13], batch_clips=2)
    with pytest.raises(ModelUnavailable, match="server is gone"):
        list(run_inline(plan, sources))


def test_a_file_that_kills_its_decoder_costs_that_file_only(tmp_path):
    plan, sources, _ = make(tmp_path, [8] * 5, kind=Deadly, isolate=True, batch_clips=5)
    roster = Roster()
    done = list(run_inline(plan, sources, roster))
    assert [s.error_kind for s in done] == [None, None, "crashed", None, None]
    assert len(column(done, "glow_mean")) == 4
    (pool,) = roster.rows()
    assert (pool["workers"], pool["clips"]) == (1, 4)


def test_rejected_clips_are_not_shown_to_the_model(tmp_path):
    rules = (Rule(name="odd", reject="clip_frames = 7"),)
    plan, sources, glow = make(tmp_path, [7, 8, 7, 8], rules=rules)
    done = list(run_inline(plan, sources))
    assert glow.sizes == [2]
    assert [clip.decision.verdict for s in done for clip in s.clips] == [
        "reject", "keep", "reject", "keep",
    ]  # fmt: skip
    assert "glow_mean" not in done[0].clips[0].columns


def test_a_rule_on_a_failed_measure_is_an_error_not_a_reject(tmp_path):
    rules = (Rule(name="dim", reject="glow_mean < 1"),)
    plan, sources, _ = make(tmp_path, [8, 10], rules=rules)
    decisions = [s.clips[0].decision for s in run_inline(plan, sources)]
    assert [(d.verdict, d.reasons) for d in decisions] == [("keep", ()), ("error", ("dim",))]


@pytest.mark.parametrize(("settings", "message"), [
    (["stages.cheap.backbone={}"], "for operators with models"),
    (["stages.cheap.gpus=1"], "for operators with models"),
    (["stages.cheap.operators.aesthetic={}"], "need one of their own"),
    (["stages.cheap.operators={aesthetic: {}}"], "give the stage a backbone"),
])  # fmt: skip
def test_a_stage_that_cannot_work_is_refused_before_the_run(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_config(load_config("cpu", ["policy=tests/pipeline/keep_all.yaml", *settings]))


def test_the_roster_tells_pool_sizes_over_time():
    now = [0.0]
    roster = Roster(clock=lambda: now[0])
    for now[0], worker, busy, alive in [
        (0.0, "a", 0.0, 0.0), (1.0, "b", 0.0, 0.0), (4.0, "a", 3.0, 4.0), (5.0, "b", 1.0, 4.0),
        (9.0, "b", 1.0, 8.0),
    ]:  # fmt: skip
        roster.hear(Beat("vision", busy, alive, int(busy) * 2, worker, worker))
    (pool,) = roster.rows()
    assert pool["size_over_time"] == [[0.0, 1], [1.0, 2], [4.0, 1], [9.0, 0]]
    assert pool["busy_share"] == 0.5, (
        "the idle end of a worker that waits for others is no idleness"
    )
    assert (pool["clips"], pool["nodes"]) == (8, 2)


@dataclass
class Slow(BatchFilter):
    """Decoding and the model each take their time, without work for a core."""

    def collect(self, source: Source) -> Any:
        time.sleep(0.25)
        return super().collect(source)

    def measure(self, batch: Sequence[Any]) -> None:
        time.sleep(0.25 * len(batch))
        super().measure(batch)


def test_children_decode_while_the_model_works(tmp_path):
    plan, sources, _ = make(tmp_path, [8] * 16, kind=Slow, isolate=True, batch_clips=2)
    roster = Roster()
    assert len(list(run_inline(plan, sources, roster))) == 16
    (pool,) = roster.rows()
    # One after the other the model would rest for half of the time; two children keep it fed.
    assert pool["busy_share"] > 0.6
