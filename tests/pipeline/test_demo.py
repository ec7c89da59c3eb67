"""The demo is the main job on videos of which everything is known."""

import json

import pytest

from tests.pipeline.test_cli import winnow


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_everything_planted_is_found(tmp_path):
    output, _ = winnow("demo", "--out", tmp_path / "demo", "--json")
    content = json.loads(output)
    wrong = [s for s in content["samples"] if not s["agrees"]]
    assert not wrong
    assert len(content["samples"]) >= 38
    assert (tmp_path / "demo" / "report.html").stat().st_size > 50_000
