"""Backfill: run new or newer operators over clips that the lake already has. Nothing is split again.

Each operator's columns go to `measurements`, batch by batch; the `backfills` row that names the batch
comes last, so a crash leaves nothing visible that is half done. The view `clips` shows the newest
measurement of an operator; what was measured before stays where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import duckdb
from pydantic_core import to_jsonable_python

from winnow.operators.errors import ConfigError, LakeError, LedgerError, WinnowError
from winnow.operators.models import Models
from winnow.operators.operator import BatchOperator, Operator
from winnow.operators.registry import operator_class
from winnow.operators.settings import validate
from winnow.pipeline.config import FilterConfig, RunConfig, apply_override, stage_label
from winnow.pipeline.engines.inline import run_inline
from winnow.pipeline.lake import Lake, sequence_number
from winnow.pipeline.models import check_present
from winnow.pipeline.plan import Placement, Plan
from winnow.pipeline.planning import make_filter, place
from winnow.pipeline.policy import Policy, predicate_columns
from winnow.pipeline.refilter import latest_config
from winnow.pipeline.reopen import Reopen, SourceFiles
from winnow.pipeline.revisit import SourceProblems, in_batches, known_sources, unusable
from winnow.pipeline.roster import Roster
from winnow.pipeline.run import Engine, Progress
from winnow.pipeline.run_lock import Hold, hold_lake
from winnow.pipeline.views import connect
from winnow.stages.batch_filter import BatchFilter
from winnow.stages.filter import Filter
from winnow.stages.records import Clip, Source

TABLES_IN_ORDER = ("measurements", "embeddings", "backfills")
OUTCOMES = ("measured", "failed", "skipped", "unavailable")
# The worst that happened to a clip in any pass is what is counted.
_WEIGHT = {"skipped": 0, "measured": 1, "unavailable": 2, "failed": 3}


@dataclass
class BackfillResult(SourceProblems):
    """What a backfill did. Every clip asked for is counted once, by the worst that befell it."""

    backfill_id: str
    operators: dict[str, str]
    """Versions by operator."""
    asked: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    """measured; failed: an operator could not, and says why in its error column; skipped: the same
    version and settings have measured it; unavailable: its source is gone or has changed."""
    measurements: int = 0
    """Rows written: one a clip and operator."""
    wall_s: float = 0.0

    @property
    def line(self) -> str:
        sums = " + ".join(f"{self.counts[outcome]} {outcome}" for outcome in OUTCOMES)
        return f"clips {self.asked} = {sums}"

    @property
    def useless(self) -> bool:
        """There were clips, and none of them has a measurement."""
        return self.asked > 0 and not self.counts["measured"] + self.counts["skipped"]


@dataclass(frozen=True)
class _Made:
    """What makes an operator's columns: a clip measured by the same is not measured again."""

    version: str
    settings_hash: str


@dataclass
class _Pass:
    """One filter stage's share of the operators asked for."""

    stage: FilterConfig
    operators: tuple[Operator, ...]
    described: dict[str, dict[str, Any]]
    made: dict[str, _Made]


def backfill(
    lake: Lake,
    names: Sequence[str],
    *,
    where: str = "",
    config: RunConfig | None = None,
    retry_failed: bool = False,
    ray_address: str | None = None,
    progress: Progress | None = None,
    options: dict[str, str] | None = None,
    wait: bool = False,
) -> BackfillResult:
    """Measure clips of the lake by the operators `names`, with the settings that `config` has.

    Without a `config`, that of the lake's latest run; an operator that it does not have runs with
    its defaults. `where` is a predicate over `clips_decided`. Clips measured before by the same
    version, settings and models are skipped; with `retry_failed`, not those where that failed.
    `options` are settings of the object store that holds the sources. The lake is held meanwhile;
    with `wait`, another holder's end is waited for.

    Raises ConfigError, LakeError, LakeBusy, ModelUnavailable before anything is decoded, and
    LedgerError where the lake does not hold what was measured.
    """
    lake.require()
    config = config or latest_config(lake)
    started = time.perf_counter()
    models = Models.read(config.models)
    passes = [_describe(stage, models) for stage in _stages(config, names)]
    progress = progress or Progress()
    with hold_lake(
        lake, f"winnow measure --operators {','.join(names)}", wait=wait, told=progress.say
    ) as hold:
        result = _backfill(lake, config, models, passes, hold, where=where, retry_failed=retry_failed,
                           ray_address=ray_address, progress=progress, options=options)  # fmt: skip
    result.wall_s = time.perf_counter() - started
    return result


