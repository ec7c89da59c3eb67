"""A real HTTP server on loopback that speaks the OpenAI protocol, and misbehaves on purpose.

    with OpenAIServer(answer=lambda asked: asked.user.upper()) as server:
        OpenAISettings(kind="openai", base_url=server.base_url, model="m")

`answer` makes the reply to a request: a text, a `Reply`, or a `Fault` where things go wrong. `faults`
are used up before that, one by each request in the order of arrival; None stands for no fault.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import cv2
import numpy as np


@dataclass
class Asked:
    """A request as the server saw it."""

    body: dict[str, Any]
    headers: Message
    """By name, in capitals or not."""
    path: str
    number: int
    """Of all requests, from 0."""
    attempt: int
    """Of the requests with the same system and user text, from 1."""

    @property
    def request_id(self) -> str:
        return self.headers.get("X-Request-Id", "")

    @property
    def system(self) -> str:
        return next((m["content"] for m in self.body["messages"] if m["role"] == "system"), "")

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Of the user's turn."""
        return next(m["content"] for m in self.body["messages"] if m["role"] == "user")

    @property
    def user(self) -> str:
        """The question: the last text of the user's turn."""
        return [part["text"] for part in self.parts if part["type"] == "text"][-1]

    @property
    def texts(self) -> list[str]:
        return [part["text"] for part in self.parts if part["type"] == "text"]

    @property
    def frames(self) -> list[np.ndarray]:
        """RGB frames of either form, images or video."""
        urls = [part[part["type"]]["url"] for part in self.parts if part["type"] != "text"]
        frames = []
        for url in urls:
            kind, data = url.split(";base64,")
            assert kind in ("data:image/jpeg", "data:video/jpeg")
            for coded in data.split(","):
                raw = np.frombuffer(base64.b64decode(coded, validate=True), np.uint8)
                frames.append(cv2.imdecode(raw, cv2.IMREAD_COLOR)[..., ::-1])
        return frames


@dataclass
class Reply:
    """A well-formed answer."""

    text: str | None = ""
    finish_reason: str = "stop"
    refusal: str | None = None
    first_token: Mapping[str, float] | None = None
    """Probabilities of the first token; given as logprobs, at most as many as were asked for."""
    usage: tuple[int, int] | None = (100, 10)
    delay_s: float = 0.0
    id: str | None = None
    """As in vLLM `chatcmpl-` and the id of the request, where None."""
    header_id: str | None = None
    """Sent as X-Request-Id."""


@dataclass
class Fault:
    """Something that goes wrong."""

    kind: Literal["status", "cut", "reset", "broken", "empty", "error_in_200"]
    status: int = 500
    message: str = "it went wrong"
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    code: str | None = None


Answering = Callable[[Asked], "str | Reply | Fault"]


def echo(asked: Asked) -> str:
    return f"about: {asked.user}"


class OpenAIServer:
    """Listens from construction to `close`; `asked` holds every request in order of arrival."""

    def __init__(
        self,
        answer: Answering = echo,
        faults: Sequence[Fault | Reply | None] = (),
        model: str = "tiny-vlm",
    ) -> None:
        self.answer = answer
        self.model = model
        self.asked: list[Asked] = []
        self.most_in_flight = 0
        self._faults = list(faults)
        self._in_flight = 0
        self._seen: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.owner = self
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def connections(self) -> int:
        """How many were opened."""
        return len(self._http.connections)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def close(self) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        for connection in self._http.connections:
            with contextlib.suppress(OSError):  # closed by now
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> OpenAIServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reply_to(self, body: dict[str, Any], headers: Message, path: str) -> Reply | Fault:
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            asked = Asked(body, headers, path, len(self.asked), 1)
            who = (asked.system, asked.user)
            self._seen[who] += 1
            asked.attempt = self._seen[who]
            self.asked.append(asked)
            planned = self._faults.pop(0) if self._faults else None
        try:
            made = planned if planned is not None else self.answer(asked)
            made = Reply(made) if isinstance(made, str) else made
            self._closing.wait(made.delay_s)
            return made
        finally:
            with self._lock:
                self._in_flight -= 1

    def json_of(self, reply: Reply, asked: dict[str, Any], request_id: str) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.text, "refusal": reply.refusal},
            "finish_reason": reply.finish_reason,
            "logprobs": None,
        }
        if reply.first_token is not None and asked.get("logprobs"):
            likely = sorted(reply.first_token.items(), key=lambda item: -item[1])
            tokens = [{"token": t, "logprob": float(np.log(p)), "bytes": None} for t, p in likely]
            most = asked.get("top_logprobs", 0)
            choice["logprobs"] = {"content": [{**tokens[0], "top_logprobs": tokens[:most]}]}
        usage = reply.usage and {
            "prompt_tokens": reply.usage[0],
            "completion_tokens": reply.usage[1],
            "total_tokens": sum(reply.usage),
        }
        return {
            "id": f"chatcmpl-{request_id}" if reply.id is None else reply.id,
            "object": "chat.completion",
            "created": 0,
            "model": self.model,
            "choices": [choice],
            "usage": usage or None,
        }


class _Server(ThreadingHTTPServer):
    owner: OpenAIServer
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*args)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection = super().get_request()
        self.connections.append(connection[0])
        return connection

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._send(404, b'{"detail": "Not Found"}')
            return
        owner = self.server.owner
        reply = owner.reply_to(body, self.headers, self.path)
        if isinstance(reply, Reply):
            request_id = self.headers.get("X-Request-Id", "")
            text = json.dumps(owner.json_of(reply, body, request_id)).encode()
            self._send(200, text, {"X-Request-Id": reply.header_id} if reply.header_id else {})
        else:
            self._misbehave(reply, body)

    def _misbehave(self, fault: Fault, body: dict[str, Any]) -> None:
        whole = self.server.owner.json_of(Reply("cut off"), body, "")
        if fault.kind == "reset":
            self.close_connection = True
        elif fault.kind == "cut":
            text = json.dumps(whole).encode()
            self._head(200, len(text), {})
            self.wfile.write(text[: len(text) // 2])
            self.close_connection = True
        elif fault.kind == "broken":
            self._send(200, json.dumps(whole).encode()[:-20])
        elif fault.kind == "empty":
            self._send(200, json.dumps(whole | {"choices": []}).encode())
        else:
            error = {"message": fault.message, "type": "error", "code": fault.code or fault.status}
            status = 200 if fault.kind == "error_in_200" else fault.status
            self._send(status, json.dumps({"error": error}).encode(), fault.headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self._head(status, len(body), headers or {})
        self.wfile.write(body)

    def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
