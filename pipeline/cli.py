"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from winnow.pipeline.backfill_command import measure
from winnow.pipeline.critic.commands import critic_app
from winnow.pipeline.export_command import export
from winnow.pipeline.index_commands import index_app
from winnow.pipeline.lake_commands import lake_app
from winnow.pipeline.materialize_command import as_json as materialized_json
from winnow.pipeline.materialize_command import command_for, materialize, print_materialized
from winnow.pipeline.policy_commands import policy_app
from winnow.pipeline.query_commands import search, sql

if TYPE_CHECKING:
    from winnow.pipeline.config import RunConfig
    from winnow.pipeline.run import RunResult

app = typer.Typer(
    name="winnow",
    help="Separates the grain from the chaff in generated video.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at and check configurations.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(critic_app, name="critic")
app.add_typer(policy_app, name="policy")
app.add_typer(index_app, name="index")
app.add_typer(lake_app, name="lake")
for command in (sql, search, measure, export, materialize):
    app.command()(command)
models_app = typer.Typer(help="Look at and fetch the models.", no_args_is_help=True)
app.add_typer(models_app, name="models")

FAILED, USAGE = 1, 2
INTERRUPTED = 130  # what typer makes of Ctrl-C

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="path of a YAML file, or cpu, gpu, paper")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one setting")
]
DomainOption = Annotated[
    str | None,
    typer.Option(
        "--domain", help="robotics, driving, smart_spaces, human_dynamics, physics, a path"
    ),
]
LakeOption = Annotated[str, typer.Option("--lake", help="folder or object-store URL of the lake")]
StorageOption = Annotated[
    list[str] | None,
    typer.Option("--storage-option", metavar="KEY=VALUE", help="object-store setting; repeatable"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]


WaitOption = Annotated[
    bool, typer.Option("--wait", help="where another process writes to the lake, wait for its end")
]


class Engine(StrEnum):
    inline = "inline"
    ray = "ray"


@app.callback()
def _settings(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
) -> None:
    if debug:
        os.environ["WINNOW_DEBUG"] = "1"


@app.command()
def run(
    input_uri: Annotated[str, typer.Option("--input", "-i", help="folder, file or bucket URL")],
    lake: LakeOption,
    config: ConfigOption = "cpu",
    engine: Annotated[Engine | None, typer.Option(help="overrides the configuration")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="take up at most N new files")] = None,
    overrides: SetOption = None,
    domain: DomainOption = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="try files again that failed before")
    ] = False,
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", help="a Ray cluster; default: start Ray here")
    ] = None,
    wait: WaitOption = False,
    storage_option: StorageOption = None,
    json_output: JsonOption = False,
) -> None:
    """Filter a folder of videos into a lake."""
    from winnow.pipeline.console import run_progress
    from winnow.pipeline.run import run as run_pipeline

    changes = list(overrides or [])
    if engine is not None:
        changes.append(f"engine={engine.value}")
    if ray_address is not None and engine is None:
        changes.append("engine=ray")
    options = _pairs(storage_option)
    run_config = _configured(config, changes, domain)
    with run_progress() as progress:
        result = run_pipeline(
            run_config,
            input_uri,
            _lake(lake, options),
            limit=limit,
            retry_failed=retry_failed,
            ray_address=ray_address,
            progress=progress,
            options=options,
            wait=wait,
        )
    _show_result(result, lake, json_output=json_output)


def _configured(config: str, overrides: list[str], domain: str | None) -> RunConfig:
    """The configuration, with what its domain changes said on stderr."""
    from winnow.pipeline.config import load_config
    from winnow.pipeline.console import complain
    from winnow.pipeline.domains import policy_of

    notes: list[str] = []
    loaded = load_config(config, overrides, domain, notes)
    for note in (*notes, *policy_of(loaded)[1]):
        complain(note)
    return loaded


def _show_result(result: RunResult, lake: str, *, json_output: bool) -> None:
    from winnow.pipeline.console import print_json, print_run

    if json_output:
        print_json(
            {
                "run_id": result.run_id,
                "lake": lake,
                "sources_in": result.ledger.sources_in,
                "sources": result.ledger.sources,
                "failures": result.ledger.failures,
                "clips": result.ledger.clips,
                "verdicts": result.ledger.verdicts,
                "balanced": result.ledger.balanced,
                "skipped": result.skipped,
                "not_generations": result.not_generations,
                "not_readable": result.not_readable,
                "wall_s": round(result.wall_s, 3),
                "stages": result.stages,
                "workers": result.workers,
            }
        )
    else:
        print_run(result, lake)


