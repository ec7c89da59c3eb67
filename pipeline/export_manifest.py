"""The filter manifest: one line for every clip of the lake with verdict, reasons and scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from winnow.pipeline.export_rows import json_text, map_columns, rows_of

ROW_GROUP = 65_536


def write_manifest(
    batches: Iterable[pa.RecordBatch], scores: Iterable[str], path: Path
) -> dict[str, int]:
    """Write the clips as they come, as Parquet or JSON lines by the path's suffix.

    Returns the clips by verdict; `none` counts those that the policy never saw.
    """
    if path.suffix == ".parquet":
        return _write_parquet(batches, path)
    counts: Counter[str] = Counter()
    scored = frozenset(scores)
    with path.open("wb") as file:
        for batch in batches:
            maps = map_columns(batch.schema)
            for row in rows_of(batch):
                counts[row["verdict"] or "none"] += 1
                file.write(json_text(row, scored, maps).encode("utf-8", "backslashreplace") + b"\n")
    return dict(sorted(counts.items()))


def _write_parquet(batches: Iterable[pa.RecordBatch], path: Path) -> dict[str, int]:
    counts: Counter[str] = Counter()
    writer: pyarrow.parquet.ParquetWriter | None = None
    waiting: list[pa.RecordBatch] = []
    schema: pa.Schema | None = None

    def flush() -> None:
        assert writer is not None
        # Row groups must not depend on how the batches happened to be cut.
        table = pa.Table.from_batches(waiting, schema)
        whole = table.num_rows - table.num_rows % ROW_GROUP or table.num_rows
        writer.write_table(table.slice(0, whole).combine_chunks(), ROW_GROUP)
        waiting[:] = table.slice(whole).to_batches()

    try:
        for batch in batches:
            schema = batch.schema
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(path, schema, compression="zstd")
            counts.update(verdict or "none" for verdict in batch.column("verdict").to_pylist())
            waiting.append(batch)
            if sum(b.num_rows for b in waiting) >= ROW_GROUP:
                flush()
        while waiting:
            flush()
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        pyarrow.parquet.write_table(pa.table({"clip_id": pa.array([], pa.string())}), path)
    return dict(sorted(counts.items()))
