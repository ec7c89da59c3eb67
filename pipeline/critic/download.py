"""Videos fetched by their address and kept by their content.

A folder of its own holds `by-hash/<sha256>.mp4`, one file for each content, and `by-uri/`, one small
record for each address that names its file. No row number and no name from a sheet plays a part, so
that a sheet may be shuffled, cut or mixed with another and every row still finds its own video.
A download grows in `parts/`, goes on where it was cut off if the server still has the same file,
and is moved to its place only when its length is the announced one and the video is whole.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from winnow.operators.errors import MediaError, StorageError
from winnow.operators.media import Limits, probe
from winnow.operators.models import is_trusted_url, sha256

if TYPE_CHECKING:
    import httpx2

LINE_EVERY_S = 15.0
_MOST_REDIRECTS = 5
_SILENT = 3
"""Videos of one server that could not be reached; the others are not tried."""
_PASSING_STATUS = (408, 425, 429)
_SUFFIXES = {"mp4": ".mp4", "mov": ".mov", "webm": ".webm", "matroska": ".mkv", "avi": ".avi",
             "gif": ".gif"}  # fmt: skip
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Patience:
    """How much of a server is borne."""

    max_bytes: int = 2**30
    """Of one video."""
    attempts: int = 5
    pause_s: float = 1.0
    """Before the second attempt; it doubles, with chance in it."""
    longest_pause_s: float = 120.0
    """A server that asks for a longer one is not asked again."""
    timeout_s: float = 30.0
    """Without a single byte."""
    slow_s: float = 60.0
    """From then on a download must have come at `slowest` bytes a second on average."""
    slowest: float = 4096.0


@dataclass(frozen=True, slots=True)
class Stored:
    """A video that is here, whole."""

    path: Path
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a video is not here: `download`, or `not_video` for what came and cannot be used."""

    kind: Literal["download", "not_video"]
    reason: str


