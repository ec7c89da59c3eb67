"""What a media file is: container, codec, sizes, clock, frame count, and whether it is all there.

The facts come from the packets that the file really holds, not from what its header declares; only
the first picture is decoded. Files are untrusted: whatever the bytes, the only exception is
MediaError. Which bytes count as a video is decided here, once, by the list of containers: files
that point at other files (playlists, concat scripts) and still images are not videos. A GIF is one,
animated or not, and so is a video of a single frame.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
from av.video.reformatter import ColorTrc
from numpy.typing import NDArray

from winnow.operators.containers import check_whole, family_of
from winnow.operators.errors import MediaError
from winnow.operators.frames import OPEN_OPTIONS, video_stream

# The audio containers are here so that they are called `no_video` and not `not_video`.
_CONTAINERS = (
    "mov", "matroska", "avi", "flv", "mpegts", "mpeg", "ogg", "asf", "ivf", "nut", "mxf", "gif",
    "yuv4mpegpipe", "wav", "flac", "mp3", "aac",
)  # fmt: skip
_MAX_PICTURE = 2**28
"""Pixels of a picture that is decoded at all, where no limit is set: about 16k by 16k."""
_FIRST_PICTURE_PACKETS = 300
_RANGES = {1: "limited", 2: "full"}
_TRANSFERS = {int(t): t.name.lower() for t in ColorTrc if t is not ColorTrc.UNSPECIFIED}
# PyAV raises these for bytes that make no sense, beside FFmpeg's own errors.
_NONSENSE = (av.error.FFmpegError, ValueError, ArithmeticError, LookupError, MemoryError, TypeError)


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """Facts about the first video stream of a file. Sizes are in pixels, times in seconds."""

    container: str
    """mp4, mov, webm, matroska, or FFmpeg's name of the format."""
    codec: str
    profile: str | None
    pixel_format: str
    bit_depth: int
    width: int
    """Of the upright picture."""
    height: int
    coded_width: int
    """As the codec stores it: before cropping to the picture and before rotation."""
    coded_height: int
    rotation: int
    """Degrees counter-clockwise from the decoded to the upright picture: 0, 90, 180 or 270."""
    sample_aspect_ratio: float
    """Width over height of one pixel of the upright picture; 1 where the file does not say."""
    frame_rate: str
    """Exact, as a fraction: "24000/1001", "25". The mean rate where it varies."""
    fps: float
    variable_frame_rate: bool
    """Intervals between pictures differ by more than the rounding of the container's clock."""
    duration_s: float
    """From the first picture to the end of the last."""
    frames: int
    """Pictures to show: packets, without those that an edit list or the codec hides."""
    keyframes: int
    start_s: float
    """The first picture's time after the container's start (later than 0 where audio leads)."""
    bit_rate: float
    """Of the video stream's packets, in bits per second."""
    has_audio: bool
    audio_codec: str | None
    color_range: str | None
    """limited, full, or None where the file does not say."""
    transfer: str | None
    """Transfer characteristics as FFmpeg names them (bt709, smpte2084, ...)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a file may be; None is no limit."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    max_bytes: int | None = None
    max_pixels: int | None = None
    """Width times height of one picture."""
    max_duration_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_duration_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, or null for no limit; it is {value}")


def check(info: MediaInfo | None, size: int, limits: Limits) -> None:
    """Raise MediaError (too_large, too_many_pixels, too_long) for what is beyond the limits.

    `size` is the file's in bytes; `info` is None while only that is known.
    """
    if limits.max_bytes is not None and size > limits.max_bytes:
        raise MediaError("too_large", f"{size} bytes; the limit is {limits.max_bytes}")
    if info is None:
        return
    _check_pixels(info.width, info.height, limits.max_pixels)
    if limits.max_duration_s is not None and info.duration_s > limits.max_duration_s:
        raise MediaError(
            "too_long", f"{info.duration_s:.1f} s long; the limit is {limits.max_duration_s:g} s"
        )


def _check_pixels(width: int, height: int, most: int | None) -> None:
    if most is not None and width * height > most:
        raise MediaError("too_many_pixels", f"{width}x{height} pixels; the limit is {most}")


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits, streamed. Raises MediaError."""
    with _reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def probe(path: Path, limits: Limits | None = None) -> MediaInfo:
    """What a local file is, from one pass over its packets.

    `limits` keeps a picture of too many pixels from being decoded at all; call `check` afterwards.
    Raises MediaError: empty, not_video, no_video, truncated (the file ends before its content
    does), corrupt, too_large, too_many_pixels, vanished, unreadable.
    """
    limits = limits or Limits()
    with _reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        check(None, size, limits)
        if size == 0:
            raise MediaError("empty", "the file has no bytes")
        family = family_of(file)
        check_whole(family, file, size)
    try:
        with _open(path, family) as container:
            return _probe(container, family, limits.max_pixels or _MAX_PICTURE)
    except _NONSENSE as error:
        raise MediaError("corrupt", f"reading failed: {_reason(error)}") from error


