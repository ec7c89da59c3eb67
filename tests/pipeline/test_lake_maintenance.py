"""Compaction changes nothing that is seen; a vacuum removes what is left over and nothing else."""

import json
import os
import shutil
import uuid
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.pipeline.lakes import config, facts, rows
from winnow.operators.errors import LakeBusy, LakeError
from winnow.pipeline.lake import Lake
from winnow.pipeline.lake_check import check_lake
from winnow.pipeline.lake_commands import lake_app
from winnow.pipeline.lake_maintenance import compact, vacuum
from winnow.pipeline.policy import load_policy
from winnow.pipeline.refilter import refilter
from winnow.pipeline.run import run
from winnow.pipeline.run_lock import hold_lake
from winnow.pipeline.storage import Storage


def leave_rows(lake: Lake) -> None:
    """What a run leaves that is killed before it commits."""
    lake.append("embeddings", [{"clip_id": "dead", "attempt_id": "it's dead", "vector": [1.0]}])
    lake.append("verdicts", [{"clip_id": "dead", "attempt_id": "it's dead", "policy": "generated",
                              "verdict": "keep", "seq": 2**62}])  # fmt: skip
    lake.append("dataset", [{"clip_id": "dead", "attempt_id": "it's dead", "policy": "generated",
                             "media_uri": f"{lake.media_uri}/de/dead-crf18.mp4",
                             "content_type": "unknown", "resolution": "720p",
                             "aspect_ratio": "16:9", "length": "2-5s"}])  # fmt: skip


