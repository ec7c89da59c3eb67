"""Whoever writes to a lake holds it; readers see the lake as it was when they began, or are told."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.pipeline.lakes import config, rows
from tests.pipeline.test_export import contents, make_lake
from winnow.operators.errors import LakeBusy, LakeError
from winnow.pipeline.backfill import backfill
from winnow.pipeline.cli import app
from winnow.pipeline.export import ExportSettings, export
from winnow.pipeline.index_check import rebuild_indexes
from winnow.pipeline.lake import Lake
from winnow.pipeline.lake_check import check_lake
from winnow.pipeline.lake_maintenance import compact, vacuum
from winnow.pipeline.policy import Policy, Rule, load_policy
from winnow.pipeline.refilter import refilter
from winnow.pipeline.run import run
from winnow.pipeline.run_lock import hold_lake

ALL = Policy(name="all", rules=(Rule(name="none", reject="false"),))
WRITERS = {
    "refilter": lambda lake: refilter(lake, ALL),
    "measure": lambda lake: backfill(lake, ["exposure"]),
    "compact": compact,
    "vacuum": lambda lake: vacuum(lake, yes=True),
    "index rebuild": rebuild_indexes,
    "run": lambda lake: run(config(), str(Path(lake.uri).parent), lake),
}


@pytest.mark.parametrize("name", WRITERS)
def test_who_writes_is_refused_while_another_does_and_changes_nothing(own_lake, name):
    before = contents(Path(own_lake.uri))
    with hold_lake(own_lake, "another"), pytest.raises(LakeBusy, match="another"):
        WRITERS[name](own_lake)
    assert contents(Path(own_lake.uri)).keys() - before.keys() == {"run.lock"} - before.keys()
    with hold_lake(own_lake, "the lake is free again"):
        pass


@pytest.mark.parametrize("words", [
    ("refilter", "--policy", "generated"), ("measure", "--operators", "exposure"),
    ("lake", "compact"), ("lake", "vacuum", "--yes"), ("index", "rebuild"),
])  # fmt: skip
def test_every_command_that_writes_can_wait(own_lake, words, monkeypatch):
    import threading

    from winnow.pipeline import run_lock

    monkeypatch.setattr(run_lock, "ASK_S", 0.05)
    held, free = threading.Event(), threading.Event()

    def another() -> None:
        with hold_lake(own_lake, "another"):
            held.set()
            free.wait(60)

    thread = threading.Thread(target=another)
    thread.start()
    held.wait(60)
    threading.Timer(0.5, free.set).start()
    answer = CliRunner().invoke(app, [*words, "--lake", own_lake.uri, "--wait"])
    thread.join()
    assert answer.exit_code == 0, (answer.output, answer.exception)
    assert "waiting for 'another'" in answer.stderr
    assert check_lake(own_lake).sound


def test_what_only_reads_needs_no_lock(own_lake, tmp_path):
    with hold_lake(own_lake, "another"):
        assert refilter(own_lake, ALL, dry_run=True).clips == 6
        assert check_lake(own_lake).sound
        assert not vacuum(own_lake).removed
        assert export(own_lake, str(tmp_path / "out"), ExportSettings()).complete


def test_a_run_that_decides_by_population_refilters_under_its_own_lock(videos, tmp_path):
    lake, policy = Lake(str(tmp_path / "lake")), tmp_path / "lowest.yaml"
    policy.write_text(
        "name: lowest\nrules: [{name: dull, percentile: {column: motion_mean, below: 30}}]\n"
    )
    load_policy(str(policy))
    result = run(config(f"policy={policy}"), str(videos), lake)
    assert result.ledger.balanced
    decided = rows(lake, "SELECT DISTINCT starts_with(decided_by, 'refilter-') FROM verdicts")
    assert decided == [(True,)]


SHARDS = ExportSettings(by=(), max_shard_bytes=8_000)


def meanwhile(lake: Lake, out: Path, write) -> None:
    """Export, with something else in the middle."""
    written = []

    def report(done: int, total: int) -> None:
        if 0 < done < total and not written:
            written.append(write(lake))

    export(lake, str(out), SHARDS, report)
    assert written


def late(lake: Lake) -> None:
    """A decision that rejects a clip, and other files below it all."""
    (clip_id,) = rows(lake, "SELECT max(clip_id) FROM dataset")[0]
    lake.append("verdicts", [{"clip_id": clip_id, "attempt_id": "a", "policy": "p", "seq": 10**9,
                              "verdict": "reject", "reasons": ["late"]}])  # fmt: skip
    compact(lake)


def test_an_export_sees_the_lake_as_it_began_whatever_is_written_meanwhile(tmp_path):
    lake = make_lake(str(tmp_path / "lake"), tmp_path)
    export(lake, str(tmp_path / "alone"), SHARDS)
    meanwhile(lake, tmp_path / "out", late)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_an_export_whose_files_are_vacuumed_says_so_and_can_be_begun_anew(tmp_path):
    lake = make_lake(str(tmp_path / "lake"), tmp_path)

    def remove(lake: Lake) -> None:
        late(lake)
        vacuum(lake, keep_hours=0, yes=True)

    with pytest.raises(LakeError, match="vacuumed"):
        meanwhile(lake, tmp_path / "out", remove)
    assert not (tmp_path / "out" / "index.json").exists()
    with pytest.raises(LakeError, match="vacuumed"):
        export(lake, str(tmp_path / "out"), SHARDS)
    assert export(lake, str(tmp_path / "anew"), SHARDS).clips == 8


def test_a_vacuum_of_what_is_old_leaves_an_export_alone(tmp_path):
    lake = make_lake(str(tmp_path / "lake"), tmp_path)
    export(lake, str(tmp_path / "alone"), SHARDS)

    def tidy(lake: Lake) -> None:
        late(lake)
        vacuum(lake, yes=True)

    meanwhile(lake, tmp_path / "out", tidy)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["clips"] == 9
