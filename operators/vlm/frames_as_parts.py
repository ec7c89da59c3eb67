"""Sampled frames as parts of a chat message, in the two forms that OpenAI-compatible servers take."""

from __future__ import annotations

import base64
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from winnow.operators.vlm.messages import Video

JPEG_QUALITY = 92


def content_parts(video: Video, form: Literal["images", "video"]) -> list[dict[str, Any]]:
    """The frames as content parts, to be put before the text of the question.

    `images`: before each frame a text part with its time, written as Qwen3-VL's own processor
    writes it. `video`: one part of JPEG frames, which vLLM does not sample again; it knows the
    times only from `video_settings`.
    """
    if not video.frames:
        return []
    if form == "video":
        frames = ",".join(_jpeg(frame) for frame in video.frames)
        url = f"data:video/jpeg;base64,{frames}"
        return [{"type": "video_url", "video_url": {"url": url}}]
    parts: list[dict[str, Any]] = []
    for frame, seconds in zip(video.frames, video.seconds, strict=True):
        url = f"data:image/jpeg;base64,{_jpeg(frame)}"
        parts.append({"type": "text", "text": f"<{seconds:.1f} seconds>"})
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def video_settings(video: Video) -> dict[str, Any]:
    """What vLLM must be told beside the form `video`: fields of the request body.

    `media_io_kwargs` says which frames of which clip these are, so that the times in the prompt are
    those of the clip (vLLM from PR 40133 on, April 2026; before that every request counted from 0).
    Without `num_frames` -1 vLLM would drop all frames after the 32nd.
    """
    if not video.frames:
        return {}
    media = {
        "num_frames": -1,
        "fps": video.source_fps,
        "frames_indices": [int(index) for index in video.indices],
        "total_num_frames": int(video.indices[-1]) + 1,
        "duration": (int(video.indices[-1]) + 1) / video.source_fps,
        "do_sample_frames": False,
    }
    processor: dict[str, Any] = {"do_sample_frames": False}
    if video.fps > 0:
        # Qwen2.5-VL has no times in its prompt: it takes the rate of the frames that it is shown.
        processor["fps"] = video.fps
    return {"media_io_kwargs": {"video": media}, "mm_processor_kwargs": processor}


def _jpeg(frame: NDArray[np.uint8]) -> str:
    try:
        _, data = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    except cv2.error as error:
        raise ValueError(f"a frame of {frame.shape} cannot be written as JPEG") from error
    return base64.b64encode(data.tobytes()).decode("ascii")
