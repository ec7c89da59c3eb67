"""The main job from a bucket into a lake in a bucket."""

import uuid

from tests.pipeline.lakes import config, facts, rows
from tests.pipeline.test_cli import winnow
from winnow.pipeline.lake import Lake
from winnow.pipeline.lake_report import write_lake_report
from winnow.pipeline.policy import load_policy
from winnow.pipeline.refilter import refilter
from winnow.pipeline.run import run
from winnow.pipeline.storage import Storage


def test_a_bucket_gives_what_a_folder_gives(videos, lake, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # the embedded index of a remote lake lives there
    place = f"s3://bucket/{uuid.uuid4().hex}"
    uploads = Storage.open(f"{place}/in", options=s3, create=True)
    for path in sorted(videos.rglob("*")):
        if path.is_file():
            uploads.put(path, path.relative_to(videos).as_posix())
    remote = Lake(f"{place}/lake", s3)
    # Objects are as new as their upload: nothing is being written any more.
    settings = config("stages.ingest.settle_s=0")
    result = run(settings, f"{place}/in", remote, options=s3)
    assert result.ledger.balanced
    assert run(settings, f"{place}/in", remote, options=s3).ledger.sources_in == 0
    expected, found = facts(lake), facts(remote)
    for table in ("clips", "verdicts", "embeddings", "dataset"):
        assert found[table] == expected[table], table
    assert refilter(remote, load_policy("generated")).changed == 0
    kept = Storage.open(remote.media_uri, options=s3)
    for (uri,) in rows(remote, "SELECT media_uri FROM dataset"):
        assert kept.exists(kept.key_of(uri))
    assert write_lake_report(remote, tmp_path / "r.html").stat().st_size > 10_000
    # The command says all of it and ends, though Arrow has read the bucket through Python.
    options = [part for item in s3.items() for part in ("--storage-option", "=".join(item))]
    query = "SELECT unnest(range(5000)) AS n FROM (SELECT clip_id FROM clips LIMIT 1)"
    for _ in range(3):
        said, _ = winnow("sql", "--lake", remote.uri, *options, "--format", "csv", query)
        assert said.split() == ['"n"', *map(str, range(5000))]
