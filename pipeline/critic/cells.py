"""What a cell of a sheet says: a score, a truth value, a list of physical rules."""

from __future__ import annotations

import ast
import math
import re
from typing import Any, Literal

Scale = Literal["1-5", "0-1", "auto"]

_MOST_RULES = 50_000
"""Characters of a cell of rules; those of VideoPhy-2 have up to some thousand."""
_NO_RULES = re.compile(r"\[\s*nan\s*\]|nan", re.IGNORECASE)


def read_number(value: Any) -> float | str | None:
    """A finite number, None for an empty cell, or the text that is neither."""
    if value is None:
        return None
    if isinstance(value, bool | int | float):
        number = float(value)
    else:
        text = str(value).strip()
        if text.casefold() in ("", "nan", "none", "null", "n/a", "na"):
            return None
        if text.casefold() in ("true", "false"):
            return float(text.casefold() == "true")
        try:
            number = float(re.sub(r"^(\d+),(\d+)$", r"\1.\2", text))
        except ValueError:
            return text
    if math.isnan(number):
        return None
    return number if math.isfinite(number) else str(value)


def scaled(number: float, scale: Scale) -> float | None:
    """The score from 1 to 5; None where it is not on the scale."""
    if scale == "0-1":
        return 1 + 4 * number if 0 <= number <= 1 else None
    return number if 1 <= number <= 5 else None


def read_truth_value(value: Any) -> bool | None:
    """0 and 1, true and false, yes and no; None for anything else."""
    number = read_number(value)
    if isinstance(number, float):
        return number != 0
    return {"yes": True, "no": False}.get(str(number).casefold())


def read_rules(value: Any, as_map: bool) -> tuple[Any, str | None]:
    """(rules, note) of a cell that holds a Python literal. It is read, never run."""
    if value is None:
        return None, None
    text = str(value)
    if _NO_RULES.fullmatch(text):
        return None, f"{text}: the rules are not known"
    if len(text) > _MOST_RULES:
        return None, f"{len(text)} characters are no list of rules"
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None, f"this is no list of rules: {text!r:.60}"
    if as_map and isinstance(found, dict):
        laws = {rule: [law] if isinstance(law, str) else law for rule, law in found.items()}
        if all(isinstance(rule, str) and _is_texts(law) for rule, law in laws.items()):
            return laws, None
    elif not as_map and _is_texts(found):
        return found, None
    return None, f"this is no {'map' if as_map else 'list'} of rules: {text!r:.60}"


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
