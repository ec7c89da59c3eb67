"""Shot boundaries of one file, in one decode pass with flat memory.

Frames are shrunk to 48x27 as they are decoded. The change signal (operators/change.py) looks at
every window of 100 of them; TransNetV2 (operators/transnet.py) judges only the windows in which the
signal sees something that may be a cut or a dissolve. Where it looks, it sees exactly what it would
see if it looked everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import av
import numpy as np
from numpy.typing import NDArray

from winnow.operators.change import CONTEXT, STRIDE, WINDOW, Change
from winnow.operators.frames import (
    Span,
    decode,
    frame_seconds,
    open_video,
    small_size,
    upright,
)
from winnow.operators.transnet import transition_probabilities

_MARGIN = (WINDOW - STRIDE) // 2
_WIDTH, _HEIGHT = 48, 27
_SCENEDETECT_LONG_SIDE = 256
_ABRUPT = 0.7
_LASTING = 0.6  # above this similarity the picture before a "cut" is back after it: a flash


@dataclass(frozen=True, slots=True)
class TransNetV2Detector:
    """Hard cuts, dissolves and fades, by a network behind the change signal."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    kind: Literal["transnetv2"] = "transnetv2"
    threshold: float = 0.4
    """Probability of a transition, 0..1; 0.4 as in cosmos-curator."""
    everywhere: bool = False
    """Run the network on every frame, without asking the change signal."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, slots=True)
class AdaptiveDetector:
    """Hard cuts only, without a network: PySceneDetect's AdaptiveDetector on small frames."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    kind: Literal["adaptive"] = "adaptive"
    threshold: float = 3.0
    """How many times a frame's change must exceed that of its neighbours."""
    minimum_change: float = 15.0
    """Least change in HSV, 0..255."""
    minimum_frames: int = 15
    """Least distance between two cuts, in frames."""


@dataclass(frozen=True, slots=True)
class NoDetector:
    """The whole file is one shot."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    kind: Literal["none"] = "none"


Detector = TransNetV2Detector | AdaptiveDetector | NoDetector


@dataclass(frozen=True, slots=True)
class Transition:
    """A change of shot. Frames [start, end) belong to the transition itself.

    A hard cut between frame n - 1 and n has start = end = n. `probability` is the detector's, 1
    where it states none.
    """

    start: int
    end: int
    probability: float


@dataclass(slots=True)
class ShotScan:
    """What one pass over a file found."""

    frames: int
    """Decoded frames."""
    seconds: NDArray[np.float64]
    """(frames,) presentation times, the first frame at 0."""
    transitions: list[Transition]
    """In order, without overlap."""
    examined_frames: int
    """Frames that the network judged."""
    damaged_frames: int
    """Frames that the decoder had to patch up: the file is damaged inside."""
    shots: list[Span]
    """Spans between the transitions; the frames of transitions are in none."""


Listener = Callable[[int, av.VideoFrame], None]
"""Is shown each frame with its number."""


class _Watcher(Protocol):
    """Sees every frame once, then names the transitions."""

    examined_frames: int

    def see(self, frame: av.VideoFrame) -> None: ...

    def finish(self) -> list[Transition]: ...


def scan_shots(
    path: Path,
    detector: Detector,
    *,
    threads: int = 1,
    listener: Listener | None = None,
    motion_vectors: bool = False,
) -> ShotScan:
    """Decode a file once and find its shots. A `listener` is shown every frame of the same pass.

    A file whose container opens but holds no decodable frame gives a scan of 0 frames. A transition
    that leaves fewer than 3 frames at either end of the file is not reported, nor (by `transnetv2`)
    one after which the same picture comes back within 3 frames: a flash. Raises MediaError as
    `frames.decode` does, and ModelUnavailable.
    """
    watcher = _watcher(detector, threads)
    clock = _Clock(path)
    # Deblocking changes a 48x27 picture by a grey level and costs a fifth of decoding: a draft is
    # enough unless somebody else is looking.
    frames = decode(path, threads=threads, draft=listener is None, motion_vectors=motion_vectors)
    damaged = 0
    for number, frame in enumerate(frames):
        damaged += bool(frame.is_corrupt)
        clock.see(frame)
        watcher.see(frame)
        if listener is not None:
            listener(number, frame)
    seconds = clock.seconds()
    transitions = watcher.finish()
    return ShotScan(
        frames=len(seconds),
        seconds=seconds,
        transitions=transitions,
        examined_frames=watcher.examined_frames,
        damaged_frames=damaged,
        shots=_between(transitions, len(seconds)),
    )


def _watcher(detector: Detector, threads: int) -> _Watcher:
    match detector:
        case TransNetV2Detector():
            return _NetworkWatcher(detector, threads)
        case AdaptiveDetector():
            return _AdaptiveWatcher(detector)
        case NoDetector():
            return _Blind()


def _between(transitions: Iterable[Transition], frames: int) -> list[Span]:
    shots = []
    start = 0
    for transition in transitions:
        shots.append(Span(start, transition.start))
        start = transition.end
    shots.append(Span(start, frames))
    return [shot for shot in shots if len(shot) > 0]


class _Clock:
    """Collects presentation times; asks for the frame rate only where frames have no time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fps: float | None = None
        self._seconds: list[float] = []

    def see(self, frame: av.VideoFrame) -> None:
        if frame.pts is None and self._fps is None:
            container, stream = open_video(self._path)
            with container:
                self._fps = float(stream.average_rate or stream.guessed_rate or 0)
        self._seconds.append(frame_seconds(frame, len(self._seconds), self._fps or 0.0))

    def seconds(self) -> NDArray[np.float64]:
        seconds = np.array(self._seconds, np.float64)
        return seconds - seconds[:1]