class VideoStore:
    """The videos in one folder. Several processes may use it; one fetches at a time."""

    def __init__(self, folder: Path, patience: Patience | None = None) -> None:
        self.folder = folder
        self.patience = patience or Patience()

    def find(self, uri: str) -> Stored | None:
        """The video of that address, if it was fetched and is as long as it was then."""
        try:
            record = json.loads(self._record(uri).read_text("utf-8"))
            name, digest, size = record["file"], record["sha256"], record["size"]
            if record["uri"] != uri or not _DIGEST.fullmatch(digest) or not name.startswith(digest):
                return None
            path = self.folder / "by-hash" / Path(name).name
            return Stored(path, digest, size) if path.stat().st_size == size else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def fetch(
        self,
        uris: Iterable[str],
        *,
        workers: int = 8,
        report: Callable[[str], None] = lambda _: None,
    ) -> dict[str, Stored | Failed]:
        """Fetch what is not here. One entry an address; a failure does not keep the others.

        `report` is given a line for people now and then. Raises StorageError where the folder cannot
        be written.
        """
        wanted = list(dict.fromkeys(uris))
        found: dict[str, Stored | Failed] = {
            u: s for u in wanted if (s := self.find(u)) is not None
        }
        if len(found) == len(wanted):
            return found
        try:
            for name in ("by-hash", "by-uri", "parts"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(self.folder / ".lock", report):
                missing = [uri for uri in wanted if uri not in found]
                found |= self._fetch_all(missing, workers, report)
        except OSError as error:
            raise StorageError(f"cannot keep videos in {self.folder}: {error.strerror}") from error
        return {uri: found[uri] for uri in wanted}

    def _fetch_all(
        self, uris: list[str], workers: int, report: Callable[[str], None]
    ) -> dict[str, Stored | Failed]:
        stop, results = threading.Event(), dict[str, Stored | Failed]()
        silent: Counter[str] = Counter()
        line = _Progress(len(uris), report)
        with _client(self.patience, workers) as client, ThreadPoolExecutor(workers) as pool:
            futures = {pool.submit(self._fetch_one, client, uri, stop, silent): uri for uri in uris}
            try:
                for future in as_completed(futures):
                    result = results[futures[future]] = future.result()
                    line.add(result)
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        line.end()
        return results

    def _fetch_one(
        self, client: httpx2.Client, uri: str, stop: threading.Event, silent: Counter[str]
    ) -> Stored | Failed:
        """`silent` counts, by server, the videos for which it could not even be reached."""
        import httpx2
        import tenacity

        # Another process may have fetched it while this one waited.
        if (stored := self.find(uri)) is not None:
            return stored
        host = urlsplit(uri).netloc
        # Without a network, patience with each of some thousand videos would take hours.
        if silent[host] >= _SILENT:
            return Failed("download", f"{host} cannot be reached")
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._is_passing),
            stop=tenacity.stop_after_attempt(self.patience.attempts)
            | tenacity.stop_when_event_set(stop),
            wait=self._pause,
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )
        try:
            return again(self._attempt, client, uri, stop)
        except _Refused as error:
            return Failed(error.kind, str(error))
        except _Again as error:
            return Failed("download", str(error))
        except httpx2.HTTPStatusError as error:
            return Failed(
                "download", f"the server answers with status {error.response.status_code}"
            )
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            silent[host] += isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
            said = str(error) or type(error).__name__
            return Failed("download", f"the server cannot be reached, or breaks off: {said}")

    # --- one attempt -------------------------------------------------------------------------------

    def _attempt(self, client: httpx2.Client, uri: str, stop: threading.Event) -> Stored:
        part = _Part(self.folder / "parts" / _key(uri))
        headers = {"Accept-Encoding": "identity"}
        start, validator = part.begun()
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": validator}
        with _open(client, uri, headers) as response:
            if response.status_code == 416 and start:
                part.drop()
                raise _Again("the server has less than was fetched before")
            response.raise_for_status()
            if response.status_code not in (200, 206):
                raise _Refused("download", f"the server answers {response.status_code}")
            start = self._go_on_from(response, start, validator, part)
            total = _total(response, start)
            if total is not None and total > self.patience.max_bytes:
                raise self._too_large(total)
            part.note(_validator(response))
            self._receive(response, part, start, stop)
            content_type = response.headers.get("Content-Type", "?")
        size = part.size()
        if total is not None and size != total:
            if size > total:
                part.drop()
            raise _Again(f"{size} bytes came of {total}")
        return self._admit(uri, part, content_type, resumed=start > 0)

    def _go_on_from(
        self, response: httpx2.Response, start: int, validator: str, part: _Part
    ) -> int:
        """The byte at which the answer begins: that which was asked for, or 0."""
        if response.status_code == 200:
            return 0
        told = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not start or told is None or int(told[1]) != start or _validator(response) != validator:
            part.drop()
            raise _Again("the server goes on with another file, or at another place")
        return start

    def _receive(
        self, response: httpx2.Response, part: _Part, start: int, stop: threading.Event
    ) -> None:
        size, began = start, time.monotonic()
        with part.path.open("ab" if start else "wb") as file:
            # Raw: unpacked on the way, the bytes could not be counted or taken up again. As they come:
            # what is gathered into larger pieces is lost when the connection is.
            for chunk in response.iter_raw():
                size += len(chunk)
                if size > self.patience.max_bytes:
                    part.drop()
                    raise self._too_large(size)
                file.write(chunk)
                passed = time.monotonic() - began
                if passed > self.patience.slow_s and size - start < passed * self.patience.slowest:
                    raise _Refused("download", f"too slow: {size - start} bytes in {passed:.0f} s")
                if stop.is_set():
                    raise _Refused("download", "stopped")
            file.flush()
            os.fsync(file.fileno())

    def _admit(self, uri: str, part: _Part, content_type: str, resumed: bool) -> Stored:
        try:
            info = probe(part.path, Limits(max_bytes=self.patience.max_bytes))
        except MediaError as error:
            part.drop()
            if resumed:  # the old part may be to blame
                raise _Again(f"put together from two parts it is {error.kind}") from error
            raise _Refused(
                "not_video", f"{error.kind}: what came ({content_type}) cannot be used: {error}"
            ) from error
        digest, size = sha256(part.path), part.size()
        target = self.folder / "by-hash" / f"{digest}{_SUFFIXES.get(info.container, '.video')}"
        part.move(target)
        _write(self._record(uri), {"uri": uri, "file": target.name, "sha256": digest, "size": size})
        return Stored(target, digest, size)

    def _record(self, uri: str) -> Path:
        return self.folder / "by-uri" / f"{_key(uri)}.json"

    def _too_large(self, size: int) -> _Refused:
        return _Refused("download", f"{size} bytes; the limit is {self.patience.max_bytes}")

    # --- whether and when to try again ----------------------------------------------------------------

    def _is_passing(self, error: BaseException) -> bool:
        import httpx2

        if isinstance(error, httpx2.HTTPStatusError):
            status = error.response.status_code
            asked = _asked_pause(error)
            return (status >= 500 or status in _PASSING_STATUS) and (
                asked is None or asked <= self.patience.longest_pause_s
            )
        refused = isinstance(error, httpx2.UnsupportedProtocol)
        return isinstance(error, _Again | httpx2.TransportError) and not refused

    def _pause(self, state: Any) -> float:
        import tenacity

        asked = _asked_pause(state.outcome.exception())
        if asked is not None:
            return asked
        longest = min(60.0, self.patience.longest_pause_s)
        # With chance in it, so that those who failed together do not come back together.
        wait = tenacity.wait_exponential(
            multiplier=self.patience.pause_s, max=longest
        ) + tenacity.wait_random(0, self.patience.pause_s)
        return float(wait(state))


