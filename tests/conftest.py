"""Videos whose truth is known, made on the spot."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

# Who starts the tests in the background of a script has them ignore Ctrl-C, and so their children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REAL = Path(__file__).parents[2] / "shared" / "videos"


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """The folder of real videos; tests that ask for it carry the marker `real`."""
    if not REAL.is_dir():
        pytest.skip(f"the real videos are not at {REAL}")
    return REAL


def scene(seed: int, frames: int, width: int = 320, height: int = 180) -> list[np.ndarray]:
    """A textured ground that pans, with textured discs that move over it; RGB."""
    random = np.random.default_rng(seed)
    ground = cv2.GaussianBlur(
        random.integers(0, 256, (height * 2, width * 2, 3)).astype(np.uint8), (0, 0), 3 + seed % 4
    )
    ground = cv2.normalize(ground, None, 30, 220, cv2.NORM_MINMAX)
    discs = [(random.uniform(0, width), random.uniform(0, height), random.uniform(-4, 4),
              random.uniform(-3, 3), int(random.integers(12, 30)),
              tuple(int(c) for c in random.integers(40, 230, 3))) for _ in range(5)]  # fmt: skip
    pan = random.uniform(0.5, 1.5, 2)
    images = []
    for n in range(frames):
        x, y = int(n * pan[0]) % width, int(n * pan[1]) % height
        image = ground[y : y + height, x : x + width].copy()
        for cx, cy, dx, dy, radius, color in discs:
            centre = (int(cx + dx * n) % width, int(cy + dy * n) % height)
            cv2.circle(image, centre, radius, color, -1)
            cv2.circle(image, centre, radius // 2, tuple(255 - c for c in color), 2)
        images.append(image)
    return images


def write_video(
    path: Path,
    images: list[np.ndarray],
    fps: int | Fraction = 24,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    times: list[int] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Encode RGB images. `times` are presentation times in 1/1000 s, for uneven frame rates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {"crf": "20", "g": "24"})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pixel_format
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    yesterday = path.stat().st_mtime - 86400
    os.utime(path, (yesterday, yesterday))
    return path


@pytest.fixture(scope="session")
def s3():
    """Options for an S3 server of our own; one bucket."""
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto[server] is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                request = urllib.request.Request(f"{url}/bucket", method="PUT")
                urllib.request.urlopen(request, timeout=10).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "moto's server does not answer"
                time.sleep(0.1)
        yield {
            "AWS_ENDPOINT": url, "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        }  # fmt: skip
    finally:
        server.terminate()
        server.wait(timeout=30)
