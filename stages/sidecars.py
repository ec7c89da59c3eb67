"""What stands beside a video: its prompt, its generator's record, and what role the video has.

The layouts of Cosmos-Transfer2.5, Cosmos-Predict2.5 and the multiview models are told apart by the
shape of their JSON, never by a folder's name. Everything read here is untrusted: a sidecar that
cannot be used is a `problem` of the row, and the video is taken in without it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from winnow.operators.errors import WinnowError

Role = Literal["generation", "control", "mask", "preview"]
TRANSFER, PREDICT = "cosmos-transfer2.5", "cosmos-predict2.5"
MULTIVIEW = "cosmos-transfer2.5-multiview"

SIDECAR_LIMIT = 2**20
"""Bytes; a longer file is no sidecar."""
_CONTROLS = ("edge", "depth", "vis", "seg")
_GUIDED_MASK = "guided_generation"
_VIEWS = (
    "front_wide", "rear", "rear_left", "rear_right", "cross_left", "cross_right", "front_tele",
)  # fmt: skip
# What config.yaml says of the model and the sample's own JSON does not.
_MODEL_KEYS = ("job", "checkpoint", "model")
_MODEL_DEPTH = 3
_CONFIG_LIMIT = 2**18
_MOST_NODES = 20_000


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What is known of a video from the files beside it."""

    role: Role = "generation"
    """`preview` is a grid of the views of a multiview sample, shown again."""
    complete: bool = True
    """False where the generator's completion marker is missing."""
    why: str = ""
    """Why it is incomplete."""
    generator: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    group_key: str | None = None
    """Shared by the generations from the same input video or image and the same prompt, whatever
    their seeds and generators."""
    input_path: str | None = None
    """The control or input video or image, as the generator recorded it."""
    fields: str | None = None
    """The JSON sidecar as JSON text, unknown keys included; a generator's also holds, under
    "config.yaml", what that file says of the model."""
    problem: str | None = None
    """Why a sidecar, or a part of one, could not be used."""


def read_sidecar(key: str, siblings: Collection[str], read: Callable[[str], bytes]) -> Sidecar:
    """What the files beside the video `key` say of it. Never raises for what they hold.

    `siblings` are the keys of the files in its folder (a set: they are looked up), `read` gives the
    bytes of one of them and may raise WinnowError or OSError.
    """
    beside = _Beside(key, siblings, read)
    own = beside.json(beside.stem)
    if own is not None and own.generator is not None:
        return beside.describe(beside.stem, own)
    unreadable = None
    for part in _parts(beside.stem):
        owner = beside.json(part.owner)
        if owner is not None and part.belongs_to(owner):
            whole = beside.describe(part.owner, owner)
            if part.role == "generation":
                return whole
            return replace(whole, role=part.role, complete=True, why="")
        if owner is not None and owner.data is None:
            unreadable = f"may be a {part.role} file, but {owner.problem}"
    alone = beside.describe(beside.stem, own)
    return replace(alone, problem=_joined(alone.problem, unreadable))


# ----------------------------------------------------------------------------- shapes of sidecars


class _Record(BaseModel):
    """A JSON sidecar. Unknown keys are allowed; known ones must have their type."""

    model_config = ConfigDict(extra="allow", strict=True)

    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)

    def inputs(self) -> list[str | None]:
        """The videos and images that the generation started from, the main one first."""
        return []


class _Plain(_Record):
    """A user's own: {"prompt": ...}, {"caption": ...} or {"text": ...}."""

    caption: str | None = None
    text: str | None = None

    @model_validator(mode="after")
    def _first_prompt(self) -> _Plain:
        self.prompt = self.prompt or self.caption or self.text
        return self


class _Predict(_Record):
    inference_type: str
    input_path: str | None = None

    def inputs(self) -> list[str | None]:
        return [self.input_path]


class _Input(BaseModel):
    """One control or one view."""

    model_config = ConfigDict(extra="allow", strict=True)

    input_path: str | None = None
    control_path: str | None = None


class _Transfer(_Record):
    video_path: str | None
    image_context_path: str | None = None
    edge: _Input | None = None
    depth: _Input | None = None
    vis: _Input | None = None
    seg: _Input | None = None

    def inputs(self) -> list[str | None]:
        controls = [c.control_path for c in (self.edge, self.depth, self.vis, self.seg) if c]
        # Controls are drawn from the video where there is one, whichever of them are switched on.
        return [*([self.video_path] if self.video_path else controls), self.image_context_path]


