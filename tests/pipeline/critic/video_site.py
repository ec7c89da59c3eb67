"""A web server of videos on loopback that misbehaves on purpose."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class VideoSite:
    """What is served, how, and what was asked. Paths are decoded, and begin with a slash."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str | None] = field(default_factory=dict)
    """Instead of the content's hash; None for no ETag."""
    moods: dict[str, list[str]] = field(default_factory=dict)
    """What the next answers of a path are like, one each: `cut` (half of what was asked), `500`,
    `429:<Retry-After>`, `stall`, `trickle`, `endless`, `short` and `long` (a false length), `deaf` (to
    If-Range), `302:<Location>`, `html`. Then it is well."""
    headers: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Path as it came, still encoded, and headers of every request, in order."""
    times: list[float] = field(default_factory=list)
    pause_s: float = 0.0
    """That every answer takes."""
    busy: int = 0
    most_busy: int = 0

    def put(self, path: str, content: bytes) -> str:
        self.files[path] = content
        return self.address + path

    def ranges(self) -> list[str]:
        return [headers.get("Range", "") for _, headers in self.headers]


@contextmanager
def serving() -> Iterator[VideoSite]:
    site = VideoSite()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(site))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(site: VideoSite) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            with lock:
                site.headers.append((self.path, dict(self.headers.items())))
                site.times.append(time.monotonic())
                site.busy += 1
                site.most_busy = max(site.most_busy, site.busy)
            time.sleep(site.pause_s)
            path = unquote(urlsplit(self.path).path)
            moods = site.moods.get(path, [])
            mood, _, detail = (moods.pop(0) if moods else "").partition(":")
            try:
                self.serve(path, mood, detail)
            except OSError:  # the client has had enough
                self.close_connection = True
            finally:
                with lock:
                    site.busy -= 1

        def serve(self, path: str, mood: str, detail: str) -> None:
            if mood in ("429", "503"):
                self.answer(int(mood), b"", {"Retry-After": detail} if detail else {})
            elif mood.isdecimal() and mood.startswith("3"):
                self.answer(int(mood), b"", {"Location": detail})
            elif mood.isdecimal():
                self.answer(int(mood), b"")
            elif mood == "html":
                self.answer(200, b"<html>not found</html>", {"Content-Type": "text/html"})
            elif path not in site.files:
                self.answer(404, b"")
            else:
                self.content(site.files[path], path, mood)

        def content(self, whole: bytes, path: str, mood: str) -> None:
            etag = site.etags.get(path, f'"{hashlib.sha256(whole).hexdigest()[:16]}"')
            headers = {"ETag": etag} if etag is not None else {}
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            same = self.headers.get("If-Range") in (etag, None) or mood == "deaf"
            status, body = 200, whole
            if asked and same:
                start = int(asked[1])
                if start >= len(whole):
                    self.answer(416, b"")
                    return
                status, body = 206, whole[start:]
                headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
            self.answer(status, body, headers, mood)

        def answer(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, mood: str = ""
        ) -> None:
            length = {"short": len(body) * 3 // 4, "long": len(body) + 1000}.get(mood, len(body))
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            if mood == "endless":
                self.send_header("Connection", "close")
            else:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            if mood in ("cut", "long"):
                self.wfile.write(body[: len(body) // 2 if mood == "cut" else None])
                self.close_connection = True
            elif mood == "stall":
                self.wfile.write(body[:10])
                self.wfile.flush()
                time.sleep(1.0)
                self.close_connection = True
            elif mood == "trickle":
                for n in range(40):
                    self.wfile.write(body[n : n + 1])
                    time.sleep(0.05)
                self.close_connection = True
            elif mood == "endless":
                self.close_connection = True
                for _ in range(1000):
                    self.wfile.write(body)
            else:
                self.wfile.write(body[:length])

    return Handler
