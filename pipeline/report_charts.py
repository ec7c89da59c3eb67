"""The geometry of the report's charts: where bins, ticks and thresholds lie, and what bars draw.

The charts are plain SVG that the page styles with its own colours, so they follow light and dark,
weigh a few kilobytes and need no library in the browser.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from winnow.pipeline.report_rules import Comparison

Verdict = Literal["keep", "duplicate", "reject", "error", "undecided"]

VERDICTS: tuple[Verdict, ...] = ("keep", "duplicate", "reject", "error", "undecided")
"""Order in which stacks are drawn, from the ground up."""

# --- bins ----------------------------------------------------------------------------------------

BINS = 36
_LOG_SPAN = 150.0


@dataclass(frozen=True, slots=True)
class Spread:
    """What must be known of a column before it can be binned. Quantiles are of finite values."""

    low: float
    """0.5 % quantile."""
    high: float
    """99.5 % quantile."""
    minimum: float
    maximum: float
    whole: bool
    """True where every value is a whole number."""


@dataclass(frozen=True, slots=True)
class Binning:
    """Bins of equal width on a linear or logarithmic axis; bin k spans origin + k..k+1 steps.

    A threshold lies on an edge, and the edge belongs to the side that the rule puts it on, so that
    no bin mixes what a threshold parts. Values beyond the first and last bin are counted in them.
    """

    origin: float
    step: float
    first: int
    last: int
    log: bool = False
    right_closed: bool = False
    whole: bool = False

    def sql(self, column: str) -> str:
        """SQL for the bin number of a quoted, finite column."""
        value = f"ln({column})" if self.log else f"{column}::DOUBLE"
        place = f"({value} - ({self.origin!r})) / {self.step!r}"
        bin_number = f"ceil({place}) - 1" if self.right_closed else f"floor({place})"
        return f"least(greatest({bin_number}, {self.first}), {self.last})::INTEGER"

    def edge(self, number: int) -> float:
        value = self.origin + number * self.step
        return math.exp(value) if self.log else value

    def place(self, value: float) -> float:
        """Where a value lies on the axis, 0 at its left and 1 at its right end."""
        value = math.log(value) if self.log else value
        return (value - self.origin - self.first * self.step) / (
            (self.last - self.first + 1) * self.step
        )


def binning(spread: Spread, marks: Sequence[Comparison]) -> Binning:
    """Choose bins for a column whose thresholds are `marks`."""
    low, high = spread.low, spread.high
    if high <= low:
        low, high = spread.minimum, spread.maximum
    if spread.whole and high - low <= BINS:
        near = [m.threshold for m in marks if low - 3 <= m.threshold <= high + 3]
        first = math.floor(min([low, *near]))
        # Never one bar as wide as the chart.
        last = max(math.ceil(max([high, *near])), first + 3)
        return Binning(origin=-0.5, step=1.0, first=first, last=last, whole=True)
    log = spread.minimum > 0 and low > 0 and high / low > _LOG_SPAN
    inside = [m for m in marks if not log or m.threshold > 0]

    def scaled(value: float) -> float:
        return math.log(value) if log else value

    start, stop = scaled(low), scaled(high)
    width = stop - start or abs(start) * 0.1 or 1.0
    # A threshold far from all values stays off the axis rather than squeeze them into one bin.
    near = [
        m.threshold
        for m in inside
        if start - 0.75 * width <= scaled(m.threshold) <= stop + 0.75 * width
    ]
    start = min([start, *(scaled(t) - 0.04 * width for t in near)])
    stop = max([stop, *(scaled(t) + 0.04 * width for t in near)])
    step = (stop - start) / BINS if log else _nice((stop - start) / BINS, whole=spread.whole)
    origin, right_closed = (0.0 if not log else start), False
    if near:
        mark = next(m for m in inside if m.threshold in near)
        origin = scaled(mark.threshold)
        right_closed = (mark.side == "above") != mark.inclusive
    elif not log and not spread.whole:
        origin = math.floor(start / step) * step
    first = math.floor((start - origin) / step + 1e-9)
    last = max(math.ceil((stop - origin) / step - 1e-9) - 1, first)
    return Binning(origin, step, first, last, log, right_closed)


def _nice(step: float, *, whole: bool = False) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    nice = next(
        (factor * power for factor in factors if factor * power >= step * 0.999), 10 * power
    )
    return max(nice, 1.0) if whole else nice


def ticks(bins: Binning) -> list[float]:
    """Three to six round values along the axis."""
    low, high = bins.edge(bins.first), bins.edge(bins.last + 1)
    if bins.log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [10.0**p for p in powers if low <= 10.0**p <= high]
        if len(found) < 3:
            found = [f * 10.0**p for p in powers for f in (1, 3) if low <= f * 10.0**p <= high]
        return found[:: math.ceil(len(found) / 5)]
    if bins.whole:
        low, high = low + 0.5, high - 0.5
    step = _nice(max(high - low, 1.0) / 4 if bins.whole else (high - low) / 5, whole=bins.whole)
    start = math.ceil(low / step - 1e-9)
    return [k * step + 0.0 for k in range(start, math.floor(high / step + 1e-9) + 1)]


# --- the drawing ---------------------------------------------------------------------------------

WIDTH, HEIGHT = 360.0, 138.0
LEFT, RIGHT, TOP, GROUND = 4.0, 356.0, 22.0, 116.0
_LABEL_WIDTH = 64.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A threshold on the axis: the line, its label, and the tinted side that the rule rejects."""

    x: float
    label: str
    anchor: Literal["start", "end"]
    row: int
    shade_x: float
    shade_width: float
    alone: bool


