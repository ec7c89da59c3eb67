"""Makes the plan of a run: constructs the configured stages and checks them against the policy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from winnow.operators.errors import ConfigError
from winnow.operators.models import Models
from winnow.operators.operator import BatchOperator
from winnow.operators.settings import find_config, parse_yaml, validate
from winnow.operators.vlm.caption_prompts import CaptionPrompts
from winnow.pipeline.config import (
    CaptionConfig,
    DedupConfig,
    FilterConfig,
    IngestConfig,
    RunConfig,
    ShardConfig,
    SplitConfig,
    TranscodeConfig,
    build_operators,
    stage_label,
)
from winnow.pipeline.domains import policy_of
from winnow.pipeline.index import default_index_uri
from winnow.pipeline.kept_index import KeptClips, LoadKeptIndex, OpenKeptIndex
from winnow.pipeline.lake import Lake
from winnow.pipeline.plan import Placement, Plan
from winnow.pipeline.policy import Evaluator, Policy
from winnow.pipeline.storage import Storage
from winnow.stages.batch_filter import BatchFilter
from winnow.stages.caption import Caption
from winnow.stages.dedup import Dedup
from winnow.stages.filter import Filter
from winnow.stages.ingest import Claim, Ingest
from winnow.stages.shard import Buckets, Shard
from winnow.stages.split import Split
from winnow.stages.stage import BatchStage, Files, MediaSink, Stage
from winnow.stages.transcode import Transcode

GPU_WORKERS = 8
"""Most workers of a stage on GPUs where the configuration does not say; Ray starts what fits."""


def make_plan(
    config: RunConfig,
    policy: Policy,
    *,
    files: Storage,
    media: Storage,
    lake: Lake,
    claimed: Mapping[str, str],
) -> Plan:
    """Construct the stages. Raises ConfigError where they and the policy do not fit."""
    placements: list[Placement] = []
    models = Models.read(config.models)
    for stage in config.stages:
        placements.append(place(stage, construct(stage, policy, files, media, lake, models)))
        if isinstance(stage, IngestConfig):
            placements.append(Placement(Claim(dict(claimed)), isolated=False))
    _measure_ahead(config, placements)
    plan = Plan(config, policy, tuple(placements))
    check(plan)
    return plan


def _measure_ahead(config: RunConfig, placements: list[Placement]) -> None:
    """Let split measure for the filter stage right after it, where both run on the CPU."""
    if not config.stage("split").measure_ahead:
        return
    for before, after in pairwise(placements):
        split, following = before.stage, after.stage
        if isinstance(split, Split) and isinstance(following, Filter):
            split.ahead = following


def check_config(config: RunConfig) -> Plan:
    """The plan that a configuration would give, without an input or a lake. Raises ConfigError."""
    here = Storage.open(".")
    policy, _ = policy_of(config)
    return make_plan(config, policy, files=here, media=here, lake=Lake("."), claimed={})


def check(plan: Plan) -> None:
    """What configuration models cannot see: columns written twice, missing vectors, rules."""
    seen: dict[str, str] = {}
    for stage in plan.stages:
        for column in stage.columns():
            if column.name in seen:
                raise ConfigError(
                    f"stages {seen[column.name]!r} and {stage.label!r} both write {column.name!r}: "
                    "an operator may run in one filter stage only"
                )
            seen[column.name] = stage.label
        if isinstance(stage, Dedup):
            before = plan.stages[: plan.stages.index(stage)]
            models = [model for earlier in before for model in earlier.embeddings()]
            if stage.embedding not in models:
                raise ConfigError(
                    f"dedup compares the embedding {stage.embedding!r}, which no operator before it "
                    f"writes (there are: {', '.join(models) or 'none'}): add the operator "
                    "`fingerprint` to a filter stage before dedup"
                )
    Evaluator(plan.policy, plan.clip_columns)


def place(config: Any, stage: Stage) -> Placement:
    cores = os.cpu_count() or 1
    if isinstance(config, IngestConfig):
        cores = max(1, cores // 4)  # hashing and probing keep ahead of decoding with less
    if isinstance(stage, BatchStage) and not config.gpus:
        cores = 1  # a model on the CPU takes what cores there are
    elif isinstance(stage, BatchStage):
        cores = GPU_WORKERS
    single = stage.ordered
    return Placement(
        stage,
        workers_min=1 if single else config.workers.min,
        workers_max=1 if single else max(config.workers.min, config.workers.max or cores),
        cpus=config.cpus,
        gpus=config.gpus,
        timeout_s=config.timeout_s,
        decoders=getattr(config, "decoders", 1),
        isolated=not single,
    )


def make_filter(config: FilterConfig, files: Files, models: Models, label: str) -> Stage:
    """A filter stage's operators either all measure while a clip is decoded, or all have models."""
    operators = build_operators(config)
    batched = tuple(o for o in operators if isinstance(o, BatchOperator))
    if not batched:
        for_models = ("backbone", "batch_clips", "batch_pixels", "decoders", "gpus")
        fields = FilterConfig.model_fields
        unused = [name for name in for_models if getattr(config, name) != fields[name].default]
        if unused:
            raise ConfigError(
                f"stages.{label}: {', '.join(unused)} is for operators with models, and "
                "there is none in this stage: remove it"
            )
        return Filter(files, operators, config.threads, label)
    if len(batched) < len(operators):
        streaming = [o.name for o in operators if not isinstance(o, BatchOperator)]
        raise ConfigError(
            f"stages.{label}: {', '.join(streaming)} and {', '.join(o.name for o in batched)} "
            "cannot share a filter stage: operators with models need one of their own"
        )
    return BatchFilter(
        files, batched, models, config.backbone, config.threads, label,
        config.batch_clips, config.batch_pixels,
    )  # fmt: skip


def construct(
    config: Any, policy: Policy, files: Files, media: MediaSink, lake: Lake, models: Models
) -> Stage:
    """The stage that a configuration describes."""
    label = stage_label(config)
    match config:
        case IngestConfig():
            return Ingest(files, config.limits, config.settle_s, label)
        case SplitConfig():
            return Split(files, config.detector, config.longest_s, config.threads, label)
        case FilterConfig():
            return make_filter(config, files, models, label)
        case DedupConfig():
            index = config.index
            kept = KeptClips(lake, config.embedding, policy.name)
            opener: OpenKeptIndex | LoadKeptIndex = LoadKeptIndex(kept)
            if index.kind == "milvus":
                token = index.token.get_secret_value() if index.token else ""
                uri = index.uri or default_index_uri(lake)
                opener = OpenKeptIndex(kept, uri, token, index.index_type)
            return Dedup(opener, config.embedding, config.threshold, label)
        case TranscodeConfig():
            return Transcode(
                files, media, config.encoder, config.crf, config.preset, config.threads,
                config.timeout_s, label,
            )  # fmt: skip
        case CaptionConfig():
            return Caption(
                files, config.vlm, models, CaptionPrompts.read(config.domain), config.window_s,
                config.fps, config.pixels, config.lengths, config.max_tokens, config.threads, label,
                config.batch_clips, config.batch_pixels,
            )  # fmt: skip
        case ShardConfig():
            text, origin = find_config(config.taxonomy, "taxonomy")
            return Shard(validate(Buckets, parse_yaml(text, origin), origin), label)
    raise ConfigError(f"unknown stage {config!r}")
