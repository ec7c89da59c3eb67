"""Policy predicates against whatever people and strangers write in them."""

import contextlib
import math
import string
import time

import duckdb
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from winnow.operators.errors import ConfigError
from winnow.operators.operator import Column
from winnow.pipeline.policy import Evaluator, Policy, Rule, predicate_columns, sandboxed
from winnow.pipeline.predicates import FUNCTIONS

KEYWORDS = (
    "select",
    "order",
    "group",
    "limit",
    "user",
    "end",
    "null_",
    "table",
    "from",
    "two words",
)
NUMBERS = ("motion", "sharpness", "select", "order", "two words")
TEXTS = ("prompt", "label", "table")
FLAGS = ("borders", "end")
COLUMNS = [
    *(Column(name, pa.float64(), "a score") for name in NUMBERS),
    *(Column(name, pa.string(), "a text") for name in TEXTS if name != "prompt"),
    *(Column(name, pa.bool_(), "a flag") for name in FLAGS),
    Column("shots", pa.int32(), "a count"),
    Column("line_s", pa.list_(pa.float64()), "a list"),
]
ALL = {column.name for column in COLUMNS} | {"prompt"}

quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def policy(*rejects: str, when: str | None = None) -> Policy:
    rules = tuple(Rule(name=f"r{n}", reject=text, when=when) for n, text in enumerate(rejects))
    return Policy(name="p", rules=rules)


def evaluator(*rejects: str, when: str | None = None) -> Evaluator:
    return Evaluator(policy(*rejects, when=when), COLUMNS)


# Values: what a score, a text and a flag may be.
numbers = st.one_of(
    st.none(),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1.7e308, 0.5]),
    st.floats(allow_nan=True, allow_infinity=True),
)
# A NUL and a lone surrogate are no text of DuckDB or Arrow.
texts = st.one_of(
    st.none(),
    st.sampled_from(["", "'", '"', "''", "%", "\\", "NULL", "'; DROP TABLE clips; --", "é", " "]),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12),
)
flags = st.sampled_from([None, True, False])
rows = st.fixed_dictionaries(
    dict.fromkeys(NUMBERS, numbers)
    | dict.fromkeys(TEXTS, texts)
    | dict.fromkeys(FLAGS, flags)
    | {"shots": st.one_of(st.none(), st.integers(-(2**31), 2**31 - 1))}
    | {"line_s": st.one_of(st.none(), st.lists(numbers, max_size=3))}
)


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


number_terms = st.one_of(
    st.sampled_from([quoted(name) for name in NUMBERS]),
    st.sampled_from([
        "0", "-1.5", "1e308", "'nan'::DOUBLE", "'inf'::DOUBLE", "'-inf'::DOUBLE", "NULL",
        "shots", "len(prompt)", "list_max(line_s)", "line_s[1]", "abs(motion)",
        "greatest(motion, sharpness)", "coalesce(motion, 0)",
    ]),
    st.floats(allow_nan=False, allow_infinity=False, width=16).map(repr),
)  # fmt: skip
text_terms = st.one_of(
    st.sampled_from([quoted(name) for name in TEXTS]),
    texts.map(lambda text: "NULL" if text is None else literal(text)),
)
plain_predicates = st.one_of(
    st.builds(
        "{} {} {}".format,
        number_terms,
        st.sampled_from(["<", "<=", ">", ">=", "=", "<>", "IS DISTINCT FROM"]),
        number_terms,
    ),
    st.builds("{} BETWEEN {} AND {}".format, number_terms, number_terms, number_terms),
    st.builds("{} IN ({}, {})".format, number_terms, number_terms, number_terms),
    st.builds("{} IS NULL".format, st.one_of(number_terms, text_terms)),
    st.builds("isnan({})".format, st.sampled_from([quoted(name) for name in NUMBERS])),
    st.builds(
        "{} {} {}".format, text_terms, st.sampled_from(["=", "<>", "<", "^@"]), text_terms
    ),
    st.builds("contains(prompt, {})".format, text_terms),
    st.builds("prompt LIKE {}".format, st.sampled_from(["''", "'%'", "'a_%'", "'%''%'"])),
    st.sampled_from([quoted(name) for name in FLAGS]),
    st.sampled_from(["true", "false", "NULL::BOOLEAN"]),
)  # fmt: skip
predicates = st.recursive(
    plain_predicates,
    lambda inner: st.one_of(
        st.builds("({}) AND ({})".format, inner, inner),
        st.builds("({}) OR ({})".format, inner, inner),
        st.builds("NOT ({})".format, inner),
        st.builds("CASE WHEN {} THEN {} ELSE {} END".format, inner, inner, inner),
        st.builds("coalesce({}, {})".format, inner, inner),
    ),
    max_leaves=4,
)


