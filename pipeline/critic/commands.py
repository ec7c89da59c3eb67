"""`winnow critic ...`. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from winnow.operators.critic.settings import CriticSettings
    from winnow.operators.models import Models
    from winnow.pipeline.critic.datasets import Dataset

critic_app = typer.Typer(
    help="Judge whether videos obey physics, and how well the judge does.", no_args_is_help=True
)

FAILED = 1
PRECISIONS = (0.8, 0.9, 0.95)


class Mode(StrEnum):
    direct = "direct"
    reasoning = "reasoning"
    cascade = "cascade"


class Scale(StrEnum):
    auto = "auto"
    zero_to_one = "0-1"
    one_to_five = "1-5"


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="a model of the registry, or the name that --vlm-url's server gives it",
    ),
]
UrlOption = Annotated[
    str | None,
    typer.Option("--vlm-url", help="an OpenAI-compatible server, such as http://localhost:8000/v1"),
]
ModeOption = Annotated[
    Mode | None, typer.Option("--mode", help="probabilities of one token, or reasoned answers")
]
PromptOption = Annotated[
    str | None, typer.Option("--prompt", help="a rubric: a path, or direct, reasoning, captioned")
]
FpsOption = Annotated[float | None, typer.Option("--fps", help="frames a second that are shown")]
PixelsOption = Annotated[int | None, typer.Option("--pixels", help="most pixels of a window")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="another setting of the critic; repeatable"),
]
ModelsOption = Annotated[
    str, typer.Option("--models", help="path of a file laid over configs/models.yaml")
]
DatasetOption = Annotated[
    str,
    typer.Option(
        "--dataset", "-d", help="videophy2:test, videophy2:train, or a CSV or XLSX file of your own"
    ),
]
VideosOption = Annotated[
    Path | None, typer.Option("--videos", help="a folder where videos are looked for first")
]
ScaleOption = Annotated[Scale, typer.Option("--scale", help="of the table's scores")]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="ROLE=NAME", help="the table's column of video, truth, caption, ..."
    ),
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="so many videos, by lot")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="download nothing")]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
DecodersOption = Annotated[
    int | None, typer.Option(min=0, help="processes that decode; 0: none but this one")
]


@critic_app.command()
def score(
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO...", help="video files")],
    caption: Annotated[
        str | None, typer.Option(help="the generation prompt, for rubrics that show it")
    ] = None,
    model: ModelOption = None,
    vlm_url: UrlOption = None,
    mode: ModeOption = None,
    prompt: PromptOption = None,
    fps: FpsOption = None,
    pixels: PixelsOption = None,
    overrides: SetOption = None,
    models: ModelsOption = "models",
    json_output: JsonOption = False,
) -> None:
    """Judge single files."""
    from winnow.pipeline.critic.score import score as judge

    settings = _settings(model, vlm_url, mode, prompt, fps, pixels, overrides)
    found = judge(videos, settings, _models(models), caption=caption)
    if json_output:
        from winnow.pipeline.console import print_json

        print_json({"videos": found})
    else:
        from winnow.pipeline.critic.console import print_scores

        print_scores(found)
    if not any(one["status"] == "ok" for one in found):
        raise typer.Exit(FAILED)


@critic_app.command()
def evaluate(
    dataset: DatasetOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the results")],
    videos: VideosOption = None,
    scale: ScaleOption = Scale.auto,
    columns: ColumnOption = None,
    limit: LimitOption = None,
    offline: OfflineOption = False,
    model: ModelOption = None,
    vlm_url: UrlOption = None,
    mode: ModeOption = None,
    prompt: PromptOption = None,
    fps: FpsOption = None,
    pixels: PixelsOption = None,
    overrides: SetOption = None,
    models: ModelsOption = "models",
    batch: Annotated[int, typer.Option(min=1, help="videos the model is given at once")] = 16,
    decoders: DecodersOption = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="seconds to decode a video")] = 120,
    restart: Annotated[bool, typer.Option("--restart", help="throw away what --out has")] = False,
    json_output: JsonOption = False,
) -> None:
    """Judge a data set whose truth is known, and measure how well.

    The same command goes on where it was stopped.
    """
    from winnow.pipeline.critic.console import print_evaluation, progress
    from winnow.pipeline.critic.evaluate import Progress
    from winnow.pipeline.critic.evaluate import evaluate as run

    settings = _settings(model, vlm_url, mode, prompt, fps, pixels, overrides)
    loaded = _dataset(dataset, videos, scale, columns, limit, offline)
    try:
        with progress() as report:
            done = run(
                loaded,
                settings,
                _models(models),
                out,
                restart=restart,
                decoders=decoders,
                timeout_s=timeout_s,
                batch=batch,
                progress=Progress(report),
            )
    except KeyboardInterrupt:
        _stopped(out)
    if json_output:
        from winnow.pipeline.console import print_json
        from winnow.pipeline.critic.results import plain

        print_json({"out": str(out), **plain(done.results)})
    else:
        print_evaluation(done.results, out)
    if not done.results["coverage"]["judged"]:
        raise typer.Exit(FAILED)


@critic_app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="folder of an evaluation")],
    b: Annotated[Path, typer.Argument(help="folder of another one on the same data")],
    json_output: JsonOption = False,
) -> None:
    """Say what B gains over A, paired by video, and whether it may be chance."""
    from winnow.pipeline.critic.compare import compare as pair

    found = pair(a, b)
    if json_output:
        from winnow.pipeline.console import print_json
        from winnow.pipeline.critic.results import plain

        print_json(plain(found))
    else:
        from winnow.pipeline.critic.console import print_comparison

        print_comparison(found)


@critic_app.command()
def probe(
    videos: Annotated[
        list[Path] | None, typer.Argument(metavar="VIDEO...", help="video files")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="or the videos of a data set")
    ] = None,
    folder: VideosOption = None,
    limit: Annotated[int, typer.Option(min=1, help="so many videos of the data set, by lot")] = 24,
    probes: Annotated[str, typer.Option(help="a file of probes, or a name")] = "probes",
    only: Annotated[list[str] | None, typer.Option(help="only this probe; repeatable")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of what the probes draw by lot")] = 0,
    offline: OfflineOption = False,
    model: ModelOption = None,
    vlm_url: UrlOption = None,
    mode: ModeOption = None,
    prompt: PromptOption = None,
    fps: FpsOption = None,
    pixels: PixelsOption = None,
    overrides: SetOption = None,
    models: ModelsOption = "models",
    json_output: JsonOption = False,
) -> None:
    """Change videos in ways whose effect is known, and see whether the score moves as it should."""
    from winnow.operators.errors import ConfigError
    from winnow.pipeline.console import complain, print_json
    from winnow.pipeline.critic.console import progress
    from winnow.pipeline.critic.decoding import Video
    from winnow.pipeline.critic.probe import Probes
    from winnow.pipeline.critic.probing import run_probes

    if (dataset is None) == (not videos):
        raise ConfigError("say what to probe: video files, or a data set by --dataset")
    chosen = Probes.read(probes)
    chosen = chosen.only(only) if only else chosen
    settings = _settings(model, vlm_url, mode, prompt, fps, pixels, overrides)
    if dataset is not None:
        examples = _dataset(dataset, folder, Scale.auto, None, limit, offline).examples
        wanted = [Video(e.example_id, e.video, e.caption) for e in examples if e.video is not None]
    else:
        # The path is the id: a file that is named twice is probed once.
        wanted = [Video(str(path), path) for path in dict.fromkeys(videos or ())]
    with progress("judgements") as report:
        result, failures = run_probes(
            wanted,
            chosen,
            settings,
            _models(models),
            seed=seed,
            report=lambda _, done, total: report(done, total),
        )
    for name, reason in failures.items():
        complain(f"cannot be decoded: {name}: {reason}")
    if json_output:
        print_json(result.record() | {"undecodable": failures})
    else:
        from winnow.pipeline.critic.console import print_probes

        print_probes(result)


@critic_app.command()
def calibrate(
    results: Annotated[Path, typer.Argument(help="folder of an evaluation")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the calibration, .yaml or .json")],
    precision: Annotated[
        list[float] | None,
        typer.Option(
            "--precision",
            min=0,
            max=1,
            help="find the threshold that keeps clips of which this share is good; repeatable",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="default: the name of the file")] = None,
    json_output: JsonOption = False,
) -> None:
    """Fit probabilities and thresholds to an evaluation, for policies to name."""
    from winnow.pipeline.console import print_json, say
    from winnow.pipeline.critic.calibrate import calibrate as fit_to
    from winnow.pipeline.critic.calibrate import write_calibration

    made = fit_to(results, precision or PRECISIONS, name or out.stem)
    written = write_calibration(made, out)
    if json_output:
        print_json({"out": str(written), **made.model_dump(mode="json")})
        return
    from winnow.pipeline.critic.console import print_calibration

    print_calibration(made)
    say(f"calibration: {written}")


def _settings(
    model: str | None,
    vlm_url: str | None,
    mode: Mode | None,
    prompt: str | None,
    fps: float | None,
    pixels: int | None,
    overrides: list[str] | None,
) -> CriticSettings:
    from winnow.operators.critic.settings import CriticSettings
    from winnow.operators.errors import ConfigError
    from winnow.operators.settings import validate
    from winnow.pipeline.config import apply_override

    content: dict[str, Any] = {}
    if vlm_url is not None:
        if model is None:
            raise ConfigError("--vlm-url needs --model: the name under which the server has it")
        content["vlm"] = {"kind": "openai", "base_url": vlm_url, "model": model}
    elif model is not None:
        content["vlm"] = {"kind": "transformers", "model": model}
    given = {"mode": mode and mode.value, "prompt": prompt, "fps": fps, "pixels": pixels}
    content |= {name: value for name, value in given.items() if value is not None}
    for assignment in overrides or ():
        if assignment.startswith("vlm."):
            content.setdefault("vlm", {"kind": "transformers", "model": "cosmos-reason2-8b"})
        apply_override(content, assignment)
    return validate(CriticSettings, content, "critic")


def _models(name: str) -> Models:
    from winnow.operators.models import Models

    return Models.read(name)


def _dataset(
    spec: str,
    videos: Path | None,
    scale: Scale,
    columns: list[str] | None,
    limit: int | None,
    offline: bool,
) -> Dataset:
    from dataclasses import replace

    from winnow.operators.errors import ConfigError
    from winnow.pipeline.console import complain
    from winnow.pipeline.critic.datasets import load_dataset

    named = {}
    for assignment in columns or ():
        role, equals, name = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--column {assignment!r}: write it as ROLE=NAME")
        named[role] = name
    found = load_dataset(
        spec,
        videos=videos,
        scale=scale.value,
        columns=named,
        limit=limit,
        fetch=not offline,
        report=complain,
    )
    # So that nobody takes a part for the whole.
    return found if limit is None else replace(found, name=f"{found.name}, {limit} by lot")


def _stopped(out: Path) -> None:
    from winnow.pipeline.console import complain

    complain(f"stopped. What was judged is in {out}; run the same command again to go on")
    raise typer.Exit(FAILED) from None
