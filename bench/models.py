"""The stages with models, on random weights of the real sizes: how fast, and what is the limit.

    python -m bench.models                         tiny models without CUDA, the real sizes with it
    python -m bench.models --what vision --copies 40 --decoders 6 12 16
    python -m bench.models --what qwen3-vl-2b qwen3-vl-8b --work /dev/shm

Each is a whole run of ingest, split (without a detector) and one stage of configs/gpu.yaml with all
its operators, on one worker, over copies of the videos. The random models are saved by the classes
that save the real ones and loaded through the registry. What is told of a run:

- `clips/s` of the whole run, and `flow` from the first clip to the last: without start and loading;
- `model` and `decode`: the share of that time that the model and the decoding processes work. The
  rates after them are what each would reach if it never waited: the lower one is the limit. Inline,
  the same processes also probe and split, and every clip is decoded twice: for damage, for frames;
- `GPU`: mean of NVML's utilisation every 0.2 s after the first batch. It is the time in which any
  kernel ran, of any process, and says nothing of how much of the chip that kernel used.

A random VLM does not stop by itself: every answer has `max_tokens` (256), which is more than most
real ones. Its tokenizer is trained on our prompts; that a prompt has as many tokens as with the real
one is roughly true only. `choices` are questions answered by one token, of 5.8 s at 16 fps under
8192 * 28 * 28 pixels, given to the model directly with frames at hand.

On the machine that the tool `run` lends there are Python 3.12, PyTorch, transformers and timm, and no
network. The rest travels as wheels: 115 MiB, of which 64 fit a call. Here, in the repository's root:

    echo /.gpu/ >> .git/info/exclude
    get() { python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -c constraints.txt \
        -d .gpu/$1 "${@:2}"; }
    get a av duckdb
    get b deltalake arro3-core deprecated pydantic pydantic-core annotated-types typing-inspection \
        pebble open-clip-torch ftfy wcwidth tenacity ffmpeg-python future pytz
    cp -r ../shared/videos/generated .gpu/videos

and then in `run`, each call within half a minute of the last, while the machine is still held:

    carry [".gpu/a"]: python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir
        --upgrade --target /tmp/site .gpu/a/*.whl
    carry [".gpu/b"]: the same with .gpu/b/*.whl && ln -sfn $PWD /tmp/site/winnow
    carry [".gpu/videos"]: PYTHONPATH=/tmp/site python3 -m bench.models --videos .gpu/videos
        --what vision --copies 40 --decoders 6 12 16 --json > $OUT/vision.json
    carry [".gpu/videos"]: PYTHONPATH=/tmp/site python3 -m bench.models --videos .gpu/videos
        --what qwen3-vl-2b qwen3-vl-8b --json > $OUT/vlm.json

Without --videos clips are drawn there. With --json the table goes to stderr, and so into the answer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from winnow.operators.settings import find_config

VIDEOS = Path(__file__).resolve().parents[2] / "shared" / "videos" / "generated"
VISION = "vision"
VLMS = ("qwen3-vl-2b", "qwen3-vl-8b")
STAGES = {VISION: "vision", **dict.fromkeys(VLMS, "semantic")}
"""The stage of configs/gpu.yaml that shows each."""
SAMPLE_EVERY_S = 0.2
CHOICES = ("1", "2", "3", "4", "5")
CHOICE_FRAMES, CHOICE_FPS, CHOICE_PIXELS = 93, 16.0, 8192 * 28 * 28
"""A take of Cosmos-Predict2.5 as its critics are shown it."""
DRAWN = ((1280, 704, 16.0), (720, 480, 8.0), (720, 480, 8.0), (512, 320, 15.0))
"""Width, height and rate of clips of 5 s, in about the mixture of ../shared/videos/generated."""
MOST_COPIES = 255


@dataclass(frozen=True)
class Bench:
    """What is measured, and with what."""

    tiny: bool
    cuda: bool
    engine: str
    videos: Path
    copies: int | None
    decoders: tuple[int, ...]
    overrides: tuple[str, ...]
    work: Path

    def copies_for(self, what: str) -> int:
        return self.copies or (1 if self.tiny else 16 if what == VISION else 2)


def has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


@dataclass
class GpuWatch:
    """The GPU's utilisation, read from NVML by a thread while the context lasts."""

    note: str | None = None
    """Why there is none."""
    samples: list[tuple[float, int]] = field(default_factory=list)
    """Clock (time.monotonic) and percent."""
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> GpuWatch:
        if has_cuda():
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        else:
            self.note = "no CUDA device here"
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        import torch

        while not self._ended.wait(SAMPLE_EVERY_S):
            try:
                self.samples.append((time.monotonic(), int(torch.cuda.utilization())))
            except Exception as error:  # without nvidia-ml-py, or where the driver refuses
                self.note = f"no utilisation: {error}"
                return

    def mean(self, since: float, until: float) -> float | None:
        """Share of the time that some kernel ran; None without a sample."""
        taken = [percent for at, percent in self.samples if since <= at <= until]
        return round(sum(taken) / len(taken) / 100, 3) if taken else None


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def take_videos(bench: Bench, folder: Path, copies: int) -> None:
    """Copies of every video, each with its own `free` box at the end: no two files are the same.

    Beside each stands a prompt, as the heads on prompts want one.
    """
    paths = sorted(bench.videos.rglob("*.mp4")) if bench.videos.is_dir() else []
    if not paths:
        say(f"no videos in {bench.videos}: drawing some")
        paths = draw(bench.work / "drawn")
    folder.mkdir(parents=True)
    for number, path in enumerate(paths):
        content, prompt = path.read_bytes(), path.stem.replace("_", " ")
        for copy in range(copies):
            box = (9).to_bytes(4, "big") + b"free" + bytes([copy])
            (folder / f"{copy:03}-{number:03}.mp4").write_bytes(content + box)
            (folder / f"{copy:03}-{number:03}.txt").write_text(prompt, "utf-8")


