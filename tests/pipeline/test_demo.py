"""The demo is the main job on videos of which everything is known."""

import json

import pytest

from tests.pipeline.lakes import facts, rows
from tests.pipeline.test_cli import winnow
from tests.test_notebooks import in_jupyter
from winnow.pipeline.lake import Lake


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    output, _ = winnow("demo", "--out", folder, "--json")
    return folder, json.loads(output)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_everything_planted_is_found(demo):
    folder, content = demo
    wrong = [s for s in content["samples"] if not s["agrees"]]
    assert not wrong
    assert len(content["samples"]) >= 38
    assert (folder / "report.html").stat().st_size > 50_000


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_explores_the_demos_lake(demo, tmp_path, monkeypatch):
    folder, _ = demo
    outputs = in_jupyter(Lake(str(folder / "lake")), tmp_path, monkeypatch)
    said = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "it balances" in said
    assert sum("image/png" in o.data for o in outputs if "data" in o) == 7


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_refilter_gives_the_verdicts_of_the_run(demo):
    folder, _ = demo
    lake = Lake(str(folder / "lake"))
    before = facts(lake)["verdicts"]
    output, _ = winnow("refilter", "--lake", lake.uri, "--policy", "generated", "--json")
    assert json.loads(output)["changed"] == 0
    assert facts(lake)["verdicts"] == before
    deciders = rows(lake, "SELECT DISTINCT decided_by LIKE 'refilter%' FROM verdicts")
    assert deciders == [(True,)]
