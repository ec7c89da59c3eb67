"""`winnow lake check`: does a lake keep what the design promises? It reads only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import duckdb
import pyarrow as pa

from winnow.operators.errors import MediaError, StorageError
from winnow.operators.frames import Span
from winnow.operators.media import hash_file
from winnow.pipeline.lake import TABLES, Lake, arrow_schema
from winnow.pipeline.ledger import STATUSES, VERDICTS
from winnow.pipeline.storage import FoundFile, Storage
from winnow.pipeline.views import connect
from winnow.stages.records import clip_identity

SHOWN = 3
"""Examples in the line of a finding."""
KEPT = 20
"""Examples in its JSON."""
COMMIT_POINTS = ("sources", "backfills")
"""Tables that name the attempts that count."""
ATTEMPTED = ("clips", "measurements", "embeddings", "captions", "verdicts", "dataset")
"""Tables whose rows become visible with their attempt."""


@dataclass(frozen=True)
class Finding:
    """One kind of thing that is wrong (or worth knowing), with how often and where."""

    check: str
    count: int
    text: str
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(self.examples[:SHOWN])
        more = ", ..." if self.count > len(self.examples[:SHOWN]) and shown else ""
        return f"{self.check}: {self.count} {self.text}" + (f": {shown}{more}" if shown else "")


@dataclass
class CheckResult:
    """What a check found. Only `violations` make it fail."""

    violations: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    """Rows by table, as they are stored."""
    uncommitted: dict[str, int] = field(default_factory=dict)
    """Rows by table of attempts that never committed: invisible, removed by `winnow lake vacuum`."""

    @property
    def sound(self) -> bool:
        return not self.violations


def present_tables(tables: Sequence[str]) -> list[str]:
    """Those of the tables that this version of Winnow has."""
    return [table for table in tables if table in TABLES]


def committed_attempts() -> str:
    """SQL: the attempts that committed."""
    return " UNION ".join(
        f"SELECT attempt_id FROM raw_{table}" for table in present_tables(COMMIT_POINTS)
    )


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(f"'{word}'" for word in words)


# Small copies of what the checks ask again and again.
_COPIES = {
    "committed": "SELECT DISTINCT attempt_id FROM ({committed})",
    "stored_clips": """
        SELECT clip_id, source_id, attempt_id, start_s, end_s, start_frame, end_frame
        FROM raw_clips WHERE attempt_id IN (SELECT attempt_id FROM committed)""",
    "shown_sources": """
        SELECT source_id, uri, status, attempt_id, frames, fps, duration_s, seq FROM sources""",
    "shown_clips": """
        SELECT * FROM stored_clips
        WHERE attempt_id IN (SELECT attempt_id FROM shown_sources)""",
    "judged": """
        SELECT clip_id, policy, verdict, reasons, duplicate_of, attempt_id FROM verdicts""",
    "stored_dataset": """
        SELECT clip_id, policy, media_uri, bytes, sha256, frames, attempt_id FROM raw_dataset
        WHERE attempt_id IN (SELECT attempt_id FROM committed)""",
}

# (name, what is wrong, query of the places where it is)
_CHECKS: tuple[tuple[str, str, str], ...] = (
    ("sources", "rows with an unknown status",
     f"SELECT uri FROM raw_sources WHERE coalesce(status, '') NOT IN ({_quoted(STATUSES)})"),
    ("sources", "attempts with more than one row",
     "SELECT attempt_id FROM raw_sources GROUP BY 1 HAVING count(*) > 1"),
    ("sources", "done sources without a content hash",
     "SELECT uri FROM raw_sources WHERE status IN ('done', 'copy') AND source_id IS NULL"),
    ("sources", "failed sources without a kind of error",
     "SELECT uri FROM raw_sources WHERE status = 'failed' AND error_kind IS NULL"),
    ("sources", "contents that were processed under more than one address",
     """SELECT source_id || ' (' || string_agg(uri, ' and ' ORDER BY uri) || ')' FROM shown_sources
        WHERE status = 'done' GROUP BY source_id HAVING count(*) > 1"""),
    ("sources", "copies whose first file is not in the lake",
     """SELECT uri FROM raw_sources s WHERE status = 'copy' AND NOT EXISTS (
            SELECT 1 FROM raw_sources o WHERE o.status = 'done' AND o.source_id = s.source_id
            AND o.uri = coalesce(s.copy_of, o.uri))"""),
    ("clips", "ids that are there more than once",
     "SELECT clip_id FROM shown_clips GROUP BY 1 HAVING count(*) > 1"),
    ("clips", "rows that one attempt wrote twice",
     "SELECT clip_id FROM stored_clips GROUP BY clip_id, attempt_id HAVING count(*) > 1"),
    ("clips", "clips whose source is missing, another, or not done",
     """SELECT c.clip_id FROM stored_clips c LEFT JOIN raw_sources s USING (attempt_id)
        WHERE s.source_id IS DISTINCT FROM c.source_id OR s.status IS DISTINCT FROM 'done'"""),
    ("clips", "spans that are empty or outside their source",
     # The end of the last frame may be known no better than by a frame.
     """SELECT clip_id || ' (' || start_frame || '-' || end_frame || ' of ' || frames || ')'
        FROM stored_clips c JOIN raw_sources s USING (attempt_id)
        WHERE NOT coalesce(start_frame >= 0 AND start_frame < end_frame AND end_frame <= frames
            AND start_s >= 0 AND start_s < end_s
            AND end_s <= duration_s + 0.01 + 1.5 / greatest(fps, 1), false)"""),
    ("clips", "clips without a verdict of any policy",
     "SELECT clip_id FROM shown_clips WHERE clip_id NOT IN (SELECT clip_id FROM judged)"),
    ("verdicts", "rows that are no verdict",
     f"SELECT clip_id FROM judged WHERE coalesce(verdict, '') NOT IN ({_quoted(VERDICTS)})"),
    ("verdicts", "rows of clips that are not in the lake",
     """SELECT clip_id FROM raw_verdicts WHERE attempt_id IN (SELECT attempt_id FROM committed)
        AND clip_id NOT IN (SELECT clip_id FROM stored_clips)"""),
    ("verdicts", "decisions that were written twice",
     """SELECT clip_id || ' by ' || policy FROM raw_verdicts
        WHERE attempt_id IN (SELECT attempt_id FROM committed)
        GROUP BY clip_id, policy, seq HAVING count(*) > 1"""),
    ("verdicts", "rejections, errors or duplicates without a reason",
     """SELECT clip_id || ' by ' || policy FROM judged
        WHERE verdict <> 'keep' AND coalesce(len(reasons), 0) = 0"""),
    ("verdicts", "duplicates of no clip, or others that name one",
     """SELECT clip_id || ' by ' || policy FROM judged
        WHERE (verdict = 'duplicate') <> (duplicate_of IS NOT NULL)"""),
    ("verdicts", "duplicates that do not lead to a clip that is kept by the same policy",
     # A clip that others duplicate may have been replaced by a better one later: follow the chain.
     """WITH RECURSIVE chain(clip_id, policy, ends) AS (
            SELECT clip_id, policy, duplicate_of FROM judged WHERE verdict = 'duplicate'
            UNION
            SELECT chain.clip_id, chain.policy, j.duplicate_of FROM chain
            JOIN judged j ON j.clip_id = chain.ends AND j.policy = chain.policy
            WHERE j.verdict = 'duplicate')
        SELECT d.clip_id || ' by ' || d.policy FROM judged d WHERE verdict = 'duplicate'
        AND NOT EXISTS (SELECT 1 FROM chain JOIN judged k
            ON k.clip_id = chain.ends AND k.policy = chain.policy AND k.verdict = 'keep'
            WHERE chain.clip_id = d.clip_id AND chain.policy = d.policy)"""),
    ("dataset", "clips that are there more than once for one policy",
     "SELECT clip_id || ' by ' || policy FROM dataset GROUP BY clip_id, policy HAVING count(*) > 1"),
    ("dataset", "rows of clips that the policy never kept",
     """SELECT d.clip_id || ' by ' || d.policy FROM stored_dataset d WHERE NOT EXISTS (
            SELECT 1 FROM raw_verdicts v
            WHERE v.clip_id = d.clip_id AND v.policy = d.policy AND v.verdict = 'keep')"""),
    ("dataset", "media that are described differently",
     """SELECT media_uri FROM raw_dataset WHERE attempt_id IN (SELECT attempt_id FROM committed)
        GROUP BY media_uri HAVING count(DISTINCT (clip_id, bytes, frames, width, height)) > 1"""),
    ("embeddings", "vectors that are there more than once",
     "SELECT clip_id || ' of ' || model FROM embeddings GROUP BY clip_id, model HAVING count(*) > 1"),
    ("embeddings", "vectors of clips that are not in the lake",
     """SELECT clip_id FROM raw_embeddings WHERE attempt_id IN (SELECT attempt_id FROM committed)
        AND clip_id NOT IN (SELECT clip_id FROM stored_clips)"""),
    ("embeddings", "models whose vectors differ in length",
     """SELECT model || ' (' || string_agg(DISTINCT len(vector), ' and ') || ')' FROM embeddings
        GROUP BY model HAVING count(DISTINCT len(vector)) > 1"""),
    ("embeddings", "vectors that are empty or hold no numbers",
     """SELECT clip_id || ' of ' || model FROM embeddings
        WHERE coalesce(len(vector), 0) = 0
        OR NOT coalesce(isfinite(list_sum(vector)), false)"""),
    ("captions", "captions of clips that are not in the lake",
     """SELECT clip_id FROM raw_captions WHERE attempt_id IN (SELECT attempt_id FROM committed)
        AND clip_id NOT IN (SELECT clip_id FROM stored_clips)"""),
    ("captions", "windows that one attempt wrote twice",
     """SELECT clip_id || ' window ' || window_number || ' ' || length FROM raw_captions
        WHERE attempt_id IN (SELECT attempt_id FROM committed)
        GROUP BY clip_id, attempt_id, window_number, length, prompt, model HAVING count(*) > 1"""),
    ("measurements", "measurements of clips that are not in the lake",
     """SELECT clip_id FROM raw_measurements WHERE attempt_id IN (SELECT attempt_id FROM committed)
        AND clip_id NOT IN (SELECT clip_id FROM stored_clips)"""),
    ("runs", "runs with more than one row",
     "SELECT run_id FROM raw_runs GROUP BY 1 HAVING count(*) > 1"),
    ("ledger", "runs whose sources are not done + copy + failed + incomplete",
     """SELECT r.run_id || ' (' || r.sources_in || ' went in, ' || count(s.attempt_id) || ' are there)'
        FROM raw_runs r LEFT JOIN raw_sources s USING (run_id)
        GROUP BY r.run_id, r.sources_in HAVING count(s.attempt_id) IS DISTINCT FROM r.sources_in"""),
    ("ledger", "runs with clips that have no verdict of the run's policy",
     """SELECT DISTINCT r.run_id FROM raw_runs r JOIN raw_sources s USING (run_id)
        JOIN stored_clips c USING (attempt_id)
        WHERE NOT EXISTS (SELECT 1 FROM raw_verdicts v
            WHERE v.clip_id = c.clip_id AND v.policy = r.policy)"""),
)  # fmt: skip

_NOTES: tuple[tuple[str, str, str], ...] = (
    ("runs", "runs that were stopped before their end (what they committed counts)",
     """SELECT DISTINCT run_id FROM raw_sources
        WHERE run_id NOT IN (SELECT run_id FROM raw_runs)"""),
)  # fmt: skip


def check_lake(
    lake: Lake,
    *,
    deep: bool = False,
    options: dict[str, str] | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> CheckResult:
    """Check every invariant of a lake.

    With `deep`, every encoded clip is hashed and decoded, and every source that is still there hashed
    again; `options` are the storage options of the sources, by default the lake's. Raises LakeError where
    there is no lake.
    """
    result = CheckResult()
    lake.require()
    _check_schemas(lake, result)
    with connect(lake) as connection:
        for name, query in _COPIES.items():
            text = query.format(committed=committed_attempts())
            connection.execute(f"CREATE TEMP TABLE {name} AS {text}")
        for (check, wrong, query), found in (
            *((one, result.violations) for one in _CHECKS if one[0] in (*TABLES, "ledger")),
            *((one, result.notes) for one in _NOTES),
        ):
            told(f"{check}: {wrong}?")
            found += _ask(connection, check, wrong, query)
        _check_counts(connection, result)
        _check_kept(connection, result)
        _check_identities(connection, result)
        _count_rows(connection, result)
        told("media: are the files there?")
        _check_media(connection, lake, result, deep=deep, told=told)
        if deep:
            _check_sources(connection, lake.options if options is None else options, result, told)
    return result


def _ask(
    connection: duckdb.DuckDBPyConnection, check: str, wrong: str, query: str
) -> list[Finding]:
    try:
        rows = connection.execute(
            f"SELECT count(*) OVER (), place FROM ({query}) found(place) ORDER BY place LIMIT {KEPT}"
        ).fetchall()
    except duckdb.BinderException:
        return []  # a column of another type, which is said of the schema
    if not rows:
        return []
    return [Finding(check, rows[0][0], wrong, tuple(str(place) for _, place in rows))]


def _finding(check: str, wrong: str, places: Sequence[str]) -> list[Finding]:
    return [Finding(check, len(places), wrong, tuple(places[:KEPT]))] if places else []


def _check_schemas(lake: Lake, result: CheckResult) -> None:
    wrong: list[str] = []
    missing: list[str] = []
    for name, columns in TABLES.items():
        table = lake.open(name)
        if table is None:
            missing.append(name)
            continue
        present = pa.schema(table.schema().to_arrow())
        for column in arrow_schema(columns):
            if column.name not in present.names:
                missing.append(f"{name}.{column.name}")
            elif _plain(present.field(column.name).type) != _plain(column.type):
                wrong.append(f"{name}.{column.name} is {present.field(column.name).type}")
    result.violations += _finding("schema", "columns of another type than this version's", wrong)
    result.notes += _finding(
        "schema", "tables or columns that an older version did not have: the next run adds them",
        missing,
    )  # fmt: skip


def _plain(kind: pa.DataType) -> str:
    """A type without what storage does to it."""
    if pa.types.is_map(kind):
        return f"map<{_plain(kind.key_type)}, {_plain(kind.item_type)}>"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind):
        return f"list<{_plain(kind.value_type)}>"
    return str(kind).replace("large_", "").replace("_view", "")


def _check_counts(connection: duckdb.DuckDBPyConnection, result: CheckResult) -> None:
    """What each run said of its sources must be what is there."""
    there: dict[str, dict[str, int]] = {}
    for run_id, status, count in connection.execute(
        "SELECT run_id, status, count(*) FROM raw_sources GROUP BY 1, 2"
    ).fetchall():
        there.setdefault(run_id, {})[status] = count
    differing = []
    for run_id, counts in connection.execute("SELECT run_id, counts FROM raw_runs").fetchall():
        said = json.loads(counts or "{}").get("sources", {})
        if said != there.get(run_id, {}):
            differing.append(f"{run_id} (said {said}, there are {there.get(run_id, {})})")
    result.violations += _finding("ledger", "runs that counted otherwise", differing)


def _check_kept(connection: duckdb.DuckDBPyConnection, result: CheckResult) -> None:
    """Where runs make media, a policy's kept clips are in its dataset, or wait to be made."""
    configs = connection.execute("SELECT config FROM raw_runs").fetchall()
    made = [stage.get("stage") for (text,) in configs
            for stage in json.loads(text or "{}").get("stages", ())]  # fmt: skip
    if "shard" not in made:
        return
    result.notes += _ask(
        connection,
        "dataset",
        "kept clips without media: `winnow materialize --policy` makes them",
        """SELECT clip_id || ' by ' || policy FROM judged j WHERE verdict = 'keep' AND NOT EXISTS (
            SELECT 1 FROM dataset d WHERE d.clip_id = j.clip_id AND d.policy = j.policy)""",
    )


