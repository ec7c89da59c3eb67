"""A policy with a calibration: what its rules may use, and that recalibration is a refilter."""

import json
import pickle
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.conftest import scene, write_video
from tests.operators.vlm.openai_server import Asked, OpenAIServer, Reply
from tests.pipeline.lakes import rows
from winnow.operators.critic.calibration import Calibration, calibrated
from winnow.operators.critic.rubric import Rubric
from winnow.operators.errors import ConfigError
from winnow.operators.operator import Column
from winnow.operators.physics import Physics
from winnow.operators.settings import parse_yaml, validate
from winnow.pipeline.config import RunConfig
from winnow.pipeline.lake import Lake
from winnow.pipeline.lake_report import write_lake_report
from winnow.pipeline.policy import Evaluator, Policy, Rule, load_policy
from winnow.pipeline.refilter import refilter
from winnow.pipeline.run import run
from winnow.pipeline.worker import verdict

COLUMNS = (*Physics.columns, Column("a_score", pa.float64(), "a"))
FIGURES = {"nll": 1, "ece_argmax": 0, "ece_good": 0, "mae": 0, "accuracy": 1, "kappa": 1}
FINE = [0.02, 0.03, 0.05, 0.2, 0.7]
POOR = [0.6, 0.2, 0.1, 0.05, 0.05]


def calibration(
    model="m@1",
    prompt="direct@ab",
    mode="direct",
    temperature=2.0,
    limit=0.5,
    cuts=(1.5, 2.5, 3, 4),
) -> Calibration:
    return Calibration(
        name="made",
        fitted_at=datetime(2026, 1, 1, tzinfo=UTC),
        fitted_on={"dataset": "d", "fingerprint": "f", "examples": 50, "groups": 5,
                   "counts": [10] * 5},
        critic={"model": model, "prompt": prompt, "mode": mode},
        temperature=temperature,
        cut_points=cuts,
        thresholds=[
            {"precision": 0.95, "limit": limit},
            {"precision": 0.999, "limit": None, "text": "no limit: rate more clips"},
        ],
        figures={"before": FIGURES, "after": FIGURES},
    )  # fmt: skip


def row(probabilities, model="m@1", prompt="direct@ab", mode="direct") -> dict:
    p = {f"physics_p{k}": v for k, v in enumerate(probabilities, 1)}
    return {**p, "physics_model": model, "physics_prompt": prompt, "physics_mode": mode}


def rule(reject: str, name: str = "r", **more) -> Rule:
    return Rule(name=name, reject=reject, **more)


def policy(*rules: Rule, by=(), any_model=False) -> Policy:
    by = (by,) if isinstance(by, Calibration) else by
    return Policy(name="p", rules=rules, calibration=by, calibration_any_model=any_model)


def table(clips) -> pa.Table:
    schema = pa.schema([(c.name, c.type) for c in COLUMNS])
    return pa.Table.from_pylist([{c.name: None for c in COLUMNS} | clip for clip in clips], schema)


def judged(made: Policy, clips):
    """The answers of a run, after those of refilter were seen to be the same."""
    evaluator = Evaluator(made, COLUMNS)
    in_run = evaluator.rejects(clips)
    assert evaluator.judge(table(clips), made.rules)[0] == in_run
    return in_run


def many(clips: int = 400) -> np.ndarray:
    rng = np.random.default_rng(0)
    sharp = rng.dirichlet([0.3] * 5, clips)
    sharp[:5] = np.eye(5)
    sharp[5] = 0.2
    sharp[6] = [1 - 4e-11, 1e-11, 1e-11, 1e-11, 1e-11]
    return sharp


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 2.345, 100.0])
def test_sql_and_numpy_say_the_same(temperature):
    by = calibration(temperature=temperature, cuts=(0.5, 1.7, 3.3, 4.123456789012345))
    probabilities = many()
    expected = calibrated(probabilities, by)
    evaluator = Evaluator(policy(rule("physics_calibrated_score < 0"), by=by), COLUMNS)
    wanted = ("score", "good", "bad", "label")
    names = [f"physics_calibrated_{which}" for which in wanted]
    # The values themselves, through the very relation that rules see.
    evaluator._calibrated["r"] = set(names)
    evaluator._show(table([row(p) for p in probabilities]), evaluator.policy.rules)
    found = evaluator._connection.execute(f"SELECT {', '.join(names)} FROM clips").fetchnumpy()
    assert found[names[0]] == pytest.approx(expected.expectation, abs=1e-9)
    assert found[names[1]] == pytest.approx(expected.good, abs=1e-9)
    assert found[names[2]] == pytest.approx(expected.bad, abs=1e-9)
    assert found[names[3]].tolist() == expected.label.tolist()


