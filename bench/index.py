"""The vector index at scale: dedup with 1,000 new clips, and how many neighbours the index finds.

The vectors lie in clusters, like clips of few subjects, and some are near-duplicates of others. They
go in through `MilvusIndex.add_all`; 1,000 new clips then go through the rule of dedup, a search and,
unless it is a duplicate, an insert each. Recall is against the exact answer, by matrix products.

A Milvus server is the package `milvus` 2.3.5, not among the dependencies:
`uv pip install --no-deps milvus==2.3.5`. It has no password and listens on every interface, so this
starts it in a network namespace of its own (needs root), unless `--open-ports` says otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from winnow.pipeline.index import MilvusIndex
from winnow.stages.dedup import Entry, ExactIndex, KeptIndex, Neighbour, resolve

COUNT = 1_000_000
DIMENSIONS = 256
NEW = 1_000
THRESHOLD = 0.80
"""As in configs/cpu.yaml."""
PER_CLUSTER = 100
PIXELS = 1280 * 720
BLOCK = 10_000
COPIES = 0.05
"""Share of the stored clips that are near-duplicates of another stored clip."""
NEW_COPIES = 0.5
SECONDS = 60.0
"""A backend that is slower stops adding there; the figure for 1,000 is then of those added."""
SETTLE_S = 300.0
"""Longest wait until a server has indexed what is stored."""
BACKENDS = ("exact", "lite", "server", "server-hnsw")


def cluster_vectors(count: int, dimensions: int, seed: int = 5) -> NDArray[np.float32]:
    """Unit vectors around random centres: two of one cluster have a cosine of about 0.6.

    One in twenty is a near-duplicate (0.85 to 1) of a vector before it.
    """
    rng = np.random.default_rng(seed)
    centres = unit(rng.standard_normal((max(1, count // PER_CLUSTER), dimensions), np.float32))
    vectors = np.empty((count, dimensions), np.float32)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        block = vectors[start : start + size]
        block[:] = nearby(centres[rng.integers(len(centres), size=size)], np.full(size, 0.78), rng)
        if start:
            copies = np.flatnonzero(rng.random(size) < COPIES)
            originals = vectors[rng.integers(start, size=len(copies))]
            block[copies] = nearby(originals, rng.uniform(0.85, 1, len(copies)), rng)
    return vectors


def new_vectors(
    stored: NDArray[np.float32], count: int = NEW, seed: int = 6
) -> NDArray[np.float32]:
    """The clips to add: half are near-duplicates (0.75 to 1) of stored ones, half lie near none."""
    rng = np.random.default_rng(seed)
    originals = stored[rng.integers(len(stored), size=count)]
    copied = rng.random(count) < NEW_COPIES
    return nearby(originals, np.where(copied, rng.uniform(0.75, 1, count), 0.55), rng)


def nearby(
    vectors: NDArray[np.float32], cosine: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Unit vectors at a given cosine from others."""
    noise = rng.standard_normal(vectors.shape, np.float32)
    noise -= np.sum(noise * vectors, axis=1, keepdims=True) * vectors
    wanted = cosine.astype(np.float32)[:, None]
    return unit(wanted * vectors + np.sqrt(1 - wanted**2) * unit(noise))


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def exact_neighbours(
    stored: NDArray[np.float32], new: NDArray[np.float32], threshold: float
) -> list[dict[int, float]]:
    """For each new vector the rows of the stored ones that reach the threshold, and their cosine."""
    found: list[dict[int, float]] = [{} for _ in new]
    for start in range(0, len(stored), BLOCK):
        similarities = new @ stored[start : start + BLOCK].T
        for clip, row in zip(*np.nonzero(similarities >= threshold), strict=True):
            found[clip][start + int(row)] = float(similarities[clip, row])
    return found


@dataclass
class Watched:
    """An index whose answers and times are kept."""

    index: KeptIndex
    found: list[dict[str, float]] = field(default_factory=list)
    search_s: list[float] = field(default_factory=list)
    insert_s: list[float] = field(default_factory=list)

    def search(self, vector: NDArray[np.float32], threshold: float) -> Sequence[Neighbour]:
        started = time.perf_counter()
        near = self.index.search(vector, threshold)
        self.search_s.append(time.perf_counter() - started)
        self.found.append({n.clip_id: n.similarity for n in near})
        return near

    def add(self, entry: Entry) -> None:
        started = time.perf_counter()
        self.index.add(entry)
        self.insert_s.append(time.perf_counter() - started)

    def remove(self, clip_ids: Sequence[str]) -> None:
        self.index.remove(clip_ids)

    def next_age(self) -> int:
        return self.index.next_age()

    def close(self) -> None:
        self.index.close()


