"""Measuring later: new operators, newer versions, kills, sources that are gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pytest
import typer
from typer.testing import CliRunner

from tests.conftest import scene, write_video
from tests.pipeline.lakes import rows
from tests.tiny_clip import tiny_models_file
from winnow.operators.errors import ConfigError, LakeError, LedgerError
from winnow.operators.exposure import Exposure
from winnow.operators.operator import Column
from winnow.operators.registry import all_operators
from winnow.pipeline.backfill import backfill, latest_settings
from winnow.pipeline.backfill_command import measure
from winnow.pipeline.config import load_config
from winnow.pipeline.lake import Lake
from winnow.pipeline.policy import load_policy
from winnow.pipeline.refilter import refilter
from winnow.pipeline.run import run
from winnow.pipeline.storage import Storage
from winnow.pipeline.views import columns_by_operator

CONFIG = """
name: small
policy: {policy}
isolate: false
commit: {{sources: 2}}
stages:
- stage: ingest
- {{stage: split, detector: {{kind: none}}, longest_s: 1}}
- stage: filter
  label: cheap
  operators: {{motion: {{}}}}
"""
POLICY = "name: none\nrules: []\n"
DARK = """
name: dark
rules:
- {name: dark, reject: exposure_mean < 0.3, reason: too dark}
"""
CLIPS = 9  # four videos of 48 frames, halved, and one of 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for n in range(4):
        images = [image // 8 for image in scene(n, 48)] if n == 3 else scene(n, 48)
        write_video(folder / "in #1" / f"{n}.mp4", images)
    write_video(folder / "in #1" / "short.mp4", scene(9, 20))
    (folder / "policy.yaml").write_text(POLICY)
    (folder / "dark.yaml").write_text(DARK)
    (folder / "run.yaml").write_text(CONFIG.format(policy=folder / "policy.yaml"))
    return folder


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory) -> Lake:
    """A lake whose clips were measured by `motion` only."""
    lake = Lake(str(tmp_path_factory.mktemp("lake") / "lake"))
    run(load_config(str(folder / "run.yaml")), str(folder / "in #1"), lake)
    return lake


@pytest.fixture
def own(measured, tmp_path) -> Lake:
    shutil.copytree(measured.uri, tmp_path / "own")
    return Lake(str(tmp_path / "own"))


@pytest.fixture
def moved(folder, tmp_path) -> tuple[Lake, Path]:
    """A lake over a folder that a test may change."""
    shutil.copytree(folder / "in #1", tmp_path / "in")
    lake = Lake(str(tmp_path / "lake"))
    run(load_config(str(folder / "run.yaml")), str(tmp_path / "in"), lake)
    return lake, tmp_path / "in"


def raw_files(lake: Lake, table: str) -> int:
    return len(list(Path(lake.table_uri(table)).glob("*.parquet")))


@dataclass(frozen=True)
class Newer(Exposure):
    """Measures one thing less than the version before, and one more."""

    name: ClassVar[str] = "exposure"
    version: ClassVar[int] = 2
    columns: ClassVar[tuple[Column, ...]] = (
        *(c for c in Exposure.columns if c.name != "exposure_flicker"),
        Column("exposure_peak", pa.float64(), "brightest luma", unit="share"),
    )

    def start(self, view):
        inner = super().start(view)

        class Measurement(type(inner)):
            def columns(self):
                values = super().columns()
                del values["exposure_flicker"]
                return values | {"exposure_mean": 7.0, "exposure_peak": 1.0}

        inner.__class__ = Measurement
        return inner


def test_an_operator_added_later_measures_as_a_run_would_and_refilter_decides_by_it(
    own, folder, tmp_path
):
    before = rows(own, "SELECT clip_id, motion_mean, failure FROM clips ORDER BY 1")
    result = backfill(own, ["exposure"])
    assert result.line == f"clips {CLIPS} = {CLIPS} measured + 0 failed + 0 skipped + 0 unavailable"
    assert rows(own, "SELECT clip_id, motion_mean, failure FROM clips ORDER BY 1") == before
    assert rows(own, "SELECT count(*) FROM raw_clips WHERE exposure_mean IS NOT NULL") == [(0,)]
    # Another lake, whose run had the operator from the start, holds the same scores.
    whole = Lake(str(tmp_path / "whole"))
    settings = load_config(
        str(folder / "run.yaml"), ["stages.cheap.operators={motion: {}, exposure: {}}"]
    )
    run(settings, str(folder / "in #1"), whole)
    columns = ", ".join(c.name for c in (*Exposure.columns, Exposure.error_column()))
    query = f"SELECT clip_id, {columns}, operator_versions['exposure'], operator_versions['motion']"
    expected = rows(whole, f"{query} FROM clips ORDER BY 1")
    assert rows(own, f"{query} FROM clips ORDER BY 1") == expected
    assert len(expected) == CLIPS
    decided = refilter(own, load_policy(str(folder / "dark.yaml")))
    assert decided.counts == {"keep": CLIPS - 2, "reject": 2}
    dark = rows(
        own, "SELECT DISTINCT parse_filename(uri) FROM clips_decided WHERE verdict='reject'"
    )
    assert dark == [("3.mp4",)]
    docs = "SELECT meaning FROM column_docs WHERE table_name = 'clips' AND column_name = "
    assert rows(own, docs + "'exposure_mean'") == [("mean luma",)]


def test_what_is_measured_is_not_measured_again(own):
    assert backfill(own, ["motion"]).counts["skipped"] == CLIPS  # by the run, same settings
    backfill(own, ["exposure"])
    versions = {t: own.open(t).version() for t in ("measurements", "backfills", "clips")}
    again = backfill(own, ["motion", "exposure"])
    assert again.counts["skipped"] == CLIPS
    assert versions == {t: own.open(t).version() for t in versions}
    # Other settings are another measure.
    other = latest_settings(own, ["stages.cheap.operators.exposure={black: 0.5}"])
    assert backfill(own, ["exposure"], config=other).counts["measured"] == CLIPS
    assert rows(own, "SELECT count(*) FROM measurements") == [(2 * CLIPS,)]


def test_a_newer_version_replaces_the_whole_group_and_the_old_one_stays_readable(own, monkeypatch):
    settings = latest_settings(own, ["stages.cheap.operators.exposure={}"])
    backfill(own, ["exposure"], config=settings)
    old = rows(own, "SELECT clip_id, exposure_mean, exposure_flicker FROM clips ORDER BY 1")
    monkeypatch.setitem(all_operators(), "exposure", Newer)
    result = backfill(own, ["exposure"], config=settings, where="start_frame = 0")
    assert result.asked == result.counts["measured"] == 5
    shown = rows(own, "SELECT clip_id, exposure_mean, exposure_flicker, exposure_peak, "
                      "operator_versions['exposure'], start_frame FROM clips ORDER BY 1")  # fmt: skip
    for (clip_id, mean, flicker), row in zip(old, shown, strict=True):
        wanted = (7.0, None, 1.0, "2", 0) if row[5] == 0 else (mean, flicker, None, "1", row[5])
        assert row == (clip_id, *wanted)
    kept = rows(own, "SELECT clip_id, exposure_mean, exposure_flicker FROM measurements "
                     "WHERE operator_version = '1' ORDER BY 1")  # fmt: skip
    assert kept == old


def test_a_measure_that_fails_now_hides_the_value_of_before(own, monkeypatch):
    backfill(own, ["exposure"])

    @dataclass(frozen=True)
    class Broken(Newer):
        name: ClassVar[str] = "exposure"
        version: ClassVar[int] = 3
        columns: ClassVar[tuple[Column, ...]] = Exposure.columns

        def start(self, view):
            raise RuntimeError("no light")

    monkeypatch.setitem(all_operators(), "exposure", Broken)
    result = backfill(own, ["exposure"])
    assert result.counts["failed"] == CLIPS
    assert result.useless
    shown = rows(own, "SELECT DISTINCT exposure_mean, exposure_error FROM clips")
    assert shown == [(None, "RuntimeError: no light")]
    assert backfill(own, ["exposure"]).counts["skipped"] == CLIPS
    assert backfill(own, ["exposure"], retry_failed=True).counts["failed"] == CLIPS


def test_vectors_follow_their_operator(own):
    query = "SELECT clip_id, model, vector FROM embeddings ORDER BY 1"
    assert rows(own, query) == []
    backfill(own, ["fingerprint"])
    first = rows(own, query)
    assert len(first) == CLIPS
    # Measured so that no clip has structure enough for a vector: the old ones must not stay.
    none = latest_settings(own, ["stages.cheap.operators.fingerprint={minimum_energy: 1000}"])
    backfill(own, ["fingerprint"], config=none)
    assert rows(own, query) == []
    assert rows(own, "SELECT count(*) FROM raw_embeddings") == [(CLIPS,)]
    backfill(own, ["fingerprint"])
    assert rows(own, query) == first


def test_a_column_younger_than_a_file_is_null_there(own):
    """deltalake promises Arrow otherwise, and a filter would believe it."""
    own.create([Column("later_mean", pa.float64(), "of a later run")])
    assert rows(own, "SELECT count(*) FROM clips WHERE later_mean IS NULL") == [(CLIPS,)]
    assert rows(own, "SELECT count(*) FROM clips WHERE later_mean IS NOT NULL") == [(0,)]


def test_sources_that_are_gone_or_changed_give_no_measurement_and_are_told(moved):
    lake, folder = moved
    (folder / "0.mp4").unlink()
    shutil.copy2(folder / "1.mp4", folder / "2.mp4")
    content = bytearray((folder / "3.mp4").read_bytes())
    content[-1] ^= 1
    (folder / "3.mp4").write_bytes(content)  # as long as before
    result = backfill(lake, ["exposure"])
    assert result.problems == {"vanished": 1, "changed": 2}
    assert result.counts == {"measured": 3, "failed": 0, "skipped": 0, "unavailable": 6}
    assert {Path(uri).name for uri, _ in result.examples} == {"0.mp4", "2.mp4", "3.mp4"}
    with_values = rows(lake, "SELECT DISTINCT parse_filename(uri) FROM clips_decided "
                             "WHERE 'exposure' IN map_keys(operator_versions) ORDER BY 1")  # fmt: skip
    assert with_values == [("1.mp4",), ("short.mp4",)]
    again = backfill(lake, ["exposure"])
    assert again.counts == {"measured": 0, "failed": 0, "skipped": 3, "unavailable": 6}
    assert not again.useless
    for file in folder.glob("*.mp4"):
        file.unlink()
    gone = backfill(lake, ["sharpness"])
    assert gone.useless
    assert gone.counts["unavailable"] == CLIPS


def test_only_the_clips_that_the_predicate_names(own):
    result = backfill(own, ["exposure"], where="uri LIKE '%/1.mp4' AND verdict = 'keep'")
    assert result.asked == 2
    found = rows(own, "SELECT DISTINCT parse_filename(uri) FROM clips_decided "
                      "WHERE exposure_mean IS NOT NULL")  # fmt: skip
    assert found == [("1.mp4",)]
    assert backfill(own, ["exposure"], where="false").asked == 0


@pytest.mark.parametrize(
    ("names", "where", "words"),
    [
        ([], "", "at least one operator"),
        (["exposur"], "", "did you mean 'exposure'"),
        (["exposure"], "nosuch > 1", "nosuch"),
        (["exposure"], "true); DROP TABLE x; --", "--where"),
        (["exposure"], "clip_id IN (SELECT clip_id FROM clips)", "no query"),
    ],
)
def test_what_cannot_be_asked_is_said_before_any_work(own, names, where, words):
    with pytest.raises(ConfigError, match=words):
        backfill(own, names, where=where)
    assert own.open("backfills") is None or not rows(own, "SELECT * FROM backfills")


def test_a_batch_without_its_commit_does_not_exist(own, monkeypatch):
    """A crash right before the commit point, then the same command again."""
    append = Lake.append

    def crash(self, table, data, batch=None):
        if table == "backfills" and batch[1] == 2:
            raise LakeError("the power went")
        append(self, table, data, batch)

    monkeypatch.setattr(Lake, "append", crash)
    with pytest.raises(LakeError, match="power"):
        backfill(own, ["exposure", "fingerprint"])
    monkeypatch.undo()
    half = rows(own, "SELECT count(*), count(exposure_mean) FROM clips")
    assert half == [(CLIPS, 4)]  # one batch of two sources
    assert rows(own, "SELECT count(*) FROM embeddings") == [(4,)]
    result = backfill(own, ["exposure", "fingerprint"])
    assert result.counts == {"measured": 5, "failed": 0, "skipped": 4, "unavailable": 0}
    assert rows(own, "SELECT count(*), count(exposure_mean) FROM clips") == [(CLIPS, CLIPS)]
    assert rows(own, "SELECT count(*) FROM embeddings") == [(CLIPS,)]
    assert rows(own, "SELECT count(*) FROM measurements") == [(2 * CLIPS,)]


def test_rows_that_vanish_are_an_error(own, monkeypatch):
    append = Lake.append

    def lossy(self, table, data, batch=None):
        append(self, table, data[:-1] if table == "measurements" else data, batch)

    monkeypatch.setattr(Lake, "append", lossy)
    with pytest.raises(LedgerError, match="does not balance"):
        backfill(own, ["exposure"])


KILLED = """
import sys
from winnow.pipeline.backfill import backfill, latest_settings
from winnow.pipeline.lake import Lake
if __name__ == "__main__":
    lake = Lake(sys.argv[1])
    more = ["isolate=true", "commit.sources=1", "stages.cheap.workers={max: 1}"]
    backfill(lake, ["exposure", "sharpness"], config=latest_settings(lake, more))
