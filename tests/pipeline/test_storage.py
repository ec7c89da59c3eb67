"""Storage: the same behaviour over a local folder and over S3 (moto's server on loopback)."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import tempfile
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest

from winnow.operators.errors import StorageError
from winnow.pipeline.local_storage import LocalStorage
from winnow.pipeline.storage import Storage, checked_key, glob_matcher

AWKWARD = (
    'a, b\'s "q" 100% #1 ?x=é 日本 [z] {b} ~ & + = ; %20.mp4',
    "sub folder/%2F..mp4",
    "sub folder/A_spoon's_soup,_1.MP4",
    "🎬/x.mp4",
)


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path):
    """An empty storage of each kind."""
    if request.param == "local":
        return Storage.open(str(tmp_path / "root, 100%"), create=True)
    options = request.getfixturevalue("s3")
    return Storage.open(f"s3://bucket/{uuid.uuid4().hex} #1/in", options=options, create=True)


def write(storage, tmp_path, key, content=b"x"):
    path = tmp_path / f"upload-{uuid.uuid4().hex}"
    path.write_bytes(content)
    return storage.put(path, key)


def keys(storage, *patterns, exclude=()):
    return [file.key for file in storage.find(patterns or ("**",), exclude)]


# ------------------------------------------------------------------------------------ either kind


def test_any_name_survives_the_whole_round(storage, tmp_path):
    for number, key in enumerate(AWKWARD):
        uri = write(storage, tmp_path, key, content := f"{number}".encode() * 1000)
        assert uri == f"{storage.uri}/{key}"
        assert storage.key_of(uri) == key
        assert storage.exists(key)
        assert storage.read(key) == content
        assert storage.hash(key) == hashlib.sha256(content).hexdigest()
        for name in (key, uri):
            with storage.local(name) as path:
                assert path.read_bytes() == content
                assert path.suffix == Path(key).suffix
    found = list(storage.find(["**/*.mp4"]))
    assert [file.key for file in found] == sorted(AWKWARD)
    assert [file.uri for file in found] == [storage.uri_of(key) for key in sorted(AWKWARD)]
    assert all(file.size == 1000 and abs(file.modified - time.time()) < 600 for file in found)
    assert storage.skipped == []
    storage.delete(AWKWARD[0])
    assert not storage.exists(AWKWARD[0])
    storage.delete(AWKWARD[0])


def test_keys_come_in_code_point_order(storage, tmp_path):
    order = ["Z.mp4", "a b.mp4", "a!/z.mp4", "a.mp4", "a/b.mp4", "a/b/c.mp4", "a0.mp4", "é.mp4"]
    for key in reversed(order):
        write(storage, tmp_path, key)
    assert keys(storage) == sorted(order)


def test_patterns_exclusions_and_what_is_never_listed(storage, tmp_path):
    for key in ("a.mp4", "b.MP4", "c.webm", "x/d.mp4", "x/y/e.mp4", "x/notes.txt", ".hidden.mp4",
                ".cache/f.mp4", "g.mp4.part", "h.tmp", "x/.y/i.mp4"):  # fmt: skip
        write(storage, tmp_path, key)
    assert keys(storage, "**/*.mp4") == ["a.mp4", "b.MP4", "x/d.mp4", "x/y/e.mp4"]
    assert keys(storage, "*.mp4", "*.webm") == ["a.mp4", "b.MP4", "c.webm"]
    assert keys(storage, "**/*.mp4", exclude=["x/**"]) == ["a.mp4", "b.MP4"]
    assert keys(storage) == ["a.mp4", "b.MP4", "c.webm", "x/d.mp4", "x/notes.txt", "x/y/e.mp4"]
    assert storage.siblings("x/d.mp4") == {"x/d.mp4", "x/notes.txt"}
    assert storage.siblings("a.mp4") >= {"a.mp4", "b.MP4", "c.webm"}
    assert not any("hidden" in key for key in storage.siblings("a.mp4"))


def test_a_single_file_is_all_that_is_found(storage, tmp_path):
    for key in ("x/a.mp4", "x/a.txt", "x/b.mp4"):
        write(storage, tmp_path, key)
    options = getattr(storage, "_options", None)
    single = Storage.open(storage.uri_of("x/a.mp4"), options=options)
    assert single.uri == f"{storage.uri}/x"
    assert keys(single, "**/*.webm") == ["a.mp4"]
    assert single.siblings("a.mp4") == {"a.mp4", "a.txt", "b.mp4"}
    assert single.read("a.txt") == b"x"


def test_reading_has_a_limit(storage, tmp_path):
    write(storage, tmp_path, "a.json", b"x" * 1001)
    assert len(storage.read("a.json", 1001)) == 1001
    with pytest.raises(StorageError, match="more than 1000 bytes"):
        storage.read("a.json", 1000)


def test_what_is_not_there(storage):
    assert not storage.exists("no.mp4")
    with pytest.raises(StorageError, match=r"no\.mp4"):
        storage.read("no.mp4")
    with pytest.raises(StorageError, match=r"no\.mp4"):
        storage.hash("no.mp4")
    options = getattr(storage, "_options", None)
    with pytest.raises(StorageError, match=re.escape("nowhere")):
        Storage.open(f"{storage.uri}/nowhere", options=options)


@pytest.mark.parametrize(
    "key", ["../x", "a/../../x", "/etc/passwd", "", "a//b", "./a", "a/\0", "a/"]
)
def test_keys_do_not_leave_the_root(storage, tmp_path, key):
    for attempt in (storage.read, storage.exists, storage.hash, storage.delete):
        with pytest.raises(StorageError, match="not a key"):
            attempt(key)
    with pytest.raises(StorageError, match="not a key"):
        write(storage, tmp_path, key)
    with pytest.raises(StorageError, match="not a key"), storage.local(key):
        pass


def test_it_works_after_pickling(storage, tmp_path):
    write(storage, tmp_path, "a.mp4", b"abc")
    arrived = pickle.loads(pickle.dumps(storage))
    assert arrived.uri == storage.uri
    assert arrived.read("a.mp4") == b"abc"
    assert keys(arrived) == ["a.mp4"]


def test_an_error_inside_the_block_is_not_the_storages(storage, tmp_path):
    write(storage, tmp_path, "a.mp4")
    with pytest.raises(ZeroDivisionError), storage.local("a.mp4"):
        1 / 0  # noqa: B018


def test_a_put_replaces_the_whole_file(storage, tmp_path):
    write(storage, tmp_path, "a/b.mp4", b"a long old content")
    write(storage, tmp_path, "a/b.mp4", b"new")
    assert storage.read("a/b.mp4") == b"new"
    assert keys(storage) == ["a/b.mp4"]


# ------------------------------------------------------------------------------------------- local


def test_links_are_followed_only_inside(tmp_path):
    root, outside = tmp_path / "in", tmp_path / "outside"
    (root / "real").mkdir(parents=True)
    outside.mkdir()
    (root / "real/a.mp4").write_bytes(b"a")
    (outside / "secret.mp4").write_bytes(b"s")
    (root / "link.mp4").symlink_to(root / "real/a.mp4")
    (root / "folder").symlink_to("real")
    (root / "out.mp4").symlink_to(outside / "secret.mp4")
    (root / "out").symlink_to(outside)
    (root / "dangling.mp4").symlink_to(root / "gone.mp4")
    (root / "real/up").symlink_to(root)
    (root / "self.mp4").symlink_to("self.mp4")
    (root / "out.txt").symlink_to(outside / "secret.mp4")
    storage = Storage.open(str(root))
    assert keys(storage, "**/*.mp4") == ["folder/a.mp4", "link.mp4", "real/a.mp4"]
    assert {skipped.key for skipped in storage.skipped} == {
        "out.mp4", "out", "dangling.mp4", "self.mp4", "real/up", "folder/up",
    }  # fmt: skip
    for key in ("out.mp4", "out/secret.mp4"):
        with pytest.raises(StorageError, match="leads out"):
            storage.read(key)
    with pytest.raises(StorageError, match="leads out"):
        write(storage, tmp_path, "out/planted.mp4")
    with pytest.raises(StorageError, match="leads out"):
        storage.delete("out/secret.mp4")
    assert sorted(p.name for p in outside.iterdir()) == ["secret.mp4"]


def test_a_root_that_is_a_link_keeps_the_name_that_the_user_wrote(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.mp4").write_bytes(b"a")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "latest.mp4").symlink_to("real/a.mp4")
    [found] = Storage.open(str(tmp_path / "link")).find(["*"])
    assert found.uri == str(tmp_path / "link/a.mp4")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/latest.mp4").symlink_to(tmp_path / "real/a.mp4")
    named = Storage.open(str(tmp_path / "alone/latest.mp4"))
    assert keys(named) == ["latest.mp4"]
    assert named.read("latest.mp4") == b"a"


def test_special_files_and_broken_names_are_reported(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with open(os.fsencode(tmp_path) + b"/caf\xe9.mp4", "wb"):  # noqa: PTH123 - bytes are the point
        pass
    (tmp_path / "a.mp4").write_bytes(b"a")
    storage = Storage.open(str(tmp_path))
    assert keys(storage, "**/*.mp4") == ["a.mp4"]
    assert {skipped.key: skipped.reason for skipped in storage.skipped} == {
        "pipe.mp4": "not a regular file",
        "caf\\udce9.mp4": "the name is not valid UTF-8: rename the file",
    }


@contextmanager
def nobody():
    """As somebody whom permissions bind: root is not bound by any."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_unreadable_folder_is_reported():
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        for folder in ("a", "b", "c"):
            (root / folder).mkdir()
            (root / folder / "v.mp4").write_bytes(b"v")
        (root / "b").chmod(0o000)
        storage = Storage.open(name)
        with nobody():
            found = keys(storage, "**/*.mp4")
        (root / "b").chmod(0o755)
        assert found == ["a/v.mp4", "c/v.mp4"]
        [skipped] = storage.skipped
        assert skipped.key == "b"
        assert "Permission denied" in skipped.reason


