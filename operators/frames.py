"""The frame reader: one decode pass over a file serves every operator of a stage.

Luma is taken from the decoded plane, without colour conversion; RGB is made only for the frames
that somebody sampled. Memory is bounded by the chunk. Frames come upright: the display matrix is
applied.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.sidedata.motionvectors import MotionVectors
from numpy.typing import NDArray
from PIL import Image

from winnow.operators.errors import MediaError
from winnow.operators.operator import Budget, FrameChunk, Needs, Sample, Sampling, Square

SMALL_LONG_SIDE = 160
CHUNK_FRAMES = 32
CHUNK_BYTES = 16 * 2**20
"""A chunk ends early when what it holds beside small luma (vectors, samples) grows beyond this."""

# A local file only: no playlist or reference inside an untrusted file may open anything else.
OPEN_OPTIONS = {"protocol_whitelist": "file"}

_HELD_BYTES = 96 * 2**20

# Planar formats whose first plane is luma, by bits; others go through a conversion to gray.
_LUMA_SHIFT = {
    "gray": 0, "nv12": 0, "yuv420p": 0, "yuvj420p": 0, "yuv422p": 0, "yuvj422p": 0, "yuv444p": 0,
    "yuvj444p": 0, "yuv410p": 0, "yuv411p": 0, "yuv440p": 0, "yuva420p": 0,
    "yuv420p10le": 2, "yuv422p10le": 2, "yuv444p10le": 2, "gray10le": 2,
    "yuv420p12le": 4, "yuv422p12le": 4, "yuv444p12le": 4,
}  # fmt: skip
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG
_LIMITED_BLACK: Any = 16  # OpenCV's stubs do not know of scalar operands
_LIMITED_STRETCH = 255 / 219


@dataclass(frozen=True, slots=True)
class Span:
    """Frames [start, end) of a source, end exclusive, counted in decoding (display) order."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