class _Blind:
    examined_frames = 0

    def see(self, frame: av.VideoFrame) -> None:
        pass

    def finish(self) -> list[Transition]:
        return []


class _AdaptiveWatcher:
    def __init__(self, settings: AdaptiveDetector) -> None:
        from scenedetect import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector as PySceneDetect

        self.examined_frames = 0
        self._frames = 0
        # PySceneDetect only counts frames here; the rate is a label.
        self._zero = FrameTimecode(0, fps=25.0)
        self._detector = PySceneDetect(
            adaptive_threshold=settings.threshold,
            min_content_val=settings.minimum_change,
            min_scene_len=settings.minimum_frames,
        )
        self._cuts: list[int] = []

    def see(self, frame: av.VideoFrame) -> None:
        width, height = small_size(frame.width, frame.height, _SCENEDETECT_LONG_SIDE)
        image = frame.reformat(width=width, height=height, format="bgr24", interpolation="AREA")
        found = self._detector.process_frame(self._zero + self._frames, image.to_ndarray())
        self._cuts.extend(cut.frame_num for cut in found)
        self._frames += 1

    def finish(self) -> list[Transition]:
        return [Transition(cut, cut, 1.0) for cut in self._cuts]


class _NetworkWatcher:
    def __init__(self, settings: TransNetV2Detector, threads: int) -> None:
        self.examined_frames = 0
        self._settings = settings
        self._threads = threads
        self._windows = _Windows()
        self._centre: list[NDArray[np.float64]] = []
        self._member: list[NDArray[np.float64]] = []
        self._step: list[NDArray[np.float64]] = []
        self._across: list[NDArray[np.float64]] = []

    def see(self, frame: av.VideoFrame) -> None:
        for window in self._windows.add(_thumbnail(frame)):
            self._judge(window)

    def finish(self) -> list[Transition]:
        for window in self._windows.close():
            self._judge(window)
        if not self._centre:
            return []
        frames = self._windows.frames
        return _transitions(
            *(np.concatenate(p)[:frames] for p in (self._centre, self._member)),
            *(np.concatenate(p)[:frames] for p in (self._step, self._across)),
            threshold=self._settings.threshold,
        )

    def _judge(self, window: _Window) -> None:
        # Only real frames: a padded end would look like a freeze after a jump.
        change = Change(window.frames[window.real])
        step, across = np.zeros(WINDOW), np.ones(WINDOW)
        step[window.real], across[window.real] = change.step, change.across
        judged = slice(_MARGIN, _MARGIN + STRIDE)
        self._step.append(step[judged])
        self._across.append(across[judged])
        if self._settings.everywhere or self._ambiguous(change, window.real.start):
            centre, member = transition_probabilities(
                window.frames, device=self._settings.device, threads=self._threads
            )
            self.examined_frames += min(STRIDE, window.real.stop - _MARGIN)
        else:
            centre = member = np.zeros(STRIDE)
        self._centre.append(centre)
        self._member.append(member)

    def _ambiguous(self, change: Change, offset: int) -> bool:
        # A transition may be centred just outside the judged frames and reach into them.
        for found, reach in ((change.cuts(), CONTEXT), (change.dissolves(), _MARGIN // 2)):
            at = np.flatnonzero(found) + offset
            if np.any((at >= _MARGIN - reach) & (at < _MARGIN + STRIDE + reach)):
                return True
        return False


def _thumbnail(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """The frame as (27, 48, 3) RGB, upright."""
    lying = frame.rotation % 180 != 0
    width, height = (_HEIGHT, _WIDTH) if lying else (_WIDTH, _HEIGHT)
    small = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA")
    return upright(np.asarray(small.to_ndarray(), np.uint8), frame.rotation)


@dataclass(slots=True)
class _Window:
    frames: NDArray[np.uint8]
    """(100, 27, 48, 3)"""
    real: slice
    """Where the frames are the video's own and not padding."""


class _Windows:
    """Cuts a stream of thumbnails into windows of 100, 50 apart, the ends padded by repetition.

    Window k judges frames 50 k to 50 k + 49 and shows 25 frames on either side of them.
    """

    def __init__(self) -> None:
        self.frames = 0
        self._held: list[NDArray[np.uint8]] = []
        self._padded_front = 0

    def add(self, thumbnail: NDArray[np.uint8]) -> Iterator[_Window]:
        if self.frames == 0:
            self._held = [thumbnail] * _MARGIN
            self._padded_front = _MARGIN
        self._held.append(thumbnail)
        self.frames += 1
        if len(self._held) == WINDOW:
            yield self._take()

    def close(self) -> Iterator[_Window]:
        while len(self._held) > _MARGIN:
            yield self._take()

    def _take(self) -> _Window:
        missing = WINDOW - len(self._held)
        window = _Window(
            np.stack(self._held + [self._held[-1]] * missing),
            slice(self._padded_front, len(self._held)),
        )
        self._held = self._held[STRIDE:]
        self._padded_front = max(0, self._padded_front - STRIDE)
        return window


def _transitions(
    centre: NDArray[np.float64],
    member: NDArray[np.float64],
    step: NDArray[np.float64],
    across: NDArray[np.float64],
    *,
    threshold: float,
) -> list[Transition]:
    """Runs of frames above the threshold as transitions, cuts placed where the picture changes."""
    found: list[Transition] = []
    for first, last in _runs(centre > threshold):
        probability = float(centre[first : last + 1].max())
        # The network marks the last frame before a cut; the change is in the step to the next one.
        near = slice(max(1, first - 1), min(len(step), last + 4))
        cut = near.start + int(np.argmax(step[near])) if near.start < near.stop else first + 1
        # A flash is two large steps, there and back; a cut is one; a dissolve is many small ones.
        abrupt = np.sort(step[near])[-2:].sum() > _ABRUPT * step[near].sum()
        if abrupt and across[cut] > _LASTING:
            continue
        if step[cut] > 0.5 * step[near].sum():
            transition = Transition(cut, cut, probability)
        else:
            inside = member > threshold
            start, end = first, last + 1
            while start > 0 and inside[start - 1]:
                start -= 1
            while end < len(inside) and inside[end]:
                end += 1
            transition = Transition(start, end, probability)
        previous_end = found[-1].end if found else 0
        if transition.start < CONTEXT or transition.end > len(centre) - CONTEXT:
            continue
        if found and transition.start <= previous_end:
            merged = found.pop()
            transition = Transition(
                merged.start,
                max(merged.end, transition.end),
                max(merged.probability, transition.probability),
            )
        found.append(transition)
    return found


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last index of every run of True."""
    edges = np.diff(np.concatenate(([0], mask.astype(np.int8), [0])))
    starts, ends = np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist()
    return [(start, end - 1) for start, end in zip(starts, ends, strict=True)]
