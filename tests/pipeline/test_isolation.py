"""A file that kills or hangs its worker costs itself and nothing else."""

import os
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from winnow.pipeline.config import load_config
from winnow.pipeline.engines.inline import run_inline
from winnow.pipeline.engines.ray import RayEngine
from winnow.pipeline.plan import Placement, Plan
from winnow.pipeline.policy import Policy
from winnow.stages.records import Source
from winnow.stages.stage import Stage

# Ray leaves files and sockets to the garbage collector; that is not ours to fix.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@dataclass
class Trouble(Stage):
    """Does to its process what the name of the file says."""

    name = "trouble"
    marks: str
    label: str = "trouble"

    def process(self, source: Source) -> None:
        mark = Path(self.marks, source.key)
        with mark.open("a") as file:
            file.write("x")
        if "kill" in source.key:
            os.kill(os.getpid(), signal.SIGSEGV)
        elif "hang" in source.key:
            time.sleep(60)
        elif "flaky" in source.key and mark.stat().st_size < 2:
            os._exit(3)
        elif "bug" in source.key:
            raise ValueError("a bug")


@pytest.fixture(scope="module", params=["inline", "ray"])
def outcome(request, tmp_path_factory):
    marks = tmp_path_factory.mktemp("marks")
    placement = Placement(Trouble(str(marks)), workers_max=2, timeout_s=3)
    config = load_config("cpu", ["attempts=2"])
    plan = Plan(config, Policy(name="none", rules=()), (placement,))
    names = ["a", "kill", "b", "hang", "flaky", "bug", "c"]
    sources = [Source(n, name, name, 1, 0.0, None, str(n)) for n, name in enumerate(names)]
    if request.param == "ray":
        with warnings.catch_warnings(), RayEngine(None, 1) as engine:
            warnings.simplefilter("ignore")
            done = list(engine.run(plan, sources))
    else:
        done = list(run_inline(plan, sources))
    return {s.key: s for s in done}, [s.key for s in done], names, marks


def test_nothing_is_lost_and_the_order_is_kept(outcome):
    _, order, names, _ = outcome
    assert order == names


@pytest.mark.parametrize(
    ("key", "status", "kind"),
    [("a", "done", None), ("b", "done", None), ("c", "done", None), ("kill", "failed", "crashed"),
     ("hang", "failed", "timeout"), ("flaky", "done", None), ("bug", "failed", "internal")],
)  # fmt: skip
def test_each_source_has_its_own_end(outcome, key, status, kind):
    source = outcome[0][key]
    assert (source.status, source.error_kind) == (status, kind)


def test_the_error_says_what_happened(outcome):
    assert "SIGSEGV" in outcome[0]["kill"].error
    assert "3 s" in outcome[0]["hang"].error
    assert "a bug" in outcome[0]["bug"].error


def test_tries_are_bounded(outcome):
    assert (outcome[3] / "kill").stat().st_size == 2