def _check_identities(connection: duckdb.DuckDBPyConnection, result: CheckResult) -> None:
    """A clip's id is a hash of its source and its span."""
    wrong = []
    reader = connection.execute(
        "SELECT DISTINCT clip_id, source_id, start_frame, end_frame FROM stored_clips"
    )
    while rows := reader.fetchmany(10_000):
        wrong += [
            clip_id
            for clip_id, source_id, start, end in rows
            if None in (source_id, start, end)
            or end <= start  # told apart: there is no such span
            or clip_identity(source_id, Span(start, end)) != clip_id
        ]
    result.violations += _finding("clips", "ids that are not the hash of source and span", wrong)


def _count_rows(connection: duckdb.DuckDBPyConnection, result: CheckResult) -> None:
    for table in TABLES:
        ((rows,),) = connection.execute(f"SELECT count(*) FROM raw_{table}").fetchall()
        result.rows[table] = rows
    for table in present_tables(ATTEMPTED):
        ((rows,),) = connection.execute(
            f"""SELECT count(*) FROM raw_{table}
            WHERE attempt_id NOT IN (SELECT attempt_id FROM committed)"""
        ).fetchall()
        if rows:
            result.uncommitted[table] = rows


def _check_media(
    connection: duckdb.DuckDBPyConnection,
    lake: Lake,
    result: CheckResult,
    *,
    deep: bool,
    told: Callable[[str], None],
) -> None:
    """Every row of the dataset has its file, of the size and, if `deep`, with the hash recorded."""
    rows = connection.execute(
        """SELECT media_uri, bytes, max(frames), sha256, min(clip_id) FROM stored_dataset
        GROUP BY media_uri, bytes, sha256 ORDER BY ALL"""
    ).fetchall()
    missing: list[str] = []
    resized: list[str] = []
    damaged: list[str] = []
    broken: list[str] = []
    unhashed: list[str] = []
    by_root: dict[str, list[_Recorded]] = {}
    for uri, *recorded in rows:
        root, marker, _ = str(uri).rpartition("/media/")
        by_root.setdefault(f"{root}/media" if marker else lake.media_uri, []).append(
            _Recorded(str(uri), *recorded)
        )
    for root, files in by_root.items():
        try:
            storage = Storage.open(root, options=lake.options)
            found = {file.uri: file for file in storage.find(["**"])}
        except StorageError:
            found = {}
        for number, media in enumerate(files):
            if (file := found.get(media.uri)) is None:
                missing.append(media.uri)
            elif file.size != media.bytes:
                resized.append(f"{media.uri} ({file.size} bytes, not {media.bytes})")
            elif deep:
                told(f"media: hashing and decoding {number + 1} of {len(files)}")
                if media.sha256 is None:
                    unhashed.append(media.uri)
                for other, why in _broken_media(storage, file, media):
                    (damaged if other else broken).append(why)
    result.violations += _finding("media", "files that are missing", missing)
    result.violations += _finding("media", "files of another size than recorded", resized)
    # A line for each: these are to be brought back one by one.
    for one in damaged:
        result.violations += _finding("media", "file with another content than recorded", [one])
    result.violations += _finding("media", "files that do not decode as recorded", broken)
    result.notes += _finding(
        "media", "files with no hash recorded, as older versions made them: only decoded", unhashed
    )
    elsewhere = [root for root in by_root if root.rstrip("/") != lake.media_uri.rstrip("/")]
    result.notes += _finding(
        "media", "folders outside this lake hold its media: was it copied or moved", elsewhere
    )