def draw(folder: Path, clips: int = 12) -> list[Path]:
    """Clips as `winnow demo` draws its own, where there are no generated ones."""
    from winnow.pipeline.drawing import LONGEST_S, Shot
    from winnow.pipeline.filming import encode

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"drawn scene {number}.mp4" for number in range(clips)]

    def film(number: int) -> None:
        width, height, fps = DRAWN[number % len(DRAWN)]
        shot = Shot(number + 1, width, height, fps, LONGEST_S)
        encode(paths[number], shot.frames(), fps)

    missing = [number for number in range(clips) if not paths[number].exists()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(film, missing))
    return paths


def write_config(bench: Bench, folder: Path, what: str, models: Path, decoders: int) -> Path:
    """configs/gpu.yaml with one stage with a model, on one worker, and a policy that keeps all."""
    shipped = yaml.safe_load(find_config("gpu")[0])
    by_name = {stage.get("label", stage["stage"]): stage for stage in shipped["stages"]}
    ingest, split, stage = by_name["ingest"], by_name["split"], by_name[STAGES[what]]
    split["detector"] = {"kind": "none"}
    one = {"min": 1, "max": 1}
    # Inline, all child processes are one pool, of the largest number that any stage asks for.
    ingest["workers"] = split["workers"] = {"min": 1, "max": decoders}
    stage |= {"workers": one, "decoders": decoders}
    if not bench.cuda:
        stage["gpus"] = 0
    if what != VISION:
        settings = stage["operators"]["vlm_filter"]
        settings["vlm"]["model"] = what
        settings |= {"max_tokens": 8, "pixels": 2**17} if bench.tiny else {"max_tokens": 256}
    policy = folder / "keep_all.yaml"
    policy.write_text("name: keep_all\nrules: []\n")
    path = folder / "run.yaml"
    content = {"name": "bench", "engine": bench.engine, "policy": str(policy),
               "models": str(models), "stages": [ingest, split, stage]}  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    return path