class Memory:
    """The largest memory that is no mapped file, of some processes together, in MiB."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.peak = 0.0
        self._processes = [psutil.Process(pid) for pid in pids]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def now(self) -> float:
        total = 0
        for member in self._members():
            with suppress(psutil.Error):
                memory = member.memory_info()
                total += memory.rss - memory.shared
        return total / 2**20

    def cpu_s(self) -> float:
        """CPU time so far, of these processes together."""
        total = 0.0
        for member in self._members():
            with suppress(psutil.Error):
                times = member.cpu_times()
                total += times.user + times.system
        return total

    def _members(self) -> set[psutil.Process]:
        found = set(self._processes)
        for process in self._processes:
            with suppress(psutil.Error):
                found.update(process.children(recursive=True))
        return found

    def _watch(self) -> None:
        while not self._end.wait(0.5):
            self.peak = max(self.peak, self.now())

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.peak = max(self.peak, self.now())


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, int]]:
    """A Milvus server: its address and process."""
    from milvus import MilvusServer, MilvusServerConfig

    milvus = MilvusServer(MilvusServerConfig(data_dir=str(folder)))
    milvus.start()
    try:
        yield f"http://127.0.0.1:{milvus.listen_port}", milvus.server_proc.pid
    finally:
        milvus.stop()


def settle(index: MilvusIndex, seconds: float) -> bool:
    """Wait until all that was given is in indexed segments; whether it is."""
    client, deadline = index._client, time.perf_counter() + seconds
    index.flush()
    if "://" not in index.uri:
        return True
    while time.perf_counter() < deadline:
        state = client.describe_index(index.collection, client.list_indexes(index.collection)[0])
        if int(state.get("pending_index_rows", 0)) == 0:
            # Indexed segments take the place of the growing ones some seconds later.
            time.sleep(5)
            return True
        time.sleep(1)
    return False


def measure(
    backend: str, stored: NDArray[np.float32], folder: Path, seconds: float
) -> dict[str, Any]:
    """One backend with the stored vectors."""
    new = new_vectors(stored)
    if backend.startswith("server"):
        with server(folder / "milvus") as (uri, pid):
            return _measure(backend, stored, new, uri, [os.getpid(), pid], seconds)
    return _measure(backend, stored, new, str(folder / "milvus.db"), [os.getpid()], seconds)


def _measure(
    backend: str, stored: NDArray[np.float32], new: NDArray[np.float32], uri: str,
    pids: list[int], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    with Memory(pids) as memory:
        before = memory.now()
        index: MilvusIndex | ExactIndex = ExactIndex()
        if backend != "exact":
            hnsw = backend == "server-hnsw"
            index = MilvusIndex(uri, "kept", index_type="HNSW" if hnsw else "FLAT")
            index.open(stored.shape[1])
        started = time.perf_counter()
        for start in range(0, len(stored), BLOCK):
            entries = [
                Entry(f"{row:032x}", stored[row], PIXELS, row)
                for row in range(start, min(start + BLOCK, len(stored)))
            ]
            if isinstance(index, MilvusIndex):
                index.add_all(entries)
            else:
                for entry in entries:
                    index.add(entry)
        inserted = time.perf_counter() - started
        settled = isinstance(index, ExactIndex) or settle(index, SETTLE_S)
        settling = time.perf_counter() - started - inserted
        index.next_age()
        watched = Watched(index)
        first = len(stored)
        started = time.perf_counter()
        watched.search(new[0], THRESHOLD)  # the first one loads what was written
        first_search, watched = time.perf_counter() - started, Watched(index)
        started, cpu = time.perf_counter(), memory.cpu_s()
        added = 0
        for number, vector in enumerate(new):
            resolve(f"{first + number:032x}", vector, PIXELS, watched, THRESHOLD)
            added += 1
            if time.perf_counter() - started > seconds:
                break
        adding, cpu = time.perf_counter() - started, memory.cpu_s() - cpu
        index.close()
    return {
        "backend": backend,
        "stored": len(stored),
        "dimensions": stored.shape[1],
        "stored_in_s": round(inserted, 1),
        "settled_in_s": round(settling, 1),
        "settled": settled,
        "first_search_s": round(first_search, 2),
        "new": added,
        "s_per_1000_new": round(adding / added * 1000, 1),
        "cpu_s_per_1000_new": round(cpu / added * 1000, 1),
        "search_ms": _quantiles(watched.search_s),
        "insert_ms": _quantiles(watched.insert_s),
        "memory_mib": round(memory.peak - before),
        **_recall(stored, new[:added], watched.found),
    }


def _quantiles(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.quantile(seconds, (0.5, 0.99)) * 1000 if seconds else (np.nan, np.nan)
    return {"p50": round(float(p50), 1), "p99": round(float(p99), 1)}


def _recall(
    stored: NDArray[np.float32], new: NDArray[np.float32], found: list[dict[str, float]]
) -> dict[str, float]:
    """Of the stored neighbours and of the clips that have one, the share that was found."""
    pairs = pairs_found = clips = clips_found = 0
    worst = 0.0
    for exact, seen in zip(exact_neighbours(stored, new, THRESHOLD), found, strict=True):
        known = {int(clip_id, 16): similarity for clip_id, similarity in seen.items()}
        hits = exact.keys() & known.keys()
        pairs, pairs_found = pairs + len(exact), pairs_found + len(hits)
        clips, clips_found = clips + bool(exact), clips_found + bool(hits)
        worst = max([worst, *(abs(exact[row] - known[row]) for row in hits)])
    return {
        "neighbours": pairs,
        "recall": round(pairs_found / max(1, pairs), 4),
        "clips_with_neighbours": clips,
        "clips_recall": round(clips_found / max(1, clips), 4),
        "largest_cosine_error": round(worst, 6),
    }


def in_own_process(
    backend: str, vectors: Path, folder: Path, seconds: float, open_ports: bool
) -> dict[str, Any]:
    """`measure` in a fresh process, whose memory is its own."""
    if backend.startswith("server") and importlib.util.find_spec("milvus") is None:
        return {
            "backend": backend,
            "failed": "no server here: uv pip install --no-deps milvus==2.3.5",
        }
    command = [sys.executable, "-m", "bench.index", "--measure", backend, str(vectors),
               str(folder), "--seconds", str(seconds)]  # fmt: skip
    if backend.startswith("server") and not open_ports:
        # Nobody but this one command reaches the server.
        quoted = 'ip link set lo up 2>/dev/null || "$0" -c "$1"; shift; exec "$0" "$@"'
        command = ["unshare", "-n", "sh", "-c", quoted, sys.executable, _LOOPBACK_UP, *command[1:]]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        return {"backend": backend, "failed": (done.stderr or done.stdout)[-600:]}


_LOOPBACK_UP = """
import fcntl, socket, struct
SIOCSIFFLAGS, IFF_UP_RUNNING = 0x8914, 0x41
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    fcntl.ioctl(s, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP_RUNNING))
"""
"""For machines without `ip`."""


def show(row: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"{row['backend']:12} failed: {row['failed']}", file=sys.stderr)
        return
    print(
        f"{row['backend']:12} {row['stored']:9,d} stored in {row['stored_in_s']:7.1f} s"
        f" (+{row['settled_in_s']:.0f} s), 1,000 new in {row['s_per_1000_new']:7.1f} s"
        f" (measured on {row['new']:,d}; CPU {row['cpu_s_per_1000_new']:.0f} s)"
        f" (search p50 {row['search_ms']['p50']} ms, insert {row['insert_ms']['p50']} ms),"
        f" recall {row['recall']:.4f}, {row['memory_mib']:,d} MiB",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, action="append", help="clips stored; may be repeated")
    parser.add_argument("--dimensions", type=int, default=DIMENSIONS)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: all of them")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="most for the new clips")
    parser.add_argument("--open-ports", action="store_true", help="no namespace for the server")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        backend, vectors, folder = arguments.measure
        stored = np.load(vectors, mmap_mode="r")
        print(json.dumps(measure(backend, stored, Path(folder), arguments.seconds)))
        return
    rows = []
    for count in arguments.count or [COUNT]:
        with tempfile.TemporaryDirectory(prefix="winnow-index-") as scratch:
            vectors = Path(scratch, "vectors.npy")
            np.save(vectors, cluster_vectors(count, arguments.dimensions))
            for backend in arguments.backend or BACKENDS:
                folder = Path(scratch, backend)
                folder.mkdir()
                row = in_own_process(
                    backend, vectors, folder, arguments.seconds, arguments.open_ports
                )
                show(row)
                rows.append(row)
                shutil.rmtree(folder, ignore_errors=True)
    if arguments.json:
        print(json.dumps({"threshold": THRESHOLD, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
