"""What models said of the clips that are shown: captions, answers, classes, judgements."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from winnow.operators.vlm.caption_prompts import LENGTHS
from winnow.operators.vlm.questions import EVIDENCE, VERDICTS
from winnow.pipeline.report_physics import COLUMNS as PHYSICS_COLUMNS
from winnow.pipeline.report_physics import ShownJudgement, judgement
from winnow.pipeline.report_values import joined, number, short, word, words
from winnow.pipeline.report_views import ANSWERS, Views, quoted

MOST_WINDOWS = 24
"""Of a clip that are shown; a clip of a minute has twelve windows of captions."""
_LONGEST_CAPTION = 3000
_LONGEST_ANSWER = 1000
# Winnow keeps 800 characters a window; more was written by something else.
_LONGEST_ANSWERS = 200_000
_CLIP_COLUMNS = (
    "content_type_label",
    "content_type_probability",
    "aesthetic_mean",
    "prompt_match_mean",
    "prompt_match_margin",
    "vlm_filter_status",
    "vlm_filter_flags",
    "vlm_filter_worst",
    "vlm_filter_worst_question",
    "vlm_filter_classes",
    ANSWERS,
    "vlm_filter_model",
    "vlm_filter_prompt",
    "vlm_filter_error",
    *PHYSICS_COLUMNS,
)
_CAPTION_COLUMNS = (
    "window_number", "start_s", "end_s", "length", "status", "text", "flags", "error", "model",
    "prompt",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ShownCaption:
    """One caption; `text` is empty where there is none, `error` says why it is not whole."""

    length: str
    status: str
    text: str
    flags: Sequence[str]
    error: str


@dataclass(frozen=True, slots=True)
class CaptionedWindow:
    """The captions of one window, the shortest first. Seconds from the clip's start."""

    start_s: float | None
    end_s: float | None
    captions: Sequence[ShownCaption]


@dataclass(frozen=True, slots=True)
class AnsweredWindow:
    """What the VLM filter's model answered to one window."""

    start_s: float | None
    end_s: float | None
    status: str
    yes: Sequence[str]
    unsure: Sequence[str]
    no: Sequence[str]
    classes: Sequence[tuple[str, str]]
    evidence: str
    raw: str
    """The answer as it came, where it is no object of short answers."""
    problems: Sequence[str]
    error: str
    frames: int | None


@dataclass(slots=True)
class Said:
    """All that models said of one clip; None and empty for what none did."""

    content_type: str = ""
    probability: float | None = None
    aesthetic: float | None = None
    prompt_match: float | None = None
    prompt_margin: float | None = None
    status: str = ""
    flags: Sequence[str] = ()
    worst: float | None = None
    worst_question: str = ""
    classes: Sequence[tuple[str, str]] = ()
    answers: Sequence[AnsweredWindow] = ()
    asked: str = ""
    """Model and questions of the VLM filter."""
    error: str = ""
    physics: ShownJudgement | None = None
    captions: list[CaptionedWindow] = field(default_factory=list)
    captioned: str = ""
    """Model and prompt of the captions."""
    captions_left: int = 0
    """Windows of captions that are not shown."""

    @property
    def first(self) -> ShownCaption | None:
        """The shortest caption of the first window that has a text."""
        texts = (c for window in self.captions for c in window.captions if c.text)
        return next(texts, None)

    def __bool__(self) -> bool:
        scores = (self.aesthetic, self.prompt_match, self.physics)
        texts = (self.content_type, self.status, self.error, self.captions)
        return any(texts) or any(score is not None for score in scores)

    @property
    def at_length(self) -> bool:
        """Whether there is more than fits on a card."""
        return bool(self.captions or self.status or self.error or self.physics)


def said(lake: Views, clip_ids: Sequence[str]) -> dict[str, Said]:
    """What models said of these clips, by clip; clips that no model saw are left out."""
    found = {clip_id: _of_clip(values) for clip_id, values in _clips(lake, clip_ids)}
    for clip_id, rows in _captions(lake, clip_ids).items():
        _add_captions(found.setdefault(clip_id, Said()), rows)
    return {clip_id: told for clip_id, told in found.items() if told}


def _clips(lake: Views, clip_ids: Sequence[str]) -> Iterable[tuple[str, dict[str, Any]]]:
    names = [name for name in _CLIP_COLUMNS if name in lake.columns["clips"]]
    if not names:
        return []
    select = ", ".join(quoted(name) for name in names)
    rows = lake.rows(
        f"SELECT clip_id, {select} FROM clips WHERE list_contains(?::VARCHAR[], clip_id)",
        [list(clip_ids)],
    )
    return [(row[0], dict(zip(names, row[1:], strict=True))) for row in rows]