def measure_run(
    bench: Bench, what: str, models: Path, videos: Path, decoders: int
) -> dict[str, Any]:
    """One whole run, and what its roster, its stages' times and its lake tell."""
    from winnow.pipeline.config import load_config
    from winnow.pipeline.lake import Lake
    from winnow.pipeline.run import Progress, run

    finished = time.monotonic()

    def report(done: int, total: int, source: object) -> None:
        nonlocal finished
        finished = time.monotonic()

    with tempfile.TemporaryDirectory(dir=bench.work) as name:
        config = load_config(
            str(write_config(bench, Path(name), what, models, decoders)), bench.overrides
        )
        lake = Lake(f"{name}/lake")
        with GpuWatch() as gpu:
            result = run(config, str(videos), lake, progress=Progress(report))
        facts = read_vision(lake) if what == VISION else read_vlm(lake)
    (stage,) = [s for s in config.stages if s.label == STAGES[what]]
    (pool,) = result.workers
    clips, busy_s = pool["clips"], pool["busy_s"]
    lived_s = busy_s / pool["busy_share"]
    seconds = {row["stage"]: row["seconds"] for row in result.stages}
    # A stage's time is that of decoding and of the model. Split decodes too, to find damage; inline,
    # the same processes do that.
    decode_s = seconds[stage.label] - busy_s
    if bench.engine == "inline":
        decode_s += seconds["ingest"] + seconds["split"]
    after_first_batch_s = pool["size_over_time"][-1][0]
    return {
        "decoders": decoders,
        "clips": clips,
        "failed_sources": sum(result.ledger.failures.values()),
        **facts,
        "wall_s": round(result.wall_s, 2),
        "clips_per_s": round(clips / result.wall_s, 2),
        "flow_s": round(lived_s, 2),
        "flow_clips_per_s": round(clips / lived_s, 2),
        "flow_frames_per_s": round(facts["frames"] / lived_s, 1),
        "model_share": pool["busy_share"],
        "model_clips_per_s": round(clips / busy_s, 2),
        "decode_share": round(decode_s / decoders / lived_s, 4),
        "decode_clips_per_s": round(clips / decode_s * decoders, 2),
        "gpu": gpu.mean(finished - after_first_batch_s, finished),
        "gpu_note": gpu.note,
        "seconds": seconds,
        **({"tokens_out_per_s": round(facts["tokens_out"] / busy_s, 1),
            "tokens_in_per_s": round(facts["tokens_in"] / busy_s, 1)} if what != VISION else {}),
    }  # fmt: skip


def read_vision(lake: Any) -> dict[str, Any]:
    """Frames that went through the backbone, and clips of which a head could say nothing."""
    from winnow.pipeline.views import connect

    heads = ("aesthetic", "content_type", "prompt_match", "embedding", "drift")
    failed = " OR ".join(f"{head}_error IS NOT NULL" for head in heads)
    with connect(lake) as connection:
        row = connection.execute(
            f"SELECT sum(embedding_frames), count(*) FILTER ({failed}) FROM clips"
        ).fetchone()
    assert row is not None
    return {"frames": int(row[0]), "failed_clips": row[1]}


def read_vlm(lake: Any) -> dict[str, Any]:
    """Windows, frames and tokens of all answers, and clips without any."""
    from winnow.pipeline.views import connect

    with connect(lake) as connection:
        rows = connection.execute(
            "SELECT vlm_filter_answers, vlm_filter_error FROM clips"
        ).fetchall()
    windows = [window for text, _ in rows if text for window in json.loads(text)]
    return {
        "frames": sum(window["frames"] for window in windows),
        "failed_clips": sum(error is not None for _, error in rows),
        "windows": len(windows),
        "failed_windows": sum(window["error"] is not None for window in windows),
        "tokens_in": sum(window["tokens_in"] or 0 for window in windows),
        "tokens_out": sum(window["tokens_out"] or 0 for window in windows),
    }


def backbone_alone(bench: Bench, models: Path) -> dict[str, Any]:
    """Frames a second of the backbone on frames at hand."""
    import numpy as np

    from winnow.operators.backbone import BackboneConfig
    from winnow.operators.models import Models

    registry, config = Models.read(str(models)), BackboneConfig()
    started = time.monotonic()
    backbone = config.load(registry)
    load_s = time.monotonic() - started
    side = registry.get(config.model).image_size
    rng = np.random.default_rng(0)
    count = 1024 if bench.cuda else 128 if bench.tiny else 8
    frames = list(rng.integers(0, 256, (count, side, side, 3), np.uint8))
    backbone.embed_frames(frames)  # kernels are chosen and loaded with the first batch
    repeats, least_s = 0, 0.5 if bench.tiny else 10.0
    with GpuWatch() as gpu:
        started = time.monotonic()
        while (spent := time.monotonic() - started) < least_s or not repeats:
            backbone.embed_frames(frames)
            repeats += 1
    return {
        "frames_per_s": round(repeats * count / spent, 1),
        "load_s": round(load_s, 1),
        "gpu": gpu.mean(started, started + spent),
    }


