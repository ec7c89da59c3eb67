"""The VLM filter: a vision-language model looks for defects and says what a clip is.

Every window of a clip is shown once, with a list of yes/no questions and choices (a file in
configs/prompts/questions), and answered by one JSON object. Windows vote.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from winnow.operators.errors import MeasureError, WorkerError
from winnow.operators.models import Models
from winnow.operators.operator import (
    BatchMeasure,
    BatchOperator,
    Budget,
    Column,
    Measures,
    Needs,
    Sampling,
    SeenClip,
)
from winnow.operators.vlm.backend import Backend, TransformersSettings, VlmSettings
from winnow.operators.vlm.messages import Answer, Request, Video
from winnow.operators.vlm.questions import EVIDENCE, UNSURE, Questions, QuestionsFile
from winnow.operators.vlm.structured import Reading, read_object
from winnow.operators.vlm.untrusted import clean
from winnow.operators.vlm.windows import Window, cut

FEWEST_FRAMES = 4
"""Of a clip: motion cannot be judged by less."""
LONGEST_S = 61
"""Frames of a longer clip lie further apart: what is collected of one clip has a bound."""
MAJORITY = 0.5
KEPT_TEXT = 800
"""Characters of each window's answer that are kept."""
_SOURCE = "as the VLM filter of paper 004, section 2.1, with questions for generated video"

WindowStatus = Literal["ok", "incomplete", "unparsed", "truncated", "refused", "error"]


