"""The report of an evaluation: one HTML page that loads nothing and runs nothing.

Captions, file names and the critic's own words come from outside and are never trusted.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from winnow.operators.critic.settings import CriticSettings
from winnow.operators.errors import MediaError, StorageError
from winnow.pipeline.critic import charts
from winnow.pipeline.critic.decoding import Decoders, strip
from winnow.pipeline.critic.literature import PUBLISHED, REMARK
from winnow.pipeline.critic.metrics import GOOD, LOWER_IS_BETTER
from winnow.pipeline.critic.results import FAILURES, Line, replace_file

EACH = 6
"""Examples of each kind."""
WORST = 10
"""Actions."""
LISTED = 12
"""Failures of each kind."""
LONGEST = 6000
"""Characters of a trace or caption that are shown."""
_SHOWN = (
    "metrics", "intervals", "baselines", "best_blind", "generators", "actions", "hard", "seeds",
    "coverage",
)  # fmt: skip
_LARGEST_STRIP = 200_000
_TEMPLATES = Path(__file__).parent / "templates"
_STYLE = Path(__file__).parents[1] / "templates" / "report.css"

FIGURES = {
    "accuracy": ("Exact accuracy", "the likeliest score is the truth; unjudged is wrong"),
    "within_one": ("Within one", "at most one score off; unjudged is wrong"),
    "mae": ("Mean absolute error", "of the expectation, in scores; lower is better"),
    "bias": ("Bias", "mean of score minus truth; above 0 the critic is too kind"),
    "pearson": ("Pearson", "of the expectation"),
    "pearson_argmax": ("Pearson of digits", "of the likeliest score: what others publish"),
    "spearman": ("Spearman", "of the expectation"),
    "kappa": ("Quadratic kappa", "of the likeliest score"),
    "bad.auroc": ("AUROC bad", "finding the truths 1 and 2 by the score"),
    "good.auroc": ("AUROC good", "finding the truths 4 and 5 by the score"),
    "bad.precision": ("Precision bad", "of those called 1 or 2"),
    "bad.recall": ("Recall bad", "of the truths 1 and 2"),
    "bad.f1": ("F1 bad", ""),
    "good.precision": ("Precision good", "of those called 4 or 5"),
    "good.recall": ("Recall good", "of the truths 4 and 5"),
    "good.f1": ("F1 good", ""),
    "rps": ("Ranked probability score", "of all five probabilities; lower is better"),
    "ece_good": ("Calibration error, good", "of P(4) + P(5); lower is better"),
    "ece_argmax": ("Calibration error, digit", "of the likeliest score; lower is better"),
}
"""What the table shows, in this order: title and meaning."""
CARDS = ("accuracy", "kappa", "spearman", "mae", "bad.auroc", "good.auroc")
COLUMNS = {"accuracy": "Exact", "within_one": "Within one", "mae": "Mean error", "bias": "Bias",
           "pearson": "Pearson", "kappa": "Kappa", "bad.auroc": "AUROC bad",
           "good.auroc": "AUROC good"}  # fmt: skip
"""Of the tables of subsets, with their headings."""
UNBEATABLE = ("bias", "ece_good", "ece_argmax", "bad.recall", "good.recall")
"""Figures that are perfect, or best, for somebody who has not looked."""


@dataclass(frozen=True, slots=True)
class Row:
    """A figure beside those of the judges that have not looked."""

    name: str
    title: str
    meaning: str
    value: float | None
    low: float | None
    high: float | None
    blind: Mapping[str, float | None]
    best_blind: float | None
    beats: bool | None
    """Whether the whole interval is better than the best of them; None where nothing can be said."""


@dataclass(frozen=True, slots=True)
class Card:
    """A video with what people and the critic said of it."""

    line: Line
    title: str
    link: str | None
    picture: str | None
    """Data URI of a JPEG."""


def write_report(
    out: Path,
    results: Mapping[str, Any],
    lines: Sequence[Line],
    settings: CriticSettings,
    *,
    timeout_s: float,
    decoders: int = 2,
) -> None:
    """Write the page. Raises StorageError."""
    chosen = examples(lines)
    pictures = _pictures({ln.video for lns in chosen.values() for ln in lns}, settings,
                         timeout_s, decoders)  # fmt: skip
    page = render(results, lines, chosen, pictures, out.parent)
    try:
        replace_file(out, page)
    except OSError as error:
        raise StorageError(
            f"the report cannot be written to {out}: {error.strerror or error}; choose another "
            "place with --out"
        ) from error


def examples(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The worst disagreements both ways, and others by chance (always the same); none twice."""
    scored = [(line.score - line.truth, line) for line in lines if line.score is not None]
    by_error = sorted(scored, key=lambda pair: (pair[0], pair[1].example_id))
    harsh = [line for error, line in by_error[:EACH] if error < 0]
    kind = [line for error, line in by_error[::-1][:EACH] if error > 0]
    shown = {line.example_id for line in (*harsh, *kind)}
    rest = [line for _, line in scored if line.example_id not in shown]
    rest.sort(key=lambda line: hashlib.sha256(line.example_id.encode("utf-8", "replace")).digest())
    return {"kind": kind, "harsh": harsh, "chance": rest[:EACH]}


