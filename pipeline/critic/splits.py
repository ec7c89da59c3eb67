"""Parts of a data set: a held-out share, equally many of each score, a few for a quick look.

Nothing here depends on the order of the rows, and a prompt is never on both sides of a split: the
videos of one prompt resemble each other. Split first and balance the parts afterwards; the other
way round, copies of one video land on both sides.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from winnow.operators.errors import ConfigError

if TYPE_CHECKING:
    from winnow.pipeline.critic.datasets import Example


def split(
    examples: Sequence[Example], share: float, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """(the rest, the held-out `share`), whole groups on one side, scores alike on both.

    The share is met to about half a group. Of two groups or more neither side is empty.
    Raises ConfigError for a share that is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ConfigError(f"share: must be between 0 and 1, not {share}")
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.group].append(example)
    strata: dict[int, list[str]] = defaultdict(list)
    for name in sorted(groups, key=lambda name: _lot(seed, name)):
        truths = [e.truth for e in groups[name] if e.truth is not None]
        strata[_nearest(math.fsum(truths) / len(truths)) if truths else 0].append(name)
    held: set[str] = set()
    wanted, taken = 0.0, 0
    for stratum in sorted(strata):
        wanted += share * sum(len(groups[name]) for name in strata[stratum])
        for name in strata[stratum]:
            if taken + len(groups[name]) / 2 <= wanted:
                held.add(name)
                taken += len(groups[name])
    if len(groups) > 1:
        by_lot = sorted(groups, key=lambda name: _lot(seed, name))
        if not held:
            held.add(by_lot[0])
        elif len(held) == len(groups):
            held.remove(by_lot[0])
    return (
        [e for e in examples if e.group not in held],
        [e for e in examples if e.group in held],
    )


def balance(examples: Sequence[Example], seed: int = 0, repeats: int = 1) -> list[Example]:
    """Equally many of every score that occurs; those without a score are left out.

    Frequent scores are thinned out. With `repeats` above 1 an example of a rare score may occur that
    often (for training only), up to the mean number of examples of a score.
    """
    if repeats < 1:
        raise ConfigError(f"repeats: must be 1 or more, not {repeats}")
    by_score: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        if example.truth is not None:
            by_score[_nearest(example.truth)].append(example)
    if not by_score:
        return []
    smallest = min(len(alike) for alike in by_score.values())
    mean = sum(len(alike) for alike in by_score.values()) // len(by_score)
    target = max(smallest, min(smallest * repeats, mean))
    chosen: list[Example] = []
    for score in sorted(by_score):
        by_lot = sorted(by_score[score], key=lambda e: _lot(seed, e.example_id))
        chosen += (by_lot * math.ceil(target / len(by_lot)))[:target]
    # The order of the data set, so that what is balanced is not sorted by score.
    place = {id(example): n for n, example in enumerate(examples)}
    return sorted(chosen, key=lambda example: place[id(example)])


def sample(examples: Sequence[Example], count: int, seed: int = 0) -> list[Example]:
    """`count` of them by lot, in their order; the same ones however the rows are sorted."""
    if count < 1:
        raise ConfigError(f"limit: must be 1 or more, not {count}")
    by_lot = sorted(range(len(examples)), key=lambda n: _lot(seed, examples[n].example_id))
    return [examples[n] for n in sorted(by_lot[:count])]


def _lot(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def _nearest(truth: float) -> int:
    return math.floor(truth + 0.5)
