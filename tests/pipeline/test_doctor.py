"""What the doctor says of a machine: gaps with their price, and no secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from winnow.pipeline import doctor
from winnow.pipeline.doctor import Finding

KEY = "sk-this-is-not-for-anybody"
TOKEN = "hf_this-is-not-for-anybody"


@pytest.fixture
def no_models(tmp_path, monkeypatch) -> Path:
    """A machine to which no model was fetched."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("WINNOW_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def interpreter(folder: Path, script: str) -> str:
    """An interpreter that does as the script says, whatever it is asked."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport sys, time\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_the_command_tells_what_each_gap_costs_and_never_a_key():
    env = {**os.environ, "OPENAI_API_KEY": KEY, "HF_TOKEN": TOKEN}
    told = subprocess.run(
        [sys.executable, "-m", "winnow.pipeline.cli", "doctor", "--json"],
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert KEY not in told.stdout + told.stderr
    assert TOKEN not in told.stdout + told.stderr
    findings = json.loads(told.stdout)
    assert all(finding["cost"] for finding in findings if finding["state"] != "ok")
    states = {finding["subject"]: finding["state"] for finding in findings}
    assert {"machine", "ffmpeg", "GPU", "models", "vLLM", "Ray"} <= states.keys()
    assert states["VLM server key"] == "ok"
    assert states["Hugging Face token"] == "ok"


def test_missing_models_are_named_with_the_command_that_fetches_them(no_models):
    found = doctor._models()
    assert found.state == "gap"
    assert "needs 4, of which 0 are here" in found.found
    assert "winnow models pull" in found.cost
    assert (
        "clip-vit-l-14, laion-aesthetic-v2, qwen3-vl-8b, cosmos-reason2-8b (36.8 GB)" in found.cost
    )


def test_a_damaged_model_is_told_from_a_missing_one(no_models):
    file = no_models / "models/laion-aesthetic-v2/sac+logos+ava1-l14-linearMSE.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"cut off")
    found = doctor._models()
    assert "of which 0 are here" in found.found
    assert "has a wrong file" in found.found
    assert "clip-vit-l-14' is not on" not in found.found


def test_a_token_is_a_gap_only_where_a_gated_model_wants_it(no_models, monkeypatch):
    found = doctor._hub_token()
    assert found.state == "gap"
    assert "cosmos-reason2-2b, cosmos-reason2-8b" in found.cost
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert doctor._hub_token().state == "ok"


def test_an_empty_key_is_no_key(no_models, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    assert doctor._server_key().state == "gap"


def test_gpus_are_named_with_their_memory(tmp_path, monkeypatch):
    told = {"torch": "2.15.0", "cuda": "13.2", "warning": "",
            "devices": [["NVIDIA H200", 150 * 2**30], ["NVIDIA H200", 150 * 2**30],
                        ["NVIDIA L4", 24 * 2**30]]}  # fmt: skip
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, f"print({json.dumps(told)!r})"))
    assert doctor._gpu() == Finding(
        "GPU", "ok", "2 x NVIDIA H200, 150 GiB; 1 x NVIDIA L4, 24 GiB (torch 2.15.0)"
    )


def test_why_cuda_does_not_work_is_passed_on(tmp_path, monkeypatch):
    told = {"torch": "2.15.0", "cuda": "13.2", "devices": [],
            "warning": "CUDA initialization: The NVIDIA driver on your system is too old"}  # fmt: skip
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, f"print({json.dumps(told)!r})"))
    found = doctor._gpu()
    assert found.state == "gap"
    assert "driver on your system is too old" in found.found
    assert "--config cpu" in found.cost


def test_a_driver_that_hangs_does_not_hang_the_doctor(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, "time.sleep(60)"))
    monkeypatch.setattr(doctor, "CUDA_LIMIT_S", 0.5)
    found = doctor._gpu()
    assert (found.state, found.cost != "") == ("bad", True)


def test_a_torch_that_cannot_be_imported_is_bad(tmp_path, monkeypatch):
    crash = "sys.exit('ImportError: libcudart.so.13: cannot open shared object file')"
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, crash))
    found = doctor._gpu()
    assert found.state == "bad"
    assert "libcudart.so.13" in found.found


def test_a_look_that_breaks_is_a_finding():
    def _odd_thing() -> Finding:
        raise OSError("gone")

    assert doctor._look(_odd_thing) == Finding(
        "odd thing", "bad", "OSError: gone", "reinstall with `make setup`"
    )
