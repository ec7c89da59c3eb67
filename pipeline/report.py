"""`winnow report`: one HTML page over a lake that can be mailed, archived and opened offline.

The page holds everything it needs, and a content security policy forbids it to load or run anything
else: prompts, file names and error texts come from outside and are never trusted.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import duckdb
import jinja2
from markupsafe import Markup

from winnow.operators.errors import StorageError
from winnow.pipeline import report_charts
from winnow.pipeline.report_charts import number_text
from winnow.pipeline.report_facts import Facts, gather
from winnow.pipeline.report_rules import RuleShown, simple_threshold

__all__ = ["RuleShown", "simple_threshold", "write_report"]

_TEMPLATES = Path(__file__).parent / "templates"
# A strip of four small frames weighs about 15 kB; what weighs more than this is no thumbnail.
_LARGEST_THUMBNAIL = 96 * 1024
_LARGEST_CONFIG = 40_000


def write_report(
    connection: duckdb.DuckDBPyConnection,
    rules: Sequence[RuleShown],
    out: Path,
    *,
    title: str,
    clips_per_gallery: int = 60,
) -> None:
    """Write the report of the lake whose views `connection` has to the file `out`.

    `rules` are the policy's rules in its order, `title` heads the page (the lake's URI, or a name).
    Of rejected, duplicate, kept and unmeasured clips at most `clips_per_gallery` each are shown;
    all figures are of the whole lake.

    Raises LakeError where a view is missing, StorageError where `out` cannot be written.
    """
    facts = gather(connection, rules, clips_per_gallery=clips_per_gallery)
    page = render(facts, title)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _replace(out, page)
    except OSError as error:
        raise StorageError(
            f"the report cannot be written to {out}: {error.strerror or error}; "
            "choose another place with --out"
        ) from error


def render(facts: Facts, title: str) -> str:
    """The page as text."""
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    config = facts.runs[0].config if facts.runs else None
    return (
        _environment()
        .get_template("report.html")
        .render(
            facts=facts,
            title=title,
            run=facts.runs[0] if facts.runs else None,
            config=_short_json(config),
            # Only the script with this hash may run, whatever a prompt manages to look like.
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
            geometry=report_charts,
            winnow_version=_version(),
        )
    )


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        count=_count,
        percent=_percent,
        span=_span,
        size=_size,
        rate=_rate,
        value=_value,
        picture=_picture,
    )
    return environment


def _replace(out: Path, page: str) -> None:
    """Write beside, then rename: who has the old report open never sees half a page."""
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part")
    beside = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n", errors="replace") as file:
            file.write(page)
        beside.chmod(0o644)
        beside.replace(out)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _version() -> str:
    try:
        return version("winnow-video")
    except PackageNotFoundError:
        return ""


def _short_json(config: Any) -> str:
    if config is None:
        return ""
    text = config if isinstance(config, str) else json.dumps(config, indent=2, ensure_ascii=False)
    return text if len(text) <= _LARGEST_CONFIG else text[:_LARGEST_CONFIG] + "\n…"


# --- filters of the template ---------------------------------------------------------------------


def _count(number: float | None) -> str:
    return "–" if number is None else f"{number:,.0f}"


def _percent(share: float | None) -> str:
    """A share as per cent that says 0 and 100 only where it is exactly that."""
    if share is None:
        return "–"
    if 0 < share < 0.001:
        return "<0.1 %"
    if 0.999 < share < 1:
        return ">99.9 %"
    return f"{share * 100:.0f} %" if share in (0, 1) else f"{share * 100:.1f} %"


def _span(seconds: float | None) -> str:
    """A length of time in the unit a person would choose."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds >= 3600:
        hours = seconds / 3600
        return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.1f} h"
    if seconds >= 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.1f} s" if seconds >= 1 or seconds == 0 else f"{seconds:.2f} s"


def _size(size: float | None) -> str:
    if size is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"


def _rate(amount: float | None, seconds: float | None) -> str:
    # A rate over a few milliseconds is noise.
    if not amount or not seconds or seconds < 0.01:
        return "–"
    return number_text(amount / seconds)


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number_text(float(value)) if not isinstance(value, str) else value


def _picture(jpeg: bytes | None) -> dict[str, Any] | None:
    """A strip for the page: data URI and size, or None where it is missing or is no JPEG."""
    if jpeg is None or len(jpeg) > _LARGEST_THUMBNAIL or not jpeg.startswith(b"\xff\xd8\xff"):
        return None
    size = _jpeg_size(jpeg)
    if size is None:
        return None
    width, height = size
    return {
        "uri": "data:image/jpeg;base64," + base64.b64encode(jpeg).decode(),
        "width": width,
        "height": height,
        # Four frames in a row would be tiny on a card of 16:9: they are folded into two rows,
        # but for narrow portraits, which are larger side by side.
        "folded": width > 3.6 * height,
        "broad": width / 4 > 16 / 9 * height,
    }


def _jpeg_size(jpeg: bytes) -> tuple[int, int] | None:
    """(width, height) from the first start-of-frame segment."""
    at = 2
    while at + 9 < len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = int.from_bytes(jpeg[at + 5 : at + 7], "big")
            width = int.from_bytes(jpeg[at + 7 : at + 9], "big")
            return (width, height) if width and height else None
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return None
