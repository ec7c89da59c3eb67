"""A VLM behind a server that speaks the OpenAI protocol: vLLM, NIM, or a hosted one.

Requests are sent concurrently from one event loop in a thread of its own, which lives as long as the
backend, so that connections stay open between batches and `answer` may be called from any thread.

Tries are repeated by tenacity and not by the client: the client repeats neither broken JSON nor empty
choices nor another request's answer, and would hide from the budget what it sends.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import json
import logging
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from winnow.operators.errors import ConfigError, ModelUnavailable, WorkerError
from winnow.operators.vlm.backend import Backend, OpenAISettings
from winnow.operators.vlm.choices import Weighed, weigh
from winnow.operators.vlm.frames_as_parts import content_parts, video_settings
from winnow.operators.vlm.messages import Answer, Request
from winnow.operators.vlm.untrusted import unmarked

if TYPE_CHECKING:
    import openai

log = logging.getLogger(__name__)

TOP_LOGPROBS = 20  # the most that OpenAI gives, and vLLM by default
LONGEST_PAUSE_S = 30.0
LONGEST_RETRY_AFTER_S = 120.0
DENIALS = 3  # so many, and never a good answer: no other request will fare better
CLOSING_S = 5.0
UNCERTAIN = 0.01  # share of the choices' mass that unlisted choices may hold


def load(settings: OpenAISettings) -> Backend:
    """The backend of a server; nothing is sent yet. Raises ConfigError."""
    if urlsplit(settings.base_url).username is not None:
        raise ConfigError("base_url holds a user name or password: use the variable of api_key_env")
    key = os.getenv(settings.api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        # Checked here, because the HTTP library would quote the key in its complaint.
        raise ConfigError(
            f"the variable {settings.api_key_env} (api_key_env) holds characters that no header may "
            "hold"
        )
    return OpenAIBackend(settings, key)


class OpenAIBackend(Backend):
    """Answers of a server. A request's failure is its answer; a failure of all is ModelUnavailable.

    ModelUnavailable is raised where the server denies (401, 403, 404, no quota) or cannot be reached
    and has never given a good answer: every further request would fail in the same way.
    """

    def __init__(self, settings: OpenAISettings, key: str) -> None:
        self.settings = settings
        self._key = key
        self._spent = _Spent(settings)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._refused_schemas: set[str] = set()
        self._not_before = 0.0
        self._heard = False  # an HTTP response of whatever status
        self._welcome = False  # a response of status 200
        self._denials = 0
        self._denial = ""
        self._lock = threading.Lock()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: openai.AsyncOpenAI | None = None

    def _answer(self, requests: Sequence[Request]) -> list[Answer]:
        if not requests:
            return []
        with self._lock:  # against `close`: what is submitted to a stopped loop is never done
            if self._closed:
                raise WorkerError("the VLM backend is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                # A daemon: a backend that nobody closed must not keep the process alive.
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="winnow-vlm", daemon=True
                )
                self._thread.start()
            batch = asyncio.run_coroutine_threadsafe(self._answer_all(requests), self._loop)
        try:
            return batch.result()
        except concurrent.futures.CancelledError:
            raise WorkerError("the VLM backend was closed while requests were under way") from None
        except BaseException:
            batch.cancel()  # Ctrl-C: give up what is under way
            raise

    def close(self) -> None:
        """Give up what is under way, close the connections and end the thread. Never waits long."""
        with self._lock:
            if self._closed or self._loop is None or self._thread is None:
                self._closed = True
                return
            self._closed = True
            loop, thread = self._loop, self._thread
            shut = asyncio.run_coroutine_threadsafe(self._shut(), loop)
        with contextlib.suppress(TimeoutError):
            shut.result(CLOSING_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSING_S)
        if not thread.is_alive():
            loop.close()

    async def _shut(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
        await asyncio.get_running_loop().shutdown_default_executor()

    async def _answer_all(self, requests: Sequence[Request]) -> list[Answer]:
        if self._client is None:
            self._client = self._connect()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._answer_one(request)) for request in requests]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        answers = [task.result() for task in tasks]
        if self._denials and not self._welcome and all(a.status == "error" for a in answers):
            raise ModelUnavailable(f"{self.settings.base_url}: {self._denial}")
        return answers

    def _connect(self) -> openai.AsyncOpenAI:
        import openai

        timeout = self.settings.timeout_s
        return openai.AsyncOpenAI(
            base_url=self.settings.base_url,
            # Local servers want none, but the client insists on one.
            api_key=self._key or "none",
            max_retries=0,
            timeout=openai.Timeout(timeout, connect=min(timeout, 10.0)),
            http_client=openai.DefaultAsyncHttpxClient(
                # A proxy of the environment is meant for hosts far away.
                trust_env=not _is_loopback(urlsplit(self.settings.base_url).hostname or ""),
                # A POST that is sent on would become a GET, and the key go elsewhere.
                follow_redirects=False,
            ),
        )

    async def _answer_one(self, request: Request) -> Answer:
        video = request.video
        answer = Answer(
            request.key,
            "error",
            frames=len(video.frames),
            fps=video.fps,
            pixels=video.pixels,
            model=self.settings.model,
            attempts=0,
        )
        started = time.monotonic()
        try:
            tries = AsyncRetrying(
                stop=stop_after_attempt(self.settings.tries),
                wait=self._pause,
                retry=retry_if_exception_type(_TryFailed),
                reraise=True,
            )
            await tries(self._try, request, answer)
        except _RequestFailed as error:
            self._give_up_all(error)
            answer.status, answer.error = "error", str(error)
        answer.seconds = time.monotonic() - started
        return answer

    def _give_up_all(self, error: _RequestFailed) -> None:
        """Raise ModelUnavailable where this failure is that of every request."""
        if isinstance(error, _Unreached) and not self._heard:
            raise ModelUnavailable(
                f"nothing answers at {self.settings.base_url}: start the server or correct base_url "
                f"({error})"
            )
        if isinstance(error, _Denied) and not self._welcome:
            self._denials += 1
            self._denial = str(error)
            if self._denials >= DENIALS:
                raise ModelUnavailable(f"{self.settings.base_url}: {error}")

    def _pause(self, state: RetryCallState) -> float:
        first = self.settings.pause_s
        growing = wait_exponential(first, max=LONGEST_PAUSE_S) + wait_random(0, first)
        error = state.outcome.exception() if state.outcome else None
        return max(growing(state), error.retry_after if isinstance(error, _TryFailed) else 0.0)

    async def _try(self, request: Request, answer: Answer) -> None:
        async with self._slots:
            # Whom the server asks to wait, it asks in the name of all.
            while (wait := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            # Made anew for each try: only as many bodies are in memory as are under way.
            try:
                body = await asyncio.to_thread(self._body, request)
            except ValueError as error:
                raise _RequestFailed(f"not sent: {error}") from error
            schema = None if request.choices else request.schema
            name = json.dumps(schema, sort_keys=True)
            if schema is None or name in self._refused_schemas:
                await self._send(request, body, answer)
                return
            try:
                await self._send(request, body | {"response_format": _format(schema)}, answer)
            except _Refused as refused:
                await self._send(request, body, answer)
                self._refused_schemas.add(name)
                log.warning("%s takes no JSON schema: %s", self.settings.base_url, refused)

    def _body(self, request: Request) -> dict[str, Any]:
        parts = content_parts(request.video, self.settings.video)
        turns: list[dict[str, Any]] = []
        if request.system:
            turns.append({"role": "system", "content": unmarked(request.system)})
        question = {"type": "text", "text": unmarked(request.user)}
        turns.append({"role": "user", "content": [*parts, question]})
        body: dict[str, Any] = {"model": self.settings.model, "messages": turns}
        if self.settings.video == "video":
            body["extra_body"] = video_settings(request.video)
        if request.choices:
            # No structured output: vLLM masks the logits before it takes even the raw
            # probabilities, so that what leaked could no longer be seen; others would refuse it.
            return body | {
                "max_tokens": 1,
                "temperature": 0.0,
                "logprobs": True,
                "top_logprobs": TOP_LOGPROBS,
            }
        body |= {"max_tokens": request.max_tokens, "temperature": request.temperature}
        return body | ({"seed": request.seed} if request.temperature > 0 else {})

    async def _send(self, request: Request, body: dict[str, Any], answer: Answer) -> None:
        """Send once, and fill in the answer. Raises _RequestFailed."""
        import openai

        assert self._client is not None
        self._spent.take()
        answer.attempts += 1
        # One of its own for each try: vLLM refuses an id that it is still at work on.
        request_id = f"winnow-{uuid.uuid4().hex}"
        try:
            # The client's timeout is for each read; a server that trickles would never meet it.
            async with asyncio.timeout(self.settings.timeout_s):
                response = await self._client.chat.completions.with_raw_response.create(
                    **body, extra_headers={"X-Request-Id": request_id}
                )
        except (TimeoutError, openai.APITimeoutError):
            raise _TryFailed(f"no answer within {self.settings.timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            text = self._shown(f"connection: {error.__cause__ or error}")
            # By name: the client is built on httpx or on httpx2, by its version.
            never_open = type(error.__cause__).__name__ == "ConnectError"
            raise (_Unreached(text) if never_open else _TryFailed(text)) from None
        except openai.APIStatusError as error:
            self._heard = True
            raise self._failure(error) from None
        except UnicodeEncodeError as error:
            raise _RequestFailed(f"cannot be sent: the text is not valid: {error.reason}") from None
        self._heard = self._welcome = True
        self._read(response.headers, response.content, request, request_id, answer)

    def _failure(self, error: openai.APIStatusError) -> _RequestFailed:
        status = error.status_code
        # The client's own message is the body in Python's notation.
        said = error.body.get("message") if isinstance(error.body, dict) else None
        text = self._shown(f"HTTP {status}: {said or error.message}")
        if status in (401, 403):
            key = self.settings.api_key_env
            return _Denied(
                f"the server denies access: check the key in {key} (api_key_env): {text}"
            )
        if status == 404:
            return _Denied(
                f"the server knows no such address or model: check base_url (does it end in /v1?) and model "
                f"{self.settings.model!r} ({text})"
            )
        if status < 400:
            return _Denied(f"the server sends requests on to elsewhere: correct base_url ({text})")
        if error.code == "insufficient_quota":
            return _Denied(f"the server has no quota left for this account ({text})")
        if status in (408, 409, 429) or status >= 500:
            wait = _retry_after(error.response.headers)
            if wait > LONGEST_RETRY_AFTER_S:
                return _RequestFailed(f"the server asks to wait {wait:.0f} s ({text})")
            self._not_before = max(self._not_before, time.monotonic() + wait)
            return _TryFailed(text, wait)
        return _Refused(text)

    def _read(
        self,
        headers: Mapping[str, str],
        content: bytes,
        request: Request,
        request_id: str,
        answer: Answer,
    ) -> None:
        try:
            reply = _Reply.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "body"
            raise _TryFailed(self._shown(f"broken answer: {where}: {first['msg']}")) from None
        if reply.choices or reply.usage is not None:
            self._spent.count(reply.usage)
        # vLLM answers with `chatcmpl-<id>`, OpenAI with an id of its own making: only another id
        # of ours proves that answers were mixed up.
        echoed = re.findall(r"winnow-[0-9a-f]{32}", f"{headers.get('x-request-id')} {reply.id}")
        if set(echoed) - {request_id}:
            raise _TryFailed("the server gave the answer to another request")
        if not reply.choices:
            text = f" ({json.dumps(reply.error)})" if reply.error else ""
            raise _TryFailed(self._shown(f"the answer has no choices{text}"))
        choice = reply.choices[0]
        if choice.finish_reason in ("abort", "error"):
            raise _TryFailed(f"the server broke off: {choice.finish_reason}")
        answer.model = reply.model or self.settings.model
        if reply.usage is not None:
            answer.tokens_in = reply.usage.prompt_tokens
            answer.tokens_out = reply.usage.completion_tokens
        if choice.message.refusal or choice.finish_reason == "content_filter":
            answer.status = "refused"
            answer.text = choice.message.refusal or choice.message.content or ""
            return
        if request.choices:
            weighed = _weighed(request.choices, choice.logprobs)
            answer.probabilities, answer.leaked = weighed.probabilities, weighed.leaked
            answer.status, answer.text = "ok", weighed.text
            return
        if choice.message.content is None and choice.finish_reason != "length":
            raise _RequestFailed("the answer has no text: does a reasoning parser take all of it?")
        answer.text = choice.message.content or ""
        answer.status = "truncated" if choice.finish_reason == "length" else "ok"

    def _shown(self, text: str) -> str:
        """A server's text for an error column: short, and without the key, should it be quoted."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return text if len(text) <= 300 else text[:299] + "…"


