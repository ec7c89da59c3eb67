"""The hash of a clip's media: recorded once, the same whoever makes it, and believed ever after."""

import json
import os
import shutil
import uuid
from pathlib import Path

import pyarrow.parquet
import pytest
import typer
from typer.testing import CliRunner

from tests.conftest import scene, write_video
from tests.pipeline.lakes import config, facts, rows
from tests.pipeline.test_export import contents, make_lake, members
from winnow.operators.media import hash_file
from winnow.pipeline import export_command
from winnow.pipeline.export import ExportSettings, export
from winnow.pipeline.lake import Lake
from winnow.pipeline.lake_check import check_lake
from winnow.pipeline.run import run
from winnow.pipeline.storage import Storage


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """One video whose stream is copied, and one that has to be encoded."""
    folder = tmp_path_factory.mktemp("hashed")
    write_video(folder / "copied.mp4", scene(1, 48))
    write_video(folder / "encoded.mp4", scene(2, 48), codec="mpeg4", options={"qscale": "2"})
    return folder


@pytest.fixture
def run_lake(two, tmp_path) -> Lake:
    lake = Lake(str(tmp_path / "lake"))
    run(config(), str(two), lake)
    return lake


def flip(path: Path) -> None:
    """Damage that neither size nor time tells."""
    content, time = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(time, time))


def test_a_run_records_what_it_stored_and_another_run_the_same(run_lake, two, tmp_path):
    made = rows(run_lake, "SELECT media_uri, sha256, stream_copied FROM dataset")
    assert sorted(copied for *_, copied in made) == [False, True]
    for uri, sha256, _ in made:
        assert hash_file(Path(uri)) == sha256
    again = Lake(str(tmp_path / "again"))
    run(config(), str(two), again)
    assert facts(again)["dataset"] == facts(run_lake)["dataset"]


def test_another_making_of_a_clip_replaces_no_file_that_rows_name(two, run_lake):
    before = {
        uri: Path(uri).read_bytes() for (uri,) in rows(run_lake, "SELECT media_uri FROM dataset")
    }
    shutil.rmtree(Path(run_lake.uri, "sources"))  # as if nothing had been committed
    run(config("stages.transcode.preset=ultrafast"), str(two), run_lake)
    now = {uri for (uri,) in rows(run_lake, "SELECT media_uri FROM dataset")}
    assert len(now & set(before)) == 1  # the copied one
    assert {uri: Path(uri).read_bytes() for uri in before} == before


def test_a_deep_check_names_each_file_with_another_content(run_lake):
    assert check_lake(run_lake, deep=True).sound
    made = rows(run_lake, "SELECT clip_id, media_uri, sha256 FROM dataset ORDER BY media_uri")
    for _, uri, _ in made:
        flip(Path(uri))
    assert check_lake(run_lake).sound  # only reading tells
    lines = [str(finding) for finding in check_lake(run_lake, deep=True).violations]
    assert len(lines) == 2
    for line, (clip_id, uri, recorded) in zip(lines, made, strict=True):
        found = hash_file(Path(uri))
        assert found != recorded
        for told in (clip_id, uri, recorded, found):
            assert told in line


def test_a_deep_check_reads_from_a_bucket(run_lake, s3, tmp_path):
    lake = Lake(f"s3://bucket/{uuid.uuid4().hex}", s3)
    run(config(), str(Path(rows(run_lake, "SELECT min(uri) FROM sources")[0][0]).parent), lake)
    assert facts(lake)["dataset"] == facts(run_lake)["dataset"]
    assert check_lake(lake, deep=True, options={}).sound
    (uri, clip_id) = rows(lake, "SELECT media_uri, clip_id FROM dataset ORDER BY 1")[0]
    place = Storage.open(lake.media_uri, options=s3)
    key = place.key_of(uri)
    draft = tmp_path / "draft.mp4"
    draft.write_bytes(place.read(key))
    flip(draft)
    place.put(draft, key)
    (finding,) = check_lake(lake, deep=True, options={}).violations
    assert clip_id in str(finding)


