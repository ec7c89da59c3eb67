"""Settings are data: YAML files, found by path or by name, and checked by strict models."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from winnow.operators.errors import ConfigError

T = TypeVar("T")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def find_config(name: str, folder: str = "") -> tuple[str, str]:
    """(text, origin) of a configuration file: a path, or a name that ships with the package."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or "/" in name:
        try:
            return path.read_text("utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {name}: {error}") from error
    shipped = resources.files("winnow.configs")
    if folder:
        shipped = shipped / folder
    file = shipped / f"{name}.yaml"
    if not file.is_file():
        names = sorted(f.name[:-5] for f in shipped.iterdir() if f.name.endswith(".yaml"))
        raise ConfigError(
            f"there is no configuration {name!r}: give a path ending in .yaml, or one of "
            f"{', '.join(names)}"
        )
    return file.read_text("utf-8"), f"configs/{folder + '/' if folder else ''}{name}.yaml"


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{origin} must hold a mapping, not {type(content).__name__}")
    return content


def validate(adapter: type[T], content: Any, origin: str) -> T:
    """Check content against a model. Raises ConfigError that names every wrong place."""
    try:
        return TypeAdapter(adapter).validate_python(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, origin) for e in error.errors())) from error


def _explain(error: Any, origin: str) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the whole"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{origin}: unknown key {where!r}: remove it or correct its spelling"
    if error["type"] == "missing":
        return f"{origin}: {where} is missing"
    value = error.get("input")
    shown = f" (it is {value!r})" if isinstance(value, str | int | float | bool) else ""
    return f"{origin}: {where}: {error['msg']}{shown}"
