"""The committer: finished sources become rows, batch by batch, `sources` last."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from winnow.pipeline.lake import Lake, sequence_number
from winnow.pipeline.plan import Plan
from winnow.stages.records import Clip, Decision, Source

TABLES_IN_ORDER = ("clips", "embeddings", "captions", "verdicts", "dataset", "sources")


@dataclass
class Committer:
    """Writes the rows of one run. One committer a run."""

    lake: Lake
    plan: Plan
    run_id: str
    policy_hash: str
    _batch: list[Source] = field(default_factory=list)
    _number: int = 0
    _seq: int = 0
    _since: float = field(default_factory=time.monotonic)

    def consume(self, sources: Iterable[Source]) -> Iterator[Source]:
        """Commit sources as they come; each is given on once it is committed."""
        limits = self.plan.config.commit
        for source in sources:
            self._batch.append(source)
            age = time.monotonic() - self._since
            if len(self._batch) >= limits.sources or age >= limits.seconds:
                yield from self.flush()
        yield from self.flush()

    def flush(self) -> list[Source]:
        """Append what has gathered. After a crash in between, nothing of it is visible."""
        done, self._batch = self._batch, []
        self._since = time.monotonic()
        if not done:
            return []
        rows: dict[str, list[dict[str, Any]]] = {table: [] for table in TABLES_IN_ORDER}
        for source in done:
            self._add(source, rows)
        self._number += 1
        for table in TABLES_IN_ORDER:
            # The transaction makes a replayed batch recognisable in the table's log.
            self.lake.append(table, rows[table], (self.run_id, self._number))
        return done

    def _next_seq(self) -> int:
        self._seq = max(self._seq + 1, sequence_number())
        return self._seq

    def _add(self, source: Source, rows: dict[str, list[dict[str, Any]]]) -> None:
        rows["sources"].append(self._source_row(source, self._next_seq()))
        for clip in source.clips:
            rows["clips"].append(self._clip_row(source, clip))
            rows["embeddings"] += [
                {"clip_id": clip.clip_id, "attempt_id": source.attempt_id, "model": model,
                 "vector": vector.tolist()}
                for model, vector in clip.vectors.items()
            ]  # fmt: skip
            rows["captions"] += caption_rows(source, clip)
            rows["verdicts"].append(self.verdict_row(clip.clip_id, source, clip.decision))
            if clip.decision.verdict == "keep" and clip.media is not None:
                rows["dataset"].append(self.dataset_row(source, clip))
        for demotion in source.demotions:
            replaced = Decision(
                "duplicate", ("duplicate",), demotion.duplicate_of, demotion.similarity
            )
            rows["verdicts"].append(self.verdict_row(demotion.clip_id, source, replaced))

    def _source_row(self, source: Source, seq: int) -> dict[str, Any]:
        row: dict[str, Any] = {
            "source_id": source.source_id,
            "uri": source.uri,
            "status": source.status,
            "error_kind": source.error_kind,
            "error": source.error,
            "attempt_id": source.attempt_id,
            "run_id": self.run_id,
            "seq": seq,
            "committed_at": datetime.now(UTC),
            "copy_of": source.copy_of,
            "bytes": source.bytes,
            "modified": source.modified,
            "etag": source.etag,
            "seconds": list(source.seconds.items()),
        }
        if media := source.media:
            row |= {
                "container": media.container,
                "codec": media.codec,
                "pixel_format": media.pixel_format,
                "frames": media.frames,
                "fps": media.fps,
                "frame_rate": media.frame_rate,
                "variable_frame_rate": media.variable_frame_rate,
                "width": media.width,
                "height": media.height,
                "rotation": media.rotation,
                "duration_s": media.duration_s,
                "has_audio": media.has_audio,
            }
        if sidecar := source.sidecar:
            row |= {
                "prompt": sidecar.prompt,
                "negative_prompt": sidecar.negative_prompt,
                "seed": sidecar.seed,
                "generator": sidecar.generator,
                "group_key": sidecar.group_key,
                "input_uri": sidecar.input_path,
                "sidecar": sidecar.fields,
                "sidecar_problem": sidecar.problem,
            }
        return row

    def _clip_row(self, source: Source, clip: Clip) -> dict[str, Any]:
        return {
            "clip_id": clip.clip_id,
            "source_id": source.source_id,
            "attempt_id": source.attempt_id,
            "start_s": clip.start_s,
            "end_s": clip.end_s,
            "start_frame": clip.span.start,
            "end_frame": clip.span.end,
            "failure": clip.failure,
            "operator_versions": [
                (name, version)
                for name, version in self.plan.versions.items()
                if f"{name}_error" in clip.columns
            ],
            **clip.columns,
        }

    def verdict_row(self, clip_id: str, source: Source, decision: Decision) -> dict[str, Any]:
        return {
            "clip_id": clip_id,
            "attempt_id": source.attempt_id,
            "policy": self.plan.policy.name,
            "policy_hash": self.policy_hash,
            "verdict": decision.verdict,
            "reasons": list(decision.reasons),
            "duplicate_of": decision.duplicate_of,
            "similarity": decision.similarity,
            "seq": self._next_seq(),
            "decided_by": self.run_id,
        }

    def dataset_row(self, source: Source, clip: Clip) -> dict[str, Any]:
        assert clip.media is not None
        return {
            "clip_id": clip.clip_id,
            "source_id": source.source_id,
            "attempt_id": source.attempt_id,
            "policy": self.plan.policy.name,
            "media_uri": clip.media.uri,
            **clip.partition,
            "bytes": clip.media.bytes,
            "sha256": clip.media.sha256,
            "frames": clip.media.frames,
            "fps": clip.media.fps,
            "width": clip.media.width,
            "height": clip.media.height,
            "duration_s": clip.duration_s,
            "stream_copied": clip.media.copied,
            "prompt": source.sidecar.prompt if source.sidecar else None,
        }


def caption_rows(source: Source, clip: Clip) -> list[dict[str, Any]]:
    """The rows of a clip in `captions`."""
    return [
        {"clip_id": clip.clip_id, "attempt_id": source.attempt_id, **asdict(caption)}
        for caption in clip.captions
    ]
