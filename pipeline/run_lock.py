"""One writer a lake: two runs into one lake follow each other instead of mixing.

A run reads what the lake holds when it starts: which contents are taken, which clips are kept. Two
at once would both take the same file, and neither would find its duplicates among the other's
clips. So whoever runs into a lake, decides or measures it anew, compacts it or removes from it, holds
the lake meanwhile; another waits or is refused. Readers need no lock.

In a local folder the lock is the operating system's, on `<lake>/run.lock`: it ends with its process,
however that ends. In an object store it is a lease, `<lake>/run.lock` too, taken by conditional
writes and renewed while its owner lives; one that was not renewed for STALE_S is taken over.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, TypeVar

from winnow.operators.errors import LakeBusy, LakeError, StorageError
from winnow.pipeline.lake import Lake

T = TypeVar("T")
LOCK_NAME = "run.lock"
LEASE_NAME = "run.lease"
"""In an object store: another name, so that a lake copied there brings no lock with it."""
BEAT_S = 20.0
"""A lease in an object store is renewed this often."""
STALE_S = 120.0
"""A lease that was not renewed for this long is dead."""
ASK_S = 1.0
"""Who waits asks again after this long."""


class Hold(ABC):
    """A lake held by this process."""

    @abstractmethod
    def check(self) -> None:
        """Raises LakeBusy where the lake is no longer ours, before anything is written."""

    @abstractmethod
    def release(self) -> None: ...

    def guard(self, finished: Iterable[T]) -> Iterator[T]:
        """Pass items on to be committed, as long as the lake is ours."""
        for item in finished:
            self.check()
            yield item
        self.check()


@contextmanager
def hold_lake(
    lake: Lake,
    purpose: str,
    *,
    wait: bool = False,
    told: Callable[[str], None] = lambda line: None,
) -> Iterator[Hold]:
    """Hold a lake for writing.

    `purpose` tells others who holds it. With `wait`, another holder is waited for, and `told` gets
    one line that says so; else LakeBusy is raised.
    """
    take = _take_folder if lake.is_local else _take_lease
    hold = take(lake, purpose)
    while isinstance(hold, str):
        if not wait:
            raise LakeBusy(
                f"the lake {lake.uri} is in use by {hold}. Nothing was changed: try again when that "
                "has ended, or wait for it with --wait"
            )
        told(f"waiting for {hold}")
        told = _silent
        time.sleep(ASK_S)
        hold = take(lake, purpose)
    try:
        yield hold
    finally:
        hold.release()


def _silent(line: str) -> None:
    """Once is enough."""


def _owner(purpose: str) -> dict[str, Any]:
    return {
        "purpose": purpose,
        "host": platform.node(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _named(text: bytes) -> str:
    """The owner in words; a lock that is just being written has none yet."""
    try:
        owner = json.loads(text)
        return (
            f"{owner['purpose']!r} (process {owner['pid']} on {owner['host']}, "
            f"since {owner['since']})"
        )
    except (ValueError, KeyError, TypeError):
        return "another process"


# Locks of the operating system are per process: two holders in one process would both succeed, and
# closing any handle of the file ends the lock. So a file that is held here is not opened again.
_held_here: dict[str, str] = {}
_held_guard = threading.Lock()


@dataclass
class _Folder(Hold):
    path: str
    file: IO[bytes]

    def check(self) -> None:
        """The operating system does not take a lock away."""

    def release(self) -> None:
        with _held_guard:
            _held_here.pop(self.path, None)
            self.file.close()


def _take_folder(lake: Lake, purpose: str) -> Hold | str:
    path = Path(lake.uri).resolve() / LOCK_NAME
    owner = json.dumps(_owner(purpose)).encode()
    with _held_guard:
        if str(path) in _held_here:
            return _held_here[str(path)]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise LakeError(f"cannot write to the lake {lake.uri}: {error.strerror}") from error
        file = os.fdopen(handle, "r+b")
        try:
            # Not flock: that one lives on in child processes after a kill.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            with file:
                return _named(file.read(4096))
        except OSError as error:
            file.close()
            raise LakeError(
                f"the file system of {lake.uri} has no locks ({error.strerror}): keep the lake on "
                "one that has, or in an object store"
            ) from error
        file.truncate(0)
        file.write(owner)
        file.flush()
        _held_here[str(path)] = _named(owner)
    return _Folder(str(path), file)


@dataclass
class _Lease(Hold):
    """A lease in an object store, renewed by a thread."""

    store: Any
    place: str
    owner: dict[str, Any]
    tag: str
    _beats: int = 0
    _renewed: float = field(default_factory=time.monotonic)
    _lost: str | None = None
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> _Lease:
        self._thread = threading.Thread(target=self._beat, name="lake lease", daemon=True)
        self._thread.start()
        return self

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S) and self._lost is None:
            # What a store refuses in passing is tried again at the next beat.
            with suppress(*_store_errors()):
                self.renew()

    def renew(self) -> None:
        """Write the lease anew, if it is still ours."""
        import obstore
        from obstore.exceptions import NotFoundError, PreconditionError

        asked = time.monotonic()
        self._beats += 1
        content = json.dumps(self.owner | {"beats": self._beats}).encode()
        try:
            put = obstore.put(self.store, self.place, content, mode={"e_tag": self.tag})
            self.tag = str(put["e_tag"])
        except (PreconditionError, NotFoundError, FileNotFoundError):
            # The answer to a write that did happen may have got lost.
            found = _read(self.store, self.place)
            if found is None or _token(found[0]) != self.owner["token"]:
                self._lost = "nobody" if found is None else _named(found[0])
                return
            self.tag = found[1]
        self._renewed = asked

    def check(self) -> None:
        if self._lost is None and time.monotonic() - self._renewed < 0.75 * STALE_S:
            return
        by = f"; now it belongs to {self._lost}" if self._lost else ""
        raise LakeBusy(
            f"this process could not renew its lease of the lake{by}. What was committed before is "
            "safe: run again"
        )

    def release(self) -> None:
        import obstore

        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        # What cannot be removed is dead after STALE_S; the run itself is over and well.
        with suppress(*_store_errors()):
            found = _read(self.store, self.place)
            if found is not None and _token(found[0]) == self.owner["token"]:
                obstore.delete(self.store, self.place)


def _store_errors() -> tuple[type[Exception], ...]:
    from obstore.exceptions import BaseError

    return (BaseError, OSError, ValueError)


def _take_lease(lake: Lake, purpose: str) -> Hold | str:
    import obstore
    from obstore.exceptions import AlreadyExistsError, NotFoundError, PreconditionError

    from winnow.pipeline.object_storage import ObjectStorage

    class Place(ObjectStorage):
        """The lake's root, with what a lease needs of the store."""

        def lease(self) -> tuple[Any, str]:
            return self._store, self._full(LEASE_NAME)

    store, place = Place(lake.uri, lake.options, create=True).lease()
    owner = _owner(purpose) | {"token": uuid.uuid4().hex}
    content = json.dumps(owner).encode()
    try:
        try:
            put = obstore.put(store, place, content, mode="create")
            return _Lease(store, place, owner, str(put["e_tag"])).start()
        except (AlreadyExistsError, FileExistsError):
            found = _read(store, place)
        if found is None:
            return "another process"  # which has just ended
        text, tag, written = found
        if _token(text) == owner["token"]:  # our own, whose answer got lost
            return _Lease(store, place, owner, tag).start()
        if _now(store, place) - written < STALE_S:
            return _named(text)
        try:
            put = obstore.put(store, place, content, mode={"e_tag": tag})
        except (PreconditionError, NotFoundError, FileNotFoundError):
            return "another process"  # which was quicker, or has come back to life
        return _Lease(store, place, owner, str(put["e_tag"])).start()
    except _store_errors() as error:
        reason = str(error).splitlines()[0][:300]
        raise StorageError(f"cannot take the lease {LEASE_NAME} of {lake.uri}: {reason}") from error


def _read(store: Any, place: str) -> tuple[bytes, str, float] | None:
    """Content, tag and time of the last write of a lease; None where there is none."""
    import obstore

    try:
        found = obstore.get(store, place)
        meta = found.meta
        return bytes(found.bytes()), str(meta["e_tag"]), meta["last_modified"].timestamp()
    except FileNotFoundError:
        return None


def _token(text: bytes) -> str | None:
    try:
        return str(json.loads(text)["token"])
    except (ValueError, KeyError, TypeError):
        return None


def _now(store: Any, place: str) -> float:
    """The store's own time, so that clocks of machines need not agree."""
    import obstore

    probe = f"{place}.{uuid.uuid4().hex}"
    obstore.put(store, probe, b"")
    try:
        return float(obstore.head(store, probe)["last_modified"].timestamp())
    finally:
        obstore.delete(store, probe)
