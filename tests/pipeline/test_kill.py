"""Kill -9 at different moments; a second run must leave what an uninterrupted one leaves."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import scene, write_video
from tests.pipeline.lakes import facts, rows
from winnow.pipeline.lake import Lake

WINNOW = Path(sys.executable).parent / "winnow"
ARGUMENTS = ["--set", "stages.split.detector.kind=none", "--set", "commit.sources=2",
             "--set", "stages.cheap.workers={max: 1}"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for n in range(8):
        write_video(folder / f"{n}.mp4", scene(20 + n, 50))
    write_video(folder / "5b.mp4", [i[::2, ::2] for i in scene(22, 50)])
    shutil.copy2(folder / "1.mp4", folder / "6b.mp4")
    (folder / "7b.mp4").write_bytes(b"nothing of a video")
    os.utime(folder / "7b.mp4", (1.7e9, 1.7e9))
    return folder


def start(folder: Path, lake: Path) -> subprocess.Popen[bytes]:
    command = [WINNOW, "run", "--input", folder, "--lake", lake, *ARGUMENTS]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(folder: Path, lake: Path) -> bytes:
    process = start(folder, lake)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors.decode()
    return errors


def children_of(pid: int) -> set[int]:
    task = Path(f"/proc/{pid}/task/{pid}/children")
    return {int(child) for child in task.read_text().split()} if task.exists() else set()


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_next(folder, tmp_path):
    whole = tmp_path / "whole"
    finish(folder, whole)
    expected = facts(Lake(str(whole)))
    assert len(expected["sources"]) == 11

    # Moments by what the lake holds: before anything, in the middle, with tables half written.
    def any_parquet(lake, table):
        return len(list((lake / table).glob("**/*.parquet")))

    moments = [
        lambda lake: (lake / "media").exists(),
        lambda lake: (lake / "sources" / "_delta_log").exists(),
        lambda lake: any_parquet(lake, "clips") >= 1,
        lambda lake: any_parquet(lake, "verdicts") > any_parquet(lake, "sources") >= 1,
        lambda lake: any_parquet(lake, "sources") >= 3,
    ]
    for number, moment in enumerate(moments):
        lake = tmp_path / f"killed{number}"
        process = start(folder, lake)
        deadline = time.monotonic() + 120
        while not moment(lake) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        children = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        # Killed between making the folder and the table's first commit, there is no lake yet.
        left = Lake(str(lake))
        committed = len(rows(left, "SELECT * FROM sources")) if left.exists() else 0
        assert committed < 11
        finish(folder, lake)
        found = facts(Lake(str(lake)))
        for table, wanted in expected.items():
            assert found[table] == wanted, f"{table} after a kill at moment {number}"
        gone = time.monotonic() + 20
        while any(Path(f"/proc/{c}").exists() for c in children) and time.monotonic() < gone:
            time.sleep(0.1)
        assert not any(Path(f"/proc/{c}").exists() for c in children), "orphaned workers"
        duplicated = rows(
            Lake(str(lake)), "SELECT clip_id FROM clips GROUP BY 1 HAVING count(*) > 1"
        )
        assert not duplicated


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(folder, tmp_path):
    lake = tmp_path / "lake"
    process = start(folder, lake)
    while not (lake / "sources" / "_delta_log").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"run the same command again" in errors
    assert b"Traceback" not in errors
    finish(folder, lake)
    assert len(rows(Lake(str(lake)), "SELECT * FROM sources")) == 11
