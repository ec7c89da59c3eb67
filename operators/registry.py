"""Finds operators by name: the operator `motion` lives in operators/motion.py.

Packages outside Winnow add operators by the entry-point group `winnow.operators`, whose names are
operator names and whose values are the operator classes.
"""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points

import winnow.operators
from winnow.operators.errors import ConfigError
from winnow.operators.operator import Operator


@cache
def all_operators() -> dict[str, type[Operator]]:
    """Every operator that is installed, by name, in alphabetical order."""
    found: dict[str, type[Operator]] = {}
    for module in pkgutil.iter_modules(winnow.operators.__path__):
        loaded = importlib.import_module(f"winnow.operators.{module.name}")
        for value in vars(loaded).values():
            if _is_operator(value) and value.__module__ == loaded.__name__:
                found[value.name] = value
    for entry in entry_points(group="winnow.operators"):
        plugged = entry.load()
        if not _is_operator(plugged) or plugged.name != entry.name:
            raise ConfigError(
                f"the plug-in {entry.value!r} must be an Operator whose name is {entry.name!r}"
            )
        found[plugged.name] = plugged
    return dict(sorted(found.items()))


def _is_operator(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Operator) and hasattr(value, "version")


def operator_class(name: str) -> type[Operator]:
    """The operator of that name. Raises ConfigError with the nearest names."""
    operators = all_operators()
    if name not in operators:
        near = get_close_matches(name, operators, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown operator {name!r}: {hint}there are {', '.join(operators)}")
    return operators[name]
