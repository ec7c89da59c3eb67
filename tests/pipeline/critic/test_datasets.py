"""Sheets as people keep them, and the traps of the published ones."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import shutil
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openpyxl
import pytest
from huggingface_hub import constants

from tests.conftest import scene, write_video
from tests.pipeline.critic.video_site import serving
from winnow.operators.errors import ConfigError, StorageError
from winnow.pipeline.critic import published
from winnow.pipeline.critic.datasets import Dataset, Example, load_dataset
from winnow.pipeline.critic.places import canonical_url
from winnow.pipeline.critic.splits import balance, sample, split

VIDEOPHY2 = (
    "caption", "video_url", "sa", "pc", "joint", "action", "is_hard", "physics_rules_followed",
    "physics_rules_unfollowed", "physics_rules_cannot_be_determined", "human_violated_rules",
    "model_name", "category", "", "metadata_rules", "upsampled_caption",
)  # fmt: skip
"""The header of its published sheet, with the column that has no name."""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [write_video(folder / f"{n}.mp4", scene(n, 4, 64, 64), fps=8) for n in range(4)]


@pytest.fixture
def site():
    with serving() as site:
        yield site


@pytest.fixture
def folder(tmp_path, clips):
    """A sheet's folder with videos a.mp4 to d.mp4."""
    for name, clip in zip("abcd", clips, strict=True):
        shutil.copy(clip, tmp_path / f"{name}.mp4")
    return tmp_path


def write(path, header, *rows, encoding="utf-8", delimiter=","):
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return str(path)


def sheet(folder, *rows, header=("video", "pc", "caption")):
    return write(folder / "labels.csv", header, *rows)


def workbook(path, rows, links=()):
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    for cell, target in links:
        book.active[cell].hyperlink = target
    book.save(path)
    return str(path)


def videophy2(url, pc=4, **others):
    row = dict.fromkeys(VIDEOPHY2, "") | {
        "caption": "A ball falls.", "video_url": url, "sa": 4, "pc": pc, "joint": int(pc >= 4),
        "action": "falling", "is_hard": 0, "physics_rules_followed": "[]",
        "physics_rules_unfollowed": "[]", "physics_rules_cannot_be_determined": "[]",
        "human_violated_rules": "[]", "model_name": "wan", "category": "Object Interactions",
        "metadata_rules": "{}", "upsampled_caption": "A red ball falls.",
    }  # fmt: skip
    return [(row | others)[name] for name in VIDEOPHY2]


def truths(dataset: Dataset) -> list[float | None]:
    return [example.truth for example in dataset.examples]


def content(example: Example) -> bytes:
    assert example.video is not None, example.problem
    return example.video.read_bytes()


# --- sheets of one's own ---------------------------------------------------------------------------


def test_a_sheet_with_local_videos(folder):
    spec = sheet(folder, ["a.mp4", 1, "A ball falls."], ["b.mp4", 4.5, "a ball  FALLS."])
    dataset = load_dataset(spec, fetch=False)
    assert dataset.name == "labels"
    assert truths(dataset) == [1.0, 4.5]
    assert [e.video for e in dataset.examples] == [folder / "a.mp4", folder / "b.mp4"]
    assert dataset.counts() == {"usable": 2}
    assert dataset.examples[0].group == dataset.examples[1].group


def test_the_sheet_of_the_recipe_with_prompts_beside_it(folder):
    """seeds/001: output_link, Action alignment, Physical common sense, Quality; prompts/<video>_prompt.txt."""
    (folder / "prompts").mkdir()
    (folder / "prompts" / "a_prompt.txt").write_text("A person waves hello.\n")
    videos = folder / "generated"
    videos.mkdir()
    (folder / "a.mp4").rename(videos / "a.mp4")
    spec = workbook(
        folder / "labels.xlsx",
        [["output_link", "Action alignment", "Physical common sense", "Quality"],
         ["https://example.com/videos/a.mp4", 5, 3, 4],
         ["https://example.com/videos/z.mp4", 2, 1, 2]],
    )  # fmt: skip
    first, second = load_dataset(spec, videos=videos, fetch=False).examples
    assert (first.truth, first.caption) == (3.0, "A person waves hello.")
    assert first.video == videos / "a.mp4"
    assert first.fields == {"Action alignment": 5, "Quality": 4}
    assert (second.video, second.problem_kind) == (None, "missing")


