"""Ratio rules: what they say of two scores, and which video is a generation's input."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pytest
import typer.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import scene, write_video
from tests.pipeline.lakes import config, rows
from winnow.operators.errors import ConfigError
from winnow.operators.operator import Column
from winnow.operators.settings import validate
from winnow.pipeline.cli import app
from winnow.pipeline.input_clips import find_input_clips, normal_path
from winnow.pipeline.lake import Lake
from winnow.pipeline.policy import Evaluator, Policy, Rule, load_policy
from winnow.pipeline.policy_diff import diff_policies
from winnow.pipeline.policy_tune import as_text, tune
from winnow.pipeline.ratios import ABSENT, AMBIGUOUS, divide
from winnow.pipeline.refilter import refilter
from winnow.pipeline.run import run

COLUMNS = (
    Column("q_overall", pa.float64(), "score"),
    Column("q_small", pa.float32(), "score"),
    Column("q_label", pa.string(), "label"),
)
LOST = {"column": "motion_mean", "below": 0.5}


def rule(name="lost", when=None, **ratio) -> Rule:
    return Rule(name=name, ratio={"column": "q_overall", **ratio}, when=when)


def policy(*rules: Rule) -> Policy:
    return Policy(name="p", rules=rules)


def judge(rules, scores, inputs):
    """For each clip "reject", "error" or "keep"."""
    table = pa.table({
        "q_overall": pa.array(scores, pa.float64()), "q_small": pa.array(scores, pa.float32()),
        "q_label": pa.array([None] * len(scores), pa.string()),
        "input_uri": pa.array([None if at == ABSENT else "i.mp4" for at in inputs], pa.string()),
    })  # fmt: skip
    evaluator = Evaluator(policy(*rules), COLUMNS)
    judged, _ = evaluator.judge(table, rules, np.array(inputs, np.int64))
    return ["reject" if no else "error" if unknown else "keep" for no, unknown in judged]


# ------------------------------------------------------------------------------------- two scores


def said(ours, theirs, **ratio):
    """What a rule says of a clip whose score is `ours` and its input's `theirs`."""
    return judge([rule(**ratio)], [ours, theirs], [1, ABSENT])[0]


def test_the_score_is_divided_by_the_inputs():
    assert said(0.2, 1.0, below=0.3) == "reject"
    assert said(0.2, 0.5, below=0.3) == "keep"
    assert said(2.0, 0.5, above=3) == "reject"
    assert said(2.0, 0.5, below=0.3, above=5) == "keep"
    assert said(0.3, 1.0, below=0.3) == "keep", "a tie stays"
    assert said(3.0, 1.0, above=3) == "keep"


@pytest.mark.parametrize("score", [None, math.nan, math.inf, -math.inf, -0.5])
@pytest.mark.parametrize("absent", ["error", "pass"])
def test_what_is_no_score_cannot_be_judged(score, absent):
    for pair in ((score, 1.0), (1.0, score), (score, score)):
        for side in ({"below": 0.5}, {"above": 2}):
            assert said(*pair, **side, absent=absent) == "error", pair


def test_an_input_of_zero_is_exceeded_by_everything_and_equalled_by_zero():
    assert said(0.1, 0.0, below=0.3) == "keep"
    assert said(0.1, 0.0, above=1000) == "reject"
    assert said(5e-324, -0.0, above=1000) == "reject"
    for ratio in ({"below": 0.9}, {"above": 1.1}, {"below": 1, "above": 1}):
        assert said(0.0, 0.0, **ratio) == "keep", "equal scores have the ratio 1"
    assert said(0.0, 0.0, below=1.2) == said(0.7, 0.7, below=1.2) == "reject"


def test_without_an_input_the_rule_says_what_it_is_told_to():
    inputs = [ABSENT, AMBIGUOUS, 3, ABSENT]
    scores = [1.0, 1.0, 1.0, 1.0]
    assert judge([rule(below=0.5)], scores, inputs) == ["error", "error", "keep", "error"]
    assert judge([rule(below=0.5, absent="pass")], scores, inputs) == [
        "keep", "error", "keep", "keep"
    ]  # fmt: skip
    when = rule(below=0.5, when="input_uri IS NOT NULL")
    assert judge([when], scores, inputs) == ["keep", "error", "keep", "keep"]
    assert judge([rule(below=0.5, absent="pass")], [None], [ABSENT]) == ["keep"]


