"""Materialise: make the dataset of a policy whole, after `winnow refilter` kept clips without media.

A run encodes what its own policy keeps. A clip that only a later policy keeps is made here, from its
source, by the stages of the configuration that come after deciding: transcode, caption, shard. Its
caption rows go to the lake before its row in `dataset`, which is what makes it done: interrupted
anywhere, the same command goes on, and no clip is captioned twice.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import duckdb
import pyarrow as pa

from winnow.operators.errors import ConfigError, LedgerError
from winnow.operators.models import Models
from winnow.pipeline.commit import Committer, caption_rows
from winnow.pipeline.config import RunConfig
from winnow.pipeline.dataset_rows import share_media
from winnow.pipeline.engines.inline import run_inline
from winnow.pipeline.export_rows import policy_name
from winnow.pipeline.lake import Lake
from winnow.pipeline.models import check_present
from winnow.pipeline.plan import Placement, Plan
from winnow.pipeline.planning import construct, place
from winnow.pipeline.policy import Policy
from winnow.pipeline.refilter import latest_config
from winnow.pipeline.reopen import Reopen, SourceFiles
from winnow.pipeline.revisit import SourceProblems, in_batches, known_sources, unusable
from winnow.pipeline.roster import Roster
from winnow.pipeline.run import Engine, Progress
from winnow.pipeline.run_lock import Hold, hold_lake
from winnow.pipeline.storage import Storage
from winnow.pipeline.views import connect
from winnow.stages.records import Clip, Source

TABLES_IN_ORDER = ("captions", "verdicts", "dataset")
OUTCOMES = ("made", "unavailable", "failed")
MAKING = ("transcode", "caption", "shard")
"""The stages that come after deciding."""
# What transcoding and partitioning read of a clip, where the lake has it.
_COLUMNS = ("border_found", "border_x", "border_y", "border_width", "border_height",
            "content_type_label")  # fmt: skip
_GONE = ("vanished", "changed", "unreadable")


@dataclass
class MaterializeResult(SourceProblems):
    """What was made of a policy's dataset. `problems` counts sources, and clips that fail."""

    materialize_id: str
    policy: str
    kept: int = 0
    """Clips that the policy keeps."""
    present: int = 0
    """Of them, those that were in its dataset already."""
    shared: int = 0
    """Those that had media of another policy."""
    asked: int = 0
    """Those whose media were to be made now."""
    later: int = 0
    """Those beyond the limit."""
    sources: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    """made; unavailable: the source is gone, has changed or cannot be read; failed: the work on it
    failed. A clip that cannot be encoded has the verdict `error` then, as in a run."""
    captioned: int = 0
    """Clips that got captions."""
    without_type: int = 0
    """Clips made that were rejected before their content type was measured, as others' was: their
    partition is `unknown`."""
    dry_run: bool = False
    wall_s: float = 0.0

    @property
    def line(self) -> str:
        sums = " + ".join(f"{self.counts[outcome]} {outcome}" for outcome in OUTCOMES)
        return f"clips {self.asked} = {sums}"

    @property
    def useless(self) -> bool:
        """There were clips to make, and none could be."""
        return self.asked > 0 and not self.counts["made"] and not self.dry_run


def materialize(
    lake: Lake,
    policy: str,
    *,
    config: RunConfig | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    ray_address: str | None = None,
    progress: Progress | None = None,
    options: dict[str, str] | None = None,
    wait: bool = False,
) -> MaterializeResult:
    """Make the media of clips that a policy keeps and that have none; at most `limit` clips.

    `policy` is the name of verdicts that the lake has, or its file. The stages are those of `config`,
    by default of the lake's latest run. `options` are settings of the object store that holds the
    sources. Only one writes to a lake at a time: with `wait`, another one's end is waited for.

    Raises ConfigError, LakeError, LakeBusy, ModelUnavailable before anything is decoded, and
    LedgerError where the lake does not hold what was made.
    """
    lake.require()
    config = config or latest_config(lake)
    if config.stage("transcode") is None:
        raise ConfigError(
            f"the configuration {config.name!r} has no stage transcode, so it makes no media: give "
            "one that has with --config"
        )
    with connect(lake) as connection:
        name = policy_name(connection, policy)
    progress = progress or Progress()
    started = time.perf_counter()
    result = MaterializeResult(f"materialize-{uuid.uuid4().hex[:12]}", name, dry_run=dry_run)
    work = _Work(lake, config, result, options or {})
    if dry_run:
        work.select(limit)
    else:
        purpose = f"winnow materialize --policy {name}"
        with hold_lake(lake, purpose, wait=wait, told=progress.say) as hold:
            wanted = work.select(limit)
            work.carry_out(wanted, hold, ray_address, progress)
            _check_ledger(lake, result, wanted)
    result.wall_s = time.perf_counter() - started
    return result