def test_an_example_is_known_by_its_content_not_by_its_row_or_place(folder, tmp_path):
    rows = [["a.mp4", 1, "x"], ["b.mp4", 2, "y"], ["c.mp4", 3, "z"]]
    before = load_dataset(sheet(folder, *rows))
    (folder / "b.mp4").rename(folder / "moved.mp4")
    after = load_dataset(sheet(folder, rows[2], ["moved.mp4", 2, "y"], rows[0]))
    assert {e.example_id for e in before.examples} == {e.example_id for e in after.examples}
    assert before.fingerprint == after.fingerprint
    other = load_dataset(sheet(folder, rows[2], ["moved.mp4", 3, "y"], rows[0]))
    assert other.fingerprint != after.fingerprint


def test_columns_may_be_called_otherwise(folder):
    spec = sheet(folder, ["a.mp4", 5, 2, "walk"], header=["Clip", "pc", "My Score", "verb"])
    named = {"video": "clip", "truth": "my score", "action": "verb"}
    (example,) = load_dataset(spec, columns=named).examples
    assert (example.truth, example.action, example.fields) == (2.0, "walk", {"pc": "5"})


@pytest.mark.parametrize(
    ("columns", "said"),
    [({"video": "clips"}, "no column 'clips': there are 'video', 'pc'"), ({"colour": "pc"}, "role"),
     ({}, "")],
)  # fmt: skip
def test_a_wrong_column_says_which_there_are(folder, columns, said):
    spec = sheet(folder, ["a.mp4", 5], header=["video", "pc"])
    if not said:
        assert truths(load_dataset(spec, columns=columns)) == [5.0]
        return
    with pytest.raises(ConfigError, match=said):
        load_dataset(spec, columns=columns)


def test_a_sheet_without_scores_says_so(folder):
    with pytest.raises(ConfigError, match=r"no column of the truth.*'video', 'colour'"):
        load_dataset(sheet(folder, ["a.mp4", "red"], header=["video", "colour"]))


@pytest.mark.parametrize("spec", ["videophy2", "videophy2:val", "nowhere/x.csv"])
def test_a_data_set_that_is_not_there(spec):
    with pytest.raises(ConfigError, match=r"videophy2:test|cannot read"):
        load_dataset(spec)


def test_rows_without_a_video_or_a_score_stay_and_are_counted(folder):
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.mp4").write_bytes(b"")
    spec = sheet(
        folder, ["a.mp4", 3, ""], ["", 3, ""], ["b.mp4", "", ""], ["c.mp4", "good", ""],
        ["d.mp4", "nan", ""], ["z.mp4", 3, ""], ["x" * 5000, 3, ""], ["a\0.mp4", 3, ""],
    )  # fmt: skip
    dataset = load_dataset(spec)
    assert len(dataset.examples) == 8
    assert dataset.counts() == {
        "usable": 1, "bad_truth": 1, "missing": 2, "no_truth": 2, "no_video": 2,
    }  # fmt: skip
    assert all((e.problem is None) == (e.problem_kind is None) for e in dataset.examples)


# --- scales ----------------------------------------------------------------------------------------


def scores(folder, *values, scale="auto"):
    rows = [[f"{n}.mp4", value] for n, value in enumerate(values)]
    return truths(load_dataset(sheet(folder, *rows, header=["video", "pc"]), scale=scale))


def test_fault_e_scores_from_0_to_1_are_mapped_linearly(folder):
    assert scores(folder, 0, 0.25, 0.5, 1) == [1.0, 2.0, 3.0, 5.0]


def test_scores_from_1_to_5_stay(folder):
    assert scores(folder, 1, "4.0", "2,5", 5) == [1.0, 4.0, 2.5, 5.0]


def test_truth_values_are_scores_from_0_to_1(folder):
    assert scores(folder, "TRUE", "false") == [5.0, 1.0]


@pytest.mark.parametrize("values", [(1, 1, 1), (0, 1, 2), (0.5, 4)])
def test_a_range_that_fits_both_scales_is_not_guessed(folder, values):
    with pytest.raises(ConfigError, match="give the scale"):
        scores(folder, *values)


def test_a_given_scale_decides(folder):
    assert scores(folder, 1, 1, scale="0-1") == [5.0, 5.0]
    assert scores(folder, 1, 1, scale="1-5") == [1.0, 1.0]


