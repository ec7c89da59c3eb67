"""Text that nobody vouches for: from sidecars into prompts, from models into tables."""

from __future__ import annotations

import re
import unicodedata

MOST_ANSWERED = 20_000
"""Characters of a model's text that are kept; 1024 words have some 7000."""
MOST_RECORDED = 1500
"""Characters of one text from a sidecar that are shown to a model."""

# <|im_start|>, </think>, <start_of_turn>, <<SYS>>, [INST], [/INST], [IMG]
_TEMPLATE_TOKEN = re.compile(r"<[|｜][^<>]{0,80}[|｜]>|</?[A-Za-z_]{1,40}>|\[/?[A-Z_]{2,30}\]")


def clean(text: str, most: int = MOST_ANSWERED) -> str:
    """Untrusted text as one paragraph that any table can hold: no control, format or lone
    surrogate characters, white space collapsed, capped."""
    kept = (" " if c.isspace() or unicodedata.category(c) == "Cc" else c for c in text)
    shown = (c for c in kept if unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cn"))
    return " ".join("".join(shown).split())[:most].rstrip()


def harmless(text: str) -> str:
    """Untrusted text for a prompt: nothing that a chat template or our own marks could be."""
    cleaned = clean(text[: 4 * MOST_RECORDED])
    cleaned = _TEMPLATE_TOKEN.sub(" ", cleaned)
    # What is left of angle brackets could join to a token again.
    return clean(cleaned.replace("<", " ").replace(">", " "), MOST_RECORDED)


def unmarked(text: str) -> str:
    """The text with control tokens such as <|im_end|> broken up.

    Servers read them in the text of a turn as well: they must neither open a turn nor pose as a
    video.
    """
    return re.sub(r"<(?=\|[^<>|]*\|>)", "< ", text)
