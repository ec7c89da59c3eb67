"""Everything the report says, read from the views of a lake: every figure is one SQL aggregate.

Nothing here grows with the number of clips: scores are binned in DuckDB, galleries are capped, and
only the clips that are shown are fetched as rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from winnow.pipeline.report_funnel import ReasonCount, Step, funnel, reasons
from winnow.pipeline.report_gallery import Gallery, details, galleries
from winnow.pipeline.report_groups import GeneratorCount, Partition, generators, partitions
from winnow.pipeline.report_ledger import (
    Books,
    ErrorGroup,
    books,
    operator_errors,
    policies,
    source_errors,
    verdicts,
)
from winnow.pipeline.report_physics import PhysicsScores, physics_scores
from winnow.pipeline.report_rules import Rulebook, RuleShown
from winnow.pipeline.report_runs import Run, runs, stages_of_sources
from winnow.pipeline.report_scores import Score, scores
from winnow.pipeline.report_views import Views
from winnow.pipeline.report_votes import (
    CaptionCount,
    TypeCount,
    Votes,
    captions,
    content_types,
    votes,
)


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything on the page."""

    runs: Sequence[Run]
    policies: Sequence[str]
    books: Books
    verdicts: Mapping[str, int]
    seconds: Mapping[str, float]
    clips: int
    funnel: Sequence[Step]
    reasons: Sequence[ReasonCount]
    judged: Sequence[Score]
    other: Sequence[Score]
    silent: Sequence[tuple[str, str]]
    galleries: Sequence[Gallery]
    generators: Sequence[GeneratorCount]
    generators_left: int
    partitions: Sequence[Partition]
    partitions_left: int
    content_types: Sequence[TypeCount]
    content_types_left: int
    votes: Votes | None
    physics: PhysicsScores | None
    captions: Sequence[CaptionCount]
    source_errors: Sequence[ErrorGroup]
    operator_errors: Sequence[ErrorGroup]
    speed: Run | None
    speed_of_lake: bool
    details: Mapping[str, Any]


def gather(
    connection: duckdb.DuckDBPyConnection, rules: Sequence[RuleShown], *, clips_per_gallery: int
) -> Facts:
    """Read all figures of the report.

    Raises LakeError where one of the views is missing.
    """
    lake = Views(connection)
    book = Rulebook(rules, lake.columns["clips"])
    with lake.clips_at_hand():
        all_runs = runs(lake)
        speed = next((run for run in all_runs if run.stages), None)
        of_lake = False
        if speed is None and (stages := stages_of_sources(lake)):
            speed, of_lake = Run("", "", "", "", "", None, None, stages=stages), True
        clips_by_verdict, seconds_by_verdict = verdicts(lake)
        judged, other, silent = scores(lake, book)
        shown = galleries(lake, book, clips_per_gallery)
        by_generator, generators_left = generators(lake)
        by_partition, partitions_left = partitions(lake)
        by_type, types_left = content_types(lake)
        return Facts(
            runs=all_runs,
            policies=policies(lake),
            books=books(lake, all_runs[0].sources_in if all_runs else None),
            verdicts=clips_by_verdict,
            seconds=seconds_by_verdict,
            clips=lake.number("SELECT count(*) FROM clips"),
            funnel=funnel(lake, book),
            reasons=reasons(lake, book),
            judged=judged,
            other=other,
            silent=silent,
            galleries=shown,
            generators=by_generator,
            generators_left=generators_left,
            partitions=by_partition,
            partitions_left=partitions_left,
            content_types=by_type,
            content_types_left=types_left,
            votes=votes(lake),
            physics=physics_scores(lake),
            captions=captions(lake),
            source_errors=source_errors(lake),
            operator_errors=operator_errors(lake),
            speed=speed,
            speed_of_lake=of_lake,
            details=details(lake, book, shown),
        )
