"""Domain profiles: what a kind of footage needs otherwise, as data laid over a run and its policy.

The paper curates robotics, driving, smart spaces, human dynamics and physics as it does everything
else, but with a subset of the filters, other thresholds, and caption prompts of their own (seeds/004,
section 2.2). A profile says just that difference, so that it fits any configuration: settings for
stages that a configuration has, operators and rules to leave out, rules to add or replace.

What a profile says about a stage marked `optional`, or of an operator, that the run does not have is
left out, and a note says so. For a stage that is not optional it is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from winnow.operators.errors import ConfigError
from winnow.operators.settings import Strict, find_config, parse_yaml, validate
from winnow.pipeline.policy import Policy, Rule, load_policy, rejecting_columns

if TYPE_CHECKING:
    from winnow.pipeline.config import RunConfig


class StageChange(BaseModel):
    """What a profile says of one stage; any further key is a setting of that stage."""

    model_config = ConfigDict(extra="allow", frozen=True)

    optional: bool = Field(False, description="a configuration may lack this stage")
    operators: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict, description="laid over the stage's by name; null removes one"
    )

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DomainRule(Rule):
    """A rule that a profile adds, or puts in the place of the policy's rule of that name."""

    operator: str | None = Field(
        None, description="the rule is left out, with a note, where the run lacks this operator"
    )

    def plain(self) -> Rule:
        return Rule.model_validate(self.model_dump(exclude={"operator"}, exclude_unset=True))


class PolicyChange(Strict):
    """What a profile changes in a policy."""

    without: tuple[str, ...] = Field((), description="rules to leave out, by name")
    ignore: tuple[str, ...] = Field(
        (), description="operators that are measured and decide nothing: their rules are left out"
    )
    rules: tuple[DomainRule, ...] = Field((), description="added, or replaced by name")

    @model_validator(mode="after")
    def _plain(self) -> PolicyChange:
        names = [rule.name for rule in self.rules]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rules are called {name!r}")
            if name in self.without:
                raise ValueError(f"the rule {name!r} is both left out and given")
        return self


class Domain(Strict):
    """A domain profile."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    description: str = ""
    stages: dict[str, StageChange] = Field(
        default_factory=dict, description="settings by the label of a stage, or its kind"
    )
    without: tuple[str, ...] = Field((), description="labels of stages to leave out")
    without_operators: tuple[str, ...] = Field(
        (), description="operators to leave out wherever they stand, and the policy's rules on them"
    )
    captions: str | None = Field(
        None, description="prompt of the caption stage, where there is one"
    )
    policy: PolicyChange = PolicyChange()

    @property
    def removed(self) -> frozenset[str]:
        """Operators that are left out, whether a configuration has them or not."""
        nulled = {
            name for change in self.stages.values()
            for name, settings in change.operators.items() if settings is None
        }  # fmt: skip
        return frozenset((*self.without_operators, *nulled))

    @model_validator(mode="after")
    def _plain(self) -> Domain:
        for label in self.without:
            if label in self.stages:
                raise ValueError(f"the stage {label!r} is both left out and changed")
        for label, change in self.stages.items():
            for operator in change.operators.keys() & set(self.without_operators):
                raise ValueError(f"the operator {operator!r} is left out and stands in {label!r}")
        return self


def load_domain(name: str) -> Domain:
    """Read a profile: a path, or a name in configs/domains. Raises ConfigError."""
    text, origin = find_config(name, "domains")
    return validate(Domain, parse_yaml(text, origin), origin)


@dataclass(frozen=True, slots=True)
class DomainRun:
    """A run's configuration under a domain."""

    domain: Domain
    content: dict[str, Any]
    """The configuration, parsed and not yet checked."""
    removed: frozenset[str]
    """Operators that the domain leaves out, whether the configuration had them or not."""
    notes: tuple[str, ...]
    """What changed in the configuration and what of the profile found no place, for people."""


def apply_domain(content: Mapping[str, Any], name: str) -> DomainRun:
    """Lay a profile (a path, or a name in configs/domains) over a parsed configuration.

    To be done before `--set` is applied, which therefore wins, and before the configuration is
    checked. `content` is left as it is. Raises ConfigError.
    """
    domain = load_domain(name)
    laid = deepcopy(dict(content))
    if not isinstance(laid.get("stages"), list):
        raise ConfigError(f"domain {domain.name}: the configuration has no list `stages`")
    overlay = _Overlay(domain, laid["stages"])
    for label, change in domain.stages.items():
        overlay.change(label, change)
    if domain.captions is not None:
        overlay.caption(domain.captions)
    overlay.leave_out()
    return DomainRun(domain, laid, frozenset(overlay.removed), tuple(overlay.notes))


