"""What an SQL predicate over one clip may be made of.

A policy may come from somebody else. DuckDB's settings keep a predicate from files, but not from
sleeping, from making a list of 10^9 numbers, from counting rows or from answering otherwise each
time: neither `memory_limit` nor `max_execution_time` stops all of these. So only what is named here
is allowed. No function that makes a text longer by a factor is: nested, they fill any memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from winnow.operators.errors import ConfigError

_NAMES = (
    # Operators.
    "+ - * / // % ** ^ @ & | ~ << >> || ~~ !~~ ~~* !~~* ~~~ ^@ ->> "
    # Numbers.
    "abs ceil ceiling floor round trunc sign sqrt cbrt exp ln log log2 log10 pow power mod fmod fdiv "
    "greatest least isnan isinf isfinite sin cos tan asin acos atan atan2 degrees radians pi even "
    "add subtract multiply divide xor gcd lcm "
    # Text.
    "lower lcase upper ucase length len strlen char_length character_length trim ltrim rtrim contains "
    "prefix suffix starts_with ends_with instr strpos position left right substr substring split_part "
    "reverse ascii concat concat_ws strip_accents regexp_matches regexp_full_match regexp_extract "
    "like_escape not_like_escape ilike_escape not_ilike_escape string_split str_split split "
    "jaccard jaro_similarity jaro_winkler_similarity md5 hash "
    # Lists, maps, structs and JSON.
    "list_value list_pack row struct_pack map cardinality element_at map_extract map_extract_value "
    "map_keys map_values map_contains map_contains_value list_contains list_has list_has_any "
    "list_has_all list_position list_indexof list_extract list_element list_slice list_distinct "
    "list_unique list_sort list_reverse list_reverse_sort list_concat list_intersect list_where "
    "list_count list_sum list_avg list_min list_max list_median list_mode list_first list_last "
    "list_product list_stddev_pop list_stddev_samp list_var_pop list_var_samp list_bool_and "
    "list_bool_or list_any_value array_contains array_has array_length array_extract array_slice "
    "array_position struct_extract json_extract json_extract_string json_array_length json_valid "
    "json_keys json_type json_exists json_contains "
    # Times.
    "date_part datepart date_trunc datetrunc date_diff datediff year month day hour minute second "
    "dayofweek epoch epoch_ms to_years to_months to_weeks to_days to_hours to_minutes to_seconds "
    # Missing values, and choices.
    "ifnull nullif if switch constant_or_null typeof"
)
FUNCTIONS = frozenset(_NAMES.split())

_EXPRESSIONS = frozenset(
    [
        "BETWEEN",
        "CASE",
        "CAST",
        "COLLATE",
        "COLUMN_REF",
        "COMPARISON",
        "CONJUNCTION",
        "CONSTANT",
        "FUNCTION",
        "OPERATOR",
        "TYPE",
    ]
)
_REFUSED = {
    "SUBQUERY": "a query",
    "WINDOW": "a window function",
    "LAMBDA": "a lambda or a list comprehension",
    "STAR": "a star",
    "PARAMETER": "a parameter",
    "POSITIONAL_REFERENCE": "a place in place of a column",
}
_DEEPEST = 32
"""Text of nested lists doubles with each pair of levels: its quotes are quoted."""


def check_expression(tree: Any, where: str) -> None:
    """Check one parsed expression, as `json_serialize_sql` gives it.

    Raises ConfigError where it holds what does not stand in FUNCTIONS, sees more than one clip, or
    is nested too deep.
    """
    for node, depth in _nodes(tree):
        kind = node["class"]
        if kind not in _EXPRESSIONS or node.get("type") == "GROUPING_FUNCTION":
            raise ConfigError(
                f"{where}: write one SQL expression over a clip's columns, no query: "
                f"it holds {_REFUSED.get(kind, kind.lower())}"
            )
        if depth > _DEEPEST:
            raise ConfigError(f"{where}: the predicate is nested more than {_DEEPEST} deep")
        if kind != "FUNCTION":
            continue
        name = node["function_name"]
        if node.get("schema") or node.get("catalog"):
            # A method, too, and its column would not be seen as one.
            raise ConfigError(f"{where}: write {name}(column), without a dot before {name}")
        if name.lower() not in FUNCTIONS:
            raise ConfigError(
                f"{where}: a predicate cannot use {name}(): it sees one clip, and may compute with "
                "its numbers, texts, lists and times (pipeline/predicates.py lists the functions)"
            )


def _nodes(tree: Any) -> Iterator[tuple[dict[str, Any], int]]:
    """The expressions of a parsed one, each with how many calls it stands within."""
    left = [(tree, 0)]
    while left:
        node, depth = left.pop()
        if isinstance(node, dict):
            if "class" in node:
                yield node, depth
                depth += node["class"] in ("FUNCTION", "CAST", "OPERATOR")
            left += [(value, depth) for value in node.values()]
        elif isinstance(node, list):
            left += [(value, depth) for value in node]
