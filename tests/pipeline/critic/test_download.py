"""Videos fetched from a server of our own that misbehaves on purpose."""

from __future__ import annotations

import email.utils
import hashlib
import time

import httpx2
import pytest

from tests.conftest import scene, write_video
from tests.pipeline.critic.video_site import serving
from winnow.operators.errors import StorageError
from winnow.operators.media import probe
from winnow.pipeline.critic import download
from winnow.pipeline.critic.download import Failed, Patience, Stored, VideoStore

HURRIED = Patience(pause_s=0.0, attempts=4, timeout_s=5.0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [
        write_video(folder / f"{n}.mp4", scene(n, 8, 160, 96), fps=8).read_bytes() for n in range(3)
    ]


@pytest.fixture
def site():
    with serving() as site:
        yield site


@pytest.fixture
def store(tmp_path):
    return VideoStore(tmp_path / "videos", HURRIED)


def one(store: VideoStore, uri: str) -> Stored | Failed:
    (result,) = store.fetch([uri]).values()
    return result


def got(store: VideoStore, uri: str) -> bytes:
    result = one(store, uri)
    assert isinstance(result, Stored), result
    content = result.path.read_bytes()
    assert result.sha256 == hashlib.sha256(content).hexdigest()
    assert result.size == len(content)
    return content


def failure(store: VideoStore, uri: str) -> str:
    result = one(store, uri)
    assert isinstance(result, Failed), result
    assert store.find(uri) is None
    assert not any((store.folder / "by-hash").iterdir())
    return result.reason


# --- what is kept ----------------------------------------------------------------------------------


def test_a_video_is_kept_by_its_content_and_fetched_once(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    assert got(store, uri) == clips[0]
    assert one(store, uri).path.name == f"{hashlib.sha256(clips[0]).hexdigest()}.mp4"
    assert got(VideoStore(store.folder), uri) == clips[0]
    assert len(site.headers) == 1
    assert not list((store.folder / "parts").iterdir())


def test_two_addresses_of_one_content_share_its_file(site, store, clips):
    uris = [site.put("/a.mp4", clips[0]), site.put("/b.mp4", clips[0])]
    assert len({result.path for result in store.fetch(uris).values()}) == 1
    assert len(list((store.folder / "by-hash").iterdir())) == 1


def test_fault_b_addresses_keep_their_videos_in_whatever_order_they_are_asked(site, store, clips):
    uris = [site.put(f"/{n}.mp4", clip) for n, clip in enumerate(clips)]
    store.fetch(uris)
    again = VideoStore(store.folder).fetch([uris[2], uris[0], uris[1], uris[0]])
    assert [r.path.read_bytes() for r in again.values()] == [clips[2], clips[0], clips[1]]


def test_fault_c_a_file_that_was_damaged_later_is_fetched_anew(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    path = one(store, uri).path
    path.write_bytes(clips[0][:1000])
    assert store.find(uri) is None
    assert got(store, uri) == clips[0]


@pytest.mark.parametrize("record", ["", "{", "[]", '{"uri": 3}', '{"file": "../../x"}'])
def test_a_damaged_record_is_no_record(site, store, clips, record):
    uri = site.put("/a.mp4", clips[0])
    store.fetch([uri])
    (kept,) = (store.folder / "by-uri").iterdir()
    kept.write_text(record)
    assert store.find(uri) is None
    assert got(store, uri) == clips[0]


def test_one_failure_does_not_keep_the_others(site, store, clips):
    good, bad = site.put("/a.mp4", clips[0]), site.address + "/missing.mp4"
    lines: list[str] = []
    results = store.fetch([bad, good], report=lines.append)
    assert list(results) == [bad, good]
    assert results[bad] == Failed("download", "the server answers with status 404")
    assert isinstance(results[good], Stored)
    assert "1 of 2 videos, 1 failed" in lines[-1]


def test_no_more_downloads_at_once_than_workers(site, store, clips):
    site.pause_s = 0.05
    uris = [site.put(f"/{n}.mp4", clips[0]) for n in range(9)]
    store.fetch(uris, workers=3)
    assert 1 < site.most_busy <= 3


def test_a_folder_that_cannot_be_written_stops_it_all(tmp_path, site, clips):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot keep videos"):
        VideoStore(tmp_path / "file").fetch([site.put("/a.mp4", clips[0])])


# --- cut off ---------------------------------------------------------------------------------------


def test_a_download_goes_on_where_it_was_cut_off(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    site.moods["/a.mp4"] = ["cut", "cut"]
    assert got(store, uri) == clips[0]
    half = len(clips[0]) // 2
    three_quarters = half + (len(clips[0]) - half) // 2
    assert site.ranges() == ["", f"bytes={half}-", f"bytes={three_quarters}-"]
    assert site.headers[1][1]["If-Range"].startswith('"')


def test_another_process_goes_on_with_what_was_left(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    site.moods["/a.mp4"] = ["cut"]
    assert "breaks off" in failure(VideoStore(store.folder, Patience(attempts=1)), uri)
    assert got(store, uri) == clips[0]
    assert site.ranges()[1] == f"bytes={len(clips[0]) // 2}-"


def test_a_file_that_changed_in_between_is_begun_anew(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    site.moods["/a.mp4"] = ["cut"]
    failure(VideoStore(store.folder, Patience(attempts=1)), uri)
    site.put("/a.mp4", clips[1])
    assert got(store, uri) == clips[1]


def test_a_server_that_ignores_the_condition_cannot_mix_two_files(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    site.moods["/a.mp4"] = ["cut"]
    failure(VideoStore(store.folder, Patience(attempts=1)), uri)
    site.put("/a.mp4", clips[1])
    site.moods["/a.mp4"] = ["deaf"]
    assert got(store, uri) == clips[1]
    assert site.ranges()[2] == ""


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_etag_it_begins_anew(site, store, clips, etag):
    uri = site.put("/a.mp4", clips[0])
    site.etags["/a.mp4"] = etag
    site.moods["/a.mp4"] = ["cut"]
    assert got(store, uri) == clips[0]
    assert site.ranges() == ["", ""]


def test_a_part_longer_than_the_file_is_dropped(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    site.etags["/a.mp4"] = '"same"'
    site.moods["/a.mp4"] = ["cut"]
    failure(VideoStore(store.folder, Patience(attempts=1)), uri)
    short = write_video(store.folder / "short.mp4", scene(5, 2, 64, 64), fps=8).read_bytes()
    assert len(short) < len(clips[0]) // 2
    site.put("/a.mp4", short)
    assert got(store, uri) == short


def test_a_damaged_old_part_does_not_spoil_the_video_for_ever(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    site.moods["/a.mp4"] = ["cut"]
    failure(VideoStore(store.folder, Patience(attempts=1)), uri)
    (part,) = (store.folder / "parts").glob("*.part")
    part.write_bytes(bytes(part.stat().st_size))
    assert got(store, uri) == clips[0]


def test_fault_c_a_download_that_ends_early_is_no_video(site, store, clips):
    """The server announces as much as it sends, and it is not the whole file."""
    uri = site.put("/a.mp4", clips[0])
    site.moods["/a.mp4"] = ["short"]
    assert "truncated" in failure(store, uri)
    assert len(site.headers) == 1
    assert not list((store.folder / "parts").iterdir())
    assert got(store, uri) == clips[0]


def test_fault_c_less_than_was_announced_is_not_kept(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    site.moods["/a.mp4"] = ["long"] * 9
    failure(store, uri)
    site.moods["/a.mp4"] = []
    assert got(store, uri) == clips[0]


# --- servers that are busy, slow, or have something else -----------------------------------------------


def test_a_server_error_passes(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    site.moods["/a.mp4"] = ["500", "503", "429"]
    assert got(store, uri) == clips[0]


def test_a_server_that_stays_broken_is_given_up(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    site.moods["/a.mp4"] = ["500"] * 9
    assert failure(store, uri) == "the server answers with status 500"
    assert len(site.headers) == HURRIED.attempts


@pytest.mark.parametrize("status", ["401", "403", "404", "410"])
def test_what_is_not_there_is_asked_for_once(site, store, clips, status):
    uri = site.put("/a.mp4", clips[0])
    site.moods["/a.mp4"] = [status]
    assert failure(store, uri) == f"the server answers with status {status}"
    assert len(site.headers) == 1


@pytest.mark.parametrize("as_date", [False, True])
def test_it_waits_as_long_as_the_server_asks(site, store, clips, as_date):
    uri = site.put("/a.mp4", clips[0])
    # A date has whole seconds, and answering takes a while: three from now is more than one.
    asked = email.utils.formatdate(time.time() + 3, usegmt=True) if as_date else "1"
    site.moods["/a.mp4"] = [f"429:{asked}"]
    assert got(store, uri) == clips[0]
    assert site.times[1] - site.times[0] > 0.9


def test_a_server_that_asks_for_too_long_a_pause_is_not_asked_again(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    site.moods["/a.mp4"] = ["429:3600"]
    assert failure(store, uri) == "the server answers with status 429"
    assert len(site.headers) == 1


def test_a_server_that_falls_silent_is_asked_again(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    site.moods["/a.mp4"] = ["stall"]
    assert got(VideoStore(store.folder, Patience(pause_s=0.0, timeout_s=0.2)), uri) == clips[0]


def test_a_trickle_is_given_up(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    site.moods["/a.mp4"] = ["trickle"] * 9
    hasty = Patience(pause_s=0.0, slow_s=0.3, slowest=1e6)
    assert "too slow" in failure(VideoStore(store.folder, hasty), uri)


def test_a_server_that_is_not_there(store):
    assert "cannot be reached" in failure(store, "http://127.0.0.1:9/a.mp4")


def test_without_a_network_not_every_video_is_tried(store):
    uris = [f"http://127.0.0.1:9/{n}.mp4" for n in range(50)]
    reasons = [result.reason for result in store.fetch(uris, workers=1).values()]
    assert all("cannot be reached" in reason for reason in reasons)
    assert reasons.count("127.0.0.1:9 cannot be reached") == 47


def test_an_error_page_is_no_video(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    site.moods["/a.mp4"] = ["html"]
    result = one(store, uri)
    assert isinstance(result, Failed)
    assert result.kind == "not_video"
    assert "text/html" in result.reason


def test_a_file_that_is_announced_too_large_is_not_fetched(site, store, clips):
    small = VideoStore(store.folder, Patience(max_bytes=1000))
    assert "the limit is 1000" in failure(small, site.put("/a.mp4", clips[0]))


def test_a_file_that_does_not_end_is_broken_off(site, store, clips):
    uri = site.put("/a.mp4", clips[0])
    site.moods["/a.mp4"] = ["endless"]
    small = VideoStore(store.folder, Patience(max_bytes=3 * len(clips[0])))
    assert "the limit is" in failure(small, uri)
    assert not list((store.folder / "parts").iterdir())


# --- where it may go -------------------------------------------------------------------------------


def test_a_redirect_is_followed(site, store, clips):
    uri = site.address + "/old.mp4"
    site.moods["/old.mp4"] = [f"302:{site.put('/new.mp4', clips[0])}"]
    assert got(store, uri) == clips[0]


@pytest.mark.parametrize(
    "place", ["http://videos.invalid/a.mp4", "file:///etc/passwd", "ftp://127.0.0.1/a"]
)
def test_a_redirect_to_another_protocol_is_refused(site, store, place):
    site.moods["/a.mp4"] = [f"302:{place}"] * 9
    assert "not https" in failure(store, site.address + "/a.mp4")
    assert len(site.headers) == 1


def test_redirects_in_a_circle_end(site, store):
    site.moods["/a.mp4"] = ["302:/a.mp4"] * 99
    assert "redirects" in failure(store, site.address + "/a.mp4")


def test_a_server_elsewhere_cannot_reach_the_services_of_this_machine():
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(str(request.url))
        return httpx2.Response(302, headers={"Location": "http://127.0.0.1:8080/admin"})

    with (
        httpx2.Client(transport=httpx2.MockTransport(answer)) as client,
        pytest.raises(Exception, match="refused to fetch"),
        download._open(client, "https://videos.invalid/a.mp4", {}),
    ):
        pass
    assert asked == ["https://videos.invalid/a.mp4"]


@pytest.mark.parametrize(
    "uri", ["http://videos.invalid/a.mp4", "file:///etc/passwd", "data:video/mp4;base64,AAAA"]
)
def test_only_https_is_fetched_from_elsewhere(store, uri):
    assert "not https" in failure(store, uri)


def test_what_was_fetched_is_a_video(site, store, clips):
    info = probe(one(store, site.put("/a.mp4", clips[1])).path)
    assert (info.frames, info.width, info.height) == (8, 160, 96)