class _Again(Exception):
    """Another attempt may go better."""


class _Refused(Exception):
    """Another attempt would go the same way."""

    def __init__(self, kind: Literal["download", "not_video"], reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class _Part:
    """A file that grows, and beside it the validator by which the server knows its version."""

    def __init__(self, stem: Path) -> None:
        self.path = stem.with_name(f"{stem.name}.part")
        self._etag = stem.with_name(f"{stem.name}.etag")

    def begun(self) -> tuple[int, str]:
        """(bytes that are here, validator); 0 where it cannot be told what they belong to."""
        try:
            validator = self._etag.read_text("utf-8")
            return (self.path.stat().st_size, validator) if validator else (0, "")
        except (FileNotFoundError, UnicodeDecodeError):
            return 0, ""

    def note(self, validator: str) -> None:
        if self.begun()[1] != validator:
            # Without a part of the old version: a crash in between must not mix the two.
            self.drop()
            if validator:
                _replace(self._etag, validator)

    def size(self) -> int:
        return self.path.stat().st_size

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self._etag.unlink(missing_ok=True)

    def move(self, target: Path) -> None:
        self.path.replace(target)
        self._etag.unlink(missing_ok=True)


class _Progress:
    """A line now and then, and one at the end."""

    def __init__(self, total: int, report: Callable[[str], None]) -> None:
        self.total, self.report = total, report
        self.done = self.failed = self.bytes = 0
        self.last = time.monotonic()

    def add(self, result: Stored | Failed) -> None:
        self.done += 1
        if isinstance(result, Stored):
            self.bytes += result.size
        else:
            self.failed += 1
        if time.monotonic() - self.last >= LINE_EVERY_S:
            self.last = time.monotonic()
            self.end()

    def end(self) -> None:
        failed = f", {self.failed} failed" if self.failed else ""
        self.report(
            f"fetched {self.done - self.failed} of {self.total} videos{failed}, "
            f"{self.bytes / 2**20:.1f} MiB"
        )


def _key(uri: str) -> str:
    return hashlib.sha256(uri.encode()).hexdigest()


def _write(path: Path, record: dict[str, Any]) -> None:
    _replace(path, json.dumps(record))


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(text, "utf-8")
    unfinished.replace(path)


@contextmanager
def _one_at_a_time(lock: Path, report: Callable[[str], None]) -> Iterator[None]:
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    try:
        with WeakFileLock(lock, timeout=0.1):
            yield
            return
    except Timeout:
        report(f"another process fetches into {lock.parent}: waiting for it")
    with WeakFileLock(lock):
        yield


# --- http ------------------------------------------------------------------------------------------


def _client(patience: Patience, workers: int) -> httpx2.Client:
    import httpx2

    return httpx2.Client(
        timeout=httpx2.Timeout(patience.timeout_s, pool=None),
        limits=httpx2.Limits(max_connections=workers),
    )


@contextmanager
def _open(client: httpx2.Client, uri: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
    """The answer, after redirects. Each step is checked before it is taken."""
    request = client.build_request("GET", uri, headers=headers)
    own_machine = urlsplit(uri).scheme == "http"
    for _ in range(_MOST_REDIRECTS + 1):
        place = str(request.url)
        # A server elsewhere must not make this machine ask its own services.
        if not is_trusted_url(place) or (urlsplit(place).scheme == "http" and not own_machine):
            raise _Refused("download", f"refused to fetch from {request.url.host}: not https")
        response = client.send(request, stream=True)
        try:
            if response.next_request is None:
                yield response
                return
            request = response.next_request
        finally:
            response.close()
    raise _Refused("download", f"more than {_MOST_REDIRECTS} redirects")


def _validator(response: httpx2.Response) -> str:
    """What names this version of the file for sure: a strong ETag; empty where there is none."""
    etag = str(response.headers.get("ETag", ""))
    return etag if etag.startswith('"') else ""


def _total(response: httpx2.Response, start: int) -> int | None:
    """Bytes of the whole file, as announced."""
    told = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status_code == 206 and told is not None and told[2] != "*":
        return int(told[2])
    length = response.headers.get("Content-Length", "")
    return start + int(length) if length.isdecimal() else None


def _asked_pause(error: BaseException | None) -> float | None:
    """Seconds that the server asks to wait by Retry-After: a number, or a date."""
    import httpx2

    if not isinstance(error, httpx2.HTTPStatusError):
        return None
    asked = error.response.headers.get("Retry-After", "").strip()
    if asked.isdecimal():
        return float(asked)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except ValueError:
        return None
