from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from winnow.operators.operator import Operator
from winnow.operators.registry import all_operators
from winnow.operators.vlm.backend import OpenAISettings, VlmSettings
from winnow.pipeline.describe import _describe, describe_operators, operators_markdown


def test_the_readme_lists_the_operators_as_they_are():
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    assert operators_markdown() in readme, "run `python -m winnow.pipeline.describe`"


def test_every_column_says_what_it_means():
    for operator in all_operators().values():
        for column in operator.columns:
            assert len(column.meaning) >= 8, column.name


def test_settings_that_are_made_are_told_as_a_configuration_says_them():
    settings = {told["name"]: told["settings"] for told in describe_operators()}
    assert settings["vlm_filter"]["questions"] == "generated"
    assert settings["vlm_filter"]["vlm"] == {"kind": "transformers", "model": "qwen3-vl-8b"}
    assert settings["content_type"]["taxonomy"] == "content_types"


def test_settings_of_a_foreign_operator_become_json():
    @dataclass(frozen=True)
    class Foreign(Operator):
        """Says nothing."""

        name: ClassVar[str] = "foreign"
        version: ClassVar[int] = 1
        columns: ClassVar[tuple] = ()
        vlm: VlmSettings = field(
            default_factory=lambda: OpenAISettings(
                kind="openai", base_url="http://localhost/v1", model="m", timeout_s=3
            )
        )
        sizes: tuple[int, ...] = field(default_factory=lambda: (1, 2))
        folder: Path = Path("weights")
        scale: complex = 1j
        needed: int = field(kw_only=True)

        def measure(self, view, frames):
            raise NotImplementedError

    assert _describe(Foreign)["settings"] == {
        "vlm": {"kind": "openai", "model": "m"},
        "sizes": [1, 2],
        "folder": "weights",
        "scale": "1j",
    }
