"""The rubric of the physics critic: a file that says what is judged, by which scale, and how to answer.

A file is self-contained: nothing is told to the model but what stands in it. The rubric that ships is
that of the published recipes for Cosmos-Reason1 and 2, in our own words: four criteria, five anchors
and the question of VideoPhy-2 (arXiv 2503.06800).
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

from winnow.operators.critic.judgement import SCORES
from winnow.operators.settings import Strict, find_config, parse_yaml, validate
from winnow.operators.vlm.untrusted import harmless

FOLDER = "prompts/physics"


class Criterion(Strict):
    """One thing to look at."""

    name: str = Field(min_length=1, max_length=80)
    text: str = Field(min_length=1)


class Rubric(Strict):
    """What one request asks of a video."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)
    description: str = ""
    system: str = Field("", description="the system turn; without it there is none")
    task: str = Field(min_length=1, description="stands first")
    criteria: tuple[Criterion, ...] = Field(min_length=1)
    anchors: tuple[str, ...] = Field(
        min_length=len(SCORES), max_length=len(SCORES), description="of the scores 1 to 5, in order"
    )
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1, description="the form of the answer; stands last")
    reasoning: bool = Field(False, description="whether that form has a reasoning before the score")
    caption: str = Field(
        "",
        description="stands before the generation prompt, where the clip has one; without it the "
        "prompt is not shown",
    )

    @classmethod
    def read(cls, name: str) -> Rubric:
        """A rubric's file: a path, or a name in configs/prompts/physics. Raises ConfigError."""
        text, origin = find_config(name, FOLDER)
        return validate(cls, parse_yaml(text, origin), origin)

    @property
    def identity(self) -> str:
        """Name and hash: two scores with the same were asked for in the same words."""
        asked = json.dumps([self.system.strip(), self.render("a caption"), self.reasoning])
        return f"{self.name}@{hashlib.sha256(asked.encode()).hexdigest()[:12]}"

    def render(self, caption: str | None = None) -> str:
        """The user's turn, which follows the frames; `caption` is untrusted."""
        criteria = "\n".join(f"- {c.name}: {_sentences(c.text)}" for c in self.criteria)
        scale = "\n".join(
            f"{score}: {_sentences(anchor)}"
            for score, anchor in zip(SCORES, self.anchors, strict=True)
        )
        parts = [_sentences(self.task), f"Look at:\n{criteria}", f"The scale:\n{scale}"]
        if self.caption and caption and (given := harmless(caption)):
            parts.append(f"{_sentences(self.caption)}\n<caption>\n{given}\n</caption>")
        return "\n\n".join([*parts, _sentences(self.question), _sentences(self.answer)])


def _sentences(text: str) -> str:
    return " ".join(text.split())


def _read(value: object) -> object:
    return Rubric.read(value) if isinstance(value, str) else value


RubricFile = Annotated[
    Rubric,
    # Read where the configuration is: a worker on another machine has not the user's files.
    BeforeValidator(_read),
    WithJsonSchema(
        {"type": "string", "description": f"a rubric: a path, or a name in configs/{FOLDER}"}
    ),
]
"""In a configuration the name of a rubric's file, in the settings what is in it."""
