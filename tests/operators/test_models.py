from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from winnow.operators.errors import ConfigError, ModelUnavailable
from winnow.operators.models import Model, Models, sha256

COMMIT = "0123456789abcdef" * 2 + "01234567"
OTHER = "f" * 40


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """Caches of this test's own, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("WINNOW_MODELS", raising=False)

    def no_network(self, address):
        raise AssertionError(f"looked for {address} on the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def snapshot(tmp_path: Path, hub: str, commit: str, files: dict[str, bytes]) -> Path:
    """What huggingface_hub keeps of a repository."""
    repository = tmp_path / "hub" / f"models--{hub.replace('/', '--')}"
    fill(repository / "refs", {"main": commit.encode()})
    return fill(repository / "snapshots" / commit, files)


def vlm(**fields) -> Model:
    given = {"hub": "org/vlm", "revision": COMMIT, **fields}
    return Model(name="vlm", role="vlm", loader="transformers", licence="MIT", **given)


def head(**fields) -> Model:
    return Model(name="head", role="head", loader="torch", licence="MIT", **fields)


def registry(tmp_path: Path, entries: object) -> Models:
    file = tmp_path / "own" / "models.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(entries))
    return Models.read(str(file))


# --- reading ---------------------------------------------------------------------------------------


def test_every_shipped_model_is_pinned_or_says_that_it_is_not():
    for model in Models.read().models.values():
        assert model.path is None
        assert not model.remote_code
        assert model.size_mb
        assert model.unpinned == ("unpinned" in model.identity)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"revision": "main"}, "revision 'main' is not a commit"),
        ({"hub": "org/vlm"}, "needs a revision"),
        ({}, "one of `hub`, `url` or `path`"),
        ({"hub": "org/vlm", "revision": COMMIT, "url": "https://a/b"}, "one of"),
        ({"hub": "../../etc"}, "hub"),
        ({"url": "https://a/head.pth"}, "needs `files`"),
        ({"url": "https://a/b.safetensors", "files": {"b.safetensors": None}}, "needs `files`"),
        ({"url": "http://a/b.safetensors", "files": {"b.safetensors": "0" * 64}}, "https"),
        ({"url": "https://a/b", "files": {"b.json": "0" * 64, "c.json": "0" * 64}}, "end in /"),
        ({"path": "/x", "files": {"head.pth": None}}, "may run code"),
        ({"path": "/x", "files": {"a.safetensors": "123"}}, "not a SHA-256"),
        ({"path": "/x", "files": {"../a.json": None}}, "not the name of a file"),
        ({"path": "/x", "files": {"/etc/a.json": None}}, "not the name of a file"),
        ({"path": "/x", "files": {"*.json": None}}, "not the name of a file"),
        ({"path": "/x", "files": ["a.json"]}, "files"),
        ({"path": "/x", "role": "backbone", "loader": "open_clip"}, "image_size and architecture"),
        ({"path": "/x", "wieghts": "y"}, "wieghts"),
    ],
)
def test_an_entry_that_cannot_work_is_refused_when_it_is_read(tmp_path, fields, complaint):
    entry = {"role": "vlm", "loader": "transformers", "licence": "MIT", **fields}
    with pytest.raises(ConfigError, match="mine") as refusal:
        registry(tmp_path, {"mine": entry})
    assert complaint in str(refusal.value)


@pytest.mark.parametrize("entries", [{"clip-vit-l-14": None}, {"clip-vit-l-14": ["path"]}, {7: {}}])
def test_a_registry_of_another_shape_is_refused(tmp_path, entries):
    with pytest.raises(ConfigError, match=r"models\.yaml"):
        registry(tmp_path, entries)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean clip-vit-l-14"):
        Models.read().get("clip-vit-l14")


def test_own_fields_lie_over_those_of_a_shipped_model(tmp_path):
    shipped = Models.read().get("clip-vit-l-14")
    models = registry(tmp_path, {"clip-vit-l-14": {"dtype": "float16"}})
    own = models.get("clip-vit-l-14")
    assert own == shipped.model_copy(update={"dtype": "float16"})
    assert models.get("siglip2") == Models.read().get("siglip2")


def test_a_path_alone_is_enough_and_is_seen_from_the_file_that_names_it(tmp_path, monkeypatch):
    fill(tmp_path / "own" / "clip", {"open_clip_model.safetensors": b"mine, not the shipped one"})
    monkeypatch.chdir("/")
    model = registry(tmp_path, {"clip-vit-l-14": {"path": "clip"}}).get("clip-vit-l-14")
    assert model.locate() == tmp_path / "own" / "clip"
    assert model.architecture == "ViT-L-14-quickgelu"
    assert model.identity == f"{tmp_path}/own/clip@local"


def test_a_path_does_not_free_a_pickle_from_its_checksum(tmp_path):
    shipped = Models.read().get("laion-aesthetic-v2")
    (name,) = shipped.files
    fill(tmp_path / "own" / "laion", {name: b"some other pickle"})
    model = registry(tmp_path, {"laion-aesthetic-v2": {"path": "laion"}}).get("laion-aesthetic-v2")
    with pytest.raises(ModelUnavailable, match="has a wrong file"):
        model.locate()


def test_another_repository_does_not_inherit_the_commit_or_the_checksums(tmp_path):
    with pytest.raises(ConfigError, match="needs a revision"):
        registry(tmp_path, {"clip-vit-l-14": {"hub": "me/finetuned"}})
    models = registry(tmp_path, {"clip-vit-l-14": {"hub": "me/finetuned", "revision": OTHER}})
    assert models.get("clip-vit-l-14").files == {}


def test_another_commit_keeps_the_files_but_not_their_checksums(tmp_path):
    model = registry(tmp_path, {"clip-vit-l-14": {"revision": OTHER}}).get("clip-vit-l-14")
    assert model.files == {"open_clip_model.safetensors": None}
    assert model.identity.endswith(OTHER)


# --- finding ---------------------------------------------------------------------------------------


def test_a_missing_model_names_itself_the_pull_and_the_profile_without_it():
    for model in (vlm(profile_without="paper"), Models.read().get("laion-aesthetic-v2")):
        with pytest.raises(ModelUnavailable) as missing:
            model.locate()
        assert repr(model.name) in str(missing.value)
        assert f"winnow models pull {model.name}" in str(missing.value)
        assert f"--config {model.profile_without}" in str(missing.value)


def test_the_pinned_commit_is_found_and_no_other(tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"w"}
    old = snapshot(tmp_path, "org/vlm", COMMIT, files)
    snapshot(tmp_path, "org/vlm", OTHER, files)
    assert vlm().locate() == old
    assert vlm().weights() == [old / "model.safetensors"]
    with pytest.raises(ModelUnavailable):
        vlm(revision="a" * 40).locate()


def test_an_unpinned_model_is_what_main_was_and_says_which_commit(tmp_path):
    assert vlm(revision=None).identity == "org/vlm@unpinned:not fetched"
    files = {"config.json": b"{}", "model.safetensors": b"w"}
    snapshot(tmp_path, "org/vlm", OTHER, files)
    newest = snapshot(tmp_path, "org/vlm", COMMIT, files)
    assert vlm(revision=None).locate() == newest
    assert vlm(revision=None).identity == f"org/vlm@unpinned:{COMMIT}"


def test_the_hugging_face_home_is_respected(tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"w"}
    folder = snapshot(tmp_path, "org/vlm", COMMIT, files)
    script = (
        "from winnow.operators.models import Model\n"
        "m = Model(name='v', role='vlm', loader='transformers', licence='MIT', hub='org/vlm',"
        f" revision='{COMMIT}')\nprint(m.locate())"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment["HF_HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(folder)


def test_a_model_without_one_of_its_shards_is_only_there_in_part(tmp_path):
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "m-1.safetensors": b"w",
    }
    folder = snapshot(tmp_path, "org/vlm", COMMIT, files)
    (folder / "m-2.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(ModelUnavailable, match=r"in part .* lacks m-2\.safetensors"):
        vlm().locate()
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelUnavailable, match="has an index that is none"):
        vlm().locate()


def test_weights_without_their_configuration_are_only_there_in_part(tmp_path):
    snapshot(tmp_path, "org/vlm", COMMIT, {"model.safetensors": b"w"})
    with pytest.raises(ModelUnavailable, match=r"lacks config\.json"):
        vlm().locate()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model.pt"])
def test_weights_that_may_run_code_are_refused_without_a_checksum(tmp_path, name):
    fill(tmp_path / "mine", {name: b"pickle", "config.json": b"{}"})
    with pytest.raises(ModelUnavailable, match="may run code"):
        head(path=str(tmp_path / "mine")).locate()
    checked = head(path=str(tmp_path / "mine"), files={name: digest(b"pickle")})
    assert checked.weights() == [tmp_path / "mine" / name]
    with pytest.raises(ModelUnavailable, match="has a wrong file"):
        head(path=str(tmp_path / "mine"), files={name: digest(b"another")}).locate()


def test_a_path_that_is_not_there_is_said_with_its_remedy(tmp_path):
    with pytest.raises(ModelUnavailable, match="no folder here: correct its entry") as missing:
        head(path=str(tmp_path / "gone")).locate()
    assert "--config cpu" in str(missing.value)


def test_files_that_are_on_no_hub_are_in_winnows_own_folder(tmp_path, monkeypatch):
    model = head(url="https://a/h.pth", files={"h.pth": digest(b"weights")})
    folder = fill(tmp_path / "cache/winnow/models/head", {"h.pth": b"weights"})
    assert model.locate() == folder
    monkeypatch.setenv("WINNOW_MODELS", str(tmp_path / "shared"))
    with pytest.raises(ModelUnavailable):
        model.locate()
    assert fill(tmp_path / "shared/head", {"h.pth": b"weights"}) == model.locate()
    assert model.identity == f"https://a/h.pth@sha256:{digest(b'weights')}"


# --- checksums -------------------------------------------------------------------------------------


def test_a_checksum_is_remembered_until_the_file_changes(tmp_path):
    file = fill(tmp_path, {"w": b"first"}) / "w"
    assert sha256(file) == digest(b"first")
    facts = file.stat()
    file.write_bytes(b"other")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert sha256(file) == digest(b"first"), "the file was read again"
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert sha256(file) == digest(b"other")


def test_workers_that_start_together_read_the_file_once(tmp_path, monkeypatch):
    file = fill(tmp_path, {"w": b"first"}) / "w"
    read = []
    together = threading.Barrier(4)
    digest_of = hashlib.file_digest

    def counted(opened, algorithm):
        read.append(opened.name)
        return digest_of(opened, algorithm)

    def work() -> str:
        together.wait(10)
        return sha256(file)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    with ThreadPoolExecutor(4) as workers:
        digests = [worker.result(30) for worker in [workers.submit(work) for _ in range(4)]]
    assert digests == [digest(b"first")] * 4
    assert len(read) == 1


def test_a_damaged_note_is_not_believed(tmp_path):
    file = fill(tmp_path, {"w": b"first"}) / "w"
    sha256(file)
    for note in (tmp_path / "cache/winnow/checked").glob("*"):
        note.write_bytes(b"\xff half a not")
    assert sha256(file) == digest(b"first")


def test_without_a_cache_the_file_is_read_each_time(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    file = fill(tmp_path, {"w": b"first"}) / "w"
    assert sha256(file) == digest(b"first")
    with pytest.raises(FileNotFoundError):
        sha256(tmp_path / "gone")
