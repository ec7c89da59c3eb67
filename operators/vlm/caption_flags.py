"""What is wrong with a caption, told from the text alone. Flags are stored; they drop nothing.

    empty         no words
    too_short     fewer than 4 words
    too_long      more than 1024 words
    repeated      one word is half of the text, three words follow each other three times or more, or
                  less than 40 % of the words are different ones
    copied        nearly the words of the window before
    echoes_prompt the text that was given along comes back verbatim
    length_order  more words than a caption that was to be longer
    truncated     the answer broke off, by the model's limit of tokens
    unparsed      the answer was not the JSON that was asked for

Source of the thresholds: the caption quality flags of cosmos-curator. They were set on single
paragraphs: in a long, plain caption a phrase such as "in the background" may well come three times.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

L = TypeVar("L", bound=str)

LEAST_WORDS, MOST_WORDS = 4, 1024
REPEATED_SHARE, REPEATED_WORDS = 0.5, 6
REPEATED_TRIGRAMS = 3
UNIQUE_RATIO = 0.4
COPIED_JACCARD = 0.9
ECHO_WORDS = 6
"""A shorter run of words may be the natural way to say what is seen."""

_WORD = re.compile(r"\w+(?:['’]\w+)*")


def words(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def text_flags(text: str) -> tuple[str, ...]:
    """Flags of one text by itself: empty, too_short, too_long, repeated."""
    found = words(text)
    if not found:
        return ("empty",)
    flags = []
    if len(found) < LEAST_WORDS:
        flags.append("too_short")
    if len(found) > MOST_WORDS:
        flags.append("too_long")
    if _repeated(found):
        flags.append("repeated")
    return tuple(flags)


def _repeated(found: Sequence[str]) -> bool:
    # A handful of words repeats itself by chance.
    if len(found) < REPEATED_WORDS:
        return False
    counts = Counter(found)
    trigrams = Counter(zip(found, found[1:], found[2:], strict=False))
    return (
        max(counts.values()) / len(found) >= REPEATED_SHARE
        or max(trigrams.values()) >= REPEATED_TRIGRAMS
        or len(counts) / len(found) < UNIQUE_RATIO
    )


def jaccard(first: str, second: str) -> float:
    """Share of the words of two texts that both have, 0..1; 0 where neither has any."""
    a, b = set(words(first)), set(words(second))
    return len(a & b) / len(a | b) if a or b else 0.0


def is_copied(text: str, neighbour: str) -> bool:
    """The text has nearly the words of the neighbouring window's caption of the same length."""
    return jaccard(text, neighbour) >= COPIED_JACCARD


def echoes(text: str, given: Sequence[str]) -> bool:
    """A text that was given along stands in the caption word for word, or the caption in it."""
    said = words(text)
    return any(_within(said, words(one)) or _within(words(one), said) for one in given)


def _within(part: Sequence[str], whole: Sequence[str]) -> bool:
    # Spaces around every word, so that only whole words match.
    return len(part) >= ECHO_WORDS and f" {' '.join(part)} " in f" {' '.join(whole)} "


def out_of_order(texts: Mapping[L, str], order: Sequence[L]) -> set[L]:
    """The lengths, named from short to long in `order`, with more words than a longer one has."""
    counts = [(length, len(words(texts[length]))) for length in order if length in texts]
    return {
        length
        for k, (length, count) in enumerate(counts)
        if any(count > longer for _, longer in counts[k + 1 :])
    }
