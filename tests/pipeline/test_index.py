"""The index is derived from the lake: embedded or on a server, lost or out of step."""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.pipeline.lakes import config, facts, rows
from winnow.pipeline.index import MilvusIndex, default_index_uri
from winnow.pipeline.kept_index import KeptClips, OpenKeptIndex
from winnow.pipeline.lake import Lake
from winnow.pipeline.run import run
from winnow.stages.dedup import Entry


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Milvus server on loopback, in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("milvus")
    command = [Path(sys.executable).parent / "milvus-lite", "server", "--host", "127.0.0.1",
               "--port", str(port), "--data-dir", str(folder)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=20)


def test_a_server_gives_what_the_embedded_index_gives(videos, lake, server, tmp_path):
    other = Lake(str(tmp_path / "lake"))
    run(config(f"stages.dedup.index.uri={server}"), str(videos), other, limit=4)
    run(config(f"stages.dedup.index.uri={server}"), str(videos), other)
    assert not (tmp_path / "lake" / "index").exists()
    assert facts(other)["verdicts"] == facts(lake)["verdicts"]


def opener(of: Lake) -> OpenKeptIndex:
    return OpenKeptIndex(KeptClips(of, "fingerprint_v1", "generated"), default_index_uri(of))


def kept(of: Lake) -> set[str]:
    return {c for (c,) in rows(of, "SELECT clip_id FROM verdicts WHERE verdict = 'keep'")}


def test_a_lost_index_is_rebuilt_from_the_lake(videos, tmp_path):
    own = Lake(str(tmp_path / "lake"))
    run(config(), str(videos), own, limit=6)
    shutil.rmtree(tmp_path / "lake" / "index")
    index = opener(own)()
    assert set(index.contents()) == kept(own) != set()
    index.close()


def test_what_a_crashed_attempt_left_in_the_index_is_removed(videos, tmp_path):
    own = Lake(str(tmp_path / "lake"))
    run(config(), str(videos), own, limit=6)
    stranger = np.zeros(256, np.float32)
    stranger[0] = 1
    index = MilvusIndex(default_index_uri(own), opener(own).collection)
    index.open()
    index.add(Entry("never-committed", stranger, 1, 99))
    index.remove([next(iter(kept(own)))])
    index.close()
    reconciled = opener(own)()
    assert set(reconciled.contents()) == kept(own)
    reconciled.close()