def table(clips: list[dict]) -> pa.Table:
    source = [
        ("fps", pa.float64()), ("width", pa.int32()), ("height", pa.int32()),
        ("variable_frame_rate", pa.bool_()), ("prompt", pa.string()), ("generator", pa.string()),
    ]  # fmt: skip
    schema = pa.schema([*source, *((c.name, c.type) for c in COLUMNS)])
    return pa.Table.from_pylist(clips, schema=schema)


@given(
    rejects=st.lists(predicates, min_size=1, max_size=3),
    when=st.one_of(st.none(), predicates),
    clips=st.lists(rows, min_size=1, max_size=6),
)
@quick
def test_a_run_and_refilter_say_the_same_of_every_clip(rejects, when, clips):
    judging = evaluator(*rejects, when=when)

    in_run = judging.rejects(clips)
    in_refilter, _ = judging.judge(table(clips), judging.policy.rules)

    assert in_run == in_refilter


@given(rejects=predicates, when=st.one_of(st.none(), predicates), clip=rows)
@quick
def test_a_rule_is_the_three_valued_truth_of_its_predicates(rejects, when, clip):
    with sandboxed() as connection:
        connection.register("clips", table([clip]))
        selected = f"SELECT ({rejects}), ({when or 'true'}) FROM clips"
        reject, applies = connection.execute(selected).fetchall()[0]

    ((rejecting, unable),) = evaluator(rejects, when=when).rejects([clip])

    expected = None if applies is None else (reject if applies else False)
    assert (rejecting == ["r0"]) == (expected is True)
    assert (unable == ["r0"]) == (expected is None)


@given(clip=rows, others=st.lists(rows, max_size=4), predicate=predicates)
@quick
def test_a_clip_is_judged_by_itself_whatever_stands_beside_it(clip, others, predicate):
    judging = evaluator(predicate)

    alone, _ = judging.judge(table([clip]), judging.policy.rules)
    among, _ = judging.judge(table([*others, clip]), judging.policy.rules)

    assert among[-1] == alone[0]


@pytest.mark.parametrize(
    ("score", "outcome"),
    [
        (None, ([], ["r0"])),
        (math.inf, ([], [])),
        (-math.inf, (["r0"], [])),
        # DuckDB orders NaN above every number: not below a threshold, and above any.
        (math.nan, ([], [])),
    ],
)
def test_what_is_no_number_is_below_no_threshold(score, outcome):
    judging = evaluator("motion < 0.5")

    assert judging.rejects([{"motion": score}]) == [outcome]
    assert judging.judge(table([{"motion": score}]), judging.policy.rules)[0] == [outcome]


@pytest.mark.parametrize("empty", ["", " ", "\n", "\t\n "])
def test_an_empty_predicate_is_refused(empty):
    with pytest.raises(ConfigError, match="empty"):
        evaluator(empty)


@given(name=st.text(string.ascii_letters + string.digits + "_ '\"éß", min_size=1, max_size=12))
@example("select")
@example("rowid")
@example("_row")
@example("measured")
@example("clips")
@example("row")
@example('a"b')
@quick
def test_a_column_that_nobody_writes_is_refused_however_it_is_called(name):
    assume(name.lower() not in {column.lower() for column in ALL})
    assume(name.lower() not in {"fps", "width", "height", "variable_frame_rate", "generator"})

    with pytest.raises(ConfigError, match="no stage or operator writes the column"):
        evaluator(f"{quoted(name)} IS NULL")