class _RequestFailed(Exception):
    """One request, for good."""


class _TryFailed(_RequestFailed):
    """One try; the next may succeed."""

    def __init__(self, text: str, retry_after: float = 0.0) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class _Unreached(_TryFailed):
    """No connection could be opened."""


class _Refused(_RequestFailed):
    """The server finds fault with this request."""


class _Denied(_RequestFailed):
    """The server finds fault with the settings, and so with every request."""


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Token(BaseModel):
    token: str
    logprob: float


class _Position(_Token):
    top_logprobs: list[_Token] = Field(default_factory=list)


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Reply(BaseModel):
    """What is read of a chat completion; the client's own models check no types."""

    id: str | None = None
    model: str | None = None
    choices: list[_Choice] = Field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None


class _Spent:
    """What one backend has used of its budget; only the event loop's thread touches it."""

    def __init__(self, settings: OpenAISettings) -> None:
        self.most_requests = settings.budget_requests
        self.most_tokens = settings.budget_tokens
        self.requests = 0
        self.tokens = 0
        self.uncounted = False

    def take(self) -> None:
        """Count a request that is about to be sent. Raises _RequestFailed where it may not."""
        if self.most_requests is not None and self.requests >= self.most_requests:
            raise _RequestFailed(
                f"not sent: the budget of {self.most_requests} requests is spent: raise "
                f"budget_requests"
            )
        if self.most_tokens is not None:
            if self.uncounted:
                raise _RequestFailed(
                    "not sent: the server does not say how many tokens it used, so budget_tokens "
                    "cannot be kept: use budget_requests instead"
                )
            if self.tokens >= self.most_tokens:
                raise _RequestFailed(
                    f"not sent: the budget of {self.most_tokens} tokens is spent "
                    f"({self.tokens} used): raise budget_tokens"
                )
        self.requests += 1

    def count(self, usage: _Usage | None) -> None:
        if usage is None or usage.prompt_tokens is None:
            self.uncounted = True
        else:
            self.tokens += usage.prompt_tokens + (usage.completion_tokens or 0)


