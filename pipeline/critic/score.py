"""`winnow critic score`: a quick look at single files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from winnow.operators.critic.critic import Critic
from winnow.operators.critic.settings import CriticSettings
from winnow.operators.errors import MediaError
from winnow.operators.models import Models
from winnow.pipeline.critic.decoding import Decoders, Video, judge_ahead
from winnow.pipeline.critic.results import judged

BATCH = 8


def score(
    videos: Sequence[Path],
    settings: CriticSettings,
    models: Models,
    *,
    caption: str | None = None,
    decoders: int = 2,
    timeout_s: float = 120.0,
) -> list[dict[str, Any]]:
    """What the critic says of each file, in their order, as plain data.

    A file that cannot be decoded has status `decode` and says why. Raises ConfigError and
    ModelUnavailable.
    """
    found: dict[str, dict[str, Any]] = {}
    # Numbers, as the same file may be named twice.
    wanted = [Video(str(place), path, caption) for place, path in enumerate(videos)]
    critic = Critic.open(settings, models)
    try:
        with Decoders(min(decoders, len(wanted)), timeout_s) as children:
            for place, said in judge_ahead(wanted, critic, children, BATCH):
                if isinstance(said, MediaError):
                    found[place] = {"status": "decode", "error": f"{said.kind}: {said}"}
                else:
                    found[place] = judged(said)
    finally:
        critic.close()
    return [{"video": str(video.path), **found[video.example_id]} for video in wanted]
