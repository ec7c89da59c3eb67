"""`winnow critic evaluate`: the critic judges the videos of a data set whose truth is known."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from winnow.operators.critic.critic import Critic
from winnow.operators.critic.settings import CriticSettings
from winnow.operators.errors import ConfigError, MediaError, WorkerError
from winnow.operators.models import Models
from winnow.pipeline.critic.datasets import Dataset, Example
from winnow.pipeline.critic.decoding import Decoders, Video, judge_ahead
from winnow.pipeline.critic.figures import figures
from winnow.pipeline.critic.report import write_report
from winnow.pipeline.critic.results import (
    HEADER,
    REPORT,
    RESULTS,
    Line,
    Record,
    judged,
    plain,
    write_json,
)

BATCH = 16  # videos that the critic is given at once
TIMEOUT_S = 120.0
GIVE_UP = 48
"""So many errors and nothing else mean that the model is at fault and not the videos."""
AGAIN = ("download", "decode", "error", "unscored")
"""Failures that another try may mend; what the critic said of a video stays said."""
_BUDGET = ("budget_requests", "budget_s")
_REASONING = ("samples", "temperature", "max_tokens", "seed")
_CASCADE = ("thresholds", "margin", "most_entropy")
_NOT_THE_ANSWER = ("batch_pixels", "concurrency", "timeout_s", "tries", "pause_s", "api_key_env",
                   "base_url", "budget_requests", "budget_tokens", "gpu_memory_utilization",
                   "device")  # fmt: skip


@dataclass
class Progress:
    """What an evaluation tells while it works: called with (videos done, videos in all)."""

    report: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that has come to its end."""

    folder: Path
    results: dict[str, Any] = field(repr=False)
    judged_now: int
    """Videos that this call gave to the critic; the others were done, or cannot be decoded."""


def evaluate(
    dataset: Dataset,
    settings: CriticSettings,
    models: Models,
    out: Path,
    *,
    restart: bool = False,
    decoders: int | None = None,
    timeout_s: float = TIMEOUT_S,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge the data set's videos, and write lines, figures and report into the folder `out`.

    A folder that has an evaluation of the same data, model and settings is gone on with: only what is
    missing, or failed for another reason than the critic's word, is judged. With 0 `decoders` videos
    are decoded in this process.

    Raises ConfigError where `out` holds something else, ModelUnavailable, and WorkerError where the
    model answers nothing at all. KeyboardInterrupt and every error leave what is done in `out`.
    """
    started = time.monotonic()
    chosen = known(dataset)
    progress = progress or Progress()
    processes = max(1, (os.cpu_count() or 2) - 1) if decoders is None else decoders
    with Record(out, identity(dataset, settings, models), restart=restart) as record:
        record.forget(
            example.example_id
            for example in chosen
            if example.example_id in record.lines
            and record.lines[example.example_id].status in AGAIN
        )
        missing = [example for example in chosen if example.example_id not in record.lines]
        progress.report(len(chosen) - len(missing), len(chosen))
        for example in missing:
            if example.video is None:
                status = "decode" if example.problem_kind == "not_video" else "download"
                record.add(_line(example, status=status, error=example.problem))
        todo = [example for example in missing if example.video is not None]
        judged_now, ready = 0, len(chosen) - len(todo)
        if todo:
            critic = Critic.open(settings, models)
            try:
                with Decoders(processes, timeout_s) as children:
                    done = _judge(todo, critic, children, batch)
                    for line in _unless_all_fail(done):
                        record.add(line)
                        judged_now += line.status != "decode"
                        ready += 1
                        progress.report(ready, len(chosen))
            finally:
                critic.close()
        lines = [record.lines[example.example_id] for example in chosen]
        wall_s = time.monotonic() - started
        results = plain(
            {
                **json.loads((out / HEADER).read_text("utf-8")),
                **figures(lines, dataset),
                "settings": settings.model_dump(mode="json"),
                "speed": _speed(lines, judged_now, wall_s),
            }
        )
        write_json(out / RESULTS, results)
        write_report(
            out / REPORT, results, lines, settings, timeout_s=timeout_s, decoders=processes
        )
    return Evaluation(out, results, judged_now)


def known(dataset: Dataset) -> list[Example]:
    """The examples whose truth is known, which can be measured.

    Raises ConfigError where two examples share an id, or none has a truth.
    """
    counts = Counter(example.example_id for example in dataset.examples)
    twice = [example_id for example_id, count in counts.items() if count > 1]
    if twice:
        raise ConfigError(
            f"the data set {dataset.name} has {len(twice)} examples twice, such as {twice[0]}: one "
            "video must not be counted twice"
        )
    found = [example for example in dataset.examples if example.truth is not None]
    if not found:
        raise ConfigError(
            f"the data set {dataset.name} has no example with a truth to compare with: its table "
            "needs a score of physical common sense for each video"
        )
    return found


def identity(dataset: Dataset, settings: CriticSettings, models: Models) -> dict[str, Any]:
    """What must be the same for two judgements to belong to one evaluation."""
    content = settings.model_dump(mode="json", exclude={"prompt", "reasoning_prompt", "vlm"})
    reasons, cascades = settings.mode != "direct", settings.mode == "cascade"
    unused = (*_BUDGET, *(() if reasons else _REASONING), *(() if cascades else _CASCADE))
    vlm = settings.vlm.model_dump(mode="json")
    return {
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "model": [models.get(name).identity for name in settings.vlm.models()]
        or [f"{vlm['model']}, served"],
        "prompt": settings.prompt.identity,
        **({"reasoning_prompt": settings.reasoning_prompt.identity} if cascades else {}),
        **{key: value for key, value in content.items() if key not in unused},
        "vlm": {key: value for key, value in vlm.items() if key not in _NOT_THE_ANSWER},
    }


def _judge(
    todo: Sequence[Example], critic: Critic, children: Decoders, batch: int
) -> Iterator[Line]:
    """A line for every example."""
    by_id = {example.example_id: example for example in todo}
    videos = (Video(e.example_id, e.video, e.caption) for e in todo if e.video is not None)
    for example_id, said in judge_ahead(videos, critic, children, batch):
        if isinstance(said, MediaError):
            yield _line(by_id[example_id], status="decode", error=f"{said.kind}: {said}")
        else:
            yield _line(by_id[example_id], **judged(said))


def _unless_all_fail(lines: Iterator[Line]) -> Iterator[Line]:
    """The lines. Raises WorkerError where the first ones that the model saw are all errors."""
    errors: int | None = 0
    for line in lines:
        yield line
        if errors is None or line.status == "decode":
            continue
        errors = errors + 1 if line.status == "error" else None
        if errors == GIVE_UP:
            raise WorkerError(
                f"the model answered none of the first {GIVE_UP} videos: {line.error}: mend that "
                "and run the same command again; what failed is tried again"
            )


def _line(example: Example, **said: Any) -> Line:
    assert example.truth is not None
    return Line(
        example_id=example.example_id,
        uri=example.uri,
        video=None if example.video is None else str(example.video.absolute()),
        truth=float(example.truth),
        caption=example.caption,
        group=example.group,
        generator=example.generator,
        action=example.action,
        is_hard=example.is_hard,
        **said,
    )


def _speed(lines: Sequence[Line], now: int, wall_s: float) -> Mapping[str, float | int | None]:
    """`model_s` is of all lines, earlier calls included; the rest of this call."""
    return {
        "videos_now": now,
        "wall_s": round(wall_s, 3),
        "videos_per_s": round(now / wall_s, 4) if now else None,
        "model_s": round(sum(line.seconds or 0.0 for line in lines), 3),
    }