@dataclass(frozen=True, slots=True)
class Cut:
    """A bar that towers over all others is cut short, and its count is written beside it."""

    left: float
    right: float
    count: int
    label_x: float
    anchor: Literal["start", "end"]


@dataclass(frozen=True, slots=True)
class Chart:
    """A stacked histogram, ready to be drawn in a box of WIDTH x HEIGHT."""

    paths: Mapping[str, str]
    """SVG path by verdict."""
    marks: Sequence[Mark]
    off_axis: Sequence[str]
    """Thresholds that lie beyond the axis, in words."""
    ticks: Sequence[tuple[float, str]]
    cut: Cut | None
    hover: Sequence[tuple[str, Mapping[str, int]]]
    """Per bin, left to right: its range in words, its counts by verdict."""
    log: bool = False


def chart(
    bins: Binning, counts: Mapping[int, Mapping[str, int]], marks: Sequence[Comparison]
) -> Chart:
    """Draw counts (bin number -> verdict -> clips) with the thresholds on them."""
    number = bins.last - bins.first + 1
    pitch = (RIGHT - LEFT) / number
    gap = min(1.0, pitch * 0.15) if not bins.whole or number > 24 else min(6.0, pitch * 0.2)
    totals = [sum(counts.get(k, {}).values()) for k in range(bins.first, bins.last + 1)]
    top, cut_at = _ceiling(totals)
    paths: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for index, total in enumerate(totals):
        here = counts.get(bins.first + index, {})
        scale = (GROUND - TOP - 2) * min(total, top) / top / total if total else 0.0
        ground = GROUND
        for verdict in VERDICTS:
            height = here.get(verdict, 0) * scale
            if height <= 0:
                continue
            # A single clip among thousands must still be seen.
            height = max(height, 0.8)
            x = LEFT + index * pitch + gap / 2
            paths[verdict].append(f"M{x:.1f} {ground:.1f}h{pitch - gap:.1f}v{-height:.1f}H{x:.1f}z")
            ground -= height
    cut = None
    if cut_at is not None:
        left, right = LEFT + cut_at * pitch, LEFT + (cut_at + 1) * pitch
        room = right + _LABEL_WIDTH / 2 < RIGHT
        cut = Cut(
            left, right, totals[cut_at], right + 4 if room else left - 4, "start" if room else "end"
        )
    drawn, off_axis = _marks(bins, marks)
    return Chart(
        paths={verdict: "".join(path) for verdict, path in paths.items() if path},
        marks=drawn,
        off_axis=off_axis,
        ticks=[(_x(bins, t), number_text(t)) for t in ticks(bins)],
        cut=cut,
        hover=[
            (_range_text(bins, k), dict(counts.get(k, {})))
            for k in range(bins.first, bins.last + 1)
        ],
        log=bins.log,
    )


def _x(bins: Binning, value: float) -> float:
    return LEFT + (RIGHT - LEFT) * bins.place(value)