@dataclass
class _Work:
    """One materialisation."""

    lake: Lake
    config: RunConfig
    result: MaterializeResult
    options: dict[str, str]
    _batches: int = 0

    def select(self, limit: int | None) -> list[str]:
        """The clips to make, in the order of ingestion. Media that are there already are taken."""
        result = self.result
        with connect(self.lake) as connection:
            kept = _kept(connection, result.policy)
            present = _in_dataset(connection, result.policy)
            elsewhere = {
                clip_id
                for (clip_id,) in connection.execute(
                    """SELECT DISTINCT clip_id FROM raw_dataset
                    WHERE attempt_id IN (SELECT attempt_id FROM raw_sources)"""
                ).fetchall()
            }
        clip_ids = kept["clip_id"].to_pylist()
        result.kept = len(clip_ids)
        result.present = sum(clip_id in present for clip_id in clip_ids)
        known = present | elsewhere
        missing = [clip_id for clip_id in clip_ids if clip_id not in known]
        result.shared = result.kept - result.present - len(missing)
        if result.shared and not self.result.dry_run:
            absent = pa.array([clip_id not in present for clip_id in clip_ids], pa.bool_())
            result.shared = share_media(self.lake, result.policy, kept.filter(absent))
        wanted = missing if limit is None else missing[:limit]
        result.asked, result.later = len(wanted), len(missing) - len(wanted)
        if self.result.dry_run:
            result.sources = len(known_sources(self.lake, wanted, ()))
        return wanted

    def carry_out(
        self, wanted: Sequence[str], hold: Hold, ray_address: str | None, progress: Progress
    ) -> None:
        if not wanted:
            return
        with connect(self.lake) as connection:
            there = {row[0] for row in connection.execute("DESCRIBE clips").fetchall()}
            captioned = {
                clip_id
                for (clip_id,) in connection.execute(
                    "SELECT DISTINCT clip_id FROM captions"
                ).fetchall()
            }
            ((hashed,),) = connection.execute(
                """SELECT coalesce(arg_max(policy_hash, seq), '') FROM raw_verdicts
                WHERE policy = ?""",
                [self.result.policy],
            ).fetchall()
        # An older lake gets the columns that this version writes.
        self.lake.create(())
        sources = known_sources(self.lake, wanted, [c for c in _COLUMNS if c in there])
        self.result.sources = len(sources)
        for source in sources:
            for clip in source.clips:
                clip.captioned = clip.clip_id in captioned
        # The clips as asked for: a source that fails comes back without them.
        asked = {source.ordinal: list(source.clips) for source in sources}
        plan = self._plan(captions=any(not c.captioned for s in sources for c in s.clips))
        committer = Committer(self.lake, plan, self.result.materialize_id, str(hashed))
        with ExitStack() as stack:
            engine: Engine = run_inline
            if self.config.engine == "ray":
                from winnow.pipeline.engines.ray import RayEngine

                ray = stack.enter_context(RayEngine(ray_address, len(plan.placements)))
                ray.require_gpus(plan)
                engine = ray.run
            if ray_address is None:
                check_present(Models.read(self.config.models), plan.needed_models)
            total, done = len(sources), 0
            progress.report(0, total, None)
            stream: Iterator[Source] = hold.guard(engine(plan, sources, Roster()))
            for batch in in_batches(stream, self.config.commit):
                self._commit(committer, batch, asked)
                for source in batch:
                    done += 1
                    progress.report(done, total, source)

    def _plan(self, *, captions: bool) -> Plan:
        """Reopen the sources, then what a run does with kept clips. No rule: these are decided."""
        files = SourceFiles(self.options)
        media = Storage.open(self.lake.media_uri, options=self.lake.options, create=True)
        models = Models.read(self.config.models)
        policy = Policy(name=self.result.policy, rules=())
        places: list[Placement] = [place(self.config.stage("ingest"), Reopen(files))]
        for stage in self.config.stages:
            if stage.stage in MAKING and (captions or stage.stage != "caption"):
                made = construct(stage, policy, files, media, self.lake, models)
                places.append(place(stage, made))
        return Plan(self.config, policy, tuple(places))

    def _commit(
        self, committer: Committer, batch: Sequence[Source], asked: Mapping[int, Sequence[Clip]]
    ) -> None:
        """Append a batch. Its rows bear the attempts of the sources, which committed long ago:
        what is appended shows. So the row in `dataset`, which ends the work on a clip, comes last."""
        rows: dict[str, list[dict[str, Any]]] = {table: [] for table in TABLES_IN_ORDER}
        counts = self.result.counts
        for source in batch:
            if source.status != "done":
                self.result.tell_source(source)
                gone = unusable(source) or source.error_kind in _GONE
                counts["unavailable" if gone else "failed"] += len(asked[source.ordinal])
                continue
            for clip in source.clips:
                rows["captions"] += caption_rows(source, clip)
                self.result.captioned += bool(clip.captions)
                if clip.decision.verdict == "keep" and clip.media is not None:
                    rows["dataset"].append(committer.dataset_row(source, clip))
                    self.result.without_type += clip.columns.get("content_type_label", "") is None
                    counts["made"] += 1
                else:
                    rows["verdicts"].append(
                        committer.verdict_row(clip.clip_id, source, clip.decision)
                    )
                    self._tell_clip(source, clip)
                    counts["failed"] += 1
        self._batches += 1
        for table in TABLES_IN_ORDER:
            self.lake.append(table, rows[table], (self.result.materialize_id, self._batches))

    def _tell_clip(self, source: Source, clip: Clip) -> None:
        stage, _, reason = (clip.failure or "internal: no stage made its media").partition(": ")
        place = f"{source.uri} from {clip.start_s:.2f} to {clip.end_s:.2f} s"
        self.result.tell(stage, place, reason)