def test_a_folder_tree_deeper_than_pythons_stack(tmp_path):
    folder = tmp_path
    for _ in range(1200):
        folder = folder / "d"
        folder.mkdir()
    (folder / "v.mp4").write_bytes(b"v")
    [found] = Storage.open(str(tmp_path)).find(["**/*.mp4"])
    assert found.key == "d/" * 1200 + "v.mp4"
    (folder / "v.mp4").unlink()
    while folder != tmp_path:  # pytest's own clearing up recurses
        folder.rmdir()
        folder = folder.parent


def test_a_failed_put_leaves_the_old_file_and_no_draft(tmp_path):
    storage = Storage.open(str(tmp_path / "root"), create=True)
    write(storage, tmp_path, "a.mp4", b"old")
    with pytest.raises(StorageError, match=r"a\.mp4"):
        storage.put(tmp_path, "a.mp4")  # a folder cannot be read as a file
    assert storage.read("a.mp4") == b"old"
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["a.mp4"]


def test_paths_as_users_write_them(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b/v.mp4").write_bytes(b"v")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for uri in ("a b", "./a b/", "~/a b", f"file://{tmp_path}/a%20b"):
        storage = Storage.open(uri)
        assert storage.uri == str(tmp_path / "a b")
        assert keys(storage) == ["v.mp4"]


@pytest.mark.parametrize("uri", ["ftp://host/x", "https://host/x", "nonsense://"])
def test_other_schemes_are_refused_with_a_remedy(uri):
    with pytest.raises(StorageError, match="s3://"):
        Storage.open(uri)


# --------------------------------------------------------------------------------------------- s3


def test_a_large_object_goes_through_in_parts(s3, tmp_path):
    storage = Storage.open("s3://bucket/large", options=s3, create=True)
    content = os.urandom(2**20) * 12
    write(storage, tmp_path, "big.mp4", content)
    assert storage.hash("big.mp4") == hashlib.sha256(content).hexdigest()
    with storage.local("big.mp4") as path:
        assert path.read_bytes() == content
    assert not path.exists()
    [found] = storage.find(["*"])
    assert found.etag


def test_a_temporary_copy_goes_away_after_an_error(s3, tmp_path):
    storage = Storage.open("s3://bucket/temporary", options=s3, create=True)
    write(storage, tmp_path, "a.mp4")
    with pytest.raises(ZeroDivisionError), storage.local("a.mp4") as path:
        1 / 0  # noqa: B018
    assert not path.parent.exists()


def test_a_prefix_does_not_take_in_its_namesakes(s3, tmp_path):
    root = Storage.open("s3://bucket", options=s3, create=True)
    for key in ("night1/a.mp4", "night10/b.mp4", "night1.mp4"):
        write(root, tmp_path, key)
    assert keys(Storage.open("s3://bucket/night1", options=s3)) == ["a.mp4"]
    assert keys(Storage.open("s3://bucket/night1/", options=s3)) == ["a.mp4"]
    assert {"night1/a.mp4", "night10/b.mp4", "night1.mp4"} <= set(keys(root, "**/*.mp4"))


def test_a_bucket_that_is_missing_or_silent_says_so(s3):
    with pytest.raises(StorageError, match="check the name"):
        Storage.open("s3://no-such-bucket", options=s3)
    with pytest.raises(StorageError, match="bogus"):
        Storage.open("s3://bucket", options=s3 | {"bogus": "1"})


def test_secrets_are_not_shown(s3):
    storage = Storage.open(
        "s3://bucket", options=s3 | {"aws_secret_access_key": "hush"}, create=True
    )
    assert "hush" not in repr(storage)


# ------------------------------------------------------------------------------------------ globs


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("**/*.mp4", ["a.mp4", "a/b.MP4", "a/b/c.mp4"], ["a.mp4.txt", "a.mp", "mp4"]),
        ("*.mp4", ["a.mp4"], ["a/b.mp4"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "b/a/c"]),
        ("a/**/b.mp4", ["a/b.mp4", "a/x/y/b.mp4"], ["a/xb.mp4"]),
        ("v?.mp4", ["v1.mp4"], ["v.mp4", "v/.mp4"]),
        ("v[0-9].mp4", ["v7.mp4"], ["vx.mp4", "v77.mp4"]),
        ("v[!0-9].mp4", ["vx.mp4"], ["v7.mp4", "v/.mp4"]),
        ("a+(b).mp4", ["a+(b).mp4"], ["aab.mp4"]),
        ("a[.mp4", ["a[.mp4"], ["a.mp4"]),
    ],
)
def test_globs(pattern, yes, no):
    matches = glob_matcher([pattern])
    assert [key for key in yes + no if matches(key)] == yes


def test_keys_are_plain_relative_paths():
    assert checked_key("a/..b/c") == "a/..b/c"
    assert isinstance(Storage.open(tempfile.gettempdir()), LocalStorage)
