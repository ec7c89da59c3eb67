"""What two policies decide differently, from stored verdicts and from files."""

from __future__ import annotations

import json

import pytest

from tests.pipeline.lakes import rows
from winnow.operators.errors import ConfigError
from winnow.pipeline.policy import Policy, Rule, load_policy
from winnow.pipeline.policy_diff import as_text, diff_policies
from winnow.pipeline.refilter import refilter

LONG = "name: long\nrules: [{name: long, reject: duration_s > 1}]\n"


@pytest.fixture
def long(tmp_path):
    path = tmp_path / "long.yaml"
    path.write_text(LONG)
    return str(path)


def test_a_policy_does_not_differ_from_itself(lake):
    found = diff_policies(lake, "generated", "generated")
    assert (found.clips, found.changed, found.other_reasons) == (6, 0, 0)
    assert found.rules == found.examples == []


def test_the_matrix_adds_up_and_reasons_are_counted(lake, long):
    found = diff_policies(lake, "generated", long)
    stored = dict(rows(lake, "SELECT verdict, count(*) FROM verdicts GROUP BY 1"))
    assert {k: sum(row.values()) for k, row in found.matrix.items()} == stored
    by_rule = {r.rule: r for r in found.rules}
    assert (
        by_rule["long"].removes == by_rule["long"].removes_alone == found.matrix["keep"]["reject"]
    )
    admitted = sum(row.get("keep", 0) for verdict, row in found.matrix.items() if verdict != "keep")
    assert sum(r.admits_alone for r in found.rules) <= admitted
    assert by_rule["too_short"].admits == 1


def test_files_are_applied_without_writing(lake, long):
    before = rows(lake, "SELECT count(*) FROM raw_verdicts")
    assert not diff_policies(lake, long, long).changed
    assert rows(lake, "SELECT count(*) FROM raw_verdicts") == before


def test_stored_and_applied_now_are_the_same(own_lake, long):
    refilter(own_lake, load_policy(long))
    stored, applied = (
        diff_policies(own_lake, "generated", "long"),
        diff_policies(own_lake, "generated", long),
    )
    assert stored.b.stored
    assert not applied.b.stored
    assert stored.matrix == applied.matrix
    assert stored.rules == applied.rules


def test_examples_show_the_scores_that_the_rules_read(lake, long):
    found = diff_policies(lake, "generated", long, examples=1)
    kinds = [(e.before, e.after) for e in found.examples]
    assert len(kinds) == len(set(kinds))
    (left,) = [e for e in found.examples if e.before == "keep"]
    assert list(left.scores) == ["duration_s"]
    assert left.scores["duration_s"] > 1
    assert left.uri.endswith(".mp4")
    assert left.uri in as_text(found)


def test_stored_verdicts_of_unknown_rules_say_so(own_lake):
    refilter(own_lake, Policy(name="gone", rules=(Rule(name="r", reject="width > 1"),)))
    found = diff_policies(own_lake, "generated", "gone")
    assert found.b.rules is None
    assert "the rules behind the stored verdicts of gone" in as_text(found)
    json.dumps(found.as_dict())


def test_clips_that_one_policy_has_not_seen_are_named(own_lake):
    table = own_lake.open("verdicts")
    refilter(own_lake, Policy(name="part", rules=(Rule(name="r", reject="false"),)))
    table = own_lake.open("verdicts")
    one = rows(own_lake, "SELECT min(clip_id) FROM clips")[0][0]
    table.delete(f"policy = 'part' AND clip_id = '{one}'")
    found = diff_policies(own_lake, "generated", "part")
    assert (found.a.clips, found.b.clips, found.clips) == (6, 5, 5)
    assert "only the 5 that both have" in as_text(found)


def test_a_name_of_nothing_is_refused_with_what_there_is(lake):
    with pytest.raises(ConfigError, match="it has: generated"):
        diff_policies(lake, "generated", "nosuch")
