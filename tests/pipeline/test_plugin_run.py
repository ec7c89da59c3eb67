"""A plug-in operator through a whole run: `winnow run`, the policy, `winnow refilter`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import scene, write_video
from tests.operators.test_plugins import PLUGIN, install, winnow
from tests.pipeline.lakes import rows
from winnow.pipeline.lake import Lake

CONFIG = """
name: plugin
policy: {policy}
isolate: {isolate}
stages:
- stage: ingest
- {{stage: split, detector: {{kind: none}}}}
- stage: filter
  label: quality
  operators: {{standin: {{}}}}
"""
POLICY = """
name: ranked
rules:
- {name: too_short, reject: duration_s < 0.5, reason: shorter than half a second}
- name: poor_quality
  percentile: {column: standin_overall, below: 40, least: 3}
  reason: among the worst of the lake
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory) -> Path:
    return install(PLUGIN, tmp_path_factory.mktemp("plugins") / "standin")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(4):
        write_video(folder / f"{seed}.mp4", scene(seed, 30))
    write_video(folder / "short.mp4", scene(9, 6))
    return folder


def run_plugin(plugins: Path, folder: Path, at: Path, *, isolate: bool = False) -> Lake:
    at.mkdir(exist_ok=True)
    (at / "policy.yaml").write_text(POLICY)
    (at / "run.yaml").write_text(
        CONFIG.format(policy=at / "policy.yaml", isolate=str(isolate).lower())
    )
    done = winnow("run", "--config", str(at / "run.yaml"), "--input", str(folder),
                  "--lake", str(at / "lake"), "--json", plugins=plugins)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["balanced"]
    return Lake(str(at / "lake"))


SCORES = """SELECT parse_filename(uri), standin_technical, standin_aesthetic, standin_overall,
    standin_error FROM clips_decided ORDER BY 1"""


def test_a_run_measures_by_the_plugin_and_refilter_ranks_by_it(plugins, folder, tmp_path):
    lake = run_plugin(plugins, folder, tmp_path / "one")
    scores = rows(lake, SCORES)
    assert [row[0] for row in scores] == ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "short.mp4"]
    assert all(0 < value < 1 for row in scores[:4] for value in row[1:4])
    assert all(row[4] is None for row in scores)
    assert scores[4][1:4] == (None, None, None)  # rejected before the stage: never shown to it
    command = ("refilter", "--lake", lake.uri, "--policy", str(tmp_path / "one" / "policy.yaml"))
    ranked = winnow(*command, "--json", plugins=plugins)
    assert ranked.returncode == 0, ranked.stderr
    # Percentile 40 of four scores lies between the second and the third: two are below it.
    assert json.loads(ranked.stdout)["verdicts"] == {"keep": 2, "reject": 3}
    poor = rows(lake, "SELECT parse_filename(uri) FROM clips_decided "
                      "WHERE reasons = ['poor_quality'] ORDER BY 1")  # fmt: skip
    by_score = sorted(scores[:4], key=lambda row: row[3])
    assert poor == sorted((row[0],) for row in by_score[:2])
    again = json.loads(winnow(*command, "--json", plugins=plugins).stdout)
    assert again["changed"] == 0


def test_a_rerun_in_other_company_gives_the_same_scores(plugins, folder, tmp_path):
    alone = tmp_path / "clips"
    alone.mkdir()
    shutil.copy2(folder / "2.mp4", alone / "other name.mp4")
    first = {row[0]: row[1:] for row in rows(run_plugin(plugins, folder, tmp_path / "a"), SCORES)}
    ((_, *second),) = rows(run_plugin(plugins, alone, tmp_path / "b", isolate=True), SCORES)
    assert tuple(second) == first["2.mp4"]
