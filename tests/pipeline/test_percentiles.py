import numpy as np
import pyarrow as pa
import pytest

from tests.pipeline.lakes import config, rows
from winnow.operators.errors import ConfigError
from winnow.operators.operator import Column
from winnow.operators.settings import validate
from winnow.pipeline.lake import Lake
from winnow.pipeline.materialize import materialize
from winnow.pipeline.policy import Evaluator, Policy, Rule, load_policy
from winnow.pipeline.refilter import refilter
from winnow.pipeline.run import Progress, run

COLUMNS = (
    Column("q_overall", pa.float32(), "score"),
    Column("q_label", pa.string(), "label"),
    Column("q_votes", pa.list_(pa.string()), "votes"),
)


def rule(**percentile) -> Rule:
    when = percentile.pop("when", None)
    return Rule(name="poor", percentile={"column": "q_overall", **percentile}, when=when)


def judge(rules, scores, generators=None, labels=None):
    """For each clip "reject", "error" or "keep", and the limits."""
    generators = generators or [None] * len(scores)
    table = pa.table(
        {
            "q_overall": pa.array(scores, pa.float32()),
            "q_label": pa.array(labels or [None] * len(scores), pa.string()),
            "generator": pa.array(generators, pa.string()),
        }
    )
    evaluator = Evaluator(Policy(name="p", rules=rules), COLUMNS)
    judged, limits = evaluator.judge(table, rules)
    words = ["reject" if no else "error" if unknown else "keep" for no, unknown in judged]
    return words, limits


def rejected(rules, scores, **more):
    return [n for n, word in enumerate(judge(rules, scores, **more)[0]) if word == "reject"]


def test_the_lowest_share_of_known_scores_is_rejected_whatever_their_order():
    scores = [(n * 37) % 100 for n in range(100)]  # 0..99, shuffled
    found = rejected([rule(below=15)], scores)
    assert sorted(scores[n] for n in found) == list(range(15))
    found = rejected([rule(above=90)], scores)
    assert sorted(scores[n] for n in found) == list(range(90, 100))


@pytest.mark.parametrize("percent", [0.5, 7, 15, 50, 99.5])
def test_the_limit_is_that_of_numpy(percent):
    scores = np.random.default_rng(int(percent)).normal(size=211).astype(np.float32)
    _, (limit,) = judge([rule(below=percent)], scores.tolist())
    assert limit.value == pytest.approx(np.percentile(scores.astype(float), percent), abs=1e-12)
    assert (limit.rule, limit.group, limit.scores, limit.applied) == ("poor", {}, 211, True)


def test_scores_that_tie_with_the_limit_stay():
    # DuckDB's own interpolation of two equal numbers ends beside them for about one in 300.
    drawn = np.random.default_rng(0).random(1200, dtype=np.float32).tolist()
    tied = [(score, str(n)) for n, score in enumerate(drawn) for _ in range(20 + n % 40)]
    scores, generators = zip(*tied, strict=True)
    for side in ({"below": 15}, {"above": 85}):
        assert not rejected([rule(**side, by=["generator"])], scores, generators=generators), side
    scores = [0.1] * 5 + [0.5] * 95
    assert rejected([rule(below=50)], scores) == [0, 1, 2, 3, 4]
    assert rejected([rule(below=3)], scores) == []


def test_each_group_has_its_own_percentile_and_the_unnamed_are_a_group():
    scores = [*range(20), *range(100, 120), *range(200, 220)]
    generators = ["a"] * 20 + ["b"] * 20 + [None] * 20
    words, limits = judge([rule(below=10, by=["generator"])], scores, generators)
    assert [n for n, word in enumerate(words) if word == "reject"] == [0, 1, 20, 21, 40, 41]
    assert {limit.group["generator"]: limit.scores for limit in limits} == {
        "a": 20, "b": 20, None: 20
    }  # fmt: skip
    assert rejected([rule(below=10)], scores, generators=generators) == [0, 1, 2, 3, 4, 5]


def test_a_group_that_is_too_small_rejects_nothing():
    scores, generators = [*range(19), *range(20)], ["few"] * 19 + ["many"] * 20
    words, limits = judge([rule(below=10, by=["generator"])], scores, generators)
    assert [n for n, word in enumerate(words) if word == "reject"] == [19, 20]
    assert [limit.applied for limit in limits] == [False, True]
    assert rejected([rule(below=10, by=["generator"], least=19)], scores, generators=generators)


