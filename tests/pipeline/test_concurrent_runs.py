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


def in_the_middle(process: subprocess.Popen[bytes], lake: Lake) -> None:
    """Wait until a run holds the lake and writes."""
    while not Path(lake.uri, "sources", "_delta_log").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def told_to_wait(process: subprocess.Popen[bytes]) -> str:
    """Wait until a process says that it waits; returns what it said."""
    assert process.stderr is not None
    for line in process.stderr:
        if b"waiting for" in line:
            return line.decode()
    raise AssertionError("it never waited")


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


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_second_goes_on_from_what_the_first_has_left(inputs, tmp_path, order):
    lake, turns = Lake(str(tmp_path / "lake")), Lake(str(tmp_path / "turns"))
    first = start(inputs / order[0], lake)
    in_the_middle(first, lake)
    first.send_signal(signal.SIGSTOP)  # so that it is not over before the other has begun
    second = start(inputs / order[1], lake, "--wait")
    assert f"--input {inputs / order[0]}" in told_to_wait(second)
    first.send_signal(signal.SIGCONT)
    assert [ended(process)[0] for process in (first, second)] == [0, 0]
    sound(lake)
    for name in order:
        assert ended(start(inputs / name, turns))[0] == 0
    assert facts(lake) == facts(turns)


def test_two_at_once_over_contents_that_have_nothing_in_common(inputs, tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    for n in range(2):
        write_video(tmp_path / "c" / f"{n}.mp4", scene(20 + n, 60))
    both = [start(folder, lake, "--wait") for folder in (inputs / "a", tmp_path / "c")]
    assert [ended(process)[0] for process in both] == [0, 0]
    sound(lake)
    assert rows(lake, "SELECT status, count(*) FROM raw_sources GROUP BY 1") == [("done", 6)]
    assert rows(lake, "SELECT verdict, count(*) FROM raw_verdicts GROUP BY 1") == [("keep", 6)]
    assert rows(lake, "SELECT count(*), count(DISTINCT run_id) FROM runs") == [(2, 2)]


def test_one_is_killed_while_another_waits(inputs, tmp_path):
    lake, alone = Lake(str(tmp_path / "lake")), Lake(str(tmp_path / "alone"))
    first = start(inputs / "a", lake)
    in_the_middle(first, lake)
    first.send_signal(signal.SIGSTOP)
    second = start(inputs / "a", lake, "--wait")
    told_to_wait(second)
    first.send_signal(signal.SIGKILL)
    ended(first)
    code, errors = ended(second)
    assert code == 0, errors
    # The second has finished what the first began: nothing is left to do, nothing is there twice.
    assert check_lake(lake).sound
    assert ended(start(inputs / "a", alone))[0] == 0
    assert facts(lake) == facts(alone)
    assert len(rows(lake, "SELECT * FROM raw_sources")) == 4


def command(*words: object) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "winnow.pipeline.cli", *map(str, words)]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_a_refilter_meets_a_run(inputs, tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    assert ended(start(inputs / "b", lake))[0] == 0
    before = len(rows(lake, "SELECT * FROM raw_verdicts"))
    run = start(inputs / "a", lake)
    # The lock tells its latest holder: that is the run, once it has started.
    while str(inputs / "a") not in Path(lake.uri, run_lock.LOCK_NAME).read_text():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.01)
    run.send_signal(signal.SIGSTOP)
    words = ("refilter", "--lake", lake.uri, "--policy", "tests/pipeline/keep_all.yaml")
    waiting = command(*words, "--wait")
    code, errors = ended(command(*words))
    assert code == 1
    assert f"winnow run --input {inputs / 'a'}" in errors
    assert "--wait" in errors
    assert "Traceback" not in errors
    told_to_wait(waiting)
    run.send_signal(signal.SIGCONT)
    assert [ended(process)[0] for process in (run, waiting)] == [0, 0]
    sound(lake)
    # It has waited for the run's clips, and each got its verdict once.
    decided = rows(lake, "SELECT count(*), count(DISTINCT clip_id) FROM raw_verdicts "
                         "WHERE policy = 'keep_all'")  # fmt: skip
    clips = len(rows(lake, "SELECT * FROM clips"))
    assert decided == [(clips, clips)]
    assert before < clips


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
    in_the_middle(process, lake)
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
