"""Fetching models, from a hub and a web server of our own that misbehave on purpose."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from winnow.operators.errors import ConfigError, ModelUnavailable
from winnow.operators.models import Model, Models
from winnow.pipeline.models import check_present, list_models, pull

COMMIT = "0123456789abcdef" * 2 + "01234567"
WEIGHTS = bytes(range(256)) * 2000


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Site:
    """What the server serves, how it misbehaves, and what it was asked."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """By path: `/org/repo/<file>` of the hub, or any other."""
    cuts: dict[str, int] = field(default_factory=dict)
    """How often the connection is cut in the middle of a file."""
    failures: dict[str, list[int]] = field(default_factory=dict)
    """Statuses that come before the file does."""
    redirects: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    knows_ranges: bool = True
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and range of every request."""

    def fetched(self) -> list[str]:
        return [path for method, path, _ in self.asked if method == "GET"]


def handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            site.asked.append((self.command, path, self.headers.get("Range", "")))
            if listed := re.fullmatch(r"/api/models/(.+)/(tree|revision)/(\w+)", path):
                self.describe(*listed.groups())
            elif found := re.fullmatch(r"(/.+)/resolve/(\w+)/(.+)", path):
                repository, revision, name = found.groups()
                if site.gated:
                    self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
                elif revision != COMMIT:
                    self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                else:
                    self.serve(f"{repository}/{name}")
            elif path in site.redirects:
                self.answer(302, b"", {"Location": site.redirects[path]})
            else:
                self.serve(path)

        def describe(self, repository: str, what: str, revision: str) -> None:
            if statuses := site.failures.get(repository):
                self.answer(statuses.pop(0), b"")
            elif revision not in (COMMIT, "main"):
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif what == "revision":
                self.answer(200, json.dumps({"id": repository, "sha": COMMIT}).encode())
            else:
                start = f"/{repository}/"
                listed = [
                    {"type": "file", "path": path.removeprefix(start), "size": len(content),
                     "oid": digest(content)[:40]}
                    for path, content in site.files.items() if path.startswith(start)
                ]  # fmt: skip
                self.answer(200, json.dumps(listed).encode())

        def serve(self, path: str) -> None:
            if statuses := site.failures.get(path):
                self.answer(statuses.pop(0), b"")
                return
            if path not in site.files:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            content = site.files[path]
            headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": COMMIT}
            asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if not asked or not site.knows_ranges:
                self.answer(200, content, headers, path)
                return
            start = int(asked[1])
            if start >= len(content):
                self.answer(416, b"")
                return
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[start:], headers, path)

        def answer(
            self, status: int, content: bytes, headers: dict[str, str] | None = None, path: str = ""
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if site.cuts.get(path, 0) > 0:
                site.cuts[path] -= 1
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            self.wfile.write(content)

    return Handler


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A hub and web server on loopback, and caches of this test's own."""
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(site))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_port}"
    use_hub(monkeypatch, site.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("WINNOW_MODELS", raising=False)
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def vlm(name: str = "vlm", **fields: Any) -> Model:
    given = {"hub": f"org/{name}", "revision": COMMIT, **fields}
    return Model(name=name, role="vlm", loader="transformers", licence="MIT", **given)


def head(site: Site, content: bytes = WEIGHTS, **fields: Any) -> Model:
    given = {"url": f"{site.address}/head.pth", "files": {"head.pth": digest(content)}, **fields}
    return Model(name="head", role="head", loader="torch", licence="MIT", **given)


def serve_vlm(site: Site, name: str = "vlm", weights: bytes = WEIGHTS) -> None:
    for file, content in {
        "config.json": b"{}", "model.safetensors": weights, "chat_template.jinja": b"{{ x }}",
        "merges.txt": b"a b", "pytorch_model.bin": b"pickle", "modeling.py": b"import os",
        "README.md": b"read me",
    }.items():  # fmt: skip
        site.files[f"/org/{name}/{file}"] = content


def fetch(*models: Model, names: list[str] | None = None) -> tuple[list[dict[str, Any]], str]:
    """The rows, and what was reported."""
    lines: list[str] = []
    registry = Models(models={model.name: model for model in models})
    rows = pull(registry, names or list(registry.models), lines.append, pause_s=0.0)
    return rows, "\n".join(lines)


def refusal(*models: Model) -> str:
    with pytest.raises(ModelUnavailable) as refused:
        fetch(*models)
    return str(refused.value)


# --- from the hub ----------------------------------------------------------------------------------


def test_what_cannot_run_code_is_fetched_at_the_pinned_commit(site):
    serve_vlm(site)
    models = Models(models={"vlm": vlm()})
    (before,) = list_models(models)
    assert not before["present"]
    assert "winnow models pull vlm" in before["where"]
    (row,), reported = fetch(vlm())
    folder = Path(row["where"])
    assert row["present"]
    assert row["identity"] == f"org/vlm@{COMMIT}"
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "model.safetensors", "chat_template.jinja", "merges.txt",
    }  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert "complete" in reported
    assert list_models(models) == [row]
    check_present(models, ["vlm"])