def test_scores_beyond_the_scale_are_problems(folder):
    assert scores(folder, 0, 4, 6, -1, "inf", 5, scale="1-5") == [None, 4, None, None, None, 5]
    assert scores(folder, 3, 4, 6, -1) == [3, 4, None, None]
    assert scores(folder, 0.5, 2, scale="0-1") == [3, None]


# --- text files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_sheets_as_programs_write_them(folder, encoding, delimiter):
    spec = write(
        folder / "labels.csv", ["video", "pc", "caption"], ["a.mp4", "3", "It’s; a, \"ball\"\n"],
        encoding=encoding, delimiter=delimiter,
    )  # fmt: skip
    (example,) = load_dataset(spec).examples
    assert (example.video, example.truth) == (folder / "a.mp4", 3.0)
    assert example.caption == 'It’s; a, "ball"'


def test_bytes_in_another_encoding_cost_a_note_not_the_sheet(folder):
    (folder / "labels.csv").write_bytes(
        b"video,pc,caption\na.mp4,3,it\x92s a ball\nb.mp4,4,y\nit\x92s.mp4,4,z\n"
    )
    dataset = load_dataset(str(folder / "labels.csv"))
    assert dataset.examples[0].caption == "it\N{REPLACEMENT CHARACTER}s a ball"
    assert "not UTF-8" in dataset.problems[0]
    assert "line 2" in dataset.problems[0]
    assert dataset.counts() == {"usable": 2, "no_video": 1}


def test_columns_without_a_name(folder):
    header = ["", "video", "pc", "", ""]
    spec = sheet(folder, ["7", "a.mp4", 3, "", "seen"], ["8", "b.mp4", 3, "", ""], header=header)
    first, second = load_dataset(spec).examples
    assert first.fields == {"column_1": "7", "column_5": "seen"}
    assert second.fields == {"column_1": "8", "column_5": None}


def test_rows_of_odd_lengths_and_columns_of_one_name(folder):
    (folder / "labels.csv").write_text("video,pc,x,x\na.mp4,3\n\nb.mp4,4,1,2,3\n")
    dataset = load_dataset(str(folder / "labels.csv"))
    assert truths(dataset) == [3.0, 4.0]
    assert dataset.examples[1].fields == {"x": "1", "x_4": "2"}
    assert any("row 4 has more cells" in problem for problem in dataset.problems)


def test_a_quote_that_is_never_closed_does_not_swallow_the_rows_behind_it(folder):
    (folder / "labels.csv").write_text('video,pc,caption\na.mp4,3,"x\nb.mp4,4,y\nc.mp4,4,y\n')
    with pytest.raises(ConfigError, match=r"labels\.csv: line .*quotes"):
        load_dataset(str(folder / "labels.csv"))


def test_odd_quotes_cost_a_note(folder):
    (folder / "labels.csv").write_text('video,pc,caption\na.mp4,3,"a" ball\nb.mp4,4,y\n')
    dataset = load_dataset(str(folder / "labels.csv"))
    assert dataset.examples[0].caption == "a ball"
    assert "line 2" in dataset.problems[0]


# --- workbooks -------------------------------------------------------------------------------------


def test_links_and_formulas_in_a_workbook(folder):
    spec = workbook(
        folder / "labels.xlsx",
        [["output_link", "Physical common sense"],
         ['=HYPERLINK("https://example.com/a.mp4","first")', 3],
         ["second", 4],
         ["c.mp4", "=1+2"],
         ["https://example.com/d.mp4", 5]],
        links=[("A3", "https://example.com/b.mp4"), ("A5", "https://example.com/elsewhere")],
    )  # fmt: skip
    dataset = load_dataset(spec, fetch=False)
    assert [e.uri for e in dataset.examples] == [
        "https://example.com/a.mp4", "https://example.com/b.mp4", "c.mp4",
        "https://example.com/d.mp4",
    ]  # fmt: skip
    assert truths(dataset) == [3.0, 4.0, None, 5.0]
    assert "B4 is a formula without a stored value" in dataset.problems[0]


def test_a_link_formula_in_a_text_file(folder):
    spec = sheet(folder, ['=HYPERLINK("a.mp4";"it ""is"" a")', 3, ""])
    assert load_dataset(spec).examples[0].video == folder / "a.mp4"