def test_rules_beside_it_name_columns_as_always():
    rules = [rule("low", below=0.5), rule("small", column="q_small", above=1.5),
             Rule(name="poor", reject="q_overall < 0.2"),
             Rule(name="worst", percentile={"column": "q_overall", "below": 10, "least": 2})]  # fmt: skip
    table = pa.table({
        "q_overall": [0.1, 0.3, 1.0, 1.0], "q_small": pa.array([1.0, 2.0, 1.0, 1.0], pa.float32())
    })  # fmt: skip
    judged, _ = Evaluator(policy(*rules), COLUMNS).judge(table, rules, np.array([2, 2, 3, -1]))
    assert judged == [(["low", "poor", "worst"], []), (["low", "small"], []), ([], []),
                      ([], ["low", "small"])]  # fmt: skip


SCORES = st.one_of(
    st.none(), st.floats(allow_subnormal=True), st.floats(0, 10), st.sampled_from([0.0, -0.0, 1.0])
)


def in_python(ours, theirs, below, above):
    """The same in so many words: the ratio, and the answer."""
    for score in (ours, theirs):
        if score is None or not math.isfinite(score) or score < 0:
            return math.nan, "error"
    ratio = (1.0 if ours == 0 else math.inf) if theirs == 0 else ours / theirs
    beyond = (below is not None and ratio < below) or (above is not None and ratio > above)
    return ratio, "reject" if beyond else "keep"


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=8),
    st.floats(0, 5, exclude_min=True),
    st.one_of(st.none(), st.floats(0, 5)),
)
def test_the_arithmetic_is_that_of_python(pairs, below, more):
    above = None if more is None else below + more
    scores = [score for pair in pairs for score in pair]
    inputs = [at + 1 if at % 2 == 0 else ABSENT for at in range(len(scores))]
    expected = [in_python(*pair, below, above) for pair in pairs]
    found = judge([rule(below=below, above=above)], scores, inputs)[::2]
    assert found == [answer for _, answer in expected]
    numbers = np.array([math.nan if s is None else s for s in scores], np.float64)
    np.testing.assert_array_equal(
        divide(numbers, np.array(inputs))[::2], [ratio for ratio, _ in expected]
    )


# ----------------------------------------------------------------------------------- the rule's text


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ({"column": "q_overal", "below": 5}, ["q_overal", "did you mean 'q_overall'"]),
        ({"column": "q_label", "below": 5}, ["q_label", "numbers"]),
        ({"column": 'q_overall" FROM clips; --', "below": 5}, ["writes the column"]),
    ],
)
def test_columns_are_checked_before_anything_runs(ratio, words):
    with pytest.raises(ConfigError) as error:
        Evaluator(policy(Rule(name="lost", ratio=ratio)), COLUMNS)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"ratio": {"column": "x"}}, "`below`, `above`, or both"),
        ({"ratio": {"column": "x", "below": 2, "above": 1}}, "every ratio"),
        ({"ratio": {"column": "x", "below": 0}}, "greater than 0"),
        ({"ratio": {"column": "x", "above": math.inf}}, "finite"),
        ({"ratio": {"column": "x", "below": 1, "to": "control"}}, "input"),
        ({"ratio": {"column": "x", "below": 1}, "reject": "x < 1"}, "either"),
        ({"ratio": {"column": "x", "below": 1}, "percentile": {"column": "x", "below": 5}}, "either"),
        ({}, "or a `ratio`"),
    ],
)  # fmt: skip
def test_a_rule_says_one_thing(content, words):
    with pytest.raises(ConfigError, match=words):
        validate(Policy, {"name": "p", "rules": [{"name": "poor", **content}]}, "p.yaml")


