"""The real videos through the default profile, and decided again from what is stored of them."""

from pathlib import Path

import pytest

from tests.pipeline.lakes import facts, rows
from winnow.pipeline.config import load_config
from winnow.pipeline.lake import Lake
from winnow.pipeline.policy import load_policy
from winnow.pipeline.refilter import refilter
from winnow.pipeline.run import run

VIDEOS = Path(__file__).parents[3] / "shared" / "videos"


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not VIDEOS.is_dir(), reason=f"no real videos at {VIDEOS}")
def test_refilter_gives_the_verdicts_of_the_run(tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    result = run(load_config("cpu"), str(VIDEOS), lake)
    before = facts(lake)["verdicts"]
    assert result.ledger.verdicts["keep"] > 20
    assert refilter(lake, load_policy("generated")).changed == 0
    assert facts(lake)["verdicts"] == before
    deciders = rows(lake, "SELECT DISTINCT decided_by LIKE 'refilter%' FROM verdicts")
    assert deciders == [(True,)]