class _Overlay:
    """A profile at work on the stages of a configuration."""

    def __init__(self, domain: Domain, stages: list[Any]) -> None:
        self._domain, self._stages = domain, stages
        self.removed = set(domain.removed)
        self.notes: list[str] = []

    def _find(self, label: str) -> dict[str, Any] | None:
        return next((stage for stage in self._stages if _label(stage) == label), None)

    def _note(self, text: str) -> None:
        self.notes.append(f"domain {self._domain.name}: {text}")

    def change(self, label: str, change: StageChange) -> None:
        stage = self._find(label)
        if stage is None:
            if not change.optional:
                labels = ", ".join(str(_label(stage)) for stage in self._stages)
                raise ConfigError(
                    f"domain {self._domain.name} changes the stage {label!r}, which the "
                    f"configuration does not have (it has {labels}): give the stage that label, or "
                    "mark it `optional: true` in the profile"
                )
            what = [*change.settings, *(f"operator {name}" for name in change.operators)]
            self._note(f"there is no stage {label}; not used: {', '.join(what) or 'nothing'}")
            return
        for key, value in change.settings.items():
            self._set(stage, key, value, f"{label}.{key}")
        if change.operators:
            operators = stage.setdefault("operators", {})
            for name, settings in change.operators.items():
                self._operator(label, operators, name, settings)

    def _set(self, place: dict[str, Any], key: str, value: Any, where: str) -> None:
        # A mapping goes in whole: merged, half a detector of another kind would stay behind.
        if key in place and place[key] != value:
            self._note(f"{where} was {place[key]!r} and is {value!r}")
        place[key] = value

    def _operator(
        self, label: str, operators: dict[str, Any], name: str, settings: dict[str, Any] | None
    ) -> None:
        if settings is None:
            if name in operators:
                del operators[name]
                self._note(f"{label}: without the operator {name}")
            else:
                self._note(f"{label} has no operator {name} to leave out")
            return
        if name not in operators:
            self._note(f"{label}: with the operator {name}")
        present = operators[name] = dict(operators.get(name) or {})
        for key, value in settings.items():
            self._set(present, key, value, f"{label}.{name}.{key}")

    def caption(self, prompt: str) -> None:
        found = [stage for stage in self._stages if _kind(stage) == "caption"]
        for stage in found:
            self._set(stage, "domain", prompt, f"{_label(stage)}.domain")
        if not found:
            self._note(f"there is no caption stage; not used: the caption prompt {prompt}")

    def leave_out(self) -> None:
        for label in self._domain.without:
            stage = self._find(label)
            if stage is None:
                self._note(f"there is no stage {label} to leave out")
                continue
            self.removed |= set(_operators(stage))
            self._stages.remove(stage)
            self._note(f"without the stage {label}")
        for name in self._domain.without_operators:
            holders = [stage for stage in self._stages if name in _operators(stage)]
            for stage in holders:
                del stage["operators"][name]
                self._note(f"{_label(stage)}: without the operator {name}")
            if not holders:
                self._note(f"there is no operator {name} to leave out")
        for stage in [s for s in self._stages if _kind(s) == "filter" and s.get("operators") == {}]:
            self._stages.remove(stage)
            self._note(f"without the stage {_label(stage)}, which has no operator left")


def _kind(stage: Any) -> Any:
    return stage.get("stage") if isinstance(stage, dict) else None


def _label(stage: Any) -> Any:
    return (stage.get("label") or stage.get("stage")) if isinstance(stage, dict) else None


def _operators(stage: Any) -> dict[str, Any]:
    found = stage.get("operators") if isinstance(stage, dict) else None
    return found if isinstance(found, dict) else {}


def policy_of(config: RunConfig) -> tuple[Policy, tuple[str, ...]]:
    """The policy of a checked configuration, under its domain, and notes on what that changed.

    Raises ConfigError.
    """
    policy = load_policy(config.policy)
    if config.domain is None:
        return policy, ()
    domain = load_domain(config.domain)
    return apply_domain_policy(policy, DomainRun(domain, {}, domain.removed, ()), config)


def apply_domain_policy(
    policy: Policy, run: DomainRun, config: RunConfig
) -> tuple[Policy, tuple[str, ...]]:
    """The policy `<policy>_<domain>` for a run, and notes on what is left out.

    `config` is the run's checked configuration, which says what is measured. A rule that rejects by
    the columns of operators that the domain leaves out or ignores goes with them. A rule that reads
    others as well stays as it is: if it cannot be judged, the check of the plan says so, and the
    profile has to name it.
    """
    domain, change = run.domain, run.domain.policy
    present = {
        name for stage in config.stages if stage.stage == "filter"
        for name in stage.operators
    }  # fmt: skip
    dropped = (set(run.removed) - present) | set(change.ignore)
    notes: list[str] = []
    rules: dict[str, Rule] = {}
    for rule in policy.rules:
        read = rejecting_columns(rule, f"policy {policy.name}, rule {rule.name}")
        owners = {_owner(column, present | dropped) for column in read}
        if rule.name in change.without:
            continue
        if owners and owners <= dropped:
            names = ", ".join(sorted(str(owner) for owner in owners))
            notes.append(f"domain {domain.name}: without the rule {rule.name}, which reads {names}")
            continue
        rules[rule.name] = rule
    for name in change.without:
        known = name in {rule.name for rule in policy.rules}
        said = f"without the rule {name}" if known else f"there is no rule {name} to leave out"
        notes.append(f"domain {domain.name}: {said}")
    for rule in change.rules:
        if rule.operator is not None and rule.operator not in present:
            notes.append(
                f"domain {domain.name}: there is no operator {rule.operator}; not used: the rule "
                f"{rule.name}"
            )
            continue
        given = rule.plain()
        if rule.name in rules and rules[rule.name].predicate != given.predicate:
            notes.append(
                f"domain {domain.name}: the rule {rule.name} was {rules[rule.name].predicate!r} and "
                f"is {given.predicate!r}"
            )
        rules[rule.name] = given
    changed = policy.model_copy(
        update={"name": f"{policy.name}_{domain.name}", "rules": tuple(rules.values())}
    )
    return changed, tuple(notes)


def _owner(column: str, operators: Collection[str]) -> str | None:
    """The operator that writes a column: columns are called `<operator>_<measure>`."""
    fitting = [name for name in operators if column.startswith(f"{name.lower()}_")]
    return max(fitting, key=len, default=None)