@pytest.mark.parametrize("which", ["score", "label", "good", "bad"])
def test_every_row_is_decided_as_numpy_would(which):
    by = calibration(temperature=1.7)
    answer = calibrated(many(60), by)
    values = {"score": answer.expectation, "label": answer.label, "good": answer.good,
              "bad": answer.bad}[which]  # fmt: skip
    limit = float(np.median(values)) + 1e-7
    made = policy(rule(f"physics_calibrated_{which} < {limit!r}"), by=by)
    found = judged(made, [row(p) for p in many(60)])
    assert [bool(no) for no, _ in found] == (values < limit).tolist()
    assert not any(unknown for _, unknown in found)


def test_a_limit_for_a_precision_is_taken_from_the_file():
    keep = rule("NOT physics_calibrated_keep_95")
    clips = [row(FINE), row(POOR)]
    good = calibrated([FINE, POOR], calibration()).good
    assert judged(policy(keep, by=calibration()), clips) == [([], []), (["r"], [])]
    strict = calibration(limit=float(good[0]) + 1e-6)
    assert judged(policy(keep, by=strict), clips) == [(["r"], []), (["r"], [])]
    exact = calibration(limit=float(good[0].round(9)))
    assert judged(policy(keep, by=exact), clips)[0] == ([], [])


@pytest.mark.parametrize(
    "probabilities",
    [
        [None] * 5, [None, 0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25, None],
        [float("nan")] * 5, [0.2, 0.2, 0.2, 0.2, float("nan")], [float("inf"), 0, 0, 0, 0],
        [0.0] * 5, [1.0] * 5, [1.5, -0.5, 0.0, 0.0, 0.0],
    ],
)  # fmt: skip
def test_without_probabilities_there_is_no_verdict(probabilities):
    rules = [rule(f"physics_calibrated_{which} < 9", which)
             for which in ("score", "label", "good", "bad")]  # fmt: skip
    rules.append(rule("NOT physics_calibrated_keep_95", "keep"))
    (answer,) = judged(policy(*rules, by=calibration()), [row(probabilities)])
    assert answer == ([], [r.name for r in rules])
    assert verdict(*answer, None, None, None).verdict == "error"


@pytest.mark.parametrize(
    "other",
    [{"model": "m@2"}, {"prompt": "direct@cd"}, {"mode": "reasoning"}, {"model": None},
     {"prompt": None}, {"mode": None}],
)  # fmt: skip
def test_the_probabilities_of_another_critic_are_not_calibrated(other):
    poor = rule("physics_calibrated_good < 0.5")
    clips = [row(FINE, **other), row(POOR, **other), row(POOR)]
    assert judged(policy(poor, by=calibration()), clips) == [([], ["r"]), ([], ["r"]), (["r"], [])]
    knowingly = policy(poor, by=calibration(), any_model=True)
    assert judged(knowingly, clips) == [([], []), (["r"], []), (["r"], [])]


def test_a_model_with_quotes_in_its_name_is_itself():
    name = 'it\'s "q" \\ -- ; 100% {x} [y]'
    made = policy(rule("physics_calibrated_good < 0.5"), by=calibration(model=name))
    assert judged(made, [row(POOR, model=name), row(POOR)]) == [(["r"], []), ([], ["r"])]


