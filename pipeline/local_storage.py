"""Storage in a folder of this machine, through the operating system: any file name works."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from winnow.operators.errors import StorageError
from winnow.pipeline.storage import (
    CHUNK,
    READ_LIMIT,
    FoundFile,
    Skipped,
    Storage,
    check_size,
    checked_key,
    is_partial,
    told,
)

_LEADS_OUT = "a link that leads out of the input"


class LocalStorage(Storage):
    """A folder of this machine."""

    def __init__(self, path: str, *, create: bool = False) -> None:
        root = Path(os.path.abspath(os.path.expanduser(path)))  # noqa: PTH100, PTH111 - keeps links
        self.skipped = []
        self.single = None
        with told(f"cannot open {path!r}"):
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
            with told(f"cannot read {self.uri_of(self.single)!r}"):
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
            elif matches(key) and not is_partial(entry.name):
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
        with told(f"cannot list the folder of {key!r}"), os.scandir(self._place(key).parent) as it:
            return frozenset(
                prefix + e.name for e in it if not e.name.startswith(".") and _is_file(e)
            )

    def exists(self, key: str) -> bool:
        return self._inside(key).is_file()

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        with told(f"cannot read {self.uri_of(key)!r}"), self._inside(key).open("rb") as file:
            content = file.read(limit + 1)
        check_size(len(content), limit, key)
        return content

    @contextmanager
    def local(self, key_or_uri: str) -> Iterator[Path]:
        yield self._inside(self.key_of(key_or_uri))

    def put(self, path: Path, key: str) -> str:
        target = self._place(key)
        with told(f"cannot write {self.uri_of(key)!r}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            # Hidden and .part: a listing that runs meanwhile does not take it for a file.
            draft = target.parent / f".{uuid.uuid4().hex}.part"
            try:
                with path.open("rb") as source, draft.open("xb") as copy:
                    shutil.copyfileobj(source, copy, CHUNK)
                    copy.flush()
                    os.fsync(copy.fileno())
                draft.replace(target)
                _sync_folder(target.parent)
            finally:
                with suppress(FileNotFoundError):
                    draft.unlink()
        return self.uri_of(key)

    def delete(self, key: str) -> None:
        with told(f"cannot delete {self.uri_of(key)!r}"):
            self._place(key).unlink(missing_ok=True)

    def hash(self, key: str) -> str:
        with told(f"cannot read {self.uri_of(key)!r}"), self._inside(key).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


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


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; some network file systems do not offer it for folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
