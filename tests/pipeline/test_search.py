"""Search: neighbours of clips and videos, words, filters; the indexes rebuilt and checked."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from tests.conftest import scene, write_video
from tests.pipeline.lakes import rows
from winnow.operators.errors import ConfigError, MediaError
from winnow.pipeline import search as by
from winnow.pipeline.index import MilvusIndex, plain_words
from winnow.pipeline.index_check import check_indexes, kept_index, rebuild_indexes
from winnow.pipeline.index_commands import index_app
from winnow.pipeline.lake import Lake
from winnow.pipeline.query_commands import search, sql
from winnow.pipeline.search_index import IndexPlace, SearchIndex, search_indexes
from winnow.stages.dedup import Entry


@pytest.fixture(scope="module")
def told(lake: Lake, tmp_path_factory) -> Lake:
    """The lake with captions of two of its clips."""
    folder = tmp_path_factory.mktemp("told") / "lake"
    shutil.copytree(lake.uri, folder)
    told = Lake(str(folder))
    caption(told, "bear's_den.mp4", "A brown BEAR leaves its den; 熊は雪の中を歩く")
    caption(told, "still.mp4", "a bear on a photograph, and a bear in a mirror")
    return told


def caption(lake: Lake, name: str, text: str, status: str = "ok") -> None:
    ((clip_id, attempt),) = rows(
        lake,
        "SELECT clip_id, attempt_id FROM clips_decided "
        f"WHERE ends_with(uri, '/{name.replace(chr(39), chr(39) * 2)}')",
    )
    lake.append("captions", [{"clip_id": clip_id, "attempt_id": attempt, "window_number": 0,
                              "length": "short", "status": status, "text": text}])  # fmt: skip


def names(hits: list[by.Hit]) -> list[str]:
    return [Path(hit.uri).name for hit in hits]


def clip_of(lake: Lake, name: str) -> str:
    return rows(lake, f"SELECT clip_id FROM clips_decided WHERE uri LIKE '%/{name}'")[0][0]


def test_the_nearest_neighbour_of_a_clip_is_its_smaller_copy(lake: Lake):
    hits = by.search_clip(lake, clip_of(lake, "bear small.mp4"), 3)
    assert names(hits)[0] == "bear's_den.mp4"
    assert hits[0].similarity > 0.8 > hits[1].similarity
    assert len({hit.clip_id for hit in hits}) == 3
    assert clip_of(lake, "bear small.mp4") not in {hit.clip_id for hit in hits}


def test_neighbours_are_those_of_exact_search(lake: Lake):
    vectors = dict(rows(lake, "SELECT clip_id, vector FROM embeddings"))
    asked = clip_of(lake, "short.mp4")
    wanted = {c: float(np.dot(v, vectors[asked])) for c, v in vectors.items() if c != asked}
    found = {hit.clip_id: hit.similarity for hit in by.search_clip(lake, asked, 100)}
    assert found == pytest.approx(wanted, abs=1e-5)


def test_a_video_file_finds_its_like(lake: Lake, tmp_path):
    write_video(tmp_path / "asked.mp4", [image[::2, ::2] for image in scene(1, 60)])
    hits = by.search_video(lake, str(tmp_path / "asked.mp4"), 2)
    assert set(names(hits)) == {"bear's_den.mp4", "bear small.mp4"}


def test_a_file_that_is_no_video_is_explained(lake: Lake, tmp_path):
    (tmp_path / "noise.mp4").write_bytes(b"no video" * 1000)
    with pytest.raises(MediaError, match=r"noise\.mp4"):
        by.search_video(lake, str(tmp_path / "noise.mp4"), 2)
    with pytest.raises(ConfigError, match="one video file"):
        by.search_video(lake, str(tmp_path), 2)


def test_words_are_found_in_prompts_and_captions_best_first(told: Lake):
    assert names(by.search_words(told, "apple")) == ["apple, red.mp4"]
    assert names(by.search_words(told, "Bear")) == ["still.mp4", "bear's_den.mp4"]
    assert names(by.search_words(told, "brown bear"))[0] == "bear's_den.mp4"
    assert names(by.search_words(told, "雪")) == ["bear's_den.mp4"]
    assert by.search_words(told, "zebra") == []
    assert all(hit.similarity > 0 for hit in by.search_words(told, "bear"))


def test_words_that_change_in_the_lake_change_in_the_index(own_lake: Lake):
    assert names(by.search_words(own_lake, "falls")) == ["apple, red.mp4"]
    assert by.search_words(own_lake, "tumbles") == []
    caption(own_lake, "apple, red.mp4", "it tumbles")
    caption(own_lake, "still.mp4", "it tumbles, said the model, and broke off", "error")
    assert names(by.search_words(own_lake, "tumbles")) == ["apple, red.mp4"]
    assert names(by.search_words(own_lake, "falls")) == ["apple, red.mp4"]


def test_words_are_folded_before_they_are_indexed():
    assert plain_words("ＡＢＣ Straße  熊は") == "abc strasse 熊 は"
    assert len(plain_words("é" * 50_000).encode()) <= 65_535


@pytest.mark.parametrize("words", ["", " ", "?!"])
def test_a_search_for_no_word_is_refused(told: Lake, words):
    with pytest.raises(ConfigError, match="--words"):
        by.search_words(told, words)


def test_a_filter_leaves_as_many_hits_as_there_are(told: Lake):
    asked = clip_of(told, "short.mp4")
    decided = dict(rows(told, "SELECT clip_id, verdict FROM clips_decided"))
    kept = {c for c, verdict in decided.items() if verdict == "keep" and c != asked}
    hits = by.search_clip(told, asked, 2, where="verdict = 'keep'")
    assert len(hits) == min(2, len(kept))
    assert {hit.clip_id for hit in hits} <= kept
    assert names(by.search_words(told, "bear", where="uri LIKE '%den%'")) == ["bear's_den.mp4"]
    assert by.search_words(told, "bear", where="NULL::BOOLEAN") == []


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("motion_maen < 1", "did you mean 'motion_mean'"),
        ("motion_mean", "not true or false"),
        ("clip_id IN (SELECT clip_id FROM verdicts)", "no query"),
        ("true); DROP TABLE x; --", "--where"),
        ("length(read_text('/etc/passwd')) > 0", "--where"),
        ("count(*) > 1", "--where"),
        ("", "empty"),
    ],
)
def test_a_filter_that_is_no_predicate_is_refused(lake: Lake, where, words):
    with pytest.raises(ConfigError, match=words):
        by.search_clip(lake, "x", where=where)


def test_a_clip_that_is_not_there_is_explained(lake: Lake):
    with pytest.raises(ConfigError, match="no clip 'x'"):
        by.search_clip(lake, "x")


class FewAtOnce(MilvusIndex):
    """Asks as of a server, which gives a limited number of hits, of files in a folder."""

    def _nearest_of(self, query, count, wanted):
        from winnow.pipeline import index

        real, index._SERVER_LIMIT = index._SERVER_LIMIT, 64
        files, self.uri = self.uri, "http://" + self.uri
        try:
            return super()._nearest_of(query, count, wanted)
        finally:
            index._SERVER_LIMIT, self.uri = real, files


def test_rare_clips_are_found_behind_many_others(tmp_path):
    drawn = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)
    vectors = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    index = MilvusIndex(str(tmp_path / "m.db"), "many")
    index.open()
    index.add_all([Entry(f"c{n:04}", v, 0, 0) for n, v in enumerate(vectors)])
    by_distance = sorted(range(3000), key=lambda n: -float(vectors[n] @ vectors[0]))
    rare = {f"c{n:04}" for n in by_distance[-3:]}
    wanted = [f"c{n:04}" for n in by_distance[-3:]]
    assert [c for c, _ in index.nearest(vectors[0], 3, rare)] == wanted
    index.close()
    limited = FewAtOnce(str(tmp_path / "m.db"), "many")
    limited.open()
    assert [c for c, _ in limited.nearest(vectors[0], 3, rare)] == wanted
    assert [c for c, _ in limited.nearest(vectors[0], 5, rare | {"nosuch"})] == wanted
    limited.close()


def test_check_says_what_differs_and_rebuild_mends_it(own_lake: Lake):
    caption(own_lake, "still.mp4", "a bear")
    checked = {one.index: one for one in check_indexes(own_lake)}
    assert all(one.agrees for one in checked.values())
    assert not checked["search by words"].made, "nobody has searched yet"
    rebuild_indexes(own_lake)
    checked = check_indexes(own_lake)
    assert [one.made and one.agrees for one in checked] == [True] * 3
    spoil(own_lake)
    dedup, looks, words = check_indexes(own_lake)
    assert (dedup.missing, dedup.extra, dedup.differing) == (0, 1, 0)
    assert (looks.missing, looks.extra, looks.differing) == (1, 0, 1)
    assert (words.missing, words.extra, words.differing) == (1, 0, 0)
    assert "1 too many" in str(dedup)
    assert "winnow index rebuild" in str(looks)
    assert [one.clips for one in rebuild_indexes(own_lake)] == [
        dedup.clips,
        looks.clips,
        words.clips,
    ]
    assert all(one.made and one.agrees for one in check_indexes(own_lake))


def spoil(lake: Lake) -> None:
    """Take out of the indexes, add to them, and change a vector."""
    stranger = np.eye(256, dtype=np.float32)[0]
    kept = kept_index(lake)
    index = MilvusIndex(kept.uri, kept.collection)
    index.open()
    index.add(Entry("stranger", stranger, 1, 99))
    index.close()
    looks, words = search_indexes(lake)
    index = looks.bare()
    first, second, *_ = sorted(index.contents())
    index.remove([first])
    index.add(Entry(second, stranger, 0, index.contents()[second]))
    index.close()
    index = words.bare()
    index.remove([clip_of(lake, "still.mp4")])
    index.close()


def winnow(*arguments: object) -> tuple[int, str, Exception | None]:
    app = typer.Typer()
    app.add_typer(index_app, name="index")
    app.command()(search)
    app.command()(sql)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.exception


def test_the_commands_answer(own_lake: Lake):
    shutil.rmtree(Path(own_lake.uri) / "index")
    code, out, _ = winnow("index", "check", "--lake", own_lake.uri, "--json")
    assert code == 1
    assert [one["agrees"] for one in json.loads(out)] == [False, True, True]
    code, out, _ = winnow("index", "rebuild", "--lake", own_lake.uri, "--json")
    assert code == 0
    assert [one["index"].split()[0] for one in json.loads(out)] == ["dedup", "search", "search"]
    assert winnow("index", "check", "--lake", own_lake.uri)[0] == 0
    code, out, _ = winnow("search", "--lake", own_lake.uri, "-w", "apple", "--json")
    assert [hit["prompt"] for hit in json.loads(out)] == ["an apple falls"]
    assert winnow("search", "--lake", own_lake.uri, "-w", "zebra")[:2] == (0, "no clip was found\n")
    code, out, _ = winnow("sql", "--lake", f"a={own_lake.uri}", "--lake", f"b={own_lake.uri}",
                          "SELECT count(*) AS n FROM a.clips JOIN b.clips USING (clip_id)",
                          "--as-of", "2999-01-01", "-f", "csv")  # fmt: skip
    assert out == '"n"\n6\n'
    code, out, _ = winnow("sql", "--lake", own_lake.uri, "--describe", "clips", "-f", "csv")
    assert out.startswith('"table","column","type","meaning","unit","range","direction"')


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search"], "one of --text"),
        (["search", "-w", "a", "--clip", "b"], "one of --text"),
        (["sql"], "--describe"),
    ],
)
def test_a_command_without_a_question_is_explained(lake: Lake, arguments, words):
    code, _, error = winnow(*arguments, "--lake", lake.uri)
    assert code == 1
    assert isinstance(error, ConfigError)
    assert words in str(error)


def test_a_search_mends_an_index_that_lost_a_clip(own_lake: Lake):
    asked = clip_of(own_lake, "short.mp4")
    before = by.search_clip(own_lake, asked, 10)
    searched = SearchIndex(own_lake, "fingerprint_v1")
    index = searched.bare()
    index.remove([before[0].clip_id])
    index.close()
    assert by.search_clip(own_lake, asked, 10) == before


def test_an_unchanged_lake_is_not_compared_with_its_index_again(own_lake: Lake, monkeypatch):
    asked = clip_of(own_lake, "short.mp4")
    before = by.search_clip(own_lake, asked, 10)
    monkeypatch.setattr(SearchIndex, "reconcile", lambda *_: pytest.fail("compared again"))
    assert by.search_clip(own_lake, asked, 10) == before


def test_notes_that_cannot_be_read_are_made_again(own_lake: Lake):
    by.search_words(own_lake, "apple")
    notes = Path(own_lake.uri) / "index" / "search.json"
    for text in ("", "[]", '{"x": 1}'):
        notes.write_text(text)
        assert names(by.search_words(own_lake, "apple")) == ["apple, red.mp4"]
        assert json.loads(notes.read_text())


def test_an_index_elsewhere_is_another_index(own_lake: Lake, tmp_path):
    place = IndexPlace(str(tmp_path / "elsewhere.db"))
    assert by.search_words(own_lake, "apple", place=place) == by.search_words(own_lake, "apple")
    assert (tmp_path / "elsewhere.db").exists()
