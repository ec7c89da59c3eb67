"""Values on their way from the lake to the page: cut short, without secrets, ready for JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile(
    r"secret|token|password|passwd|credential|(access|api|account|private|signing)_?key|sas\b", re.I
)


def share(part: float, whole: float) -> float:
    """`part` of `whole`, 0 of nothing."""
    return part / whole if whole else 0.0


def short(text: str, longest: int) -> str:
    """Cut to `longest` characters, the cut shown."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def file_name(uri: str) -> str:
    """The last part of a URI."""
    return short(uri.rstrip("/").rsplit("/", 1)[-1], 200)


def plain(value: Any) -> Any:
    """A value for JSON: short numbers, no NaN."""
    if value is None or isinstance(value, bool | str | int):
        return value
    number = float(value)
    return float(f"{number:.5g}") if math.isfinite(number) else str(number)


def number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    usable = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if usable else None


def word(value: Any, longest: int = 100) -> str:
    """A text cut to `longest` characters, empty for anything else."""
    return short(value, longest) if isinstance(value, str) else ""


def words(values: Any, longest: int = 60) -> list[str]:
    """The texts of a list, 30 at most, each cut to `longest` characters; empty for no list."""
    if not isinstance(values, list):
        return []
    return [short(value, longest) for value in values[:30] if isinstance(value, str)]


def joined(*texts: Any) -> str:
    """The texts that are there, with commas between."""
    return ", ".join(short(text, 200) for text in texts if isinstance(text, str) and text)


def from_json(value: Any) -> Any:
    """What a JSON text holds; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def without_secrets(value: Any) -> Any:
    """A configuration that can be shown: a report is passed around more freely than a config."""
    if isinstance(value, Mapping):
        return {
            str(k): "(hidden)" if _SECRET.search(str(k)) and v else without_secrets(v)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(v) for v in value]
    return without_password(value) if isinstance(value, str) else value


def without_password(text: str) -> str:
    """A URI without the user and password before its host."""
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1", text)
