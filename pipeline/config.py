"""The configuration of a run: YAML checked by strict models. Nothing unknown is accepted.

A configuration names its stages in order. `--set stages.split.longest_s=30` reaches into a list by a
stage's label or name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    Field,
    SecretStr,
    model_validator,
)

from winnow.operators.backbone import BackboneConfig
from winnow.operators.errors import ConfigError
from winnow.operators.media import Limits
from winnow.operators.operator import Operator
from winnow.operators.registry import operator_class
from winnow.operators.settings import Strict, find_config, parse_yaml, validate
from winnow.operators.shots import Detector, TransNetV2Detector
from winnow.operators.vlm.backend import TransformersSettings, VlmSettings
from winnow.operators.vlm.caption_prompts import LENGTHS, Length
from winnow.pipeline.domains import apply_domain

T = TypeVar("T")

VIDEO_PATTERNS = tuple(f"**/*.{suffix}" for suffix in ("mp4", "mov", "mkv", "webm", "avi", "m4v"))


class Workers(Strict):
    """How many workers a stage may have; between the two, the engine decides by load."""

    min: int = Field(1, ge=1)
    max: int | None = Field(None, ge=1, description="default: one per CPU core; 8 on GPUs")

    @model_validator(mode="after")
    def _ordered(self) -> Workers:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) must not be below min ({self.min})")
        return self


DECODERS = max(1, min(4, (os.cpu_count() or 1) - 1))


class StageConfig(Strict):
    label: str | None = Field(None, description="name in tables; needed where a stage stands twice")
    workers: Workers = Workers()
    cpus: float = Field(0.5, gt=0, description="CPU share of one worker, for the ray engine")
    gpus: float = Field(0.0, ge=0, description="GPU share of one worker, for the ray engine")
    timeout_s: float = Field(600.0, gt=0, description="longest time for one source")
    threads: int = Field(1, ge=1, description="decoder and encoder threads of one worker")


class IngestConfig(StageConfig):
    stage: Literal["ingest"]
    cpus: float = Field(0.2, gt=0)
    patterns: tuple[str, ...] = VIDEO_PATTERNS
    exclude: tuple[str, ...] = ()
    limits: Limits = Limits()
    settle_s: float = Field(
        120.0, ge=0, description="a cut-off file changed this recently is incomplete, not failed"
    )


class SplitConfig(StageConfig):
    stage: Literal["split"]
    detector: Detector = Field(default_factory=TransNetV2Detector, discriminator="kind")
    longest_s: float = Field(60.0, gt=0, description="longer shots are divided")
    measure_ahead: bool = Field(
        True, description="one decode pass for split and the CPU filter after it, where that fits"
    )


class ModelStageConfig(StageConfig):
    """A stage that may have a model."""

    batch_clips: int = Field(16, ge=1, description="a batch for the model is full at so many clips")
    batch_pixels: int = Field(2**28, ge=1, description="or at so many pixels of sampled frames")
    decoders: int = Field(
        DECODERS, ge=1, description="processes that decode for one worker with a model"
    )


class FilterConfig(ModelStageConfig):
    stage: Literal["filter"]
    operators: dict[str, dict[str, Any] | None] = Field(min_length=1)
    backbone: BackboneConfig | None = Field(
        None, description="the vision model whose frame embeddings the operators share"
    )


class IndexConfig(Strict):
    kind: Literal["milvus", "memory"] = Field(
        "milvus",
        description="milvus, or memory: read from the lake when a run starts and searched exactly; "
        "4 bytes a float and clip",
    )
    uri: str | None = Field(
        None, description="a Milvus server (http://host:19530); default: milvus-lite in the lake"
    )
    token: SecretStr | None = Field(None, description="credentials of the server, user:password")
    index_type: Literal["FLAT", "HNSW"] = Field(
        "FLAT",
        description="FLAT compares with every kept clip; HNSW (M 16, efConstruction 200), on a "
        "server only, is faster and may miss a duplicate; what it finds is compared exactly",
    )

    @model_validator(mode="after")
    def _possible(self) -> IndexConfig:
        if self.kind == "memory" and (self.uri or self.token or self.index_type != "FLAT"):
            raise ValueError(
                "kind: memory is exact and has no server: leave out uri, token and index_type, or "
                "say kind: milvus"
            )
        if self.index_type == "HNSW" and "://" not in (self.uri or ""):
            raise ValueError(
                "index_type: HNSW needs a Milvus server (uri: http://host:19530): milvus-lite takes "
                "every clip in hand for each search, whatever the index; for many clips without a "
                "server say kind: memory"
            )
        return self


class DedupConfig(StageConfig):
    stage: Literal["dedup"]
    cpus: float = Field(0.1, gt=0)
    embedding: str = "fingerprint_v1"
    threshold: float = Field(gt=0, le=1, description="least cosine similarity of a duplicate")
    index: IndexConfig = IndexConfig()


class TranscodeConfig(StageConfig):
    stage: Literal["transcode"]
    encoder: str = Field("auto", description="auto, or an ffmpeg H.264 encoder by name")
    crf: int = Field(18, ge=0, le=51)
    preset: str = "veryfast"


class CaptionConfig(ModelStageConfig):
    stage: Literal["caption"]
    vlm: VlmSettings = TransformersSettings()
    domain: str = Field("general", description="path or name in configs/prompts/captions")
    window_s: float = Field(5.0, ge=1, description="a caption is of at most so many seconds")
    fps: float = Field(2.0, gt=0, description="frames a second that the model sees")
    pixels: int = Field(4 * 2**20, ge=1024, description="most pixels of one window")
    lengths: tuple[Length, ...] = Field(LENGTHS, min_length=1)
    max_tokens: int = Field(1024, ge=1, description="of one answer, all lengths together")


class ShardConfig(StageConfig):
    stage: Literal["shard"]
    cpus: float = Field(0.1, gt=0)
    taxonomy: str = Field("shards", description="path or name in configs/taxonomy")


AnyStage = Annotated[
    IngestConfig
    | SplitConfig
    | FilterConfig
    | DedupConfig
    | TranscodeConfig
    | CaptionConfig
    | ShardConfig,
    Field(discriminator="stage"),
]


class CommitConfig(Strict):
    """How often finished sources become visible in the lake."""

    sources: int = Field(64, ge=1)
    seconds: float = Field(20.0, gt=0)


class RunConfig(Strict):
    """A whole run."""

    name: str
    description: str = ""
    engine: Literal["inline", "ray"] = "inline"
    policy: str = Field(description="path or name in configs/policies")
    domain: str | None = Field(None, description="path or name in configs/domains")
    models: str = Field("models", description="path of a file laid over configs/models.yaml")
    stages: tuple[AnyStage, ...]
    commit: CommitConfig = CommitConfig()
    attempts: int = Field(2, ge=1, description="tries for a source that kills or hangs its worker")
    isolate: bool = Field(True, description="media work happens in child processes")

    @model_validator(mode="after")
    def _sensible(self) -> RunConfig:
        kinds = [stage.stage for stage in self.stages]
        if kinds[:2] != ["ingest", "split"]:
            raise ValueError("stages must begin with ingest, split")
        for once in ("ingest", "split", "dedup", "transcode", "shard"):
            if kinds.count(once) > 1:
                raise ValueError(f"stage {once!r} stands more than once")
        if "shard" in kinds and ("transcode" not in kinds or kinds[-1] != "shard"):
            raise ValueError("shard must be the last stage and needs transcode before it")
        labels = [stage_label(stage) for stage in self.stages]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two stages are called {label!r}: give each filter a label")
        return self

    def stage(self, kind: str) -> Any:
        """The configuration of a stage that stands at most once; None where it does not."""
        return next((stage for stage in self.stages if stage.stage == kind), None)


def stage_label(stage: StageConfig) -> str:
    return stage.label or str(getattr(stage, "stage"))  # noqa: B009 - the union's discriminator


def apply_override(content: dict[str, Any], assignment: str) -> None:
    """Apply one `a.b=c` to a parsed configuration; list items go by label, name or number."""
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {assignment!r}: write it as key.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment!r}: the value is not valid YAML: {error}") from error
    keys = path.split(".")
    place: Any = content
    for depth, key in enumerate(keys[:-1]):
        where = ".".join(keys[: depth + 1])
        place = _step(place, key, where, assignment)
    last = keys[-1]
    if isinstance(place, list):
        place[_item(place, last, path, assignment)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ConfigError(f"--set {assignment!r}: {'.'.join(keys[:-1])} has no keys")


def _step(place: Any, key: str, where: str, assignment: str) -> Any:
    if isinstance(place, list):
        return place[_item(place, key, where, assignment)]
    if isinstance(place, dict):
        if place.get(key) is None:
            place[key] = {}
        return place[key]
    raise ConfigError(f"--set {assignment!r}: there is nothing at {where}")


def _item(place: list[Any], key: str, where: str, assignment: str) -> int:
    for number, item in enumerate(place):
        if isinstance(item, dict) and key in (
            item.get("label"),
            item.get("stage"),
            item.get("name"),
        ):
            return number
    if key.isdecimal() and int(key) < len(place):
        return int(key)
    raise ConfigError(f"--set {assignment!r}: the list has no item {where!r}")


def load_config(
    name: str,
    overrides: Sequence[str] = (),
    domain: str | None = None,
    notes: list[str] | None = None,
) -> RunConfig:
    """Read a configuration, lay a domain's profile over it, override, check. Raises ConfigError.

    `notes` takes what the profile changed, for people.
    """
    text, origin = find_config(name)
    content = parse_yaml(text, origin)
    asked = [value for key, _, value in (o.partition("=") for o in overrides) if key == "domain"]
    domain = domain or (asked[-1] if asked else content.get("domain"))
    if isinstance(domain, str):
        laid = apply_domain(content, domain)
        content = laid.content | {"domain": domain}
        if notes is not None:
            notes += laid.notes
    for assignment in overrides:
        apply_override(content, assignment)
    return validate(RunConfig, content, origin)


def build_operators(config: FilterConfig) -> tuple[Operator, ...]:
    """The operators of a filter stage, with their settings checked."""
    return tuple(
        validate(operator_class(name), settings or {}, f"stages.{stage_label(config)}.{name}")
        for name, settings in config.operators.items()
    )
