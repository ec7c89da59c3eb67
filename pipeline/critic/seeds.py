"""Several videos of one prompt by one generator: what choosing by the critic's score is worth.

Best-of-N picks a video, so the figures are of the pick. The mean of a group's scores says something
about the prompt and nothing about a video: it stands apart and replaces no video's score.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from winnow.pipeline.critic.results import Line


def seeds(lines: Sequence[Line]) -> dict[str, Any] | None:
    """Of the groups with several videos; None where there are none.

    `truth_of_pick` is the truth of the video with the best score (the mean of equals), `truth_mean`
    what a pick at random gives, `truth_best` what could be had; all over the groups in which every
    video has a score, so that all three are of the same videos.
    """
    members: dict[tuple[str, str | None], list[Line]] = {}
    for line in lines:
        members.setdefault((line.group, line.generator), []).append(line)
    groups = [
        _group(name, generator, videos)
        for (name, generator), videos in members.items()
        if len(videos) > 1
    ]
    if not groups:
        return None
    whole = [group for group in groups if group["scored"] == group["videos"]]
    return {
        "groups": len(groups),
        "videos": sum(group["videos"] for group in groups),
        "groups_scored_wholly": len(whole),
        **{
            name: fmean(group[name] for group in whole) if whole else None
            for name in ("truth_mean", "truth_of_pick", "truth_best", "score_mean", "score_best")
        },
        "each": groups,
    }


def _group(name: str, generator: str | None, videos: Sequence[Line]) -> dict[str, Any]:
    scored = [(line.score, line) for line in videos if line.score is not None]
    best = max((score for score, _ in scored), default=None)
    picks = [line for score, line in scored if score == best]
    return {
        "group": name,
        "caption": videos[0].caption,
        "generator": generator,
        "videos": len(videos),
        "scored": len(scored),
        "score_mean": fmean(score for score, _ in scored) if scored else None,
        "score_best": best,
        "picked": [line.example_id for line in picks],
        "truth_mean": fmean(line.truth for line in videos),
        "truth_of_pick": fmean(line.truth for line in picks) if picks else None,
        "truth_best": max(line.truth for line in videos),
    }
