"""Finds operators by name: the operator `motion` lives in operators/motion.py.

Plug-ins: a package outside Winnow adds operators by the entry-point group `winnow.operators`, whose
names are operator names and whose values are the operator classes:

    [project.entry-points."winnow.operators"]
    dover = "winnow_dover.quality:Dover"

Once it is installed beside Winnow, on every machine that runs workers, a config may name the operator
as any other. It is how models are used whose licence forbids them here (DOVER, VTSS):
tests/plugins/winnow_standin is a small complete one, operators/quality_scores.py what they share.
A plug-in runs with all the rights of the process: install none that you would not run.
"""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points

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
        plugged = _plugged(entry)
        if plugged.name in found:
            raise ConfigError(
                f"{_origin(entry)}: there is an operator {plugged.name!r} already, in "
                f"{found[plugged.name].__module__}: uninstall or rename one of the two"
            )
        found[plugged.name] = plugged
    return dict(sorted(found.items()))


def _is_operator(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Operator) and hasattr(value, "version")


def _plugged(entry: EntryPoint) -> type[Operator]:
    try:
        plugged = entry.load()
    except Exception as error:  # whatever a foreign module does when it is imported
        raise ConfigError(
            f"{_origin(entry)} cannot be loaded: {type(error).__name__}: {error}. Repair or "
            "uninstall it"
        ) from error
    if not _is_operator(plugged):
        raise ConfigError(f"{_origin(entry)}: {plugged!r} is not an Operator with a version")
    if plugged.name != entry.name:
        raise ConfigError(
            f"{_origin(entry)}: the operator's own name is {plugged.name!r}: call the entry point "
            "that"
        )
    operator: type[Operator] = plugged
    return operator


def _origin(entry: EntryPoint) -> str:
    package = f" of the package {entry.dist.name}" if entry.dist is not None else ""
    return f"the plug-in {entry.name!r} = {entry.value!r}{package}"


def operator_class(name: str) -> type[Operator]:
    """The operator of that name. Raises ConfigError with the nearest names."""
    operators = all_operators()
    if name not in operators:
        near = get_close_matches(name, operators, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown operator {name!r}: {hint}there are {', '.join(operators)}")
    return operators[name]