@pytest.fixture
def made(tmp_path) -> Lake:
    return make_lake(str(tmp_path / "lake"), tmp_path)


ONE = ExportSettings(by=())


def test_a_damaged_file_goes_into_no_shard(made, tmp_path):
    assert export(made, str(tmp_path / "whole"), ONE).complete
    kept = rows(made, "SELECT clip_id, media_uri, sha256 FROM dataset ORDER BY clip_id")
    first, middle, last = kept[0], kept[4], kept[-1]
    hurt = [first, middle, last]
    for _, uri, _ in hurt:
        shutil.copy2(uri, f"{uri}.good")
    flip(Path(first[1]))
    Path(middle[1]).unlink()
    Path(last[1]).unlink()
    Path(last[1]).symlink_to("/etc/hostname")  # cannot be had, and must not be
    out = tmp_path / "out"
    result = export(made, str(out), ONE)
    assert not result.complete
    assert [problem.clip_id for problem in result.problems] == [clip_id for clip_id, *_ in hurt]
    assert first[2] in result.problems[0].reason
    assert "missing" in result.problems[1].reason
    assert not (out / "index.json").exists()
    whole = members(tmp_path / "whole")
    gone = tuple(clip_id for clip_id, *_ in hurt)
    # The others are whole: what was half added is taken back without a trace.
    assert members(out) == {n: c for n, c in whole.items() if not n.startswith(gone)}
    for _, uri, _ in hurt:
        Path(f"{uri}.good").replace(uri)
    assert export(made, str(out), ONE).complete
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_the_rows_of_every_format_have_the_hash(made, tmp_path, form):
    export(made, str(tmp_path / "out"), ExportSettings(form=form, by=()))
    recorded = dict(rows(made, "SELECT clip_id, sha256 FROM dataset"))
    assert all(recorded.values())
    for name in ("part-000000", "manifest"):
        path = tmp_path / "out" / f"{name}.{form}"
        if form == "jsonl":
            documents = [json.loads(line) for line in path.read_text().splitlines()]
        else:
            documents = pyarrow.parquet.read_table(path).to_pylist()
        assert {d["clip_id"]: d["media_sha256"] for d in documents if d["media_uri"]} == recorded


def test_what_is_left_out_stands_in_the_manifest_with_the_reason(made, tmp_path):
    clip_id, uri = rows(made, "SELECT clip_id, media_uri FROM dataset ORDER BY clip_id")[3]
    flip(Path(uri))
    out = tmp_path / "out"
    app = typer.Typer()
    app.command()(export_command.export)
    arguments = ["--lake", made.uri, "--out", str(out), "--by", "none"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 1
    assert f"clip {clip_id}: the media are damaged" in answer.stderr
    assert "--allow-missing" in answer.stderr
    answer = CliRunner().invoke(app, [*arguments, "--allow-missing"])
    assert answer.exit_code == 0
    manifest = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    told = {d["clip_id"]: d["not_exported"] for d in manifest if d["not_exported"]}
    assert list(told) == [clip_id]
    assert "damaged" in told[clip_id]
    first = contents(out)
    assert CliRunner().invoke(app, [*arguments, "--allow-missing"]).exit_code == 0
    assert contents(out) == first


def test_no_hash_recorded_is_counted_and_no_error(tmp_path):
    lake = make_lake(str(tmp_path / "lake"), tmp_path, hashed=False)
    flip(Path(rows(lake, "SELECT min(media_uri) FROM dataset")[0][0]))
    result = export(lake, str(tmp_path / "out"), ONE)
    assert (result.complete, result.media_without_hash) == (True, 9)
    assert json.loads((tmp_path / "out" / "index.json").read_text())["media_without_hash"] == 9
    notes = [note for note in check_lake(lake, deep=True).notes if "no hash" in note.text]
    assert [note.count for note in notes] == [9]
