"""A lake of a million clips: refilter, an aggregate query and the difference of two policies.

The rows are drawn, not measured: one clip a source, 30 score columns, some of them NULL. Every timed
command runs in a process of its own, whose peak memory is that of the command.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from winnow.operators.operator import Column
from winnow.pipeline.config import load_config
from winnow.pipeline.lake import TABLES, Lake, arrow_schema
from winnow.pipeline.policy import Policy, Rule, load_policy
from winnow.pipeline.views import connect

CLIPS = 1_000_000
BATCH = 250_000
SCORES = 30
SCALES = {
    "shots_in_source": 1.0, "duration_s": 30.0, "motion_mean": 0.05, "frozen_ratio": 0.27,
    "frozen_tail_s": 0.8, "frozen_longest_s": 1.05, "exposure_mean": 0.95,
    "exposure_black_frames": 0.3, "exposure_white": 0.37, "exposure_contrast": 1.5,
    "sharpness_mean": 1.5, "text_line_s": 1.1, "text_corner_share": 0.65,
}  # fmt: skip
"""The columns of policy `generated`, and the largest score of each: most clips pass every rule."""
NULLS = 0.002
GENERATORS = ("predict2.5-2b", "predict2.5-14b", "transfer2.5-2b", "wan2.2")


def score_columns(count: int = SCORES) -> dict[str, float]:
    """Name and largest value of each score."""
    return SCALES | {f"score_{n}": 1.0 for n in range(count - len(SCALES))}


def strict() -> Policy:
    """Another policy than `generated`: some rules move, one is left out, one ranks."""
    rules = {rule.name: rule for rule in load_policy("generated").rules}
    del rules["watermark"]
    rules["too_short"] = Rule(name="too_short", reject="duration_s < 4.0")
    rules["blurred"] = Rule(name="blurred", reject="sharpness_mean < 0.10")
    rules["poor"] = Rule(
        name="poor", percentile={"column": "score_3", "below": 15, "by": ("generator",)}
    )
    return Policy(name="strict", rules=tuple(rules.values()))


def build(uri: str, clips: int = CLIPS, scores: int = SCORES, dimensions: int = 0) -> Lake:
    """Write a lake of drawn rows, without verdicts: sources, clips, one run.

    With `dimensions`, every clip has an embedding of that many floats; one in fifty lies near the
    clip before it.
    """
    lake, columns = Lake(uri), score_columns(scores)
    lake.create(
        [
            *(Column(name, pa.float64(), "a drawn score") for name in columns),
            Column("content_type_label", pa.string(), "a drawn label"),
        ]
    )
    rng = np.random.default_rng(5)
    config = load_config("cpu")
    dedup = config.stage("dedup")
    for start in range(0, clips, BATCH):
        count = min(BATCH, clips - start)
        ids = _identities(start, count)
        lake.append_table("clips", _clips(ids, columns, rng))
        if dimensions and dedup is not None:
            lake.append_table("embeddings", _embeddings(ids, dimensions, dedup.embedding, rng))
        lake.append_table("sources", _sources(ids, start, rng))
    now = datetime.now(UTC)
    lake.append("runs", [{
        "run_id": "drawn", "started_at": now, "finished_at": now, "engine": "inline",
        "policy": "generated", "input": "drawn", "config": config.model_dump_json(),
        "policy_rules": load_policy("generated").model_dump_json(), "sources_in": clips,
    }])  # fmt: skip
    return lake


def add_dataset(lake: Lake, policy: str) -> int:
    """Write the rows of a policy's dataset as if a run had encoded what it keeps. Returns how many."""
    with connect(lake) as connection:
        rows = connection.sql(
            """SELECT c.clip_id, c.source_id, c.attempt_id, v.policy,
                   '/data/lake/media/' || c.clip_id || '-libx264-crf18.mp4' AS media_uri,
                   coalesce(c.content_type_label, 'unknown') AS content_type, '720' AS resolution,
                   '16:9' AS aspect_ratio,
                   CASE WHEN c.end_s < 5 THEN '0-5s' WHEN c.end_s < 10 THEN '5-10s'
                       ELSE '10-30s' END AS length,
                   5000000 AS bytes, c.end_frame AS frames, s.fps, s.width, s.height,
                   c.end_s AS duration_s, false AS stream_copied, s.prompt
            FROM clips c JOIN sources s USING (attempt_id) JOIN verdicts v USING (clip_id)
            WHERE v.policy = $policy AND v.verdict = 'keep'""",
            params={"policy": policy},
        ).to_arrow_table()
    known = arrow_schema(TABLES["dataset"])
    lake.append_table(
        "dataset",
        pa.table({f.name: rows[f.name].cast(f.type) for f in known if f.name in rows.schema.names}),
    )
    return int(rows.num_rows)


