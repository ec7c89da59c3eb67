"""Reads the score out of what a model wrote. What is not clearly one score is none: nothing is guessed.

The published scripts guess: the first digit anywhere, so that the echo `[Score between 1 and 5.]` is
a 1 and `100000` a 1 or a 0, and 0 where there is none. Such scores are worse than none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MOST_CHARACTERS = 100_000

_SCORE = re.compile(r"([1-5])\.?")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_OBJECT_BEGINS = re.compile(r'\{\s*"')
_KEY = "score"


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read: a score, or why there is none."""

    score: int | None = None
    problem: str | None = None


def read_score(text: str) -> Reading:
    """The one score, 1 to 5, that an answer holds after its thinking part, if it has one.

    A score is a line that is nothing but its digit (a full stop may follow), `<answer>2</answer>`,
    or the integer `score` of a JSON object. Several are accepted where they are equal. Whatever is
    put in the place of a score and is none makes the answer unreadable.
    """
    if len(text) > MOST_CHARACTERS:
        return Reading(problem=f"the answer is longer than {MOST_CHARACTERS} characters")
    _, _, said = text.rpartition("</think>")
    if "<think>" in said:
        return Reading(problem="the answer ends while the model is thinking")
    given = [_score_of(inside) for inside in _ANSWER.findall(said)]
    said = _ANSWER.sub("\n", said)
    if "<answer>" in said or "</answer>" in said:
        return Reading(problem="an answer's tag is not closed, or was not opened")
    prose = []
    for piece in _pieces(said):
        if isinstance(piece, str):
            prose.append(piece)
        elif _KEY in piece:
            given.append(_score_in(piece[_KEY]))
    lines = (_score_of(line) for line in "\n".join(prose).split("\n"))
    given += [score for score in lines if score is not None]
    if None in given:
        return Reading(problem="what stands in the place of the score is none from 1 to 5")
    different = sorted({score for score in given if score is not None})
    if not different:
        return Reading(problem="there is no score")
    if len(different) > 1:
        return Reading(problem=f"there are several scores: {', '.join(map(str, different))}")
    return Reading(different[0])


def _score_of(text: str) -> int | None:
    found = _SCORE.fullmatch(text.strip())
    return int(found[1]) if found else None


def _score_in(value: Any) -> int | None:
    """Of a JSON value: an integer, or a text that is one; neither 3.7 nor true."""
    if isinstance(value, str):
        return _score_of(value)
    return _score_of(str(value)) if type(value) is int else None


def _pieces(text: str) -> Iterator[str | dict[str, Any]]:
    """Prose and JSON objects, in order; braces that open no object are prose."""
    decoder = json.JSONDecoder(object_pairs_hook=_pairs)
    start = 0
    while begin := _OBJECT_BEGINS.search(text, start):
        try:
            found, end = decoder.raw_decode(text, begin.start())
        except (ValueError, RecursionError):
            end, found = begin.end(), text[begin.start() : begin.end()]
        yield text[start : begin.start()]
        yield found
        start = end
    yield text[start:]


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object; a key that stands twice with different values has none of them."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        result[key] = value if key not in result or result[key] == value else None
    return result
