"""The command as a user runs it: exit codes, messages, formats, speed of --help."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from winnow.pipeline.lake import Lake

WINNOW = Path(sys.executable).parent / "winnow"


def winnow(*arguments: object, code: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [WINNOW, *map(str, arguments)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_help_loads_nothing_heavy():
    program = (
        "import sys; from winnow.pipeline import cli\n"
        "heavy = {'torch', 'ray', 'pyarrow', 'numpy', 'cv2', 'av', 'duckdb', 'deltalake', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
    used = []
    for _ in range(3):
        before = os.times()
        winnow("--help")
        after = os.times()
        used.append(after.children_user + after.children_system
                    - before.children_user - before.children_system)  # fmt: skip
    assert min(used) < 0.5  # CPU seconds: the clock on the wall depends on who else is here


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["run", "--input", "/nosuch", "--lake", "/tmp/nosuch-lake"],
            ["/nosuch", "does not exist"],
        ),
        (["run", "--input", "/tmp", "--lake", "x", "--config", "nosuch"], ["nosuch", "cpu"]),
        (["run", "--nosuch"], ["--nosuch"]),
        (["sql", "SELECT 1", "--lake", "/nosuch"], ["no lake", "winnow run"]),
        (["report", "--lake", "/nosuch"], ["no lake"]),
        (["refilter", "--lake", "/nosuch", "--policy", "nosuch"], ["nosuch", "generated"]),
        (
            ["config", "validate", "--set", "stages.split.longest=3"],
            ["stages", "longest", "unknown"],
        ),
        (["demo", "--out", "/usr"], ["/usr", "not empty"]),
    ],
)
def test_a_mistake_is_explained_and_ends_with_2(arguments, words):
    _, errors = winnow(*arguments, code=2)
    for word in words:
        assert word in errors


def test_a_run_prints_one_json_object(videos, tmp_path):
    output, errors = winnow(
        "run", "--input", videos, "--lake", tmp_path / "lake", "--limit", 2, "--json",
        "--set", "stages.split.detector.kind=none",
    )  # fmt: skip
    content = json.loads(output)
    assert content["sources_in"] == 2
    assert content["balanced"] is True
    assert "2 of 2 sources" in errors


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_sql_answers_in_the_wished_format(lake: Lake, form):
    query = "SELECT verdict, count(*) AS n FROM clips_decided GROUP BY ALL ORDER BY 1"
    output, _ = winnow("sql", query, "--lake", lake.uri, "--format", form)
    assert "keep" in output
    if form == "json":
        assert {"verdict": "keep", "n": 3} in json.loads(output)


def test_sql_writes_parquet(lake: Lake, tmp_path):
    import pyarrow.parquet

    out = tmp_path / "x.parquet"
    winnow("sql", "SELECT * FROM sources", "--lake", lake.uri, "--format", "parquet", "--out", out)
    assert pyarrow.parquet.read_table(out).num_rows == 9


@pytest.mark.parametrize(
    "query",
    ["SELECT * FROM read_text('/etc/passwd')", "COPY sources TO '/tmp/stolen.csv'",
     "ATTACH '/tmp/x.db'", "SET enable_external_access = true"],
)  # fmt: skip
def test_sql_reaches_nothing_but_the_lake(lake: Lake, query):
    winnow("sql", query, "--lake", lake.uri, code=2)


def test_report_is_one_file_about_the_lake(lake: Lake, tmp_path):
    output, _ = winnow("report", "--lake", lake.uri, "--out", tmp_path / "r.html")
    assert "r.html" in output
    page = (tmp_path / "r.html").read_text()
    assert "not_video" in page
    assert "an apple falls" in page


def test_the_schema_accepts_the_shipped_configuration():
    schema = json.loads(winnow("config", "schema")[0])
    assert "longest_s" in schema["$defs"]["SplitConfig"]["properties"]
    operators = schema["$defs"]["FilterConfig"]["properties"]["operators"]["properties"]
    assert "motion" in operators


def test_doctor_and_operators_answer():
    findings = json.loads(winnow("doctor", "--json")[0])
    assert not [f for f in findings if f["state"] == "bad"]
    assert {f["subject"] for f in findings} >= {"ffmpeg", "GPU", "Ray", "Milvus"}
    listed = json.loads(winnow("operators", "--json")[0])
    assert {"motion", "text", "fingerprint"} <= {o["name"] for o in listed}
    started = time.monotonic()
    assert "motion_mean" in winnow("operators")[0]
    assert time.monotonic() - started < 60