@given(
    name=st.one_of(
        st.sampled_from(KEYWORDS),
        st.text(string.ascii_lowercase + " _.'\";-()", min_size=1, max_size=10),
    ),
    score=numbers,
)
@quick
def test_a_column_may_be_called_by_a_keyword_or_hold_a_quote(name, score):
    assume('"' not in name)  # Evaluator.rejects does not double a quote in a column's name
    assume(name not in {"prompt", "fps", "width", "height", "generator"})
    judging = Evaluator(
        policy(f"{quoted(name)} IS NULL"), [Column(name, pa.float64(), "a score")]
    )  # fmt: skip

    assert judging.rejects([{name: score}]) == [(["r0"] if score is None else [], [])]


@given(text=st.text(max_size=40))
@example("1) FROM read_text('/etc/passwd') --")
@example("true); DROP VIEW clips; --")
@example("true /*")
@example("true -- ")
@example("'")
@example('"')
@example("$$")
@example("\0")
@settings(quick, max_examples=80)
def test_any_text_is_a_predicate_or_a_config_error(text):
    with contextlib.suppress(ConfigError):
        evaluator(text)


STATEMENTS = [
    "COPY clips TO '{0}'",
    "ATTACH '{0}'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "CREATE TABLE t AS SELECT 1",
    "DROP VIEW clips",
    "PRAGMA database_list",
    "SET threads = 9",
    "EXPORT DATABASE '{0}'",
    "CALL pragma_version()",
    "SELECT 1",
    "WITH RECURSIVE t AS (SELECT 1 UNION ALL SELECT 1 FROM t) SELECT count(*) FROM t",
]
FRAMES = ["{0}", "true; {0}", "true); {0}; --", "({0}) IS NULL", "EXISTS ({0})", "motion IN ({0})"]


@pytest.mark.parametrize("statement", STATEMENTS)
@pytest.mark.parametrize("frame", FRAMES)
def test_a_predicate_is_no_statement(tmp_path, frame, statement):
    target = tmp_path / "written"

    with pytest.raises(ConfigError):
        evaluator(frame.format(statement.format(target)))

    assert not target.exists()


READING = [
    "read_text('{0}')", "read_csv('{0}')", "read_blob('{0}')", "read_parquet('{0}')",
    "read_json('{0}')", "glob('/*')", "getenv('HOME')", "current_setting('threads')",
    "getvariable('x')", "pragma_table_info('clips')", "duckdb_settings()", "sniff_csv('{0}')",
    "query('SELECT 1')", "query_table('clips')", "json_execute_serialized_sql('{{}}')",
    "current_database()", "version()", "current_query()", "in_search_path('a', 'b')",
    "write_log('x')", "nextval('x')", "setseed(0.5)", "error('x')", "txid_current()",
    "json_serialize_plan('SELECT 1')", "sleep_ms(1)", "main.lower(prompt)", "system.main.random()",
]  # fmt: skip


@pytest.mark.parametrize("call", READING)
@pytest.mark.parametrize("frame", ["{0} IS NULL", "len(CAST({0} AS VARCHAR)) > 0", "TRY({0}) = 1"])
def test_a_predicate_reads_no_file_setting_or_other_table(tmp_path, call, frame):
    secret = tmp_path / "secret"
    secret.write_text("x")

    with pytest.raises(ConfigError):
        evaluator(frame.format(call.format(secret)))


@pytest.mark.parametrize(
    "predicate",
    ["random() < 0.5", "now() IS NULL", "uuid() = 'x'", "today() IS NULL", "current_date IS NULL"],
)
def test_a_predicate_says_the_same_each_time(predicate):
    with pytest.raises(ConfigError):
        evaluator(predicate)


@pytest.mark.parametrize(
    "predicate",
    [
        "count(*) > 1", "max(motion) > 1", "sum(motion) FILTER (borders) > 1",
        "row_number() OVER () > 1", "motion > avg(motion) OVER ()", "lag(motion) OVER () > 1",
        "unnest(line_s) > 1", "motion > ALL (line_s)", "(FROM clips) IS NULL", "COLUMNS(*) > 0",
        "* IS NULL", "#1", "GROUPING(motion) = 0", "$1 > 0", "? > 0", "$name IS NULL",
    ],
)  # fmt: skip
def test_a_predicate_sees_one_clip_only(predicate):
    with pytest.raises(ConfigError):
        evaluator(predicate)