def _weighed(choices: Sequence[str], logprobs: _Logprobs | None) -> Weighed:
    """The choices, weighed by what the server lists of the first token.

    A token counts for a choice only if it is the choice, letter by letter. A choice that is not among
    the listed tokens has probability 0; that is an answer only where what is not listed cannot
    matter (`UNCERTAIN`), else _RequestFailed is raised, as without any logprobs.
    """
    position = logprobs.content[0] if logprobs is not None and logprobs.content else None
    if position is None or not position.top_logprobs:
        raise _RequestFailed(
            "the answer has no logprobs, so the choices cannot be weighed: let the server give "
            f"{TOP_LOGPROBS} of them (vLLM: --max-logprobs), or use another"
        )
    tokens = [*position.top_logprobs]
    if position.token not in {token.token for token in tokens}:
        tokens.append(position)
    listed = [(token.token, math.exp(min(token.logprob, 0.0))) for token in tokens]
    mass = [sum(p for token, p in listed if token == choice) for choice in choices]
    rest = max(0.0, 1.0 - sum(p for _, p in listed))
    unseen = min(mass.count(0.0) * min(p for _, p in listed), rest)
    if not (sum(mass) > 0 and unseen <= UNCERTAIN * sum(mass)):  # NaN fails too
        raise _RequestFailed(
            f"the choices hold {sum(mass):.3g} of the first token's probability and up to "
            f"{unseen:.3g} more out of sight; the likeliest tokens are "
            f"{[token for token, _ in listed[:3]]}"
        )
    return weigh(choices, [math.log(p) if p > 0 else -math.inf for p in mass])


def _format(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": schema},
    }


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait, 0 where it does not say."""
    value = headers.get("retry-after")
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if not math.isnan(seconds) else 0.0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