def packet_sizes(path: Path) -> list[int]:
    """Bytes of each packet of the first video stream in file order: a fingerprint of a stream
    that survives a change of container. Raises MediaError."""
    with _reading(path), path.open("rb") as file:
        family = family_of(file)
    try:
        with _open(path, family) as container:
            return [
                packet.size for packet in container.demux(video_stream(container)) if packet.size
            ]
    except _NONSENSE as error:
        raise MediaError("corrupt", f"reading failed: {_reason(error)}") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise MediaError("vanished", f"the file is no longer there: {path.name}") from error
    except OSError as error:
        raise MediaError("unreadable", f"the file cannot be read: {error.strerror}") from error


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _open(path: Path, family: str | None) -> av.container.InputContainer:
    options = {**OPEN_OPTIONS, "format_whitelist": ",".join(_CONTAINERS)}
    try:
        # The prefix keeps FFmpeg from reading a protocol into a name such as "data:x.mp4".
        return av.open(f"file:{path}", options=options, metadata_errors="replace")
    except _NONSENSE as error:
        # FFmpeg also says "no such file" and "not permitted" of what it finds inside a file.
        if not path.exists():
            raise MediaError("vanished", f"the file is no longer there: {path.name}") from error
        if family is not None:
            raise MediaError("corrupt", f"a damaged {family} file: {_reason(error)}") from error
        raise MediaError("not_video", "not a video in any container that is read here") from error


# ---------------------------------------------------------------------------------------- packets


class _Packets:
    """What the packets of one video stream say, gathered in a single pass."""

    def __init__(self) -> None:
        self.presentation = array("q")
        self.decoding = array("q")
        self.shown = 0
        self.read = 0
        self.keyframes = 0
        self.bytes = 0
        self.last: tuple[int, int] = (-(2**63), 0)
        """Time and duration of the packet that is shown last."""
        self.cut = False
        """The latest packet is damaged: at the end of a file, it was to be longer."""

    def add(self, packet: av.Packet[av.VideoStream], hides: bool) -> None:
        self.read += 1
        self.bytes += packet.size
        self.cut = packet.is_corrupt
        if packet.is_discard or hides:
            return
        self.shown += 1
        self.keyframes += packet.is_keyframe
        if packet.pts is not None:
            self.presentation.append(packet.pts)
        if packet.dts is not None:
            self.decoding.append(packet.dts)
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None:
            self.last = max(self.last, (time, packet.duration or 0))

    @property
    def times(self) -> NDArray[np.int64]:
        """Times of the pictures in order, in ticks; empty where the container has none.

        AVI stores no presentation times: decoding times are as many and as far apart.
        """
        for times in (self.presentation, self.decoding):
            if len(times) == self.shown:
                return np.sort(np.frombuffer(times, np.int64)) if times else np.zeros(0, np.int64)
        return np.zeros(0, np.int64)


def _probe(container: av.container.InputContainer, family: str | None, most: int) -> MediaInfo:
    stream = video_stream(container)
    codec = stream.codec_context
    if codec is None:
        raise MediaError("corrupt", "no decoder for the video stream")
    _check_pixels(codec.width, codec.height, most)
    codec.thread_count = 1
    codec.options = {"max_pixels": str(most)}
    packets = _Packets()
    picture: av.VideoFrame | None = None
    for packet in container.demux(stream):
        if picture is None and packets.read < _FIRST_PICTURE_PACKETS:
            drain = packets.shown == 0 and not packet.is_discard
            picture = _first_picture(packet, codec, drain=drain)
        if packet.size:
            packets.add(packet, codec.codec.canonical_name == "vp8" and _hidden_vp8(packet))
    indexed = len(stream.index_entries) if family in ("mp4", "mov") else 0
    # In a transport stream, packets are damaged by what was lost on the way, at the end or not.
    cut = packets.cut and container.format.name != "mpegts"
    if cut or packets.read < indexed:
        raise MediaError("truncated", f"the file ends after {packets.read} frames")
    if picture is None or packets.shown == 0:
        raise MediaError("corrupt", "no picture can be decoded")
    return _describe(container, family, stream, packets, picture)


def _first_picture(
    packet: av.Packet[av.VideoStream], codec: av.VideoCodecContext, *, drain: bool
) -> av.VideoFrame | None:
    """The picture that this packet completes. `drain` asks the decoder to give it at once, and not
    to wait for the next packets to learn their order: a third of the time, but only once."""
    try:
        frames = packet.decode()
        if drain and not frames:
            frames = codec.decode(None)
            codec.flush_buffers()
    except _NONSENSE:
        return None  # a later packet may do; if none does, the file is corrupt
    return next((frame for frame in frames if isinstance(frame, av.VideoFrame)), None)


def _hidden_vp8(packet: av.Packet[av.VideoStream]) -> bool:
    """Whether a VP8 packet is only a reference for others (RFC 6386, 9.1: show_frame)."""
    return not memoryview(packet)[0] >> 4 & 1