def test_the_sheet_with_the_videos_is_found_among_others(folder):
    book = openpyxl.Workbook()
    book.active.append(["notes"])
    book.create_chartsheet("chart").add_chart(openpyxl.chart.BarChart())
    labels = book.create_sheet("labels")
    labels.append(["path", "pc", "when"])
    labels.append(["a.mp4", True, None])
    labels.append(["b.mp4", False, None])
    book.save(folder / "labels.xlsx")
    assert truths(load_dataset(str(folder / "labels.xlsx"))) == [5.0, 1.0]


def test_a_file_that_is_no_workbook(folder):
    (folder / "labels.xlsx").write_bytes(b"PK\x03\x04 not at all")
    with pytest.raises(ConfigError, match="cannot be read as a spreadsheet"):
        load_dataset(str(folder / "labels.xlsx"))
    (folder / "labels.csv").write_bytes(b"PK\x03\x04 not at all")
    with pytest.raises(ConfigError, match=r"save it as \.xlsx"):
        load_dataset(str(folder / "labels.csv"))


def test_a_workbook_that_unpacks_to_a_bomb_is_refused(folder, monkeypatch):
    with zipfile.ZipFile(folder / "labels.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/workbook.xml", bytes(2_000_000))
    monkeypatch.setattr("winnow.pipeline.critic.tables.MOST_BYTES", 1_000_000)
    with pytest.raises(ConfigError, match="unpacks to 2000000 bytes"):
        load_dataset(str(folder / "labels.xlsx"))


# --- VideoPhy-2 ------------------------------------------------------------------------------------


def test_rules_are_read_as_literals_and_never_run(folder, tmp_path):
    hostile = f"[__import__('os').mkdir({str(tmp_path / 'ran')!r})]"
    spec = write(
        folder / "videophy2.csv", VIDEOPHY2,
        videophy2(
            "a.mp4", physics_rules_followed="""['It falls.', "It's red."]""",
            physics_rules_unfollowed="[nan]", human_violated_rules=hostile,
            metadata_rules="{'It falls.': 'Gravity', 'It bounces.': ['Elasticity', 'Friction']}",
        ),
        videophy2("b.mp4", physics_rules_followed="['It falls.", metadata_rules="[1, 2]"),
        videophy2("c.mp4", physics_rules_followed="[" * 9000, metadata_rules="{[]: 1}"),
        videophy2("d.mp4", physics_rules_followed="['x', 3]", human_violated_rules="['x']" * 20_000),
    )  # fmt: skip
    dataset = load_dataset(spec)
    first, second, third, fourth = (e.fields for e in dataset.examples)
    assert first["physics_rules_followed"] == ["It falls.", "It's red."]
    assert first["physics_rules_unfollowed"] is None
    assert first["metadata_rules"] == {
        "It falls.": ["Gravity"], "It bounces.": ["Elasticity", "Friction"],
    }  # fmt: skip
    assert first["human_violated_rules"] is None
    assert not (tmp_path / "ran").exists()
    assert second["physics_rules_followed"] is second["metadata_rules"] is None
    assert third["physics_rules_followed"] is third["metadata_rules"] is None
    assert fourth["physics_rules_followed"] is fourth["human_violated_rules"] is None
    assert dataset.counts() == {"usable": 4}
    assert sum("rules" in problem for problem in dataset.problems) == 8


def test_the_columns_of_videophy2(folder):
    spec = write(
        folder / "videophy2.csv", VIDEOPHY2,
        videophy2("a.mp4", pc=2, is_hard=1, model_name="sora"), videophy2("b.mp4", action=""),
    )  # fmt: skip
    first, second = load_dataset(spec, scale="1-5").examples
    assert (first.truth, first.generator, first.action, first.is_hard) == (
        2,
        "sora",
        "falling",
        True,
    )
    assert (second.action, second.is_hard) == (None, False)
    assert first.fields["upsampled_caption"] == "A red ball falls."
    assert "column_14" not in first.fields
    json.dumps(first.fields)


