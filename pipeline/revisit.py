"""Revisit: sources that the lake knows are taken up again, for more work on clips that it has.

What a stage needs of a source and its clips comes from the lake's rows: what the video was told to be
when it was split, not what stands beside it now.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from winnow.operators.frames import Span
from winnow.pipeline.config import CommitConfig
from winnow.pipeline.lake import Lake
from winnow.pipeline.run import share_prompts
from winnow.pipeline.views import connect
from winnow.stages.records import Clip, Source
from winnow.stages.sidecars import Sidecar

# The worker was at the clip, with the right content: that it went wrong is a result.
FAILED_AT_WORK = ("crashed", "timeout", "internal")


@dataclass(kw_only=True)
class SourceProblems:
    """What was wrong with sources that were taken up again."""

    problems: dict[str, int] = field(default_factory=dict)
    """Sources by what was wrong with them: vanished, changed, unreadable, crashed, ..."""
    examples: list[tuple[str, str]] = field(default_factory=list)
    """Some of them, each with the reason."""

    def tell(self, kind: str, place: str, reason: str) -> None:
        self.problems[kind] = self.problems.get(kind, 0) + 1
        if len(self.examples) < 10:
            self.examples.append((place, reason))

    def tell_source(self, source: Source) -> None:
        kind = source.error_kind or "unknown"
        self.tell(kind, source.uri, source.error or kind)


def unusable(source: Source) -> bool:
    """The source failed before anything could be done with its content."""
    return source.media is None and source.error_kind not in FAILED_AT_WORK


def known_sources(lake: Lake, clip_ids: Sequence[str], columns: Sequence[str]) -> list[Source]:
    """The sources of the clips, as the lake knows them, in the order of ingestion.

    Each has those of its clips that are asked for, once, with the given columns of view `clips`.
    """
    with connect(lake) as connection:
        connection.register("wanted", pa.table({"clip_id": pa.array(clip_ids, pa.string())}))
        more = "".join(f', c."{column}"' for column in columns)
        table = connection.sql(
            f"""SELECT s.uri, s.bytes, s.modified, s.etag, s.attempt_id, s.source_id, s.run_id,
                s.prompt, s.negative_prompt, s.seed, s.generator, s.group_key, s.input_uri,
                s.sidecar, s.sidecar_problem,
                c.clip_id, c.start_s, c.end_s, c.start_frame, c.end_frame{more}
            FROM clips c JOIN sources s USING (attempt_id)
            WHERE c.clip_id IN (SELECT clip_id FROM wanted)
            ORDER BY s.seq, s.attempt_id, c.start_frame, c.clip_id"""
        ).to_arrow_table()
        prompts = connection.execute(
            "SELECT DISTINCT run_id, prompt FROM sources WHERE prompt <> ''"
        ).fetchall()
    sources: dict[str, Source] = {}
    runs: dict[str, list[Source]] = {}
    seen: set[str] = set()
    for row in table.to_pylist():
        # Two attempts at the same content have the same clips: one of them is enough.
        if row["clip_id"] in seen:
            continue
        seen.add(row["clip_id"])
        source = sources.get(row["attempt_id"])
        if source is None:
            source = sources[row["attempt_id"]] = _source(len(sources), row)
            runs.setdefault(row["run_id"], []).append(source)
        source.clips.append(
            Clip(
                row["clip_id"],
                Span(row["start_frame"], row["end_frame"]),
                row["start_s"],
                row["end_s"],
                {column: row[column] for column in columns},
            )
        )
    # Compared with the prompts of the run that found them, as that run would have.
    for run_id, members in runs.items():
        others = [_prompt_only(prompt) for run, prompt in prompts if run == run_id]
        share_prompts([*members, *others])
    return list(sources.values())


def in_batches(stream: Iterable[Source], limits: CommitConfig) -> Iterator[list[Source]]:
    """Finished sources in batches to be committed."""
    batch: list[Source] = []
    since = time.monotonic()
    for source in stream:
        batch.append(source)
        if len(batch) >= limits.sources or time.monotonic() - since >= limits.seconds:
            yield batch
            batch, since = [], time.monotonic()
    if batch:
        yield batch


def _source(ordinal: int, row: Mapping[str, Any]) -> Source:
    return Source(
        ordinal=ordinal,
        uri=row["uri"],
        key=row["uri"],
        bytes=row["bytes"],
        modified=row["modified"],
        etag=row["etag"],
        attempt_id=row["attempt_id"],
        source_id=row["source_id"],
        sidecar=Sidecar(
            generator=row["generator"],
            prompt=row["prompt"],
            negative_prompt=row["negative_prompt"],
            seed=row["seed"],
            group_key=row["group_key"],
            input_path=row["input_uri"],
            fields=row["sidecar"],
            problem=row["sidecar_problem"],
        ),
    )


def _prompt_only(prompt: str) -> Source:
    """Stands for another generation of a run, of which only the prompt matters."""
    return Source(-1, "", "", 0, 0.0, None, "", sidecar=Sidecar(prompt=prompt))
