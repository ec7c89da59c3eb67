"""Plug-ins, installed for real into a folder of their own and found by a fresh `winnow`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[1] / "plugins" / "winnow_standin"
COMMAND = Path(sys.executable).parent / "winnow"


def install(source: Path, target: Path) -> Path:
    """Install a package without touching this environment; returns what goes on PYTHONPATH."""
    # Built from a copy: a build leaves folders beside the sources.
    copy = target.parent / f"{target.name}-source"
    shutil.copytree(source, copy)
    uv = shutil.which("uv", path=f"{COMMAND.parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert uv is not None, "`make setup` puts uv into .venv"
    arguments = ["--no-deps", "--no-build-isolation", "--offline", "--python", sys.executable]
    done = subprocess.run(
        [uv, "pip", "install", "-q", *arguments, "--target", target, copy],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target


def winnow(*arguments: str, plugins: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(plugins)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def standin(tmp_path_factory) -> Path:
    return install(PLUGIN, tmp_path_factory.mktemp("plugins") / "standin")


@pytest.fixture
def registered(standin: Path, tmp_path: Path):
    """Writes a package that registers an operator by an entry point; returns its folder."""

    def write(name: str, value: str, module: str = "") -> Path:
        shutil.copytree(standin / "winnow_standin", tmp_path / "winnow_standin")
        (tmp_path / "odd_plugin.py").write_text(module)
        info = tmp_path / "odd_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[winnow.operators]\n{name} = {value}\n")
        return tmp_path

    return write


def test_an_installed_plugin_is_listed_among_the_operators(standin):
    listed = winnow("operators", "--json", plugins=standin)
    assert listed.returncode == 0, listed.stderr
    operators = {operator["name"]: operator for operator in json.loads(listed.stdout)}
    assert [column["name"] for column in operators["standin"]["columns"]] == [
        "standin_technical", "standin_aesthetic", "standin_overall"
    ]  # fmt: skip
    assert operators["standin"]["settings"] == {"rate": 8.0, "rows": 3}
    assert "motion" in operators


def test_its_settings_are_checked_and_a_policy_may_rank_by_it(standin, tmp_path):
    (tmp_path / "p.yaml").write_text(
        "name: p\nrules:\n- name: poor\n  percentile: {column: standin_overall, below: 15}\n"
    )
    (tmp_path / "run.yaml").write_text(
        f"name: r\npolicy: {tmp_path / 'p.yaml'}\nstages:\n- stage: ingest\n"
        "- {stage: split, detector: {kind: none}}\n"
        "- {stage: filter, operators: {standin: {rate: 4}}}\n"
    )
    config = ("config", "validate", "--config", str(tmp_path / "run.yaml"))
    valid = winnow(*config, plugins=standin)
    assert valid.returncode == 0, valid.stderr
    wrong = winnow(*config, "--set", "stages.filter.operators.standin.rat=4", plugins=standin)
    assert wrong.returncode == 2
    assert "standin" in wrong.stderr
    assert "'rat'" in wrong.stderr
    missing = winnow(*config, plugins=tmp_path / "nothing")
    assert missing.returncode == 2
    assert "unknown operator 'standin'" in missing.stderr


@pytest.mark.parametrize(
    ("name", "value", "module", "words"),
    [
        ("quality", "winnow_standin.quality:StandIn", "", ["'quality'", "'standin'", "call"]),
        ("motion", "odd_plugin:Motion", "from winnow.operators.motion import Motion", ["already"]),
        ("standin", "winnow_standin.quality:Missing", "", ["cannot be loaded", "Missing"]),
        ("standin", "odd_plugin:StandIn", "import nosuchmodule", ["cannot be", "nosuchmodule"]),
        ("standin", "odd_plugin:thing", "thing = 3", ["3 is not an Operator"]),
    ],
)
def test_a_plugin_that_is_wrong_is_named_with_the_remedy(registered, name, value, module, words):
    failed = winnow("operators", plugins=registered(name, value, module))
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    for word in (*words, "odd-plugin"):
        assert word in failed.stderr
