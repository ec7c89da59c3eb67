from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from winnow.operators.errors import ConfigError
from winnow.operators.operator import Column
from winnow.pipeline.policy import Evaluator, Policy, Rule

COLUMNS = (
    Column("a_score", pa.float64(), "a"),
    Column("b_score", pa.float64(), "b"),
    Column("b_label", pa.string(), "label"),
)


def policy(*rules: Rule) -> Policy:
    return Policy(name="p", rules=rules)


def judge(rules, row, written=None):
    return Evaluator(policy(*rules), COLUMNS).rejects([row], written)[0]


def test_every_rule_that_rejects_is_listed():
    rules = [Rule(name="low_a", reject="a_score < 1"), Rule(name="low_b", reject="b_score < 1"),
             Rule(name="high_b", reject="b_score > 1")]  # fmt: skip
    assert judge(rules, {"a_score": 0.5, "b_score": 0.0}) == (["low_a", "low_b"], [])


def test_a_null_cannot_be_judged_and_is_no_low_score():
    assert judge([Rule(name="low", reject="a_score < 1")], {"a_score": None}) == ([], ["low"])


def test_a_null_beside_a_sure_reason_does_not_matter():
    rule = Rule(name="either", reject="a_score < 1 OR b_score < 1")
    assert judge([rule], {"a_score": 0.0, "b_score": None}) == (["either"], [])
    assert judge([rule], {"a_score": 2.0, "b_score": None}) == ([], ["either"])


@pytest.mark.parametrize(
    ("label", "score", "expected"),
    [("cat", 0.0, (["r"], [])), ("dog", 0.0, ([], [])), ("dog", None, ([], [])),
     ("cat", None, ([], ["r"])), (None, 0.0, ([], ["r"]))],
)  # fmt: skip
def test_a_rule_applies_where_its_condition_holds(label, score, expected):
    rule = Rule(name="r", reject="a_score < 1", when="b_label = 'cat'")
    assert judge([rule], {"b_label": label, "a_score": score}) == expected


def test_in_the_middle_of_a_run_only_rules_whose_columns_are_written_are_asked():
    rules = [Rule(name="a", reject="a_score < 1"), Rule(name="b", reject="b_score < 1")]
    assert judge(rules, {"a_score": 2.0}, {"a_score"}) == ([], [])
    assert judge(rules, {"a_score": 2.0}) == ([], ["b"])


@pytest.mark.parametrize(
    "predicate",
    [
        "a_score <",
        "a_score < 1; DROP TABLE clips",
        "a_score < 1) FROM clips; COPY clips TO '/tmp/x'; --",
        "(SELECT count(*) FROM read_csv('/etc/passwd')) > 0",
        "EXISTS (SELECT 1)",
        "a_score < 1 FROM clips WHERE (true",
        "nosuch > 1",
        "",
        "a_score < 1, b_score < 1",
    ],
)
def test_a_predicate_is_one_expression_over_known_columns(predicate):
    with pytest.raises(ConfigError):
        Evaluator(policy(Rule(name="r", reject=predicate)), COLUMNS)


def test_a_predicate_may_end_in_a_comment():
    assert judge([Rule(name="r", reject="a_score < 1 -- too low")], {"a_score": 0.0}) == (["r"], [])


def test_threads_may_ask_at_once():
    evaluator = Evaluator(
        policy(Rule(name="low", reject="x < 50")), [Column("x", pa.float64(), "")]
    )
    rows = [[{"x": float(n)} for n in range(k, k + 40)] for k in range(16)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(evaluator.rejects, rows))
    for asked, answered in zip(rows, answers, strict=True):
        assert [bool(rejecting) for rejecting, _ in answered] == [row["x"] < 50 for row in asked]


def test_a_predicate_that_cannot_be_computed_for_a_clip_is_an_error_of_that_clip():
    rules = [Rule(name="odd", reject="CAST(b_label AS INTEGER) > 3"),
             Rule(name="where", reject="a_score < 1", when="CAST(b_label AS INTEGER) > 3")]  # fmt: skip
    rows = [{"a_score": 0.0, "b_score": 0.0, "b_label": label} for label in ("5", "no number", "1")]
    expected = [(["odd", "where"], []), ([], ["odd", "where"]), ([], [])]
    evaluator = Evaluator(policy(*rules), COLUMNS)
    assert evaluator.rejects(rows) == expected
    table = pa.Table.from_pylist(rows, pa.schema([(c.name, c.type) for c in COLUMNS]))
    assert evaluator.judge(table, rules)[0] == expected
