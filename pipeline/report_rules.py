"""The rules of a policy as the report reads them: which thresholds a predicate rejects beyond."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Side = Literal["above", "below"]


class Comparison(NamedTuple):
    """One `column < number` inside a reject predicate."""

    column: str
    threshold: float
    side: Side
    """Where the rejected values lie."""
    inclusive: bool = False
    """True where the threshold itself is rejected."""
    alone: bool = True
    """True where this comparison rejects by itself, False where another condition must hold too."""

    @property
    def words(self) -> str:
        """What is rejected, as in `≥ 0.5`."""
        signs = {"below": "<≤", "above": ">≥"}[self.side]
        # As written in the policy, not rounded: 60.05 is not 60.
        return f"{signs[self.inclusive]} {self.threshold:,g}".replace("-", "−")


_TOKEN = re.compile(
    r"""
      (?P<skip>\s+|--[^\n]*|/\*.*?\*/)
    | (?P<text>'(?:[^']|'')*')
    | (?P<quoted>"(?:[^"]|"")*")
    | (?P<number>(?:\d[\d_]*\.?[\d_]*|\.\d+)(?:[eE][+-]?\d+)?)
    | (?P<word>[A-Za-z_]\w*)
    | (?P<sign><=|>=|<>|!=|::|[^\s])
    """,
    re.VERBOSE | re.DOTALL,
)
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
# A rule with one of these says something else than its comparisons read one by one.
_NOT_SIMPLE = {"not", "case", "is", "in", "between", "like", "select"}


def comparisons(predicate: str) -> tuple[Comparison, ...]:
    """Every comparison of a column with a number in an AND/OR predicate, in order.

    Understood: `column < 1`, `1 < column`, `table.column >= -2e-3`, `column BETWEEN 1 AND 2`,
    `column NOT BETWEEN 1 AND 2`, joined by AND and OR with parentheses. A comparison inside
    arithmetic, a function call or a NOT is left out: a line drawn for it would be wrong.
    """
    return tuple(_walk(_tokens(predicate)))


def simple_threshold(predicate: str) -> list[tuple[str, float, Side]]:
    """`comparisons` as plain (column, threshold, rejected side); empty where nothing can be drawn."""
    return [(c.column, c.threshold, c.side) for c in comparisons(predicate)]


def _tokens(predicate: str) -> list[tuple[str, str]]:
    found = ((match.lastgroup or "", match.group()) for match in _TOKEN.finditer(predicate))
    return [token for token in found if token[0] != "skip"]


def _split(tokens: list[tuple[str, str]], word: str) -> list[list[tuple[str, str]]]:
    """Split at `word` outside parentheses, and not at the AND that belongs to a BETWEEN."""
    parts: list[list[tuple[str, str]]] = [[]]
    depth = 0
    between = False
    for kind, text in tokens:
        lowered = text.lower() if kind == "word" else text
        depth += (lowered == "(") - (lowered == ")")
        if depth == 0 and lowered == "between":
            between = True
        elif depth == 0 and lowered == "and" and between:
            between = False
        elif depth == 0 and lowered == word:
            parts.append([])
            continue
        parts[-1].append((kind, text))
    return parts


def _walk(tokens: list[tuple[str, str]], alone: bool = True) -> Iterator[Comparison]:
    for word in ("or", "and"):
        parts = _split(tokens, word)
        if len(parts) > 1:
            for part in parts:
                yield from _walk(part, alone and word == "or")
            return
    if len(tokens) > 2 and tokens[0][1] == "(" and _closes(tokens) == len(tokens) - 1:
        yield from _walk(tokens[1:-1], alone)
        return
    yield from _leaf(tokens, alone)


def _closes(tokens: list[tuple[str, str]]) -> int:
    """Index of the parenthesis that closes the first token's, -1 where none does."""
    depth = 0
    for index, (_, text) in enumerate(tokens):
        depth += (text == "(") - (text == ")")
        if depth == 0:
            return index
    return -1