def small_size(width: int, height: int, long_side: int = SMALL_LONG_SIDE) -> tuple[int, int]:
    """(width, height) with the given long side and the aspect kept; never larger than the frame."""
    scale = min(1.0, long_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def luma_plane(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """The luma of a decoded frame as (h, w) uint8 as coded (limited range stays limited).

    A view into the decoder's buffer where the format allows: use it before the next frame.
    """
    return _to_8_bit(*_raw_luma(frame))


def _raw_luma(frame: av.VideoFrame) -> tuple[NDArray[Any], int]:
    shift = _LUMA_SHIFT.get(frame.format.name)
    if shift is None:
        frame = frame.reformat(format="gray")
        shift = 0
    plane = frame.planes[0]
    dtype = np.uint8 if shift == 0 else np.dtype("<u2")
    rows = np.frombuffer(memoryview(plane), dtype).reshape(
        -1, plane.line_size // np.dtype(dtype).itemsize
    )
    return rows[: frame.height, : frame.width], shift


def _to_8_bit(luma: NDArray[Any], shift: int) -> NDArray[np.uint8]:
    return luma if shift == 0 else (luma >> shift).astype(np.uint8)


def is_limited_range(frame: av.VideoFrame) -> bool:
    """True unless the frame says that it uses the full range (unspecified YUV means limited)."""
    name = frame.format.name
    return not (
        frame.color_range == _FULL_RANGE or name.startswith("yuvj") or name not in _LUMA_SHIFT
        or name == "gray"
    )  # fmt: skip


def full_range(luma: NDArray[np.uint8], frame: av.VideoFrame) -> NDArray[np.uint8]:
    """Luma stretched to 0..255; in memory of its own where it had to be stretched."""
    if not is_limited_range(frame):
        return luma
    # Cheaper than a lookup table; both steps saturate, so blacker than black stays 0.
    above_black = cv2.subtract(luma, _LIMITED_BLACK)
    return np.asarray(cv2.convertScaleAbs(above_black, alpha=_LIMITED_STRETCH), np.uint8)


def upright(image: NDArray[np.uint8], rotation: int) -> NDArray[np.uint8]:
    """Turn an image counter-clockwise by `rotation` degrees (a multiple of 90)."""
    turns = (rotation // 90) % 4
    return image if turns == 0 else np.ascontiguousarray(np.rot90(image, turns))


def shrink(image: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """An image area-averaged to `size` (width, height), which is no larger than the image.

    Halved while that does not undershoot, then scaled for the rest: OpenCV halves some thirty times
    faster than it scales by an odd factor, and photographs differ by less than a grey level. An odd
    last row or column is dropped when halving.
    """
    height, width = image.shape[:2]
    while width >= 2 * size[0] and height >= 2 * size[1]:
        width, height = width // 2, height // 2
        even = image[: height * 2, : width * 2]
        image = cv2.resize(even, (width, height), interpolation=cv2.INTER_AREA)
    if (width, height) == size:
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def small_luma(frame: av.VideoFrame, long_side: int = SMALL_LONG_SIDE) -> NDArray[np.uint8]:
    """Small full-range luma of a frame, upright, area-averaged."""
    raw, shift = _raw_luma(frame)
    small = shrink(raw, small_size(frame.width, frame.height, long_side))
    return upright(full_range(_to_8_bit(small, shift), frame), frame.rotation)


def sample_image(frame: av.VideoFrame, sampling: Sampling) -> NDArray[np.uint8]:
    """The frame as a `Sampling` asks for it, in memory of its own."""
    if sampling.fit is not None:
        full = np.asarray(frame.reformat(format="rgb24").to_ndarray(), np.uint8)
        return fitted(upright(full, frame.rotation), sampling.fit)
    upright_height = frame.width if frame.rotation % 180 else frame.height
    scale = 1.0 if sampling.height is None else min(1.0, sampling.height / upright_height)
    size = (max(1, round(frame.width * scale)), max(1, round(frame.height * scale)))
    if sampling.kind == "luma":
        plane = luma_plane(frame)
        luma = shrink(plane, size) if scale < 1.0 else plane
        image = upright(full_range(luma, frame), frame.rotation)
        # Neither stretched nor scaled nor turned, it is still the decoder's own buffer.
        return np.array(image) if np.may_share_memory(image, plane) else image
    rgb = frame.reformat(width=size[0], height=size[1], format="rgb24", interpolation="AREA")
    return upright(np.asarray(rgb.to_ndarray(), np.uint8), frame.rotation)


def fitted(rgb: NDArray[np.uint8], fit: Square | Budget) -> NDArray[np.uint8]:
    """An RGB frame (h, w, 3) in the size that a model asks for.

    Scaled by Pillow's antialiased bicubic, as the image processors of CLIP and Qwen-VL do.
    """
    height, width = rgb.shape[:2]
    if isinstance(fit, Budget):
        return _bicubic(rgb, *fit.size(width, height))
    if not fit.crop:
        return _bicubic(rgb, fit.side, fit.side)
    # As torchvision's Resize and CenterCrop: the long side is cut down, the margin rounded.
    long = fit.side * max(width, height) // min(width, height)
    size = (fit.side, long) if width <= height else (long, fit.side)
    scaled = _bicubic(rgb, *size)
    left, top = (round((side - fit.side) / 2) for side in size)
    return np.ascontiguousarray(scaled[top : top + fit.side, left : left + fit.side])


def _bicubic(rgb: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    if rgb.shape[:2] == (height, width):
        return rgb
    image = Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8)


def frame_vectors(frame: av.VideoFrame) -> NDArray[Any] | None:
    """The codec's motion vectors of a frame (FFmpeg's AVMotionVector), in memory of their own.

    None where the codec exports none. PyAV's array is a view that keeps the decoded frame alive.
    """
    side_data = frame.side_data.get("MOTION_VECTORS")
    if not isinstance(side_data, MotionVectors):
        return None
    vectors = side_data.to_ndarray()
    # Copied as bytes: NumPy copies records with padding field by field, some ten times slower.
    copied: NDArray[Any] = vectors.view(np.uint8).copy().view(vectors.dtype)
    return copied


def open_video(
    path: Path, *, threads: int = 1, motion_vectors: bool = False, draft: bool = False
) -> tuple[av.container.InputContainer, av.VideoStream]:
    """Open a local file for decoding its first video stream.

    `draft` trades exact pixels for speed (no deblocking): enough for a change signal.
    Raises MediaError (not_video, no_video, unreadable, vanished).
    """
    container = open_container(path)
    try:
        stream = video_stream(container)
    except MediaError:
        container.close()
        raise
    # With frame threads FFmpeg exports the vectors of a frame while other threads still decode the
    # frames it depends on: they differ from run to run. Slice threads and one thread are exact.
    stream.thread_type = "SLICE" if motion_vectors else "AUTO"
    stream.codec_context.thread_count = threads
    options: dict[str, str] = {}
    if motion_vectors:
        options["flags2"] = "+export_mvs"
    if draft:
        options["skip_loop_filter"] = "all"
    stream.codec_context.options = options
    return container, stream


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The first video stream that is not a cover picture. Raises MediaError (no_video)."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    raise MediaError("no_video", "the file has no video stream")


def open_container(path: Path) -> av.container.InputContainer:
    """Open a local file, with FFmpeg's errors turned into MediaError."""
    try:
        # The prefix keeps FFmpeg from reading a protocol into a name such as "data:x.mp4".
        return av.open(f"file:{path}", options=OPEN_OPTIONS, metadata_errors="replace")
    except FileNotFoundError as error:
        raise MediaError("vanished", f"the file is no longer there: {path.name}") from error
    except PermissionError as error:
        raise MediaError("unreadable", "no permission to read the file") from error
    except av.error.FFmpegError as error:
        raise MediaError(
            "not_video", f"not a video that FFmpeg can open: {error.strerror}"
        ) from error


def decode(path: Path, *, threads: int = 1, motion_vectors: bool = False, draft: bool = False
           ) -> Iterator[av.VideoFrame]:  # fmt: skip
    """Decode the first video stream in display order. Raises MediaError (corrupt, ...)."""
    container, stream = open_video(
        path, threads=threads, motion_vectors=motion_vectors, draft=draft
    )
    with container:
        try:
            held = 0
            for frame in container.decode(stream):
                yield frame
                # A frame whose side data was looked at refers to itself (PyAV 18): only the cycle
                # collector frees its megabytes, and left alone it comes hundreds of frames later.
                held += frame.width * frame.height * 3 // 2
                if motion_vectors and held > _HELD_BYTES:
                    gc.collect()
                    held = 0
        except av.error.FFmpegError as error:
            raise MediaError("corrupt", f"decoding failed: {error.strerror}") from error


class ClipFrames:
    """Collects the frames of one span into chunks, as `Needs` asks."""

    def __init__(self, span: Span, fps: float, needs: Needs) -> None:
        self.span = span
        self._needs = needs
        self._wanted = {
            sampling: frozenset(sampling.indices(len(span), fps).tolist())
            for sampling in needs.samples
        }
        self._origin: float | None = None
        self._next = 0
        self._clear()

    def _clear(self) -> None:
        self._first = self._next
        self._seconds: list[float] = []
        self._pictures: list[int] = []
        self._luma: list[NDArray[np.uint8]] = []
        self._vectors: list[NDArray[Any] | None] = []
        self._samples: dict[Sampling, list[Sample]] = {s: [] for s in self._wanted}
        self._bytes = 0

    def add(self, frame: av.VideoFrame, seconds: float) -> None:
        """Take the next frame of the span; `seconds` is its time in the source."""
        if self._origin is None:
            self._origin = seconds
        relative = seconds - self._origin
        self._seconds.append(relative)
        self._pictures.append(int(frame.pict_type))
        if self._needs.luma:
            self._luma.append(small_luma(frame))
        if self._needs.motion_vectors:
            vectors = frame_vectors(frame)
            self._vectors.append(vectors)
            self._bytes += 0 if vectors is None else vectors.nbytes
        for sampling, wanted in self._wanted.items():
            if self._next in wanted:
                image = sample_image(frame, sampling)
                self._samples[sampling].append(Sample(self._next, relative, image))
                self._bytes += image.nbytes
        self._next += 1

    @property
    def full(self) -> bool:
        return len(self._seconds) >= CHUNK_FRAMES or self._bytes >= CHUNK_BYTES

    @property
    def pending(self) -> bool:
        return bool(self._seconds)

    @property
    def frames(self) -> int:
        """Frames taken so far."""
        return self._next

    def take(self) -> FrameChunk:
        """The collected frames; the collection starts anew."""
        chunk = FrameChunk(
            first=self._first,
            seconds=np.array(self._seconds),
            pictures=np.array(self._pictures, np.int8),
            luma=np.stack(self._luma) if self._needs.luma else None,
            vectors=self._vectors if self._needs.motion_vectors else None,
            samples=self._samples,
        )
        self._clear()
        return chunk


class SpanReader:
    """Hands every span of one decode pass its frames, chunk by chunk.

    `spans` are sorted and do not overlap. `receive(k, chunk)` gets the chunks of span k in order.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        fps: float,
        needs: Needs,
        receive: Callable[[int, FrameChunk], None],
    ) -> None:
        self._collectors = [ClipFrames(span, fps, needs) for span in spans]
        self._fps = fps
        self._receive = receive
        self._current = 0

    @property
    def done(self) -> bool:
        """Every span has all its frames."""
        return self._current == len(self._collectors)

    def see(self, number: int, frame: av.VideoFrame) -> None:
        """Take the next frame of the file; `number` counts from its first."""
        if self.done or number < self._collectors[self._current].span.start:
            return
        collector = self._collectors[self._current]
        collector.add(frame, frame_seconds(frame, number, self._fps))
        last = number + 1 == collector.span.end
        if collector.full or last:
            self._receive(self._current, collector.take())
        self._current += last

    def close(self) -> list[int]:
        """Hand out what is left. Returns the number of frames that each span received."""
        for k, collector in enumerate(self._collectors):
            if collector.pending:
                self._receive(k, collector.take())
        return [collector.frames for collector in self._collectors]


def read_spans(
    path: Path,
    spans: Sequence[Span],
    fps: float,
    needs: Needs,
    receive: Callable[[int, FrameChunk], None],
    *,
    threads: int = 1,
) -> list[int]:
    """Decode a file once for a `SpanReader`.

    Returns the number of frames that each span received; fewer than its length means that the file
    ended early. Raises MediaError.
    """
    reader = SpanReader(spans, fps, needs, receive)
    frames = decode(path, threads=threads, motion_vectors=needs.motion_vectors)
    for number, frame in enumerate(frames):
        if reader.done:
            break
        reader.see(number, frame)
    return reader.close()


def frame_seconds(frame: av.VideoFrame, number: int, fps: float) -> float:
    """Presentation time; where a container has none, the number over the frame rate."""
    if frame.pts is None or frame.time_base is None:
        return number / fps if fps > 0 else 0.0
    return float(Fraction(frame.pts) * frame.time_base)
