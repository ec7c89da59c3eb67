"""What the tests of operators share: measuring a file or an array of small luma."""

from __future__ import annotations

import subprocess
from pathlib import Path

import av
import cv2
import imageio_ffmpeg
import numpy as np

from winnow.operators.frames import Span, read_spans
from winnow.operators.operator import ClipView, FrameChunk, Needs, Operator


def view_of(path: Path) -> ClipView:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        context = stream.codec_context
        fps = float(stream.average_rate)
        return ClipView("clip", frames, fps, context.width, context.height, context.name)


def measure(path: Path, *operators: Operator, span: Span | None = None, rotation: int = 0) -> dict:
    """The columns of operators over a whole file, or a span of it, in one pass."""
    view = view_of(path)
    span = span or Span(0, view.frames)
    view.frames = len(span)
    if rotation % 180:
        view.width, view.height = view.height, view.width
    view.coded_rotation = rotation
    needs = [operator.needs for operator in operators]
    union = Needs(
        luma=any(n.luma for n in needs),
        motion_vectors=any(n.motion_vectors for n in needs),
        samples=tuple(dict.fromkeys(s for n in needs for s in n.samples)),
    )
    measurements = [operator.start(view) for operator in operators]

    def receive(_, chunk):
        for measurement in measurements:
            measurement.update(chunk)

    read_spans(path, [span], view.fps, union, receive)
    columns: dict = {}
    for operator, measurement in zip(operators, measurements, strict=True):
        measured = measurement.columns()
        assert set(measured) == {column.name for column in operator.columns}
        columns |= measured
    return columns


def measure_luma(operator: Operator, luma: np.ndarray, fps: float = 24.0, chunk: int = 32) -> dict:
    """The columns of an operator over (n, h, w) small luma, fed chunk by chunk."""
    frames, height, width = luma.shape
    measurement = operator.start(ClipView("clip", frames, fps, width, height, "h264"))
    for first in range(0, frames, chunk):
        part = luma[first : first + chunk]
        seconds = (first + np.arange(len(part))) / fps
        measurement.update(FrameChunk(first, seconds, np.ones(len(part), np.int8), part.copy()))
    return measurement.columns()


def ffmpeg(*arguments: str | Path) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


def gray(luma: np.ndarray) -> np.ndarray:
    """An RGB image of the given luma."""
    return np.repeat(np.asarray(luma, np.uint8)[..., None], 3, axis=2)


def texture(seed: int, height: int, width: int, smooth: float = 2.0) -> np.ndarray:
    """(h, w) uint8 of even texture, contrast over the whole range."""
    noise = np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32)
    blurred = cv2.GaussianBlur(noise, (0, 0), smooth)
    return np.clip(128 + blurred / blurred.std() * 45, 0, 255).astype(np.uint8)
