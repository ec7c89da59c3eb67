"""The ledger: nothing that went in may be missing or counted twice when the run ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import duckdb

STATUSES = ("done", "copy", "failed", "incomplete")
VERDICTS = ("keep", "reject", "duplicate", "error")


@dataclass
class Ledger:
    """Counts of a run, read back from the lake."""

    sources_in: int
    sources: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    """Failed sources by error kind."""
    clips: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)
    media: int = 0
    """Kept clips that have a row in `dataset`."""
    expects_media: bool = True

    def problems(self) -> list[str]:
        """What does not add up, one sentence each; empty where it balances."""
        found = []
        if self.sources_in != sum(self.sources.values()):
            found.append(
                f"{self.sources_in} sources went in, {sum(self.sources.values())} have a status"
            )
        if self.clips != sum(self.verdicts.values()):
            found.append(f"there are {self.clips} clips and {sum(self.verdicts.values())} verdicts")
        strange = (set(self.sources) - set(STATUSES)) | (set(self.verdicts) - set(VERDICTS))
        if strange:
            found.append(f"unknown status or verdict: {', '.join(sorted(map(str, strange)))}")
        if self.expects_media and self.media != self.verdicts.get("keep", 0):
            found.append(
                f"{self.verdicts.get('keep', 0)} clips are kept, {self.media} are in the dataset"
            )
        return found

    @property
    def balanced(self) -> bool:
        return not self.problems()

    def lines(self) -> list[str]:
        """The ledger as two sums."""
        sources = " + ".join(f"{self.sources.get(s, 0)} {s}" for s in STATUSES)
        clips = " + ".join(f"{self.verdicts.get(v, 0)} {v}" for v in VERDICTS)
        return [f"sources {self.sources_in} = {sources}", f"clips {self.clips} = {clips}"]


def read_ledger(
    connection: duckdb.DuckDBPyConnection,
    run_id: str,
    policy: str,
    sources_in: int,
    *,
    expects_media: bool,
) -> Ledger:
    """Count what a run left in the lake. `connection` has the views of the lake."""
    # Raw tables on purpose: a row committed twice must show.
    mine = "attempt_id IN (SELECT attempt_id FROM raw_sources WHERE run_id = $run)"
    parameters = {"run": run_id}

    def counts(query: str, extra: dict[str, str] | None = None) -> dict[str, int]:
        rows = connection.execute(query, parameters | (extra or {})).fetchall()
        return {str(key): int(count) for key, count in rows}

    clips = connection.execute(
        f"SELECT count(*) FROM raw_clips WHERE {mine}", parameters
    ).fetchone()
    media = connection.execute(
        f"SELECT count(*) FROM dataset WHERE policy = $policy AND {mine}",
        parameters | {"policy": policy},
    ).fetchone()
    return Ledger(
        sources_in,
        counts("SELECT status, count(*) FROM raw_sources WHERE run_id = $run GROUP BY 1"),
        counts(
            "SELECT error_kind, count(*) FROM raw_sources "
            "WHERE run_id = $run AND status = 'failed' GROUP BY 1 ORDER BY 2 DESC, 1"
        ),
        clips[0] if clips else 0,
        counts(
            f"""SELECT v.verdict, count(*) FROM verdicts v
            WHERE v.policy = $policy AND v.clip_id IN (SELECT clip_id FROM raw_clips WHERE {mine})
            GROUP BY 1""",
            {"policy": policy},
        ),
        media[0] if media else 0,
        expects_media,
    )