@dataclass(frozen=True, slots=True)
class _Recorded:
    """What the dataset says of one encoded file."""

    uri: str
    bytes: int
    frames: int
    sha256: str | None
    clip_id: str


def _broken_media(
    storage: Storage, file: FoundFile, media: _Recorded
) -> Iterator[tuple[bool, str]]:
    """Whether the content is another than recorded, and what is wrong. The file is fetched once."""
    import av

    try:
        with storage.local(file.key) as path:
            if media.sha256 is not None and (found := hash_file(path)) != media.sha256:
                told = f"SHA-256 recorded {media.sha256}, found {found}"
                yield True, f"clip {media.clip_id}, {file.uri}, {told}"
                return
            with av.open(str(path)) as container:
                # Otherwise the decoder paints over what is broken.
                container.streams.video[0].codec_context.options = {"err_detect": "explode"}
                whole = sum(not frame.is_corrupt for frame in container.decode(video=0))
    except (av.FFmpegError, IndexError, OSError, MediaError, StorageError) as error:
        yield False, f"{file.uri} ({str(error)[:100]})"
        return
    if whole != media.frames:
        yield False, f"{file.uri} ({whole} whole frames, not {media.frames})"


def _check_sources(
    connection: duckdb.DuckDBPyConnection,
    options: dict[str, str],
    result: CheckResult,
    told: Callable[[str], None],
) -> None:
    """Sources that are still what they were must have the content that their id names."""
    rows = connection.execute(
        """SELECT uri, source_id, bytes, modified, etag FROM sources
        WHERE status IN ('done', 'copy') ORDER BY uri"""
    ).fetchall()
    gone, changed, wrong = [], [], []
    for number, (uri, source_id, size, modified, etag) in enumerate(rows):
        told(f"sources: hashing {number + 1} of {len(rows)}")
        try:
            storage = Storage.open(uri, options=options)
            file = next(storage.find(["**"])) if storage.single else None
        except StorageError:
            file = None
        if file is None:
            gone.append(uri)
        elif file.size != size or (
            etag != file.etag if etag and file.etag else modified != file.modified
        ):
            changed.append(uri)
        elif storage.hash(file.key) != source_id:
            wrong.append(uri)
    result.violations += _finding("sources", "files whose content is not what was hashed", wrong)
    result.notes += _finding("sources", "files that are no longer there", gone)
    result.notes += _finding("sources", "files that have changed since", changed)
