"""Which ffmpeg and which H.264 encoder this machine has. A listed encoder may still not work."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache

from winnow.operators.errors import ConfigError

PREFERENCE = ("h264_nvenc", "libx264", "libopenh264")


@cache
def ffmpeg_executable() -> str:
    """The system's ffmpeg where there is one, else the one bundled with imageio-ffmpeg."""
    system = shutil.which("ffmpeg")
    if system:
        return system
    import imageio_ffmpeg

    return str(imageio_ffmpeg.get_ffmpeg_exe())


@cache
def encoder_works(encoder: str) -> bool:
    """Encode a few frames of nothing: drivers and licences fail only when used."""
    argv = [
        ffmpeg_executable(), "-hide_banner", "-v", "error", "-nostdin",
        "-f", "lavfi", "-i", "color=black:s=256x256:r=8:d=0.5",
        "-c:v", encoder, "-f", "null", "-",
    ]  # fmt: skip
    return subprocess.run(argv, capture_output=True, timeout=60, check=False).returncode == 0


@cache
def choose_encoder(wanted: str = "auto") -> str:
    """The encoder to use: the wanted one, or for `auto` the first that works."""
    candidates = PREFERENCE if wanted == "auto" else (wanted,)
    for encoder in candidates:
        if encoder_works(encoder):
            return encoder
    raise ConfigError(
        f"no working H.264 encoder among {', '.join(candidates)} in {ffmpeg_executable()}; "
        "install an ffmpeg with libx264 or set transcode.encoder: auto"
    )
