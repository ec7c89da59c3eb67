import runpy
import sys
from pathlib import Path

from tests.conftest import scene, write_video

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def test_one_operator_runs_on_its_own(tmp_path, monkeypatch, capsys):
    video = write_video(tmp_path / "v.mp4", scene(1, 30))
    monkeypatch.setattr(sys, "argv", ["one_operator.py", str(video)])
    runpy.run_path(str(NOTEBOOKS / "one_operator.py"))
    assert "motion_mean" in capsys.readouterr().out