def measure_vision(bench: Bench) -> dict[str, Any]:
    from bench.random_weights import save_aesthetic_head, save_backbone

    folder = bench.work / "models"
    shipped = yaml.safe_load(find_config("models")[0])["clip-vit-l-14"]
    say("vision: making a backbone of random weights")
    entries = {
        "clip-vit-l-14": save_backbone(folder / "clip", shipped["architecture"], tiny=bench.tiny),
        "laion-aesthetic-v2": save_aesthetic_head(folder / "aesthetic"),
    }
    models = folder / "vision.yaml"
    models.write_text(yaml.safe_dump(entries))
    alone = backbone_alone(bench, models)
    say(f"vision: the backbone alone takes {alone['frames_per_s']} frames/s")
    videos = bench.work / "videos" / VISION
    take_videos(bench, videos, bench.copies_for(VISION))
    runs = [measure_run(bench, VISION, models, videos, n) for n in bench.decoders]
    return {"what": VISION, "alone": alone, "runs": runs}


def measure_choices(bench: Bench, backend: Any) -> dict[str, Any]:
    """Clips a second where an answer is one token: the prompt and the frames are all the work."""
    import numpy as np

    from winnow.operators.operator import Budget
    from winnow.operators.vlm.messages import Request, Video

    frames = CHOICE_FRAMES // 8 if bench.tiny else CHOICE_FRAMES
    width, height = Budget(CHOICE_PIXELS // CHOICE_FRAMES).size(1280, 704)
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (frames, height, width, 3), np.uint8))
    video = Video(images, list(range(frames)), [n / CHOICE_FPS for n in range(frames)], CHOICE_FPS)
    user = "Rate how far this video follows the laws of physics, from 1 to 5. Answer with a digit."
    count = 4 if bench.tiny else 64
    requests = [Request(f"clip {n}", 0, video, user, choices=CHOICES) for n in range(count)]
    backend.answer(requests[: count // 4])  # kernels are chosen and loaded with the first batch
    with GpuWatch() as gpu:
        started = time.monotonic()
        answers = backend.answer(requests)
        ended = time.monotonic()
    failed = [answer for answer in answers if answer.status != "ok"]
    if failed:
        say(f"choices: {len(failed)} of {count} failed: {failed[0].error}")
    return {
        "clips": count,
        "failed_clips": len(failed),
        "frames_a_clip": frames,
        "size": [width, height],
        "tokens_a_clip": answers[0].tokens_in,
        "clips_per_s": round(count / (ended - started), 2),
        "gpu": gpu.mean(started, ended),
        "gpu_note": gpu.note,
    }


def measure_vlm(bench: Bench, name: str) -> dict[str, Any]:
    from bench.random_weights import TINY, save_vlm
    from winnow.operators.models import Models
    from winnow.operators.vlm.backend import TransformersSettings

    videos = bench.work / "videos" / name
    take_videos(bench, videos, bench.copies_for(name))
    say(f"{name}: making a model of random weights")
    with tempfile.TemporaryDirectory(dir=bench.work) as folder:
        device = "cuda" if bench.cuda else "cpu"
        entry = save_vlm(Path(folder) / "vlm", TINY if bench.tiny else name, device)
        models = Path(folder) / "models.yaml"
        models.write_text(yaml.safe_dump({name: entry}))
        started = time.monotonic()
        backend: Any = TransformersSettings(model=name).load(Models.read(str(models)))
        load_s = round(time.monotonic() - started, 1)
        weights_mb = round(
            sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) / 1e6
        )
        say(f"{name}: {weights_mb} MB of weights loaded in {load_s} s")
        try:
            choices = measure_choices(bench, backend)
            if bench.engine == "ray":
                backend.close()  # its worker is another process, with weights of its own
            # Inline, the runs share the weights that are loaded here.
            runs = [measure_run(bench, name, models, videos, n) for n in bench.decoders]
        finally:
            backend.close()
    return {
        "what": name,
        "weights_mb": weights_mb,
        "load_s": load_s,
        "choices": choices,
        "runs": runs,
    }


def machine(bench: Bench) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if bench.cuda else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "size": "tiny" if bench.tiny else "default",
        "engine": bench.engine,
    }