def test_a_policy_survives_the_runs_table_and_is_said_in_words():
    made = policy(rule(below=0.3, above=2), Rule(name="a", reject="x"))
    assert Policy.model_validate_json(made.model_dump_json()) == made
    assert made.needs_population
    assert made.needs_inputs
    assert made.rules[0].predicate == (
        "q_overall below 0.3 times or above 2 times that of the input video"
    )


def test_the_rules_of_older_lakes_keep_their_hash():
    # As of the lakes before there were ratios: the hash tells which rules made stored verdicts.
    written = json.loads(policy(Rule(name="a", reject="x > 1")).model_dump_json())
    assert sorted(written["rules"][0]) == ["name", "percentile", "reason", "reject", "when"]


def test_inside_a_run_the_rule_is_open_and_the_others_decide():
    evaluator = Evaluator(policy(rule(below=1), Rule(name="low", reject="q_overall < 1")), COLUMNS)
    assert evaluator.rejects([{"q_overall": 0.0}, {"q_overall": 2.0}]) == [(["low"], []), ([], [])]


# ---------------------------------------------------------------------------------- whose input it is


def paired(sources, clips):
    """By uri and start of each clip, of what uri and start its counterpart is; and all that is said.

    `sources` are (uri, content, input), `clips` (uri, start, end).
    """
    import duckdb

    connection = duckdb.connect()
    connection.register("s", pa.table({
        "attempt_id": [f"a{n}" for n in range(len(sources))],
        "uri": [s[0] for s in sources], "source_id": [s[1] for s in sources],
        "input_uri": pa.array([s[2] for s in sources], pa.string()),
    }))  # fmt: skip
    at = {s[0]: n for n, s in enumerate(sources)}
    table = pa.table({
        "_attempt": [f"a{at[c[0]]}" for c in clips],
        "_start": [float(c[1]) for c in clips], "_end": [float(c[2]) for c in clips],
    })  # fmt: skip
    found = find_input_clips(connection, table, "s")
    names = {ABSENT: "absent", AMBIGUOUS: "ambiguous"}
    return {
        clip[:2]: names.get(row) or clips[row][:2]
        for clip, row in zip(clips, found.row.tolist(), strict=True)
    }, found


def input_of(named, *others, own="/out/gen.mp4"):
    """The uri of a generation's input, the sources beside it given as uri or (uri, content)."""
    known = [(o, f"content of {o}") if isinstance(o, str) else o for o in others]
    sources = [(own, "own", named), *((uri, content, None) for uri, content in known)]
    clips = [(uri, 0, 5) for uri, content, _ in sources]
    found, _ = paired(sources, clips)
    place = found[(own, 0)]
    return place if isinstance(place, str) else place[0]


@pytest.mark.parametrize(
    ("named", "others", "expected"),
    [
        ("/data/in.mp4", ["/data/in.mp4", "/x/data/in.mp4"], "/data/in.mp4"),
        ("/data/in.mp4", ["/x/data/in.mp4"], "absent"),
        ("/data/../data/./in.mp4", ["/data/in.mp4"], "/data/in.mp4"),
        ("file:///data/in.mp4", ["/data/in.mp4"], "/data/in.mp4"),
        ("s3://b/in.mp4", ["s3://b/in.mp4", "s3://c/in.mp4"], "s3://b/in.mp4"),
        ("s3://b/a//in.mp4", ["s3://b/a//in.mp4"], "s3://b/a//in.mp4"),
        # From the generation's folder, before the same ending elsewhere.
        ("in.mp4", ["/out/in.mp4", "/x/in.mp4"], "/out/in.mp4"),
        ("./in.mp4", ["/out/in.mp4", "/x/in.mp4"], "/out/in.mp4"),
        ("../in.mp4", ["/in.mp4", "/out/in.mp4"], "/in.mp4"),
        ("../../in.mp4", ["/x/in.mp4"], "/x/in.mp4"),
        # By its whole path, at a boundary.
        ("assets/in.mp4", ["/x/assets/in.mp4", "/x/in.mp4"], "/x/assets/in.mp4"),
        ("assets/in.mp4", ["s3://b/assets/in.mp4"], "s3://b/assets/in.mp4"),
        ("../assets//in.mp4", ["/x/assets/in.mp4"], "/x/assets/in.mp4"),
        ("assets/in.mp4", ["/x/other/in.mp4"], "absent"),
        ("assets/in.mp4", ["/x/myassets/in.mp4"], "absent"),
        ("in.mp4", ["/x/begin.mp4"], "absent"),
        ("a'b \"c\"/100% ü.mp4", ["/x/a'b \"c\"/100% ü.mp4"], "/x/a'b \"c\"/100% ü.mp4"),
        # Several.
        ("in.mp4", ["/x/in.mp4", "/y/in.mp4"], "ambiguous"),
        ("in.mp4", [("/x/in.mp4", "same"), ("/y/in.mp4", "same")], "/x/in.mp4"),
        ("/in.mp4", [("/in.mp4", "old"), ("/in.mp4", "new")], "ambiguous"),
        # Not itself.
        ("gen.mp4", [], "absent"),
        ("gen.mp4", ["/x/gen.mp4"], "/x/gen.mp4"),
        ("gen.mp4", ["/x/gen.mp4", "/y/gen.mp4"], "ambiguous"),
        ("in.mp4", [("/x/in.mp4", "own")], "absent"),
        (".", ["/x/in.mp4"], "absent"),
        ("..", ["/x/in.mp4"], "absent"),
        (None, ["/x/in.mp4"], "absent"),
    ],
)  # fmt: skip
def test_the_input_is_found_by_its_address(named, others, expected):
    assert input_of(named, *others) == expected