def test_a_clip_without_a_score_is_an_error_and_not_of_the_population():
    scores = [None, float("nan"), float("inf"), *range(19)]
    words, limits = judge([rule(below=10)], scores)
    assert words == ["error"] * 3 + ["keep"] * 19  # 19 scores are too few, whatever else is there
    assert limits[0].scores == 19
    words, _ = judge([rule(below=10)], [None] * 25)
    assert words == ["error"] * 25


def test_a_rule_with_a_condition_judges_fewer_clips_by_the_same_limit():
    scores, labels = list(range(100)), ["x", "y"] * 50
    found = rejected([rule(below=10, when="q_label = 'x'")], scores, labels=labels)
    assert found == [0, 2, 4, 6, 8]
    labels[0] = None
    assert judge([rule(below=10, when="q_label = 'x'")], scores, labels=labels)[0][0] == "error"


def test_several_rules_are_listed_each_by_its_name():
    rules = [rule(below=10), Rule(name="lost", percentile={"column": "q_overall", "below": 5}),
             Rule(name="low", reject="q_overall < 7")]  # fmt: skip
    table = pa.table({"q_overall": pa.array(range(100), pa.float32())})
    judged, _ = Evaluator(Policy(name="p", rules=rules), COLUMNS).judge(table, rules)
    assert [judged[n][0] for n in (4, 6, 9, 10)] == [
        ["poor", "lost", "low"], ["poor", "low"], ["poor"], []
    ]  # fmt: skip


def test_inside_a_run_the_rule_is_open_and_the_others_decide():
    policy = Policy(name="p", rules=(rule(below=50), Rule(name="low", reject="q_overall < 1")))
    evaluator = Evaluator(policy, COLUMNS)
    clips = [{"q_overall": 0.0}, {"q_overall": 2.0}, {"q_overall": 3.0}] * 20
    assert evaluator.rejects(clips) == [(["low"], []), ([], []), ([], [])] * 20
    assert evaluator.rejects(clips[:1], {"q_overall"}) == [(["low"], [])]
    assert policy.needs_population
    assert not load_policy("generated").needs_population


@pytest.mark.parametrize(
    ("percentile", "words"),
    [
        ({"column": "q_overal", "below": 5}, ["q_overal", "did you mean 'q_overall'"]),
        ({"column": "q_overall", "below": 5, "by": ["genrator"]}, ["genrator", "generator"]),
        ({"column": "q_label", "below": 5}, ["q_label", "numbers"]),
        ({"column": "q_overall", "below": 5, "by": ["q_votes"]}, ["q_votes", "single values"]),
        ({"column": 'q_overall" FROM clips; --', "below": 5}, ["writes the column"]),
    ],
)
def test_columns_are_checked_before_anything_runs(percentile, words):
    policy = Policy(name="p", rules=[Rule(name="poor", percentile=percentile)])
    with pytest.raises(ConfigError) as error:
        Evaluator(policy, COLUMNS)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"percentile": {"column": "x"}}, "one of `below` and `above`"),
        ({"percentile": {"column": "x", "below": 5, "above": 95}}, "one of `below` and `above`"),
        ({"percentile": {"column": "x", "below": 0}}, "greater than 0"),
        ({"percentile": {"column": "x", "above": 100}}, "less than 100"),
        ({"percentile": {"column": "x", "below": 5}, "reject": "x < 1"}, "either"),
        ({}, "`reject`, or a `percentile`"),
    ],
)
def test_a_rule_says_one_thing(content, words):
    with pytest.raises(ConfigError, match=words):
        validate(Policy, {"name": "p", "rules": [{"name": "poor", **content}]}, "p.yaml")


def test_a_policy_survives_the_runs_table():
    policy = Policy(name="p", rules=(rule(below=15, by=["generator"]), Rule(name="a", reject="x")))
    assert Policy.model_validate_json(policy.model_dump_json()) == policy
    assert policy.rules[0].predicate == "q_overall below percentile 15 within generator"


def lowest(column: str, below: float, name: str = "slowest") -> Policy:
    found = {"column": column, "below": below, "least": 2}
    return Policy(name=name, rules=(Rule(name="slow", percentile=found),))