@app.command()
def refilter(
    lake: LakeOption,
    policy: Annotated[str, typer.Option("--policy", "-p", help="path of a YAML file, or a name")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="count only, write nothing")] = False,
    wait: WaitOption = False,
    make_media: Annotated[
        bool, typer.Option("--materialize", help="make the media of clips newly kept, as well")
    ] = False,
    storage_option: StorageOption = None,
    json_output: JsonOption = False,
) -> None:
    """Decide again from the stored scores, by another policy. No video is read."""
    from dataclasses import asdict

    from winnow.pipeline.console import complain, print_json, say
    from winnow.pipeline.policy import load_policy
    from winnow.pipeline.refilter import refilter as decide_again

    options = _pairs(storage_option)
    opened = _lake(lake, options)
    result = decide_again(opened, load_policy(policy), dry_run=dry_run, wait=wait, told=complain)
    made = None
    if make_media and not dry_run:
        from winnow.pipeline.console import run_progress
        from winnow.pipeline.materialize import materialize as make

        with run_progress() as progress:
            made = make(opened, result.policy, progress=progress, options=options, wait=wait)
    if json_output:
        print_json(
            {
                "policy": result.policy,
                "clips": result.clips,
                "verdicts": result.counts,
                "changed": result.changed,
                "kept_without_media": result.kept_without_media,
                "shared_media": result.shared,
                "materialized": materialized_json(made) if made else None,
                "limits": [asdict(limit) for limit in result.limits],
                "not_calibrated": result.not_calibrated,
                "inputs": None if result.inputs is None else result.inputs.as_dict(),
                "written": not dry_run,
            }
        )
        raise typer.Exit(FAILED if made and made.useless else 0)
    counts = " + ".join(f"{n} {name}" for name, n in sorted(result.counts.items())) or "0"
    say(f"policy {result.policy}: clips {result.clips} = {counts}; {result.changed} changed")
    for line in (*map(str, result.limits), *result.not_calibrated):
        say(line)
    if result.inputs is not None:
        say(str(result.inputs))
    if result.shared:
        say(f"{result.shared} kept clips have media of another policy: they are in the dataset now")
    if made:
        print_materialized(made, lake)
        raise typer.Exit(FAILED if made.useless else 0)
    if result.kept_without_media:
        say(
            f"{result.kept_without_media} of the kept clips have no media yet, so they are not in "
            f"the dataset. Make them: {command_for(lake, result.policy)}"
        )


@app.command()
def report(
    lake: LakeOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="the HTML file")] = Path("report.html"),
    storage_option: StorageOption = None,
) -> None:
    """Write one self-contained HTML page about a lake."""
    from winnow.pipeline.console import say
    from winnow.pipeline.lake_report import write_lake_report

    say(f"report: {write_lake_report(_lake(lake, _pairs(storage_option)), out)}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="where samples, lake and report go")] = Path(
        "demo"
    ),
    engine: Annotated[Engine, typer.Option(help="how to run it")] = Engine.inline,
    json_output: JsonOption = False,
) -> None:
    """Draw sample videos with planted defects, filter them, and compare."""
    from winnow.pipeline.demo import run_demo

    run_demo(folder, engine.value, json_output=json_output)


@app.command()
def operators(json_output: JsonOption = False) -> None:
    """List the operators and what they write."""
    from winnow.pipeline.console import print_json, print_operators
    from winnow.pipeline.describe import describe_operators

    described = describe_operators()
    if json_output:
        print_json(described)
    else:
        print_operators(described)


@app.command()
def doctor(json_output: JsonOption = False) -> None:
    """Say what this machine can do, and what each gap costs."""
    from winnow.pipeline.console import print_findings, print_json
    from winnow.pipeline.doctor import examine

    findings = examine()
    if json_output:
        print_json([finding.as_dict() for finding in findings])
    else:
        print_findings(findings)


@config_app.command("show")
def config_show(
    config: ConfigOption = "cpu", overrides: SetOption = None, domain: DomainOption = None
) -> None:
    """Print a configuration with every default filled in, as YAML."""
    import yaml

    content = _configured(config, overrides or [], domain).model_dump(mode="json")
    typer.echo(yaml.safe_dump(content, sort_keys=False), nl=False)


