"""Two hundred files that are no videos, or no longer: each gets its own clear failure."""

import hashlib
import os
import re
from pathlib import Path

import av
import numpy as np
import pytest

from tests.conftest import scene, write_video
from tests.pipeline.lakes import config, rows
from winnow.pipeline.lake import Lake
from winnow.pipeline.run import run


@pytest.fixture(scope="module")
def rubbish(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rubbish")
    random = np.random.default_rng(0)
    good = [
        write_video(folder / "good0.mp4", scene(1, 50)),
        write_video(folder / "good1.mkv", scene(2, 50)),
        write_video(folder / "good2.webm", scene(3, 50), codec="libvpx-vp9", options={}),
        write_video(folder / "good3.mp4", scene(4, 50), options={"movflags": "faststart"}),
    ]
    contents = [path.read_bytes() for path in good]
    for n in range(200):
        content = contents[n % 4]
        match n % 5:
            case 0:
                broken = random.bytes(int(random.integers(1, 20_000)))
            case 1:
                broken = content[: int(random.integers(1, len(content) - 1))]
            case 2:  # the start of a video and then noise
                keep = int(random.integers(8, len(content) // 2))
                broken = content[:keep] + random.bytes(len(content) - keep)
            case 3:  # a few bits flipped anywhere: may still play
                flipped = bytearray(content)
                for place in random.integers(0, len(flipped), 40):
                    flipped[place] ^= 1 << int(random.integers(8))
                broken = bytes(flipped)
            case _:  # a hole of zeros
                start = int(random.integers(0, len(content) - 200))
                broken = content[:start] + bytes(200) + content[start + 200 :]
        suffix = good[n % 4].suffix
        (folder / f"bad{n:03}{suffix}").write_bytes(broken)
    for path in folder.iterdir():
        os.utime(path, (1.7e9, 1.7e9))
    return folder


def test_the_run_ends_with_a_balanced_ledger_and_a_kind_for_every_failure(rubbish, tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    result = run(config("isolate=true"), str(rubbish), lake)
    assert result.ledger.sources_in == 204
    assert result.ledger.balanced
    assert result.ledger.sources["failed"] > 80
    failed = rows(lake, "SELECT error_kind, error, uri FROM sources WHERE status = 'failed'")
    known = {"not_video", "truncated", "corrupt", "no_video", "empty"}
    assert {kind for kind, _, _ in failed} <= known, failed
    assert all(error for _, error, _ in failed)
    random_bytes = rows(
        lake,
        "SELECT status, error_kind FROM sources "
        "WHERE regexp_matches(uri, 'bad\\d\\d[05]\\.') GROUP BY ALL",
    )
    assert random_bytes == [("failed", "not_video")]
    good = rows(lake, "SELECT status FROM sources WHERE uri LIKE '%/good%' GROUP BY 1")
    assert good == [("done",)]
    # H.264's decoder tells of flipped bits and noise: what is kept shows the untouched pictures. A
    # hole of zeros may be valid H.264, and VP9 carries no checks: there, what plays is taken.
    kept = rows(
        lake, "SELECT uri, media_uri, frames FROM dataset JOIN clips_decided USING (clip_id)"
    )
    untouched = [pictures(rubbish / name) for name in ("good0.mp4", "good1.mkv", "good3.mp4")]
    assert len(kept) >= 4
    for uri, media_uri, frames in kept:
        shown = pictures(media_uri)
        assert len(shown) == frames
        silent = uri.endswith(".webm") or re.search(r"bad\d\d[49]\.", uri)
        assert shown in untouched or silent, uri


def pictures(path: object) -> list[str]:
    """A hash of every decoded frame."""
    with av.open(str(path)) as container:
        return [
            hashlib.md5(frame.to_ndarray().tobytes()).hexdigest()
            for frame in container.decode(video=0)
        ]
