import runpy
import shutil
import sys
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient

from tests.conftest import scene, write_video
from tests.pipeline.lakes import config
from winnow.operators.errors import LakeError
from winnow.pipeline.lake import Lake
from winnow.pipeline.policy import Policy, Rule, load_policy
from winnow.pipeline.refilter import latest_config, refilter
from winnow.pipeline.report_rules import comparisons
from winnow.pipeline.run import run

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
EXPLORE = NOTEBOOKS / "explore_lake.py"


def test_one_operator_runs_on_its_own(tmp_path, monkeypatch, capsys):
    video = write_video(tmp_path / "v.mp4", scene(1, 30))
    monkeypatch.setattr(sys, "argv", ["one_operator.py", str(video)])
    runpy.run_path(str(NOTEBOOKS / "one_operator.py"))
    assert "motion_mean" in capsys.readouterr().out


@pytest.fixture(scope="module")
def lake(tmp_path_factory) -> Lake:
    """Kept, still, short and doubled clips, a file that is none, and names that are no plain text."""
    folder = tmp_path_factory.mktemp("videos")
    for n, name in enumerate(["a $cheap$ one", "b", "c_$x^{2", "d"]):
        write_video(folder / f"{name}.mp4", scene(n, 60))
    write_video(folder / "d again.mp4", scene(3, 60), options={"crf": "26", "g": "24"})
    write_video(folder / "short still.mp4", scene(7, 1) * 24)
    write_video(folder / "still.mp4", scene(8, 1) * 60)
    (folder / "<i>empty.mp4").write_bytes(b"")
    (folder / "d.txt").write_text("costs $5 and $6")
    lake = Lake(str(tmp_path_factory.mktemp("lakes") / "lake"))
    run(config("stages.ingest.settle_s=0"), str(folder), lake)
    return lake


def executed(lake: Lake) -> dict:
    """What the notebook's cells leave, run as a script."""
    import matplotlib as mpl

    mpl.use("agg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINNOW_LAKE", lake.uri)
        return runpy.run_path(str(EXPLORE))


@pytest.fixture(scope="module")
def seen(lake) -> dict:
    return executed(lake)


def test_the_pair_says_the_same_and_holds_no_outputs():
    script = jupytext.read(EXPLORE)
    notebook = nbformat.read(EXPLORE.with_suffix(".ipynb"), as_version=4)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in script.cells
    ], "run `jupytext --to ipynb notebooks/explore_lake.py`"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


def in_jupyter(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    """The outputs of the notebook's cells; none of them went to stderr."""
    monkeypatch.setenv("WINNOW_LAKE", lake.uri)
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    notebook = nbformat.read(EXPLORE.with_suffix(".ipynb"), as_version=4)
    folder = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=folder).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    return outputs


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_in_jupyter_and_shows_tables_and_pictures(lake, tmp_path, monkeypatch):
    outputs = in_jupyter(lake, tmp_path, monkeypatch)
    pages = "".join(o.data.get("text/html", "") for o in outputs if "data" in o)
    assert "&lt;i&gt;empty.mp4" in pages
    assert "<i>" not in pages
    assert sum("image/png" in o.data for o in outputs if "data" in o) == 7
    said = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "it balances" in said
    assert "short still.mp4" in said


def test_the_answers_are_those_of_the_lake_and_of_refilter(lake, seen):
    assert seen["verdicts"] == {"keep": 4, "reject": 2, "duplicate": 1}
    assert seen["reasons"].loc["too_short", ["clips", "alone"]].tolist() == [1, 0]
    assert seen["clip"]["reasons"] == ["too_short", "low_motion", "frozen"]
    table = seen["against_limits"](seen["clip"])
    assert table.reason["motion_mean"] == "low_motion"
    assert table.reason["exposure_mean"] == ""
    answers = seen["answers"]
    now = refilter(lake, load_policy("generated"), dry_run=True).counts
    assert answers[list(now)].iloc[0].to_dict() == now
    # Beyond the threshold of the last dot lies a quarter of what passes every other rule.
    assert answers.keep.is_monotonic_decreasing
    assert answers.reject.iloc[-1] > answers.reject.iloc[0]
    assert seen["RULE"] == "low_motion"


@pytest.mark.parametrize(
    ("name", "rules", "moves"),
    [
        ("nothing", (), None),
        ("all", (Rule(name="all", reject="duration_s > 0"),), "all"),
        ("hidden", (Rule(name="odd", reject="duration_s < 1 OR NOT border_found"),), None),
    ],
)
def test_policies_with_nothing_to_move_and_lakes_with_nothing_kept(
    lake, tmp_path, name, rules, moves
):
    shutil.copytree(lake.uri, tmp_path / "own")
    own = Lake(str(tmp_path / "own"))
    policy = Policy(name=name, rules=rules)
    refilter(own, policy)
    latest = own.open("runs").to_pyarrow_table().to_pylist()[-1]
    own.append("runs", [latest | {
        "run_id": "later", "policy": name, "policy_rules": policy.model_dump_json(),
        "started_at": latest["finished_at"],
    }])  # fmt: skip
    seen = executed(own)
    assert seen["RULE"] == moves
    kept = refilter(own, policy, dry_run=True, config=latest_config(own)).counts.get("keep", 0)
    assert seen["verdicts"].get("keep", 0) == kept


@pytest.mark.parametrize(
    ("sign", "passing"),
    [("<", [4, 3, 1]), ("<=", [3, 1, 1]), (">", [1, 3, 3]), (">=", [0, 1, 3])],
)
def test_the_curve_counts_a_score_at_the_limit_as_the_predicate_does(seen, sign, passing):
    (seen["movable"]["moved"],) = comparisons(f"score {sign} 0")
    scores, limits = pd.Series([3.0, 2.0, 1.0, 2.0]), np.array([1.0, 2.0, 2.5])
    share = seen["passing_share"](scores, "moved", limits)
    assert np.rint(share * seen["clips"]).tolist() == passing


def test_without_a_lake_it_says_how_to_make_one(tmp_path):
    with pytest.raises(LakeError, match="winnow run"):
        executed(Lake(str(tmp_path / "none")))
