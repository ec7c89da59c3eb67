"""A lake that an older Winnow wrote works with every command; one of a newer layout with none."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from typer.testing import CliRunner

from tests.conftest import scene, write_video
from tests.pipeline.lakes import FAST, facts, rows
from winnow.operators.errors import LakeError
from winnow.pipeline.cli import app
from winnow.pipeline.lake import LAYOUT, LAYOUT_KEY, PARTITIONS, Lake
from winnow.pipeline.lake_check import check_lake

YOUNG_TABLES = ("backfills", "measurements", "captions")
YOUNG_COLUMNS = {
    "sources": ["copy_of", "sidecar_problem"],
    "clips": ["failure"],
    "dataset": ["sha256"],
    "runs": ["workers"],
    "verdicts": [],
    "embeddings": [],
}


@pytest.fixture(scope="module")
def older(lake, tmp_path_factory) -> Path:
    """The lake of a run as an older version would have written it, and labels for its clips."""
    root = tmp_path_factory.mktemp("older")
    shutil.copytree(lake.uri, root / "lake", ignore=shutil.ignore_patterns(*YOUNG_TABLES))
    for name, young in YOUNG_COLUMNS.items():
        place = root / "lake" / name
        table = DeltaTable(str(place)).to_pyarrow_table().drop_columns(young)
        # What a column means was put in other words then.
        said = [f.with_metadata({"meaning": f"older words for {f.name}"}) for f in table.schema]
        table = pa.table(table.columns, schema=pa.schema(said))
        shutil.rmtree(place)
        write_deltalake(str(place), table, partition_by=PARTITIONS.get(name))
    clip_ids = [clip_id for (clip_id,) in rows(lake, "SELECT clip_id FROM clips ORDER BY 1")]
    labels = [f"{clip_id},{'good' if n % 2 else 'bad'}" for n, clip_id in enumerate(clip_ids)]
    (root / "labels.csv").write_text("\n".join(["clip_id,label", *labels]) + "\n")
    return root


@pytest.fixture
def old(older, tmp_path) -> Lake:
    shutil.copytree(older / "lake", tmp_path / "lake")
    return Lake(str(tmp_path / "lake"))


def winnow(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def filled(words: list[str], given: dict[str, object]) -> list[str]:
    for key, value in given.items():
        words = [word.replace(f"<{key}>", str(value)) for word in words]
    return words


KEEP_ALL = "tests/pipeline/keep_all.yaml"
COMMANDS = {
    "sql": ["sql", "SELECT d.sha256, s.copy_of, c.failure, r.workers FROM dataset d "
                   "JOIN sources s USING (attempt_id) JOIN clips c USING (clip_id), runs r"],
    "sql --describe": ["sql", "--describe"],
    "sql of tables": ["sql", "SELECT * FROM captions, measurements, backfills"],
    "refilter": ["refilter", "--policy", "generated"],
    "report": ["report", "--out", "<out>.html"],
    "export": ["export", "--out", "<out>"],
    "export of rows": ["export", "--out", "<out>", "--format", "parquet"],
    "check": ["lake", "check"],
    "deep check": ["lake", "check", "--deep"],
    "compact": ["lake", "compact"],
    "vacuum": ["lake", "vacuum", "--yes", "--keep-hours", "0"],
    "words": ["search", "--words", "apple"],
    "clip": ["search", "--clip", "<clip>"],
    "index check": ["index", "check"],
    "index rebuild": ["index", "rebuild"],
    "diff": ["policy", "diff", "generated", KEEP_ALL],
    "tune": ["policy", "tune", "--policy", "generated", "--labels", "<labels>"],
    "measure": ["measure", "--operators", "exposure,sharpness"],
    "run": ["run", "--input", "<input>", *(w for s in FAST for w in ("--set", s))],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_works_on_an_older_lake(older, old, videos, tmp_path, name):
    before = facts(old)
    (clip,) = rows(old, "SELECT min(clip_id) FROM dataset")[0]
    (tmp_path / "in").mkdir()
    shutil.copy2(videos / "z" / "bear small.mp4", tmp_path / "in" / "again.mp4")
    given = {"out": tmp_path / "out", "clip": clip, "labels": older / "labels.csv",
             "input": tmp_path / "in"}  # fmt: skip
    answer = winnow(*filled(COMMANDS[name], given), "--lake", old.uri)
    assert answer.exit_code == 0, (answer.output, answer.exception)
    result = check_lake(old, deep=True)
    assert result.sound, [str(violation) for violation in result.violations]
    assert result.uncommitted == {}
    if name not in ("run", "measure"):
        assert facts(old) == before


def test_the_first_run_adds_what_is_missing(old, tmp_path):
    notes = {e for note in check_lake(old).notes for e in note.examples if note.check == "schema"}
    assert {*YOUNG_TABLES, "dataset.sha256", "runs.workers", "sources.copy_of"} <= notes
    before = rows(old, "SELECT clip_id, sha256 FROM dataset")
    write_video(tmp_path / "in" / "new.mp4", scene(30, 60))
    answer = winnow(*filled(COMMANDS["run"], {"input": tmp_path / "in"}), "--lake", old.uri)
    assert answer.exit_code == 0, (answer.output, answer.exception)
    result = check_lake(old, deep=True)
    assert result.sound, [str(violation) for violation in result.violations]
    assert [note for note in result.notes if note.check == "schema"] == []
    assert [n.count for n in result.notes if "no hash" in n.text] == [len(before)]
    now = rows(old, "SELECT clip_id, sha256 FROM dataset")
    assert set(before) < set(now)
    assert sum(sha256 is not None for _, sha256 in now) == 1


def test_a_row_may_have_a_column_that_the_table_has_not_yet(old):
    before = rows(old, "SELECT clip_id, source_id, attempt_id, media_uri FROM raw_dataset")
    ids = dict(zip(("clip_id", "source_id", "attempt_id", "media_uri"), before[0], strict=True))
    old.append("dataset", [{**ids, "policy": "other", "sha256": "00", "content_type": "unknown",
                            "resolution": "720p", "aspect_ratio": "16:9", "length": "2-5s"}])  # fmt: skip
    found = rows(old, "SELECT sha256, count(*) FROM raw_dataset GROUP BY 1 ORDER BY 1 NULLS FIRST")
    assert found == [(None, len(before)), ("00", 1)]
    assert rows(old, "SELECT count(*) FROM raw_dataset WHERE sha256 IS NULL") == [(len(before),)]
    assert rows(old, "SELECT policy FROM raw_dataset WHERE sha256 = '00'") == [("other",)]


def test_a_new_lake_says_its_layout_and_an_older_one_counts_as_the_first(lake, old):
    said = lake.open("sources").metadata().configuration
    assert said[LAYOUT_KEY] == str(LAYOUT)
    assert LAYOUT_KEY not in old.open("sources").metadata().configuration


@pytest.mark.parametrize("name", COMMANDS)
def test_a_newer_layout_is_refused_by_every_command(older, old, tmp_path, name):
    sources = old.open("sources")
    sources.alter.set_table_properties({LAYOUT_KEY: str(LAYOUT + 1)}, raise_if_not_exists=False)
    versions = {p.name: len(list(p.glob("_delta_log/*.json"))) for p in Path(old.uri).iterdir()}
    (tmp_path / "in").mkdir()
    given = {"out": tmp_path / "out", "clip": "x", "labels": older / "labels.csv",
             "input": tmp_path / "in"}  # fmt: skip
    answer = winnow(*filled(COMMANDS[name], given), "--lake", old.uri)
    assert isinstance(answer.exception, LakeError), (answer.output, answer.exception)
    assert "newer Winnow" in str(answer.exception)
    now = {p.name: len(list(p.glob("_delta_log/*.json"))) for p in Path(old.uri).iterdir()}
    assert {k: v for k, v in now.items() if v} == {k: v for k, v in versions.items() if v}


def test_the_past_of_a_lake_of_a_newer_layout_is_refused_too(old):
    sources = old.open("sources")
    sources.alter.set_table_properties({LAYOUT_KEY: "later"}, raise_if_not_exists=False)
    answer = winnow("sql", "--lake", old.uri, "--as-of", "0", "SELECT 1")
    assert isinstance(answer.exception, LakeError)
    assert "'later'" in str(answer.exception)