@dataclass(frozen=True)
class VlmFilter(BatchOperator):
    """Asks a vision-language model about defects (yes or no) and classes; the windows of a clip vote.

    An answer that cannot be read is a status of its own and never a pass or a fail: what rules read
    is NULL unless at least half of the windows answered. Raises MeasureError where no window got any
    answer from the model.
    """

    name: ClassVar[str] = "vlm_filter"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "vlm_filter_status",
            pa.string(),
            "ok: every window answered every question, by yes, no or unsure; partial: at least "
            "half of the windows answered some; else what went wrong with most windows: unparsed "
            "(no JSON object as asked for, or cut off), refused or error",
        ),
        Column("vlm_filter_windows", pa.int32(), "windows that were asked", range="1.."),
        Column(
            "vlm_filter_windows_answered",
            pa.int32(),
            "windows with a readable answer to one question at least",
            range="0..",
        ),
        Column(
            "vlm_filter_votes",
            pa.map_(pa.string(), pa.float32()),
            "per question, of the windows that said yes or no, the share that said yes; a question "
            "that no window could decide is not in it; NULL unless status is ok or partial",
            range="0..1",
            direction="lower is better",
            source=_SOURCE,
        ),
        Column(
            "vlm_filter_worst",
            pa.float32(),
            "the highest of the votes; NULL unless status is ok",
            range="0..1",
            direction="lower is better",
            source=_SOURCE,
        ),
        Column(
            "vlm_filter_worst_question",
            pa.string(),
            "the first question with that vote; NULL where no window said yes to any",
        ),
        Column(
            "vlm_filter_flags",
            pa.list_(pa.string()),
            "questions with a vote above one half; NULL unless status is ok or partial, and of a "
            "partial one only the questions that were answered",
            direction="lower is better",
            source=_SOURCE,
        ),
        Column(
            "vlm_filter_classes",
            pa.map_(pa.string(), pa.string()),
            "per choice the commonest answer of the windows that were sure, unsure where two lead "
            "or none was; a choice that no window answered is not in it; NULL unless status is ok "
            "or partial",
        ),
        Column(
            "vlm_filter_answers",
            pa.string(),
            "JSON list of the windows: seconds, status, the answer's text (capped), problems with "
            "it, error, and what the model was shown",
        ),
        Column("vlm_filter_prompt", pa.string(), "name and hash of the questions"),
        Column("vlm_filter_model", pa.string(), "the model that answered, with its revision"),
        Column(
            "vlm_filter_fps", pa.float32(), "mean rate of the frames shown", unit="1/s", range="0.."
        ),
        Column("vlm_filter_frames", pa.int32(), "frames shown, of all windows", unit="frames"),
        Column("vlm_filter_pixels", pa.int32(), "most pixels of one frame shown", unit="pixels"),
    )

    vlm: VlmSettings = field(default_factory=TransformersSettings)
    """The model and how it is reached."""
    questions: QuestionsFile = field(default_factory=lambda: Questions.read("generated"))
    """What is asked: in a configuration a path, or a name in configs/prompts/questions."""
    fps: Annotated[float, Field(gt=0)] = 2.0
    """Frames a second that the model is shown."""
    window_s: Annotated[float, Field(gt=0)] = 10.0
    """Longest window; a longer clip is cut into equal ones."""
    pixels: Annotated[int, Field(ge=2**16)] = 8 * 2**20
    """Most pixels of a window, all frames together."""
    max_tokens: Annotated[int, Field(ge=1)] = 768
    """Longest answer."""
    temperature: Annotated[float, Field(ge=0)] = 0.0

    @property
    def needs(self) -> Needs:
        return Needs(samples=(self.sampling,))

    @property
    def most_frames(self) -> int:
        """Frames of a window, at most."""
        return max(FEWEST_FRAMES, math.ceil(self.fps * self.window_s))

    @property
    def sampling(self) -> Sampling:
        most = max(FEWEST_FRAMES, math.ceil(self.fps * LONGEST_S))
        fit = Budget(self.pixels // self.most_frames)
        return Sampling(self.fps, "rgb", minimum=FEWEST_FRAMES, maximum=most, fit=fit)

    def models(self) -> tuple[str, ...]:
        return self.vlm.models()

    def made_by(self, models: Models) -> dict[str, str]:
        return {
            "vlm_filter model": self.vlm.identity(models),
            "vlm_filter prompt": self.questions.identity,
        }

    def load(self, models: Models) -> VlmFilterMeasure:
        return VlmFilterMeasure(self, self.vlm.load(models))


@dataclass(frozen=True, slots=True)
class WindowAnswer:
    """What a window said, or why it said nothing."""

    window: Window
    answer: Answer
    status: WindowStatus
    reading: Reading

    @property
    def answered(self) -> bool:
        return self.status in ("ok", "incomplete")

    def record(self) -> dict[str, Any]:
        """For people who look into an answer."""
        answer = self.answer
        return {
            "window": self.window.number,
            "start_s": round(self.window.start_s, 3),
            "end_s": round(self.window.end_s, 3),
            "status": self.status,
            "text": clean(answer.text, KEPT_TEXT),
            "problems": self.reading.problems,
            "error": None if answer.error is None else clean(answer.error, KEPT_TEXT),
            "frames": answer.frames,
            "fps": round(answer.fps, 4),
            "pixels": answer.pixels,
            "tokens_in": answer.tokens_in,
            "tokens_out": answer.tokens_out,
        }


class VlmFilterMeasure(BatchMeasure):
    """The VLM filter with its backend at hand."""

    def __init__(self, operator: VlmFilter, backend: Backend) -> None:
        self._operator = operator
        self._backend = backend
        self._schema = operator.questions.answer_schema
        self._identity = operator.questions.identity

    def __call__(self, clips: Sequence[SeenClip]) -> list[Measures | MeasureError]:
        windows = [self._windows(clip) for clip in clips]
        requests = [
            self._request(clip, window, len(cuts))
            for clip, cuts in zip(clips, windows, strict=True)
            for window in cuts
        ]
        # All windows of all clips at once: the backend makes its own batches of them.
        answers = {answer.key: answer for answer in self._backend.answer(requests)}
        if answers.keys() != {r.key for r in requests} or len(answers) != len(requests):
            raise WorkerError("the VLM's answers are not those to the clips asked about: a bug")
        return [
            self._measures([self._read(w, answers[self._key(clip, w)]) for w in cuts])
            for clip, cuts in zip(clips, windows, strict=True)
        ]

    def close(self) -> None:
        self._backend.close()

    def _windows(self, clip: SeenClip) -> list[Window]:
        operator = self._operator
        samples = clip.samples.get(operator.sampling, [])
        return cut(samples, clip.view.duration_s, operator.window_s, operator.most_frames)

    def _key(self, clip: SeenClip, window: Window) -> tuple[str, int, str]:
        return clip.view.clip_id, window.number, self._operator.name

    def _request(self, clip: SeenClip, window: Window, windows: int) -> Request:
        operator, view = self._operator, clip.view
        span = (window.start_s, window.end_s, view.duration_s) if windows > 1 else None
        clip_id, number, purpose = self._key(clip, window)
        return Request(
            clip_id,
            number,
            Video.of(window.samples, view.fps),
            user=operator.questions.render(view.prompt, span),
            system=operator.questions.system.strip(),
            max_tokens=operator.max_tokens,
            temperature=operator.temperature,
            schema=self._schema,
            purpose=purpose,
        )

    def _read(self, window: Window, answer: Answer) -> WindowAnswer:
        if answer.status != "ok":
            # What is cut off may have gone on to say something else.
            return WindowAnswer(window, answer, answer.status, Reading(None))
        reading = read_object(answer.text, self._operator.questions.fields, (EVIDENCE,))
        given = [q.name in (reading.values or {}) for q in self._operator.questions.questions]
        status: WindowStatus = "ok" if all(given) else "incomplete" if any(given) else "unparsed"
        return WindowAnswer(window, answer, status, reading)

    def _measures(self, windows: Sequence[WindowAnswer]) -> Measures | MeasureError:
        if not windows:
            return MeasureError("no frame of the clip was sampled")
        if all(window.status == "error" for window in windows):
            first = windows[0].answer.error or "no reason given"
            return MeasureError(f"the VLM answered none of {len(windows)} windows: {first}")
        status = clip_status([window.status for window in windows])
        said = [window.reading.values or {} for window in windows if window.answered]
        asked = self._operator.questions
        shares = votes([q.name for q in asked.questions], said)
        shown = [window.answer for window in windows if window.answer.frames]
        models = sorted({window.answer.model for window in windows if window.answer.model})
        enough, worst = status in ("ok", "partial"), None
        if status == "ok" and shares:
            worst = max(shares, key=lambda name: shares[name])  # the first of equals
        return Measures(
            {
                "vlm_filter_status": status,
                "vlm_filter_windows": len(windows),
                "vlm_filter_windows_answered": len(said),
                "vlm_filter_votes": list(shares.items()) if enough else None,
                "vlm_filter_worst": None if worst is None else shares[worst],
                "vlm_filter_worst_question": worst if worst and shares[worst] > 0 else None,
                "vlm_filter_flags": [name for name, share in shares.items() if share > MAJORITY]
                if enough
                else None,
                "vlm_filter_classes": list(
                    majorities([c.name for c in asked.classes], said).items()
                )
                if enough
                else None,
                "vlm_filter_answers": json.dumps(
                    [window.record() for window in windows], ensure_ascii=False
                ),
                "vlm_filter_prompt": self._identity,
                "vlm_filter_model": ", ".join(models) or None,
                "vlm_filter_fps": float(np.mean([a.fps for a in shown])) if shown else None,
                "vlm_filter_frames": sum(answer.frames for answer in shown),
                "vlm_filter_pixels": max((answer.pixels for answer in shown), default=None),
            }
        )


def clip_status(windows: Sequence[WindowStatus]) -> str:
    """The status of a clip from those of its windows, as the column says."""
    if all(status == "ok" for status in windows):
        return "ok"
    failed = [status for status in windows if status not in ("ok", "incomplete")]
    if 2 * len(failed) <= len(windows):
        return "partial"
    kinds = Counter(str(status).replace("truncated", "unparsed") for status in failed)
    return max(("error", "refused", "unparsed"), key=lambda kind: kinds[kind])


def votes(names: Sequence[str], said: Sequence[dict[str, str]]) -> dict[str, float]:
    """By question the share of yes among yes and no; without the questions that have neither."""
    shares = {}
    for name in names:
        given = [values.get(name) for values in said]
        yes, no = given.count("yes"), given.count("no")
        if yes + no:
            shares[name] = yes / (yes + no)
    return shares


def majorities(names: Sequence[str], said: Sequence[dict[str, str]]) -> dict[str, str]:
    """By choice the commonest answer of the windows that were sure, `unsure` for a tie or where
    none was; without the choices that nobody answered."""
    winners = {}
    for name in names:
        given = Counter(values[name] for values in said if name in values)
        if given:
            given[UNSURE] = 0
            (first, most), *others = given.most_common()
            winners[name] = first if most and (not others or others[0][1] < most) else UNSURE
    return winners
