"""`winnow critic probe`: decodes videos, opens a critic and probes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from winnow.operators.critic.critic import Critic, Shown, show
from winnow.operators.critic.settings import CriticSettings
from winnow.operators.errors import ConfigError, MediaError
from winnow.operators.models import Models
from winnow.pipeline.critic.decoding import Decoders, Video
from winnow.pipeline.critic.probe import ProbeResult, Probes, probe


def run_probes(
    videos: Sequence[Video],
    probes: Probes,
    settings: CriticSettings,
    models: Models,
    *,
    seed: int = 0,
    decoders: int = 2,
    timeout_s: float = 120.0,
    report: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> tuple[ProbeResult, dict[str, str]]:
    """(result, why by id for the videos that cannot be decoded).

    All clips are held in memory: changes draw from the others. Raises ConfigError where none can be
    decoded, and ModelUnavailable.
    """
    shown: list[Shown] = []
    failures: dict[str, str] = {}
    with Decoders(min(decoders, len(videos)), timeout_s) as children:
        pending = [
            (v, children.submit(show, v.path, settings, v.example_id, None, v.caption))
            for v in videos
        ]
        for video, waiting in pending:
            try:
                shown.append(waiting.result())
            except MediaError as error:
                failures[video.example_id] = f"{error.kind}: {error}"
    if not shown:
        why = next(iter(failures.values()), "there are none")
        raise ConfigError(f"no video can be probed: {why}")
    critic = Critic.open(settings, models)
    try:
        return probe(critic, shown, probes, seed, report=report), failures
    finally:
        critic.close()
