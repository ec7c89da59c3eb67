"""The questions of the VLM filter: a file of yes/no questions and classes, and how they are put.

A file is self-contained. Everything that a model is told stands in it, save for the list of keys and
legal answers, which is made from the questions so that the two cannot disagree.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from winnow.operators.settings import Strict, find_config, parse_yaml, validate
from winnow.operators.vlm.structured import Fields, object_schema
from winnow.operators.vlm.untrusted import harmless

FOLDER = "prompts/questions"
VERDICTS = ("no", "yes", "unsure")
UNSURE = "unsure"
EVIDENCE = "evidence"

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]


class Question(Strict):
    """One question that is answered by yes, no or unsure; yes is always the defect."""

    name: Name
    ask: str = Field(min_length=1, description="the question, in a sentence")
    counts: str = Field("", description="what a yes needs")
    ignore: str = Field("", description="what looks like it and is a no")


class Choice(Strict):
    """One question with fixed answers; `unsure` is always one more."""

    name: Name
    ask: str = Field(min_length=1, description="the question, in a sentence")
    choices: tuple[Name, ...] = Field(min_length=2)
    counts: str = Field("", description="how to choose between them")

    @model_validator(mode="after")
    def _distinct(self) -> Choice:
        if len({*self.choices, UNSURE}) <= len(self.choices):
            raise ValueError(f"the choices must differ from each other and from {UNSURE!r}")
        return self


class Questions(Strict):
    """What one request asks of a window of a clip."""

    name: Name
    description: str = ""
    system: str = Field(min_length=1, description="the system turn")
    task: str = Field(min_length=1, description="stands before the questions")
    questions: tuple[Question, ...] = Field(min_length=1)
    classes: tuple[Choice, ...] = ()
    prompt: str = Field(
        "",
        description="stands before the generation prompt, where the clip has one; "
        "without it the prompt is not shown",
    )
    evidence: str = Field(
        "", description="asks for a short text after the answers; without it there is none"
    )

    @model_validator(mode="after")
    def _distinct(self) -> Questions:
        names = [EVIDENCE, *(q.name for q in self.questions), *(c.name for c in self.classes)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two questions are called {name!r}, or it is a reserved name")
        return self

    @classmethod
    def read(cls, name: str) -> Questions:
        """A file of questions: a path, or a name in configs/prompts/questions. Raises ConfigError."""
        text, origin = find_config(name, FOLDER)
        return validate(cls, parse_yaml(text, origin), origin)

    @property
    def fields(self) -> Fields:
        """The keys of the answer with their legal values."""
        fields: dict[str, tuple[str, ...] | None] = {q.name: VERDICTS for q in self.questions}
        fields |= {choice.name: (*choice.choices, UNSURE) for choice in self.classes}
        return fields | ({EVIDENCE: None} if self.evidence else {})

    @property
    def answer_schema(self) -> dict[str, Any]:
        """JSON schema of the answer."""
        return object_schema(self.fields)

    @property
    def identity(self) -> str:
        """Name and hash: two answers with the same were asked for in the same words."""
        asked = json.dumps([self.system, self.render("a prompt", None), self.answer_schema])
        return f"{self.name}@{hashlib.sha256(asked.encode()).hexdigest()[:12]}"

    def render(
        self, prompt: str | None = None, span: tuple[float, float, float] | None = None
    ) -> str:
        """The user's turn.

        `prompt` is the clip's generation prompt, untrusted. `span` is the start and end of the
        window and the length of the clip in seconds, where the window is not the whole clip.
        """
        parts = [self.task.strip()]
        if span is not None:
            parts.append(
                f"The frames are seconds {span[0]:.1f} to {span[1]:.1f} of a clip of "
                f"{span[2]:.1f} seconds. Judge this part alone."
            )
        if self.prompt and prompt and (given := harmless(prompt)):
            parts.append(f"{self.prompt.strip()}\n<prompt>\n{given}\n</prompt>")
        parts.append("Questions, each answered by no, yes or unsure:")
        parts.append("\n".join(_line(q.name, q.ask, q.counts, q.ignore) for q in self.questions))
        if self.classes:
            parts.append("Choices, each answered by one of its words, or unsure:")
            parts.append(
                "\n".join(
                    f"{_line(c.name, c.ask, c.counts)} Words: {', '.join(c.choices)}."
                    for c in self.classes
                )
            )
        if self.evidence:
            parts.append(f"{EVIDENCE}: {_sentence(self.evidence)}")
        keys = ", ".join(f'"{key}": "..."' for key in self.fields)
        parts.append(f"Answer with one JSON object on one line and nothing else: {{{keys}}}")
        return "\n\n".join(parts)


def _line(name: str, ask: str, counts: str, ignore: str = "") -> str:
    text = f"- {name}: {_sentence(ask)}"
    if counts:
        text += f" {_sentence(counts)}"
    return f"{text} Not: {_sentence(ignore)}" if ignore else text


def _sentence(text: str) -> str:
    return " ".join(text.split())


def _read(value: Any) -> Any:
    return Questions.read(value) if isinstance(value, str) else value


QuestionsFile = Annotated[
    Questions,
    # Read where the configuration is: a worker on another machine has not the user's files.
    BeforeValidator(_read),
    WithJsonSchema(
        {
            "type": "string",
            "description": f"questions: a path, or a name in configs/{FOLDER}",
        }
    ),
]
"""In a configuration the name of a file of questions, in an operator what is in it."""
