from copy import deepcopy

import pytest
import yaml

from winnow.operators.errors import ConfigError
from winnow.operators.operator import Column
from winnow.operators.settings import find_config, parse_yaml, validate
from winnow.pipeline.config import RunConfig, load_config
from winnow.pipeline.domains import apply_domain, apply_domain_policy
from winnow.pipeline.planning import check_config
from winnow.pipeline.policy import Evaluator, Policy, Rule, load_policy

DOMAINS = ("robotics", "driving", "smart_spaces", "human_dynamics", "physics")


def content(name: str = "cpu") -> dict:
    return parse_yaml(find_config(name)[0], name)


@pytest.fixture
def profile(tmp_path):
    """Writes a profile; returns its path."""

    def write(**fields) -> str:
        path = tmp_path / "odd.yaml"
        path.write_text(yaml.safe_dump({"name": "odd", **fields}))
        return str(path)

    return write


def stage(run, label: str) -> dict:
    return next(s for s in run.content["stages"] if label in (s.get("label"), s["stage"]))


def checked(run) -> RunConfig:
    return validate(RunConfig, run.content, "run")


def said(notes, *words: str) -> bool:
    return any(all(word in note for word in words) for note in notes)


def with_models() -> dict:
    """A configuration with the stages that a machine with GPUs has."""
    found = content()
    found["stages"][3:3] = [
        {"stage": "filter", "label": "vision", "backbone": {},
         "operators": {"aesthetic": {}, "prompt_match": {}}},
        {"stage": "filter", "label": "semantic", "operators": {"vlm_filter": {}}},
    ]  # fmt: skip
    return found


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("profile_name", ["cpu", "gpu", "paper"])
def test_the_shipped_domains_fit_the_shipped_profiles(domain, profile_name):
    config = load_config(profile_name, domain=domain)
    plan = check_config(config)
    assert plan.policy.name == f"{config.policy}_{domain}"
    assert config.domain == domain


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_shipped_domains_omit_the_vlm_filter_and_its_rules(domain):
    base = Policy(name="p", rules=(
        Rule(name="artifacts", reject="vlm_filter_worst > 0.5"),
        Rule(name="too_short", reject="duration_s < 2"),
    ))  # fmt: skip
    run = apply_domain(with_models(), domain)
    config = checked(run)
    assert not any("vlm_filter" in s.get("operators", {}) for s in run.content["stages"])
    assert "semantic" not in [s.get("label") for s in run.content["stages"]]
    policy, notes = apply_domain_policy(base, run, config)
    names = [rule.name for rule in policy.rules]
    assert "artifacts" not in names
    assert "too_short" in names
    assert said(run.notes, "semantic", "vlm_filter")
    assert said(notes, "artifacts", "vlm_filter")


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_shipped_domains_have_a_caption_prompt(domain):
    run = apply_domain(content(), domain)
    assert said(run.notes, "no caption stage", domain)
    find_config(run.domain.captions, "prompts/captions")
    captioning = content() | {"stages": [*content()["stages"], {"stage": "caption"}]}
    assert stage(apply_domain(captioning, domain), "caption")["domain"] == domain


def test_a_rule_on_an_operator_that_the_run_lacks_is_left_out_and_said():
    lacking = apply_domain(content(), "smart_spaces")
    policy, notes = apply_domain_policy(load_policy("generated"), lacking, checked(lacking))
    assert "off_prompt" not in [rule.name for rule in policy.rules]
    assert said(notes, "off_prompt", "prompt_match")
    having = apply_domain(with_models(), "smart_spaces")
    policy, notes = apply_domain_policy(load_policy("generated"), having, checked(having))
    assert policy.rules[-1] == Rule(
        name="off_prompt", when="prompt IS NOT NULL", reject="prompt_match_mean < 0.18",
        reason="shows something else than its prompt asked for",
    )  # fmt: skip
    assert not said(notes, "off_prompt")


def test_settings_go_over_those_of_a_stage_and_what_changes_is_said(profile):
    base = content()
    base["stages"][2]["operators"]["motion"] = {"moving": 0.02}
    before = deepcopy(base)
    path = profile(stages={
        "split": {"longest_s": 20, "detector": {"kind": "none"}},
        "cheap": {"operators": {"motion": {"rate": 4}, "text": None, "drift": {}}},
    })  # fmt: skip
    run = apply_domain(base, path)
    assert base == before
    assert stage(run, "split")["longest_s"] == 20
    assert stage(run, "split")["detector"] == {"kind": "none"}  # nothing of the other kind stays
    operators = stage(run, "cheap")["operators"]
    assert operators["motion"] == {"moving": 0.02, "rate": 4}
    assert "text" not in operators
    assert operators["drift"] == {}
    assert said(run.notes, "split.longest_s was 60 and is 20")
    assert said(run.notes, "without the operator text")
    assert said(run.notes, "with the operator drift")


