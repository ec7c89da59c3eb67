"""Caption: a vision-language model describes every window of the kept clips, in several lengths.

Captions never change a verdict. What cannot be captioned has rows of status error, refused or
truncated, and the clip goes on as it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import ClassVar

from winnow.operators.errors import ConfigError, MeasureError, MediaError, StorageError, WinnowError
from winnow.operators.models import Models
from winnow.operators.operator import Budget, Needs, Sample, Sampling, SeenClip
from winnow.operators.vlm.backend import Backend, VlmSettings
from winnow.operators.vlm.caption_flags import echoes, is_copied, out_of_order, text_flags
from winnow.operators.vlm.caption_prompts import (
    LENGTHS,
    CaptionPrompts,
    Captions,
    Given,
    Length,
    answer_schema,
    read_answer,
    read_truncated,
)
from winnow.operators.vlm.messages import Answer, Request, Video
from winnow.operators.vlm.untrusted import clean
from winnow.stages.collect import CollectedClips, collect_clips
from winnow.stages.filter import view_of
from winnow.stages.records import Caption as Row
from winnow.stages.records import Clip, Source
from winnow.stages.stage import BatchStage, Files

LEAST_WINDOW_S = 1.0
LEAST_FRAMES = 2
"""Fewer show no motion."""
PATCH = 32
"""Side of what Qwen3-VL makes one token of: two patches of 16 pixels."""
MOST_ERROR = 500


@dataclass(frozen=True, slots=True)
class CaptionWindow:
    """[start_s, end_s) of a clip, in seconds from its first frame."""

    number: int
    start_s: float
    end_s: float


def windows_of(duration_s: float, window_s: float, least_s: float) -> list[CaptionWindow]:
    """Windows of `window_s`; a rest of less than `least_s` belongs to the window before it."""
    # Not quite up: 15.000001 s have three windows of 5 s, and no fourth.
    count = max(1, math.ceil(duration_s / window_s - 1e-6))
    if count > 1 and duration_s - (count - 1) * window_s < least_s - 1e-6:
        count -= 1
    starts = [number * window_s for number in range(count)]
    ends = [*starts[1:], duration_s]
    return [CaptionWindow(n, *times) for n, times in enumerate(zip(starts, ends, strict=True))]


@dataclass(slots=True)
class _Asked:
    """One window of one clip, with what is asked of it and what came of that."""

    clip: Clip
    window: CaptionWindow
    request: Request
    given: list[Given]
    answer: Answer | None = None


@dataclass
class Caption(BatchStage):
    """Asks for all lengths of a window's caption at once, in one JSON answer."""

    name: ClassVar[str] = "caption"
    files: Files
    vlm: VlmSettings
    models: Models
    prompts: CaptionPrompts
    window_s: float = 5.0
    fps: float = 2.0
    """Frames a second that the model sees."""
    pixels: int = 4 * 2**20
    """Most pixels of one window, all its frames together."""
    lengths: tuple[Length, ...] = LENGTHS
    max_tokens: int = 1024
    threads: int = 1
    label: str = "caption"
    batch_clips: int = 16
    batch_pixels: int = 2**28
    _backend: Backend | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.lengths or not set(self.lengths) <= set(LENGTHS):
            raise ConfigError(f"stages.{self.label}: lengths must be some of {', '.join(LENGTHS)}")
        self.lengths = tuple(length for length in LENGTHS if length in self.lengths)
        if self.window_s < self._least_window_s:
            raise ConfigError(
                f"stages.{self.label}: window_s is {self.window_s:g}, but a window must have "
                f"{LEAST_WINDOW_S:g} s and {LEAST_FRAMES} frames: make it "
                f"{self._least_window_s:g} or longer, or raise fps"
            )
        if self.pixels < self._most_frames * PATCH**2:
            raise ConfigError(
                f"stages.{self.label}: {self.pixels} pixels for the {self._most_frames} frames of a "
                f"window: give at least {self._most_frames * PATCH**2}"
            )

    def __getstate__(self) -> dict[str, object]:
        # Plans travel to worker processes; weights and connections stay where they were made.
        return self.__dict__ | {"_backend": None}

    @property
    def _least_window_s(self) -> float:
        return max(LEAST_WINDOW_S, LEAST_FRAMES / self.fps)

    @property
    def _most_frames(self) -> int:
        """Frames of the longest window, which a rest was joined to."""
        return math.ceil((self.window_s + self._least_window_s) * self.fps)

    @property
    def sampling(self) -> Sampling:
        """The frames that the model sees."""
        budget = Budget(self.pixels // self._most_frames, PATCH)
        return Sampling(self.fps, kind="rgb", minimum=LEAST_FRAMES, fit=budget)

    @property
    def _model(self) -> str:
        """Repository and revision, or the server's model name."""
        return self.vlm.identity(self.models)

    def needed_models(self) -> tuple[str, ...]:
        return self.vlm.models()

    def versions(self) -> dict[str, str]:
        return {f"{self.label} model": self._model, f"{self.label} prompt": self.prompts.identity}

    def setup(self) -> None:
        self._backend = self.vlm.load(self.models)

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()
        self._backend = None

    def wants(self, source: Source) -> bool:
        return any(clip.alive and not clip.captioned for clip in source.clips)

    def collect(self, source: Source) -> CollectedClips | None:
        """The sampled frames of the clips alive. A file that cannot be read fails the captions only:
        the clips have their verdict and their media."""
        clips = [clip for clip in source.clips if clip.alive and not clip.captioned]
        if not clips:
            return None
        try:
            with self.files.local(source.key) as path:
                return collect_clips(
                    path, source, clips, Needs(samples=(self.sampling,)), self.threads
                )
        except (MediaError, StorageError) as error:
            unseen = [SeenClip(view_of(source, clip)) for clip in clips]
            return CollectedClips(unseen, [str(error)] * len(clips))

    def measure(self, batch: Sequence[tuple[Source, CollectedClips]]) -> None:
        if self._backend is None:
            raise RuntimeError("the caption stage was not set up")
        asked: list[_Asked] = []
        for source, collected in batch:
            clips = {clip.clip_id: clip for clip in source.clips}
            given = self._given(source)
            for seen, error in zip(collected.seen, collected.errors, strict=True):
                # By id: the caption must land on the clip that the frames came from.
                asked += self._questions(clips[seen.view.clip_id], seen, given, error)
        started = time.perf_counter()
        waiting = [one for one in asked if one.answer is None]
        answered = answers(self._backend, [one.request for one in waiting])
        for one, answer in zip(waiting, answered, strict=True):
            one.answer = answer
        self._book(batch, time.perf_counter() - started)
        for _, windows in groupby(asked, key=lambda one: id(one.clip)):
            self._write(list(windows))

    def _given(self, source: Source) -> list[Given]:
        sidecar = source.sidecar
        return [] if sidecar is None else self.prompts.given(sidecar.prompt, sidecar.fields)

    def _questions(
        self, clip: Clip, seen: SeenClip, given: list[Given], error: str | None
    ) -> Iterable[_Asked]:
        """The requests of one clip; those that cannot be made are answered already."""
        samples = seen.samples.get(self.sampling, [])
        windows = windows_of(clip.duration_s, self.window_s, self._least_window_s)
        for window in windows:
            frames = _inside(samples, window, last=window is windows[-1])
            user = self.prompts.render(
                self.lengths, given, window.start_s, window.end_s, clip.duration_s
            )
            request = Request(
                clip.clip_id,
                window.number,
                Video.of(frames, seen.view.fps),
                user,
                system=self.prompts.system.strip(),
                max_tokens=self.max_tokens,
                schema=answer_schema(self.lengths),
                purpose=self.label,
            )
            problem = error or (None if frames else "no frame falls into this window")
            answer = None if problem is None else Answer(request.key, "error", error=problem)
            yield _Asked(clip, window, request, given, answer)

    def _book(self, batch: Sequence[tuple[Source, CollectedClips]], seconds: float) -> None:
        """Each source bears its clips' share of the time."""
        total = sum(collected.clips for _, collected in batch)
        for source, collected in batch:
            key = f"{self.label}/vlm"
            share = seconds * collected.clips / total
            source.seconds[key] = source.seconds.get(key, 0.0) + share

    def _write(self, windows: Sequence[_Asked]) -> None:
        """The rows of one clip, by window and length, with their flags."""
        before: dict[Length, str] = {}
        for asked in windows:
            rows = self._rows(asked)
            texts = {row.length: row.text for row in rows if row.text}
            whole = {row.length: row.text for row in rows if row.text and row.status == "ok"}
            disordered = out_of_order(whole, LENGTHS)
            for row in rows:
                flags = [*row.flags]
                if row.text is not None:
                    flags += text_flags(row.text)
                    if is_copied(row.text, before.get(row.length, "")):
                        flags.append("copied")
                    if echoes(row.text, [line.text for line in asked.given]):
                        flags.append("echoes_prompt")
                if row.length in disordered:
                    flags.append("length_order")
                asked.clip.captions.append(replace(row, flags=tuple(flags)))
            before = texts

    def _rows(self, asked: _Asked) -> list[Row]:
        answer, window, video = asked.answer, asked.window, asked.request.video
        assert answer is not None
        captions = _read(answer, self.lengths)
        rows = []
        for length in self.lengths:
            row = Row(
                window_number=window.number,
                start_s=window.start_s,
                end_s=window.end_s,
                length=length,
                status=answer.status,
                text=captions.texts.get(length),
                flags=(),
                error=captions.problem,
                model=answer.model or self._model,
                prompt=self.prompts.identity,
                # What the backend showed; where it failed before that, what it was given.
                fps=answer.fps or video.fps,
                frames=answer.frames or len(video.frames),
                pixels=answer.pixels or video.pixels,
            )
            if answer.status == "ok" and row.text is None:
                row.status, row.flags = "error", ("unparsed",)
            elif answer.status == "truncated":
                # What was complete before the answer broke off is as good as any other.
                if row.text is not None and length != captions.open:
                    row.status = "ok"
                else:
                    row.flags = ("truncated",)
                    row.error = row.error or f"the answer broke off (max_tokens {self.max_tokens})"
            if row.status == "ok":
                row.error = None
            rows.append(row)
        return rows


def answers(backend: Backend, requests: Sequence[Request]) -> list[Answer]:
    """One answer a request. Requests that raise are tried by halves, so that one pays for one."""
    if not requests:
        return []
    try:
        return backend.answer(requests)
    except Exception as error:  # the one place where a backend's fault becomes a row
        if isinstance(error, WinnowError) and not isinstance(error, MeasureError):
            raise  # a model or server is at fault, or answers got mixed up: the run must stop
        if len(requests) == 1:
            problem = f"{type(error).__name__}: {error}"
            return [Answer(requests[0].key, "error", error=problem)]
    middle = len(requests) // 2
    return [*answers(backend, requests[:middle]), *answers(backend, requests[middle:])]


def _inside(samples: Sequence[Sample], window: CaptionWindow, *, last: bool) -> list[Sample]:
    """The samples of a window. The last one is open: a clip may be timed a little short."""
    return [
        s for s in samples if window.start_s <= s.seconds and (last or s.seconds < window.end_s)
    ]


def _read(answer: Answer, lengths: Sequence[Length]) -> Captions:
    """The captions of an answer; where some are missing, what is wrong and what was said instead."""
    match answer.status:
        case "ok":
            captions = read_answer(answer.text, lengths)
        case "truncated":
            captions = read_truncated(answer.text, lengths)
        case _:
            captions = Captions({}, answer.error or answer.status)
    parts = [captions.problem or answer.error, answer.text if captions.problem else ""]
    problem = clean(": ".join(part for part in parts if part), MOST_ERROR)
    return replace(captions, problem=problem or None)