def test_addresses_are_percent_encoded_once(site, folder, clips, tmp_path):
    names = ["A_bowler’s_run—up;_it's.mp4", "100%_sure_.mp4", "already%E2%80%99s.mp4"]
    site.put("/x/A_bowler’s_run—up;_it's.mp4", clips[0].read_bytes())
    site.put("/x/100%_sure_.mp4", clips[1].read_bytes())
    site.put("/x/already’s.mp4", clips[2].read_bytes())
    spec = sheet(folder, *([f"{site.address}/x/{name}", 3, name] for name in names))
    dataset = load_dataset(spec, cache=tmp_path / "cache")
    assert dataset.counts() == {"usable": 3}
    assert {path for path, _ in site.headers} == {
        "/x/A_bowler%E2%80%99s_run%E2%80%94up;_it's.mp4", "/x/100%25_sure_.mp4",
        "/x/already%E2%80%99s.mp4",
    }  # fmt: skip
    assert [content(e) for e in dataset.examples] == [clip.read_bytes() for clip in clips[:3]]


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("HTTPS://Videos.Example/a%e2%80%99b c.mp4", "https://videos.example/a%E2%80%99b%20c.mp4"),
        ("https://ex.com/a%2Fb?sig=a%2Bb&c=d+e#t=3", "https://ex.com/a%2Fb?sig=a%2Bb&c=d+e"),
        ("https://ä.example:8443/ü", "https://xn--4ca.example:8443/%C3%BC"),
    ],
)
def test_one_address_has_one_form(given, canonical):
    assert canonical_url(given) == canonical
    assert canonical_url(canonical) == canonical


@pytest.mark.parametrize(
    "address",
    ["https://", "https://[::1", "https://host:port/a.mp4", "https://me:secret@host/a.mp4",
     "file:///etc/passwd", "s3://bucket/a.mp4"],
)  # fmt: skip
def test_addresses_that_cannot_be_used(folder, address):
    (example,) = load_dataset(sheet(folder, [address, 3, ""]), scale="1-5").examples
    assert example.problem_kind == "no_video"
    assert "secret" not in example.uri


def test_a_sheet_may_not_lead_out_of_the_folder_of_videos(folder):
    secret = folder / "secret.mp4"
    (folder / "a.mp4").rename(secret)
    videos = folder / "videos"
    videos.mkdir()
    rows = [
        ["https://h.example/..%2Fsecret.mp4", 3, ""],
        ["https://h.example/%2e%2e/secret.mp4", 3, ""],
    ]
    dataset = load_dataset(sheet(folder, *rows), videos=videos, fetch=False)
    assert dataset.counts() == {"usable": 0, "missing": 2}


def test_a_file_name_that_several_generators_share_names_none_of_them(folder, clips):
    """VideoPhy-2 names a file by its prompt: the same for all generators, each in its folder."""
    videos = folder / "videos"
    videos.mkdir()
    shutil.copy(clips[0], videos / "ball.mp4")
    shutil.copy(clips[1], videos / "cup.mp4")
    rows = [["https://h.example/wan/ball.mp4", 3, ""], ["https://h.example/sora/ball.mp4", 4, ""],
            ["https://h.example/sora/cup.mp4", 2, ""]]  # fmt: skip
    dataset = load_dataset(sheet(folder, *rows), videos=videos, fetch=False)
    assert [e.problem_kind for e in dataset.examples] == ["missing", "missing", None]
    (videos / "wan").mkdir()
    (videos / "ball.mp4").rename(videos / "wan" / "ball.mp4")
    dataset = load_dataset(sheet(folder, *rows), videos=videos, fetch=False)
    assert [e.problem_kind for e in dataset.examples] == [None, "missing", None]


def test_the_example_is_the_same_whether_its_video_is_local_or_fetched(
    site, folder, clips, tmp_path
):
    videos = folder / "videos"
    videos.mkdir()
    shutil.copy(clips[0], videos / "ball.mp4")
    spec = sheet(folder, [site.put("/wan/ball.mp4", clips[0].read_bytes()), 3, "x"])
    local = load_dataset(spec, videos=videos, fetch=False)
    fetched = load_dataset(spec, cache=tmp_path / "cache")
    assert local.examples[0].example_id == fetched.examples[0].example_id
    assert local.examples[0].sha256 == fetched.examples[0].sha256
    assert local.fingerprint == fetched.fingerprint


# --- duplicates -----------------------------------------------------------------------------------


