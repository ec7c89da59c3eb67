"""Choices from log-probabilities, on numbers whose answer is known."""

from __future__ import annotations

import math

import pytest

from winnow.operators.errors import ConfigError
from winnow.operators.vlm.choices import choice_tokens, weigh

TOKENS = {"1": [16], "2": [17], "Yes": [100], " Yes": [100], "maybe not": [5, 6], "": []}


def test_probabilities_are_renormalised_and_the_rest_is_reported_as_leaked():
    weighed = weigh(("1", "2", "3"), [math.log(0.1), math.log(0.2), math.log(0.1)])
    assert weighed.probabilities == pytest.approx({"1": 0.25, "2": 0.5, "3": 0.25})
    assert weighed.leaked == pytest.approx(0.6)
    assert weighed.text == "2"


def test_choices_that_are_all_next_to_impossible_are_still_told_apart():
    weighed = weigh(("1", "2"), [-1000.0, -1000.0 + math.log(3)])
    assert weighed.probabilities == pytest.approx({"1": 0.25, "2": 0.75})
    assert weighed.leaked == 1.0


def test_a_choice_of_no_probability_leaves_the_others_theirs():
    weighed = weigh(("1", "2"), [-math.inf, 0.0])
    assert weighed.probabilities == {"1": 0.0, "2": 1.0}
    assert weighed.leaked == 0.0


@pytest.mark.parametrize("logs", [[math.nan, -1.0], [-1.0, math.nan], [-math.inf, -math.inf]])
def test_what_is_no_distribution_is_an_error_and_not_a_score(logs):
    with pytest.raises(ValueError, match="no probabilities for the choices 1, 2"):
        weigh(("1", "2"), logs)


def test_every_choice_must_be_one_token():
    assert choice_tokens(("1", "2", "Yes"), TOKENS.__getitem__) == [16, 17, 100]
    with pytest.raises(ConfigError, match=r"'maybe not' is 2 tokens.*use digits"):
        choice_tokens(("1", "maybe not"), TOKENS.__getitem__)
    with pytest.raises(ConfigError, match="'' is 0 tokens"):
        choice_tokens(("",), TOKENS.__getitem__)
    with pytest.raises(ConfigError, match="'Yes' and ' Yes' are the same token"):
        choice_tokens(("1", "Yes", " Yes"), TOKENS.__getitem__)
