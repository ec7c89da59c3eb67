"""Rules over map columns: a run (rows as parameters) and refilter (an Arrow table) must agree."""

import pyarrow as pa
import pytest

from winnow.operators.operator import Column
from winnow.pipeline.lake import Lake
from winnow.pipeline.policy import Evaluator, Policy, Rule
from winnow.pipeline.views import connect
from winnow.pipeline.worker import verdict

COLUMNS = (
    Column("q_votes", pa.map_(pa.string(), pa.float32()), "votes"),
    Column("q_classes", pa.map_(pa.string(), pa.string()), "classes"),
    Column("q_flags", pa.list_(pa.string()), "flags"),
)
MORPHING = Rule(name="morphing", reject="q_votes['morphing'] > 0.5")
DRAWN = Rule(name="drawn", reject="q_classes['style'] = 'drawn'")
ANY = Rule(name="any", reject="len(map_keys(q_votes)) > 1 AND list_max(map_values(q_votes)) >= 0.4")

CELLS = {
    "high": {"q_votes": [("morphing", 0.75), ("limbs", 0.4)], "q_classes": [("style", "drawn")]},
    "low": {"q_votes": [("limbs", 1.0), ("morphing", 1 / 3)], "q_classes": [("style", "x\"'y")]},
    "dict": {"q_votes": {"morphing": 1.0}, "q_classes": {"style": "photographic"}},
    "null value": {"q_votes": [("morphing", None)], "q_classes": [("style", None)]},
    "missing key": {"q_votes": [("limbs", 1.0)], "q_classes": [("camera", "drawn")]},
    "empty": {"q_votes": [], "q_classes": []},
    "null": {"q_votes": None, "q_classes": None},
}


def evaluator(*rules: Rule) -> Evaluator:
    return Evaluator(Policy(name="p", rules=rules), COLUMNS)


def table(rows) -> pa.Table:
    schema = pa.schema([(column.name, column.type) for column in COLUMNS])
    return pa.Table.from_pylist([{"q_flags": None} | row for row in rows], schema=schema)


def judged(rules, data):
    answers = evaluator(*rules).judge(data, rules)
    return answers[0] if isinstance(answers, tuple) else answers


@pytest.mark.parametrize("cells", CELLS.values(), ids=CELLS)
def test_a_map_is_judged_alike_in_a_run_and_in_a_table(cells):
    rules = (MORPHING, DRAWN, ANY)
    assert evaluator(*rules).rejects([cells]) == judged(rules, table([cells]))


def test_values_of_a_map_decide():
    rules = (MORPHING, DRAWN)
    assert evaluator(*rules).rejects([CELLS["high"], CELLS["low"], CELLS["dict"]]) == [
        (["morphing", "drawn"], []), ([], []), (["morphing"], []),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["null value", "missing key", "empty", "null"])
def test_without_the_key_a_rule_cannot_judge_and_the_verdict_is_error(name):
    (answer,) = evaluator(MORPHING).rejects([CELLS[name]])
    assert answer == ([], ["morphing"])
    assert verdict(*answer, None, None, None).verdict == "error"
    assert judged((MORPHING,), table([CELLS[name]])) == [answer]


def test_the_lake_gives_a_map_back_as_the_run_had_it(tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    lake.create(COLUMNS)
    lake.append("clips", [{"clip_id": name, **cells} for name, cells in CELLS.items()])
    lake.create(COLUMNS)  # a later run finds the columns that it would make
    with connect(lake) as connection:
        stored = connection.sql("SELECT * FROM raw_clips ORDER BY clip_id").to_arrow_table()
    rules = (MORPHING, DRAWN, ANY)
    in_run = evaluator(*rules).rejects([CELLS[name] for name in sorted(CELLS)])
    assert judged(rules, stored) == in_run
    assert in_run[sorted(CELLS).index("high")] == (["morphing", "drawn", "any"], [])