def test_one_video_is_one_example(folder):
    url = "https://h.example/it’s.mp4"
    rows = [[url, 3, "x"], [canonical_url(url), 3, "x"], ["a.mp4", 4, "y"], ["a.mp4", "", "y"]]
    dataset = load_dataset(sheet(folder, *rows), fetch=False)
    assert truths(dataset) == [3.0, 4.0]
    assert dataset.problems == (
        "rows 2, 3 are the same video: kept once", "rows 4, 5 are the same video: kept once",
    )  # fmt: skip


def test_one_video_with_two_scores_has_none(folder):
    shutil.copy(folder / "a.mp4", folder / "copy.mp4")
    rows = [["a.mp4", 2, "x"], ["b.mp4", 3, "y"], ["copy.mp4", 4, "x"]]
    dataset = load_dataset(sheet(folder, *rows))
    assert truths(dataset) == [None, 3.0]
    assert dataset.counts() == {"usable": 1, "conflict": 1}
    assert "rows 2, 4 are the same video with different scores: 2, 4" in dataset.problems


def test_two_addresses_that_turn_out_to_be_one_video(site, folder, clips, tmp_path):
    same, other = clips[0].read_bytes(), clips[1].read_bytes()
    rows = [[site.put("/a.mp4", same), 2, "x"], [site.put("/b.mp4", same), 2, "x"],
            [site.put("/c.mp4", other), 2, "x"], [site.put("/d.mp4", other), 5, "x"]]  # fmt: skip
    dataset = load_dataset(sheet(folder, *rows), cache=tmp_path / "cache")
    assert dataset.counts() == {"usable": 1, "conflict": 1}
    assert truths(dataset) == [2.0, None]


# --- fetching --------------------------------------------------------------------------------------


def test_fault_b_shuffled_rows_keep_their_own_videos(site, folder, clips, tmp_path):
    """The published script names downloads by row and reuses them when the rows were shuffled."""
    rows = [[site.put(f"/{n}.mp4", clip.read_bytes()), n + 1, f"prompt {n}"]
            for n, clip in enumerate(clips)]  # fmt: skip
    first = load_dataset(sheet(folder, *rows), cache=tmp_path / "cache")
    random.Random(3).shuffle(rows)
    again = load_dataset(sheet(folder, *rows[:3]), cache=tmp_path / "cache", fetch=False)
    assert len(first.usable) == 4
    assert len(again.usable) == 3
    for example in (*first.usable, *again.usable):
        assert content(example) == clips[int(example.truth) - 1].read_bytes()
    assert len(site.headers) == 4


def test_a_download_that_fails_is_the_problem_of_its_example(site, folder, clips, tmp_path):
    good = site.put("/good.mp4", clips[0].read_bytes())
    site.put("/text.mp4", b"<html>")
    rows = [[good, 3, ""], [f"{site.address}/gone.mp4", 3, ""], [f"{site.address}/text.mp4", 3, ""],
            ["http://elsewhere.invalid/a.mp4", 3, ""], [f"{site.address}/unrated.mp4", "", ""]]  # fmt: skip
    lines: list[str] = []
    dataset = load_dataset(sheet(folder, *rows), cache=tmp_path / "cache", report=lines.append)
    assert dataset.counts() == {"usable": 1, "download": 2, "no_truth": 1, "not_video": 1}
    assert dataset.examples[1].problem == "the server answers with status 404"
    assert "not https" in dataset.examples[3].problem
    assert "1 of 4 videos, 3 failed" in lines[-1]
    assert all(path != "/unrated.mp4" for path, _ in site.headers)


def test_without_leave_to_fetch_nothing_is_asked(site, folder, clips, tmp_path):
    spec = sheet(folder, [site.put("/a.mp4", clips[0].read_bytes()), 3, ""])
    dataset = load_dataset(spec, cache=tmp_path / "cache", fetch=False)
    assert dataset.counts() == {"usable": 0, "missing": 1}
    assert not site.headers
    assert not (tmp_path / "cache").exists()


def test_only_what_remains_after_the_limit_is_fetched(site, folder, clips, tmp_path):
    boxes = [b"\0\0\0\x0cfree%04d" % n for n in range(9)]
    rows = [[site.put(f"/{n}.mp4", clips[0].read_bytes() + box), 3, f"{n}"]
            for n, box in enumerate(boxes)]  # fmt: skip
    dataset = load_dataset(sheet(folder, *rows), cache=tmp_path / "cache", limit=2)
    assert len(site.headers) == len(dataset.examples) == 2
    random.Random(1).shuffle(rows)
    again = load_dataset(sheet(folder, *rows), cache=tmp_path / "cache", limit=2)
    assert again.fingerprint == dataset.fingerprint
    assert len(site.headers) == 2