def _backfill(
    lake: Lake,
    config: RunConfig,
    models: Models,
    passes: Sequence[_Pass],
    hold: Hold,
    *,
    where: str,
    retry_failed: bool,
    ray_address: str | None,
    progress: Progress,
    options: dict[str, str] | None,
) -> BackfillResult:
    """`backfill` while the lake is ours."""
    clips = _selected(lake, where)
    versions = {name: made.version for one in passes for name, made in one.made.items()}
    result = BackfillResult(f"backfill-{uuid.uuid4().hex[:12]}", versions, len(clips))
    outcomes = dict.fromkeys(clips, "skipped")
    work = _Work(lake, config, result, outcomes, where, retry_failed, options or {}, hold)
    with ExitStack() as stack:
        engine: Engine = run_inline
        if config.engine == "ray" and clips:
            from winnow.pipeline.engines.ray import RayEngine

            ray = stack.enter_context(RayEngine(ray_address, 2))
            engine = ray.run
            for one in passes:
                ray.require_gpus(work.plan(one.stage))
        if ray_address is None:
            for one in passes:
                check_present(models, work.plan(one.stage).needed_models)
        # One after the other: what a later stage needs of an earlier one is in the lake by then.
        for one in passes:
            work.carry_out(one, engine, progress)
    counted = Counter(outcomes.values())
    result.counts = {outcome: counted[outcome] for outcome in OUTCOMES}
    _check_ledger(lake, result)
    return result


