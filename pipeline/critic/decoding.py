"""Decoding ahead of the critic, in child processes: a poisonous video costs itself and no weights."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pebble import ProcessExpired, ProcessPool

from winnow.operators.errors import MediaError, WinnowError
from winnow.pipeline.isolation import TASKS_PER_CHILD, begin, exit_text

if TYPE_CHECKING:
    from winnow.operators.critic.critic import Critic, Shown
    from winnow.operators.critic.judgement import Judgement
    from winnow.operators.critic.settings import CriticSettings

T = TypeVar("T")

AHEAD = 2  # batches that are decoded ahead
ATTEMPTS = 2  # a child may die of its neighbour's hunger for memory
STRIP_FRAMES, STRIP_HEIGHT = 4, 120
_QUALITY = 72


@dataclass(frozen=True, slots=True)
class Video:
    """A file to be judged."""

    example_id: str
    path: Path
    caption: str | None = None


class Decoders:
    """Calls functions on videos in child processes, or, with 0 `processes`, right here.

    Functions and what they take and return travel pickled. A call that takes longer than `timeout_s`
    loses its process.
    """

    def __init__(self, processes: int, timeout_s: float) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._timeout_s = timeout_s
        self._pool: Any = None
        if processes > 0:
            self._pool = ProcessPool(
                max_workers=processes,
                max_tasks=TASKS_PER_CHILD,
                initializer=begin,
                initargs=[[]],
                context=multiprocessing.get_context("spawn"),
            )

    def submit(self, function: Callable[..., T], *args: Any) -> Pending[T]:
        return Pending(self, function, args)

    def schedule(self, function: Callable[..., T], args: tuple[Any, ...]) -> Future[T]:
        if self._pool is None:
            here: Future[T] = Future()
            try:
                here.set_result(function(*args))
            except Exception as error:
                here.set_exception(error)
            return here
        future: Future[T] = self._pool.schedule(function, args=list(args), timeout=self._timeout_s)
        return future

    def result(self, function: Callable[..., T], args: tuple[Any, ...], future: Future[T]) -> T:
        """What came back. Raises MediaError: of the video, or `timeout` or `crashed`."""
        for tries_left in reversed(range(ATTEMPTS)):
            try:
                return future.result()
            except TimeoutError as error:
                # Whatever took that long takes it again.
                raise MediaError(
                    "timeout", f"decoding took longer than {self._timeout_s:g} s"
                ) from error
            except ProcessExpired as expired:
                if not tries_left:
                    how = exit_text(expired.exitcode)
                    raise MediaError("crashed", f"decoding killed its process ({how})") from expired
            except WinnowError:
                raise
            except Exception as error:
                raise MediaError("internal", f"{type(error).__name__}: {error}") from error
            future = self.schedule(function, args)
        raise AssertionError("unreachable")

    def close(self, *, now: bool = False) -> None:
        if self._pool is not None:
            if now:
                self._pool.stop()
            else:
                self._pool.close()
            self._pool.join()

    def __enter__(self) -> Decoders:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(now=kind is not None)


class Pending(Generic[T]):
    """A call on its way through a child process."""

    def __init__(
        self, decoders: Decoders, function: Callable[..., T], args: tuple[Any, ...]
    ) -> None:
        self._decoders, self._function, self._args = decoders, function, args
        self._future = decoders.schedule(function, args)

    def result(self) -> T:
        """Waits. Raises MediaError."""
        return self._decoders.result(self._function, self._args, self._future)


def judge_ahead(
    videos: Iterable[Video], critic: Critic, children: Decoders, batch: int
) -> Iterator[tuple[str, Judgement | MediaError]]:
    """What the critic says of each video, or why it cannot be decoded, by id and batch by batch.

    While the critic has one batch, the next are decoded.
    """
    from winnow.operators.critic.critic import show

    upcoming = iter(videos)
    window: deque[tuple[Video, Pending[Shown]]] = deque()
    while True:
        while len(window) < AHEAD * batch and (video := next(upcoming, None)) is not None:
            shown = children.submit(
                show, video.path, critic.settings, video.example_id, None, video.caption
            )
            window.append((video, shown))
        if not window:
            return
        clips: list[Shown] = []
        for video, pending in [window.popleft() for _ in range(min(batch, len(window)))]:
            try:
                clips.append(pending.result())
            except MediaError as error:
                yield video.example_id, error
        for clip, judgement in zip(clips, critic.judge(clips) if clips else [], strict=True):
            yield clip.clip_id, judgement


def strip(path: Path, settings: CriticSettings) -> bytes | None:
    """Some of the frames that the critic is shown, side by side as one small JPEG."""
    import cv2
    import numpy as np

    from winnow.operators.critic.critic import show
    from winnow.operators.frames import shrink

    with contextlib.suppress(MediaError):
        frames = show(path, settings, "strip").video.frames
        chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, STRIP_FRAMES).astype(int)]
        height, width = chosen[0].shape[:2]
        height = min(height, STRIP_HEIGHT)
        size = (max(1, round(width * height / chosen[0].shape[0])), height)
        image = np.hstack([shrink(frame, size) for frame in chosen])
        done, data = cv2.imencode(
            ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
        )
        return data.tobytes() if done else None
    return None