def _identities(start: int, count: int) -> pa.Table:
    with duckdb.connect() as connection:
        return connection.sql(
            """SELECT md5('clip' || i) AS clip_id, sha256('source' || i) AS source_id,
                      md5('attempt' || i) AS attempt_id, i AS number FROM range(?, ?) t(i)""",
            params=[start, start + count],
        ).to_arrow_table()


def _table(name: str, count: int, columns: dict[str, Any]) -> pa.Table:
    """The table's own columns, NULL where nothing is given."""
    given = {key: value if isinstance(value, pa.Array | pa.ChunkedArray) else pa.array(value)
             for key, value in columns.items()}  # fmt: skip
    known = arrow_schema(TABLES[name])
    given |= {f.name: pa.nulls(count, f.type) for f in known if f.name not in given}
    return pa.table({
        key: value.cast(known.field(key).type) if key in known.names else value
        for key, value in given.items()
    })  # fmt: skip


def _clips(ids: pa.Table, scores: dict[str, float], rng: np.random.Generator) -> pa.Table:
    count = ids.num_rows
    columns: dict[str, Any] = {name: ids[name] for name in ("clip_id", "source_id", "attempt_id")}
    seconds = rng.uniform(1.9, 30, count)
    columns |= {
        "start_s": np.zeros(count), "end_s": seconds, "start_frame": np.zeros(count, np.int64),
        "end_frame": (seconds * 24).astype(np.int64),
    }  # fmt: skip
    for name, largest in scores.items():
        drawn = seconds if name == "duration_s" else rng.uniform(0, largest, count)
        columns[name] = pa.array(drawn, mask=rng.random(count) < NULLS)
    kinds = np.array(["person", "driving", "robot", "scenery"])
    columns["content_type_label"] = kinds[rng.integers(0, 4, count)]
    return _table("clips", count, columns)


def _sources(ids: pa.Table, start: int, rng: np.random.Generator) -> pa.Table:
    count = ids.num_rows
    return _table("sources", count, {
        "source_id": ids["source_id"], "attempt_id": ids["attempt_id"],
        "uri": [f"s3://generations/night/{start + n:08d}.mp4" for n in range(count)],
        "status": ["done"] * count, "run_id": ["drawn"] * count, "seq": ids["number"],
        "fps": np.full(count, 24.0), "width": np.full(count, 1280), "height": np.full(count, 704),
        "variable_frame_rate": np.zeros(count, bool),
        "generator": np.array(GENERATORS)[rng.integers(0, len(GENERATORS), count)],
        "prompt": [f"prompt {n % 5000}" for n in range(count)],
    })  # fmt: skip


def _embeddings(ids: pa.Table, dimensions: int, model: str, rng: np.random.Generator) -> pa.Table:
    count = ids.num_rows
    vectors = rng.standard_normal((count, dimensions), np.float32)
    near = np.flatnonzero(rng.random(count) < 0.02)
    near = near[near > 0]
    noise = 0.1 * rng.standard_normal((len(near), dimensions), np.float32)
    vectors[near] = vectors[near - 1] + noise
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    offsets = np.arange(0, count * dimensions + 1, dimensions, dtype=np.int32)
    return _table("embeddings", count, {
        "clip_id": ids["clip_id"], "attempt_id": ids["attempt_id"], "model": [model] * count,
        "vector": pa.ListArray.from_arrays(pa.array(offsets), pa.array(vectors.reshape(-1))),
    })  # fmt: skip