def test_each_row_has_the_calibration_of_its_own_critic():
    direct, reasoning = calibration(), calibration(mode="reasoning", temperature=9.0, limit=0.9)
    clips = [row(FINE), row(FINE, mode="reasoning"), row(FINE, model="other")]
    goods = [calibrated([FINE], by).good[0] for by in (direct, reasoning)]
    between = sum(goods) / 2
    rules = (rule(f"physics_calibrated_good < {between}"),
             rule("NOT physics_calibrated_keep_95", "keep"))  # fmt: skip
    for by in ((direct, reasoning), (reasoning, direct)):
        assert judged(policy(*rules, by=by), clips) == [
            ([], []), (["r", "keep"], []), ([], ["r", "keep"])
        ]  # fmt: skip
    with pytest.raises(ValueError, match="two calibrations"):
        policy(by=(direct, direct))
    with pytest.raises(ValueError, match="exactly one"):
        policy(by=(direct, reasoning), any_model=True)
    with pytest.raises(ValueError, match="exactly one"):
        policy(any_model=True)


def test_a_condition_settles_rows_that_the_critic_did_not_see():
    made = policy(
        rule("physics_calibrated_label <= 2", when="physics_status = 'ok'"), by=calibration()
    )
    clips = [row([None] * 5) | {"physics_status": "unparsed"}, row(POOR) | {"physics_status": "ok"}]
    assert judged(made, clips) == [([], []), (["r"], [])]


def test_a_percentile_may_be_of_the_calibrated_score():
    probabilities = many(200)
    by = calibration()
    lowest = Rule(name="low", percentile={"column": "physics_calibrated_score", "below": 10})
    evaluator = Evaluator(policy(lowest, rule("a_score < 0"), by=by), COLUMNS)
    clips = table([row(p) | {"a_score": 1.0} for p in probabilities])
    found, (limit,) = evaluator.judge(clips, evaluator.policy.rules)
    score = calibrated(probabilities, by).expectation
    assert limit.value == pytest.approx(np.percentile(score, 10), abs=1e-9)
    assert sum("low" in no for no, _ in found) == 20
    boolean = Rule(name="low", percentile={"column": "physics_calibrated_keep_95", "below": 10})
    with pytest.raises(ConfigError, match="needs numbers"):
        Evaluator(policy(boolean, by=by), COLUMNS)


def test_in_the_middle_of_a_run_the_rule_waits_for_the_critic():
    evaluator = Evaluator(policy(rule("physics_calibrated_bad > 0.5"), by=calibration()), COLUMNS)
    written = {c.name for c in COLUMNS}
    assert evaluator.rejects([row(POOR)], written) == [(["r"], [])]
    for needed in ("physics_p3", "physics_model", "physics_prompt", "physics_mode"):
        assert evaluator.rejects([row(POOR)], written - {needed}) == [([], [])]


@pytest.mark.parametrize(
    ("reject", "by", "words"),
    [
        ("physics_calibrated_good < 0.5", (), ["calibration: FILE", "winnow critic calibrate"]),
        ("physics_calibrated_god < 0.5", calibration(), ["did you mean 'physics_calibrated_good'"]),
        ("NOT physics_calibrated_keep_90", calibration(), ["keep_95", "fit it with that"]),
        ("NOT physics_calibrated_keep_99_9", calibration(), ["made v1", "rate more clips"]),
        ("physics_calibrated_keep_95 < 0.5", calibration(), ["BOOLEAN"]),
        ("physics_calibrated_good", calibration(), ["not true or false"]),
        ("_physics_good < 0.5", calibration(), ["no stage or operator writes"]),
    ],
)
def test_a_rule_that_cannot_be_calibrated_is_said_before_anything_runs(reject, by, words):
    with pytest.raises(ConfigError) as error:
        Evaluator(policy(rule(reject), by=by), COLUMNS)
    for word in words:
        assert word in str(error.value)


def test_a_calibration_needs_the_critic_among_the_operators():
    made = policy(rule("physics_calibrated_good < 0.5"), by=calibration())
    with pytest.raises(ConfigError, match="writes the column 'physics_mode'"):
        Evaluator(made, [Column("a_score", pa.float64(), "a")])
    # Unused, it is no burden.
    Evaluator(policy(rule("a_score < 1"), by=calibration()), [Column("a_score", pa.float64(), "a")])


def test_a_column_of_a_stage_cannot_pass_for_a_calibrated_one():
    posing = Column("physics_calibrated_good", pa.float64(), "an operator's own")
    with pytest.raises(ConfigError, match="rename"):
        Evaluator(policy(by=calibration()), (*COLUMNS, posing))


