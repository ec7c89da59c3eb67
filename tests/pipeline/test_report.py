"""The report: what it counts, what it draws, and that hostile text stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import cv2
import duckdb
import numpy as np
import pytest

from winnow.operators.errors import LakeError, StorageError
from winnow.pipeline.report import RuleShown, simple_threshold, write_report
from winnow.pipeline.report_charts import Spread, binning
from winnow.pipeline.report_rules import comparisons

NASTY_PROMPT = (
    "</script><script>alert('p')</script> \"quoted\" & <img src=x onerror=alert(1)> 湯 🥣"
)
NASTY_FILE = 'o\'brien "the" <b>bold<b>.mp4'
RULES = (
    RuleShown("moves", "too little motion", "motion_mean < 0.5", "motion_mean", 0.5, "below"),
    RuleShown("length", "too short or long", "duration_s < 2 OR duration_s > 60"),
    RuleShown("frozen", "frozen <b>", "frozen_share > 0.5 AND frozen_longest_s >= 1"),
)

TABLES = """
CREATE TABLE sources (source_id TEXT, uri TEXT, status TEXT, error_kind TEXT, error TEXT,
    attempt_id TEXT, run_id TEXT, frames INT, fps DOUBLE, width INT, height INT, duration_s DOUBLE,
    prompt TEXT, generator TEXT, group_key TEXT, copy_of TEXT, seconds MAP(TEXT, DOUBLE));
CREATE TABLE clips (clip_id TEXT, source_id TEXT, attempt_id TEXT, start_s DOUBLE, end_s DOUBLE,
    start_frame INT, end_frame INT, shots_in_source INT, duration_s DOUBLE, motion_mean FLOAT,
    motion_method TEXT, motion_error TEXT, frozen_share DOUBLE, frozen_longest_s DOUBLE,
    frozen_flag BOOLEAN, frozen_error TEXT, thumbnail_jpeg BLOB);
CREATE TABLE verdicts (clip_id TEXT, policy TEXT, verdict TEXT, reasons TEXT[], duplicate_of TEXT,
    similarity DOUBLE);
CREATE TABLE dataset (clip_id TEXT, media_uri TEXT, content_type TEXT, resolution TEXT,
    aspect_ratio TEXT, length TEXT, frames INT, fps DOUBLE, width INT, height INT, bytes BIGINT);
CREATE TABLE runs (run_id TEXT, started_at TIMESTAMPTZ, finished_at TIMESTAMPTZ, engine TEXT,
    policy TEXT, config TEXT, versions TEXT, sources_in INT, counts TEXT, stages TEXT,
    wall_s DOUBLE);
CREATE VIEW clips_decided AS
    SELECT c.*, s.uri, s.prompt, s.generator, v.policy, v.verdict, v.reasons, v.duplicate_of,
        v.similarity
    FROM clips c LEFT JOIN (SELECT * FROM sources WHERE status = 'done') s USING (source_id)
    LEFT JOIN verdicts v USING (clip_id);
