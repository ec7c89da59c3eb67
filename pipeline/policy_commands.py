"""`winnow policy`: compare two policies, and tune one by clips that a person has labelled."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

policy_app = typer.Typer(help="Compare and tune policies.", no_args_is_help=True)

LakeOption = Annotated[str, typer.Option("--lake", help="folder or object-store URL of the lake")]
StorageOption = Annotated[
    list[str] | None,
    typer.Option("--storage-option", metavar="KEY=VALUE", help="object-store setting; repeatable"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]


class Goal(StrEnum):
    reject = "reject"
    keep = "keep"


@policy_app.command()
def diff(
    a: Annotated[str, typer.Argument(help="a policy with verdicts in the lake, or a file")],
    b: Annotated[str, typer.Argument(help="another one")],
    lake: LakeOption,
    examples: Annotated[int, typer.Option(min=0, help="clips to show by kind of change")] = 3,
    storage_option: StorageOption = None,
    json_output: JsonOption = False,
) -> None:
    """How many clips change sides from one policy to another, why, and which for example."""
    from winnow.pipeline.cli import _lake, _pairs
    from winnow.pipeline.console import print_json, say
    from winnow.pipeline.policy_diff import as_text, diff_policies

    found = diff_policies(_lake(lake, _pairs(storage_option)), a, b, examples=examples)
    if json_output:
        print_json(found.as_dict())
    else:
        say(as_text(found))


@policy_app.command()
def tune(
    lake: LakeOption,
    labels: Annotated[Path, typer.Option(help="CSV of clip_id or uri, and label: good or bad")],
    policy: Annotated[str, typer.Option("--policy", "-p", help="path of a YAML file, or a name")],
    precision: Annotated[float, typer.Option(help="the share to reach, above 0, at most 1")] = 0.95,
    goal: Annotated[
        Goal, typer.Option(help="reject: bad among the rejected; keep: good among the kept")
    ] = Goal.reject,
    storage_option: StorageOption = None,
    json_output: JsonOption = False,
) -> None:
    """Precision and recall of each rule against labelled clips, and the thresholds to reach one."""
    from winnow.pipeline import policy_tune
    from winnow.pipeline.cli import _lake, _pairs
    from winnow.pipeline.console import print_json, say
    from winnow.pipeline.policy import load_policy

    tuning = policy_tune.tune(
        _lake(lake, _pairs(storage_option)),
        load_policy(policy),
        policy_tune.read_labels(labels),
        precision,
        goal.value,
    )
    if json_output:
        print_json(tuning.as_dict())
    else:
        say(policy_tune.as_text(tuning))
