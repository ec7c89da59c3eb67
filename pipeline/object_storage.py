"""Storage in a bucket, through obstore, which retries by itself."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from obstore.exceptions import BaseError
from obstore.store import ObjectStore, from_url

from winnow.operators.errors import StorageError
from winnow.pipeline.storage import (
    CHUNK,
    READ_LIMIT,
    FoundFile,
    Storage,
    check_size,
    checked_key,
    is_partial,
    told,
)

_UPLOADS_AT_ONCE = 4
# obstore takes these apart from the store's own settings; delta-rs has them as AWS_ALLOW_HTTP etc.
_CLIENT_OPTIONS = frozenset(
    {
        "allow_http", "allow_invalid_certificates", "connect_timeout", "timeout", "proxy_url",
        "proxy_ca_certificate", "user_agent", "http1_only", "http2_only", "pool_idle_timeout",
    }
)  # fmt: skip
_RETRIES: dict[str, Any] = {
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=120),
    "backoff": {
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=15),
        "base": 2,
    },
}


class ObjectStorage(Storage):
    """A bucket, or a prefix of one, through obstore."""

    def __init__(self, uri: str, options: Mapping[str, str], *, create: bool = False) -> None:
        scheme, _, rest = uri.partition("://")
        # The prefix is kept apart from obstore: as part of a URL, %, # and ? would not survive.
        bucket, _, prefix = rest.partition("/")
        self._bucket = f"{scheme.lower()}://{bucket}"
        self._prefix = prefix.strip("/")
        self._options = dict(options)
        self._connected: ObjectStore | None = None
        self.skipped = []
        self.single = None
        if self._prefix:
            checked_key(self._prefix)
            if not prefix.endswith("/") and self._is_object():
                self._prefix, _, self.single = self._prefix.rpartition("/")
        self.uri = "/".join(filter(None, (self._bucket, self._prefix)))
        if self.single is None and not self._answers() and not create:
            raise StorageError(f"there is nothing under {uri!r}: check the bucket and the prefix")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connected": None}

    @property
    def _store(self) -> ObjectStore:
        if self._connected is None:
            self._connected = self._connect()
        return self._connected

    def _connect(self) -> ObjectStore:
        client: dict[str, Any] = {}
        config: dict[str, Any] = {}
        for name, value in self._options.items():
            plain = re.sub("^(aws|google|azure)_", "", name.lower())
            if plain in _CLIENT_OPTIONS:
                client[plain] = value
            else:
                config[name.lower()] = value
        with _told(f"cannot connect to {self._bucket}"):
            open_url: Callable[..., ObjectStore] = from_url
            return open_url(
                self._bucket, config=config, client_options=client, retry_config=_RETRIES
            )

    def _is_object(self) -> bool:
        with _told(f"cannot reach {self._bucket}"):
            try:
                self._store.head(self._prefix)
            except (FileNotFoundError, PermissionError):
                # Who may not list gets 403 for a missing object too: `_answers` tells which.
                return False
        return True

    def _answers(self) -> bool:
        """Whether the root holds anything; raises where the store refuses or does not answer."""
        with _told(
            f"cannot list {self._bucket}/{self._prefix} (check the name, the region, the endpoint "
            "and the credentials in the environment or in the storage options)"
        ):
            return any(self._store.list(self._prefix or None, chunk_size=1))

    def _full(self, key: str) -> str:
        return f"{self._prefix}/{checked_key(key)}" if self._prefix else checked_key(key)

    def _found(self, meta: Mapping[str, Any]) -> FoundFile:
        path = str(meta["path"])
        key = path.removeprefix(f"{self._prefix}/") if self._prefix else path
        modified = meta["last_modified"].timestamp()
        return FoundFile(self.uri_of(key), key, int(meta["size"]), modified, meta["e_tag"])

    def _find(self, matches: Callable[[str], bool]) -> Iterator[FoundFile]:
        if self.single is not None:
            with _told(f"cannot read {self.uri_of(self.single)!r}"):
                found = [self._found(self._store.head(self._full(self.single)))]
        else:
            with _told(f"cannot list {self.uri}"):
                found = [
                    file
                    for batch in self._store.list(self._prefix or None, chunk_size=1000)
                    for file in map(self._found, batch)
                    if matches(file.key) and not _is_ignored(file.key)
                ]
        # Not every store lists in this order.
        yield from sorted(found, key=lambda file: file.key)

    def siblings(self, key: str) -> frozenset[str]:
        folder = self._full(key).rpartition("/")[0]
        with _told(f"cannot list the folder of {key!r}"):
            listed = self._store.list_with_delimiter(folder or None)["objects"]
        found = (self._found(meta).key for meta in listed)
        return frozenset(k for k in found if not k.rpartition("/")[2].startswith("."))

    def exists(self, key: str) -> bool:
        with _told(f"cannot look up {self.uri_of(key)!r}"):
            try:
                self._store.head(self._full(key))
            except FileNotFoundError:
                return False
        return True

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        with _told(f"cannot read {self.uri_of(key)!r}"):
            found = self._store.get(self._full(key))
            content = b"" if found.meta["size"] > limit else bytes(found.bytes())
        check_size(found.meta["size"], limit, key)
        return content

    @contextmanager
    def local(self, key_or_uri: str) -> Iterator[Path]:
        key = self.key_of(key_or_uri)
        with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
            # Not its own name: that may be longer than a file system allows.
            path = Path(folder) / f"object{Path(key).suffix[:16]}"
            with _told(f"cannot fetch {self.uri_of(key)!r}"), path.open("wb") as file:
                for chunk in self._store.get(self._full(key)).stream(min_chunk_size=CHUNK):
                    file.write(chunk)
            yield path

    def put(self, path: Path, key: str) -> str:
        with _told(f"cannot write {self.uri_of(key)!r}"):
            self._store.put(
                self._full(key), path, chunk_size=CHUNK, max_concurrency=_UPLOADS_AT_ONCE
            )
        return self.uri_of(key)

    def delete(self, key: str) -> None:
        with _told(f"cannot delete {self.uri_of(key)!r}"), suppress(FileNotFoundError):
            self._store.delete(self._full(key))

    def hash(self, key: str) -> str:
        digest = hashlib.sha256()
        with _told(f"cannot read {self.uri_of(key)!r}"):
            for chunk in self._store.get(self._full(key)).stream(min_chunk_size=CHUNK):
                digest.update(chunk)
        return digest.hexdigest()


def _is_ignored(key: str) -> bool:
    return is_partial(key) or any(part.startswith(".") for part in key.split("/"))


def _told(attempt: str) -> AbstractContextManager[None]:
    return told(attempt, (BaseError, OSError, ValueError))
