"""What models said of the lake as a whole: kinds of content, votes on questions, captions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from winnow.operators.vlm.caption_prompts import LENGTHS
from winnow.operators.vlm_filter import MAJORITY
from winnow.pipeline.report_values import share, short
from winnow.pipeline.report_views import CLIPS, Views

MOST_GENERATORS = 6
"""That have a column of their own."""
_NOT_TOLD = "not told"


@dataclass(frozen=True, slots=True)
class TypeCount:
    """The clips of one content type by verdict."""

    label: str
    clips: int
    verdicts: Mapping[str, int]
    probability: float | None
    """Median of what the classifier gave this label."""


@dataclass(frozen=True, slots=True)
class Flagged:
    """`clips` of the `decided` ones are flagged: most of their windows said yes."""

    clips: int
    decided: int

    @property
    def share(self) -> float | None:
        return share(self.clips, self.decided) if self.decided else None


@dataclass(frozen=True, slots=True)
class Question:
    """One question of the VLM filter: over all clips, and by generator in the order of `Votes`."""

    name: str
    all: Flagged
    by_generator: Sequence[Flagged]


@dataclass(frozen=True, slots=True)
class Votes:
    """What the VLM filter found."""

    statuses: Sequence[tuple[str, int]]
    """Clips by status, the most frequent first; `no answer` where the operator failed."""
    asked: int
    generators: Sequence[str]
    """Empty where there is one only."""
    questions: Sequence[Question]


@dataclass(frozen=True, slots=True)
class CaptionCount:
    """The captions of one length: by status and by flag, the most frequent first."""

    length: str
    captions: int
    statuses: Mapping[str, int]
    flags: Sequence[tuple[str, int]]
    words: float | None
    """Median of words of the whole ones."""


def content_types(lake: Views, limit: int = 40) -> tuple[list[TypeCount], int]:
    """The content types with most clips, and how many more there are."""
    if lake.columns["clips_decided"].get("content_type_label") != "VARCHAR":
        return [], 0
    probability = lake.column("clips_decided", "content_type_probability")
    found = lake.rows(
        f"SELECT content_type_label, verdict_shown, count(*) FROM {CLIPS} "
        "WHERE content_type_label IS NOT NULL GROUP BY ALL"
    )
    medians = dict(
        lake.rows(f"SELECT content_type_label, median({probability}) FROM {CLIPS} GROUP BY 1")
    )
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for label, verdict, count in found:
        counts[label][verdict] = count
    rows = [
        TypeCount(short(label, 60), sum(told.values()), told, medians.get(label))
        for label, told in counts.items()
    ]
    rows.sort(key=lambda row: (-row.clips, row.label))
    return rows[:limit], max(len(rows) - limit, 0)


def votes(lake: Views, limit: int = 60) -> Votes | None:
    """How often each question of the VLM filter was answered by yes; None where none was asked."""
    columns = lake.columns["clips_decided"]
    if "vlm_filter_status" not in columns or not columns.get("vlm_filter_votes", "").startswith(
        "MAP"
    ):
        return None
    error = lake.column("clips_decided", "vlm_filter_error")
    statuses = lake.rows(
        f"SELECT coalesce(vlm_filter_status, 'no answer'), count(*) FROM {CLIPS} "
        f"WHERE vlm_filter_status IS NOT NULL OR {error} IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, 1"
    )
    if not statuses:
        return None
    generator = lake.column("clips_decided", "generator")
    found = lake.rows(
        f"""
        SELECT generator, vote.key, count(*), count(*) FILTER (vote.value > {MAJORITY})
        FROM (
            SELECT coalesce({generator}, '{_NOT_TOLD}') AS generator,
                unnest(map_entries(vlm_filter_votes)) AS vote
            FROM clips_decided WHERE vlm_filter_votes IS NOT NULL
        ) GROUP BY ALL
        """
    )
    decided: Counter[str] = Counter()
    told: dict[str, dict[str, Flagged]] = defaultdict(dict)
    for name, question, clips, flagged in found:
        decided[name] += clips
        told[question][name] = Flagged(flagged, clips)
    order = sorted(decided, key=lambda name: (name == _NOT_TOLD, -decided[name], name))
    shown = order[:MOST_GENERATORS] if len(order) > 1 else []
    questions = [
        Question(
            short(name, 60),
            Flagged(sum(f.clips for f in by.values()), sum(f.decided for f in by.values())),
            [by.get(generator, Flagged(0, 0)) for generator in shown],
        )
        for name, by in told.items()
    ]
    questions.sort(key=lambda q: (-(q.all.share or 0), -q.all.decided, q.name))
    return Votes(
        statuses=[(short(status, 60), count) for status, count in statuses],
        asked=sum(count for _, count in statuses),
        generators=[short(name, 100) for name in shown],
        questions=questions[:limit],
    )


def captions(lake: Views) -> list[CaptionCount]:
    """Captions by length, from short to long; empty where there are none."""
    if not {"length", "status", "text", "flags"} <= lake.columns["captions"].keys():
        return []
    statuses: dict[str, dict[str, int]] = defaultdict(dict)
    for length, status, count in lake.rows(
        "SELECT length, status, count(*) FROM captions GROUP BY ALL"
    ):
        statuses[str(length)][str(status)] = count
    flags: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for length, flag, count in lake.rows(
        "SELECT length, flag, count(*) FROM (SELECT length, unnest(flags) AS flag FROM captions) "
        "GROUP BY ALL ORDER BY 3 DESC, 2"
    ):
        flags[str(length)].append((short(str(flag), 60), count))
    words = dict(
        lake.rows(
            "SELECT length, median(len(string_split_regex(trim(text), '\\s+'))) FROM captions "
            "WHERE status = 'ok' GROUP BY 1"
        )
    )
    order = [*(n for n in LENGTHS if n in statuses), *sorted(statuses.keys() - {*LENGTHS})]
    return [
        CaptionCount(
            short(length, 60),
            sum(statuses[length].values()),
            statuses[length],
            flags[length][:20],
            words.get(length),
        )
        for length in order
    ]