def nested(inner: str, frame: str, times: int) -> str:
    for _ in range(times):
        inner = frame.format(inner)
    return inner


@pytest.mark.parametrize(
    "predicate",
    [
        "len(range(10000000000)) > 0", "len(range(300000000)) > 0",
        "len(generate_series(1, 300000000)) > 0", "len(repeat('x', 2000000000)) > 0",
        "len(printf('%900000000d', 1)) > 0", "len(format('{:900000000}', 1)) > 0",
        "len(lpad('x', 2000000000, 'x')) > 0", "len(list_resize([1], 300000000)) > 0",
        "len(bar(1, 0, 1, 1000000000)) > 0", "pg_sleep(60) IS NULL", "sleep_ms(60000) IS NULL",
        "len(list_transform(range(99999), lambda fps: list_sum(range(99999)))) > 0",
        "len([width FOR width IN line_s]) > 0",
        nested("'aaaaaaaaaa'", "replace({0}, 'a', 'aaaaaaaaaa')", 12) + " = ''",
        nested("'aaaaaaaaaa'", "regexp_replace({0}, 'a', 'aaaaaaaaaa', 'g')", 12) + " = ''",
        nested("'a'", "hex({0})", 40) + " = ''",
        nested("'a'", "to_json({0})", 40) + " = ''",
        nested("'a''b'", "[{0}]::VARCHAR", 40) + " = ''",
        nested("'a''b'", "concat([{0}])", 40) + " = ''",
        " + ".join(["motion"] * 400) + " > 0",
        nested("motion", "({0})", 5000) + " > 0",
        nested("motion", "-{0}", 5000) + " > 0",
        nested("borders", "NOT {0}", 20000),
    ],
)  # fmt: skip
def test_a_predicate_that_would_never_end_or_fill_the_memory_is_refused_at_once(predicate):
    started = time.monotonic()

    with pytest.raises(ConfigError):
        evaluator(predicate)

    assert time.monotonic() - started < 10


def test_the_deepest_text_of_lists_that_is_allowed_is_small():
    judging = evaluator(nested("'a''b'", "[{0}]::VARCHAR", 15) + " = ''")

    assert judging.rejects([{}]) == [([], [])]


def test_every_allowed_function_only_computes():
    with duckdb.connect() as connection:
        known = connection.execute(
            "SELECT function_name, function_type, stability FROM duckdb_functions()"
        ).fetchall()
    by_name: dict[str, set[tuple[str, str | None]]] = {}
    for name, kind, stability in known:
        by_name.setdefault(name, set()).add((kind, stability))

    for name in FUNCTIONS & by_name.keys():
        assert all(kind in ("scalar", "macro") for kind, _ in by_name[name]), name
        assert all(s in ("CONSISTENT", None) for _, s in by_name[name]), name


def test_the_connection_of_a_policy_touches_no_file(tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    with sandboxed() as connection:
        for statement in (
            f"SELECT * FROM read_text('{secret}')",
            f"SELECT * FROM '{secret}'",
            f"COPY (SELECT 1) TO '{tmp_path / 'out.csv'}'",
            f"ATTACH '{tmp_path / 'other.db'}'",
            f"EXPORT DATABASE '{tmp_path / 'out'}'",
            "INSTALL httpfs",
            "LOAD httpfs",
            "SET enable_external_access = true",
            "SET threads = 9",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(statement)

    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]


@pytest.mark.parametrize(
    ("predicate", "columns"),
    [
        ('"Motion" < 1 OR clips.SHARPNESS < 1', {"motion", "sharpness"}),
        ("prompt ILIKE '%select%' -- motion", {"prompt"}),
        ("label IN ('a', 'motion')", {"label"}),
        ("coalesce(list_max(line_s), 0) > 1", {"line_s"}),
        ("CASE WHEN borders THEN motion ELSE shots END > 0", {"borders", "motion", "shots"}),
        ("extract(year FROM made_at) > 2020 AND made_at > DATE '2020-01-01'", {"made_at"}),
    ],
)
def test_the_columns_of_a_predicate_are_found_wherever_they_stand(predicate, columns):
    assert predicate_columns(predicate, "here") == columns