def test_a_policy_carries_its_calibration_whole():
    made = policy(rule("physics_calibrated_good < 0.5"), by=calibration(temperature=1.2345678901))
    assert Policy.model_validate_json(made.model_dump_json()) == made
    assert pickle.loads(pickle.dumps(made)) == made


# --- policy files --------------------------------------------------------------------------------


def write(file: Path, **content) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))  # JSON is YAML
    return str(file)


def write_calibrations(folder: Path, **by: Calibration) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, made in by.items():
        (folder / f"{name}.json").write_text(made.model_dump_json())


POOR_RULE = {"name": "poor", "reject": "physics_calibrated_good < 0.5"}


def test_a_calibration_is_found_beside_the_policy_or_from_where_one_works(tmp_path, monkeypatch):
    beside, here = calibration(temperature=3.0), calibration(temperature=4.0)
    write_calibrations(tmp_path / "policies" / "fits", one=beside)
    write_calibrations(tmp_path / "work" / "fits", one=here, two=here)
    (tmp_path / "work").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "work")
    file = tmp_path / "policies" / "p.yaml"
    for named, expected in [
        ("fits/one.json", beside),
        ("fits/two.json", here),
        (str(tmp_path / "work" / "fits" / "one.json"), here),
    ]:
        found = load_policy(write(file, name="p", calibration=named, rules=[POOR_RULE]))
        assert found.calibration == (expected,)
    several = write(file, name="p", calibration=["fits/one.json", "fits/two.json"], rules=[])
    with pytest.raises(ConfigError, match="two calibrations"):
        load_policy(several)
    with pytest.raises(ConfigError, match=r"fits/three\.json"):
        load_policy(write(file, name="p", calibration="fits/three.json", rules=[POOR_RULE]))
    with pytest.raises(ConfigError, match="exactly one"):
        load_policy(write(file, name="p", calibration_any_model=True, rules=[POOR_RULE]))


def test_a_policy_inherits_the_calibration_of_the_one_it_extends(tmp_path):
    old, new = calibration(temperature=3.0), calibration(temperature=4.0)
    write_calibrations(tmp_path, old=old, new=new)
    base = write(tmp_path / "base.yaml", name="base", calibration="old.json",
                 calibration_any_model=True, rules=[POOR_RULE])  # fmt: skip

    def extended(**more) -> Policy:
        return load_policy(write(tmp_path / "more" / "p.yaml", name="p", extends=base, **more))

    plain = extended(rules=[{"name": "bad", "reject": "physics_calibrated_bad > 0.5"}])
    assert (plain.calibration, plain.calibration_any_model) == ((old,), True)
    assert [r.name for r in plain.rules] == ["poor", "bad"]
    assert extended(calibration_any_model=False).calibration_any_model is False
    # Another calibration does not inherit that it may be applied to any model.
    other = extended(calibration=str(tmp_path / "new.json"))
    assert (other.calibration, other.calibration_any_model) == ((new,), False)
    without = extended(calibration=None)
    assert without.calibration == ()
    with pytest.raises(ConfigError, match="needs a calibration"):
        Evaluator(without, COLUMNS)


def test_policies_that_ship_need_no_calibration():
    assert load_policy("generated_models").calibration == ()


# --- a lake --------------------------------------------------------------------------------------

CONFIG = """
name: judged
policy: {policy}
isolate: false
stages:
  - {{stage: ingest}}
  - {{stage: split, detector: {{kind: none}}}}
  - stage: filter
    label: critic
    batch_clips: 3
    operators:
      physics: {{critic: {{fps: 2, vlm: {vlm}}}}}
  - {{stage: transcode}}
  - {{stage: shard}}
"""
LEVELS = {"dark": 60, "dim": 110, "bright": 160, "white": 210}