def test_a_generation_in_a_bucket_may_name_its_neighbour():
    own = "s3://b/out/gen.mp4"
    assert input_of("../in/a.mp4", "s3://b/in/a.mp4", "/in/a.mp4", own=own) == "s3://b/in/a.mp4"


@pytest.mark.parametrize(
    ("path", "normal"),
    [("a/./b", "a/b"), ("a/../../b", "../b"), ("//a", "/a"), ("/../a", "/a"), ("a//b/", "a/b"),
     ("s3://b/../a", "s3://b/../a"), ("file:///a/./b", "/a/b"), ("/", "/")],
)  # fmt: skip
def test_a_path_in_its_plain_form(path, normal):
    assert normal_path(path) == normal


def test_the_counterpart_has_most_time_in_common():
    sources = [("/g", "g", "/i"), ("/i", "i", None)]
    inputs = [("/i", 0, 4), ("/i", 4, 8), ("/i", 20, 30)]
    ours = [("/g", 0, 5), ("/g", 3.5, 5), ("/g", 8, 20), ("/g", 2, 6), ("/g", 25, 26)]
    found, what = paired(sources, [*ours, *inputs])
    assert [found[c[:2]] for c in ours] == [("/i", 0), ("/i", 4), "absent", ("/i", 0), ("/i", 20)]
    assert (what.paired, what.without, what.not_found, what.no_overlap) == (4, 3, 0, 1)


def test_what_could_not_be_compared_is_counted_with_an_example():
    sources = [("/z/g", "1", "in.mp4"), ("/a/g", "2", "in.mp4"), ("/t", "3", None),
               ("/n", "4", "image.png"), ("/x/in.mp4", "5", None), ("/y/in.mp4", "6", None)]  # fmt: skip
    _, found = paired(sources, [(uri, 0, 1) for uri, *_ in sources])
    assert (found.paired, found.without, found.not_found, found.ambiguous) == (0, 3, 1, 2)
    assert found.example == ("/a/g", "in.mp4", ("/x/in.mp4", "/y/in.mp4"))
    assert "/a/g, whose input in.mp4 fits /x/in.mp4 and /y/in.mp4" in str(found)
    assert "2 several could be it" in str(found)


def test_an_input_without_clips_is_absent():
    sources = [("/g", "g", "/i"), ("/i", "i", None)]
    found, what = paired(sources, [("/g", 0, 5)])
    assert found == {("/g", 0): "absent"}
    assert what.not_found == 1