def _leaf(tokens: list[tuple[str, str]], alone: bool) -> Iterator[Comparison]:
    signs = [index for index, (kind, text) in enumerate(tokens) if text in _FLIPPED]
    words = [text.lower() for kind, text in tokens if kind == "word"]
    if words.count("between") == 1 and words.count("and") == 1:
        where = [text.lower() for _, text in tokens]
        start, middle = where.index("between"), where.index("and")
        outside = where[start - 1 : start] == ["not"]
        column = _column(tokens[: start - outside])
        low, high = _number(tokens[start + 1 : middle]), _number(tokens[middle + 1 :])
        if column and low is not None and high is not None:
            if outside:
                yield Comparison(column, low, "below", alone=alone)
                yield Comparison(column, high, "above", alone=alone)
            else:
                yield Comparison(column, low, "above", inclusive=True, alone=False)
                yield Comparison(column, high, "below", inclusive=True, alone=False)
        return
    if len(signs) != 1 or _NOT_SIMPLE.intersection(words):
        return
    left, sign, right = tokens[: signs[0]], tokens[signs[0]][1], tokens[signs[0] + 1 :]
    column, number = _column(left), _number(right)
    if column is None or number is None:
        column, number, sign = _column(right), _number(left), _FLIPPED[sign]
    if column is not None and number is not None:
        side: Side = "below" if sign[0] == "<" else "above"
        yield Comparison(column, number, side, sign.endswith("="), alone)


def _column(tokens: list[tuple[str, str]]) -> str | None:
    kinds = [kind if kind != "sign" else text for kind, text in tokens]
    if kinds not in (["word"], ["quoted"]) and not (
        len(kinds) == 3 and kinds[1] == "." and kinds[2] in ("word", "quoted")
    ):
        return None
    kind, text = tokens[-1]
    return text[1:-1].replace('""', '"') if kind == "quoted" else text


def _number(tokens: list[tuple[str, str]]) -> float | None:
    sign = 1.0
    while tokens and tokens[0][1] in ("-", "+"):
        sign = -sign if tokens[0][1] == "-" else sign
        tokens = tokens[1:]
    if len(tokens) != 1 or tokens[0][0] != "number":
        return None
    return sign * float(tokens[0][1].replace("_", ""))


# --- rules ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RuleShown:
    """A rule of the policy as the report shows it.

    `predicate` is the SQL that rejects. `column`, `threshold` and `side` (where the rejected values
    lie) may be given for one threshold; the report reads all others out of the predicate. A rule
    may come several times, once for each threshold. `stage` names the filter stage in the funnel;
    without it the rules are grouped by the operator whose columns they read.
    """

    name: str
    reason: str
    predicate: str
    column: str | None = None
    threshold: float | None = None
    side: Side | None = None
    stage: str = ""

    def comparisons(self) -> tuple[Comparison, ...]:
        """Every threshold of this rule that can be drawn."""
        found = comparisons(self.predicate)
        if self.column is None or self.threshold is None or self.side is None:
            return found
        if any((c.column, c.threshold, c.side) == self._simple() for c in found):
            return found
        return (Comparison(self.column, float(self.threshold), self.side), *found)

    def _simple(self) -> tuple[str | None, float | None, str | None]:
        return self.column, self.threshold, self.side


class Rulebook:
    """The rules of a policy, found by what a verdict says and by the columns they read."""

    def __init__(self, rules: Sequence[RuleShown], columns: Collection[str]) -> None:
        """`columns` are those of the clips, as the lake spells them."""
        self._columns = frozenset(columns)
        self.marks: dict[str, list[Comparison]] = defaultdict(list)
        """Thresholds by column."""
        self.names_of_column: dict[str, list[str]] = defaultdict(list)
        written = {name.lower(): name for name in columns}
        for rule in rules:
            for told in rule.comparisons():
                mark = told._replace(column=written.get(told.column.lower(), told.column))
                if mark not in self.marks[mark.column]:
                    self.marks[mark.column].append(mark)
                if rule.name not in self.names_of_column[mark.column]:
                    self.names_of_column[mark.column].append(rule.name)
        # A rule that came once for each of its thresholds is still one rule.
        self.rules = tuple({rule.name: rule for rule in reversed(rules)}.values())[::-1]
        self.of_reason: dict[str, list[RuleShown]] = defaultdict(list)
        """A verdict may carry the name of a rule or its reason."""
        for rule in self.rules:
            self.of_reason[rule.name].append(rule)
            if rule.reason != rule.name:
                self.of_reason[rule.reason].append(rule)

    def columns_of(self, rule: RuleShown) -> list[str]:
        """Columns of the clips that a rule reads, its own threshold's first."""
        named = [rule.column] if rule.column else [c.column for c in rule.comparisons()]
        words = re.findall(r"[A-Za-z_]\w*", re.sub(r"'[^']*'", " ", rule.predicate))
        return [c for c in (*named, *words) if c in self._columns]
