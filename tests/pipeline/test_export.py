"""Export: shards that webdataset reads, the same bytes every time, whatever came in between."""

import hashlib
import json
import math
import signal
import subprocess
import sys
import tarfile
import uuid
import warnings
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.pipeline.lakes import rows
from winnow.operators.errors import ConfigError, LakeError
from winnow.operators.operator import Column
from winnow.pipeline import export_command
from winnow.pipeline.export import ExportSettings, export
from winnow.pipeline.export_rows import caption_text
from winnow.pipeline.export_shards import folder_name
from winnow.pipeline.lake import Lake
from winnow.pipeline.storage import Storage

ODD = ["plain", "a/b", "../up", "a:b", "é ü%", "plain", ".hidden", "x" * 200, None, "unknown"]
SCORES = (
    Column("sharp_score", pa.float64(), "sharpness"),
    Column("odd_score", pa.float32(), "sometimes no number"),
    Column("thumbnail_jpeg", pa.binary(), "a picture"),
)


def make_lake(
    uri: str, tmp: Path, options: dict | None = None, clips: int = 12, hashed: bool = True
) -> Lake:
    """A lake of clips with odd values; every fourth is rejected; the media are bytes of no video."""
    lake = Lake(uri, options or {})
    lake.create(SCORES)
    media = Storage.open(lake.media_uri, options=lake.options, create=True)
    table: dict[str, list] = {t: [] for t in ("clips", "captions", "verdicts", "dataset")}
    for n in range(clips):
        clip = {"clip_id": hashlib.sha256(str(n).encode()).hexdigest()[:24], "attempt_id": "a"}
        odd = (math.nan, math.inf, -math.inf, 0.1)[n % 4]
        table["clips"].append(clip | {
            "source_id": "s", "start_s": n / 3, "end_s": n / 3 + 1 / 3, "start_frame": n * 8,
            "end_frame": n * 8 + 8, "sharp_score": n / 7, "odd_score": odd,
            "thumbnail_jpeg": b"jpeg", "operator_versions": [("sharp", "1")],
        })  # fmt: skip
        keep = n % 4 != 3
        table["verdicts"].append(clip | {
            "policy": "p", "policy_hash": "h", "verdict": "keep" if keep else "reject",
            "reasons": [] if keep else ["dull", "dark"], "seq": n, "decided_by": "r",
        })  # fmt: skip
        if not keep:
            continue
        draft = tmp / "draft.mp4"
        draft.write_bytes(bytes([n]) * (1000 + 400 * n))
        sha256 = hashlib.sha256(draft.read_bytes()).hexdigest() if hashed else None
        content = ODD[n % len(ODD)]
        table["dataset"].append(clip | {
            "source_id": "s", "policy": "p", "bytes": draft.stat().st_size, "frames": 8,
            "sha256": sha256,
            "media_uri": media.put(draft, f"{clip['clip_id'][:2]}/{clip['clip_id']}-x.mp4"),
            "content_type": content, "resolution": "720p", "aspect_ratio": "16x9",
            "length": "0-2s", "prompt": 'a "cup"\nfalls <ünï>', "stream_copied": False,
        })  # fmt: skip
        if n % 2:
            table["captions"] += [
                clip | {"window_number": w, "length": length, "status": status, "text": text}
                for w, length, status, text in [
                    (1, "medium", "ok", "then it breaks"), (0, "medium", "ok", "a cup falls "),
                    (0, "long", "ok", "long text"), (1, "long", "refused", "no"),
                ]
            ]  # fmt: skip
    for name, content in table.items():
        lake.append(name, content)
    lake.append("sources", [{
        "source_id": "s", "uri": "/in/a 'b'.mp4", "status": "done", "attempt_id": "a", "seq": 1,
        "run_id": "r", "prompt": 'a "cup"\nfalls <ünï>', "generator": "cosmos",
    }])  # fmt: skip
    lake.append("runs", [{"run_id": "r", "policy": "p", "finished_at": None}])
    return lake


