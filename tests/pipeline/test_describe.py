from pathlib import Path

from winnow.operators.registry import all_operators
from winnow.pipeline.describe import operators_markdown


def test_the_readme_lists_the_operators_as_they_are():
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    assert operators_markdown() in readme, "run `python -m winnow.pipeline.describe`"


def test_every_column_says_what_it_means():
    for operator in all_operators().values():
        for column in operator.columns:
            assert len(column.meaning) >= 8, column.name