def test_compaction_changes_nothing_that_is_seen(videos, tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    run(config("commit.sources=2"), str(videos), lake)
    before = facts(lake)
    files = {table.table: (table.files_before, table.files_after) for table in compact(lake)}
    assert files["sources"] == (5, 1)
    assert facts(lake) == before
    assert check_lake(lake).sound
    assert refilter(lake, load_policy("generated")).changed == 0
    assert run(config(), str(videos), lake).ledger.sources_in == 0
    # The lake of before is still there for who asks for an old version.
    assert any(vacuum(lake, keep_hours=0).table_files.values())


def test_a_vacuum_lists_first_and_removes_with_yes(own_lake):
    before = facts(own_lake)
    leave_rows(own_lake)
    dead = Path(own_lake.uri, "media/de/dead-crf18.mp4")
    draft = dead.with_name(f".{uuid.uuid4().hex}.part")
    dead.parent.mkdir(exist_ok=True)
    dead.write_bytes(b"x" * 1000)
    draft.write_bytes(b"x" * 10)
    listed = vacuum(own_lake, keep_hours=0)
    assert {rows.table: rows.rows for rows in listed.rows} == {
        "embeddings": 1, "verdicts": 1, "dataset": 1
    }  # fmt: skip
    assert {(file.place, file.bytes) for file in listed.media} == {
        ("de/dead-crf18.mp4", 1000), (f"de/{draft.name}", 10)
    }  # fmt: skip
    assert not listed.removed
    assert dead.exists()
    assert check_lake(own_lake).uncommitted
    assert vacuum(own_lake, keep_hours=0, yes=True).removed
    assert not dead.exists()
    assert not draft.exists()
    assert facts(own_lake) == before
    result = check_lake(own_lake)
    assert (result.sound, result.uncommitted) == (True, {})
    again = vacuum(own_lake, keep_hours=0)
    assert (again.rows, again.media) == ([], [])
    # What a run needs of the tables is still there.
    assert refilter(own_lake, load_policy("generated")).changed == 0


def test_what_is_young_stays(own_lake):
    leave_rows(own_lake)
    media = Path(own_lake.uri, "media/de")
    media.mkdir(exist_ok=True)
    for name, hours in (("young", 1), ("old", 3)):
        (media / f"{name}.mp4").write_bytes(b"x")
        then = (media / f"{name}.mp4").stat().st_mtime - 3600 * hours
        os.utime(media / f"{name}.mp4", (then, then))
    found = vacuum(own_lake, keep_hours=2)
    assert (found.rows, [file.place for file in found.media]) == ([], ["de/old.mp4"])


def test_media_of_a_lake_that_was_moved_are_not_left_over(own_lake):
    # The copy's rows name the files of the lake that it was copied from.
    assert one_media(own_lake).parent.parent.parent != Path(own_lake.uri)
    assert vacuum(own_lake, keep_hours=0).media == []


def one_media(lake: Lake) -> Path:
    return Path(rows(lake, "SELECT media_uri FROM dataset")[0][0])


def test_media_that_a_policy_rejects_now_stay_for_the_next(own_lake):
    from winnow.pipeline.policy import Policy, Rule

    nothing = Policy(name="generated", rules=(Rule(name="all", reject="duration_s >= 0"),))
    refilter(own_lake, nothing)
    assert rows(own_lake, "SELECT * FROM dataset") == []
    assert vacuum(own_lake, keep_hours=0).media == []


def test_old_files_go_and_with_them_old_versions(videos, tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    run(config("commit.sources=2"), str(videos), lake)
    compact(lake)
    before = facts(lake)
    found = vacuum(lake, keep_hours=0, yes=True)
    assert len(found.table_files["sources"]) == 5
    assert found.bytes > 1000
    assert facts(lake) == before
    assert len(list(Path(lake.uri, "sources").glob("*.parquet"))) == 1


def test_a_vacuum_waits_for_nobody_unless_asked(own_lake):
    with hold_lake(own_lake, "a run"), pytest.raises(LakeBusy, match="a run"):
        vacuum(own_lake, yes=True)
    assert not vacuum(own_lake, yes=True).rows


def test_in_a_bucket(own_lake, s3):
    lake = Lake(f"s3://bucket/{uuid.uuid4().hex}", s3)
    place = Storage.open(lake.uri, options=s3, create=True)
    for path in sorted(Path(own_lake.uri).rglob("*")):
        if path.is_file() and "index" not in path.parts:
            place.put(path, path.relative_to(own_lake.uri).as_posix())
    before = facts(lake)
    leave_rows(lake)
    (extra,) = [Path(own_lake.uri, "extra")]
    extra.write_bytes(b"x" * 1000)
    place.put(extra, "media/de/dead-crf18.mp4")
    compact(lake)
    listed = vacuum(lake, keep_hours=0)
    assert [(file.place, file.bytes) for file in listed.media] == [("de/dead-crf18.mp4", 1000)]
    assert all(file.bytes for files in listed.table_files.values() for file in files)
    vacuum(lake, keep_hours=0, yes=True)
    assert not place.exists("media/de/dead-crf18.mp4")
    assert facts(lake) == before
    assert check_lake(lake).sound


def test_the_command_says_what_and_how_much(own_lake):
    runner = CliRunner()
    leave_rows(own_lake)
    arguments = ["vacuum", "--lake", own_lake.uri, "--keep-hours", "0"]
    said = runner.invoke(lake_app, arguments).stdout
    assert "verdicts: 1 rows of 1 attempts" in said
    assert "nothing was removed" in said
    told = json.loads(runner.invoke(lake_app, [*arguments, "--yes", "--json"]).stdout)
    assert told["removed"] is True
    assert {rows["table"] for rows in told["uncommitted"]} == {"embeddings", "verdicts", "dataset"}
    said = runner.invoke(lake_app, ["compact", "--lake", own_lake.uri]).stdout
    assert "compact" in said or "became" in said


def test_an_older_lake_is_brought_up_by_the_next_run(videos, tmp_path):
    from deltalake import write_deltalake

    folder, lake = tmp_path / "in", Lake(str(tmp_path / "lake"))
    folder.mkdir()
    shutil.copy2(videos / "apple, red.mp4", folder / "a.mp4")
    run(config(), str(folder), lake)
    for name in ("backfills", "measurements", "captions"):
        shutil.rmtree(Path(lake.uri, name), ignore_errors=True)
    old = lake.open("sources").to_pyarrow_table().drop_columns(["copy_of", "sidecar_problem"])
    write_deltalake(lake.table_uri("sources"), old, mode="overwrite", schema_mode="overwrite")
    old = lake.open("clips").to_pyarrow_table().drop_columns(["failure"])
    write_deltalake(lake.table_uri("clips"), old, mode="overwrite", schema_mode="overwrite")
    notes = {example for note in check_lake(lake).notes for example in note.examples}
    assert {"captions", "sources.copy_of", "clips.failure"} <= notes
    before = rows(lake, "SELECT clip_id, verdict FROM clips_decided")
    shutil.copy2(videos / "bear's_den.mp4", folder / "b.mp4")
    assert run(config(), str(folder), Lake(lake.uri)).ledger.sources == {"done": 1}
    result = check_lake(lake)
    assert (result.sound, result.notes) == (True, [])
    assert set(before) < set(rows(lake, "SELECT clip_id, verdict FROM clips_decided"))
    assert refilter(lake, load_policy("generated")).changed == 0


def test_a_time_before_all_is_refused(own_lake):
    with pytest.raises(LakeError, match="hours"):
        vacuum(own_lake, keep_hours=-1)
