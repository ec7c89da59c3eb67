"""A folder of videos and the lake that a run over them leaves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import scene, write_video
from tests.pipeline.lakes import config
from winnow.pipeline.lake import Lake
from winnow.pipeline.run import run


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for n, name in enumerate(["apple, red", "bear's_den", "ünï #1 100%"]):
        write_video(folder / f"{name}.mp4", scene(n, 60))
    (folder / "apple, red.txt").write_text("an apple falls")
    write_video(folder / "short.mp4", scene(7, 12))
    write_video(folder / "still.mp4", scene(8, 1) * 60)
    write_video(folder / "z" / "bear small.mp4", [i[::2, ::2] for i in scene(1, 60)])
    shutil.copy2(folder / "apple, red.mp4", folder / "z" / "copied.mp4")
    (folder / "noise.mp4").write_bytes(os.urandom(5000))
    (folder / "empty.mp4").write_bytes(b"")
    for file in folder.rglob("*.mp4"):
        os.utime(file, (1.7e9, 1.7e9))
    return folder


@pytest.fixture(scope="session")
def lake(videos, tmp_path_factory) -> Lake:
    lake = Lake(str(tmp_path_factory.mktemp("lake") / "lake"))
    run(config(), str(videos), lake)
    return lake


@pytest.fixture
def own_lake(lake: Lake, tmp_path: Path) -> Lake:
    """A copy of the lake for a test that writes to it."""
    shutil.copytree(lake.uri, tmp_path / "own")
    return Lake(str(tmp_path / "own"))