@pytest.fixture
def made(tmp_path) -> Lake:
    return make_lake(str(tmp_path / "lake"), tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


def test_webdataset_reads_the_shards(made, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, at import
        import webdataset

    out = tmp_path / "out"
    result = export(made, str(out), ExportSettings())
    assert result.complete
    urls = [str(path) for path in sorted(out.rglob("*.tar"))]
    assert len(urls) == len(result.shards) > 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = {
            sample["__key__"]: sample
            for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        }
    kept = rows(made, "SELECT clip_id, media_uri FROM dataset ORDER BY 1")
    assert sorted(samples) == [clip_id for clip_id, _ in kept]
    for clip_id, uri in kept:
        assert samples[clip_id]["mp4"] == Path(uri).read_bytes()
        content = json.loads(samples[clip_id]["json"])
        assert content["clip_id"] == clip_id
        assert content["source_uri"] == "/in/a 'b'.mp4"
        assert content["prompt"] == 'a "cup"\nfalls <ünï>'
        assert content["verdict"] == "keep"
        assert content["policy"] == "p"
        assert content["end_frame"] - content["start_frame"] == 8
        assert set(content["scores"]) == {"sharp_score", "odd_score"}
        captioned = bool(content["captions"])
        said = "a cup falls then it breaks" if captioned else content["prompt"]
        assert samples[clip_id]["txt"].decode() == said


def test_what_is_no_number_is_null_in_json_and_itself_in_parquet(made, tmp_path):
    export(made, str(tmp_path / "j"), ExportSettings(form="jsonl", by=()))
    lines = (tmp_path / "j" / "part-000000.jsonl").read_text().splitlines()
    documents = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [d["clip_id"] for d in documents] == sorted(d["clip_id"] for d in documents)
    assert {d["scores"]["odd_score"] for d in documents} == {None}
    export(made, str(tmp_path / "q"), ExportSettings(form="parquet", by=()))
    table = pyarrow.parquet.read_table(tmp_path / "q" / "part-000000.parquet")
    assert table.column("clip_id").to_pylist() == [d["clip_id"] for d in documents]
    values = table.column("odd_score").to_pylist()
    assert sum(math.isnan(v) for v in values) == 3
    assert values.count(math.inf) == 3
    assert table.column("media_uri").to_pylist() == [d["media_uri"] for d in documents]


@pytest.mark.parametrize("form", ["webdataset", "parquet", "jsonl"])
def test_the_same_lake_gives_the_same_bytes(made, tmp_path, form):
    settings = ExportSettings(form=form, max_shard_bytes=8_000)
    for name in "ab":
        assert export(made, str(tmp_path / name), settings).complete
    first = contents(tmp_path / "a")
    assert contents(tmp_path / "b") == first
    again = export(made, str(tmp_path / "a"), settings)
    assert again.kept_shards == len(again.shards) > 1
    assert contents(tmp_path / "a") == first
    index = json.loads(first["index.json"])
    assert {entry["name"] for entry in index["shards"]} | {"index.json", index["manifest"]["name"]} \
        == set(first)  # fmt: skip
    for entry in (*index["shards"], index["manifest"]):
        assert hashlib.sha256(first[entry["name"]]).hexdigest() == entry["sha256"]
        assert len(first[entry["name"]]) == entry["bytes"]


def test_no_shard_is_larger_than_it_may_be(made, tmp_path):
    limit = 20_480
    result = export(made, str(tmp_path / "out"), ExportSettings(by=(), max_shard_bytes=limit))
    assert sum(shard["clips"] for shard in result.shards) == 9
    assert 1 < len(result.shards) < 9
    assert all(shard["bytes"] <= limit for shard in result.shards)
    alone = export(made, str(tmp_path / "alone"), ExportSettings(by=(), max_shard_bytes=1))
    assert [shard["clips"] for shard in alone.shards] == [1] * 9
    assert members(tmp_path / "alone") == members(tmp_path / "out")


def test_odd_values_make_plain_folders_inside_the_export(made, tmp_path):
    out = tmp_path / "x" / "out"
    export(made, str(out), ExportSettings(by=("content_type",)))
    found = {p.parent for p in (tmp_path / "x").rglob("*.tar")}
    assert all(folder.parent == out for folder in found)
    kept = {value or "unknown" for (value,) in rows(made, "SELECT content_type FROM dataset")}
    assert len(found) == len(kept)
    assert len(members(out)) == 27


@given(st.lists(st.text() | st.none(), max_size=5))
def test_different_values_never_share_a_folder(values):
    names = {value: folder_name("axis", value) for value in values if value != "unknown"}
    assert len(set(names.values())) == len(names)
    for name in names.values():
        assert "/" not in name
        assert name.isascii()
        assert not name.startswith("axis=.")
        assert len(name) < 100


CHILD = """
import os, signal, sys
from pathlib import Path
from winnow.pipeline.export import ExportSettings, export
from winnow.pipeline.lake import Lake
lake, out, form, when, count = sys.argv[1:]
left = int(count)
def die():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
renamed = Path.replace
def replace(self, target):
    if when == "before": die()
    renamed(self, target)
    if when == "after": die()
Path.replace = replace
export(Lake(lake), out, ExportSettings(form=form, max_shard_bytes=8000))
"""


@pytest.mark.parametrize(
    ("form", "when", "count"),
    [("webdataset", "before", 2), ("webdataset", "after", 6), ("webdataset", "before", 21),
     ("jsonl", "after", 4), ("parquet", "before", 5)],
)  # fmt: skip
def test_killed_and_repeated_gives_the_same_bytes(made, tmp_path, form, when, count):
    settings = ExportSettings(form=form, max_shard_bytes=8_000)
    export(made, str(tmp_path / "whole"), settings)
    expected = contents(tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, "-c", CHILD, made.uri, str(out), form, when, str(count)]
    child = subprocess.run(command, capture_output=True, timeout=100)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    left = contents(out)
    assert "index.json" not in left or when == "after"
    for name, content in left.items():
        if name.endswith((".tar", ".parquet")) or ("/part-" in name and name.endswith(".jsonl")):
            assert content == expected[name]  # never half of one under its name
    result = export(made, str(out), settings)
    assert result.complete
    # One put is the note of what is being made; then each shard has two, and the record counts.
    puts = count if when == "after" else count - 1
    assert result.kept_shards == (puts - 1) // 2
    assert contents(out) == expected


def test_a_killed_export_is_finished_as_it_began_though_the_lake_moved_on(made, tmp_path):
    settings = ExportSettings(by=(), max_shard_bytes=8_000)
    export(made, str(tmp_path / "whole"), settings)
    expected = contents(tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, "-c", CHILD, made.uri, str(out), "webdataset", "after", "4"]
    child = CHILD.replace("max_shard_bytes", "by=(), max_shard_bytes")
    command[2] = child
    assert subprocess.run(command, timeout=100).returncode == -signal.SIGKILL
    reject_one(made)
    result = export(made, str(out), settings)
    assert result.resumed_versions
    assert contents(out) == expected
    # Once more: now as the lake is; the shards that went are gone.
    result = export(made, str(out), settings)
    assert not result.resumed_versions
    assert result.clips == 8
    export(made, str(tmp_path / "fresh"), settings)
    assert contents(out) == contents(tmp_path / "fresh")


def reject_one(lake: Lake) -> str:
    """Another decision on the first kept clip."""
    (clip_id,) = rows(lake, "SELECT min(clip_id) FROM dataset")[0]
    lake.append("verdicts", [{
        "clip_id": clip_id, "attempt_id": "a", "policy": "p", "policy_hash": "h2",
        "verdict": "reject", "reasons": ["late"], "seq": 10**9, "decided_by": "refilter",
    }])  # fmt: skip
    return clip_id


def test_an_older_version_is_exported_as_it_was(made, tmp_path):
    settings = ExportSettings(form="jsonl")
    before = export(made, str(tmp_path / "a"), settings)
    version, moment = before.versions["sources"], made.open("sources").history(1)[0]["timestamp"]
    reject_one(made)
    assert export(made, str(tmp_path / "b"), settings).clips == 8
    for number, as_of in enumerate([str(version), f"@{moment}"]):
        if as_of.startswith("@"):
            [(as_of,)] = duckdb.sql(f"SELECT strftime(make_timestamp({moment}000), "
                                    "'%Y-%m-%dT%H:%M:%S.%f')").fetchall()  # fmt: skip
        old = export(
            made, str(tmp_path / f"old{number}"), ExportSettings(form="jsonl", as_of=as_of)
        )
        assert old.clips == 9
        assert old.versions["verdicts"] == before.versions["verdicts"]
    for wrong in ("99", "yesterday"):
        with pytest.raises((ConfigError, LakeError), match=r"--as-of|no version"):
            export(made, str(tmp_path / "c"), ExportSettings(as_of=wrong))


def test_missing_and_changed_media_are_told_and_mended(made, tmp_path):
    settings = ExportSettings(by=())
    out = tmp_path / "out"
    paths = [Path(uri) for (uri,) in rows(made, "SELECT media_uri FROM dataset ORDER BY clip_id")]
    whole, changed = paths[0].read_bytes(), paths[1].read_bytes()
    paths[0].unlink()
    paths[1].write_bytes(b"cut")
    result = export(made, str(out), settings)
    assert not result.complete
    assert not (out / "index.json").exists()
    assert [p.media_uri for p in result.problems] == [str(paths[0]), str(paths[1])]
    assert "missing" in result.problems[0].reason
    assert "3 bytes" in result.problems[1].reason
    allowed = export(made, str(out), ExportSettings(by=(), allow_missing=True))
    assert allowed.complete
    assert allowed.clips == 7
    assert len(json.loads((out / "index.json").read_text())["problems"]) == 2
    paths[0].write_bytes(whole)
    paths[1].write_bytes(changed)
    assert export(made, str(out), settings).clips == 9
    export(made, str(tmp_path / "fresh"), settings)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_clip_that_is_kept_without_media_is_a_problem(made, tmp_path):
    (clip_id,) = rows(made, "SELECT min(clip_id) FROM verdicts WHERE verdict = 'reject'")[0]
    made.append("verdicts", [{"clip_id": clip_id, "attempt_id": "a", "policy": "p", "seq": 10**9,
                              "verdict": "keep", "decided_by": "refilter"}])  # fmt: skip
    result = export(made, str(tmp_path / "out"), ExportSettings(form="jsonl"))
    assert [p.clip_id for p in result.problems] == [clip_id]
    assert not result.complete


def test_nothing_outside_the_lakes_media_is_read(made, tmp_path):
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"x" * 1000)
    (clip_id,) = rows(made, "SELECT min(clip_id) FROM verdicts WHERE verdict = 'reject'")[0]
    ids = {"clip_id": clip_id, "attempt_id": "a", "policy": "p"}
    made.append("verdicts", [ids | {"seq": 10**9, "verdict": "keep", "decided_by": "r"}])
    made.append("dataset", [ids | {"source_id": "s", "media_uri": str(secret), "bytes": 1000}])
    result = export(made, str(tmp_path / "out"), ExportSettings())
    assert [p.clip_id for p in result.problems] == [clip_id]


def test_the_manifest_has_a_line_for_every_clip(made, tmp_path):
    export(made, str(tmp_path / "a"), ExportSettings(form="jsonl"))
    export(made, str(tmp_path / "b"), ExportSettings(form="parquet"))
    lines = (tmp_path / "a" / "manifest.jsonl").read_text().splitlines()
    documents = [json.loads(line) for line in lines]
    table = pyarrow.parquet.read_table(tmp_path / "b" / "manifest.parquet").to_pylist()
    known = rows(made, "SELECT clip_id, verdict, reasons FROM verdicts ORDER BY 1")
    for found in (documents, table):
        assert [(d["clip_id"], d["verdict"], d["reasons"]) for d in found] == known
    assert {d["clip_id"]: d["scores"]["sharp_score"] for d in documents} == dict(
        rows(made, "SELECT clip_id, sharp_score FROM clips")
    )
    index = json.loads((tmp_path / "a" / "index.json").read_text())
    assert index["manifest"]["verdicts"] == {"keep": 9, "reject": 3}


def test_another_export_is_not_written_over(made, tmp_path):
    export(made, str(tmp_path / "out"), ExportSettings(form="jsonl"))
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match="format was 'jsonl' and is 'parquet'"):
        export(made, str(tmp_path / "out"), ExportSettings(form="parquet"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.json").write_text("{}")
    with pytest.raises(ConfigError, match="not Winnow's"):
        export(made, str(tmp_path / "site"), ExportSettings())
    with pytest.raises(ConfigError, match="inside the lake"):
        export(made, f"{made.uri}/media/out", ExportSettings())
    assert contents(tmp_path / "out") == before


def test_wrong_wishes_are_refused(made, tmp_path):
    for wrong in (ExportSettings(by=("colour",)), ExportSettings(policy="none such")):
        with pytest.raises(ConfigError):
            export(made, str(tmp_path / "out"), wrong)
    made.append("clips", [{"clip_id": "../x", "source_id": "s", "attempt_id": "a"}])
    made.append("verdicts", [{"clip_id": "../x", "attempt_id": "a", "policy": "p", "seq": 10**9,
                              "verdict": "keep"}])  # fmt: skip
    made.append(
        "dataset", [{"clip_id": "../x", "attempt_id": "a", "policy": "p", "media_uri": "m"}]
    )
    with pytest.raises(LakeError, match="no clip_id"):
        export(made, str(tmp_path / "out"), ExportSettings())


def test_the_text_is_of_the_length_that_most_windows_have():
    def row(*captions):
        keys = ("window_number", "length", "status", "text")
        return {"prompt": "the prompt",
                "captions": [dict(zip(keys, c, strict=True)) for c in captions]}  # fmt: skip

    assert caption_text({"prompt": None, "captions": None}) == ""
    assert caption_text(row((0, "short", "error", None))) == "the prompt"
    assert caption_text(row((0, "short", "ok", "s"), (0, "medium", "ok", "m"))) == "m"
    long = row((1, "long", "ok", "b"), (0, "long", "ok", "a"), (0, "medium", "ok", "m"))
    assert caption_text(long) == "a b"


def test_a_bucket_gets_what_a_folder_gets(s3, tmp_path):
    base = f"s3://bucket/{uuid.uuid4().hex}"
    lake = make_lake(f"{base}/lake", tmp_path, s3)
    settings = ExportSettings(max_shard_bytes=8_000)
    local = export(lake, str(tmp_path / "out"), settings)
    remote = export(lake, f"{base}/out", settings)
    assert local.complete
    place = Storage.open(f"{base}/out", options=s3)
    found = {file.key: place.read(file.key) for file in place.find(["**/*"])}
    assert found == contents(tmp_path / "out")
    assert export(lake, f"{base}/out", settings).kept_shards == len(remote.shards)


def test_a_run_is_exported_from_the_command_line(lake, tmp_path):
    app = typer.Typer()
    app.command()(export_command.export)
    out = tmp_path / "out"
    arguments = ["--lake", lake.uri, "--out", str(out), "--json"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    told = json.loads(answer.stdout)
    kept = rows(lake, "SELECT clip_id, media_uri FROM dataset ORDER BY 1")
    assert told["clips"] == len(kept) > 0
    found = members(out)
    for clip_id, uri in kept:
        assert found[f"{clip_id}.mp4"] == Path(uri).read_bytes()
    assert told["manifest"]["clips"] == rows(lake, "SELECT count(*) FROM clips")[0][0]
    assert all(entry["name"].count("=") == 4 for entry in told["shards"])


def test_problems_end_with_exit_code_1(made, tmp_path):
    app = typer.Typer()
    app.command()(export_command.export)
    (uri,) = rows(made, "SELECT media_uri FROM dataset LIMIT 1")[0]
    Path(uri).unlink()
    arguments = ["--lake", made.uri, "--out", str(tmp_path / "out"), "--by", "none"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 1
    assert "the media are missing" in answer.stderr
    assert CliRunner().invoke(app, [*arguments, "--allow-missing"]).exit_code == 0