def _describe(
    container: av.container.InputContainer, family: str | None, stream: av.VideoStream,
    packets: _Packets, picture: av.VideoFrame,
) -> MediaInfo:  # fmt: skip
    codec = stream.codec_context
    rotation = picture.rotation // 90 % 4 * 90
    sideways = rotation % 180 == 90
    width, height = picture.width, picture.height
    aspect = stream.sample_aspect_ratio or codec.sample_aspect_ratio
    pixel_aspect = float(aspect) if aspect and aspect > 0 else 1.0
    clock = _read_clock(packets.times, packets.last[1], stream)
    start_s = 0.0
    if clock.first is not None and container.start_time is not None:
        start_s = float(clock.first - Fraction(container.start_time, av.time_base))
    if container.format.name == "flv" and container.duration:
        # It has no structure that would tell, but its header states the duration.
        declared = container.duration / av.time_base
        if declared - start_s - clock.duration_s > max(0.5, 0.1 * declared):
            raise MediaError(
                "truncated", f"{start_s + clock.duration_s:.1f} s of {declared:.1f} s are there"
            )
    audio = container.streams.audio
    full = picture.format.name.startswith("yuvj")
    return MediaInfo(
        container=family or container.format.name,
        codec=codec.codec.canonical_name,
        profile=codec.profile,
        pixel_format=picture.format.name,
        bit_depth=max((component.bits for component in picture.format.components), default=8),
        width=height if sideways else width,
        height=width if sideways else height,
        coded_width=codec.coded_width or width,
        coded_height=codec.coded_height or height,
        rotation=rotation,
        sample_aspect_ratio=1 / pixel_aspect if sideways else pixel_aspect,
        frame_rate=str(clock.rate),
        fps=float(clock.rate),
        variable_frame_rate=clock.variable,
        duration_s=clock.duration_s,
        frames=packets.shown,
        keyframes=packets.keyframes,
        start_s=start_s,
        bit_rate=packets.bytes * 8 / clock.duration_s if clock.duration_s > 0 else 0.0,
        has_audio=bool(audio),
        audio_codec=_codec_name(audio[0]) if audio else None,
        color_range="full" if full else _RANGES.get(picture.color_range),
        transfer=_TRANSFERS.get(picture.color_trc),
    )


def _codec_name(stream: av.AudioStream) -> str | None:
    return stream.codec_context.codec.canonical_name if stream.codec_context else None


# ------------------------------------------------------------------------------------------ clock


@dataclass(frozen=True, slots=True)
class _Clock:
    """The time of a stream's pictures: when the first is shown, how often, how long."""

    first: Fraction | None
    rate: Fraction
    variable: bool
    duration_s: float


def _read_clock(times: NDArray[np.int64], last_duration: int, stream: av.VideoStream) -> _Clock:
    """The clock of a stream whose pictures are shown at `times` (sorted, in ticks).

    `last_duration` is that of the last picture in ticks, 0 where the container does not say.
    Raises MediaError (corrupt) where neither the times nor the container give a rate.
    """
    tick = stream.time_base
    declared = [rate for rate in (stream.guessed_rate, stream.average_rate) if rate and rate > 0]
    if not tick or len(times) < 2 or times[0] == times[-1]:
        return _declared_clock(times, last_duration, tick or Fraction(1), declared)
    first, last = int(times[0]), int(times[-1])
    intervals = np.diff(times.astype(np.float64))
    step = float(np.median(intervals))
    # Rounding to the container's clock moves an interval by up to a tick; where a picture lasts
    # only a tick or so, the clock is the frame rate's own and nothing is rounded.
    rounding = 1.0 if step >= 4 else 0.0
    variable = bool(np.abs(intervals - step).max() > max(rounding, 0.1 * step))
    mean = (len(times) - 1) / ((last - first) * tick)
    rate = mean.limit_denominator(100_000) or mean
    if not variable:
        simple = [Fraction(round(mean)), Fraction(1000 * round(mean * 1001 / 1000), 1001)]
        fits = (r for r in [*declared, *simple] if _keeps_time(times, float(r * tick), rounding))
        rate = next(fits, rate)
    end = last + (last_duration if last_duration > 0 else round(step))
    return _Clock(first * tick, rate, variable, float((end - first) * tick))


def _declared_clock(
    times: NDArray[np.int64], last_duration: int, tick: Fraction, declared: list[Fraction]
) -> _Clock:
    """The clock where there are no two times to compare: one picture, or no times at all."""
    length = last_duration * tick if last_duration > 0 else None
    rates = declared + ([1 / length] if length else [])
    if not rates:
        raise MediaError("corrupt", "the pictures have no times and the file has no frame rate")
    pictures = max(1, len(times))
    duration = length if length and pictures == 1 else pictures / rates[0]
    first = int(times[0]) * tick if len(times) else None
    return _Clock(first, rates[0], False, float(duration))


def _keeps_time(times: NDArray[np.int64], per_tick: float, rounding: float) -> bool:
    """Whether pictures at an even `per_tick` rate, rounded to ticks, have these times."""
    if per_tick <= 0:
        return False
    drift = (times - times[0]).astype(np.float64) - np.arange(len(times)) / per_tick
    return bool(np.ptp(drift) <= rounding + 0.01)
