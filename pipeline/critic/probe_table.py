"""The outcome of probes as a table: for a terminal, a text file, a page."""

from __future__ import annotations

import io

import jinja2
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from winnow.pipeline.critic.probe import CLEAR_MOVE, Outcome, ProbeResult

_WORDS = ("probe", "should be", "sound", "remarks")
_HEADINGS = (
    "probe", "should be", "clips", "move", "interval", f"↓ {CLEAR_MOVE:g}", f"↑ {CLEAR_MOVE:g}",
    "argmax", "sound", "remarks",
)  # fmt: skip


def probe_table(result: ProbeResult) -> Table:
    """For a terminal; `remarks` belong below it."""
    table = Table(
        title=escape(_title(result)),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )
    for heading in _HEADINGS[:-1]:
        table.add_column(
            heading,
            justify="left" if heading in _WORDS else "right",
            # Cut-off figures would be wrong ones.
            no_wrap=heading in ("probe", "should be", "move", "interval"),
            overflow="fold",
        )
    for outcome in result.outcomes:
        table.add_row(*map(escape, _row(outcome)[:-1]))
    return table


def remarks(result: ProbeResult) -> list[str]:
    """What is to be read with the table: probes by remark, and the notes on the whole."""
    said: dict[str, list[str]] = {}
    for outcome in result.outcomes:
        if outcome.why:
            said.setdefault(outcome.why, []).append(outcome.probe.name)
    return [f"{', '.join(names)}: {why}" for why, names in said.items()] + result.notes


def probe_text(result: ProbeResult, width: int = 100) -> str:
    """The table and its remarks without colours."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, force_terminal=False)
    console.print(probe_table(result))
    for line in remarks(result):
        console.print(escape(line), highlight=False)
    return out.getvalue()


def probe_html(result: ProbeResult) -> str:
    """The table and its notes as a fragment for a page; everything is escaped."""
    rows = [(outcome, _row(outcome)) for outcome in result.outcomes]
    return _HTML.render(
        title=_title(result), headings=_HEADINGS, words=_WORDS, rows=rows, notes=result.notes
    )


def _title(result: ProbeResult) -> str:
    by = ", ".join([*result.models, *result.prompts])
    return (
        f"Probes {result.probes.name!r} on {result.clips - len(result.left_out)} clips"
        f"{f' by {by}' if by else ''}: how the expected score (1 to 5) moves, with "
        f"{result.probes.confidence:.0%} intervals of the mean; how many clips move by more than "
        f"{CLEAR_MOVE:g}, and how many change their likeliest score"
    )


def _row(outcome: Outcome) -> list[str]:
    low, high = _figure(outcome.low, "+.2f"), _figure(outcome.high, "+.2f")
    return [
        outcome.probe.name,
        outcome.probe.expected,
        str(outcome.n),
        _figure(outcome.mean_move, "+.2f"),
        "–" if outcome.low is None else f"{low} .. {high}",
        _figure(outcome.moved_down, ".0%"),
        _figure(outcome.moved_up, ".0%"),
        str(outcome.argmax_changed) if outcome.n else "–",
        outcome.sound,
        outcome.why,
    ]


def _figure(value: float | None, form: str) -> str:
    # Rounded first: there is no -0.00.
    return "–" if value is None else format(round(value, 2) + 0.0, form)


_HTML = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<section class="probes">
<p>{{ title }}</p>
<table>
<thead><tr>
{% for heading in headings %}
<th{% if heading not in words %} class="num"{% endif %}>{{ heading }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for outcome, cells in rows %}
<tr class="sound-{{ outcome.sound | replace(' ', '-') }}" title="{{ outcome.probe.reason }}">
{% for cell in cells %}
<td{% if headings[loop.index0] not in words %} class="num"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
{% for note in notes %}
<p class="warn">{{ note }}</p>
{% endfor %}
</section>
""")