def _kept(connection: duckdb.DuckDBPyConnection, policy: str) -> pa.Table:
    """clip_id and attempt_id of the clips that a policy keeps, once each, in order of ingestion."""
    return connection.sql(
        """SELECT clip_id, min(attempt_id) AS attempt_id FROM (
            SELECT c.clip_id, c.attempt_id, s.seq, c.start_frame
            FROM verdicts v JOIN clips c USING (clip_id) JOIN sources s ON s.attempt_id = c.attempt_id
            WHERE v.policy = $policy AND v.verdict = 'keep')
        GROUP BY clip_id ORDER BY min(seq), min(start_frame), clip_id""",
        params={"policy": policy},
    ).to_arrow_table()


def _in_dataset(connection: duckdb.DuckDBPyConnection, policy: str) -> set[str]:
    rows = connection.execute("SELECT clip_id FROM dataset WHERE policy = ?", [policy]).fetchall()
    return {clip_id for (clip_id,) in rows}


def _check_ledger(lake: Lake, result: MaterializeResult, wanted: Sequence[str]) -> None:
    """Every clip is counted once, and the lake holds what was made, once."""
    found = []
    if sum(result.counts.values()) != result.asked:
        found.append(f"{result.asked} clips were to be made, {result.line}")
    with connect(lake) as connection:
        connection.register("wanted", pa.table({"clip_id": pa.array(wanted, pa.string())}))
        parameters = {"policy": result.policy}
        made, clips = connection.execute(
            """SELECT count(*), count(DISTINCT clip_id) FROM dataset
            WHERE policy = $policy AND clip_id IN (SELECT clip_id FROM wanted)""",
            parameters,
        ).fetchall()[0]
        ((whole,),) = connection.execute(
            "SELECT count(DISTINCT clip_id) FROM dataset WHERE policy = $policy", parameters
        ).fetchall()
        ((twice,),) = connection.execute(
            """SELECT count(*) FROM (
                SELECT 1 FROM captions WHERE clip_id IN (SELECT clip_id FROM wanted)
                GROUP BY clip_id, window_number, length HAVING count(*) > 1)"""
        ).fetchall()
    counted = result.counts["made"]
    if (made, clips) != (counted, counted):
        found.append(f"{counted} clips were made, the dataset has {made} rows of {clips} of them")
    expected = result.present + result.shared + counted
    if whole != expected:
        found.append(f"the dataset should have {expected} clips and has {whole}")
    if twice:
        found.append(f"{twice} captions are there more than once")
    if found:
        raise LedgerError(
            f"the ledger of {result.materialize_id} does not balance: " + "; ".join(found)
            + ". Nothing was removed: keep the lake and report this as a bug"
        )  # fmt: skip