# --- from the hub ----------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on loopback that has one file; its content, to be changed."""
    served = {"content": b"", "status": 200}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_): ...

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            content = served["content"]
            self.send_response(served["status"])
            if served["status"] == 404:
                self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0123456789abcdef" * 2 + "01234567")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def publish(hub, monkeypatch, *rows):
    file = io.StringIO()
    csv.writer(file).writerows([VIDEOPHY2, *rows])
    hub["content"] = file.getvalue().encode()
    table = published.PublishedTable(
        "videophysics/videophy2_test", "videophy2_test.csv", "main",
        hashlib.sha256(hub["content"]).hexdigest(),
    )  # fmt: skip
    monkeypatch.setitem(published.PUBLISHED, "videophy2:test", table)


def test_videophy2_from_the_hub(hub, site, clips, tmp_path, monkeypatch):
    url = site.put("/wan/ball.mp4", clips[0].read_bytes())
    publish(hub, monkeypatch, videophy2(url, pc=1), videophy2(str(clips[1]), pc=1))
    dataset = load_dataset("videophy2:test", cache=tmp_path / "cache")
    assert (dataset.name, truths(dataset)) == ("videophy2:test", [1.0, 1.0])
    # A sheet from elsewhere must not have files of this machine judged.
    assert [e.problem_kind for e in dataset.examples] == [None, "no_video"]
    hub["status"] = 500
    again = load_dataset("videophy2:test", cache=tmp_path / "cache", fetch=False)
    assert again.fingerprint == dataset.fingerprint


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(hub, tmp_path, monkeypatch):
    publish(hub, monkeypatch, videophy2("http://h.invalid/a.mp4"))
    right = hub["content"]
    hub["content"] = right + b"\n"
    with pytest.raises(StorageError, match="has the SHA-256"):
        load_dataset("videophy2:test", cache=tmp_path / "cache")
    hub["content"] = right
    assert len(load_dataset("videophy2:test", limit=1, scale="auto", cache=tmp_path).examples) == 1


def test_a_hub_that_cannot_give_it_says_what_to_do(hub, tmp_path, monkeypatch):
    publish(hub, monkeypatch, videophy2("http://h.invalid/a.mp4"))
    with pytest.raises(StorageError, match=r"not on this machine.*give its path"):
        load_dataset("videophy2:test", fetch=False)
    hub["status"] = 404
    with pytest.raises(StorageError, match=r"videophy2_test.csv .*give its path"):
        load_dataset("videophy2:test", cache=tmp_path / "cache")


# --- parts of a data set ---------------------------------------------------------------------------


def made(groups: int, per_group: int = 3) -> list[Example]:
    random_ = random.Random(5)
    return [
        Example(
            example_id=f"{g}-{n}", video=None, uri="", caption=None, group=f"group {g}",
            truth=float(random_.choices(range(1, 6), (3, 16, 25, 33, 24))[0]), generator=None,
            action=None, is_hard=None, fields={},
        )
        for g in range(groups) for n in range(per_group)
    ]  # fmt: skip


def test_fault_e_no_prompt_is_on_both_sides_of_a_split():
    examples = made(100)
    rest, held_out = split(examples, 0.2, seed=1)
    assert {e.group for e in rest}.isdisjoint(e.group for e in held_out)
    assert sorted(e.example_id for e in (*rest, *held_out)) == sorted(
        e.example_id for e in examples
    )
    assert len(held_out) == pytest.approx(60, abs=3)


def test_a_split_does_not_depend_on_the_order_of_the_rows():
    examples = made(40)
    shuffled = random.Random(2).sample(examples, len(examples))
    held_out = {e.example_id for e in split(examples, 0.25, seed=1)[1]}
    assert held_out == {e.example_id for e in split(shuffled, 0.25, seed=1)[1]}
    assert held_out != {e.example_id for e in split(examples, 0.25, seed=2)[1]}