def _of_clip(values: Mapping[str, Any]) -> Said:
    get = values.get
    return Said(
        content_type=word(get("content_type_label")),
        probability=number(get("content_type_probability")),
        aesthetic=number(get("aesthetic_mean")),
        prompt_match=number(get("prompt_match_mean")),
        prompt_margin=number(get("prompt_match_margin")),
        status=word(get("vlm_filter_status")),
        flags=words(get("vlm_filter_flags")),
        worst=number(get("vlm_filter_worst")),
        worst_question=word(get("vlm_filter_worst_question")),
        classes=_pairs(get("vlm_filter_classes")),
        answers=_answers(get(ANSWERS)),
        asked=joined(get("vlm_filter_model"), get("vlm_filter_prompt")),
        error=word(get("vlm_filter_error"), 300),
        physics=judgement(values),
    )


# --- captions ------------------------------------------------------------------------------------


def _captions(lake: Views, clip_ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    if "clip_id" not in lake.columns["captions"]:
        return {}
    select = ", ".join(lake.column("captions", name) for name in _CAPTION_COLUMNS)
    rows = lake.rows(
        f"SELECT clip_id, {select} FROM captions WHERE list_contains(?::VARCHAR[], clip_id)",
        [list(clip_ids)],
    )
    by_clip: dict[str, list[dict[str, Any]]] = {}
    for clip_id, *row in rows:
        by_clip.setdefault(clip_id, []).append(dict(zip(_CAPTION_COLUMNS, row, strict=True)))
    return by_clip


def _add_captions(told: Said, rows: Sequence[dict[str, Any]]) -> None:
    windows: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["window_number"] or 0, _place(row["length"]))):
        windows.setdefault(row["window_number"] or 0, []).append(row)
    for captions in list(windows.values())[:MOST_WINDOWS]:
        start_s, end_s = number(captions[0]["start_s"]), number(captions[0]["end_s"])
        told.captions.append(CaptionedWindow(start_s, end_s, [_caption(row) for row in captions]))
    told.captions_left = max(len(windows) - MOST_WINDOWS, 0)
    told.captioned = joined(rows[0]["model"], rows[0]["prompt"])


def _caption(row: Mapping[str, Any]) -> ShownCaption:
    return ShownCaption(
        length=word(row["length"]),
        status=word(row["status"]),
        text=word(row["text"], _LONGEST_CAPTION),
        flags=words(row["flags"]),
        error=word(row["error"], 500),
    )


def _place(length: str | None) -> int:
    return [*LENGTHS].index(length) if length in LENGTHS else len(LENGTHS)


# --- answers -------------------------------------------------------------------------------------


def _answers(text: Any) -> list[AnsweredWindow]:
    if not isinstance(text, str) or len(text) > _LONGEST_ANSWERS:
        return []
    try:
        records = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if not isinstance(records, list):
        return []
    windows = [record for record in records if isinstance(record, Mapping)]
    return [_answer(record) for record in windows[:MOST_WINDOWS]]


def _answer(record: Mapping[str, Any]) -> AnsweredWindow:
    text = word(record.get("text"), _LONGEST_ANSWER)
    status = word(record.get("status"))
    values = _object(text)
    told: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    classes = []
    for name, value in values.items():
        verdict = value.strip().lower()
        if name == EVIDENCE:
            continue
        if verdict in told:
            told[verdict].append(short(name, 60))
        else:
            classes.append((short(name, 60), short(value, 60)))
    readable = bool(values) and status in ("ok", "incomplete")
    frames = record.get("frames")
    return AnsweredWindow(
        start_s=number(record.get("start_s")),
        end_s=number(record.get("end_s")),
        status=status,
        yes=told["yes"] if readable else (),
        unsure=told["unsure"] if readable else (),
        no=told["no"] if readable else (),
        classes=classes if readable else (),
        evidence=values.get(EVIDENCE, "") if readable else "",
        raw="" if readable else text,
        problems=words(record.get("problems"), 200),
        error=word(record.get("error"), 500),
        frames=frames if isinstance(frames, int) else None,
    )


def _object(text: str) -> dict[str, str]:
    """The answers in the JSON object of a model's text; empty where there is none.

    For showing only: what counts was read by the operator, and is in the clip's columns.
    """
    try:
        found = json.loads(text[text.find("{") : text.rfind("}") + 1])
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str)}


# --- values --------------------------------------------------------------------------------------


def _pairs(values: Any) -> list[tuple[str, str]]:
    if not isinstance(values, Mapping):
        return []
    return [(short(str(k), 60), short(str(v), 60)) for k, v in list(values.items())[:30]]
