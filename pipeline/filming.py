"""Frames into files: the encoder behind the sample videos, quiet and the same every time."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from winnow.pipeline.drawing import Image

SOUND_RATE = 44100

# A variable frame rate is written in milliseconds.
_TICKS_PER_SECOND = 1000

# One thread each: samples are encoded side by side, and the bytes must not depend on timing.
_ENCODER_OPTIONS: dict[str, dict[str, str]] = {
    # Without the macroblock tree: it reads memory that nobody wrote where the width in macroblocks is
    # odd, and the bytes then differ from one run to the next.
    "libx264": {"preset": "veryfast", "x264-params": "mbtree=0"},
    "libx265": {
        "preset": "superfast",
        "x265-params": "pools=none:frame-threads=1:log-level=error",
    },
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "b": "0"},
    "libsvtav1": {"preset": "10", "svtav1-params": "lp=1"},
}


@dataclass(frozen=True, slots=True)
class Coding:
    """How frames become a file.

    `quality` is the encoder's constant rate factor (lower is better). `index_first` puts the index
    of an mp4 before its media, so that a file cut short still opens. `rotation` is by how many
    degrees a player has to turn the coded frame counter-clockwise. `tone` adds a sound track.
    """

    encoder: str = "libx264"
    pixel_format: str | None = "yuv420p"
    quality: int = 20
    index_first: bool = True
    rotation: int = 0
    tone: bool = False

    def available(self) -> bool:
        """Whether the FFmpeg libraries of PyAV have the encoders for this."""
        try:
            formats = av.codec.Codec(self.encoder, "w").video_formats
            if self.tone:
                av.codec.Codec("aac", "w")
        except ValueError:  # av.codec.codec.UnknownCodecError is one
            return False
        known = {known.name for known in formats or ()}
        return self.pixel_format is None or self.pixel_format in known


H264 = Coding()


def encode(
    path: Path,
    frames: Iterable[Image],
    fps: float,
    coding: Coding = H264,
    times: NDArray[np.float64] | None = None,
) -> None:
    """Write RGB frames as a video: at `fps`, or each at its own moment of `times` (seconds).

    The container follows from the suffix. Raises av.error.FFmpegError where the encoder refuses.
    """
    # SVT-AV1 knows no other way to keep quiet: it reads this when it starts. 1 is errors only.
    os.environ.setdefault("SVT_LOG", "1")
    options = {"fflags": "+bitexact"}
    if coding.index_first and path.suffix == ".mp4":
        options["movflags"] = "+faststart"
    rate = Fraction(fps).limit_denominator(1001)
    tick = 1 / rate if times is None else Fraction(1, _TICKS_PER_SECOND)
    iterator = iter(frames)
    first = next(iterator)
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(coding.encoder, rate=rate)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = coding.pixel_format
        stream.codec_context.time_base = tick
        stream.codec_context.thread_count = 1
        quality = {"crf": str(coding.quality)}
        stream.codec_context.options = quality | _ENCODER_OPTIONS.get(coding.encoder, {})
        if coding.rotation:
            stream.set_display_rotation(coding.rotation)
        sound = container.add_stream("aac", rate=SOUND_RATE) if coding.tone else None
        number = 0
        for number, image in enumerate(itertools.chain([first], iterator)):
            picture = av.VideoFrame.from_ndarray(image, format="rgb24")
            moment = number if times is None else round(times[number] * _TICKS_PER_SECOND)
            picture.pts, picture.time_base = moment, tick
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        if sound is not None:
            mux_tone(container, sound, (number + 1) / fps)


def mux_tone(container: Any, stream: Any, seconds: float) -> None:
    """Encode a plain tone of 330 Hz into an audio stream of a container open for writing."""
    size = 1024
    for start in range(0, round(seconds * SOUND_RATE), size):
        moments = (start + np.arange(size)) / SOUND_RATE
        wave = (0.2 * np.sin(2 * np.pi * 330 * moments)).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, start, Fraction(1, SOUND_RATE)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def decoded(path: Path) -> Iterator[Image]:
    """The RGB frames of a video, in order."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")