def table(result: dict[str, Any]) -> list[str]:
    """For people: what is not known is a dash."""
    facts = result["machine"]
    lines = [f"{facts['size']} sizes on {facts['device']}, {facts['cpus']} cores, engine "
             f"{facts['engine']}, torch {facts['torch']}"]  # fmt: skip

    def row(cells: Sequence[object]) -> str:
        shown = ["-" if cell is None else str(cell) for cell in cells]
        return f"| {' | '.join(shown)} |"

    heads = ("stage", "decoders", "clips", "wall s", "clips/s", "flow clips/s", "frames/s",
             "model", "its clips/s", "decode", "its clips/s", "GPU", "tokens out/s", "in/s")  # fmt: skip
    keys = ("decoders", "clips", "wall_s", "clips_per_s", "flow_clips_per_s",
            "flow_frames_per_s", "model_share", "model_clips_per_s", "decode_share",
            "decode_clips_per_s", "gpu", "tokens_out_per_s", "tokens_in_per_s")  # fmt: skip
    lines += [row(heads), row(["---"] * len(heads))]
    notes = []
    for stage in result["stages"]:
        what = stage["what"]
        for run in stage["runs"]:
            lines.append(row([what, *(run.get(key) for key in keys)]))
            slower = (
                "decoding" if run["decode_clips_per_s"] < run["model_clips_per_s"] else "the model"
            )
            note = f"{what} with {run['decoders']} decoders: {slower} is the limit"
            lost = run["failed_clips"] + run["failed_sources"]
            failed = f"{lost} CLIPS FAILED" if lost else ""
            notes.append("; ".join(filter(None, (note, run["gpu_note"], failed))))
        if alone := stage.get("alone"):
            notes.append(f"{what}: the model alone, on frames at hand: {alone['frames_per_s']} frames/s, "
                         f"GPU {alone['gpu'] if alone['gpu'] is not None else '-'}")  # fmt: skip
        if asked := stage.get("choices"):
            notes.append(f"{what}: choices of one token, {asked['frames_a_clip']} frames of "
                         f"{asked['size'][0]}x{asked['size'][1]}, {asked['tokens_a_clip']} tokens: "
                         f"{asked['clips_per_s']} clips/s, "
                         f"GPU {asked['gpu'] if asked['gpu'] is not None else '-'}")  # fmt: skip
    return [*lines, *dict.fromkeys(notes)]


def failures(result: dict[str, Any]) -> int:
    """What came to nothing, of sources, clips and windows: figures with some of it are none."""
    parts = [part for s in result["stages"] for part in (*s["runs"], s.get("choices", {}))]
    kinds = ("failed_sources", "failed_clips", "failed_windows")
    return sum(part.get(kind, 0) for part in parts for kind in kinds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("tiny", "default"), help="default: by what is here")
    parser.add_argument("--what", nargs="+", choices=STAGES)
    parser.add_argument("--videos", type=Path, default=VIDEOS)
    parser.add_argument("--copies", type=int, choices=range(1, MOST_COPIES + 1), metavar="N",
                        help="of each video; default 16 for vision, 2 for a VLM, 1 of tiny size")  # fmt: skip
    parser.add_argument("--decoders", type=int, nargs="+", metavar="N",
                        help="processes that decode, one run each; default: 6, at most one a core")  # fmt: skip
    parser.add_argument("--engine", choices=("inline", "ray"), default="inline")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="of the run's configuration: stages.vision.backbone.rate=4")  # fmt: skip
    parser.add_argument("--work", type=Path, help="where weights (18 GB for 8B) and lakes may lie")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="winnow-bench-", dir=arguments.work) as folder:
        tiny = arguments.size == "tiny" or (arguments.size is None and not has_cuda())
        bench = Bench(
            tiny,
            has_cuda(),
            arguments.engine,
            arguments.videos,
            arguments.copies,
            tuple(arguments.decoders or (min(6, os.cpu_count() or 1),)),
            tuple(arguments.set),
            Path(folder),
        )
        chosen = arguments.what or ([VISION, VLMS[0]] if tiny else [VISION, *VLMS])
        stages = [
            measure_vision(bench) if what == VISION else measure_vlm(bench, what)
            for what in dict.fromkeys(chosen)
        ]
        result = {"machine": machine(bench), "stages": stages}
    print("\n".join(table(result)), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(result, indent=1))
    return 1 if failures(result) else 0


if __name__ == "__main__":
    sys.exit(main())