def test_many_of_one_name_are_matched_at_once():
    count = 20_000
    sources = [(f"/in/{n}/robot.mp4", f"i{n}", None) for n in range(count)]
    sources += [(f"/out/{n}.mp4", f"o{n}", f"{n}/robot.mp4") for n in range(count)]
    found, what = paired(sources, [(uri, 0, 5) for uri, *_ in sources])
    assert what.paired == count
    assert found[("/out/777.mp4", 0)] == ("/in/777/robot.mp4", 0)


# --------------------------------------------------------------------------------------- whole lakes


@pytest.fixture(scope="module")
def transfers(tmp_path_factory):
    """Two inputs, and generations after them: alike, nearly still, of an image, of one not there."""
    folder = tmp_path_factory.mktemp("transfers")
    moving = [scene(1, 60), scene(4, 60)]
    for name, images in zip("ab", moving, strict=True):
        write_video(folder / "assets" / f"{name}.mp4", images)
    shutil.copy2(folder / "assets" / "a.mp4", folder / "assets" / "z copy of a.mp4")

    def generation(name, images, asset):
        write_video(folder / "out" / f"{name}.mp4", images)
        sidecar = {"name": name, "prompt": name, "video_path": asset, "edge": {}}
        (folder / "out" / f"{name}.json").write_text(json.dumps(sidecar))
        (folder / "out" / f"{name}.txt").write_text(name)

    alike = [np.clip(i.astype(int) + 9, 0, 255).astype(np.uint8) for i in moving[0]]
    slow = [moving[1][n // 12] for n in range(60)]
    generation("alike", alike, "assets/a.mp4")
    generation("slow", slow, "assets/b.mp4")
    generation("of a copy", alike[:50], "assets/z copy of a.mp4")
    generation("of an image", alike[5:], "assets/still.png")
    return folder


RULES = """name: compared
rules:
  - name: lost_motion
    ratio: {column: motion_mean, to: input, below: 0.5}
    when: input_uri IS NOT NULL
    reason: hardly any of the input's motion is left
"""


@pytest.fixture(scope="module")
def compared(transfers, tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "compared.yaml"
    path.write_text(RULES)
    own = Lake(str(tmp_path_factory.mktemp("compared") / "lake"))
    result = run(config(f"policy={path}", "stages.dedup.threshold=1.0"), str(transfers), own)
    assert result.ledger.balanced
    return own, path


def verdicts(lake):
    return dict(rows(lake, "SELECT parse_filename(uri), (verdict, reasons) FROM clips_decided"))


def test_a_run_ends_with_its_ratios_and_refilter_agrees(compared):
    lake, path = compared
    found = verdicts(lake)
    motion = dict(rows(lake, "SELECT parse_filename(uri), motion_mean FROM clips_decided"))
    assert motion["slow.mp4"] < 0.5 * motion["b.mp4"], "what the test stands on"
    assert {name: verdict for name, (verdict, _) in found.items()} == {
        "a.mp4": "keep", "b.mp4": "keep", "alike.mp4": "keep", "slow.mp4": "reject",
        "of a copy.mp4": "keep", "of an image.mp4": "error",
    }  # fmt: skip
    assert found["slow.mp4"][1] == found["of an image.mp4"][1] == ["lost_motion"]
    again = refilter(lake, load_policy(str(path)), dry_run=True)
    assert again.changed == 0
    assert (again.inputs.paired, again.inputs.without, again.inputs.not_found) == (3, 2, 1)


def test_the_verdicts_are_those_of_dividing_by_hand(compared):
    lake, _ = compared
    motion = dict(rows(lake, "SELECT parse_filename(uri), motion_mean FROM clips_decided"))
    pairs = {"alike.mp4": "a.mp4", "slow.mp4": "b.mp4", "of a copy.mp4": "a.mp4"}
    for limit in (0.1, 0.3, 0.9, 1.0, 1.1):
        made = policy(Rule(name="lost", ratio={"column": "motion_mean", "below": limit},
                           when="input_uri IS NOT NULL"))  # fmt: skip
        rejected = refilter(lake, made, dry_run=True).counts.get("reject", 0)
        assert rejected == sum(motion[g] / motion[i] < limit for g, i in pairs.items())


def test_the_command_says_what_it_compared(compared):
    lake, path = compared
    command = ["refilter", "--lake", lake.uri, "--policy", str(path), "--dry-run"]
    invoke = typer.testing.CliRunner().invoke
    said = invoke(app, command)
    assert said.exit_code == 0
    assert "compared with their input video: 3 clips" in said.stdout.replace("\n", " ")
    told = json.loads(invoke(app, [*command, "--json"]).stdout)
    assert told["inputs"]["not_found"] == 1


def test_policies_that_differ_by_a_ratio_are_compared(compared, tmp_path):
    lake, _ = compared
    other = tmp_path / "other.yaml"
    other.write_text(RULES.replace("compared", "other").replace("below: 0.5", "below: 0.00001"))
    found = diff_policies(lake, "compared", str(other))
    assert found.matrix["reject"] == {"keep": 1}
    assert found.examples[0].scores.keys() == {"motion_mean", "input_uri"}


def test_tune_proposes_the_ratio_that_divides_the_labels(compared):
    lake, path = compared
    ids = dict(rows(lake, "SELECT parse_filename(uri), clip_id FROM clips_decided"))
    motion = dict(rows(lake, "SELECT parse_filename(uri), motion_mean FROM clips_decided"))
    labels = {ids["slow.mp4"]: False, ids["alike.mp4"]: True, ids["of a copy.mp4"]: True}
    found = tune(lake, load_policy(str(path)), labels, 1.0)
    (threshold,) = found.thresholds
    low = motion["slow.mp4"] / motion["b.mp4"]
    high = min(motion["alike.mp4"], motion["of a copy.mp4"]) / motion["a.mp4"]
    assert low < threshold.then < high
    assert (threshold.now, threshold.labelled, threshold.of_input) == (0.5, 3, True)
    assert (threshold.scored.precision, threshold.scored.recall) == (1, 1)
    assert found.rules["lost_motion"].precision == 1
    assert "motion_mean / the input's < " in as_text(found)


def test_tune_bears_inputs_of_score_zero(compared):
    # `frozen_ratio` of a moving input is 0: the ratio of a still generation is infinite.
    lake, _ = compared
    ids = dict(rows(lake, "SELECT parse_filename(uri), clip_id FROM clips_decided"))
    assert rows(lake, "SELECT frozen_ratio FROM clips_decided WHERE uri LIKE '%/b.mp4'") == [(0.0,)]
    made = policy(Rule(name="stuck", ratio={"column": "frozen_ratio", "above": 9}))
    labels = {ids["slow.mp4"]: False, ids["alike.mp4"]: True, ids["of a copy.mp4"]: True}
    (threshold,) = tune(lake, made, labels, 1.0).thresholds
    assert 1 < threshold.then < 9
    assert (threshold.scored.bad_rejected, threshold.scored.good_kept) == (1, 2)


def test_an_input_that_another_content_fits_as_well_is_not_judged(compared, transfers, tmp_path):
    lake, path = compared
    own = Lake(str(tmp_path / "own"))
    shutil.copytree(lake.uri, own.uri)
    more = tmp_path / "more" / "assets"
    write_video(more / "b.mp4", scene(9, 60))
    run(config("policy=generated"), str(more.parent), own)
    found = refilter(own, load_policy(str(path)))
    assert found.inputs.ambiguous == 1
    assert found.inputs.example[1] == "assets/b.mp4"
    assert verdicts(own)["slow.mp4"] == ("error", ["lost_motion"])


def test_a_predicate_may_read_the_input_in_a_run_and_afterwards(transfers, tmp_path):
    path = tmp_path / "named.yaml"
    path.write_text(
        "name: named\nrules:\n- {name: of_b, reject: \"input_uri = 'assets/b.mp4'\", "
        "when: input_uri IS NOT NULL}\n"
    )
    own = Lake(str(tmp_path / "lake"))
    run(config(f"policy={path}", "stages.dedup.threshold=1.0"), str(transfers), own)
    found = verdicts(own)
    assert [name for name, (verdict, _) in found.items() if verdict == "reject"] == ["slow.mp4"]
    assert refilter(own, load_policy(str(path)), dry_run=True).changed == 0
