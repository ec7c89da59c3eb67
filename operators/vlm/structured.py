"""Reads the one JSON object that a model was asked for out of what it wrote.

A fence, a thinking part or prose around the object is tolerated, because models write them whatever
they are told. Nothing is repaired: what is not JSON, what stands twice and differs, and what is not
among the legal answers is reported and yields no value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_CHARACTERS = 100_000
_SHOWN = 40
_MOST_PROBLEMS = 20
_OBJECT_BEGINS = re.compile(r'\{\s*["}]')
_NOT_JSON = object()
_ABSENT = object()
_TWICE = object()

Fields = Mapping[str, Sequence[str] | None]
"""The keys of the object and the legal answers to each; None where any text is legal."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read."""

    values: dict[str, str] | None
    """Legal answers by key, choices spelt as declared; None where no object could be read."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with the text, for people. A missing key is one where it was not optional."""


def object_schema(fields: Fields, optional: Collection[str] = ()) -> dict[str, Any]:
    """The JSON schema of an object with these fields and no others."""
    properties: dict[str, Any] = {
        key: {"type": "string"} | ({} if legal is None else {"enum": list(legal)})
        for key, legal in fields.items()
    }
    return {
        "type": "object",
        "properties": properties,
        "required": [key for key in fields if key not in optional],
        "additionalProperties": False,
    }


def read_object(text: str, fields: Fields, optional: Collection[str] = ()) -> Reading:
    """The object with these fields in a model's answer.

    Choices are compared without regard to case and outer spaces. Several objects are accepted only
    where they are equal: nobody can say which one was meant.
    """
    if len(text) > MOST_CHARACTERS:
        return Reading(None, [f"the answer is longer than {MOST_CHARACTERS} characters"])
    _, thought, rest = text.rpartition("</think>")
    if not thought and "<think>" in text:
        return Reading(None, ["the answer ends while the model is thinking"])
    objects = _objects(rest)
    if _NOT_JSON in objects:
        return Reading(None, ["what looks like a JSON object is not valid JSON"])
    if not objects:
        return Reading(None, ["there is no JSON object"])
    if any(found != objects[0] for found in objects[1:]):
        return Reading(None, [f"there are {len(objects)} different JSON objects"])
    return _checked(objects[0], fields, optional)


def _objects(text: str) -> list[Any]:
    """Every JSON object in a text that lies in no other; [_NOT_JSON] where one is broken."""
    # Line breaks inside of strings are let pass: models write them, and they mean no harm.
    decoder = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_no_constant, strict=False)
    found: list[Any] = []
    # Other braces are prose.
    begin = _OBJECT_BEGINS.search(text)
    while begin is not None:
        try:
            value, end = decoder.raw_decode(text, begin.start())
        except (ValueError, RecursionError):
            # Objects inside a broken one are not what was asked for: look no further.
            return [_NOT_JSON]
        found.append(value)
        begin = _OBJECT_BEGINS.search(text, end)
    return found


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        result[key] = value if key not in result or result[key] == value else _TWICE
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _checked(found: dict[str, Any], fields: Fields, optional: Collection[str]) -> Reading:
    values: dict[str, str] = {}
    problems = [f"{_shown(key)} was not asked for" for key in found if key not in fields]
    for key, legal in fields.items():
        value = found.get(key, _ABSENT)
        if value is _ABSENT:
            if key not in optional:
                problems.append(f"{key} is missing")
        elif value is _TWICE:
            problems.append(f"{key} stands twice, with different answers")
        elif not isinstance(value, str):
            problems.append(f"{key} is {type(value).__name__}, not a text")
        elif legal is None:
            values[key] = value
        else:
            by_case = {choice.casefold(): choice for choice in legal}
            choice = by_case.get(value.strip().casefold())
            if choice is None:
                problems.append(f"{key} is {_shown(value)}, which is no choice")
            else:
                values[key] = choice
    return Reading(values, problems[:_MOST_PROBLEMS])


def _shown(text: str) -> str:
    return ascii(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")
