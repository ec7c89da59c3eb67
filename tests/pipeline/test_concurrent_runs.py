"""Two runs into one lake at once: one waits or is refused, and nothing is lost or doubled."""

import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import scene, write_video
from tests.pipeline.lakes import facts, rows
from winnow.operators.errors import LakeBusy
from winnow.pipeline import run_lock
from winnow.pipeline.lake import Lake
from winnow.pipeline.lake_check import check_lake
from winnow.pipeline.run_lock import hold_lake

ARGUMENTS = ["--set", "stages.split.detector.kind=none", "--set", "commit.sources=2",
             "--set", "stages.cheap.workers={max: 1}", "--set", "isolate=false"]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Two folders; b has a file of a's, a small copy of one, and one of its own; ab has them all."""
    root = tmp_path_factory.mktemp("two")
    for n in range(4):
        write_video(root / "a" / f"{n}.mp4", scene(n, 60))
    (root / "b").mkdir()
    shutil.copy2(root / "a" / "0.mp4", root / "b" / "copied.mp4")
    write_video(root / "b" / "small.mp4", [i[::2, ::2] for i in scene(1, 60)])
    write_video(root / "b" / "own.mp4", scene(6, 60))
    return root


def start(folder: Path, lake: Lake, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "winnow.pipeline.cli", "run", "--input", folder,
               "--lake", lake.uri, *ARGUMENTS, *more]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors.decode()


def sound(lake: Lake) -> None:
    result = check_lake(lake)
    assert result.sound, [str(v) for v in result.violations]
    assert result.uncommitted == {}


def test_two_at_once_over_contents_that_overlap(inputs, tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    both = [start(inputs / name, lake, "--wait") for name in ("a", "b")]
    for process in both:
        code, errors = ended(process)
        assert code == 0, errors
    sound(lake)
    found = rows(lake, "SELECT status, count(*) FROM sources GROUP BY 1 ORDER BY 1")
    assert found == [("copy", 1), ("done", 6)]
    # Whoever came first, the small copy is the duplicate and every content is there once.
    verdicts = dict(rows(lake, "SELECT parse_filename(uri), verdict FROM clips_decided"))
    assert verdicts.pop("small.mp4") == "duplicate"
    assert sorted(verdicts.values()) == ["keep"] * 5
    assert len(rows(lake, "SELECT * FROM dataset")) == 5


def test_two_at_once_over_the_same_folder(inputs, tmp_path):
    lake, alone = Lake(str(tmp_path / "lake")), Lake(str(tmp_path / "alone"))
    both = [start(inputs / "a", lake, "--wait") for _ in range(2)]
    assert [ended(process)[0] for process in both] == [0, 0]
    assert ended(start(inputs / "a", alone))[0] == 0
    sound(lake)
    assert facts(lake) == facts(alone)
    assert len(rows(lake, "SELECT * FROM raw_sources")) == 4


def test_without_wait_the_second_is_refused_and_told_by_whom(inputs, tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    with hold_lake(lake, "winnow run --input elsewhere"):
        code, errors = ended(start(inputs / "a", lake))
        assert code == 1
        assert "winnow run --input elsewhere" in errors
        assert "--wait" in errors
        assert "Traceback" not in errors
    assert ended(start(inputs / "a", lake))[0] == 0
    sound(lake)


def test_a_killed_run_holds_nothing(inputs, tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    process = start(inputs / "a", lake)
    while not Path(lake.uri, "sources", "_delta_log").exists():
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(LakeBusy), hold_lake(lake, "another"):
        pass
    process.send_signal(signal.SIGKILL)
    ended(process)
    assert ended(start(inputs / "a", lake))[0] == 0
    sound(Lake(lake.uri))


def test_one_process_cannot_hold_a_lake_twice(tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    with hold_lake(lake, "one"):
        with pytest.raises(LakeBusy, match="one"), hold_lake(lake, "two"):
            pass
        with hold_lake(Lake(str(tmp_path / "other")), "other"):
            pass
        with pytest.raises(LakeBusy, match="one"), hold_lake(lake, "three"):
            pass
    with hold_lake(lake, "four"):
        pass


@pytest.fixture
def bucket(s3) -> Lake:
    return Lake(f"s3://bucket/{uuid.uuid4().hex}", s3)


def test_a_lease_in_a_bucket_is_held_by_one(bucket):
    with hold_lake(bucket, "one") as hold:
        assert list(hold.guard([1, 2])) == [1, 2]
        with pytest.raises(LakeBusy, match="one"), hold_lake(bucket, "two"):
            pass
    with hold_lake(bucket, "three"):
        pass


def test_a_lease_is_renewed_while_its_owner_lives(bucket, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.2)
    monkeypatch.setattr(run_lock, "STALE_S", 2.0)
    with hold_lake(bucket, "one") as hold:
        time.sleep(3.5)
        with pytest.raises(LakeBusy, match="one"), hold_lake(bucket, "two"):
            pass
        hold.check()


def test_a_dead_lease_is_taken_over_and_its_owner_may_write_no_more(bucket, monkeypatch):
    monkeypatch.setattr(run_lock, "STALE_S", 1.0)
    with ExitStack() as stack:
        first = stack.enter_context(hold_lake(bucket, "one"))
        told: list[str] = []
        second = stack.enter_context(hold_lake(bucket, "two", wait=True, told=told.append))
        assert len(told) == 1
        assert "one" in told[0]
        monkeypatch.setattr(run_lock, "STALE_S", 100.0)
        first.renew()
        with pytest.raises(LakeBusy, match="two"):
            list(first.guard(iter(())))
        first.release()  # which must not end the lease of the second
        second.check()
        with pytest.raises(LakeBusy, match="two"), hold_lake(bucket, "three"):
            pass


def test_an_owner_that_cannot_renew_stops_before_the_lease_is_dead(bucket, monkeypatch):
    with hold_lake(bucket, "one") as hold:
        monkeypatch.setattr(run_lock, "STALE_S", 0.0)
        with pytest.raises(LakeBusy, match="could not renew"):
            hold.check()
