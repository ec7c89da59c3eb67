"""Whole runs over a few small videos, in this process for speed; the engines have tests of their own."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import scene, write_video
from tests.pipeline.lakes import config, facts, rows
from winnow.operators.errors import LakeError
from winnow.pipeline.lake import TABLES, Lake
from winnow.pipeline.policy import Policy, Rule, load_policy
from winnow.pipeline.refilter import refilter
from winnow.pipeline.run import run
from winnow.pipeline.views import connect


def test_every_file_has_a_status_and_every_clip_a_verdict(videos, lake):
    found = {
        Path(uri).name: (status, kind)
        for uri, status, kind in rows(lake, "SELECT uri, status, error_kind FROM sources")
    }
    assert found == {
        "apple, red.mp4": ("done", None), "bear's_den.mp4": ("done", None),
        "ünï #1 100%.mp4": ("done", None), "short.mp4": ("done", None), "still.mp4": ("done", None),
        "bear small.mp4": ("done", None), "copied.mp4": ("copy", None),
        "noise.mp4": ("failed", "not_video"), "empty.mp4": ("failed", "empty"),
    }  # fmt: skip
    verdicts = {
        Path(uri).stem: (verdict, reasons)
        for uri, verdict, reasons in rows(lake, "SELECT uri, verdict, reasons FROM clips_decided")
    }
    assert verdicts["apple, red"] == ("keep", [])
    assert verdicts["bear's_den"] == ("keep", [])
    assert verdicts["ünï #1 100%"] == ("keep", [])
    assert verdicts["short"] == ("reject", ["too_short"])
    assert verdicts["still"][0] == "reject"
    assert verdicts["bear small"] == ("duplicate", ["duplicate"])


def test_kept_clips_are_in_the_dataset_with_media_that_decodes(lake):
    kept = rows(lake, "SELECT media_uri, frames, prompt, length FROM dataset ORDER BY media_uri")
    assert len(kept) == 3
    import decord

    for uri, frames, _, length in kept:
        # The decoder that training loaders use must be able to open what is kept.
        assert len(decord.VideoReader(uri)) == frames == 60
        assert length == "2-5s"
    assert [p for _, _, p, _ in kept if p] == ["an apple falls"]


def test_a_second_run_does_no_work(videos, lake):
    before = facts(lake)
    versions = {table: lake.open(table).version() for table in TABLES}
    again = run(config(), str(videos), lake)
    assert (again.ledger.sources_in, again.skipped) == (0, 9)
    assert versions == {table: lake.open(table).version() for table in TABLES}
    assert facts(lake) == before


def test_refilter_with_the_same_policy_changes_nothing(own_lake):
    before = facts(own_lake)["verdicts"]
    result = refilter(own_lake, load_policy("generated"))
    assert result.changed == 0
    assert facts(own_lake)["verdicts"] == before


def test_refilter_with_another_policy_stands_beside_the_first(own_lake):
    strict = Policy(name="strict", rules=(Rule(name="long", reject="duration_s > 1"),))
    result = refilter(own_lake, strict)
    assert result.counts == {"reject": 5, "keep": 1}
    policies = rows(own_lake, "SELECT policy, count(*) FROM verdicts GROUP BY 1 ORDER BY 1")
    assert policies == [("generated", 6), ("strict", 6)]
    assert len(rows(own_lake, "SELECT * FROM dataset")) == 3


def test_files_that_come_later_are_taken_up_and_compared(videos, tmp_path):
    folder, lake = tmp_path / "in", Lake(str(tmp_path / "lake"))
    folder.mkdir()
    shutil.copy2(videos / "z" / "bear small.mp4", folder / "a.mp4")
    run(config(), str(folder), lake)
    shutil.copy2(videos / "bear's_den.mp4", folder / "b.mp4")
    shutil.copy2(videos / "z" / "bear small.mp4", folder / "c.mp4")
    result = run(config(), str(folder), lake)
    assert result.ledger.sources == {"done": 1, "copy": 1}
    # The larger one replaces the small one that an earlier run kept.
    verdicts = dict(rows(lake, "SELECT parse_filename(uri), verdict FROM clips_decided"))
    assert verdicts == {"a.mp4": "duplicate", "b.mp4": "keep"}
    assert len(rows(lake, "SELECT * FROM dataset")) == 1


def test_a_file_that_is_overwritten_is_a_new_source(videos, tmp_path):
    folder, lake = tmp_path / "in", Lake(str(tmp_path / "lake"))
    folder.mkdir()
    shutil.copy2(videos / "bear's_den.mp4", folder / "a.mp4")
    run(config(), str(folder), lake)
    shutil.copy(videos / "apple, red.mp4", folder / "a.mp4")
    assert run(config(), str(folder), lake).ledger.sources == {"done": 1}
    assert len(rows(lake, "SELECT * FROM sources")) == 2
    assert len(rows(lake, "SELECT * FROM dataset")) == 2


def test_a_file_still_being_written_is_taken_up_when_it_is_whole(videos, tmp_path):
    folder, lake = tmp_path / "in", Lake(str(tmp_path / "lake"))
    folder.mkdir()
    whole = (videos / "bear's_den.mp4").read_bytes()
    (folder / "a.mp4").write_bytes(whole[: len(whole) // 2])
    assert run(config(), str(folder), lake).ledger.sources == {"incomplete": 1}
    (folder / "a.mp4").write_bytes(whole)
    assert run(config(), str(folder), lake).ledger.sources == {"done": 1}
    assert [s for (s,) in rows(lake, "SELECT status FROM sources")] == ["done"]
    assert run(config(), str(folder), lake).ledger.sources_in == 0


def test_a_failed_file_is_tried_again_only_when_asked(videos, tmp_path):
    folder, lake = tmp_path / "in", Lake(str(tmp_path / "lake"))
    folder.mkdir()
    shutil.copy2(videos / "noise.mp4", folder / "a.mp4")
    assert run(config(), str(folder), lake).ledger.sources == {"failed": 1}
    assert run(config(), str(folder), lake).ledger.sources_in == 0
    assert run(config(), str(folder), lake, retry_failed=True).ledger.sources == {"failed": 1}
    assert len(rows(lake, "SELECT * FROM sources")) == 1


def test_limit_takes_some_now_and_the_rest_later(videos, tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    assert run(config(), str(videos), lake, limit=4).ledger.sources_in == 4
    assert run(config(), str(videos), lake).ledger.sources_in == 5


def test_a_measure_that_fails_is_an_error_and_not_a_low_score(videos, tmp_path):
    # A clip of one frame has no motion; without the rule on length only that is left to say.
    policy = tmp_path / "p.yaml"
    policy.write_text("name: p\nrules: [{name: low_motion, reject: motion_mean < 0.0001}]\n")
    folder, lake = tmp_path / "in", Lake(str(tmp_path / "lake"))
    write_video(folder / "one.mp4", scene(1, 1))
    result = run(config(f"policy={policy}"), str(folder), lake)
    assert result.ledger.verdicts == {"error": 1}
    ((reasons, motion, why),) = rows(
        lake, "SELECT reasons, motion_mean, motion_error FROM clips_decided"
    )
    assert (reasons, motion) == (["low_motion"], None)
    assert "frame" in why


def test_rows_of_an_attempt_that_never_committed_are_invisible(videos, tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    run(config(), str(videos), lake, limit=2)
    before = facts(lake)
    clip = rows(lake, "SELECT * FROM raw_clips LIMIT 1")
    names = [c for (c,) in rows(lake, "SELECT column_name FROM (DESCRIBE raw_clips)")]
    orphan = dict(zip(names, clip[0], strict=True)) | {"attempt_id": "dead", "clip_id": "dead"}
    orphan["operator_versions"] = []
    lake.append("clips", [orphan])
    lake.append("verdicts", [{"clip_id": "dead", "attempt_id": "dead", "policy": "generated",
                              "verdict": "keep", "reasons": [], "seq": 2**62}])  # fmt: skip
    assert facts(lake) == before


def test_the_runs_table_tells_how_the_rows_came_about(lake):
    ((engine, counts, settings, versions, stages),) = rows(
        lake, "SELECT engine, counts, config, versions, stages FROM runs"
    )
    assert engine == "inline"
    assert json.loads(counts)["sources"] == {"done": 6, "copy": 1, "failed": 2}
    assert json.loads(settings)["name"] == "cpu"
    assert "motion" in json.loads(versions)["operators"]
    assert {"ingest", "split", "cheap", "cheap/motion"} <= {s["stage"] for s in json.loads(stages)}


def test_a_column_of_another_type_is_refused(lake):
    import pyarrow as pa

    from winnow.operators.operator import Column

    with pytest.raises(LakeError, match="motion_mean"):
        lake.create([Column("motion_mean", pa.string(), "")])


def test_there_is_no_lake(tmp_path):
    with pytest.raises(LakeError, match="winnow run"):
        connect(Lake(str(tmp_path / "nothing")))