def _ceiling(totals: Sequence[int]) -> tuple[int, int | None]:
    """Height of the axis, and the one bar that is cut short because it hides the others."""
    ordered = sorted(totals, reverse=True)
    if len(ordered) > 2 and ordered[1] > 0 and ordered[0] > 4 * ordered[1]:
        return max(round(ordered[1] * 1.6), 1), list(totals).index(ordered[0])
    return max(ordered[0] if ordered else 1, 1), None


def _marks(bins: Binning, marks: Sequence[Comparison]) -> tuple[list[Mark], list[str]]:
    drawn: list[Mark] = []
    off_axis: list[str] = []
    for mark in sorted(set(marks), key=lambda m: m.threshold):
        words = mark.words
        if bins.log and mark.threshold <= 0:
            off_axis.append(words)
            continue
        value = mark.threshold
        if bins.whole:
            # Between two bars, so that the bar of the threshold itself lies on its true side.
            after = (mark.side == "above") != mark.inclusive or value != math.floor(value)
            value = math.floor(value) + (0.5 if after else -0.5)
        x = _x(bins, value)
        if not LEFT - 1 <= x <= RIGHT + 1:
            off_axis.append(words)
            continue
        left = mark.side == "below"
        anchor: Literal["start", "end"] = "end" if x > RIGHT - _LABEL_WIDTH else "start"
        drawn.append(
            Mark(
                x=x,
                label=words,
                anchor=anchor,
                row=0,
                shade_x=LEFT if left else x,
                shade_width=max(x - LEFT if left else RIGHT - x, 0.0),
                alone=mark.alone,
            )
        )
    return _apart(drawn), off_axis


def _apart(marks: Iterable[Mark]) -> list[Mark]:
    """Put labels that would overlap on two rows."""
    placed: list[Mark] = []
    for mark in marks:
        taken = {other.row for other in placed if abs(other.x - mark.x) < _LABEL_WIDTH}
        row = next((row for row in (0, 1) if row not in taken), 0)
        placed.append(replace(mark, row=row))
    return placed


def _range_text(bins: Binning, number: int) -> str:
    if bins.whole:
        return number_text(float(number))
    low, high = number_text(bins.edge(number)), number_text(bins.edge(number + 1))
    if number == bins.first:
        return f"up to {high}"
    if number == bins.last:
        return f"from {low}"
    return f"{low} to {high}"


STEPS_WIDTH, STEPS_HEIGHT = 360.0, 40.0


def steps(sizes: Sequence[tuple[float, int]], span: float, top: int) -> str:
    """SVG path of a filled step chart: (moment, size from then on) in a box of STEPS_WIDTH x
    STEPS_HEIGHT, whose width is `span` and whose height is `top`.

    A pool that comes and goes faster than a pixel is drawn at its largest.
    """
    places: dict[float, tuple[int, int]] = {}
    for at, size in sizes:
        x = round(STEPS_WIDTH * at / span, 1) if span else 0.0
        places[x] = (max(size, places.get(x, (0, 0))[0]), size)
    path = []
    for x, (largest, last) in places.items():
        path.append(f"H{x:.1f}V{_up(largest, top):.1f}")
        if largest != last:
            path.append(f"H{min(x + 1.5, STEPS_WIDTH):.1f}V{_up(last, top):.1f}")
    if not path:
        return ""
    return f"M0 {STEPS_HEIGHT:g}{''.join(path)}H{STEPS_WIDTH:g}V{STEPS_HEIGHT:g}z"


def _up(size: int, top: int) -> float:
    # One worker among hundreds must still be seen.
    return STEPS_HEIGHT - (max((STEPS_HEIGHT - 2) * size / top, 1.5) if size else 0)


def number_text(value: float) -> str:
    """A number as short as it can be read: 0.0125, 3.5, 1,200, 4.2 M."""
    size = abs(value)
    if size == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if size >= 1e6:
        for unit, word in ((1e9, "G"), (1e6, "M")):
            if size >= unit:
                return f"{value / unit:.3g} {word}".replace("-", "−")
    if size >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    if size < 1e-4:
        return f"{value:.2g}".replace("e-0", "e-").replace("-", "−")
    text = f"{value:.3g}" if size < 100 else f"{value:.4g}"
    return text.replace("-", "−")
