"""A sound lake is found sound; each thing that can go wrong is found and named."""

import json
import os
import shutil
from pathlib import Path

import duckdb
import pytest
from deltalake import write_deltalake
from typer.testing import CliRunner

from tests.pipeline.lakes import config, rows
from winnow.operators.errors import LakeError
from winnow.pipeline.lake import Lake
from winnow.pipeline.lake_check import check_lake
from winnow.pipeline.lake_commands import lake_app
from winnow.pipeline.policy import Policy, Rule
from winnow.pipeline.refilter import refilter
from winnow.pipeline.run import run


def rewrite(lake: Lake, table: str, query: str) -> None:
    """Replace a table by a query of it, which is `t` there."""
    data = lake.open(table).to_pyarrow_table()
    with duckdb.connect() as connection:
        connection.register("t", data)
        changed = connection.sql(query).to_arrow_table().cast(data.schema)
    write_deltalake(lake.table_uri(table), changed, mode="overwrite")


def change(lake: Lake, table: str, what: dict[str, str], where: str) -> None:
    changed = ", ".join(
        f"CASE WHEN {where} THEN {new} ELSE {c} END AS {c}" for c, new in what.items()
    )
    rewrite(lake, table, f"SELECT * REPLACE ({changed}) FROM t")


def delete(lake: Lake, table: str, where: str) -> None:
    rewrite(lake, table, f"SELECT * FROM t WHERE NOT coalesce({where}, false)")


def wrong(lake: Lake, **more: bool) -> set[tuple[str, int]]:
    return {(finding.check, finding.count) for finding in check_lake(lake, **more).violations}


def one(lake: Lake, query: str):
    return rows(lake, query)[0][0]


def own_media(lake: Lake) -> Path:
    """The copied lake names the media of the lake that it was copied from: make them its own."""
    root = one(lake, "SELECT media_uri FROM dataset").rpartition("/media/")[0]
    change(lake, "dataset", {"media_uri": f"replace(media_uri, '{root}', '{lake.uri}')"}, "true")
    return Path(one(lake, "SELECT media_uri FROM dataset ORDER BY 1"))


def test_a_lake_of_a_run_and_refilters_is_sound_to_the_bottom(own_lake):
    refilter(own_lake, Policy(name="strict", rules=(Rule(name="long", reject="duration_s > 1"),)))
    result = check_lake(own_lake, deep=True)
    assert result.sound, [str(v) for v in result.violations]
    assert result.uncommitted == {}
    assert result.rows["verdicts"] == 12


def test_a_clip_that_replaced_a_kept_one_leads_its_duplicates_on(videos, tmp_path):
    from tests.conftest import scene, write_video

    folder, lake = tmp_path / "in", Lake(str(tmp_path / "lake"))
    write_video(folder / "a.mp4", [i[::2, ::2] for i in scene(1, 60)])
    write_video(folder / "b.mp4", [i[::2, ::2] for i in scene(1, 60)], options={"crf": "22"})
    shutil.copy2(videos / "bear's_den.mp4", folder / "c.mp4")
    run(config(), str(folder), lake)
    found = rows(lake, "SELECT parse_filename(uri), verdict FROM clips_decided ORDER BY 1")
    assert found == [("a.mp4", "duplicate"), ("b.mp4", "duplicate"), ("c.mp4", "keep")]
    assert check_lake(lake).sound


def test_attempts_that_never_committed_are_counted_and_no_error(own_lake):
    own_lake.append("verdicts", [{"clip_id": "x", "attempt_id": "dead", "verdict": "keep"}])
    result = check_lake(own_lake)
    assert result.sound
    assert result.uncommitted == {"verdicts": 1}


def test_a_run_that_was_killed_is_noted(own_lake):
    delete(own_lake, "runs", "true")
    result = check_lake(own_lake)
    assert result.sound
    assert [(note.check, note.count) for note in result.notes if note.check == "runs"] == [
        ("runs", 1)
    ]


