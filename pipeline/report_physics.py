"""What the physics critic said: of the clips that are shown, and of the lake by generator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from winnow.operators.critic.judgement import SCORES
from winnow.pipeline.report_charts import number_text
from winnow.pipeline.report_values import joined, number, short, word, words
from winnow.pipeline.report_views import CLIPS, TRACE, Views

COLUMNS = (
    "physics_score",
    *(f"physics_p{score}" for score in SCORES),
    "physics_argmax",
    "physics_entropy",
    "physics_leaked",
    "physics_status",
    "physics_mode",
    "physics_direct_score",
    "physics_samples",
    TRACE,
    "physics_notes",
    "physics_windows",
    "physics_worst_window_start_s",
    "physics_fps",
    "physics_frames",
    "physics_pixels",
    "physics_prompt",
    "physics_model",
    "physics_error",
)
"""Of a clip; some may be missing, and each may be NULL."""

MOST_GENERATORS = 12
"""That have a row of their own."""
_NOT_TOLD = "not told"
# The critic keeps as many characters; more was written by something else.
_LONGEST_TRACE = 8000
_LONGEST_NOTE = 500
_MOST_SAMPLES = 32


class Bar(NamedTuple):
    """The probability of one score; `height` is 0 where it is not known."""

    score: int
    probability: float | None
    height: float


@dataclass(frozen=True, slots=True)
class ShownJudgement:
    """What the critic said of one clip; None and empty for what is not known."""

    score: float | None
    odds: Sequence[Bar]
    argmax: int | None
    entropy: float | None
    leaked: float | None
    status: str
    error: str
    mode: str
    direct_score: float | None
    samples: Sequence[int | None]
    """None in the place of one without a score."""
    windows: int | None
    worst_start_s: float | None
    notes: Sequence[str]
    trace: str
    shown: str
    """Frames in words."""
    asked: str
    """Model and rubric."""

    @property
    def place(self) -> float | None:
        """Where the score lies under the five bars, 0 at their left and 1 at their right end."""
        if self.score is None or not SCORES[0] <= self.score <= SCORES[-1]:
            return None
        return (self.score - SCORES[0] + 0.5) / len(SCORES)


def judgement(values: Mapping[str, Any]) -> ShownJudgement | None:
    """From the columns of one clip; None where the critic did not run."""
    get = values.get
    probabilities = [number(get(f"physics_p{score}")) for score in SCORES]
    known = any(p is not None for p in probabilities)
    score = number(get("physics_score"))
    status, error = word(get("physics_status")), word(get("physics_error"), 300)
    if score is None and not known and not status and not error:
        return None
    samples = get("physics_samples")
    return ShownJudgement(
        score=score,
        odds=[
            Bar(s, p, min(max(p or 0.0, 0.0), 1.0))
            for s, p in zip(SCORES, probabilities, strict=True)
            if known
        ],
        argmax=_whole(get("physics_argmax")),
        entropy=number(get("physics_entropy")),
        leaked=number(get("physics_leaked")),
        status=status,
        error=error,
        mode=word(get("physics_mode")),
        direct_score=number(get("physics_direct_score")),
        samples=[_whole(s) for s in samples[:_MOST_SAMPLES]] if isinstance(samples, list) else (),
        windows=_whole(get("physics_windows")),
        worst_start_s=number(get("physics_worst_window_start_s")),
        notes=words(get("physics_notes"), _LONGEST_NOTE),
        trace=word(get(TRACE), _LONGEST_TRACE),
        shown=_shown(get("physics_frames"), get("physics_fps"), get("physics_pixels")),
        asked=joined(get("physics_model"), get("physics_prompt")),
    )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _shown(frames: Any, fps: Any, pixels: Any) -> str:
    parts = [(frames, "{} frames"), (fps, "{} a second"), (pixels, "at most {} pixels each")]
    told = [(number(value), text) for value, text in parts]
    return ", ".join(text.format(number_text(value)) for value, text in told if value)


# --- the lake ------------------------------------------------------------------------------------


@dataclass(slots=True)
class ScoreCounts:
    """The clips of one generator, or of all."""

    name: str
    whole: bool = False
    """True for the row of all generators."""
    scored: int = 0
    total: float = 0.0
    """Of the scores."""
    counts: list[int] = field(default_factory=lambda: [0] * len(SCORES))
    """Clips by their likeliest score, 1 to 5."""
    without: int = 0
    """Clips without a score."""

    @property
    def mean(self) -> float | None:
        return self.total / self.scored if self.scored else None


@dataclass(frozen=True, slots=True)
class PhysicsScores:
    """The critic's scores of a lake."""

    rows: Sequence[ScoreCounts]
    """All clips first; then by generator, where there are several."""
    generators_left: int
    statuses: Sequence[tuple[str, int]]
    """Clips by status, the most frequent first; `no answer` where the operator failed."""
    asked: int
    scale: Sequence[int] = SCORES


def physics_scores(lake: Views) -> PhysicsScores | None:
    """How the scores spread over the generators; None where the critic saw no clip."""
    if not {"physics_status", "physics_score"} & lake.columns["clips"].keys():
        return None

    def column(name: str, kind: str) -> str:
        return f"TRY_CAST({lake.column('clips_decided', name)} AS {kind})"

    found = lake.rows(
        f"""
        SELECT generator, status, count(*), count(score), coalesce(sum(score), 0),
            {", ".join(f"count(*) FILTER (argmax = {score})" for score in SCORES)}
        FROM (
            SELECT generator, argmax, if(isfinite(score), score, NULL) AS score,
                CASE WHEN status IS NOT NULL THEN status WHEN failed THEN 'no answer'
                    WHEN score IS NOT NULL THEN '{_NOT_TOLD}' END AS status
            FROM (
                SELECT coalesce({column("generator", "VARCHAR")}, '{_NOT_TOLD}') AS generator,
                    {column("physics_score", "DOUBLE")} AS score,
                    {column("physics_argmax", "INTEGER")} AS argmax,
                    {column("physics_status", "VARCHAR")} AS status,
                    {column("physics_error", "VARCHAR")} IS NOT NULL AS failed
                FROM {CLIPS}
            )
        ) WHERE status IS NOT NULL GROUP BY generator, status
        """
    )
    if not found:
        return None
    every = ScoreCounts("all", whole=True)
    by_generator: dict[str, ScoreCounts] = {}
    statuses: Counter[str] = Counter()
    for name, status, clips, scored, total, *counts in found:
        statuses[status] += clips
        own = by_generator.setdefault(name, ScoreCounts(short(name, 100)))
        for row in (every, own):
            row.scored += scored
            row.total += total
            row.without += clips - scored
            row.counts = [a + b for a, b in zip(row.counts, counts, strict=True)]
    order = sorted(
        by_generator,
        key=lambda name: (name == _NOT_TOLD, -by_generator[name].scored, name),
    )
    several = [by_generator[name] for name in order] if len(order) > 1 else []
    return PhysicsScores(
        rows=[every, *several[:MOST_GENERATORS]],
        generators_left=max(len(several) - MOST_GENERATORS, 0),
        statuses=[
            (short(status, 60), count)
            for status, count in sorted(statuses.items(), key=lambda told: (-told[1], told[0]))
        ],
        asked=statuses.total(),
    )
