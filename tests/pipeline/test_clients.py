"""The lake's tables are plain Delta tables: README's snippets, in the clients that people use."""

import re
from pathlib import Path

import pytest

from tests.pipeline.lakes import rows
from winnow.pipeline.lake import Lake

README = Path(__file__).parents[2] / "README.md"
# Of these, the clips that count: raw tables may hold rows of an attempt that never committed.
SNIPPETS = {
    "duckdb": """
import deltalake
import duckdb

clips = deltalake.DeltaTable("/data/lake/clips").to_pyarrow_dataset()
sources = deltalake.DeltaTable("/data/lake/sources").to_pyarrow_dataset()
answer = duckdb.sql("SELECT avg(motion_mean) FROM clips SEMI JOIN sources USING (attempt_id)")
""",
    "polars": """
import polars as pl

clips = pl.scan_delta("/data/lake/clips")
sources = pl.scan_delta("/data/lake/sources")
answer = clips.join(sources, on="attempt_id", how="semi").select(pl.col("motion_mean").mean()).collect()
""",
    "pandas": """
import deltalake

clips = deltalake.DeltaTable("/data/lake/clips").to_pandas(columns=["attempt_id", "motion_mean"])
sources = deltalake.DeltaTable("/data/lake/sources").to_pandas(columns=["attempt_id"])
answer = clips[clips.attempt_id.isin(sources.attempt_id)].motion_mean.mean()
""",
}


def run(snippet: str, lake: Lake) -> dict:
    names: dict = {}
    exec(snippet.replace("/data/lake", lake.uri), names)  # our own README
    return names


@pytest.mark.parametrize("client", SNIPPETS)
def test_a_client_reads_what_sql_shows(lake: Lake, client):
    answer = run(SNIPPETS[client], lake)["answer"]
    if client == "duckdb":
        answer = answer.fetchall()[0][0]
    elif client == "polars":
        answer = answer.item()
    assert answer == pytest.approx(rows(lake, "SELECT avg(motion_mean) FROM clips")[0][0])


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


def test_the_snippets_of_readme_run(lake: Lake):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    of_lakes = [block for block in blocks if "/data/lake" in block]
    assert of_lakes
    for block in of_lakes:
        run(block, lake)
