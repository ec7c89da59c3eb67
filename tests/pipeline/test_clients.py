"""The lake's tables are plain Delta tables: README's snippets, in the clients that people use."""

import re
from pathlib import Path

import pytest

from tests.pipeline.lakes import rows
from winnow.pipeline.lake import Lake

README = Path(__file__).parents[2] / "README.md"
CLIENTS = ("duckdb", "polars", "pandas")


@pytest.fixture(scope="module")
def said(lake: Lake) -> dict:
    """What README's snippets about a lake leave."""
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    for block in blocks:
        if "/data/lake" in block:
            exec(block.replace("/data/lake", lake.uri), names)  # our own README
    return names


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_reads_what_sql_shows(lake: Lake, said, client):
    mean = rows(lake, "SELECT avg(motion_mean) FROM clips")[0][0]
    assert said[f"by_{client}"] == pytest.approx(mean)


@pytest.mark.parametrize("table", ["sources", "clips", "embeddings", "verdicts", "dataset", "runs"])
def test_polars_reads_every_table(lake: Lake, table):
    import polars as pl

    shown = pl.read_delta(lake.table_uri(table))
    assert shown.height == rows(lake, f"SELECT count(*) FROM raw_{table}")[0][0]


def test_a_client_reads_what_a_column_means(lake: Lake):
    import deltalake

    fields = deltalake.DeltaTable(lake.table_uri("clips")).schema().fields
    (motion,) = [field for field in fields if field.name == "motion_mean"]
    assert {"meaning", "unit", "range"} <= motion.metadata.keys()
