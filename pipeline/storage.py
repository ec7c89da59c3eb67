"""One interface over a local folder and an object store: find, read, borrow, put, hash.

Local folders go through the operating system, so that every file name works as it stands; object
stores go through obstore, which retries by itself. A `Storage` never reaches outside its root: keys
are checked, and links are followed only while they stay inside. It can be pickled; connections are
made again where it arrives.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from winnow.operators.errors import StorageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

READ_LIMIT = 16 * 2**20
"""Bytes that `Storage.read` takes into memory unless told otherwise."""

SCHEMES = frozenset({"s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss"})
PARTIAL_SUFFIXES = (".part", ".partial", ".tmp", ".crdownload")
_CHUNK = 8 * 2**20
_UPLOADS_AT_ONCE = 4
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
# obstore takes these apart from the store's own settings; delta-rs has them as AWS_ALLOW_HTTP etc.
_CLIENT_OPTIONS = frozenset(
    {
        "allow_http", "allow_invalid_certificates", "connect_timeout", "timeout", "proxy_url",
        "proxy_ca_certificate", "user_agent", "http1_only", "http2_only", "pool_idle_timeout",
    }
)  # fmt: skip
_LEADS_OUT = "a link that leads out of the input"
_RETRIES: dict[str, Any] = {
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=120),
    "backoff": {
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=15),
        "base": 2,
    },
}


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that `find` found. `modified` is in seconds since the epoch, `size` in bytes.

    `key` is its path below the root, with forward slashes; `etag` is None for local files.
    """

    uri: str
    key: str
    size: int
    modified: float
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that matched or might hold matches, but that `find` did not return, and why."""

    key: str
    reason: str


class Storage(ABC):
    """A folder tree of files, local or in an object store, addressed by keys below its root.

    Every method raises StorageError for what it cannot do, and for a key that leaves the root.
    """

    uri: str
    """The root: an absolute path, or scheme://bucket/prefix; no slash at the end."""
    skipped: list[Skipped]
    """What the latest `find` left out, complete once it is exhausted."""
    single: str | None
    """The key of the only file, where the storage was opened on a file rather than a folder."""

    @classmethod
    def open(
        cls, uri: str, *, options: Mapping[str, str] | None = None, create: bool = False
    ) -> Storage:
        """Open a local path or an object store's URL (s3://, gs://, az://, abfss://).

        `options` are the store's settings as obstore and delta-rs name them (aws_endpoint,
        aws_region, allow_http, ...); what they lack comes from the environment. A URI of a single
        file gives a storage whose root is the folder around it and that finds only this file.
        `create` allows a root that does not exist yet. Raises StorageError where there is nothing.
        """
        scheme = _SCHEME.match(uri)
        if scheme is None or scheme[1].lower() == "file":
            path = unquote(uri[scheme.end() :]) if scheme else uri
            return LocalStorage(path, create=create)
        if scheme[1].lower() not in SCHEMES:
            raise StorageError(
                f"cannot open {uri!r}: {scheme[1]}:// is not supported; give a local path or "
                + ", ".join(f"{name}://" for name in sorted(SCHEMES))
            )
        return ObjectStorage(uri, dict(options or {}), create=create)

    def uri_of(self, key: str) -> str:
        """The full address of a key."""
        return f"{self.uri.rstrip('/')}/{checked_key(key)}"

    def key_of(self, uri: str) -> str:
        """The key of a full address below the root; a plain key comes back as it is."""
        root = self.uri.rstrip("/") + "/"
        return checked_key(uri.removeprefix(root))

    def find(self, patterns: Sequence[str], exclude: Sequence[str] = ()) -> Iterator[FoundFile]:
        """Files whose key matches a pattern and no exclusion, in code point order of their keys.

        Patterns are globs over the whole key (`*` and `?` stay within a folder, `**/` is any
        depth), without regard to letter case. Hidden names, everything below hidden folders and
        names of files still being written (.part, .tmp, ...) are ignored. What cannot be returned
        although it might match (links that lead out, unreadable folders, special files, names that
        are not UTF-8) is put in `skipped`. A storage of a single file finds that file whatever the
        patterns say: its user named it.
        """
        self.skipped = []
        wanted, unwanted = glob_matcher(patterns), glob_matcher(exclude)
        return self._find(lambda key: wanted(key) and not unwanted(key))

    @abstractmethod
    def _find(self, matches: Callable[[str], bool]) -> Iterator[FoundFile]: ...

    @abstractmethod
    def siblings(self, key: str) -> frozenset[str]:
        """Keys of the files, hidden ones left out, in the folder that holds `key`."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is a file under this key."""

    @abstractmethod
    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        """The whole content; StorageError if it has more than `limit` bytes."""

    @abstractmethod
    def local(self, key_or_uri: str) -> AbstractContextManager[Path]:
        """A local path with the content, to read only, valid inside the `with` block.

        A local file itself; of an object a temporary copy that keeps the suffix of its name,
        streamed in bounded memory and removed afterwards.
        """

    @abstractmethod
    def put(self, path: Path, key: str) -> str:
        """Store the content of a local file under `key` and return its uri.

        Atomic: whoever reads the key sees the old content or the whole new one.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove a file; one that is not there is no error."""

    @abstractmethod
    def hash(self, key: str) -> str:
        """SHA-256 of the content as 64 hex digits, streamed."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"


class LocalStorage(Storage):
    """A folder of this machine."""

    def __init__(self, path: str, *, create: bool = False) -> None:
        root = Path(os.path.abspath(os.path.expanduser(path)))  # noqa: PTH100, PTH111 - keeps links
        self.skipped = []
        self.single = None
        with _told(f"cannot open {path!r}"):
            if create:
                root.mkdir(parents=True, exist_ok=True)
            if root.is_file():
                self.single, root = root.name, root.parent
            elif not root.is_dir():
                raise StorageError(
                    f"{path!r} does not exist: give an existing folder, a video file, or the URL "
                    "of an object store such as s3://bucket/folder"
                )
        self.uri = str(root)

    def _find(self, matches: Callable[[str], bool]) -> Iterator[FoundFile]:
        if self.single is not None:
            with _told(f"cannot read {self.uri_of(self.single)!r}"):
                status = self._inside(self.single).stat()
            yield self._found(self.single, status)
            return
        # A stack instead of recursion: a folder tree may be deeper than Python's stack.
        stack = [(self._identity(""), self._listing("", matches))]
        while stack:
            item = next(stack[-1][1], None)
            if item is None:
                stack.pop()
            elif isinstance(item, FoundFile):
                yield item
            elif (identity := self._identity(item)) and identity in (above for above, _ in stack):
                self.skipped.append(Skipped(_printable(item), "a link back to a folder above it"))
            else:
                stack.append((identity, self._listing(item, matches)))

    def _listing(self, folder: str, matches: Callable[[str], bool]) -> Iterator[FoundFile | str]:
        """The matching files of one folder, and its subfolders as keys, in order of their keys."""
        try:
            with os.scandir(self._absolute(folder)) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            if not folder:
                raise StorageError(f"cannot list {self.uri!r}: {error.strerror}") from error
            reason = f"the folder cannot be listed: {error.strerror}"
            self.skipped.append(Skipped(_printable(folder), reason))
            return
        prefix = f"{folder}/" if folder else ""
        # A folder sorts as its name with a slash, so that whole keys come in code point order.
        for name, entry in sorted((e.name + "/" * _is_folder(e), e) for e in visible):
            key = prefix + entry.name
            if name.endswith("/"):
                if entry.is_symlink() and not self._leads_inside(entry.path):
                    self.skipped.append(Skipped(_printable(key), _LEADS_OUT))
                else:
                    yield key
            elif matches(key) and not _is_partial(entry.name):
                file = self._file(key, entry)
                if isinstance(file, FoundFile):
                    yield file
                else:
                    self.skipped.append(Skipped(_printable(key), file))

    def _file(self, key: str, entry: os.DirEntry[str]) -> FoundFile | str:
        """The file, or why it is none."""
        if _printable(key) != key:
            return "the name is not valid UTF-8: rename the file"
        try:
            if entry.is_symlink() and not self._leads_inside(entry.path):
                return _LEADS_OUT
            status = entry.stat()
        except FileNotFoundError:
            return "a link that leads nowhere" if entry.is_symlink() else "vanished"
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        return self._found(key, status)

    def _found(self, key: str, status: os.stat_result) -> FoundFile:
        return FoundFile(self.uri_of(key), key, status.st_size, status.st_mtime)

    def _identity(self, folder: str) -> tuple[int, int] | None:
        try:
            status = os.stat(self._absolute(folder))  # noqa: PTH116 - called for every folder
        except OSError:
            return None  # the listing will say why
        return (status.st_dev, status.st_ino)

    def _absolute(self, key: str) -> str:
        return os.path.join(self.uri, key) if key else self.uri  # noqa: PTH118 - called per folder

    def _leads_inside(self, path: str) -> bool:
        root, target = os.path.realpath(self.uri), os.path.realpath(path)
        return target == root or target.startswith(root.rstrip("/") + "/")

    def _inside(self, key: str) -> Path:
        """The path of a key, all links on the way and at its end included, within the root."""
        path = self._place(key)
        # A link that the user named as the input may lead anywhere.
        if key != self.single and not self._leads_inside(str(path)):
            raise StorageError(f"{key!r} is a link that leads out of {self.uri!r}")
        return path

    def _place(self, key: str) -> Path:
        """The path of a key whose folder lies within the root, whatever it is itself."""
        path = Path(self.uri) / checked_key(key)
        if not self._leads_inside(str(path.parent)):
            raise StorageError(f"{key!r} is in a folder that leads out of {self.uri!r}")
        return path

    def siblings(self, key: str) -> frozenset[str]:
        folder = key.rpartition("/")[0]
        prefix = f"{folder}/" if folder else ""
        with _told(f"cannot list the folder of {key!r}"), os.scandir(self._place(key).parent) as it:
            return frozenset(
                prefix + e.name for e in it if not e.name.startswith(".") and _is_file(e)
            )

    def exists(self, key: str) -> bool:
        return self._inside(key).is_file()

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        with _told(f"cannot read {self.uri_of(key)!r}"), self._inside(key).open("rb") as file:
            content = file.read(limit + 1)
        _check_size(len(content), limit, key)
        return content

    @contextmanager
    def local(self, key_or_uri: str) -> Iterator[Path]:
        yield self._inside(self.key_of(key_or_uri))

    def put(self, path: Path, key: str) -> str:
        target = self._place(key)
        with _told(f"cannot write {self.uri_of(key)!r}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            # Hidden and .part: a listing that runs meanwhile does not take it for a file.
            draft = target.parent / f".{uuid.uuid4().hex}.part"
            try:
                with path.open("rb") as source, draft.open("xb") as copy:
                    shutil.copyfileobj(source, copy, _CHUNK)
                    copy.flush()
                    os.fsync(copy.fileno())
                draft.replace(target)
                _sync_folder(target.parent)
            finally:
                with suppress(FileNotFoundError):
                    draft.unlink()
        return self.uri_of(key)

    def delete(self, key: str) -> None:
        with _told(f"cannot delete {self.uri_of(key)!r}"):
            self._place(key).unlink(missing_ok=True)

    def hash(self, key: str) -> str:
        with _told(f"cannot read {self.uri_of(key)!r}"), self._inside(key).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


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
        from obstore.store import from_url  # 50 ms that a local run need not pay

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
        try:
            self._store.head(self._prefix)
        except (FileNotFoundError, PermissionError):
            # Without the right to list, stores answer 403 for what is not there: `_answers` tells.
            return False
        except _object_errors() as error:
            raise StorageError(f"cannot reach {self._bucket}: {_first_line(error)}") from error
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
        _check_size(found.meta["size"], limit, key)
        return content

    @contextmanager
    def local(self, key_or_uri: str) -> Iterator[Path]:
        key = self.key_of(key_or_uri)
        with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
            # Not its own name: that may be longer than a file system allows.
            path = Path(folder) / f"object{Path(key).suffix[:16]}"
            with _told(f"cannot fetch {self.uri_of(key)!r}"), path.open("wb") as file:
                for chunk in self._store.get(self._full(key)).stream(min_chunk_size=_CHUNK):
                    file.write(chunk)
            yield path

    def put(self, path: Path, key: str) -> str:
        with _told(f"cannot write {self.uri_of(key)!r}"):
            self._store.put(
                self._full(key), path, chunk_size=_CHUNK, max_concurrency=_UPLOADS_AT_ONCE
            )
        return self.uri_of(key)

    def delete(self, key: str) -> None:
        with _told(f"cannot delete {self.uri_of(key)!r}"), suppress(FileNotFoundError):
            self._store.delete(self._full(key))

    def hash(self, key: str) -> str:
        digest = hashlib.sha256()
        with _told(f"cannot read {self.uri_of(key)!r}"):
            for chunk in self._store.get(self._full(key)).stream(min_chunk_size=_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()


def checked_key(key: str) -> str:
    """The key itself; StorageError unless it is a plain relative path below the root."""
    parts = key.split("/")
    if "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise StorageError(
            f"{key!r} is not a key: it must be a relative path without empty parts, '.' and '..'"
        )
    return key


def glob_matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a whole key matches one of the globs, letter case apart."""
    compiled = [
        re.compile(_glob_to_regex(pattern), re.IGNORECASE | re.DOTALL) for pattern in patterns
    ]
    return lambda key: any(expression.fullmatch(key) for expression in compiled)