def answer(asked: Asked) -> Reply:
    """The brighter, the more physical."""
    level = float(np.mean([frame.mean() for frame in asked.frames]))
    sure = np.exp(-np.abs(np.arange(1, 6) - level / 50) * 1.2)
    first = dict(zip("12345", (sure / sure.sum()).tolist(), strict=True))
    return Reply(max(first, key=lambda k: first[k]), first_token=first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with policies and calibrations, and a lake that a critic has judged.

    The critic's server is down by now and the videos are gone.
    """
    folder = tmp_path_factory.mktemp("judged")
    for name, level in LEVELS.items():
        images = [(image // 8 + level).astype("uint8") for image in scene(level, 48, 96, 64)]
        (folder / "videos").mkdir(exist_ok=True)
        write_video(folder / "videos" / f"{name}.mp4", images)
    critic = {"model": "tiny-vlm", "prompt": Rubric.read("direct").identity}
    write_calibrations(
        folder,
        lenient=calibration(**critic, temperature=1.0, limit=0.3),
        strict=calibration(**critic, temperature=1.0, limit=0.75),
        foreign=calibration(**critic | {"model": "another@1"}),
    )
    for name in ("lenient", "strict", "foreign"):
        write(folder / f"{name}.yaml", name="physical", calibration=f"{name}.json",
              rules=[{"name": "implausible", "reject": "NOT physics_calibrated_keep_95"}])  # fmt: skip
    with OpenAIServer(answer) as server:
        vlm = {"kind": "openai", "base_url": server.base_url, "model": "tiny-vlm"}
        text = CONFIG.format(policy=folder / "lenient.yaml", vlm=json.dumps(vlm))
        config = validate(RunConfig, parse_yaml(text, "test"), "test")
        result = run(config, str(folder / "videos"), Lake(str(folder / "lake")))
    assert result.ledger.balanced
    shutil.rmtree(folder / "videos")
    return folder


@pytest.fixture
def own(finished, tmp_path) -> Lake:
    """A copy of the lake for a test that writes to it."""
    shutil.copytree(finished / "lake", tmp_path / "own")
    return Lake(str(tmp_path / "own"))


def verdicts(lake: Lake) -> dict[str, str]:
    return dict(rows(lake, "SELECT parse_filename(uri, true), verdict FROM clips_decided"))


def test_a_run_and_a_refilter_agree(finished):
    lake = Lake(str(finished / "lake"))
    decided = verdicts(lake)
    assert decided == {"dark": "reject", "dim": "reject", "bright": "keep", "white": "keep"}
    result = refilter(lake, load_policy(str(finished / "lenient.yaml")), dry_run=True)
    assert (result.changed, result.not_calibrated) == (0, [])


def test_after_another_fit_a_refilter_changes_verdicts_and_opens_no_video(finished, own):
    result = refilter(own, load_policy(str(finished / "strict.yaml")))
    assert verdicts(own) == {"dark": "reject", "dim": "reject", "bright": "reject", "white": "keep"}
    assert result.changed == 1
    assert refilter(own, load_policy(str(finished / "lenient.yaml"))).changed == 1
    assert verdicts(own) == verdicts(Lake(str(finished / "lake")))
    # Which fit it was shows from the row.
    hashes = rows(own, "SELECT count(DISTINCT policy_hash) FROM raw_verdicts")
    assert hashes == [(2,)]


def test_with_the_fit_of_another_critic_nothing_passes_and_it_is_said(finished, own):
    result = refilter(own, load_policy(str(finished / "foreign.yaml")))
    assert set(verdicts(own).values()) == {"error"}
    (said,) = result.not_calibrated
    assert said.startswith("4 clips were judged by tiny-vlm, direct@")
    knowingly = write(finished / "any.yaml", name="physical", extends=str(finished / "foreign.yaml"),
                      calibration_any_model=True)  # fmt: skip
    result = refilter(own, load_policy(knowingly))
    assert "error" not in result.counts
    assert result.not_calibrated == []


def test_the_runs_table_keeps_the_calibration_whole(finished):
    lake = Lake(str(finished / "lake"))
    ((text,),) = rows(lake, "SELECT policy_rules FROM runs")
    kept = Policy.model_validate_json(text)
    assert kept == load_policy(str(finished / "lenient.yaml"))
    assert kept.calibration[0].temperature == 1.0


def test_a_report_of_such_a_lake_can_be_written(finished, tmp_path):
    page = write_lake_report(Lake(str(finished / "lake")), tmp_path / "report.html")
    assert "physics_calibrated_keep_95" in page.read_text()