@config_app.command("validate")
def config_validate(
    config: ConfigOption = "cpu", overrides: SetOption = None, domain: DomainOption = None
) -> None:
    """Check a configuration and its policy without reading any input."""
    from winnow.pipeline.planning import check_config

    plan = check_config(_configured(config, overrides or [], domain))
    typer.echo(
        f"{config} is valid: {len(plan.config.stages)} stages, {len(plan.clip_columns)} columns, "
        f"{len(plan.policy.rules)} rules in policy {plan.policy.name}"
    )


@config_app.command("schema")
def config_schema(
    policy: Annotated[bool, typer.Option("--policy", help="the schema of policies")] = False,
) -> None:
    """Print the JSON Schema of configurations."""
    from winnow.pipeline.console import print_json
    from winnow.pipeline.describe import configuration_schema, policy_schema

    print_json(policy_schema() if policy else configuration_schema())


ModelsOption = Annotated[
    str, typer.Option("--models", help="path of a file laid over configs/models.yaml")
]


@models_app.command("list")
def models_list(models: ModelsOption = "models", json_output: JsonOption = False) -> None:
    """List the models: where they come from, under what licence, and whether they are here."""
    from winnow.operators.models import Models
    from winnow.pipeline.console import print_json, print_models
    from winnow.pipeline.models import list_models

    rows = list_models(Models.read(models))
    if json_output:
        print_json(rows)
    else:
        print_models(rows)


@models_app.command("pull")
def models_pull(
    names: Annotated[
        list[str] | None, typer.Argument(help="names; default: what --config needs")
    ] = None,
    config: ConfigOption = "gpu",
    overrides: SetOption = None,
    models: Annotated[
        str | None, typer.Option("--models", help="path of a file laid over configs/models.yaml")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Fetch models: those named, or those that a configuration needs."""
    from winnow.operators.models import Models
    from winnow.pipeline.config import load_config
    from winnow.pipeline.console import complain, print_json, say
    from winnow.pipeline.models import pull
    from winnow.pipeline.planning import check_config

    if names:
        registry = Models.read(models or "models")
    else:
        run_config = load_config(config, overrides or [])
        names = list(check_config(run_config).needed_models)
        registry = Models.read(models or run_config.models)
        if not names:
            say(f"the configuration {config} needs no models")
            return
    pulled = pull(registry, names, complain)
    if json_output:
        print_json(pulled)
    for row in pulled if not json_output else ():
        say(f"{row['name']}: {row['where']}")


def _lake(uri: str, options: dict[str, str]) -> Any:
    from winnow.pipeline.lake import Lake

    return Lake(uri if "://" in uri else str(Path(uri).absolute()), options)


def _pairs(settings: list[str] | None) -> dict[str, str]:
    pairs = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise typer.BadParameter(
                f"{setting!r}: write it as KEY=VALUE", param_hint="--storage-option"
            )
        pairs[key] = value
    return pairs


def main() -> None:
    """Entry point: errors become one message and an exit code."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        code = _explain(error)
    if code == INTERRUPTED:
        _complain("stopped. What was committed is in the lake; run the same command again to go on")
        code = FAILED
    _leave(code or 0)


def _leave(code: int) -> NoReturn:
    """End the process; where Arrow's threads may still ask for Python, without the interpreter's end.

    That would kill them, and the process would abort or wait for them for ever, its work done. See
    `Lake.files`. The children of multiprocessing leave in the same way.
    """
    lake = sys.modules.get("winnow.pipeline.lake")
    if lake is None or not lake.Lake.read_by_python:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # whoever read it is gone
            stream.flush()
    os._exit(code)


def _explain(error: Exception) -> int:
    from winnow.operators.errors import ConfigError, LakeError, StorageError, WinnowError

    if hasattr(error, "show") and hasattr(error, "exit_code"):  # the parser's own usage errors
        error.show()
        return int(error.exit_code)
    if os.environ.get("WINNOW_DEBUG") or not isinstance(error, WinnowError):
        raise error
    _complain(str(error))
    return USAGE if isinstance(error, ConfigError | StorageError | LakeError) else FAILED


def _complain(message: str) -> None:
    typer.secho(
        f"winnow: {message}", err=True, fg=typer.colors.RED if sys.stderr.isatty() else None
    )


if __name__ == "__main__":
    main()