class _Multiview(_Record):
    front_wide: _Input | None = None
    rear: _Input | None = None
    rear_left: _Input | None = None
    rear_right: _Input | None = None
    cross_left: _Input | None = None
    cross_right: _Input | None = None
    front_tele: _Input | None = None

    def inputs(self) -> list[str | None]:
        views = [getattr(self, name) for name in _VIEWS]
        return [view.input_path or view.control_path for view in views if view]


_SHAPES: dict[str | None, type[_Record]] = {
    PREDICT: _Predict, TRANSFER: _Transfer, MULTIVIEW: _Multiview, None: _Plain,
}  # fmt: skip


def _generator(data: dict[str, Any]) -> str | None:
    """Which generator writes JSON of this shape. A user's {"prompt", "video_path"} is none's."""
    if "inference_type" in data and "prompt" in data:
        return PREDICT
    views = [view for name in _VIEWS if isinstance(view := data.get(name), dict)]
    if any(view.keys() & {"input_path", "control_path"} for view in views):
        return MULTIVIEW
    if {"name", "prompt", "video_path"} <= data.keys() and data.keys() & set(_CONTROLS):
        return TRANSFER
    return None


@dataclass(frozen=True, slots=True)
class _Part:
    """A file name read as one of several files of a sample."""

    owner: str
    role: Role
    generator: str
    control: str | None = None

    def belongs_to(self, owner: _Json) -> bool:
        known = self.control is None or self.control in (*_CONTROLS, _GUIDED_MASK, *owner.keys)
        return known and owner.generator == self.generator


def _parts(stem: str) -> Iterator[_Part]:
    """The ways in which a stem may name a part of a sample; its JSON has to confirm one."""
    roles: tuple[tuple[str, Role], ...] = (("_control_", "control"), ("_mask_", "mask"))
    for word, role in roles:
        start = stem.rfind(word)
        if start > 0:
            yield _Part(stem[:start], role, TRANSFER, stem[start + len(word) :])
    if stem.endswith("_grid"):
        yield _Part(stem.removesuffix("_grid"), "preview", MULTIVIEW)
    for view in _VIEWS:
        if stem.endswith(f"_{view}"):
            yield _Part(stem.removesuffix(f"_{view}"), "generation", MULTIVIEW)


# ------------------------------------------------------------------------------- files in a folder


@dataclass(frozen=True, slots=True)
class _Json:
    """A JSON sidecar as read: `data` is None where it cannot be, `record` where its types are
    wrong; then there is a problem."""

    data: Any = None
    generator: str | None = None
    record: _Record | None = None
    problem: str | None = None

    @property
    def keys(self) -> Collection[str]:
        return self.data.keys() if isinstance(self.data, dict) else ()


class _Beside:
    """The files beside one video."""

    def __init__(self, key: str, siblings: Collection[str], read: Callable[[str], bytes]) -> None:
        self._folder, slash, name = key.rpartition("/")
        self._folder += slash
        self.stem = name.rpartition(".")[0] or name
        self._siblings = siblings
        self._read = read

    def has(self, name: str) -> bool:
        return self._folder + name in self._siblings

    def text(self, name: str) -> str:
        """A small UTF-8 file. Raises _Unusable."""
        try:
            content = self._read(self._folder + name)
        except (WinnowError, OSError) as error:
            raise _Unusable(f"{name} cannot be read: {error}") from error
        if len(content) > SIDECAR_LIMIT:
            raise _Unusable(f"{name} has more than {SIDECAR_LIMIT} bytes")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _Unusable(f"{name} is not UTF-8 (at byte {error.start})") from error

    def json(self, stem: str) -> _Json | None:
        """The JSON of a sample; None where there is none."""
        name = f"{stem}.json"
        if not self.has(name):
            return None
        try:
            data = _parse_json(self.text(name), name)
        except _Unusable as error:
            return _Json(problem=str(error))
        if isinstance(data, str):
            return _Json(data, record=_Record(prompt=data))
        if not isinstance(data, dict):
            return _Json(data, problem=f"{name} holds neither an object nor a text")
        generator = _generator(data)
        try:
            return _Json(data, generator, _SHAPES[generator].model_validate(data))
        except ValidationError as error:
            return _Json(data, generator, problem=f"{name}: {_summary(error)}")

    def describe(self, stem: str, sidecar: _Json | None) -> Sidecar:
        """All that is known of the sample `stem`, its text file and config.yaml included."""
        sidecar = sidecar or _Json()
        record, problem = sidecar.record or _Record(), sidecar.problem
        prompt = _clean(record.prompt)
        if prompt is None and self.has(f"{stem}.txt"):
            try:
                prompt = _clean(self.text(f"{stem}.txt"))
            except _Unusable as error:
                problem = _joined(problem, str(error))
        model: dict[str, Any] = {}
        if sidecar.generator is not None and self.has("config.yaml"):
            try:
                model, wrong = _model_fields(self.text("config.yaml"))
            except _Unusable as error:
                model, wrong = {}, str(error)
            problem = _joined(problem, wrong)
        inputs = [path for text in record.inputs() if (path := _clean(text))]
        complete = sidecar.generator != TRANSFER or self.has(f"{stem}.txt")
        return Sidecar(
            complete=complete,
            why=""
            if complete
            else f"{stem}.txt, which the generator writes last, is missing: "
            "the sample was blocked, crashed or is still being made",
            generator=sidecar.generator,
            prompt=prompt,
            negative_prompt=_clean(record.negative_prompt),
            seed=record.seed,
            group_key=_group_key(inputs, prompt),
            input_path=inputs[0] if inputs else None,
            fields=_fields(sidecar.data, model),
            problem=problem,
        )