"""


def test_killed_in_the_middle_it_goes_on(own, measured, tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, script, own.uri], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while raw_files(own, "backfills") < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shown = rows(own, "SELECT count(DISTINCT clip_id) FROM measurements")[0][0]
    assert 0 < shown < CLIPS
    result = backfill(own, ["exposure", "sharpness"])
    assert result.counts["skipped"] == shown
    assert result.counts["measured"] == CLIPS - shown
    assert rows(
        own, "SELECT count(*), count(exposure_mean), count(DISTINCT clip_id) FROM clips"
    ) == [(CLIPS, CLIPS, CLIPS)]


def test_a_source_that_kills_its_worker_has_the_error_in_its_columns(own, monkeypatch, folder):
    """In a child process: the operator stands in a module that children can import."""
    monkeypatch.setitem(all_operators(), "exposure", Deadly)
    settings = latest_settings(own, ["isolate=true", "attempts=1", "stages.cheap.workers={max: 1}"])
    result = backfill(own, ["exposure"], config=settings, where="uri LIKE '%/short.mp4'")
    assert result.counts["failed"] == 1
    assert result.problems == {"crashed": 1}
    shown = rows(own, "SELECT exposure_mean, exposure_error FROM clips WHERE exposure_error <> ''")
    assert len(shown) == 1
    assert shown[0][1].startswith("crashed: ")


@dataclass(frozen=True)
class Deadly(Exposure):
    name: ClassVar[str] = "exposure"
    version: ClassVar[int] = 4
    columns: ClassVar[tuple[Column, ...]] = Exposure.columns

    def start(self, view):
        os._exit(9)


def test_a_lake_of_before_is_seen_as_before_and_can_be_measured(own):
    expected = {v: rows(own, f"SELECT * FROM {v} ORDER BY ALL") for v in ("clips", "clips_decided")}
    for table in ("measurements", "backfills"):
        shutil.rmtree(own.table_uri(table))
    for view, content in expected.items():
        assert rows(own, f"SELECT * FROM {view} ORDER BY ALL") == content
    assert rows(own, "SELECT * FROM measurements") == []
    assert backfill(own, ["exposure"]).counts["measured"] == CLIPS


def test_columns_belong_to_the_operator_with_the_longest_name():
    present = ["text_share", "text_error", "text_gate_open", "text_gate_error", "text_old"]
    assert columns_by_operator([("text", ["text_share", "text_error"])], present) == {
        "text": ["text_share", "text_error", "text_old"]
    }


def test_operators_with_models_measure_later_too(own, tmp_path):
    file = tiny_models_file(tmp_path / "clip")
    settings = latest_settings(own, [f"models={file}"])
    result = backfill(own, ["embedding", "drift"], config=settings)
    assert result.counts["measured"] == CLIPS
    assert len(rows(own, "SELECT * FROM embeddings")) == CLIPS
    assert backfill(own, ["embedding", "drift"], config=settings).counts["skipped"] == CLIPS
    made = rows(own, "SELECT operators FROM backfills LIMIT 1")[0][0]
    assert "model clip-vit-l-14" in json.loads(made)["embedding"]["made_by"]


def test_sources_in_a_bucket(folder, s3, tmp_path):
    bucket = Storage.open("s3://bucket/later", options=s3, create=True)
    for file in sorted((folder / "in #1").glob("*.mp4"))[:2]:
        bucket.put(file, f"in #1/{file.name}")
    lake = Lake(str(tmp_path / "lake"))
    run(load_config(str(folder / "run.yaml")), "s3://bucket/later/in #1", lake, options=s3)
    bucket.delete("in #1/0.mp4")
    result = backfill(lake, ["exposure"], options=s3)
    assert result.counts == {"measured": 2, "failed": 0, "skipped": 0, "unavailable": 2}
    assert result.problems == {"vanished": 1}


def test_the_command(own, folder):
    app = typer.Typer()
    app.command()(measure)
    call = ["--lake", own.uri, "--operators", "exposure,sharpness"]
    first = CliRunner().invoke(app, call)
    assert first.exit_code == 0, first.output
    assert f"clips {CLIPS} = {CLIPS} measured" in first.output
    config = ["--config", str(folder / "run.yaml"), "--set", "isolate=false"]
    again = CliRunner().invoke(app, [*call, *config])
    assert again.exit_code == 0, again.output
    assert f"{CLIPS} skipped" in again.output
