"""The lake: Delta tables under one URI, append-only, with the `sources` rows as the commit point.

Rows of a batch are appended table by table, each with the attempt that made it; the `sources` rows
that name the attempts come last. Views join on committed attempts, so a crash at any moment leaves
nothing visible that is half done. What is measured later stands in `measurements`, with the
`backfills` rows as its commit point.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import DeltaError, TableNotFoundError
from tenacity import (
    RetryError,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

from winnow.operators.errors import LakeError
from winnow.operators.operator import Column

if TYPE_CHECKING:
    import pyarrow.dataset as pads  # imports pandas, which takes a second and a half
    import pyarrow.fs as pafs

WRITE_TRIES = 5
LAYOUT = 1
"""Counts changes that an older Winnow would misread; a new table or column is none of them."""
LAYOUT_KEY = "winnow.layout"
"""Property of the table `sources`; a lake without it has layout 1."""
_TIME = pa.timestamp("us", "UTC")
_STRINGS = pa.list_(pa.string())


def _table(*columns: Column) -> tuple[Column, ...]:
    return columns


_ATTEMPT = Column("attempt_id", pa.string(), "the attempt whose commit makes this row visible")
_CLIP_ID = Column("clip_id", pa.string(), "hash of the source's content and the frame span")
_SOURCE_ID = Column("source_id", pa.string(), "SHA-256 of the file's bytes")

TABLES: dict[str, tuple[Column, ...]] = {
    "sources": _table(
        _SOURCE_ID,
        Column("uri", pa.string(), "where the file was found"),
        Column("status", pa.string(), "done, copy, failed or incomplete"),
        Column("error_kind", pa.string(), "short word to count failures by"),
        Column("error", pa.string(), "what was wrong with the file"),
        _ATTEMPT,
        Column("run_id", pa.string(), "the run that made the attempt"),
        Column("seq", pa.int64(), "order of commit in the lake"),
        Column("committed_at", _TIME, "time of commit"),
        Column("copy_of", pa.string(), "for status copy: the first uri with the same bytes"),
        Column("bytes", pa.int64(), "file size", "bytes"),
        Column("modified", pa.float64(), "modification time of the file", "s since 1970"),
        Column("etag", pa.string(), "the object store's version tag"),
        Column("container", pa.string(), "container format"),
        Column("codec", pa.string(), "video codec"),
        Column("pixel_format", pa.string(), "pixel format"),
        Column("frames", pa.int64(), "frames in the video stream", "frames"),
        Column("fps", pa.float64(), "frame rate", "1/s"),
        Column("frame_rate", pa.string(), "exact frame rate as a fraction", "1/s"),
        Column("variable_frame_rate", pa.bool_(), "frame times are uneven"),
        Column("width", pa.int32(), "upright width", "pixels"),
        Column("height", pa.int32(), "upright height", "pixels"),
        Column("rotation", pa.int32(), "turn from coded to upright", "degrees"),
        Column("duration_s", pa.float64(), "length of the video", "s"),
        Column("has_audio", pa.bool_(), "there is an audio stream"),
        Column("prompt", pa.string(), "prompt from the sidecar"),
        Column("negative_prompt", pa.string(), "negative prompt from the sidecar"),
        Column("seed", pa.int64(), "seed from the sidecar"),
        Column("generator", pa.string(), "world model, as the sidecar's shape tells"),
        Column("group_key", pa.string(), "shared by generations from the same input and prompt"),
        Column("input_uri", pa.string(), "the video or image that the generation started from"),
        Column("sidecar", pa.string(), "the sidecar verbatim, JSON"),
        Column("sidecar_problem", pa.string(), "why a sidecar could not be used"),
        Column("seconds", pa.map_(pa.string(), pa.float64()), "time spent by stage", "s"),
    ),
    # Before the tables whose rows it makes visible: tables are opened in this order.
    "backfills": _table(
        _ATTEMPT,
        Column("backfill_id", pa.string(), "the backfill that made the attempt"),
        Column("seq", pa.int64(), "order of commit in the lake"),
        Column("committed_at", _TIME, "time of commit"),
        Column("sources", pa.int64(), "sources of the batch"),
        Column("measurements", pa.int64(), "measurements of the batch"),
        Column(
            "operators",
            pa.string(),
            "by operator: version, settings and their hash, models, columns, embeddings; JSON",
        ),
        Column("selection", pa.string(), "predicate that chose the clips; empty for all"),
        Column("engine", pa.string(), "inline or ray"),
    ),
    "clips": _table(
        _CLIP_ID,
        _SOURCE_ID,
        _ATTEMPT,
        Column("start_s", pa.float64(), "start in the source's clock", "s", ">= 0"),
        Column("end_s", pa.float64(), "end, exclusive, in the source's clock", "s", "> start_s"),
        Column("start_frame", pa.int64(), "first frame", "frames", ">= 0"),
        Column("end_frame", pa.int64(), "end frame, exclusive", "frames", "> start_frame"),
        Column("failure", pa.string(), "why a stage could not do its work on the clip"),
        Column(
            "operator_versions",
            pa.map_(pa.string(), pa.string()),
            "operators that measured the clip",
        ),
    ),
    "measurements": _table(
        _CLIP_ID,
        _ATTEMPT,
        Column("backfill_id", pa.string(), "the backfill that measured"),
        Column("seq", pa.int64(), "order of commit in the lake: the newest is shown in `clips`"),
        Column("operator", pa.string(), "the operator that measured; its columns are set"),
        Column("operator_version", pa.string(), "its version"),
        Column("settings_hash", pa.string(), "hash of its settings, models and backbone"),
        Column("embeddings", _STRINGS, "models whose vectors the operator writes beside columns"),
    ),
    "embeddings": _table(
        _CLIP_ID,
        _ATTEMPT,
        Column("model", pa.string(), "model or method of the vector"),
        Column("vector", pa.list_(pa.float32()), "the vector; one length per model"),
    ),
    "captions": _table(
        _CLIP_ID,
        _ATTEMPT,
        Column("window_number", pa.int32(), "window of the clip, in order of time", "", ">= 0"),
        Column("start_s", pa.float64(), "start from the clip's first frame", "s", ">= 0"),
        Column("end_s", pa.float64(), "end, exclusive, from the clip's first frame", "s"),
        Column("length", pa.string(), "short, medium or long"),
        Column("status", pa.string(), "ok, truncated, refused or error"),
        Column("text", pa.string(), "the caption; cut off or missing where the status is not ok"),
        Column("flags", _STRINGS, "what is wrong with the text: too_short, repeated, copied, ..."),
        Column("error", pa.string(), "why there is no whole caption"),
        Column("model", pa.string(), "repository and revision, or the server's model name"),
        Column("prompt", pa.string(), "name and hash of the prompt"),
        Column("fps", pa.float64(), "rate of the frames that the model saw", "1/s"),
        Column("frames", pa.int32(), "frames that the model saw", "frames"),
        Column("pixels", pa.int64(), "size of one of them", "pixels"),
    ),
    "verdicts": _table(
        _CLIP_ID,
        _ATTEMPT,
        Column("policy", pa.string(), "name of the policy"),
        Column("policy_hash", pa.string(), "hash of the policy's rules and the dedup threshold"),
        Column("verdict", pa.string(), "keep, reject, duplicate or error"),
        Column("reasons", _STRINGS, "every rule that rejects, or that could not judge"),
        Column("duplicate_of", pa.string(), "the clip that stays"),
        Column("similarity", pa.float64(), "cosine similarity to it", "", "-1..1"),
        Column("seq", pa.int64(), "order of decision in the lake"),
        Column("decided_by", pa.string(), "the run, refilter or materialisation that decided"),
    ),
    "dataset": _table(
        _CLIP_ID,
        _SOURCE_ID,
        _ATTEMPT,
        Column("policy", pa.string(), "policy that kept the clip"),
        Column("media_uri", pa.string(), "the clip's encoded file"),
        Column("content_type", pa.string(), "content type; unknown where it is not measured"),
        Column("resolution", pa.string(), "resolution bucket"),
        Column("aspect_ratio", pa.string(), "aspect ratio bucket"),
        Column("length", pa.string(), "length bucket"),
        Column("bytes", pa.int64(), "size of the encoded file", "bytes"),
        Column("sha256", pa.string(), "SHA-256 of the encoded file; NULL: none was recorded"),
        Column("frames", pa.int64(), "frames in the encoded file", "frames"),
        Column("fps", pa.float64(), "frame rate of the encoded file", "1/s"),
        Column("width", pa.int32(), "width of the encoded file", "pixels"),
        Column("height", pa.int32(), "height of the encoded file", "pixels"),
        Column("duration_s", pa.float64(), "length of the clip", "s"),
        Column("stream_copied", pa.bool_(), "the stream was copied, not encoded"),
        Column("prompt", pa.string(), "prompt from the sidecar"),
    ),
    "runs": _table(
        Column("run_id", pa.string(), "id of the run"),
        Column("started_at", _TIME, "start"),
        Column("finished_at", _TIME, "end"),
        Column("engine", pa.string(), "inline or ray"),
        Column("policy", pa.string(), "name of the policy"),
        Column("input", pa.string(), "what the run was pointed at"),
        Column("config", pa.string(), "resolved configuration, JSON"),
        Column("policy_rules", pa.string(), "the policy as it was, JSON"),
        Column("versions", pa.string(), "versions of Winnow, its packages and operators, JSON"),
        Column("sources_in", pa.int64(), "files that the run took up"),
        Column("counts", pa.string(), "sources by status and clips by verdict, JSON"),
        Column("stages", pa.string(), "seconds, sources, clips and frames by stage, JSON"),
        Column("workers", pa.string(), "pools of stages with a model over time, JSON"),
        Column("wall_s", pa.float64(), "wall time", "s"),
    ),
}
PARTITIONS = {"dataset": ["content_type", "resolution", "aspect_ratio", "length"]}


def arrow_schema(columns: Sequence[Column]) -> pa.Schema:
    return pa.schema([column.field() for column in columns])


@dataclass
class Lake:
    """Handle on the tables under one URI (a local folder or an object store)."""

    uri: str
    options: dict[str, str] = field(default_factory=dict)
    _written: dict[str, pa.Schema] = field(default_factory=dict, repr=False)
    read_by_python: ClassVar[bool] = False
    """This process has let Arrow read a lake through Python: see `files`."""

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @property
    def media_uri(self) -> str:
        return f"{self.uri.rstrip('/')}/media"

    def table_uri(self, table: str) -> str:
        return f"{self.uri.rstrip('/')}/{table}"

    def open(self, table: str) -> DeltaTable | None:
        """The Delta table, or None where nothing was ever written to it.

        Raises LakeError where it cannot be opened, or a newer Winnow has changed the lake's layout.
        """
        try:
            found = DeltaTable(self.table_uri(table), storage_options=self.options or None)
        except TableNotFoundError:
            return None
        except DeltaError as error:
            raise LakeError(f"cannot open table {table} of {self.uri}: {error}") from error
        if table == "sources":  # which everybody opens first
            self._check_layout(found)
        return found

    def _check_layout(self, sources: DeltaTable) -> None:
        layout = sources.metadata().configuration.get(LAYOUT_KEY) or "1"
        if not layout.isdecimal() or int(layout) > LAYOUT:
            raise LakeError(
                f"the lake {self.uri} has layout {layout!r}, which a newer Winnow has made; this one "
                f"knows layouts up to {LAYOUT}: upgrade winnow-video. Nothing was changed"
            )

    def exists(self) -> bool:
        return self.open("sources") is not None

    def require(self) -> None:
        """Raises LakeError where there is no lake."""
        if not self.exists():
            raise LakeError(f"there is no lake at {self.uri}: make one with `winnow run --lake`")

    def create(self, clip_columns: Sequence[Column], measured_later: Sequence[Column] = ()) -> None:
        """Make what tables are missing, and add clip columns that are new.

        Columns `measured_later` stand in `measurements`, and in `clips`, where the views look.
        """
        if self.is_local:
            Path(self.uri).mkdir(parents=True, exist_ok=True)
        more = {"clips": (*clip_columns, *measured_later), "measurements": measured_later}
        for name, columns in TABLES.items():
            self._ensure(name, arrow_schema((*columns, *more.get(name, ()))))

    def _ensure(self, name: str, schema: pa.Schema) -> None:
        table = self.open(name)
        if table is None:
            DeltaTable.create(
                self.table_uri(name),
                schema,
                mode="ignore",
                partition_by=PARTITIONS.get(name),
                configuration={LAYOUT_KEY: str(LAYOUT)} if name == "sources" else None,
                raise_if_key_not_exists=False,  # a key of our own
                storage_options=self.options or None,
            )
            self._written[name] = schema
            return
        present = pa.schema(table.schema().to_arrow())
        for column in schema:
            if column.name in present.names:
                known = present.field(column.name).type
                if not _same_type(known, column.type):
                    raise LakeError(
                        f"column {column.name!r} of {name} is {known} in the lake and "
                        f"{column.type} in this version: use a new lake or rename the operator"
                    )
        missing = [column for column in schema if column.name not in present.names]
        if missing:
            table.alter.add_columns(_delta_fields(missing))
        self._written[name] = _as_said(schema, present)

    def _schema(self, table: str) -> pa.Schema:
        """The columns to write: those of the table, and those that an older version did not have."""
        schema = self._written.get(table)
        if schema is None:
            present = self.open(table)
            if present is None:
                raise LakeError(f"table {table} does not exist in {self.uri}")
            schema = _with_declared(table, pa.schema(present.schema().to_arrow()))
            self._written[table] = schema
        return schema

    def append(
        self, table: str, rows: Sequence[Mapping[str, Any]], batch: tuple[str, int] | None = None
    ) -> None:
        """Append rows; with `batch` (run id, number), the append is remembered as that transaction.

        Unknown keys are an error: a value that has no column would vanish.
        """
        if not rows:
            return
        schema = self._schema(table)
        unknown = {key for row in rows for key in row} - set(schema.names)
        if unknown:
            raise LakeError(f"no column in {table} for {', '.join(sorted(unknown))}")
        data = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
        try:
            self.append_table(table, data, batch)
        except RetryError as error:
            cause = error.last_attempt.exception()
            raise LakeError(
                f"cannot write to table {table} of {self.uri} after {WRITE_TRIES} tries: {cause}. "
                "What was committed before is safe: run again when the storage answers"
            ) from cause

    def append_table(
        self, table: str, data: pa.Table, batch: tuple[str, int] | None = None
    ) -> None:
        """Append an Arrow table; what an object store refuses in passing is tried again.

        An answer that got lost may stand for a commit that did happen: before a batch is tried
        again, the table is asked whether it holds it, because Delta takes a replay for a new append.
        Raises RetryError where the table cannot be written.
        """
        data = pa.table(data.columns, schema=_as_said(data.schema, self._schema(table)))
        for attempt in Retrying(
            retry=retry_if_exception_type((DeltaError, OSError)),
            stop=stop_after_attempt(WRITE_TRIES),
            wait=wait_exponential_jitter(multiplier=0.5, max=10),
            reraise=False,
        ):
            with attempt:
                again = attempt.retry_state.attempt_number > 1
                if again and batch is not None:
                    held = self.committed_batch(table, batch[0])
                    if held is not None and held >= batch[1]:
                        return
                self._write(table, data, batch)

    def _write(self, table: str, data: pa.Table, batch: tuple[str, int] | None) -> None:
        transactions = None if batch is None else [Transaction(batch[0], batch[1])]
        write_deltalake(
            self.table_uri(table),
            data,
            mode="append",
            schema_mode="merge",
            storage_options=self.options or None,
            commit_properties=CommitProperties(app_transactions=transactions),
        )

    def committed_batch(self, table: str, app: str) -> int | None:
        """The last batch number of a run that the table holds (Delta does not refuse replays)."""
        present = self.open(table)
        return None if present is None else present.transaction_version(app)

    def dataset(self, table: str) -> pads.Dataset | None:
        """The table as an Arrow dataset, read lazily.

        Columns that an older version of Winnow did not have are NULL.
        """
        present = self.open(table)
        if present is None:
            return None
        data = present.to_pyarrow_dataset(filesystem=self.files(table))
        schema = _with_declared(table, data.schema)
        return without_file_statistics(data, PARTITIONS.get(table, ()), schema)

    def files(self, table: str) -> pafs.FileSystem | None:
        """Where Arrow reads a table's files; None for deltalake's own access, which is in Python.

        Arrow's threads may still be busy when the interpreter ends, and a thread that asks for Python
        then is killed: the process aborts, or waits for that thread for ever (delta-rs issue 2184). So
        a local lake is read without Python, and `read_by_python` tells the command of any other.
        """
        import pyarrow.fs as pafs

        if not self.is_local:
            Lake.read_by_python = True
            return None
        folder = str(Path(self.table_uri(table)).resolve())
        return pafs.SubTreeFileSystem(folder, pafs.LocalFileSystem())


def _with_declared(table: str, schema: pa.Schema) -> pa.Schema:
    """The schema of a table, and the columns that this version declares and it has not."""
    for column in arrow_schema(TABLES.get(table, ())):
        if column.name not in schema.names:
            schema = schema.append(column)
    return schema


def _as_said(schema: pa.Schema, present: pa.Schema) -> pa.Schema:
    """A schema with the column texts of a table that is there: Delta refuses rows with others."""
    return pa.schema(
        [
            column.with_metadata(present.field(column.name).metadata)
            if column.name in present.names
            else column
            for column in schema
        ]
    )


def without_file_statistics(
    dataset: pads.Dataset, partition: Sequence[str], schema: pa.Schema
) -> pads.Dataset:
    """The same rows under a schema that may have more columns, of files that promise nothing but
    their partition.

    For a column that is younger than a file, deltalake 1.6 promises `column >= NULL`, from which Arrow
    concludes that no value is NULL: `IS NULL` would find nothing, `IS NOT NULL` every row. Parquet's
    own statistics still spare reading.
    """
    import pyarrow.dataset as pads

    fragments = []
    for fragment in dataset.get_fragments():
        keys = pads.get_partition_keys(fragment.partition_expression)
        promise = pads.scalar(True)
        for name in partition:
            promise = promise & (pads.field(name) == keys[name])
        fragments.append(fragment.format.make_fragment(fragment.path, fragment.filesystem, promise))
    if not fragments:
        return pads.dataset(schema.empty_table())
    first = fragments[0]
    return pads.FileSystemDataset(fragments, schema, first.format, first.filesystem)


def _same_type(a: pa.DataType, b: pa.DataType) -> bool:
    def normal(kind: pa.DataType) -> str:
        text = str(kind).replace("large_", "").replace("_view", "")
        return text.replace("element", "item").replace("entries", "").replace(" not null", "")

    return normal(a) == normal(b)


def _delta_fields(fields: Sequence[pa.Field]) -> list[Any]:
    from deltalake import Schema

    return list(Schema.from_arrow(pa.schema(fields)).fields)


def sequence_number() -> int:
    """Order of decisions: microseconds since 1970."""
    return time.time_ns() // 1000