"""


def strip(seed: int, width: int = 160) -> bytes:
    image = np.random.default_rng(seed).integers(0, 255, (9, width // 10 * 4, 3), np.uint8)
    image = cv2.resize(image, (width * 4, 90), interpolation=cv2.INTER_NEAREST)
    return bytes(cv2.imencode(".jpg", image)[1].tobytes())


def empty_lake() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute(TABLES)
    return connection


def add_clip(
    lake: duckdb.DuckDBPyConnection,
    number: int,
    verdict: str = "keep",
    reasons: tuple[str, ...] = (),
    *,
    motion: float | None = 2.0,
    duration: float = 5.0,
    prompt: str | None = "a cat on a mat",
    uri: str | None = None,
    picture: bytes | None = None,
    of: str | None = None,
) -> None:
    uri = uri or f"/night/clip_{number}.mp4"
    lake.execute(
        "INSERT INTO sources (source_id, uri, status, attempt_id, duration_s, prompt, generator, "
        "seconds) VALUES (?, ?, 'done', 'a', ?, ?, 'world-1', MAP {'split': 0.5})",
        [f"s{number}", uri, duration, prompt],
    )
    error = None if motion is not None else "MeasureError: <i>no</i> frames"
    lake.execute(
        "INSERT INTO clips VALUES (?, ?, 'a', 0, ?, 0, 80, 1, ?, ?, 'vectors', ?, ?, 0.0, false, "
        "NULL, ?)",
        [f"c{number}", f"s{number}", duration, duration, motion, error, number % 7 / 10, picture],
    )
    lake.execute(
        "INSERT INTO verdicts VALUES (?, 'generated', ?, ?, ?, ?)",
        [f"c{number}", verdict, list(reasons), of, 0.97 if of else None],
    )


@pytest.fixture
def lake() -> Iterator[duckdb.DuckDBPyConnection]:
    """40 clips: 20 kept, 12 rejected, 5 duplicates, 3 that could not be judged."""
    with empty_lake() as connection:
        for n in range(20):
            add_clip(connection, n, picture=strip(n), motion=1 + n / 10)
        for n in range(20, 28):
            add_clip(connection, n, "reject", ("moves",), motion=0.1, picture=strip(n, 50))
        for n in range(28, 31):
            add_clip(connection, n, "reject", ("moves", "length"), motion=0.2, duration=1.0)
        add_clip(connection, 31, "reject", ("length",), duration=1.5, prompt=NASTY_PROMPT,
                 uri=f"s3://bucket/{NASTY_FILE}", picture=b"<svg onload=alert(1)>")  # fmt: skip
        for n in range(32, 37):
            add_clip(connection, n, "duplicate", of=f"c{n - 32}", prompt="x" * 300)
        for n in range(37, 40):
            add_clip(connection, n, "error", ("moves",), motion=None, prompt=None)
        connection.execute(
            "INSERT INTO sources (source_id, uri, status, error_kind, error) VALUES "
            "('f1', '/night/<b>.mp4', 'failed', 'truncated', 'moov atom <not> found'), "
            "('f2', '/night/b.mp4', 'failed', 'truncated', 'moov atom not found'), "
            "('f3', '/night/c.mp4', 'failed', 'empty', 'no bytes'), "
            "('s1', '/night/again.mp4', 'copy', NULL, NULL), "
            "('i1', '/night/running.mp4', 'incomplete', NULL, 'no marker')"
        )
        stages = [
            {"stage": "split", "seconds": 2.0, "records": 40, "clips": 40, "frames": 3200},
            {"stage": "cheap", "seconds": 8.0, "records": 40, "clips": 40, "frames": 3200},
            {"stage": "cheap/motion", "seconds": 4.0, "records": 40, "clips": 40, "frames": 3200},
        ]
        config = {"storage": {"secret_access_key": "HUSH"}, "lake": "s3://me:HUSH@host/lake"}
        connection.execute(
            "INSERT INTO runs VALUES ('run-7', '2026-11-20 10:00:00+00', '2026-11-20 10:01:00+00', "
            "'inline', 'generated', ?, '{\"winnow\": \"0.1\"}', 45, '{}', ?, 60.0)",
            [json.dumps(config), json.dumps(stages)],
        )
        yield connection


class Page(HTMLParser):
    """A page taken apart: tags with attributes, text without scripts and styles."""

    VOID = frozenset({"meta", "link", "img", "input", "br", "hr", "path", "rect", "circle"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        optional = {"li", "p", "td", "tr", "th"}
        while self.open and self.open[-1] != tag and self.open[-1] in optional:
            self.open.pop()
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"] and data.strip():
            self.words.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def having(self, attribute: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.tags if attribute in attributes]

    def classed(self, tag: str, name: str) -> list[dict[str, str]]:
        return [a for t, a in self.tags if t == tag and name in a.get("class", "").split()]


def report(lake: duckdb.DuckDBPyConnection, folder: Path, rules=RULES, **options) -> Page:
    out = folder / "deep" / "report.html"
    write_report(lake, rules, out, title="lake <1>", **options)
    return Page(out.read_text(encoding="utf-8"))


def test_page_loads_nothing_and_runs_only_its_own_script(lake, tmp_path):
    page = report(lake, tmp_path)
    for attribute in ("src", "href", "data", "action", "poster", "srcset"):
        for tag in page.having(attribute):
            assert tag[attribute].startswith(("#", "data:")), tag
    assert not re.search(r"url\((?!data:image/jpeg;base64,)", page.html)
    assert "@import" not in page.html
    policy = next(t["content"] for t in page.having("http-equiv"))
    assert "default-src 'none'" in policy
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert len(scripts) == 2
    assert scripts[0]["type"] == "application/json"
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]


def test_script_has_the_hash_that_the_policy_allows(lake, tmp_path):
    page = report(lake, tmp_path)
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in next(t["content"] for t in page.having("http-equiv"))


def test_hostile_text_is_shown_as_text(lake, tmp_path):
    page = report(lake, tmp_path)
    assert NASTY_PROMPT in page.text
    assert NASTY_FILE in page.text
    assert "frozen <b>" in page.text
    assert "moov atom <not> found" in page.text
    assert "MeasureError: <i>no</i> frames" in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "<svg onload" not in page.html
    assert "HUSH" not in page.html


def test_counts_are_those_of_the_tables(lake, tmp_path):
    text = report(lake, tmp_path).text
    assert "20 of 40 clips kept" in text
    assert "45 files in = 40 done + 1 copy + 3 failed + 1 incomplete ✓" in text
    assert "40 clips = 20 keep + 12 reject + 5 duplicate + 3 error ✓" in text
    assert "Ledger balances" in text
    # moves: 11 rejected, 8 of them only for that, 3 that it could not judge.
    assert "moves too little motion motion_mean < 0.5 11 27.5 % 8 3" in text
    assert "length too short or long duration_s < 2 OR duration_s > 60 4 10.0 % 1 0" in text
    assert "truncated 2" in text
    assert "motion 3 3 × e.g. clip_37.mp4" in text


def test_funnel_loses_each_clip_once(lake, tmp_path):
    text = report(lake, tmp_path).text
    funnel = text[text.index("Lost here") : text.index("How often each rule speaks")]
    assert "measured without error 37" in funnel
    assert "passed motion 26" in funnel
    assert "passed shots and length 25" in funnel
    assert "passed frozen 25" in funnel
    assert "not a duplicate 20" in funnel
    assert "kept 20" in funnel


def test_funnel_steps_can_be_named_by_stage(lake, tmp_path):
    rules = [RuleShown(r.name, r.reason, r.predicate, stage="cheap") for r in RULES]
    text = report(lake, tmp_path, rules).text
    assert "passed cheap 25" in text
    assert "passed motion" not in text


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("DELETE FROM verdicts WHERE clip_id = 'c3'", "1 clips have no verdict"),
        ("INSERT INTO clips SELECT * FROM clips WHERE clip_id = 'c3'", "1 clips are there twice"),
        ("DELETE FROM sources WHERE source_id = 's3'", "belong to no source that is done"),
        ("UPDATE sources SET status = 'lost' WHERE source_id = 'f1'", "1 unaccounted"),
        ("UPDATE runs SET sources_in = 50", "listed 50 files, but only 45 have a row"),
    ],
)
def test_a_ledger_that_does_not_balance_is_said_loudly(lake, tmp_path, damage, words):
    lake.execute(damage)
    page = report(lake, tmp_path)
    assert "Ledger does not balance" in page.text
    assert words in page.text
    assert page.classed("a", "bad")


def test_verdicts_of_a_second_policy_do_not_count_twice(lake, tmp_path):
    lake.execute("CREATE TABLE latest AS SELECT * FROM verdicts")
    lake.execute("INSERT INTO verdicts SELECT * REPLACE ('older' AS policy) FROM verdicts")
    lake.execute(
        "CREATE OR REPLACE VIEW clips_decided AS SELECT c.*, s.uri, s.prompt, s.generator, "
        "v.policy, v.verdict, v.reasons, v.duplicate_of, v.similarity FROM clips c "
        "JOIN (SELECT * FROM sources WHERE status = 'done') s USING (source_id) "
        "JOIN latest v USING (clip_id)"
    )
    text = report(lake, tmp_path).text
    assert "40 clips = 20 keep" in text
    assert "Ledger balances" in text


def test_galleries_show_reasons_scores_and_the_original_of_a_duplicate(lake, tmp_path):
    page = report(lake, tmp_path)
    cards = {t["data-clip"]: t for t in page.classed("article", "clip")}
    assert len(cards) == 40
    assert json.loads(cards["c28"]["data-reasons"]) == ["moves", "length"]
    assert cards["c32"]["data-verdict"] == "duplicate"
    assert "0.970 alike" in page.text
    assert "duplicates clip_0.mp4" in page.text
    # 28 clips have a strip, and the five originals beside their duplicates show theirs again.
    pictures = [t for t in page.classed("div", "frames") if "style" in t]
    assert len(pictures) == 28 + 5
    first = re.search(r"base64,([^)]+)\)", pictures[0]["style"])
    assert first is not None
    assert cv2.imdecode(np.frombuffer(base64.b64decode(first[1]), np.uint8), 1).shape[0] == 90
    details = json.loads(page.scripts[0])
    row = dict(zip([c["name"] for c in details["columns"]], details["clips"]["c28"], strict=True))
    assert row["motion_mean"] == pytest.approx(0.2)
    assert row["duration_s"] == 1.0


def test_galleries_are_capped_and_say_so(lake, tmp_path):
    page = report(lake, tmp_path, clips_per_gallery=4)
    cards = page.classed("article", "clip")
    assert [c["data-verdict"] for c in cards].count("reject") == 4
    assert "4 of 12 shown" in page.text
    assert "4 of 20 shown" in page.text
    assert "all 3" in page.text
    reasons = {reason for c in cards for reason in json.loads(c["data-reasons"])}
    assert {"moves", "length"} <= reasons


def test_page_does_not_grow_with_the_lake(lake, tmp_path):
    small = len(report(lake, tmp_path).html)
    lake.execute(
        "INSERT INTO clips SELECT clips.* REPLACE (clip_id || '-' || i AS clip_id) "
        "FROM clips, range(500) AS r(i)"
    )
    lake.execute(
        "INSERT INTO verdicts SELECT verdicts.* REPLACE (clip_id || '-' || i AS clip_id) "
        "FROM verdicts, range(500) AS r(i)"
    )
    page = report(lake, tmp_path)
    assert "10,020 of 20,040 clips kept" in page.text
    cards = page.classed("article", "clip")
    assert len(cards) == 4 * 60
    assert len(page.html) < small + 240 * 40_000


def test_an_oversized_or_broken_thumbnail_is_left_out(tmp_path):
    with empty_lake() as connection:
        add_clip(connection, 0, picture=strip(0) + bytes(200_000))
        add_clip(connection, 1, picture=strip(1)[:12])
        add_clip(connection, 2, picture=b"\xff\xd8\xff")
        page = report(connection, tmp_path)
    assert len(page.classed("div", "none")) == 3
    assert len(page.html) < 100_000


def test_histogram_bars_add_up_and_the_threshold_parts_them(lake, tmp_path):
    page = report(lake, tmp_path)
    charts = {t["aria-label"].split(",")[0]: t for t in page.having("data-bins")}
    motion = json.loads(charts["Histogram of motion_mean"]["data-bins"])
    totals: dict[str, int] = {}
    for _, counts in motion:
        for verdict, count in counts.items():
            totals[verdict] = totals.get(verdict, 0) + count
    assert totals == {"keep": 20, "reject": 12, "duplicate": 5}
    assert "rejected < 0.5" in charts["Histogram of motion_mean"]["aria-label"]
    below = [counts for words, counts in motion if words.endswith("to 0.5")]
    assert below, "the threshold is an edge of a bin"
    text = page.text
    assert "3 not measured" in text
    assert "rejects > 60, off the axis" in text


def test_throughput_counts_parts_inside_their_stage(lake, tmp_path):
    text = report(lake, tmp_path).text
    assert "split 2.0 s 40 40 20 1,600" in text
    assert "cheap 8.0 s 40 40 5 400 motion 4.0 s 40 40 10 800" in text


def test_throughput_falls_back_to_the_seconds_of_the_sources(lake, tmp_path):
    lake.execute("DELETE FROM runs")
    assert "split 20.0 s 40" in report(lake, tmp_path).text


def test_empty_lake(tmp_path):
    with empty_lake() as connection:
        page = report(connection, tmp_path, ())
    assert "No clips yet" in page.text
    assert "Ledger balances" in page.text
    assert not page.classed("article", "clip")


def test_lake_with_only_unreadable_files_and_unmeasured_clips(tmp_path):
    with empty_lake() as connection:
        add_clip(connection, 0, "error", ("moves",), motion=None)
        connection.execute("UPDATE clips SET frozen_share = NULL, motion_mean = 'nan'")
        text = report(connection, tmp_path).text
    assert "0 of 1 clips kept" in text
    assert "never measured" in text


def test_a_missing_view_is_a_lake_error(tmp_path):
    with empty_lake() as connection:
        connection.execute("DROP TABLE runs")
        with pytest.raises(LakeError, match="'runs'"):
            report(connection, tmp_path)


def test_an_unwritable_place_is_a_storage_error(lake, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="--out"):
        write_report(lake, RULES, tmp_path / "file" / "report.html", title="x")


def test_report_leaves_no_table_and_no_partial_file(lake, tmp_path):
    before = lake.execute("SELECT table_name FROM duckdb_tables() ORDER BY 1").fetchall()
    report(lake, tmp_path)
    report(lake, tmp_path)
    assert lake.execute("SELECT table_name FROM duckdb_tables() ORDER BY 1").fetchall() == before
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("predicate", "found"),
    [
        ("motion_mean < 0.4", [("motion_mean", 0.4, "below")]),
        ('0.5 <= c."odd name"', [("odd name", 0.5, "above")]),
        ("a < -2e-3 OR a > 60", [("a", -0.002, "below"), ("a", 60.0, "above")]),
        ("x NOT BETWEEN 2 AND 60", [("x", 2.0, "below"), ("x", 60.0, "above")]),
        ("s = 'a < 3' OR b > .5", [("b", 0.5, "above")]),
        ("NOT (a < 1)", []),
        ("abs(a) < 1", []),
        ("a / 2 < 3", []),
        ("a < 3 * b", []),
        ("coalesce(a, 0) < 1", []),
        ("a IS NULL", []),
        ("((((", []),
        ("", []),
    ],
)
def test_thresholds_are_read_out_of_predicates(predicate, found):
    assert simple_threshold(predicate) == found


def test_a_comparison_under_and_does_not_reject_alone():
    assert [c.alone for c in comparisons("a > 1 AND (b > 2 OR c > 3)")] == [False, False, False]
    assert [c.alone for c in comparisons("(a > 1) OR (b > 2 AND c > 3)")] == [True, False, False]


@pytest.mark.parametrize("predicate", ["v < 0.3", "v <= 0.3", "v > 0.3", "v >= 0.3"])
def test_bins_part_values_as_the_rule_does(predicate):
    values = [0.0, 0.1, 0.2, 0.29999, 0.3, 0.30001, 0.7, 1.0]
    bins = binning(Spread(0.0, 1.0, 0.0, 1.0, False), comparisons(predicate))
    with duckdb.connect() as connection:
        found = connection.execute(
            f"SELECT {bins.sql('v')}, {predicate} FROM (SELECT unnest(?::DOUBLE[]) AS v)", [values]
        ).fetchall()
    rejected = {number for number, rejects in found if rejects}
    kept = {number for number, rejects in found if not rejects}
    assert not rejected & kept


def test_bins_of_a_long_tail_are_logarithmic_and_hold_every_value():
    bins = binning(Spread(0.5, 5000.0, 0.1, 1e6, False), comparisons("v < 40"))
    assert bins.log
    assert bins.place(40.0) == pytest.approx(
        (0 - bins.first) / (bins.last - bins.first + 1), abs=1e-9
    )
    with duckdb.connect() as connection:
        low, high = connection.execute(
            f"SELECT min({bins.sql('v')}), max({bins.sql('v')}) FROM "
            "(SELECT unnest([0.1, 3, 40, 1e6]) AS v)"
        ).fetchone() or (0, 0)
    assert (low, high) == (bins.first, bins.last)
