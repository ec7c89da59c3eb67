"""Answers of one token each, weighed by the probability that the model begins its answer with them.

Probabilities say more than the one token that the model would write: a mean over them ranks clips
better than the most likely choice (Wang, Zhang, Choi, 2025, arXiv 2503.03064).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from winnow.operators.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Weighed:
    """What the first token of an answer says of the choices."""

    probabilities: dict[str, float]
    """By choice, adding up to 1."""
    leaked: float
    """0..1, probability that the first token is none of the choices."""

    @property
    def text(self) -> str:
        """The most likely choice; the first of equals."""
        return max(self.probabilities, key=self.probabilities.__getitem__)


def choice_tokens(choices: Sequence[str], encode: Callable[[str], Sequence[int]]) -> list[int]:
    """The token of each choice; `encode` tokenizes without adding special tokens.

    Raises ConfigError where a choice is not one token, or two choices are the same one.
    """
    tokens: list[int] = []
    for choice in choices:
        ids = list(encode(choice))
        if len(ids) != 1:
            raise ConfigError(
                f"the choice {choice!r} is {len(ids)} tokens of this model's tokenizer: choices "
                f"are weighed by one token each: use digits, letters or short words such as Yes"
            )
        if ids[0] in tokens:
            raise ConfigError(
                f"the choices {choices[tokens.index(ids[0])]!r} and {choice!r} are the same token"
            )
        tokens.append(ids[0])
    return tokens


def weigh(choices: Sequence[str], log_probabilities: Sequence[float]) -> Weighed:
    """Probabilities over the choices from their natural logarithms over the whole vocabulary.

    Raises ValueError where they are no probabilities (a model that has overflowed gives NaN), or
    no choice has any.
    """
    highest = max(log_probabilities)
    if math.isinf(highest) or any(math.isnan(value) for value in log_probabilities):
        raise ValueError(f"no probabilities for the choices {', '.join(choices)}")
    # Relative to the highest, so that choices which are all unlikely are still told apart.
    weights = [math.exp(value - highest) for value in log_probabilities]
    within = sum(math.exp(value) for value in log_probabilities)
    return Weighed(
        {choice: weight / sum(weights) for choice, weight in zip(choices, weights, strict=True)},
        min(1.0, max(0.0, 1.0 - within)),
    )
