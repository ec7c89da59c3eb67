"""The reading of a score, and regression tests of faults a and i of the published scripts."""

import pytest

from winnow.operators.critic.parsing import MOST_CHARACTERS, read_score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("2", 2),
        (" 5. \n", 5),
        ("<think>\nThe cup floats, 1 of 3 things.\n2\n</think>\n\n4", 4),
        ("The template had opened it.\n3\n</think>\n1", 1),
        ("<think></think><think>again</think>3", 3),
        ("<answer>2</answer>", 2),
        ("<think>hm</think>\n<answer>\n2\n</answer>", 2),
        ("<answer>2</answer> and again <answer> 2. </answer>", 2),
        ("The ball hovers, which nothing explains.\n2\n", 2),
        ("2\r\nbecause the ball hovers", 2),
        ("4\n4", 4),
        ('{"score": 3}', 3),
        ('```json\n{"why": "it {floats} \\"so\\"", "score": "3"}\n```', 3),
        ('A set {like this} and {"else": 1} say little.\n{"score": 5, "sure": {"a": [1]}}', 5),
        ("[Score between 1 and 5.]\n3", 3),
    ],
)
def test_one_clear_score_is_read(text, score):
    assert read_score(text).score == score


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "6",
        "12",
        "100000",
        "-3",
        "3.5",
        "3/5",
        "4 out of 5",
        "between 3 and 4",
        "３",
        "three",
        "Zero-shot prose says that 2 balls fall and 1 floats. A good video.",
        "[Score between 1 and 5.]",
        "<answer>[Score between 1 and 5.]</answer>",
        "<answer>6</answer>",
        "<answer>3/5</answer>",
        "<answer></answer>",
        "<answer>3",
        "3</answer>",
        "2\n4",
        "1.\nIt falls.\n2.\nIt bounces.",
        "<answer>2</answer>\n3",
        "<answer>2</answer><answer>4</answer>",
        "<answer>score</answer>\n<answer>4</answer>",
        '{"score": 0}',
        '{"score": 3.0}',
        '{"score": true}',
        '{"score": null}',
        '{"score": [3]}',
        '{"score": 2, "score": 4}',
        '{"score": 2} {"score": 4}',
        '{"score": 9}\n3',
        '{"score": 3',
        '{"result": {"score": 3}}',
        "<think>It falls well.\n4\n",
        "<think>It falls.</think>",
        "<think>a</think>3<think>but then",
        "{" * 5000 + '{"' * 5000,
        '{"a":' * 5000,
        "3\n" * MOST_CHARACTERS,
    ],
)
def test_fault_i_what_is_not_clearly_one_score_is_none_and_no_default(text):
    """VideoPhy's own parser takes the first digit or number word of any text, and 0 without one."""
    reading = read_score(text)
    assert reading.score is None
    assert reading.problem


def test_fault_a_an_echo_of_the_template_lends_the_score_no_digit():
    """The Cosmos-Reason2 script's model echoes the template, whose 1 and 5 pose as its score."""
    assert read_score("[Score between 1 and 5.]").score is None
    assert read_score("Score between 1 and 5.\n\n2").score == 2


def test_the_problem_says_what_was_found():
    assert "several scores: 2, 4" in read_score("4\n2").problem
    assert "thinking" in read_score("<think>3").problem
    assert "none from 1 to 5" in read_score("<answer>6</answer>").problem
