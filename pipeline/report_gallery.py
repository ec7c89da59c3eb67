"""The clips that the report shows: a capped choice for each verdict, with pictures and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.pipeline.report_ledger import verdicts
from winnow.pipeline.report_rules import Comparison, Rulebook
from winnow.pipeline.report_said import Said, said
from winnow.pipeline.report_values import file_name, plain, short, without_password
from winnow.pipeline.report_views import CLIPS, Views, quoted


@dataclass(frozen=True, slots=True)
class ShownScore:
    """A value on a card; `limit` says what it is rejected for, where it `fails`."""

    column: str
    value: Any
    fails: bool
    limit: str = ""


@dataclass(slots=True)
class ShownClip:
    """One card of a gallery."""

    clip_id: str
    verdict: str
    file: str
    uri: str
    prompt: str
    generator: str
    start_s: float | None
    end_s: float | None
    reasons: Sequence[str]
    """As stored in the verdict."""
    meanings: Mapping[str, str]
    """In words, for reasons stored as the name of a rule."""
    scores: Sequence[ShownScore]
    values: Mapping[str, Any]
    """Every score by its column."""
    thumbnail: bytes | None
    similarity: float | None = None
    duplicate_of: str | None = None
    original: ShownClip | None = None
    said: Said | None = None
    """What models said of it, None where none did."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Some of the `total` clips with one verdict; `order` says in words which."""

    verdict: str
    total: int
    clips: Sequence[ShownClip]
    order: str


def galleries(lake: Views, book: Rulebook, size: int) -> list[Gallery]:
    """At most `size` clips for each verdict, the same ones every time."""
    # Every reason gets its examples: the clips are taken from the reasons in turn.
    in_turn = f"""
        SELECT clip_id FROM (
            SELECT clip_id, min(turn) AS turn FROM (
                SELECT clip_id, row_number() OVER (
                    PARTITION BY reason ORDER BY md5(clip_id)
                ) AS turn
                FROM (SELECT clip_id, unnest(
                    CASE WHEN len(reasons) > 0 THEN reasons ELSE [''] END
                ) AS reason FROM {CLIPS} WHERE verdict_shown = ?)
            ) GROUP BY 1
        ) ORDER BY turn, md5(clip_id) LIMIT ?
    """
    least_alike = (
        f"SELECT clip_id FROM {CLIPS} WHERE verdict_shown = ? "
        "ORDER BY similarity NULLS FIRST, clip_id LIMIT ?"
    )
    mixed = (
        f"SELECT clip_id FROM {CLIPS} WHERE verdict_shown = ? "
        "ORDER BY md5(clip_id), clip_id LIMIT ?"
    )
    chosen = [
        ("reject", in_turn, "an even sample over the reasons"),
        ("duplicate", least_alike, "the least alike first"),
        ("keep", mixed, "a fixed random sample"),
        ("error", in_turn, "an even sample over the reasons"),
    ]
    totals, _ = verdicts(lake)
    ids = {
        verdict: [row[0] for row in lake.rows(sql, [verdict, max(size, 0)])]
        for verdict, sql, _ in chosen
    }
    cards = _cards(lake, book, [clip_id for taken in ids.values() for clip_id in taken])
    originals = _cards(
        lake, book, sorted({c.duplicate_of for c in cards.values() if c.duplicate_of})
    )
    for card in cards.values():
        if card.verdict == "duplicate" and card.duplicate_of:
            card.original = originals.get(card.duplicate_of)
    return [
        Gallery(verdict, totals.get(verdict, 0), [cards[i] for i in ids[verdict]], order)
        for verdict, _, order in chosen
    ]