def latest_settings(lake: Lake, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of the lake's latest run, with some settings replaced."""
    content = latest_config(lake).model_dump(mode="json")
    for assignment in overrides:
        apply_override(content, assignment)
    return validate(RunConfig, content, f"the configuration of the latest run of {lake.uri}")


def _stages(config: RunConfig, names: Sequence[str]) -> list[FilterConfig]:
    """The configuration's filter stages with only the operators asked for, in its order."""
    if not names:
        raise ConfigError("name at least one operator: --operators a,b")
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        operator_class(name)
    stages, found = [], set()
    filters = [stage for stage in config.stages if isinstance(stage, FilterConfig)]
    for stage in filters:
        here = {name: s for name, s in stage.operators.items() if name in wanted}
        if here:
            found |= set(here)
            stages.append(stage.model_copy(update={"operators": here}))
    rest = [name for name in wanted if name not in found]
    # Operators with models stand apart: they cannot share a stage with others.
    for batched, label in ((False, "measure"), (True, "measure_models")):
        own = [n for n in rest if issubclass(operator_class(n), BatchOperator) is batched]
        if own:
            stages.append(
                FilterConfig(stage="filter", label=label, operators={name: {} for name in own})
            )
    backbones = [stage.backbone for stage in filters if stage.backbone is not None]
    return [_with_backbone(stage, backbones) for stage in stages]


def _with_backbone(stage: FilterConfig, backbones: Sequence[Any]) -> FilterConfig:
    """The stage with a backbone exactly where an operator uses one."""
    from winnow.operators.backbone import BackboneConfig

    if not any(operator.needs.frame_embeddings for operator in _built(stage)):
        return stage.model_copy(update={"backbone": None})
    if stage.backbone is not None:
        return stage
    return stage.model_copy(update={"backbone": next(iter(backbones), BackboneConfig())})


def _built(stage: FilterConfig) -> tuple[Operator, ...]:
    return tuple(
        validate(operator_class(name), settings or {}, f"stages.{stage_label(stage)}.{name}")
        for name, settings in stage.operators.items()
    )


def _describe(stage: FilterConfig, models: Models) -> _Pass:
    operators = _built(stage)
    described, made = {}, {}
    for operator in operators:
        by = operator.made_by(models) if isinstance(operator, BatchOperator) else {}
        if stage.backbone is not None and operator.needs.frame_embeddings:
            by |= {f"model {stage.backbone.model}": models.get(stage.backbone.model).identity}
        made[operator.name] = _Made(str(operator.version), settings_hash(operator, stage, by))
        described[operator.name] = {
            "version": str(operator.version),
            "settings": _settings(operator),
            "settings_hash": made[operator.name].settings_hash,
            "made_by": by,
            "columns": [c.name for c in (*operator.columns, operator.error_column())],
            "embeddings": list(operator.embeddings),
        }
    return _Pass(stage, operators, described, made)


def settings_hash(operator: Operator, stage: FilterConfig, made_by: Mapping[str, str]) -> str:
    """Names what an operator's columns depend on beside its version.

    Settings, models and prompts, and the backbone's sampling where it sees through one.
    """
    backbone = None
    if stage.backbone is not None and operator.needs.frame_embeddings:
        # How fast it computes changes nothing of what it says.
        backbone = stage.backbone.model_dump(mode="json", exclude={"device", "batch_pixels"})
    text = json.dumps([_settings(operator), sorted(made_by.items()), backbone], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _settings(operator: Operator) -> dict[str, Any]:
    return {
        f.name: to_jsonable_python(getattr(operator, f.name), fallback=str)
        for f in dataclasses.fields(operator)
        if f.init
    }


def _selected(lake: Lake, where: str) -> list[str]:
    """The clips asked for, in the order of ingestion. Raises ConfigError for a wrong predicate."""
    condition = ""
    if where.strip():
        predicate_columns(where, "--where")
        condition = f"WHERE ({where}\n)"
    with connect(lake) as connection:
        try:
            rows = connection.execute(
                f"SELECT clip_id FROM clips_decided {condition} "
                "ORDER BY source_seq, start_frame, clip_id"
            ).fetchall()
        except duckdb.Error as error:
            raise ConfigError(f"--where: {error}") from error
    return list(dict.fromkeys(clip_id for (clip_id,) in rows))


@dataclass
class _Work:
    """The passes of one backfill."""

    lake: Lake
    config: RunConfig
    result: BackfillResult
    outcomes: dict[str, str]
    """By clip asked for, the worst so far."""
    where: str
    retry_failed: bool
    options: dict[str, str]
    hold: Hold
    _batches: int = 0
    _seq: int = 0

    def plan(self, stage: FilterConfig) -> Plan:
        """Reopen the sources, and one filter stage. No rule: nothing is decided here."""
        files = SourceFiles(self.options)
        label = stage_label(stage)
        measuring = make_filter(stage, files, Models.read(self.config.models), label)
        ingest = self.config.stage("ingest")
        places: tuple[Placement, ...] = (
            place(ingest, Reopen(files)),
            place(stage, measuring),
        )
        return Plan(self.config, Policy(name="measure", rules=()), places)

    def carry_out(self, one: _Pass, engine: Engine, progress: Progress) -> None:
        """Measure by the operators of one stage what they have not measured yet."""
        missing = self._missing(one)
        # Clips that lack the same operators go together: usually that is all of them.
        groups: dict[tuple[str, ...], list[str]] = {}
        for clip_id, operators in missing.items():
            groups.setdefault(operators, []).append(clip_id)
        for operators, clip_ids in groups.items():
            stage = _with_backbone(
                one.stage.model_copy(
                    update={"operators": {n: one.stage.operators[n] for n in operators}}
                ),
                [] if one.stage.backbone is None else [one.stage.backbone],
            )
            plan = self.plan(stage)
            sources = self._sources(plan, clip_ids)
            self.lake.create((), plan.clip_columns)
            total = len(sources)
            progress.report(0, total, None)
            # The clips as asked for: a source that fails comes back without them.
            asked = {source.ordinal: list(source.clips) for source in sources}
            stream = self.hold.guard(engine(plan, sources, Roster()))
            described = {name: one.described[name] for name in operators}
            done = 0
            for batch in in_batches(stream, self.config.commit):
                self._commit(plan, batch, asked, described)
                for source in batch:
                    done += 1
                    progress.report(done, total, source)

    def _missing(self, one: _Pass) -> dict[str, tuple[str, ...]]:
        """By clip the operators of this stage that have not measured it as they would now."""
        with connect(self.lake) as connection:
            recorded = _recorded(connection, one.operators)
            have = {name: self._measured(connection, name, recorded) for name in one.made}
        missing = {}
        for clip_id in self.outcomes:
            lacking = []
            for name, made in one.made.items():
                known, failed = have[name].get(clip_id, (None, False))
                if known != made or (failed and self.retry_failed):
                    lacking.append(name)
            if lacking:
                missing[clip_id] = tuple(lacking)
        return missing

    def _measured(
        self,
        connection: duckdb.DuckDBPyConnection,
        name: str,
        recorded: Mapping[tuple[str, str], str],
    ) -> dict[str, tuple[_Made, bool]]:
        """By clip what made the operator's columns that the views show, and whether it failed.

        Of a run that never finished the settings are unknown: its clips are measured again.
        """
        columns = [row[0] for row in connection.execute("DESCRIBE clips").fetchall()]
        if f"{name}_error" not in columns:
            return {}
        rows = connection.execute(
            f"""SELECT c.clip_id, c.operator_versions[$name], s.run_id, c."{name}_error" IS NOT NULL
            FROM clips c JOIN sources s USING (attempt_id)
            WHERE c.operator_versions[$name] IS NOT NULL""",
            {"name": name},
        ).fetchall()
        later = connection.execute(
            """SELECT clip_id, arg_max(settings_hash, (seq, attempt_id)) FROM measurements
            WHERE operator = $name GROUP BY 1""",
            {"name": name},
        ).fetchall()
        newest = dict(later)
        found = {}
        for clip_id, version, run_id, failed in rows:
            settings = newest.get(clip_id) or recorded.get((run_id, name), "")
            found[clip_id] = (_Made(version, settings), failed)
        return found

    def _sources(self, plan: Plan, clip_ids: Sequence[str]) -> list[Source]:
        """The clips' sources, with the columns that the operators need. Raises ConfigError."""
        needed = sorted({c for o in _operators(plan) for c in o.needs.columns})
        with connect(self.lake) as connection:
            names = {row[0] for row in connection.execute("DESCRIBE clips").fetchall()}
        lacking = [column for column in needed if column not in names]
        if lacking:
            raise ConfigError(
                f"the lake has no column {', '.join(lacking)}, which "
                f"{', '.join(o.name for o in _operators(plan))} needs: measure by the operator "
                "that writes it first, or in the same command"
            )
        return known_sources(self.lake, clip_ids, needed)

    def _commit(
        self,
        plan: Plan,
        batch: Sequence[Source],
        asked: Mapping[int, Sequence[Clip]],
        described: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Append a batch, the row in `backfills` last; after a crash before it, nothing shows."""
        self._seq = max(self._seq + 1, sequence_number())
        attempt = uuid.uuid4().hex
        stamp = {"attempt_id": attempt, "backfill_id": self.result.backfill_id, "seq": self._seq}
        rows: dict[str, list[dict[str, Any]]] = {table: [] for table in TABLES_IN_ORDER}
        outcomes: dict[str, str] = {}
        operators = _operators(plan)
        for source in batch:
            clips = source.clips
            failure = None
            if not source.pending and source.status != "done":
                self.result.tell_source(source)
                clips = list(asked[source.ordinal])
                if unusable(source):
                    outcomes |= dict.fromkeys((c.clip_id for c in clips), "unavailable")
                    continue
                failure = f"{source.error_kind}: {source.error}"[:500]
            for clip in clips:
                failed = False
                for operator in operators:
                    values = _values(operator, clip, failure)
                    failed |= values[operator.error_column().name] is not None
                    rows["measurements"].append(
                        {
                            "clip_id": clip.clip_id,
                            **stamp,
                            "operator": operator.name,
                            "operator_version": str(operator.version),
                            "settings_hash": described[operator.name]["settings_hash"],
                            "embeddings": list(operator.embeddings),
                            **values,
                        }
                    )
                outcomes[clip.clip_id] = "failed" if failed else "measured"
                rows["embeddings"] += [
                    {"clip_id": clip.clip_id, "attempt_id": attempt, "model": model,
                     "vector": vector.tolist()}
                    for model, vector in (clip.vectors.items() if failure is None else ())
                ]  # fmt: skip
        if rows["measurements"]:
            rows["backfills"].append(
                {
                    **stamp,
                    "committed_at": datetime.now(UTC),
                    "sources": len(batch),
                    "measurements": len(rows["measurements"]),
                    "operators": json.dumps(described),
                    "selection": self.where,
                    "engine": self.config.engine,
                }
            )
            self._batches += 1
            for table in TABLES_IN_ORDER:
                self.lake.append(table, rows[table], (self.result.backfill_id, self._batches))
            self.result.measurements += len(rows["measurements"])
        for clip_id, outcome in outcomes.items():
            if _WEIGHT[outcome] > _WEIGHT[self.outcomes[clip_id]]:
                self.outcomes[clip_id] = outcome


def _operators(plan: Plan) -> tuple[Operator, ...]:
    stage = plan.stages[-1]
    assert isinstance(stage, Filter | BatchFilter)
    return stage.operators


def _values(operator: Operator, clip: Clip, failure: str | None) -> dict[str, Any]:
    """The operator's columns of a clip; where its source could not be worked on, the error."""
    error = operator.error_column().name
    if failure is not None or error not in clip.columns:
        nothing = dict.fromkeys(column.name for column in operator.columns)
        return {**nothing, error: failure or "not measured"}
    return {name: clip.columns[name] for name in (*(c.name for c in operator.columns), error)}


def _recorded(
    connection: duckdb.DuckDBPyConnection, operators: Sequence[Operator]
) -> dict[tuple[str, str], str]:
    """By run and operator the hash of the settings and models that the run recorded."""
    found: dict[tuple[str, str], str] = {}
    names = {operator.name for operator in operators}
    rows = connection.execute("SELECT run_id, config, versions FROM runs").fetchall()
    for run_id, config, versions in rows:
        try:
            run = RunConfig.model_validate(json.loads(config))
            made_by = json.loads(versions)["operators"]
            models = Models.read(run.models)
            for stage in run.stages:
                if not isinstance(stage, FilterConfig):
                    continue
                for operator in _built(stage):
                    if operator.name in names:
                        now = _describe_one(operator, stage, models)
                        then = {key: made_by[key] for key in now}
                        found[run_id, operator.name] = settings_hash(operator, stage, then)
        except (WinnowError, ValueError, KeyError, TypeError):
            continue  # recorded by another version: it cannot be compared
    return found


def _describe_one(operator: Operator, stage: FilterConfig, models: Models) -> dict[str, str]:
    one = stage.model_copy(update={"operators": {operator.name: stage.operators[operator.name]}})
    by: dict[str, str] = _describe(one, models).described[operator.name]["made_by"]
    return by


def _check_ledger(lake: Lake, result: BackfillResult) -> None:
    """Every clip is counted once, and the lake holds every measurement once."""
    problems = []
    if sum(result.counts.values()) != result.asked:
        problems.append(f"{result.asked} clips were asked for, {result.line}")
    with connect(lake) as connection:
        row = connection.execute(
            """SELECT count(*), count(DISTINCT (clip_id, operator)) FROM measurements
            WHERE backfill_id = ?""",
            [result.backfill_id],
        ).fetchone()
    if row is None:
        raise LakeError("the lake answered a count with no row")
    if (result.measurements, result.measurements) != row:
        problems.append(
            f"{result.measurements} measurements were written, the lake shows {row[0]} of "
            f"{row[1]} clips and operators"
        )
    if problems:
        raise LedgerError(
            "the ledger of this backfill does not balance: " + "; ".join(problems)
            + ". Nothing was removed: keep the lake and report this as a bug"
        )  # fmt: skip