# What a process of its own does; each prints one JSON object.
def _refilter(lake: Lake) -> dict[str, Any]:
    from winnow.pipeline.refilter import refilter

    result = refilter(lake, strict())
    return {"clips": result.clips, "verdicts": result.counts, "changed": result.changed,
            "shared": result.shared}  # fmt: skip


def _query(lake: Lake) -> dict[str, Any]:
    with connect(lake) as connection:
        rows = connection.execute(
            """SELECT generator, verdict, count(*), avg(motion_mean), median(sharpness_mean)
            FROM clips_decided GROUP BY ALL ORDER BY ALL"""
        ).fetchall()
    return {"groups": len(rows)}


def _diff(lake: Lake) -> dict[str, Any]:
    from winnow.pipeline.policy_diff import diff_policies

    found = diff_policies(lake, "generated", "strict")
    return {"clips": found.clips, "changed": found.changed}


def _sample(lake: Lake) -> dict[str, Any]:
    """Ask the predicates clip by clip, as a run does, of a sample: the same verdicts."""
    from winnow.pipeline.policy import Evaluator

    policy = strict()
    plain = policy.model_copy(update={"rules": tuple(r for r in policy.rules if not r.percentile)})
    with connect(lake) as connection:
        table = connection.sql(
            """SELECT c.*, s.generator, v.reasons FROM clips c JOIN sources s USING (attempt_id)
            JOIN verdicts v ON v.clip_id = c.clip_id AND v.policy = 'strict'
            WHERE hash(c.clip_id) % 1000 = 0"""
        ).to_arrow_table()
    names = set(score_columns())
    evaluator = Evaluator(
        plain, [Column(f.name, f.type, "") for f in table.schema if f.name in names]
    )
    rows = table.to_pylist()
    wrong = 0
    for row, (rejecting, undecided) in zip(rows, evaluator.rejects(rows), strict=True):
        ranked = [reason for reason in row["reasons"] or [] if reason != "poor"]
        wrong += ranked != rejecting and not (not rejecting and ranked == undecided)
    return {"sample": len(rows), "differ": wrong}


STEPS = {"refilter": _refilter, "query": _query, "diff": _diff, "sample": _sample}


def measure(step: str, uri: str) -> dict[str, Any]:
    """Run one step in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.lake", "--step", step, "--lake", uri],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


def _step(step: str, lake: Lake) -> None:
    started = time.perf_counter()
    answer = STEPS[step](lake)
    wall = time.perf_counter() - started
    cpu = time.process_time()
    # Not ru_maxrss, which begins with what the parent process had.
    status = Path("/proc/self/status").read_text()
    peak_kib = int(status.split("VmHWM:")[1].split()[0])
    print(
        json.dumps(
            {
                "wall_s": round(wall, 2),
                "cpu_s": round(cpu, 2),
                "peak_mib": round(peak_kib / 1024),
                **answer,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--lake", help="where the lake is or goes; default: a temporary folder")
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.step:
        _step(given.step, Lake(given.lake))
        return
    with tempfile.TemporaryDirectory() as folder:
        uri = given.lake or str(Path(folder) / "lake")
        results: dict[str, Any] = {"clips": given.clips}
        if not Lake(uri).exists():
            started = time.perf_counter()
            lake = build(uri, given.clips)
            results["build_s"] = round(time.perf_counter() - started, 1)
            from winnow.pipeline.refilter import refilter

            # They stand in for the run's verdicts, and for what it encoded.
            refilter(lake, load_policy("generated"))
            add_dataset(lake, "generated")
        for step in STEPS:
            results[step] = measure(step, uri)
    print(json.dumps(results) if given.json else json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
