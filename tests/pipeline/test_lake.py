"""Writing to the lake: replays, storage that fails, columns that do not exist."""

import pytest

from tests.pipeline.lakes import rows
from winnow.operators.errors import LakeError
from winnow.pipeline import lake as lake_module
from winnow.pipeline.lake import Lake


@pytest.fixture
def empty(tmp_path) -> Lake:
    lake = Lake(str(tmp_path / "lake"))
    lake.create([])
    return lake


def count(lake: Lake, table: str) -> int:
    return lake.open(table).to_pyarrow_dataset().count_rows()


class Flaky(Lake):
    """Storage whose answer gets lost: before the commit, or only after it."""

    fail_before = 0
    fail_after = 0

    def _write(self, table, data, batch):
        if self.fail_before:
            self.fail_before -= 1
            raise OSError("connection reset")
        super()._write(table, data, batch)
        if self.fail_after:
            self.fail_after -= 1
            raise OSError("connection reset")


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 0), (0, 1), (1, 1)])
def test_a_lost_answer_neither_loses_nor_doubles_rows(empty, before, after):
    lake = Flaky(empty.uri)
    lake.fail_before, lake.fail_after = before, after
    rows = [{"clip_id": "a", "attempt_id": "x", "model": "m", "vector": [1.0]}]
    lake.append("embeddings", rows, ("run", 1))
    assert count(empty, "embeddings") == 1
    lake.append("embeddings", rows, ("run", 2))
    assert count(empty, "embeddings") == 2


def test_storage_that_stays_away_is_an_error_that_says_what_to_do(empty, monkeypatch):
    monkeypatch.setattr(lake_module, "WRITE_TRIES", 2)
    lake = Flaky(empty.uri)
    lake.fail_before = 99
    with pytest.raises(LakeError, match=r"embeddings.*connection reset.*run again"):
        lake.append("embeddings", [{"clip_id": "a"}], ("run", 1))


def test_a_value_without_a_column_does_not_vanish(empty):
    with pytest.raises(LakeError, match="nosuch"):
        empty.append("embeddings", [{"clip_id": "a", "nosuch": 1}])


def test_new_operators_add_columns_to_a_lake_that_exists(empty):
    import pyarrow as pa

    from winnow.operators.operator import Column

    empty.create([Column("blur_mean", pa.float64(), "a new measure", unit="share")])
    field = empty.dataset("clips").schema.field("blur_mean")
    assert field.type == pa.float64()
    assert field.metadata[b"unit"] == b"share"
    empty.append("clips", [{"clip_id": "a", "blur_mean": 0.5}])
    assert count(empty, "clips") == 1


def test_arrow_reads_a_local_lake_without_python(empty):
    """Else the process may abort or hang at its end: Arrow's threads outlive the interpreter."""
    empty.append(
        "sources", [{"source_id": "a", "uri": "a.mp4", "status": "done", "attempt_id": "1"}]
    )
    files = empty.dataset("sources").filesystem
    assert files.type_name == "subtree"
    assert files.base_fs.type_name == "local"


def test_a_row_that_was_written_twice_is_seen_once_and_does_not_vanish(empty):
    row = {"source_id": "a", "uri": "a.mp4", "status": "done", "attempt_id": "1", "seq": 1}
    for status, attempt, seq in (("failed", "0", 0), ("done", "1", 1), ("done", "1", 1)):
        empty.append("sources", [row | {"status": status, "attempt_id": attempt, "seq": seq}])
    empty.append("sources", [row | {"uri": "b.mp4", "attempt_id": "2", "seq": 2}])
    assert rows(empty, "SELECT uri, status, attempt_id FROM sources ORDER BY uri") == [
        ("a.mp4", "done", "1"), ("b.mp4", "done", "2"),
    ]  # fmt: skip
