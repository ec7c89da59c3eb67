"""Which models there are: configs/models.yaml says where each comes from, pinned, under what licence.

Weights are never fetched while a run works: `winnow models pull` does that beforehand. Loading
reads local files only, and only safetensors or files whose SHA-256 is in the registry.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from winnow.operators.errors import ConfigError, ModelUnavailable
from winnow.operators.settings import Strict, find_config, parse_yaml, validate

SAFE = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""Weights, tokenizers and configurations that cannot run code when they are read."""
_SAFE_SUFFIXES = tuple(pattern[1:] for pattern in SAFE)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[\w+-][\w.+-]*(/[\w+-][\w.+-]*)*")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Model(Strict):
    """One model of the registry."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    role: Literal["backbone", "head", "vlm"]
    loader: Literal["open_clip", "transformers", "torch"]
    licence: str
    hub: str | None = Field(
        None, pattern=r"^[\w.-]+/[\w.-]+$", description="repository on the Hugging Face hub"
    )
    revision: str | None = Field(
        None,
        description="commit of that repository, 40 hex digits; null, written out, leaves it "
        "unpinned: whatever `main` was when it was pulled",
    )
    url: str | None = Field(
        None,
        description="where a file that is on no hub comes from (https); ending in / the folder "
        "of several files",
    )
    files: dict[str, str | None] = Field(
        default_factory=dict,
        description="files to fetch, with SHA-256; all safetensors and configs where empty",
    )
    path: str | None = Field(None, description="a local folder that holds the files already")
    architecture: str | None = Field(None, description="open_clip's name of the architecture")
    image_size: int | None = Field(None, ge=1)
    crop: bool = Field(True, description="image processor: cut out the middle, or squash")
    size_mb: int | None = Field(None, description="what there is to download")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    remote_code: bool = Field(False, description="run code of the repository: never by default")
    gated: bool = Field(False, description="the hub asks for an accepted licence and a token")
    profile_without: str = Field("cpu", description="a configuration that works without it")

    @model_validator(mode="after")
    def _complete(self) -> Model:
        if self.role == "backbone" and (self.image_size is None or self.architecture is None):
            raise ValueError("a backbone needs image_size and architecture")
        for name, digest in self.files.items():
            _check_file(name, digest)
        if self.revision is not None and not _COMMIT.fullmatch(self.revision):
            raise ValueError(
                f"revision {self.revision!r} is not a commit: branches and tags move; give the 40 "
                "hex digits of the commit, as the hub shows them under `Files and versions`"
            )
        if self.path is not None:
            return self
        if (self.hub is None) == (self.url is None):
            raise ValueError("say where it comes from: one of `hub`, `url` or `path`")
        if self.hub is not None and "revision" not in self.model_fields_set:
            raise ValueError("a model of the hub needs a revision: the 40 hex digits of a commit")
        if self.url is not None:
            self._check_url(self.url)
        return self

    def _check_url(self, url: str) -> None:
        if not is_trusted_url(url):
            raise ValueError(f"url {url!r} must begin with https://")
        if not self.files or None in self.files.values():
            raise ValueError("what comes from a url needs `files`, each with its SHA-256")
        if len(self.files) > 1 and not url.endswith("/"):
            raise ValueError("the url of several files must be their folder and end in /")

    @property
    def unpinned(self) -> bool:
        """Whether the repository may hold other weights tomorrow under the same name."""
        return self.path is None and self.hub is not None and self.revision is None

    @property
    def identity(self) -> str:
        """What made a score, for the `runs` table: repository and revision."""
        if self.path is not None:
            return f"{self.path}@local"
        if self.hub is None:
            return f"{self.url}@sha256:{'+'.join(str(digest) for digest in self.files.values())}"
        if self.revision is not None:
            return f"{self.hub}@{self.revision}"
        try:
            return f"{self.hub}@unpinned:{self._snapshot().name}"
        except ModelUnavailable:
            return f"{self.hub}@unpinned:not fetched"

    def patterns(self) -> list[str]:
        """Names or patterns of the files to fetch from the hub."""
        return list(self.files) or [*SAFE, *(["*.py"] if self.remote_code else [])]

    def locate(self) -> Path:
        """The folder with the model's files on this machine, all there and checked.

        In `path`, else in the Hugging Face cache (HF_HOME), else in Winnow's own (WINNOW_MODELS).
        Raises ModelUnavailable.
        """
        if self.path is not None:
            folder = Path(self.path).expanduser()
            if not folder.is_dir():
                raise self.unavailable(f"has the path {self.path}, which is no folder here")
        else:
            folder = self._snapshot() if self.hub is not None else self.own_folder()
        for name, digest in self.files.items():
            self._check(folder / name, digest)
        if not self.files:
            self._check_weights(folder)
        return folder

    def weights(self) -> list[Path]:
        """The files with weights that may be loaded. Raises ModelUnavailable."""
        folder = self.locate()
        named = [n for n in self.files if n.endswith(".safetensors") or not _is_safe(n)]
        return [folder / name for name in named] or sorted(folder.glob("*.safetensors"))

    def own_folder(self) -> Path:
        """Where Winnow keeps the files of a model that is on no hub."""
        return models_folder() / self.name

    def _snapshot(self) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        assert self.hub is not None
        try:
            found = snapshot_download(
                self.hub,
                revision=self.revision or "main",
                allow_patterns=self.patterns(),
                local_files_only=True,
            )
        except LocalEntryNotFoundError as error:
            partly = "only in part " if hasattr(error, "snapshot_path") else "not "
            raise self.unavailable(f"is {partly}on this machine") from error
        return Path(found)

    def _check(self, file: Path, digest: str | None) -> None:
        if not file.is_file():
            where = f": {file} is missing" if file.parent.is_dir() else ""
            raise self.unavailable(f"is not on this machine{where}")
        if digest is None:
            return
        try:
            found = sha256(file)
        except OSError as error:
            raise self.unavailable(f"cannot be read: {error}") from error
        if found != digest:
            raise self.unavailable(
                f"has a wrong file: {file} has the SHA-256 {found}, the registry says {digest}"
            )

    def _check_weights(self, folder: Path) -> None:
        there = {file.name for file in folder.iterdir() if file.is_file()}
        if not any(name.endswith(".safetensors") for name in there):
            unsafe = sorted(
                n for n in there if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))
            )
            if unsafe:
                raise self.unavailable(
                    f"holds only {', '.join(unsafe)} in {folder}: such a file may run code when it "
                    "is loaded and is refused, unless it is named under `files` with its SHA-256"
                )
            raise self.unavailable(f"is not on this machine: {folder} has no *.safetensors")
        wanted = {"config.json"} if self.loader == "transformers" else set()
        for index in (name for name in there if name.endswith(".safetensors.index.json")):
            try:
                wanted |= set(json.loads((folder / index).read_bytes())["weight_map"].values())
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise self.unavailable(f"has an index that is none: {folder / index}") from error
        if missing := sorted(wanted - there):
            raise self.unavailable(
                f"is only in part on this machine: {folder} lacks {', '.join(missing)}"
            )

    def unavailable(self, reason: str) -> ModelUnavailable:
        """The error that names the model, the way to it and the way without it."""
        way = f"fetch it with `winnow models pull {self.name}`"
        if self.path is not None:
            way = "correct its entry in your models file"
        return ModelUnavailable(
            f"the model {self.name!r} {reason}: {way}, or run a profile that does without it "
            f"(`--config {self.profile_without}`)"
        )


class Models(Strict):
    """The registry: the shipped models, and those of a file of your own over them."""

    models: dict[str, Model]

    @classmethod
    def read(cls, name: str = "models") -> Models:
        """The shipped registry, overlaid with the file `name`. Raises ConfigError.

        The file may give single fields of a shipped model: `clip-vit-l-14: {path: /weights/clip}`.
        """
        entries = _entries("models")
        if name != "models":
            for key, own in _entries(name).items():
                entries[key] = _overlay(entries.get(key, {}), own)
        named = {key: {**entry, "name": key} for key, entry in entries.items()}
        return validate(cls, {"models": named}, name)

    def get(self, name: str) -> Model:
        """The model of that name. Raises ConfigError with the nearest names."""
        if name not in self.models:
            near = difflib.get_close_matches(name, self.models, cutoff=0.5)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(f"unknown model {name!r}: {meant}there are {', '.join(self.models)}")
        return self.models[name]


def _entries(name: str) -> dict[str, dict[str, Any]]:
    text, origin = find_config(name)
    entries = parse_yaml(text, origin)
    for key, entry in entries.items():
        if not isinstance(key, str) or not isinstance(entry, dict):
            raise ConfigError(f"{origin}: {key}: must be a model's name with a mapping of fields")
        if not isinstance(entry.get("files", {}), dict):
            raise ConfigError(f"{origin}: {key}.files: must map file names to SHA-256 or null")
        if isinstance(path := entry.get("path"), str):
            # A relative path must mean the same to a worker that was started elsewhere.
            entry["path"] = str(Path(origin).parent.absolute() / Path(path).expanduser())
    return entries


def _overlay(shipped: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Single fields over a shipped model; checksums of the shipped files do not bind other ones."""
    shipped = dict(shipped)
    files = shipped.pop("files", {})
    if any(key in own and own[key] != shipped.get(key) for key in ("hub", "url")):
        shipped = {k: v for k, v in shipped.items() if k not in ("hub", "revision", "url", "path")}
        files = {}
    elif "path" in own:
        files = {} if "files" in own else {n: d for n, d in files.items() if not _is_safe(n)}
    elif own.get("revision", shipped.get("revision")) != shipped.get("revision"):
        files = {name: None if _is_safe(name) else digest for name, digest in files.items()}
    return {**shipped, **own, "files": {**files, **own.get("files", {})}}


