"""SQL over lakes: what columns mean, the lake as it was, several lakes in one query."""

import io
import json
import shutil
from contextlib import redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.pipeline.lakes import config, rows
from winnow.operators.errors import ConfigError, LakeError
from winnow.pipeline.lake import Lake
from winnow.pipeline.policy import load_policy
from winnow.pipeline.query import named_lakes, write_description, write_query
from winnow.pipeline.refilter import refilter
from winnow.pipeline.run import run
from winnow.pipeline.time_travel import lake_as_of


def answer(lakes, query: str, as_of: str | None = None) -> list[dict]:
    with redirect_stdout(io.StringIO()) as out:
        write_query(lakes, query, "json", None, as_of)
    return json.loads(out.getvalue())


def described(lakes, table: str | None = None) -> list[dict]:
    with redirect_stdout(io.StringIO()) as out:
        write_description(lakes, table, "json", None)
    return json.loads(out.getvalue())


@pytest.fixture(scope="module")
def grown(videos, tmp_path_factory) -> Lake:
    """A lake of two runs and a refilter."""
    lake = Lake(str(tmp_path_factory.mktemp("grown") / "lake"))
    run(config(), str(videos), lake, limit=4)
    run(config(), str(videos), lake)
    refilter(lake, load_policy("tests/pipeline/keep_all.yaml"))
    return lake


def test_every_column_of_every_view_is_explained(lake: Lake):
    columns = described(lake)
    assert {"sources", "clips", "clips_decided", "dataset", "runs"} <= {c["table"] for c in columns}
    assert [c for c in columns if not c["meaning"]] == []


def test_a_measure_is_explained_with_unit_range_and_direction(lake: Lake):
    (motion,) = [c for c in described(lake, "clips_decided") if c["column"] == "motion_mean"]
    assert motion["type"] == "DOUBLE"
    assert motion["unit"]
    assert motion["range"]


def test_a_renamed_column_is_explained_by_where_it_comes_from(lake: Lake):
    told = {c["column"]: c["meaning"] for c in described(lake, "clips_decided")}
    assert told["source_duration_s"] == "length of the video"


def test_an_unknown_view_is_refused_with_a_guess(lake: Lake):
    with pytest.raises(ConfigError, match="did you mean 'clips'"):
        write_description(lake, "clisp", "table", None)


COUNTS = """SELECT (SELECT count(*) FROM sources) AS sources, (SELECT count(*) FROM clips) AS clips,
    (SELECT count(*) FROM runs) AS runs, (SELECT count(DISTINCT policy) FROM verdicts) AS policies"""


def test_a_version_of_sources_shows_all_tables_as_they_were(grown: Lake):
    (first,) = answer(grown, COUNTS, "1")
    (now,) = answer(grown, COUNTS)
    assert first["sources"] == 4
    assert 0 < first["clips"] < now["clips"]
    assert first["policies"] == 1
    assert now["policies"] == 2
    assert now["runs"] == 2


def test_a_time_shows_all_tables_as_they_were(grown: Lake):
    finished = rows(grown, "SELECT max(finished_at) FROM runs")[0][0]
    (then,) = answer(grown, COUNTS, (finished + timedelta(milliseconds=2)).isoformat())
    (now,) = answer(grown, COUNTS)
    assert then["sources"] == now["sources"]
    assert then["policies"] in (1, 2)
    assert answer(grown, COUNTS, (datetime.now(UTC) + timedelta(days=1)).isoformat()) == [now]


def test_a_copied_lake_keeps_its_past(grown: Lake, tmp_path):
    shutil.copytree(grown.uri, tmp_path / "copy", copy_function=shutil.copyfile)
    assert answer(Lake(str(tmp_path / "copy")), COUNTS, "1") == answer(grown, COUNTS, "1")


@pytest.mark.parametrize(
    ("when", "error", "words"),
    [
        ("yesterday", ConfigError, "2026-11-20T15:30"),
        ("99", LakeError, "no version 99: there are 0 to 2"),
        ("2001-01-01", LakeError, "nothing was committed"),
    ],
)
def test_a_past_that_is_none_is_explained(grown: Lake, when, error, words):
    with pytest.raises(error, match=words):
        answer(grown, COUNTS, when)


def test_the_past_cannot_be_seen_where_its_log_was_cleaned_up(own_lake: Lake):
    table = own_lake.open("sources")
    first = min(commit["timestamp"] for commit in table.history())
    table.create_checkpoint()
    (Path(own_lake.uri) / "sources" / "_delta_log" / f"{0:020}.json").unlink()
    with pytest.raises(LakeError, match="reaches back to"):
        lake_as_of(own_lake, datetime.fromtimestamp(first / 1000 - 1, UTC).isoformat()).exists()


def test_several_lakes_answer_one_query(lake: Lake, grown: Lake):
    (both,) = answer(
        {"old": lake, "new": grown},
        "SELECT count(*) AS n FROM old.clips_decided JOIN new.clips_decided USING (clip_id)",
    )
    assert both["n"] == rows(lake, "SELECT count(*) FROM clips")[0][0]
    policies = "SELECT policy FROM {}.verdicts GROUP BY 1 ORDER BY 1"
    lakes = {"old": lake, "new": grown}
    assert len(answer(lakes, policies.format("old"))) == 1
    assert len(answer(lakes, policies.format("new"))) == 2
    assert {c["table"] for c in described(lakes, "clips")} == {"old.clips", "new.clips"}


def test_several_lakes_share_a_time_but_no_version(lake: Lake, grown: Lake):
    lakes = {"old": lake, "new": grown}
    with pytest.raises(ConfigError, match="give a time"):
        answer(lakes, "SELECT 1", "1")
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    assert answer(lakes, "SELECT count(*) AS n FROM new.sources", later) == [{"n": 9}]


@pytest.mark.parametrize(
    "query",
    ["SELECT * FROM read_text('/etc/passwd')", "COPY old.sources TO '/tmp/stolen.csv'",
     "ATTACH '/tmp/x.db'", "SET enable_external_access = true"],
)  # fmt: skip
def test_several_lakes_are_as_shut_as_one(lake: Lake, grown: Lake, query):
    with pytest.raises(ConfigError, match=r"old\.clips"):
        answer({"old": lake, "new": grown}, query)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["/a", "/b"], "need names"),
        (["x=/a", "/b"], "need names"),
        (["x=/a", "X=/b"], "two lakes are called 'x'"),
        (["temp=/a", "x=/b"], "cannot be called 'temp'"),
    ],
)
def test_lakes_without_clear_names_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        named_lakes(given)


def test_an_address_with_an_equals_sign_is_no_name():
    assert named_lakes(["s3://bucket/date=1"]) == {"": "s3://bucket/date=1"}
    assert named_lakes(["a=s3://b/c=1", "b=/x"]) == {"a": "s3://b/c=1", "b": "/x"}