def _pictures(
    videos: Iterable[str | None], settings: CriticSettings, timeout_s: float, decoders: int
) -> dict[str, str]:
    """Data URIs by video, of those that can be decoded."""
    found = {}
    there = sorted(video for video in videos if video is not None and Path(video).is_file())
    with Decoders(min(decoders, len(there)), timeout_s) as children:
        pending = [(video, children.submit(strip, Path(video), settings)) for video in there]
        for video, waiting in pending:
            try:
                jpeg = waiting.result()
            except MediaError:
                continue
            if jpeg is not None and len(jpeg) <= _LARGEST_STRIP:
                found[video] = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    return found


def render(
    results: Mapping[str, Any],
    lines: Sequence[Line],
    chosen: Mapping[str, Sequence[Line]],
    pictures: Mapping[str, str],
    folder: Path,
) -> str:
    """The page as text; links to videos are relative to `folder`."""
    metrics = results["metrics"]
    return (
        _environment()
        .get_template("evaluation.html")
        .render(
            results=results,
            metrics=metrics,
            rows=rows(results),
            cards=CARDS,
            columns=COLUMNS.items(),
            examples={k: [_card(ln, pictures, folder) for ln in v] for k, v in chosen.items()},
            failed=_failed(lines),
            worst_actions=worst(results["actions"]),
            distribution=charts.distribution(metrics["truth_counts"], metrics["predicted_counts"]),
            expectations=charts.expectations([ln.score for ln in lines if ln.score is not None]),
            reliability=[
                ("P(4) + P(5)", f"that people say {GOOD} or more", "reliability_good"),
                ("P(likeliest score)", "that people say the same", "reliability_argmax"),
            ],
            record=json.dumps({k: v for k, v in results.items() if k not in _SHOWN}, indent=2),
            published=PUBLISHED,
            published_remark=REMARK,
            on_test_set=_is_test_set(results),
            geometry=charts,
            style=Markup(_STYLE.read_text("utf-8") + (_TEMPLATES / "evaluation.css").read_text()),
        )
    )


def rows(results: Mapping[str, Any]) -> list[Row]:
    """The table of figures."""
    found = []
    for name, (title, meaning) in FIGURES.items():
        value: Any = results["metrics"]
        for part in name.split("."):
            value = value[part]
        interval = results["intervals"].get(name) or {}
        low, high = interval.get("low"), interval.get("high")
        blind = {key: one.get(name) for key, one in results["baselines"].items()}
        best = None if name in UNBEATABLE else results["best_blind"].get(name)
        beats = None
        if best is not None and low is not None and high is not None:
            beats = high < best if name in LOWER_IS_BETTER else low > best
        found.append(Row(name, title, meaning, value, low, high, blind, best, beats))
    return found


def worst(actions: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The actions with the largest mean error, of those with enough videos if there are any."""
    named = [one for one in actions if one["label"] is not None and one["mae"] is not None]
    large = [one for one in named if not one["is_small"]] or named
    return sorted(large, key=lambda one: (-one["mae"], one["label"]))[:WORST]


def _failed(lines: Sequence[Line]) -> list[tuple[str, int, list[Line]]]:
    found = []
    for status in FAILURES:
        those = [line for line in lines if line.status == status]
        if those:
            found.append((status, len(those), those[:LISTED]))
    return found


def _card(line: Line, pictures: Mapping[str, str], folder: Path) -> Card:
    title = Path(line.video).name if line.video else line.uri
    return Card(line, title, link(line.video, folder), pictures.get(line.video or ""))


def link(video: str | None, folder: Path) -> str | None:
    """A relative address of a local file: whatever its name is, it leads nowhere else."""
    if video is None or not Path(video).is_file():
        return None
    path = os.path.relpath(video, folder.absolute())
    return quote(f"./{path}" if not path.startswith(".") else path, errors="surrogateescape")


def _is_test_set(results: Mapping[str, Any]) -> bool:
    name, chosen = str(results.get("dataset", "")), results["coverage"]["chosen"]
    return "videophy2" in name.replace("-", "").lower() and "test" in name and chosen > 3300


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(figure=figure, percent=percent, capped=capped)
    return environment


def figure(value: float | None, digits: int = 3) -> str:
    """A number with a true minus, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share * 100:.1f} %"


def capped(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