BREAKS = {
    "a clip is gone": (
        lambda lake: delete(lake, "clips", f"clip_id = '{one(lake, 'SELECT clip_id FROM dataset')}'"),
        {("verdicts", 1), ("embeddings", 1)},
    ),
    "a verdict is gone": (
        lambda lake: delete(
            lake, "verdicts", f"clip_id = '{one(lake, 'SELECT clip_id FROM dataset')}'"
        ),
        {("clips", 1), ("ledger", 1), ("dataset", 1)},
    ),
    "a source is gone": (
        lambda lake: delete(lake, "sources", "status = 'failed'"),
        {("ledger", 1)},  # by its number of sources and by its counts
    ),
    "a span is too long": (
        lambda lake: change(lake, "clips", {"end_frame": "end_frame + 1"}, "true"),
        {("clips", 6)},
    ),
    "a status is unknown": (
        lambda lake: change(lake, "sources", {"status": "'lost'"}, "error_kind = 'empty'"),
        {("sources", 1), ("ledger", 1)},
    ),
    "a copy names nothing": (
        lambda lake: change(lake, "sources", {"copy_of": "'nowhere'"}, "status = 'copy'"),
        {("sources", 1)},
    ),
    "a content was processed twice": (
        lambda lake: change(
            lake, "sources", {"status": "'done'", "copy_of": "NULL"}, "status = 'copy'"
        ),
        {("sources", 1), ("ledger", 1)},
    ),
    "a duplicate of a clip that is rejected": (
        lambda lake: change(
            lake, "verdicts",
            {"duplicate_of": f"""'{one(lake, "SELECT clip_id FROM verdicts WHERE verdict='reject'")}'"""},
            "verdict = 'duplicate'",
        ),
        {("verdicts", 1)},
    ),
    "duplicates in a circle": (
        lambda lake: change(
            lake, "verdicts", {"duplicate_of": "clip_id"}, "verdict = 'duplicate'"
        ),
        {("verdicts", 1)},
    ),
    "a rejection without a reason": (
        lambda lake: change(
            lake, "verdicts", {"reasons": "NULL"}, "verdict = 'reject'"
        ),
        {("verdicts", 2)},
    ),
    "a vector is cut": (
        lambda lake: lake.append("embeddings", [{
            **dict(zip(("clip_id", "attempt_id", "model"), rows(
                lake, "SELECT clip_id, attempt_id, model FROM embeddings")[0], strict=True)),
            "vector": [1.0, float("nan")]}]),
        {("embeddings", 1)},
    ),
    "a caption of no clip": (
        lambda lake: lake.append("captions", [{
            "clip_id": "x", "attempt_id": one(lake, "SELECT attempt_id FROM sources"),
            "window_number": 0, "length": "short", "text": "a bear"}]),
        {("captions", 1)},
    ),
    "a run is there twice": (
        lambda lake: lake.append("runs", [{
            "run_id": one(lake, "SELECT run_id FROM runs"), "sources_in": 9,
            "policy": "generated", "counts": one(lake, "SELECT counts FROM runs")}]),
        {("runs", 1), ("ledger", 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_wrong_is_found(own_lake, name):
    destroy, expected = BREAKS[name]
    destroy(own_lake)
    assert wrong(own_lake) == expected


def test_media_must_be_there_whole_and_decode(own_lake):
    media = own_media(own_lake)
    assert wrong(own_lake, deep=True) == set()
    content = media.read_bytes()
    middle = len(content) // 2
    media.write_bytes(content[:middle] + bytes(len(content) - middle))
    assert wrong(own_lake) == set()
    assert wrong(own_lake, deep=True) == {("media", 1)}
    media.write_bytes(content[:middle])
    assert wrong(own_lake) == {("media", 1)}
    media.unlink()
    (finding,) = check_lake(own_lake).violations
    assert finding.examples == (str(media),)


def test_sources_are_hashed_again_unless_they_changed_or_went(videos, tmp_path):
    folder, lake = tmp_path / "in", Lake(str(tmp_path / "lake"))
    folder.mkdir()
    for name, source in (("a", "short"), ("b", "still"), ("c", "bear's_den")):
        shutil.copy2(videos / f"{source}.mp4", folder / f"{name}.mp4")
    run(config(), str(folder), lake)
    (folder / "a.mp4").unlink()
    shutil.copy(folder / "c.mp4", folder / "b.mp4")
    time = (folder / "c.mp4").stat().st_mtime_ns
    content = bytearray((folder / "c.mp4").read_bytes())
    content[-1] ^= 1
    (folder / "c.mp4").write_bytes(content)
    os.utime(folder / "c.mp4", ns=(time, time))
    result = check_lake(lake, deep=True)
    assert [str(v).rpartition("/")[2] for v in result.violations] == ["c.mp4"]
    assert sorted(e.rpartition("/")[2] for n in result.notes for e in n.examples) == [
        "a.mp4", "b.mp4"
    ]  # fmt: skip


def test_the_command_says_one_line_for_each_thing_and_exits_with_1(own_lake):
    runner = CliRunner()
    answer = runner.invoke(lake_app, ["check", "--lake", own_lake.uri, "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["sound"] is True
    delete(own_lake, "sources", "status = 'failed'")
    answer = runner.invoke(lake_app, ["check", "--lake", own_lake.uri])
    assert answer.exit_code == 1
    lines = [line for line in answer.stdout.splitlines() if line.startswith("wrong")]
    assert ["9 went in, 7 are there" in line for line in lines] == [True, False]


def test_there_is_no_lake(tmp_path):
    with pytest.raises(LakeError, match="winnow run"):
        check_lake(Lake(str(tmp_path)))
