"""Prompts for captions: one file a domain, rendered for one window, and the reading of the answer.

A domain's file stands over configs/prompts/captions/general.yaml, key by key. What a sidecar says of
a video is untrusted: it goes into the prompt as one marked, capped line each, without control
characters and without anything that a chat template could take for its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Any, Literal, get_args

from pydantic import Field, field_validator
from pydantic_core import from_json

from winnow.operators.settings import Strict, find_config, parse_yaml, validate
from winnow.operators.vlm.structured import object_schema, read_object
from winnow.operators.vlm.untrusted import clean, harmless

Length = Literal["short", "medium", "long"]
LENGTHS: tuple[Length, ...] = get_args(Length)
"""From short to long: a truncated answer then loses the longest caption, not all of them."""

FOLDER = "prompts/captions"

_REQUIRED = {"lengths", "answer"}
_PLACES = {*_REQUIRED, "start", "end", "duration", "focus", "attend", "record"}
_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True, slots=True)
class Given:
    """One line of the record: what the sidecar says of the video, made harmless."""

    title: str
    text: str


class Recorded(Strict):
    """What to look for in a sidecar, and how to name it to the model."""

    title: str = Field(description="what the model is told that this is")
    keys: tuple[str, ...] = Field(
        min_length=1,
        description="keys of the sidecar's JSON, the first that is there; `prompt` is the "
        "generation prompt, wherever the sidecar has it",
    )


class CaptionPrompts(Strict):
    """How captions of one domain are asked for."""

    name: str
    description: str = ""
    system: str
    user: str = Field(
        description="with $start, $end, $duration (s), $focus, $attend, $record, $lengths, $answer"
    )
    record_intro: str = Field(description="stands before the record, where there is one")
    focus: str = Field(description="what kind of video this is, in a sentence or two")
    attend: tuple[str, ...] = Field(min_length=1, description="what to look for")
    record: tuple[Recorded, ...] = Field((), description="metadata to put into the prompt")
    lengths: dict[Length, str] = Field(description="what each length is to be")

    @field_validator("user")
    @classmethod
    def _renders(cls, user: str) -> str:
        template = Template(user)
        if not template.is_valid():
            raise ValueError("not a valid template: write a dollar sign as $$")
        names = set(template.get_identifiers())
        if unknown := names - _PLACES:
            raise ValueError(f"unknown place ${', $'.join(sorted(unknown))}")
        if missing := _REQUIRED - names:
            raise ValueError(f"the place ${', $'.join(sorted(missing))} is missing")
        return user

    @field_validator("lengths")
    @classmethod
    def _every_length(cls, lengths: dict[Length, str]) -> dict[Length, str]:
        if missing := [length for length in LENGTHS if length not in lengths]:
            raise ValueError(f"no words on {', '.join(missing)}")
        return lengths

    @classmethod
    def read(cls, name: str) -> CaptionPrompts:
        """The prompts of a domain, by name or by path to a file. Raises ConfigError."""
        content: dict[str, Any] = {}
        for source in dict.fromkeys(("general", name)):
            text, origin = find_config(source, FOLDER)
            # A file over the general one has a name of its own.
            content.pop("name", None)
            content |= parse_yaml(text, origin)
        return validate(cls, content, origin)

    @property
    def identity(self) -> str:
        """Name and hash: two captions with the same were asked for in the same words."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return f"{self.name}@{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def given(self, prompt: str | None, fields: str | None) -> list[Given]:
        """What of a sidecar goes into the prompt: its generation prompt and its JSON text."""
        known = _fields(fields)
        if prompt is not None:
            known["prompt"] = prompt
        lines = []
        for recorded in self.record:
            texts = (_text(known.get(key)) for key in recorded.keys)
            if text := next((found for found in texts if found), ""):
                lines.append(Given(recorded.title, text))
        return lines

    def render(
        self,
        lengths: Sequence[Length],
        given: Sequence[Given],
        start_s: float,
        end_s: float,
        duration_s: float,
    ) -> str:
        """The user's turn for one window, [start_s, end_s) of a clip of `duration_s`."""
        record = "\n".join(f"{line.title}: {line.text}" for line in given)
        if record:
            record = f"{self.record_intro.strip()}\n<record>\n{record}\n</record>\n"
        text = Template(self.user).substitute(
            start=f"{start_s:.1f}",
            end=f"{end_s:.1f}",
            duration=f"{duration_s:.1f}",
            focus=self.focus.strip(),
            attend="\n".join(f"- {point}" for point in self.attend),
            record=record,
            lengths="\n".join(f"- {length}: {self.lengths[length].strip()}" for length in lengths),
            answer=json.dumps(dict.fromkeys(lengths, "...")),
        )
        return re.sub(r"\n{3,}", "\n\n", text).strip()


def answer_schema(lengths: Sequence[Length]) -> dict[str, Any]:
    """JSON schema of an answer with one caption a length, in this order."""
    return object_schema(dict.fromkeys(lengths))


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions of one answer."""

    texts: dict[Length, str]
    """By length; those that are not there are left out."""
    problem: str | None = None
    """What is wrong with the answer."""
    open: Length | None = None
    """The length of the caption in whose middle a truncated answer ends."""


def read_answer(text: str, lengths: Sequence[Length]) -> Captions:
    """The captions in a whole answer. Line breaks inside JSON strings, which JSON forbids and models
    write, are put up with."""
    reading = read_object(_CONTROL.sub(" ", text), dict.fromkeys(lengths))
    found = reading.values or {}
    texts = {length: clean(found[length]) for length in lengths if length in found}
    return Captions(texts, "; ".join(reading.problems) or None)


def read_truncated(text: str, lengths: Sequence[Length]) -> Captions:
    """The captions in an answer that broke off: those before the end are whole, one may be open."""
    text = _CONTROL.sub(" ", text.rpartition("</think>")[2])
    text = text[max(0, text.find("{")) :]
    try:
        closed = from_json(text, allow_partial=True)
        begun = from_json(text, allow_partial="trailing-strings")
    except ValueError as error:
        return Captions({}, f"the answer broke off before there was a caption: {error}")
    if not isinstance(begun, dict):
        return Captions({}, "the answer broke off and is no JSON object")
    texts = {n: clean(caption) for n in lengths if isinstance(caption := begun.get(n), str)}
    return Captions(texts, open=next((length for length in texts if length not in closed), None))


def _fields(text: str | None) -> dict[str, Any]:
    try:
        fields = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _text(value: Any) -> str:
    """A scalar, or a list of scalars such as the steps of a task."""
    if isinstance(value, str | int | float | bool):
        return harmless(str(value))
    if isinstance(value, list):
        return harmless("; ".join(str(v) for v in value[:100] if isinstance(v, str | int | float)))
    return ""
