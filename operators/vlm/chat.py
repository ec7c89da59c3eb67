"""A request as the chat models of the Qwen-VL families read it: messages, and frames with times."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from winnow.operators.operator import Budget
from winnow.operators.vlm.messages import Request, Video

if TYPE_CHECKING:
    from winnow.operators.vlm.weights import Processor

TEMPORAL_PATCH = 2
"""Frames that these models merge into one."""


def chat_text(request: Request, processor: Processor) -> str:
    """The prompt, by the model's chat template: media before text, a system turn where given.

    Prompts and metadata of generations are part of the text and nobody's to trust: the model's
    control tokens in them are broken up, so that they neither open a turn nor pose as a video.
    """
    special = re.compile("|".join(map(re.escape, processor.special_tokens)) or "(?!)")

    def part(text: str) -> dict[str, str]:
        return {"type": "text", "text": special.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)}

    turns: list[dict[str, Any]] = []
    if request.system:
        turns.append({"role": "system", "content": [part(request.system)]})
    turns.append({"role": "user", "content": [{"type": "video"}, part(request.user)]})
    text: str = processor.call.apply_chat_template(turns, add_generation_prompt=True)
    return text


@dataclass(frozen=True, slots=True)
class Footage:
    """The frames of a window as a video processor takes them."""

    frames: NDArray[np.uint8]
    """(n, h, w, 3) RGB, n even, sides multiples of the model's patches."""
    seconds: list[float]
    """(n,) time of each frame."""
    fps: float
    """Rate of the frames, before the last was repeated; 1 for a single one."""

    @property
    def metadata(self) -> dict[str, Any]:
        """For transformers' VideoMetadata: frame numbers on a clock of one tick a second.

        The processors divide frame numbers by the rate of the source to find times. Times are what
        we have, and they also hold where the frames of the source lie unevenly.
        """
        return {
            "fps": 1.0,
            "frames_indices": list(self.seconds),
            "total_num_frames": len(self.seconds) / self.fps,
        }


def footage(video: Video, multiple: int) -> Footage:
    """Frames ready for the model, the last repeated where their number is odd.

    Sides that are multiples of `multiple` already are left alone, others are scaled to the nearest
    that cost no more pixels. Raises ValueError where the frames do not make a video.
    """
    if not len(video.frames) or len(video.frames) != len(video.seconds):
        raise ValueError(f"{len(video.frames)} frames with {len(video.seconds)} times")
    shapes = {np.shape(frame) for frame in video.frames}
    if len(shapes) > 1 or {np.asarray(frame).dtype for frame in video.frames} != {np.dtype("u1")}:
        raise ValueError("the frames of a window must be 8-bit and of one size")
    frames = np.stack(list(video.frames))
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames must be (h, w, 3), not {frames.shape[1:]}")
    height, width = frames.shape[1:3]
    wanted = Budget(max(height * width, multiple**2), multiple).size(width, height)
    if wanted != (width, height):
        images = [Image.fromarray(frame) for frame in frames]
        resized = [image.resize(wanted, Image.Resampling.BICUBIC) for image in images]
        frames = np.stack([np.asarray(image) for image in resized])
    repeated = -len(frames) % TEMPORAL_PATCH
    return Footage(
        np.concatenate([frames, *[frames[-1:]] * repeated]),
        [*video.seconds, *[video.seconds[-1]] * repeated],
        video.fps or 1.0,
    )