def _glob_to_regex(pattern: str) -> str:
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]/]*\]|.", pattern, re.DOTALL)
    return "".join(_glob_token(token) for token in tokens)


def _glob_token(token: str) -> str:
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    if token in wild:
        return wild[token]
    if len(token) > 1:
        negated = token[1] == "!"
        members = re.sub(r"([\\\[\]^&~|])", r"\\\1", token[2 if negated else 1 : -1])
        return f"(?!/)[{'^' if negated else ''}{members}]"
    return re.escape(token)


def _is_partial(name: str) -> bool:
    return name.lower().endswith(PARTIAL_SUFFIXES)


def _is_ignored(key: str) -> bool:
    return _is_partial(key) or any(part.startswith(".") for part in key.split("/"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _printable(key: str) -> str:
    """The key, with bytes that are not UTF-8 spelled out."""
    return key.encode("utf-8", "backslashreplace").decode()


def _check_size(size: int, limit: int, key: str) -> None:
    if size > limit:
        raise StorageError(f"{key!r} has more than {limit} bytes")


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; some network file systems do not offer it for folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _object_errors() -> tuple[type[Exception], ...]:
    from obstore.exceptions import BaseError

    return (BaseError, OSError, ValueError)


def _first_line(error: BaseException) -> str:
    """obstore's messages go on with a dump of the error's inside."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0][:400]


@contextmanager
def _told(attempt: str) -> Iterator[None]:
    """Turn what the system or the object store raises into a StorageError."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise StorageError(f"{attempt}: {_first_line(error)}") from error
    except Exception as error:
        if not isinstance(error, _object_errors()):
            raise
        raise StorageError(f"{attempt}: {_first_line(error)}") from error