def test_rules_on_an_operator_that_goes_go_with_it(profile):
    run = apply_domain(content(), profile(stages={"cheap": {"operators": {"text": None}}}))
    config = checked(run)
    policy, notes = apply_domain_policy(load_policy("generated"), run, config)
    gone = {r.name for r in load_policy("generated").rules} - {r.name for r in policy.rules}
    assert gone == {"overlay_text", "watermark"}
    assert said(notes, "overlay_text", "text")
    Evaluator(policy, without_text())


def without_text() -> list[Column]:
    """The columns of the default configuration, but for those of the operator `text`."""
    plan = check_config(load_config("cpu"))
    return [column for column in plan.clip_columns if not column.name.startswith("text_")]


def test_a_rule_that_also_reads_what_stays_is_not_dropped_by_halves(profile):
    both = Rule(name="both", reject="text_line_s > 1 OR motion_mean < 0.001")
    ranked = Rule(name="ranked", percentile={"column": "text_line_s", "above": 90})
    run = apply_domain(content(), profile(without_operators=["text"]))
    policy, _ = apply_domain_policy(Policy(name="p", rules=(both, ranked)), run, checked(run))
    assert policy.rules == (both,)
    # It cannot be judged: the check of the plan says so, and the profile must name the rule.
    with pytest.raises(ConfigError, match="text_line_s"):
        Evaluator(policy, without_text())


def test_rules_are_replaced_in_place_added_and_left_out(profile):
    base = Policy(name="p", rules=(
        Rule(name="a", reject="duration_s < 1"), Rule(name="b", reject="duration_s < 2"),
        Rule(name="c", reject="aesthetic_mean < 4"), Rule(name="d", reject="fps < 5"),
    ))  # fmt: skip
    change = {"without": ["d", "nosuch"], "ignore": ["aesthetic"], "rules": [
        {"name": "z", "percentile": {"column": "motion_mean", "below": 5}},
        {"name": "a", "reject": "duration_s < 5"},
    ]}  # fmt: skip
    run = apply_domain(content(), profile(policy=change))
    policy, notes = apply_domain_policy(base, run, checked(run))
    assert policy.name == "p_odd"
    assert [rule.name for rule in policy.rules] == ["a", "b", "z"]
    assert policy.rules[0].reject == "duration_s < 5"
    assert policy.needs_population
    assert said(notes, "rule a was 'duration_s < 1' and is 'duration_s < 5'")
    assert said(notes, "no rule nosuch")
    assert said(notes, "without the rule d")
    assert said(notes, "without the rule c", "aesthetic")


def test_a_stage_that_is_missing_is_an_error_unless_it_is_optional(profile):
    change = {"operators": {"aesthetic": {}}, "batch_clips": 4}
    with pytest.raises(ConfigError, match=r"'vision'.*it has .*cheap.*optional: true"):
        apply_domain(content(), profile(stages={"vision": change}))
    run = apply_domain(content(), profile(stages={"vision": {"optional": True, **change}}))
    assert run.content == content()
    assert said(run.notes, "no stage vision", "batch_clips", "operator aesthetic")


def test_whole_stages_are_left_out_with_their_rules(profile):
    run = apply_domain(with_models(), profile(without=["vision", "nosuch"]))
    assert "vision" not in [s.get("label") for s in run.content["stages"]]
    base = Policy(name="p", rules=(Rule(name="ugly", reject="aesthetic_mean < 4"),))
    policy, _ = apply_domain_policy(base, run, checked(run))
    assert policy.rules == ()
    assert said(run.notes, "no stage nosuch")


def test_an_operator_that_an_override_brings_back_keeps_its_rules(profile):
    run = apply_domain(content(), profile(without_operators=["text"]))
    stage(run, "cheap")["operators"]["text"] = {}  # as `--set` would, after the domain
    policy, _ = apply_domain_policy(load_policy("generated"), run, checked(run))
    assert [rule.name for rule in policy.rules][-2:] == ["overlay_text", "watermark"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "Odd"}, ["name", "pattern"]),
        ({"stage": {}}, ["unknown key 'stage'"]),
        ({"policy": {"rules": [{"name": "a"}]}}, ["`reject`, or a `percentile`"]),
        ({"policy": {"rules": [{"name": "a", "reject": "x"}] * 2}}, ["two rules are called 'a'"]),
        ({"policy": {"rules": [{"name": "a", "reject": "x"}], "without": ["a"]}}, ["left out"]),
        ({"without": ["split"], "stages": {"split": {}}}, ["'split' is both"]),
        ({"without_operators": ["text"], "stages": {"cheap": {"operators": {"text": {}}}}},
         ["'text'", "'cheap'"]),
    ],
)  # fmt: skip
def test_a_profile_that_contradicts_itself_is_refused(profile, fields, words):
    with pytest.raises(ConfigError) as error:
        apply_domain(content(), profile(**fields))
    for word in words:
        assert word in str(error.value)


def test_an_unknown_domain_names_those_that_there_are():
    with pytest.raises(ConfigError, match=r"nosuch.*driving"):
        apply_domain(content(), "nosuch")


def test_a_setting_that_a_stage_does_not_have_is_refused_by_the_configuration(profile):
    run = apply_domain(content(), profile(stages={"split": {"longest": 20}}))
    with pytest.raises(ConfigError, match="longest"):
        checked(run)
