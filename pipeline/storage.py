"""One interface over a local folder and an object store: find, read, borrow, put, hash.

The local folder is in local_storage.py, the object store in object_storage.py. A `Storage` never
reaches outside its root: keys are checked, and links are followed only while they stay inside. It
can be pickled; connections are made again where it arrives.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from winnow.operators.errors import StorageError

READ_LIMIT = 16 * 2**20
"""Bytes that `Storage.read` takes into memory unless told otherwise."""
CHUNK = 8 * 2**20
"""Bytes that are copied at a time."""

_SCHEMES = frozenset({"s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss"})
_PARTIAL_SUFFIXES = (".part", ".partial", ".tmp", ".crdownload")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


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
            from winnow.pipeline.local_storage import LocalStorage

            path = unquote(uri[scheme.end() :]) if scheme else uri
            return LocalStorage(path, create=create)
        if scheme[1].lower() not in _SCHEMES:
            raise StorageError(
                f"cannot open {uri!r}: {scheme[1]}:// is not supported; give a local path or "
                + ", ".join(f"{name}://" for name in sorted(_SCHEMES))
            )
        # Imported here: obstore takes 50 ms that a local run need not pay.
        from winnow.pipeline.object_storage import ObjectStorage

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


def is_partial(name: str) -> bool:
    """Whether a name is that of a file still being written (.part, .tmp, ...)."""
    return name.lower().endswith(_PARTIAL_SUFFIXES)


def check_size(size: int, limit: int, key: str) -> None:
    """Raise StorageError where a content of `size` bytes is beyond the limit."""
    if size > limit:
        raise StorageError(f"{key!r} has more than {limit} bytes")


@contextmanager
def told(
    attempt: str, errors: tuple[type[Exception], ...] = (OSError, ValueError)
) -> Iterator[None]:
    """Turn `errors` into a StorageError that says what was attempted and why it failed."""
    try:
        yield
    except StorageError:
        raise
    except errors as error:
        raise StorageError(f"{attempt}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """obstore's messages go on with a dump of the error's inside."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0][:400]