# --------------------------------------------------------------------------------- untrusted text


class _Unusable(Exception):
    """A file beside the video says nothing that can be used; the text says why."""


def _parse_json(text: str, name: str) -> Any:
    try:
        data = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        # Once around: what nests too deeply to be written again cannot be stored, and text that
        # is no Unicode (lone surrogates) becomes "?" in keys and values alike.
        data = json.loads(json.dumps(data, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"{name} is not valid JSON: {str(error)[:200]}") from error
    return data


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _clean(text: str | None) -> str | None:
    """Text that any table can hold, without NUL; None where nothing is left."""
    return (text or "").replace("\0", "\ufffd").strip() or None


def _summary(error: ValidationError) -> str:
    wrong = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in wrong[:3])


def _joined(*problems: str | None) -> str | None:
    return "; ".join(problem for problem in problems if problem) or None


def _group_key(inputs: list[str], prompt: str | None) -> str | None:
    if not inputs and prompt is None:
        return None
    text = json.dumps([inputs, prompt])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _fields(data: Any, model: dict[str, Any]) -> str | None:
    if data is None:
        return None
    if model:
        data = data | {"config.yaml": model}
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


@lru_cache(maxsize=16)
def _model_fields(text: str) -> tuple[dict[str, Any], str | None]:
    """The part of a generator's config.yaml that tells which model it was, and what is wrong.

    Tags are ignored, so nothing is ever constructed; aliases are followed on a budget, so a few
    lines cannot unfold into gigabytes. A folder's samples share the file: it is parsed once.
    """
    if len(text) > _CONFIG_LIMIT:
        return {}, f"config.yaml has more than {_CONFIG_LIMIT} characters"
    try:
        # Not libyaml's loader, which overflows its C stack on deeply nested text.
        return _model_part(yaml.compose(text, Loader=yaml.SafeLoader)), None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return {}, f"config.yaml is not valid YAML: {str(error)[:200]}"
    except _Unusable as error:
        return {}, str(error)


def _model_part(root: yaml.Node | None) -> dict[str, Any]:
    if not isinstance(root, yaml.MappingNode):
        return {}
    budget = iter(range(_MOST_NODES))
    return {
        key.value: _plain(value, _MODEL_DEPTH, budget)
        for key, value in root.value
        if isinstance(key, yaml.ScalarNode) and key.value in _MODEL_KEYS
    }


def _plain(node: yaml.Node, depth: int, budget: Iterator[int]) -> Any:
    """A YAML node as JSON data, cut off below `depth`."""
    if next(budget, None) is None:
        raise _Unusable("config.yaml unfolds into more than a model's configuration")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if depth == 0:
        return None
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, depth - 1, budget) for item in node.value]
    return {
        key.value: _plain(value, depth - 1, budget)
        for key, value in node.value
        if isinstance(key, yaml.ScalarNode)
    }


def _scalar(node: yaml.ScalarNode) -> Any:
    match node.tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return node.value.lower() in ("true", "yes", "on")
        case "int" if node.value.lstrip("-").isdecimal() and len(node.value) < 19:
            return int(node.value)
        case "float":
            with suppress(ValueError):
                return _finite(node.value)
    return node.value