def _cards(lake: Views, book: Rulebook, clip_ids: Sequence[str]) -> dict[str, ShownClip]:
    if not clip_ids:
        return {}
    scores = lake.score_columns()
    select = ", ".join(f"any_value({quoted(name)})" for name in scores)
    column = lake.column
    found = lake.rows(
        f"""
        SELECT clip_id, any_value(verdict_shown), any_value(uri),
            any_value({column("clips_decided", "prompt")}),
            any_value({column("clips_decided", "generator")}),
            any_value(start_s), any_value(end_s), any_value(reasons), any_value(similarity),
            any_value(duplicate_of){", " + select if scores else ""}
        FROM {CLIPS} WHERE list_contains(?::VARCHAR[], clip_id) GROUP BY clip_id
        """,
        [list(clip_ids)],
    )
    pictures = _thumbnails(lake, clip_ids)
    told = said(lake, clip_ids)
    cards = {}
    for row in found:
        clip_id, verdict, uri, prompt, generator, start, end, reasons, alike, first = row[:10]
        values = dict(zip(scores, row[10:], strict=True))
        reasons = [str(r) for r in reasons or [] if r is not None]
        cards[clip_id] = ShownClip(
            clip_id=clip_id,
            verdict=verdict,
            file=file_name(uri or ""),
            uri=without_password(short(uri or "", 1000)),
            prompt=short(prompt or "", 2000),
            generator=short(generator or "", 100),
            start_s=start,
            end_s=end,
            reasons=[short(r, 300) for r in reasons[:20]],
            meanings={rule.name: rule.reason for rule in book.rules if rule.name != rule.reason},
            scores=_shown_scores(book, values, reasons),
            values=values,
            thumbnail=pictures.get(clip_id),
            similarity=alike,
            duplicate_of=first,
            said=told.get(clip_id),
        )
    return cards


def _shown_scores(
    book: Rulebook, values: Mapping[str, Any], reasons: Sequence[str]
) -> list[ShownScore]:
    """The scores that rules look at, those that failed first."""
    blamed = [
        mark
        for reason in reasons
        for rule in book.of_reason.get(reason, [])
        for mark in rule.comparisons()
    ]
    shown: dict[str, ShownScore] = {}
    for mark in blamed:
        value = values.get(mark.column)
        if mark.column not in values or (mark.column in shown and shown[mark.column].fails):
            continue
        fails = value is not None and _beyond(value, mark)
        shown[mark.column] = ShownScore(mark.column, value, fails, mark.words if fails else "")
    for name in book.marks:
        if name in values and name not in shown:
            shown[name] = ShownScore(name, values[name], False)
    return sorted(shown.values(), key=lambda score: not score.fails)


def _thumbnails(lake: Views, clip_ids: Sequence[str]) -> dict[str, bytes]:
    if "thumbnail_jpeg" not in lake.columns["clips"]:
        return {}
    found = lake.rows(
        "SELECT clip_id, thumbnail_jpeg FROM clips "
        "WHERE list_contains(?::VARCHAR[], clip_id) AND thumbnail_jpeg IS NOT NULL",
        [list(clip_ids)],
    )
    return {row[0]: bytes(row[1]) for row in found}


def _beyond(value: Any, mark: Comparison) -> bool:
    if mark.inclusive and value == mark.threshold:
        return True
    return bool(value < mark.threshold if mark.side == "below" else value > mark.threshold)


def details(lake: Views, book: Rulebook, galleries: Sequence[Gallery]) -> dict[str, Any]:
    """All scores of the clips shown, for the page's detail view."""
    columns = lake.score_columns()
    return {
        "columns": [
            {
                "name": name,
                "operator": lake.operator(name),
                "meaning": lake.doc(name).meaning,
                "unit": lake.doc(name).unit,
                "limits": [
                    {
                        "words": m.words if m.alone else f"{m.words} with another condition",
                        "side": m.side,
                        "threshold": m.threshold,
                        "inclusive": m.inclusive,
                        "alone": m.alone,
                    }
                    for m in book.marks.get(name, [])
                ],
            }
            for name in columns
        ],
        "clips": {
            clip.clip_id: [plain(clip.values.get(name)) for name in columns]
            for gallery in galleries
            for clip in gallery.clips
        },
    }