def test_refilter_decides_over_the_lake_and_again_the_same(own_lake):
    policy = lowest("motion_mean", 40)
    first = refilter(own_lake, policy)
    slow = rows(own_lake, "SELECT parse_filename(uri), reasons FROM clips_decided "
                          "WHERE verdict = 'reject'")  # fmt: skip
    scores = rows(own_lake, "SELECT motion_mean, parse_filename(uri) FROM clips_decided ORDER BY 1")
    assert len(slow) == 2
    assert {reasons[0] for _, reasons in slow} == {"slow"}
    assert {name for name, _ in slow} == {name for _, name in scores[:2]}
    assert first.limits[0].scores == 6
    before = rows(own_lake, "SELECT * EXCLUDE (seq, decided_by) FROM verdicts ORDER BY ALL")
    again = refilter(own_lake, policy)
    assert again.counts == first.counts
    assert again.limits == first.limits
    assert again.changed == 0
    assert rows(own_lake, "SELECT * EXCLUDE (seq, decided_by) FROM verdicts ORDER BY ALL") == before


def test_a_kept_clip_that_the_percentile_rejects_leaves_the_dataset(own_lake):
    kept = rows(own_lake, "SELECT clip_id FROM dataset")
    generated = load_policy("generated")
    policy = generated.model_copy(
        update={"rules": (*generated.rules, lowest("sharpness_mean", 60).rules[0])}
    )
    result = refilter(own_lake, policy)
    assert result.changed > 0
    left = rows(own_lake, "SELECT clip_id FROM dataset")
    assert set(left) < set(kept)
    assert len(left) == result.counts["keep"] - result.kept_without_media


def test_the_duplicate_of_a_clip_that_is_rejected_now_is_kept_without_media(own_lake):
    # The small bear is a copy of the large one; only the large one was encoded.
    wide = Rule(name="wide", percentile={"column": "width", "above": 10, "least": 2})
    result = refilter(own_lake, Policy(name="narrow", rules=(wide,)))
    assert result.counts == {"reject": 5, "keep": 1}
    assert result.kept_without_media == 1
    (kept,) = rows(own_lake, "SELECT parse_filename(uri) FROM clips_decided WHERE verdict = 'keep'")
    assert kept == ("bear small.mp4",)


def test_a_dry_run_shows_the_limits_and_writes_nothing(own_lake):
    before = rows(own_lake, "SELECT count(*) FROM raw_verdicts")
    assert refilter(own_lake, lowest("motion_mean", 40), dry_run=True).limits[0].applied
    assert rows(own_lake, "SELECT count(*) FROM raw_verdicts") == before


def test_a_run_ends_with_its_percentiles_and_refilter_agrees(videos, tmp_path):
    path = tmp_path / "ranked.yaml"
    path.write_text(
        "name: ranked\nextends: generated\nrules:\n"
        "  - {name: slow, percentile: {column: motion_mean, below: 40, least: 3}}\n"
    )
    own = Lake(str(tmp_path / "lake"))
    result = run(config(f"policy={path}"), str(videos), own)
    assert result.ledger.balanced
    found = rows(own, "SELECT count(*) FROM clips_decided WHERE list_contains(reasons, 'slow')")
    assert found[0][0] >= 2
    assert refilter(own, load_policy(str(path)), dry_run=True).changed == 0


def test_a_run_says_how_to_make_what_its_percentiles_let_in(videos, tmp_path):
    path = tmp_path / "narrow.yaml"
    path.write_text(
        "name: narrow\nrules:\n  - {name: wide, percentile: {column: width, above: 10, least: 2}}\n"
    )
    own, said = Lake(str(tmp_path / "lake")), []
    result = run(config(f"policy={path}"), str(videos), own, progress=Progress(say=said.append))
    assert result.ledger.verdicts["keep"] == 1
    assert rows(own, "SELECT count(*) FROM dataset") == [(0,)]
    (line,) = [line for line in said if "winnow materialize" in line]
    assert f"--lake {own.uri} --policy narrow" in line
    assert materialize(own, "narrow").counts["made"] == 1
    assert rows(own, "SELECT count(*) FROM dataset") == [(1,)]