def test_a_split_has_the_scores_on_both_sides():
    rest, held_out = split(made(600, 1), 0.25)
    for score in (2, 3, 4, 5):
        share = [sum(e.truth == score for e in part) / len(part) for part in (rest, held_out)]
        assert share[0] == pytest.approx(share[1], abs=0.02)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_neither_side_of_a_split_is_empty(share):
    assert all(split(made(2), share))


def test_fault_e_balancing_the_parts_brings_no_video_to_both():
    """The published script repeats rare examples first and splits afterwards."""
    examples = made(200)
    rest, held_out = split(examples, 0.2)
    training, evaluation = balance(rest, repeats=4), balance(held_out)
    assert {e.example_id for e in training}.isdisjoint(e.example_id for e in evaluation)
    assert len({e.example_id for e in evaluation}) == len(evaluation)
    assert len(set(Counter(e.truth for e in evaluation).values())) == 1
    assert len(set(Counter(e.truth for e in training).values())) == 1
    assert 1 < max(Counter(e.example_id for e in training).values()) <= 4
    assert len(training) > len(balance(rest))


def test_balancing_leaves_out_what_has_no_score(folder):
    spec = sheet(folder, ["a.mp4", 2, ""], ["b.mp4", 4, ""], ["c.mp4", 4, ""], ["d.mp4", "", ""])
    assert sorted(truths(load_dataset(spec, balance=True))) == [2.0, 4.0]
    assert balance([]) == []


def test_a_sample_is_the_same_however_the_rows_are_sorted():
    examples = made(30)
    shuffled = random.Random(2).sample(examples, len(examples))
    assert {e.example_id for e in sample(examples, 7)} == {
        e.example_id for e in sample(shuffled, 7)
    }
    assert len(sample(examples, 1000)) == len(examples)


def test_the_parts_of_a_data_set_make_the_whole(folder):
    spec = sheet(folder, *([f"{c}.mp4", n + 1, c] for n, c in enumerate("abcd")))
    train, held_out = (load_dataset(spec, split=part, share=0.25) for part in ("train", "held-out"))
    assert (train.name, held_out.name) == ("labels:train", "labels:held-out")
    assert (len(train.examples), len(held_out.examples)) == (3, 1)
    assert train.fingerprint != held_out.fingerprint


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 1.0, "split": "train"}, "share"),
        ({"limit": 0}, "limit"),
        ({"split": "test"}, "split"),
    ],
)
def test_options_that_cannot_be_used(folder, options, said):
    with pytest.raises(ConfigError, match=said):
        load_dataset(sheet(folder, ["a.mp4", 3, ""]), **options)


def test_a_folder_of_videos_that_is_not_there(folder):
    with pytest.raises(ConfigError, match="is not a folder"):
        load_dataset(sheet(folder, ["a.mp4", 3, ""]), videos=folder / "nowhere")


# --- real ------------------------------------------------------------------------------------------

JUDGED = {
    "A_jetski_moves_quickly": 4.0, "A_streamer,_cut_from_paper": 5.0, "A_leaf_blower_is_pointed": 4.0,
    "Syrup_is_poured": 5.0, "Hands_fold_a_map": 4.0, "A_paint_roller": 4.0, "A_hedge_trimmer": 4.0,
    "A_canoeist": 4.0, "A_surfer": 4.0, "A_seamstress": 4.0,
}  # fmt: skip
"""The physics scores that VideoPhy-2's own judge gave its ten example files, by how they begin."""


def judged_sheet(path, videos) -> str:
    """A sheet in the form of the judge's own output: nameless first column, videopath, score."""
    rows = []
    for number, (start, score) in enumerate(JUDGED.items()):
        (video,) = sorted(videos.glob(f"{start}*.mp4"))
        caption = video.stem.rpartition("_")[0].replace("_", " ") + "."
        rows.append([number, caption, f"examples/{video.name}", score])
    return write(path, ["", "caption", "videopath", "score"], *rows)


@pytest.mark.real
def test_the_example_files_of_videophy2s_own_judge(real_videos, tmp_path):
    videos = real_videos / "generated" / "videophy2"
    spec = judged_sheet(tmp_path / "output_pc.csv", videos)
    dataset = load_dataset(spec, videos=videos, fetch=False)
    assert dataset.counts() == {"usable": 10}
    assert truths(dataset) == list(JUDGED.values())
    assert len({e.group for e in dataset.examples}) == 10
    assert all(e.video.parent == videos for e in dataset.usable)