def is_trusted_url(url: str) -> bool:
    """Whether nobody on the way can change what comes: https, or this machine itself."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)


def _is_safe(name: str) -> bool:
    return name.endswith(_SAFE_SUFFIXES)


def _check_file(name: str, digest: str | None) -> None:
    if not _FILE.fullmatch(name) or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name!r} is not the name of a file inside the model's folder")
    if digest is not None and not _SHA256.fullmatch(digest):
        raise ValueError(f"{name}: {digest!r} is not a SHA-256: it has 64 hex digits, lower case")
    if digest is None and not _is_safe(name):
        raise ValueError(
            f"{name} may run code when it is loaded: give its SHA-256, or use a safetensors file"
        )


def cache_folder() -> Path:
    """Winnow's folder for what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "winnow"


def models_folder() -> Path:
    """Where files that are on no hub are kept: $WINNOW_MODELS, or the cache."""
    own = os.environ.get("WINNOW_MODELS")
    return Path(own).expanduser() if own else cache_folder() / "models"


def sha256(file: Path) -> str:
    """SHA-256 of a file in hex digits. Raises OSError.

    Remembered on disk by path, size and time of change, so that gigabytes of weights are read once
    on a machine and not by each of its workers.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    file = file.resolve()
    note = cache_folder() / "checked" / hashlib.sha256(_state(file).encode()).hexdigest()
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(f"{note}.lock"):
            return _remembered(note) or _remember(note, file)
    except OSError:
        # The cache cannot be written here, or the file itself not read, which this raises again.
        return _digest(file)


def _state(file: Path) -> str:
    facts = file.stat()
    return f"{file}\n{facts.st_size}\n{facts.st_mtime_ns}"


def _remembered(note: Path) -> str | None:
    if not note.exists():
        return None
    digest = note.read_text("ascii", errors="replace")
    return digest if _SHA256.fullmatch(digest) else None


def _remember(note: Path, file: Path) -> str:
    before = _state(file)
    digest = _digest(file)
    if _state(file) == before:
        unfinished = note.with_suffix(f".{os.getpid()}")
        unfinished.write_text(digest, "ascii")
        unfinished.replace(note)
    return digest


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
