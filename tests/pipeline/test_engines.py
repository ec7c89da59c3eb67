"""The ray engine must give what the inline engine gives."""

import gc
import warnings
from pathlib import Path

import pytest

from tests.pipeline.lakes import FAST, facts, rows
from winnow.pipeline.config import load_config
from winnow.pipeline.lake import Lake
from winnow.pipeline.run import run

# Ray leaves files and sockets to the garbage collector; that is not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning",
                                        "ignore::FutureWarning",
                                        "ignore::pytest.PytestUnraisableExceptionWarning")  # fmt: skip


@pytest.mark.slow
def test_ray_leaves_the_same_lake_as_inline(videos: Path, lake: Lake, tmp_path: Path):
    config = load_config("cpu", [*FAST[1:], "engine=ray", "commit.sources=3"])
    other = Lake(str(tmp_path / "ray"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(config, str(videos), other)
        gc.collect()
    assert result.ledger.sources_in == 9
    expected, found = facts(lake), facts(other)
    for table in expected:
        assert found[table] == expected[table], table
    assert rows(other, "SELECT engine FROM runs") == [("ray",)]
