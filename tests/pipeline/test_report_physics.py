"""The report of a lake that the physics critic judged: scores, what has none, and untrusted words."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import duckdb
import pytest

from tests.pipeline.test_report import Page, add_clip, empty_lake
from tests.pipeline.test_report import report as report_of
from tests.pipeline.test_report_models import part, table
from winnow.operators.critic.judgement import entropy, expectation
from winnow.operators.physics import Physics
from winnow.pipeline.lake import Lake
from winnow.pipeline.lake_report import write_lake_report
from winnow.pipeline.report import RuleShown
from winnow.pipeline.report_physics import MOST_GENERATORS

NASTY = "</template><script>alert('trace')</script> <img src=x onerror=alert(1)>"
HEADING = "Physics scores"


def judged(*probabilities: float, mode: str = "direct", **more: Any) -> dict[str, Any]:
    """The columns of a clip that has a score."""
    likeliest = max(range(5), key=lambda k: (probabilities[k], -k)) + 1
    return {
        "physics_score": expectation(probabilities),
        **{f"physics_p{k + 1}": p for k, p in enumerate(probabilities)},
        "physics_argmax": likeliest,
        "physics_entropy": entropy(probabilities),
        "physics_leaked": 0.125 if mode == "direct" else None,
        "physics_status": "ok",
        "physics_mode": mode,
        "physics_direct_score": expectation(probabilities),
        "physics_windows": 1,
        "physics_worst_window_start_s": 0.0,
        "physics_fps": 4.0,
        "physics_frames": 20,
        "physics_pixels": 102400,
        "physics_prompt": "videophy2@0123",
        "physics_model": "org/vlm@abc",
        **more,
    }


def unscored(status: str, *notes: str, **more: Any) -> dict[str, Any]:
    return {"physics_status": status, "physics_notes": list(notes), "physics_windows": 1, **more}


CLIPS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "falls": ("keep", "one", judged(0.0, 0.05, 0.1, 0.6, 0.25)),
    "flies": ("reject", "one", judged(0.7, 0.2, 0.05, 0.05, 0.0)),
    "thinks": (
        "keep",
        "two",
        judged(
            0.0, 0.0, 2 / 3, 1 / 3, 0.0,
            mode="reasoning",
            physics_direct_score=2.5,
            physics_samples=[3, None, 3, 4],
            physics_trace=f"First it falls.\nThen it floats. {NASTY}",
            physics_windows=3,
            physics_worst_window_start_s=10.5,
            physics_notes=["too close to call: the budget of 9 requests is spent"],
        ),
    ),
    "mumbles": ("error", "two", unscored("unparsed", f"no score: {NASTY}", physics_mode="reasoning",
                                         physics_samples=[None, None])),
    "waits": ("error", "two", unscored("unscored", "the budget of 9 requests is spent")),
    "waits_too": ("error", None, unscored("unscored", "the budget of 9 requests is spent")),
    "broken": ("error", None, {"physics_error": f"MeasureError: the server is gone {NASTY}"}),
    "unseen": ("keep", "two", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def lake(tmp_path_factory) -> Lake:
    """Tables as a run writes them; a policy whose rules read what is computed while it decides."""
    lake = Lake(str(tmp_path_factory.mktemp("physics") / "lake"))
    lake.create([*Physics.columns, Physics.error_column()])
    rules = [
        {"name": "physics", "reject": "physics_calibrated_good < 0.3", "reason": "breaks physics"},
        {
            "name": "precise",
            "reject": "NOT physics_calibrated_keep_95",
            "reason": "not sure enough",
        },
    ]
    lake.append(
        "runs",
        [
            {
                "run_id": "r",
                "started_at": datetime(2026, 11, 20, tzinfo=UTC),
                "sources_in": len(CLIPS),
                "policy_rules": json.dumps({"name": "p", "rules": rules}),
            }
        ],
    )
    for number, (clip_id, (verdict, generator, said)) in enumerate(CLIPS.items()):
        own = {"attempt_id": f"a{number}", "source_id": f"s{number}"}
        times = {"start_s": 0.0, "end_s": 5.0, "start_frame": 0, "end_frame": 120}
        lake.append("clips", [{**own, "clip_id": clip_id, **times, **said}])
        decided = {"policy": "p", "verdict": verdict, "seq": 1}
        reasons = ["physics", "precise"] if verdict == "reject" else []
        clip = {"attempt_id": f"a{number}", "clip_id": clip_id}
        lake.append("verdicts", [{**clip, **decided, "reasons": reasons}])
        seen = {"uri": f"/v/{clip_id}.mp4", "status": "done", "seq": number}
        lake.append("sources", [{**own, **seen, "generator": generator}])
    return lake


@pytest.fixture(scope="module")
def page(lake, tmp_path_factory) -> Page:
    out = tmp_path_factory.mktemp("report") / "report.html"
    return Page(write_lake_report(lake, out).read_text("utf-8"))


def card(page: Page, clip_id: str) -> str:
    """What stands on the card itself."""
    html = part(page, clip_id).html.removesuffix("</article>")
    return Page(html.split("<template>")[0] + "</article>").text


def at_length(page: Page, clip_id: str) -> Page:
    html = part(page, clip_id).html
    start = html.index('<section class="physics"')
    return Page(html[start : html.index("</section>", start)] + "</section>")


def test_the_card_tells_the_score_or_why_there_is_none(page):
    assert "physics 4.05" in card(page, "falls")
    assert " ok" not in card(page, "falls")
    assert "physics unparsed" in card(page, "mumbles")
    assert "physics unscored" in card(page, "waits")
    assert "physics no answer" in card(page, "broken")
    assert "physics" not in card(page, "unseen")
    assert "Answers and scores" in card(page, "falls")
    assert "All scores" in card(page, "unseen")


def test_the_dialog_draws_the_five_probabilities(page):
    told = at_length(page, "falls")
    heights = [tag["style"] for tag in told.having("style")]
    assert heights[:5] == [f"--part:{p:.3f}" for p in (0, 0.05, 0.1, 0.6, 0.25)]
    # 4.05 lies a little right of the middle of the fourth bar.
    assert heights[5:] == ["left:71.0%"]
    (bars,) = told.having("aria-label")
    assert bars["aria-label"].endswith("1: 0 %, 2: 5.0 %, 3: 10.0 %, 4: 60.0 %, 5: 25.0 %")
    assert told.html.index("likeliest") < told.html.index("60.0 %</b>")
    assert told.html.count('class="likeliest"') == 1
    for words in (
        "score 4.05 of 5", "likeliest 4", "entropy 1.03", "leaked 12.5 %", "mode direct",
        "20 frames, 4 a second, at most 102,400 pixels each", "org/vlm@abc, videophy2@0123",
    ):  # fmt: skip
        assert words in told.text
    assert "samples" not in told.text
    assert "status" not in told.text
    assert "worst" not in told.text, "one window is the worst by itself"


def test_a_reasoning_tells_its_samples_and_its_direct_score(page):
    told = at_length(page, "thinks").text
    assert "mode reasoning, direct 2.5" in told
    assert "samples 3, none , 3, 4" in told
    assert "windows 3, the worst from 10.5 s" in told
    assert "too close to call: the budget of 9 requests is spent" in told
    assert "leaked" not in told


def test_a_clip_without_a_score_draws_none_and_says_why(page):
    told = at_length(page, "mumbles")
    assert "odds" not in told.html
    assert "status unparsed" in told.text
    assert "mode reasoning" in told.text
    assert f"no score: {NASTY}" in told.text
    assert "samples none , none" in told.text
    broken = at_length(page, "broken").text
    assert f"status no answer MeasureError: the server is gone {NASTY}" in broken


def test_the_trace_is_folded_and_stays_text(page):
    told = at_length(page, "thinks")
    folded = told.html[told.html.index("<details>") : told.html.index("</details>")]
    assert "First it falls.\nThen it floats. &lt;/template&gt;&lt;script&gt;" in folded
    assert page.html.count("alert('trace')") == 0
    assert {tag for tag, _ in page.tags} & {"img", "iframe"} == set()
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 2
    # Kilobytes a clip: neither a class to count nor a cell of the table of scores.
    assert "physics_trace" not in page.text


def test_scores_by_generator_leave_out_what_has_none(page):
    assert table(page, HEADING) == [
        "all 3 1 0 1 1 0 2.94 4",
        "one 2 1 0 0 1 0 2.75 0",
        "two 1 0 0 1 0 0 3.33 2",
        "not told 0 0 0 0 0 0 – 2",
    ]


def test_statuses_are_counted(page):
    assert "7 clips to judge: 3 ok, 2 unscored , 1 no answer , 1 unparsed ." in page.text


def test_rules_on_calibrated_columns_are_shown_and_draw_nothing(page):
    assert "physics_calibrated_good < 0.3" in page.text
    assert "passed physics 3" in page.text
    assert "Histogram of physics_score" in [
        tag["aria-label"].split(",")[0] for tag in page.having("data-bins")
    ]
    assert not any("calibrated" in tag["aria-label"] for tag in page.having("data-bins"))
    assert "physics breaks physics" in card(page, "flies")


def older(
    *columns: str, rows: dict[int, tuple[Any, ...]], clips: int = 4
) -> duckdb.DuckDBPyConnection:
    """An older lake with some columns of the critic, and values of some of its clips."""
    connection = empty_lake()
    for number in range(clips):
        add_clip(connection, number)
    for column in columns:
        connection.execute(f"ALTER TABLE clips ADD COLUMN {column}")
    for number, values in rows.items():
        names = [column.split()[0] for column in columns]
        sets = ", ".join(f"{name} = ?" for name in names)
        connection.execute(f"UPDATE clips SET {sets} WHERE clip_id = 'c{number}'", [*values])
    # A view does not see columns that were added after it.
    view = connection.execute("SELECT sql FROM duckdb_views() WHERE view_name = 'clips_decided'")
    sql = str((view.fetchone() or ("",))[0])
    connection.execute(sql.replace("CREATE VIEW", "CREATE OR REPLACE VIEW"))
    return connection


def test_a_lake_without_the_critic_says_nothing_of_physics(tmp_path):
    with older(rows={}) as connection:
        page = report_of(
            connection, tmp_path, [RuleShown("p", "r", "physics_calibrated_bad > 0.5")]
        )
    assert HEADING not in page.text
    assert "What the models said" not in page.text


def test_a_lake_whose_critic_has_not_run_says_nothing_of_physics(tmp_path):
    with older("physics_score DOUBLE", "physics_status TEXT", rows={}) as connection:
        page = report_of(connection, tmp_path, ())
    assert HEADING not in page.text


def test_columns_that_are_partly_null_are_shown_as_far_as_they_go(tmp_path):
    columns = ("physics_score DOUBLE", "physics_p1 DOUBLE", "physics_p5 DOUBLE")
    nan = float("nan")
    rows = {0: (4.5, None, 0.75), 1: (nan, nan, nan), 2: (9.0, 7.0, None), 3: (2.5, None, None)}
    with older(*columns, rows=rows) as connection:
        page = report_of(connection, tmp_path, ())
    (row,) = table(page, HEADING)
    assert row == "all 3 0 0 0 0 0 5.33 1"
    assert "4 clips to judge: 4 not told" in page.text
    first = at_length(page, "c0")
    assert [tag["style"] for tag in first.having("style")] == [
        *["--part:0.000"] * 4, "--part:0.750", "left:80.0%",
    ]  # fmt: skip
    assert "status not told" in first.text
    assert "physics" not in card(page, "c1")
    beyond = at_length(page, "c2")
    assert beyond.having("style")[0]["style"] == "--part:1.000"
    assert "left" not in beyond.html, "a score off the scale has no place on it"
    assert "odds" not in at_length(page, "c3").html


def test_many_generators_are_counted_but_not_all_listed(tmp_path):
    columns = ("physics_score DOUBLE", "physics_argmax INT", "physics_status TEXT")
    with older(*columns, rows={}, clips=MOST_GENERATORS + 3) as connection:
        connection.execute("UPDATE sources SET generator = 'g' || source_id")
        connection.execute("UPDATE clips SET physics_score = 3, physics_argmax = 3")
        connection.execute("UPDATE clips SET physics_status = 'ok'")
        page = report_of(connection, tmp_path, ())
    rows = table(page, HEADING)
    assert len(rows) == MOST_GENERATORS + 1
    assert rows[0] == f"all {MOST_GENERATORS + 3} 0 0 {MOST_GENERATORS + 3} 0 0 3 0"
    assert "and 3 more generators, counted in all" in page.text
