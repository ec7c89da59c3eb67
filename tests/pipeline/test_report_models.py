"""The report of a lake in which models spoke: all of it is shown, and none of it is trusted."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import duckdb
import pytest

from tests.pipeline.test_report import NASTY_PROMPT, Page, add_clip, empty_lake
from tests.pipeline.test_report import report as report_of
from winnow.operators.aesthetic import Aesthetic
from winnow.operators.content_type import ContentType
from winnow.operators.prompt_match import PromptMatch
from winnow.operators.vlm_filter import VlmFilter
from winnow.pipeline.lake import Lake
from winnow.pipeline.lake_report import write_lake_report
from winnow.pipeline.report_charts import STEPS_HEIGHT, steps

OPERATORS = (Aesthetic, ContentType, PromptMatch, VlmFilter)
NASTY = "<script>alert('said')</script> & <img src=x onerror=alert(1)>"
COMMIT = "18d0535469bb561bf468d76c1d73aa35156c922b"


def window(number: int, text: str, status: str = "ok", **more: Any) -> dict[str, Any]:
    return {
        "window": number,
        "start_s": 5.0 * number,
        "end_s": 5.0 * number + 5,
        "status": status,
        "text": text,
        "problems": [],
        "error": None,
        "frames": 10,
        **more,
    }


def asked(worst: str | None, windows: Any, **more: Any) -> dict[str, Any]:
    votes = {"morphing": 0.0, "floating": 0.0} | ({worst: 1.0} if worst else {})
    return {
        "vlm_filter_status": "ok",
        "vlm_filter_votes": list(votes.items()),
        "vlm_filter_worst": max(votes.values()),
        "vlm_filter_worst_question": worst,
        "vlm_filter_flags": [worst] if worst else [],
        "vlm_filter_classes": [("camera", "static"), ("style", NASTY)],
        "vlm_filter_answers": json.dumps(windows),
        "vlm_filter_model": "served/vlm",
        "vlm_filter_prompt": "generated@0123",
        **more,
    }


SAID = json.dumps(
    {
        "morphing": "no",
        "floating": "yes",
        "camera": "static",
        "style": NASTY,
        "evidence": f"it floats {NASTY}",
    }
)
CLIPS: dict[str, tuple[str, str, str | None, dict[str, Any]]] = {
    "kept": ("keep", "cooking", "one", asked(None, [window(0, SAID.replace("yes", "unsure"))])),
    "floats": ("reject", "cooking", "one", asked("floating", [window(0, SAID), window(1, SAID)])),
    "again": ("reject", "driving", "two", asked("floating", [window(0, "{" * 500)])),
    "third": ("keep", "driving", None, asked("morphing", "no list")),
    "refuses": (
        "error",
        "driving",
        "two",
        asked(
            None,
            [
                window(0, f"I cannot. {NASTY}", "unparsed", problems=["there is no JSON object"]),
                window(1, "", "error", error="the server is gone <b>"),
            ],
            vlm_filter_status="unparsed",
            vlm_filter_votes=None,
            vlm_filter_worst=None,
            vlm_filter_flags=None,
            vlm_filter_classes=None,
        ),
    ),
    "broken": (
        "error",
        "driving",
        "two",
        {"vlm_filter_error": f"no window was answered {NASTY}", "vlm_filter_answers": "[" * 9000},
    ),
    "unseen": ("reject", "", "two", {}),
}
CAPTIONS = [
    (0, "long", "truncated", f"A long one, {NASTY}", ["truncated"], "max_tokens 1024"),
    (0, "short", "ok", f"Two cups {NASTY}", ["too_short", NASTY], None),
    (0, "medium", "ok", "Two cups stand on a table", [], None),
    (1, "short", "refused", None, [], "the model refuses <i>"),
    (1, "medium", "refused", None, [], "the model refuses <i>"),
]
POOLS = [
    {
        "stage": "vision",
        "workers": 3,
        "most_at_once": 2,
        "nodes": 2,
        "clips": 7,
        "busy_share": 0.25,
        "size_over_time": [[0.0, 1], [10.0, 2], [30.0, 1], [100.0, 0]],
    },
    {
        "stage": NASTY,
        "workers": 1,
        "most_at_once": 1,
        "nodes": 1,
        "clips": 2,
        "busy_share": None,
        "size_over_time": [[50.0, 1], [50.0, 0]],
    },
]


@pytest.fixture(scope="module")
def lake(tmp_path_factory) -> Lake:
    """Tables as a run writes them, with the types that the operators and the stage declare."""
    lake = Lake(str(tmp_path_factory.mktemp("said") / "lake"))
    lake.create([c for o in OPERATORS for c in (*o.columns, o.error_column())])
    for number, (clip_id, (verdict, label, generator, said)) in enumerate(CLIPS.items()):
        attempt = {"attempt_id": f"a{number}"}
        scores = {
            "content_type_label": label,
            "content_type_probability": 0.5 + number / 100,
            "content_type_probabilities": [("cooking", 0.5), ("driving", 0.4)],
            "aesthetic_mean": 5.0 + number / 10,
            "prompt_match_mean": 0.25,
        }
        lake.append(
            "clips",
            [
                {
                    **attempt,
                    "clip_id": clip_id,
                    "source_id": f"s{number}",
                    "start_s": 0.0,
                    "end_s": 10.0,
                    "start_frame": 0,
                    "end_frame": 240,
                    **(scores if label else {}),
                    **said,
                }
            ],
        )
        lake.append(
            "verdicts",
            [
                {
                    **attempt,
                    "clip_id": clip_id,
                    "policy": "p",
                    "verdict": verdict,
                    "reasons": [],
                    "seq": 1,
                }
            ],
        )
        lake.append(
            "sources",
            [
                {
                    **attempt,
                    "source_id": f"s{number}",
                    "uri": f"/v/{clip_id}.mp4",
                    "status": "done",
                    "seq": number,
                    "generator": generator,
                    "prompt": NASTY_PROMPT,
                }
            ],
        )
    names = ("window_number", "length", "status", "text", "flags", "error")
    lake.append(
        "captions",
        [
            {
                "clip_id": "kept",
                "attempt_id": "a0",
                "start_s": 5.0 * row[0],
                "end_s": 5.0 * row[0] + 5,
                "model": "org/vlm@abc",
                "prompt": "general@0123",
                **dict(zip(names, row, strict=True)),
            }
            for row in CAPTIONS
        ],
    )
    versions = {
        "operators": {
            "aesthetic": "1",
            "model clip": f"org/clip@{COMMIT}",
            "model vlm": "org/vlm@abc",
            "caption model": "org/vlm@abc",
            "other model": f"served {NASTY}",
        }
    }
    lake.append(
        "runs",
        [
            {
                "run_id": "r",
                "started_at": datetime(2026, 11, 20, tzinfo=UTC),
                "sources_in": len(CLIPS),
                "versions": json.dumps(versions),
                "workers": json.dumps(POOLS),
                "stages": json.dumps([{"stage": "vision", "seconds": 2.0, "clips": 7}]),
            }
        ],
    )
    return lake


@pytest.fixture(scope="module")
def page(lake, tmp_path_factory) -> Page:
    out = tmp_path_factory.mktemp("report") / "report.html"
    return Page(write_lake_report(lake, out).read_text("utf-8"))


def part(page: Page, clip_id: str) -> Page:
    """What the page says of one clip."""
    start = page.html.index(f'data-clip="{clip_id}"')
    return Page(
        "<article " + page.html[start : page.html.index("</article>", start)] + "</article>"
    )


def table(page: Page, heading: str) -> list[str]:
    """The rows under a heading, as text."""
    start = page.html.index(f">{heading}</h3>")
    rows = page.html[page.html.index("<tbody>", start) : page.html.index("</tbody>", start)]
    return [Page(row).text for row in rows.split("</tr>") if "<td" in row]


def test_what_models_say_stays_text(page):
    assert {tag for tag, _ in page.tags} & {"img", "iframe", "object"} == set()
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 2
    assert page.html.count("alert('said')") == 0
    kept = part(page, "kept").text
    assert f"Two cups {NASTY}" in kept
    assert f"A long one, {NASTY}" in kept
    assert f"it floats {NASTY}" in kept
    assert "the model refuses <i>" in kept
    assert NASTY[:50] in " ".join(table(page, "Workers of the stages with models"))
    assert f"served {NASTY}" in " ".join(table(page, "Models"))


def test_captions_stand_by_window_the_short_one_first_and_the_others_folded(page):
    html = part(page, "kept").html
    captions = html[html.index('class="captions"') : html.index('class="answers"')]
    first, second = captions.split('class="window"')[1:]
    visible, folded = first.split("<details>")
    assert "0.0–5.0 s" in visible
    assert "Two cups" in visible
    assert "too_short" in visible
    assert "medium, long" in folded
    assert "Two cups stand on a table" in folded
    assert "max_tokens 1024" in folded
    assert folded.count("truncated") == 1, "a status is not told again as a flag"
    assert "5.0–10.0 s" in second
    assert "no caption" in second
    assert "refused" in second
    assert "org/vlm@abc, general@0123" in captions


def test_the_card_itself_tells_the_short_caption_the_class_and_the_flags(page):
    card = part(page, "kept").html.split("<template>")[0]
    text = Page(card + "</article>").text
    assert "cooking 50.0 %" in text
    assert "aesthetic 5" in text
    assert "prompt match 0.25" in text
    assert "VLM nothing flagged" in text
    assert "caption Two cups" in text
    assert "VLM floating" in part(page, "floats").text
    assert "VLM unparsed" in part(page, "refuses").text
    assert "VLM no answer" in part(page, "broken").text


def test_answers_stand_by_window(page):
    floats = part(page, "floats").text
    assert "worst question floating, yes in 100 % of the windows that decided" in floats
    assert "2 windows of answers" in floats
    assert floats.count("yes: floating no: morphing camera static") == 2
    assert "unsure: floating" in part(page, "kept").text
    refuses = part(page, "refuses").text
    assert f"I cannot. {NASTY}" in refuses
    assert "there is no JSON object" in refuses
    assert "the server is gone <b>" in refuses
    assert f"no window was answered {NASTY}" in part(page, "broken").text


def test_a_clip_that_no_model_saw_shows_nothing_of_them(page):
    unseen = part(page, "unseen")
    assert "<template>" not in unseen.html
    assert "VLM" not in unseen.text


def test_content_types_have_their_share_of_kept_clips(page):
    rows = table(page, "Content types")
    assert rows[0].startswith("driving 4 25.0 %")
    assert rows[1].startswith("cooking 2 50.0 %")
    assert len(rows) == 2, "a clip that was not classified is of no type"


def test_votes_count_only_the_clips_that_were_decided(page):
    rows = table(page, "Questions of the VLM filter")
    # one: kept, floats; two: again; not told: third. What could not be read votes for nothing.
    assert rows == ["floating 50.0 % 50.0 % 100 % 0 %", "morphing 25.0 % 0 % 0 % 100 %"]
    assert "6 clips asked about: 4 ok, 1 no answer, 1 unparsed" in page.text


def test_captions_are_counted_by_length_with_what_is_wrong(page):
    rows = table(page, "Captions")
    assert rows[0].startswith("short 2 50.0 %")
    assert rows[0].endswith("1 too_short")
    assert rows[1] == "medium 2 50.0 % 6 1 refused –"
    assert rows[2] == "long 1 0 % – 1 truncated 1 truncated"


def test_pools_and_models_of_the_run(page):
    vision, single = table(page, "Workers of the stages with models")
    assert vision == "vision 3 2 2 7 25.0 %"
    assert single.endswith("1 1 1 2 –")
    assert "0 to 1.7 min, 0 to 2 workers" in page.text
    steps_drawn = [tag["d"] for name, tag in page.tags if name == "path" and "V40" in tag["d"]]
    assert len(steps_drawn) == 2
    models = table(page, "Models")
    assert f"clip org/clip {COMMIT}" in models
    assert "vlm org/vlm abc" in models, "a stage's model that is in the registry is told once"
    assert len(models) == 3


def test_maps_lists_and_long_texts_are_no_scores(page):
    names = {tag["aria-label"].split(",")[0] for tag in page.having("data-bins")}
    assert "Histogram of aesthetic_mean" in names
    assert "Histogram of content_type_probability" in names
    assert "vlm_filter_answers" not in page.text
    assert "content_type_probabilities" not in page.text
    assert "vlm_filter_model always served/vlm" in page.text


def columned(count: int) -> duckdb.DuckDBPyConnection:
    """An older lake, then with `count` operators of three columns each."""
    connection = empty_lake()
    for number in range(6):
        add_clip(connection, number)
    for number in range(count):
        for name, kind, value in (
            ("mean", "FLOAT", "random()::FLOAT"),
            ("part", "DOUBLE", "random()"),
            ("error", "TEXT", "NULL"),
            ("kind", "TEXT", "'a' || (random() * 3)::INT"),
            ("note", "TEXT", "repeat(clip_id, 60)"),
            ("yes", "BOOLEAN", "random() > 0.5"),
            ("list", "TEXT[]", "['x']"),
            ("map", "MAP(TEXT, FLOAT)", "MAP {'x': 1.0}"),
            ("record", "STRUCT(a INT)", "{'a': 1}"),
        ):
            connection.execute(f"ALTER TABLE clips ADD COLUMN op{number:02}_{name} {kind}")
            connection.execute(f"UPDATE clips SET op{number:02}_{name} = {value}")
    # A view does not see columns that were added after it.
    view = connection.execute("SELECT sql FROM duckdb_views() WHERE view_name = 'clips_decided'")
    sql = str((view.fetchone() or ("",))[0])
    connection.execute(sql.replace("CREATE VIEW", "CREATE OR REPLACE VIEW"))
    return connection


def test_many_operators_are_folded_by_name(tmp_path):
    with columned(22) as connection:
        page = report_of(connection, tmp_path, ())
    assert "by operator" in page.text
    folded = page.html[page.html.index("by-operator") : page.html.index('id="clips"')]
    assert folded.count("<details>") >= 22
    assert "op07 mean, part, yes, kind" in page.text
    assert "op07_note is free text, 6 different ones" in page.text


def test_an_older_lake_says_nothing_of_models(tmp_path):
    with columned(0) as connection:
        page = report_of(connection, tmp_path, ())
    ids = [tag["id"] for tag in page.having("id")]
    assert "models" not in ids
    assert "by operator" not in page.text
    for word in ("What the models said", "Workers of the stages", "Answers and scores"):
        assert word not in page.text


@pytest.mark.parametrize(
    "workers",
    [
        "not JSON",
        "{}",
        "[]",
        "null",
        "[1, null]",
        '[{"stage": null}]',
        '[{"stage": "s", "size_over_time": [[0, 1], ["x", 2], [1], null, [-3, 1], [2, 1e400]]}]',
        '[{"stage": "s", "size_over_time": {"a": 1}, "busy_share": "much", "workers": "few"}]',
        '[{"stage": "s", "size_over_time": [[0.0, -1], [0.0, 0]]}]',
    ],
)
def test_odd_records_of_workers_spoil_no_page(tmp_path, workers):
    with columned(0) as connection:
        connection.execute("ALTER TABLE runs ADD COLUMN workers TEXT")
        connection.execute(
            "INSERT INTO runs (run_id, started_at, stages, versions, workers) VALUES "
            '(\'r\', now(), \'[{"stage": "split", "seconds": 1}]\', \'{"operators": []}\', ?)',
            [workers],
        )
        page = report_of(connection, tmp_path, ())
    assert "Throughput" in page.text


def test_a_pool_that_comes_and_goes_within_a_pixel_is_drawn_at_its_largest():
    path = steps([(0.0, 1), (50.0, 2), (50.001, 4), (50.002, 1), (100.0, 0)], 100.0, 4)
    assert path.startswith(f"M0 {STEPS_HEIGHT:g}H0.0V30.5H180.0V2.0H181.5V30.5")
    assert path.endswith("H360.0V40.0H360V40z")


def test_a_worker_that_was_there_for_a_moment_is_drawn():
    assert "V2.0" in steps([(5.0, 1), (5.0, 0)], 10.0, 1)
    assert steps([], 0.0, 1) == ""
    assert "V2.0" in steps([(0.0, 1), (0.0, 0)], 0.0, 1)