def test_what_is_here_already_is_not_asked_for_again(site):
    serve_vlm(site)
    fetch(vlm())
    site.asked.clear()
    _, reported = fetch(vlm())
    assert "here already" in reported
    assert site.asked == []


def test_a_cut_connection_is_taken_up_again(site):
    serve_vlm(site)
    site.cuts["/org/vlm/model.safetensors"] = 1
    (row,), _ = fetch(vlm())
    assert (Path(row["where"]) / "model.safetensors").read_bytes() == WEIGHTS
    assert site.fetched().count(f"/org/vlm/resolve/{COMMIT}/model.safetensors") == 2


def test_a_hub_that_is_busy_is_asked_again(site):
    serve_vlm(site)
    site.failures["org/vlm"] = [503, 429]
    (row,), _ = fetch(vlm())
    assert row["present"]


def test_a_hub_that_stays_broken_is_said_to_be(site):
    serve_vlm(site)
    site.failures["org/vlm"] = [500] * 20
    assert "answers with status 500" in refusal(vlm())
    assert len(site.failures["org/vlm"]) == 16


def test_a_download_that_stopped_is_completed(site):
    serve_vlm(site)
    (row,), _ = fetch(vlm())
    weights = Path(row["where"]) / "model.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    with pytest.raises(ModelUnavailable, match="in part"):
        vlm().locate()
    site.asked.clear()
    (row,), _ = fetch(vlm())
    assert weights.read_bytes() == WEIGHTS
    fetched = [path for path in site.fetched() if "/resolve/" in path]
    assert fetched == [f"/org/vlm/resolve/{COMMIT}/model.safetensors"]


def test_a_gated_model_asks_for_the_licence_and_a_token(site):
    serve_vlm(site)
    site.gated = True
    said = refusal(vlm(gated=True))
    assert f"accept its licence at {site.address}/org/vlm" in said
    assert "HF_TOKEN" in said


def test_an_unknown_commit_or_repository_is_named(site):
    serve_vlm(site)
    assert f"has no commit {'e' * 40}" in refusal(vlm(revision="e" * 40))
    site.failures["org/vlm"] = [401] * 20
    assert "is not there, or not for you" in refusal(vlm())


def test_an_unpinned_model_is_resolved_once_and_says_how_to_pin_it(site):
    serve_vlm(site)
    (row,), reported = fetch(vlm(revision=None))
    assert f"vlm: {{revision: {COMMIT}}}" in reported
    assert row["identity"] == f"org/vlm@unpinned:{COMMIT}"
    site.asked.clear()
    fetch(vlm(revision=None))
    assert site.asked == []


def test_a_wrong_checksum_from_the_hub_is_refused_removed_and_then_repaired(site):
    serve_vlm(site, weights=b"tampered")
    model = vlm(files={"config.json": None, "model.safetensors": digest(WEIGHTS)})
    assert "has not the SHA-256 of the registry" in refusal(model)
    kept = [file for file in Path(constants.HF_HUB_CACHE).rglob("*") if file.is_file()]
    assert all(file.read_bytes() != b"tampered" for file in kept)
    assert not list_models(Models(models={"vlm": model}))[0]["present"]


def test_a_file_that_went_bad_on_disk_is_fetched_again(site):
    serve_vlm(site)
    model = vlm(files={"config.json": None, "model.safetensors": digest(WEIGHTS)})
    (row,), _ = fetch(model)
    weights = Path(row["where"]) / "model.safetensors"
    weights.resolve().write_bytes(b"rotten")
    with pytest.raises(ModelUnavailable, match="has a wrong file"):
        model.locate()
    fetch(model)
    assert weights.read_bytes() == WEIGHTS


def test_without_a_network_it_says_what_to_do(site, monkeypatch):
    use_hub(monkeypatch, "http://127.0.0.1:1")
    said = refusal(vlm(), head(site, url="http://127.0.0.1:1/head.pth"))
    assert "http://127.0.0.1:1 cannot be reached" in said
    assert "http://127.0.0.1:1/head.pth cannot be reached" in said
    assert said.count("--config cpu") == said.count("named as `path`") == 2


def test_the_offline_switch_of_the_hub_is_obeyed_by_both_kinds(site, monkeypatch):
    serve_vlm(site)
    site.files["/head.pth"] = WEIGHTS
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(vlm(), head(site)).count("HF_HUB_OFFLINE forbids it") == 2
    assert site.asked == []


# --- from a url ------------------------------------------------------------------------------------


