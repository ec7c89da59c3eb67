import json
import time

import pytest

from winnow.operators.vlm.structured import MOST_CHARACTERS, object_schema, read_object

FIELDS = {"melts": ("no", "yes", "unsure"), "camera": ("static", "pan", "unsure"), "note": None}
GOOD = '{"melts": "yes", "camera": "pan", "note": "a hand"}'
READ = {"melts": "yes", "camera": "pan", "note": "a hand"}


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Here is the answer you {{asked}} for:\n{GOOD}\nI hope {{it}} helps.",
        f"<think>Perhaps {{\"melts\": \"no\"}}, or not.</think>\n{GOOD}",
        f"I said {GOOD} and say again {GOOD}",
        f"[{GOOD}]",
        '{"note": "a hand", "camera": " PAN ", "melts": "Yes"}',
        '{"melts": "yes", "melts": "yes", "camera": "pan", "note": "a hand"}',
    ],
    ids=["bare", "fence", "prose", "thinking", "repeated", "list", "case and order", "same twice"],
)  # fmt: skip
def test_the_object_is_found_whatever_surrounds_it(text):
    reading = read_object(text, FIELDS)
    assert (reading.values, reading.problems) == (READ, [])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "there is no JSON object"),
        ("yes", "there is no JSON object"),
        ("I cannot help with that.", "there is no JSON object"),
        ('["melts", "yes"]', "there is no JSON object"),
        ('{"melts": "yes", "camera": "pa', "not valid JSON"),
        ("{'melts': 'yes'}", "there is no JSON object"),
        ('{"melts": yes}', "not valid JSON"),
        ('{"melts": "yes",}', "not valid JSON"),
        ('{"melts": NaN}', "not valid JSON"),
        ('{"answer": {"melts": "yes", "camera": "pan"}', "not valid JSON"),
        ('{"melts": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"melts": ' + "[" * 50_000 + "}", "not valid JSON"),
        ('{"melts": "yes"} or {"melts": "no"}', "2 different JSON objects"),
        (f"<think>It is {GOOD}", "ends while the model is thinking"),
        (GOOD + " " * MOST_CHARACTERS, "longer than"),
    ],
    ids=lambda value: value[:30],
)
def test_what_is_no_single_object_is_not_read(text, problem):
    reading = read_object(text, FIELDS)
    assert reading.values is None
    assert problem in reading.problems[0]


@pytest.mark.parametrize(
    ("text", "values", "problem"),
    [
        ('{"melts": "maybe"}', {}, "melts is 'maybe', which is no choice"),
        ('{"melts": true}', {}, "melts is bool, not a text"),
        ('{"melts": null}', {}, "melts is NoneType, not a text"),
        ('{"melts": ["yes"]}', {}, "melts is list, not a text"),
        ('{"melts": "yes", "melts": "no"}', {}, "melts stands twice, with different answers"),
        ('{"melts": "no", "real": "yes"}', {"melts": "no"}, "'real' was not asked for"),
        ('{"melts": "no"}', {"melts": "no"}, "camera is missing"),
    ],
)
def test_what_is_wrong_with_a_field_is_reported_and_spares_the_others(text, values, problem):
    reading = read_object(text, FIELDS, optional=("note",))
    assert reading.values == values
    assert problem in reading.problems


def test_an_optional_field_may_be_missing():
    reading = read_object('{"melts": "no", "camera": "pan"}', FIELDS, optional=("note",))
    assert reading.problems == []


def test_problems_are_short_and_few_whatever_the_model_writes():
    flood = {f"{n}" + "x" * 1000 + "\x1b[2J": 1 for n in range(60)}
    reading = read_object(json.dumps(flood), FIELDS)
    assert len(reading.problems) <= 20
    assert all(len(p) < 120 and p.isprintable() for p in reading.problems)


@pytest.mark.parametrize("part", ["{", '{"a":', "{}", "{ ", '{"a":{'])
def test_a_hostile_answer_takes_no_time(part):
    started = time.perf_counter()
    read_object(part * (MOST_CHARACTERS // len(part)), FIELDS)
    assert time.perf_counter() - started < 2


def test_the_schema_allows_what_is_read_and_no_more():
    schema = object_schema(FIELDS, optional=("note",))
    assert schema["properties"]["melts"] == {"type": "string", "enum": ["no", "yes", "unsure"]}
    assert schema["properties"]["note"] == {"type": "string"}
    assert schema["required"] == ["melts", "camera"]
    assert schema["additionalProperties"] is False
