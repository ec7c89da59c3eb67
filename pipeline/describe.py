"""Describes operators and configurations from their own declarations."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic_core import to_jsonable_python

from winnow.operators.errors import ConfigError
from winnow.operators.operator import Operator
from winnow.operators.registry import all_operators
from winnow.pipeline.config import RunConfig
from winnow.pipeline.policy import PolicyFile


def describe_operators() -> list[dict[str, Any]]:
    """Every operator with its settings and columns, as plain data."""
    return [_describe(operator) for operator in all_operators().values()]


def _describe(operator: type[Operator]) -> dict[str, Any]:
    summary = (inspect.getdoc(operator) or "").split("\n\n")[0].replace("\n", " ")
    return {
        "name": operator.name,
        "version": operator.version,
        "summary": summary,
        "settings": {
            field.name: _readable(_default(field))
            for field in dataclasses.fields(operator)
            if field.init and _has_default(field)
        },
        "columns": [
            {
                "name": column.name,
                "type": str(column.type),
                "meaning": column.meaning,
                "unit": column.unit,
                "range": column.range,
                "direction": column.direction,
                "source": column.source,
            }
            for column in operator.columns
        ],
        "embeddings": list(operator.embeddings),
    }


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return (
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _readable(value: Any) -> Any:
    """A default as a configuration would say it: what was read from a file by its name, a model by
    what chooses it."""
    if not isinstance(value, BaseModel):
        return to_jsonable_python(value, fallback=str)
    if "kind" in type(value).model_fields:
        return value.model_dump(mode="json", include={"kind", "model"})
    return getattr(value, "name", None) or value.model_dump(mode="json")


def configuration_schema() -> dict[str, Any]:
    """JSON Schema of a run's configuration, with the settings of every operator and detector."""
    schema = RunConfig.model_json_schema()
    definitions = schema["$defs"]
    definitions["FilterConfig"]["properties"]["operators"] = {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": False,
        "properties": {
            name: {"anyOf": [_settings_schema(cls), {"type": "null"}]}
            for name, cls in all_operators().items()
        },
    }
    return schema


def policy_schema() -> dict[str, Any]:
    """JSON Schema of a policy."""
    return PolicyFile.model_json_schema()


def _settings_schema(cls: type[Any]) -> dict[str, Any]:
    return TypeAdapter(cls).json_schema()


def operators_markdown() -> str:
    """The README's table of operators."""
    lines = ["| operator | measures | columns |", "|---|---|---|"]
    for operator in describe_operators():
        names = ", ".join(f"`{column['name']}`" for column in operator["columns"])
        vectors = "".join(f", vector `{model}`" for model in operator["embeddings"])
        lines.append(f"| `{operator['name']}` | {operator['summary']} | {names}{vectors} |")
    return "\n".join(lines) + "\n"


def update_readme(path: Path) -> bool:
    """Write the table of operators between its marks in a README. True where it changed."""
    text = path.read_text("utf-8")
    head, begin, rest = text.partition("<!-- operators:")
    mark, _, rest = rest.partition("\n")
    _, end, tail = rest.partition("<!-- end of operators -->")
    if not begin or not end:
        raise ConfigError(f"{path} has no marks for the table of operators")
    new = f"{head}{begin}{mark}\n{operators_markdown()}{end}{tail}"
    path.write_text(new, "utf-8")
    return new != text


if __name__ == "__main__":
    update_readme(Path("README.md"))