def test_a_file_by_url_is_fetched_checked_and_found(site):
    site.files["/head.pth"] = WEIGHTS
    (row,), _ = fetch(head(site))
    folder = Path(row["where"])
    assert (folder / "head.pth").read_bytes() == WEIGHTS
    assert not list(folder.glob("*.part"))


def test_several_files_come_from_the_folder_of_the_url(site):
    files = {"a+b.json": b"{}", "deep/w.safetensors": WEIGHTS}
    site.files = {f"/models/{name}": content for name, content in files.items()}
    model = head(site, url=f"{site.address}/models/",
                 files={name: digest(content) for name, content in files.items()})  # fmt: skip
    (row,), _ = fetch(model)
    assert {n: (Path(row["where"]) / n).read_bytes() for n in files} == files


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_cut_download_goes_on_or_starts_again(site, knows_ranges):
    site.files["/head.pth"] = WEIGHTS
    site.cuts["/head.pth"] = 2
    site.knows_ranges = knows_ranges
    (row,), _ = fetch(head(site))
    assert (Path(row["where"]) / "head.pth").read_bytes() == WEIGHTS
    assert [bool(asked) for _, _, asked in site.asked] == [False, True, True]


def test_a_download_goes_on_in_the_next_pull(site):
    site.files["/head.pth"] = WEIGHTS
    site.cuts["/head.pth"] = 100
    assert "cannot be reached" in refusal(head(site))
    site.cuts.clear()
    site.asked.clear()
    fetch(head(site))
    assert re.fullmatch(r"bytes=[1-9]\d*-", site.asked[0][2])


@pytest.mark.parametrize("left_over", [b"of another file", WEIGHTS + b"and more", WEIGHTS])
def test_a_left_over_part_does_no_harm(site, left_over):
    site.files["/head.pth"] = WEIGHTS
    model = head(site)
    model.own_folder().mkdir(parents=True)
    (model.own_folder() / "head.pth.part").write_bytes(left_over)
    (row,), _ = fetch(model)
    assert (Path(row["where"]) / "head.pth").read_bytes() == WEIGHTS


def test_a_wrong_checksum_is_refused_and_removed(site):
    site.files["/head.pth"] = b"tampered"
    said = refusal(head(site))
    assert digest(b"tampered") in said
    assert digest(WEIGHTS) in said
    assert not list(head(site).own_folder().glob("head.pth*"))
    assert len(site.asked) == 1


def test_a_file_that_the_registry_no_longer_wants_is_replaced(site):
    site.files["/head.pth"] = b"version one"
    fetch(head(site, b"version one"))
    site.files["/head.pth"] = WEIGHTS
    (row,), _ = fetch(head(site))
    assert (Path(row["where"]) / "head.pth").read_bytes() == WEIGHTS


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(site):
    site.files["/head.pth"] = WEIGHTS
    site.failures["/head.pth"] = [503, 429]
    fetch(head(site))
    site.failures["/other.pth"] = [404] * 5
    other = head(site, b"x", url=f"{site.address}/other.pth")
    assert "answers with status 404" in refusal(other)
    assert len(site.failures["/other.pth"]) == 4


def test_a_redirect_may_not_leave_https(site):
    site.redirects["/head.pth"] = "http://models.invalid/head.pth"
    assert "not https" in refusal(head(site))


def test_a_folder_that_cannot_be_written_is_said(site, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("WINNOW_MODELS", str(tmp_path / "file"))
    assert "could not be fetched" in refusal(head(site))


# --- several ---------------------------------------------------------------------------------------


def test_one_that_fails_does_not_keep_the_others_away(site):
    serve_vlm(site, "good")
    site.failures["org/bad"] = [401] * 20
    said = refusal(vlm("bad"), vlm("good"))
    assert "'bad'" in said
    assert "'good'" not in said
    assert vlm("good").locate()


def test_unknown_names_stop_it_before_anything_is_fetched(site):
    with pytest.raises(ConfigError, match="did you mean vlm"):
        fetch(vlm(), names=["vlm", "vlmm"])
    with pytest.raises(ConfigError, match="name the models"):
        pull(Models(models={"vlm": vlm()}), [], print)
    assert site.asked == []


def test_a_model_of_your_own_folder_is_never_fetched(site, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "w.safetensors").write_bytes(b"w")
    _, reported = fetch(head(site, path=str(tmp_path / "mine"), files={}))
    assert "nothing to fetch" in reported
    assert "no folder here" in refusal(head(site, path=str(tmp_path / "gone"), files={}))
    assert site.asked == []


def test_the_first_missing_model_is_named(site):
    serve_vlm(site, "here")
    fetch(vlm("here"))
    models = Models(models={name: vlm(name) for name in ("here", "gone", "lost")})
    with pytest.raises(ModelUnavailable, match="'gone'"):
        check_present(models, ["here", "gone", "lost"])
