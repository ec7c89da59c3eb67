"""The critic at work: clips in, judgements out, through whatever VLM backend."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from winnow.operators.critic.judgement import CHOICES, SCORES, Judgement, Status
from winnow.operators.critic.parsing import Reading, read_score
from winnow.operators.critic.settings import LONGEST_S, CriticSettings
from winnow.operators.device import batches
from winnow.operators.errors import MediaError
from winnow.operators.frames import Span, fitted, read_spans
from winnow.operators.media import probe
from winnow.operators.models import Models
from winnow.operators.operator import ClipView, Collecting, Needs, Sample
from winnow.operators.vlm.backend import Backend
from winnow.operators.vlm.messages import Answer, Request, Video
from winnow.operators.vlm.untrusted import clean
from winnow.operators.vlm.windows import cut

PURPOSE = "physics"
KEPT_TRACE = 8000
"""Characters of a trace."""
KEPT_ERROR = 300
AT_ONCE = 16
"""Requests between two looks at the clock, where a budget in seconds is kept."""

_FAILED: tuple[Status, ...] = ("error", "refused", "unparsed")


@dataclass(frozen=True, slots=True)
class Shown:
    """A clip as the critic sees it: frames sampled as `CriticSettings.sampling` says."""

    clip_id: str
    video: Video
    caption: str | None = None
    """The generation prompt, untrusted; shown only where the rubric says so."""
    duration_s: float | None = None
    """Length of the clip; by its frames where it is not known."""


def show(
    path: Path,
    settings: CriticSettings,
    clip_id: str,
    span: Span | None = None,
    caption: str | None = None,
) -> Shown:
    """What the critic sees of a local file, or of a span of its frames. Raises MediaError."""
    media = probe(path)
    span = span or Span(0, media.frames)
    needs = Needs(samples=(settings.sampling(),))
    view = ClipView(clip_id, len(span), media.fps, media.width, media.height, media.codec)
    taken = Collecting(view, needs)
    (frames,) = read_spans(path, [span], media.fps, needs, lambda _, chunk: taken.update(chunk))
    if frames < len(span):
        raise MediaError(
            "truncated", f"only {frames} of the clip's {len(span)} frames could be decoded"
        )
    video = Video.of(taken.seen.samples[settings.sampling()], media.fps)
    return Shown(clip_id, video, caption, view.duration_s)


@dataclass(frozen=True, slots=True)
class Examined:
    """A judgement, and how it came about."""

    judgement: Judgement
    direct_score: float | None
    """The expectation in direct mode, also where a reasoning has taken its place."""
    windows: int
    worst_start_s: float | None
    """Start of the window that the judgement is from."""
    answered: bool
    """False where the model was asked and every answer was an error."""


class Critic:
    """Judges clips. Not for several threads at once.

    A clip's judgement does not depend on the others of its batch, unless a budget runs out: budgets
    count over the critic's life, and a clip is asked about as a whole or not at all. What befalls a
    single clip is its judgement; ModelUnavailable, ConfigError and WorkerError come from the backend.
    """

    def __init__(self, settings: CriticSettings, backend: Backend) -> None:
        self.settings = settings
        self._backend = backend
        self._spent = _Spent(settings)

    @classmethod
    def open(cls, settings: CriticSettings, models: Models) -> Critic:
        """Load the model. Raises ConfigError and ModelUnavailable."""
        return cls(settings, settings.vlm.load(models))

    def close(self) -> None:
        """Release the model."""
        self._backend.close()

    def judge(self, shown: Sequence[Shown]) -> list[Judgement]:
        """One judgement a clip, in their order."""
        return [examined.judgement for examined in self.examine(shown)]

    def examine(self, shown: Sequence[Shown]) -> list[Examined]:
        """As `judge`, with how it came about."""
        cases = [_Case(clip, _windows(clip, self.settings)) for clip in shown]
        if self.settings.mode == "reasoning":
            self._reason([(case, case.parts) for case in cases])
        else:
            self._weigh(cases)
        if self.settings.mode == "cascade":
            self._reason(self._near(cases))
        return [case.examined() for case in cases]

    def _weigh(self, cases: Sequence[_Case]) -> None:
        """Direct mode: the probabilities of the digits as the first token."""
        rubric = self.settings.prompt
        groups = [
            [
                Request(
                    case.clip.clip_id,
                    part.number,
                    part.video,
                    rubric.render(case.clip.caption),
                    rubric.system.strip(),
                    max_tokens=1,
                    temperature=0.0,
                    choices=CHOICES,
                    purpose=PURPOSE,
                )
                for part in case.parts
            ]
            for case in cases
        ]
        for case, answers in zip(cases, self._ask(groups), strict=True):
            if isinstance(answers, str):
                case.left_out = answers
                continue
            for part, answer in zip(case.parts, answers, strict=True):
                part.direct = weighed(answer, rubric.identity)

    def _reason(self, wanted: Sequence[tuple[_Case, Sequence[_Part]]]) -> None:
        """Reasoning mode: the votes of written answers, for some windows of some clips."""
        cascade = self.settings.mode == "cascade"
        rubric = self.settings.reasoning_prompt if cascade else self.settings.prompt
        samples = self.settings.samples
        groups = [
            [
                Request(
                    case.clip.clip_id,
                    part.number,
                    part.video,
                    rubric.render(case.clip.caption),
                    rubric.system.strip(),
                    max_tokens=self.settings.max_tokens,
                    temperature=self.settings.temperature,
                    seed=seed_of(self.settings.seed, case.clip.clip_id, part.number, sample),
                    purpose=f"{PURPOSE}.{sample}",
                )
                for part in parts
                for sample in range(samples)
            ]
            for case, parts in wanted
        ]
        for (case, parts), answers in zip(wanted, self._ask(groups), strict=True):
            if isinstance(answers, str):
                case.left_out = answers
                continue
            for place, part in enumerate(parts):
                own = answers[place * samples : (place + 1) * samples]
                part.reasoned = voted(own, rubric.identity)

    def _near(self, cases: Sequence[_Case]) -> list[tuple[_Case, Sequence[_Part]]]:
        """Clips that are near the decision with their windows that are, the nearest clip first."""
        near = []
        for case in cases:
            worst = case.worst_direct()
            if worst is not None and is_near(worst, self.settings):
                parts = [p for p in case.parts if p.direct and is_near(p.direct, self.settings)]
                near.append((distance(worst, self.settings), case, parts))
        near.sort(key=lambda item: item[0])
        return [(case, parts) for _, case, parts in near]

    def _ask(self, groups: Sequence[Sequence[Request]]) -> list[list[Answer] | str]:
        """The answers to each group; why there are none, where the budget does not cover it."""
        outcomes: list[list[Answer] | str] = [[] for _ in groups]
        sizes = [len(group) for group in groups]
        # All in one call, as the backend makes its own batches, unless the clock has to be watched.
        limit = sum(sizes) if self.settings.budget_s is None else AT_ONCE
        for together in batches(range(len(groups)), sizes.__getitem__, limit):
            taken = []
            for place in together:
                if why := self._spent.take(sizes[place]):
                    outcomes[place] = why
                else:
                    taken.append(place)
            requests = [request for place in taken for request in groups[place]]
            if not requests:
                continue
            started = time.monotonic()
            answers = iter(self._backend.answer(requests))
            self._spent.seconds += time.monotonic() - started
            for place in taken:
                outcomes[place] = [next(answers) for _ in groups[place]]
        return outcomes


def _windows(clip: Shown, settings: CriticSettings) -> list[_Part]:
    """The windows of a clip that are judged one by one, within the budget of pixels."""
    video = clip.video
    samples = [
        Sample(index, seconds, frame)
        for index, seconds, frame in zip(video.indices, video.seconds, video.frames, strict=True)
    ]
    duration_s = clip.duration_s
    if duration_s is None:
        # As many equal intervals as frames: they are sampled from the middle of each.
        duration_s = len(samples) / video.fps if video.fps > 0 else 0.0
    longest_s = max(settings.most_s, duration_s * settings.most_s / LONGEST_S)
    parts = []
    for window in cut(samples, duration_s, longest_s, settings.most_frames):
        shown = Video.of(window.samples, video.source_fps)
        fit = settings.fit(len(window.samples))
        if shown.pixels > fit.pixels:
            shown = replace(shown, frames=[fitted(frame, fit) for frame in shown.frames])
        parts.append(_Part(window.number, window.start_s, shown))
    return parts


def seed_of(seed: int, clip_id: str, window: int, sample: int) -> int:
    """A seed of its own for each sample; a rerun repeats it, and no neighbour changes it."""
    digest = hashlib.sha256(f"{seed}\n{clip_id}\n{window}\n{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def distance(judgement: Judgement, settings: CriticSettings) -> float:
    """Of the score from the nearest threshold; infinite where there is none."""
    score = _score(judgement)
    return min((abs(score - threshold) for threshold in settings.thresholds), default=math.inf)


def is_near(judgement: Judgement, settings: CriticSettings) -> bool:
    """Whether a direct judgement is too close to call, or too uncertain."""
    entropy = judgement.entropy
    assert entropy is not None
    return distance(judgement, settings) <= settings.margin or entropy >= settings.most_entropy


def weighed(answer: Answer, prompt: str) -> Judgement:
    """The judgement that the first token's probabilities are."""
    judgement = replace(_blank([answer], prompt), mode="direct")
    if answer.status != "ok":
        return replace(judgement, status=_status(answer), error=_why(answer))
    probabilities = tuple(answer.probabilities[choice] for choice in CHOICES)
    return replace(judgement, status="ok", probabilities=probabilities, leaked=answer.leaked)


def voted(answers: Sequence[Answer], prompt: str) -> Judgement:
    """The judgement that several written answers are: each that holds a score has one vote.

    Without a score in at least half of them there is no judgement.
    """
    readings = [
        read_score(answer.text) if answer.status == "ok" else Reading() for answer in answers
    ]
    samples = tuple(reading.score for reading in readings)
    scores = [score for score in samples if score is not None]
    judgement = replace(_blank(answers, prompt), mode="reasoning", samples=samples)
    if scores and 2 * len(scores) >= len(samples):
        first = answers[next(n for n, score in enumerate(samples) if score is not None)]
        return replace(
            judgement,
            status="ok",
            probabilities=tuple(scores.count(score) / len(scores) for score in SCORES),
            trace=clean(first.text, KEPT_TRACE),
        )
    failed = [n for n, score in enumerate(samples) if score is None]
    status = commonest([_status(answers[n]) for n in failed])
    first_failed = next(n for n in failed if _status(answers[n]) == status)
    why = _why(answers[first_failed], readings[first_failed].problem)
    if len(samples) > 1:
        why = f"{len(scores)} of {len(samples)} samples held a score: {why}"
    return replace(judgement, status=status, error=why)


def commonest(statuses: Sequence[Status]) -> Status:
    """Of failures the most frequent kind; of equals the graver one."""
    kinds = Counter(statuses)
    return max(_FAILED, key=lambda kind: kinds[kind])


def _status(answer: Answer) -> Status:
    """Of an answer without a score: one that was cut off or cannot be read is `unparsed`."""
    return answer.status if answer.status in ("refused", "error") else "unparsed"


def _why(answer: Answer, problem: str | None = None) -> str:
    if answer.status == "error":
        return clean(answer.error or "no reason given", KEPT_ERROR)
    if answer.status == "truncated":
        problem = "the answer was cut off"
    said = clean(answer.text, KEPT_ERROR)
    return f"{problem or answer.status}: {said!r}" if said else problem or answer.status


def _blank(answers: Sequence[Answer], prompt: str) -> Judgement:
    """What is known of answers to one window before they are read."""
    return Judgement(
        "error",
        fps=answers[0].fps,
        frames=answers[0].frames,
        pixels=answers[0].pixels,
        prompt=prompt,
        model=_models(answer.model for answer in answers),
        seconds=sum(answer.seconds for answer in answers),
    )


def _models(names: Iterable[str]) -> str:
    return ", ".join(sorted({name for name in names if name}))


@dataclass(slots=True)
class _Part:
    """A window of a clip, and what was said of it."""

    number: int
    start_s: float
    video: Video
    direct: Judgement | None = None
    reasoned: Judgement | None = None

    @property
    def final(self) -> Judgement | None:
        """Of a cascade the reasoning, where it led to a score."""
        direct, reasoned = self.direct, self.reasoned
        if direct is None or reasoned is None:
            return direct or reasoned
        seconds = direct.seconds + reasoned.seconds
        if reasoned.status == "ok":
            return replace(reasoned, leaked=direct.leaked, seconds=seconds)
        note = f"the reasoning led to no score ({reasoned.status}), the direct one stands: "
        return replace(
            direct,
            samples=reasoned.samples,
            seconds=seconds,
            notes=(note + (reasoned.error or ""),),
        )


@dataclass(slots=True)
class _Case:
    """A clip that is being judged."""

    clip: Shown
    parts: list[_Part]
    left_out: str | None = None
    """Why the budget did not cover what was to be asked last."""

    def worst_direct(self) -> Judgement | None:
        """The direct judgement of the clip; None where a window has none."""
        direct = [part.direct for part in self.parts]
        sound = [judgement for judgement in direct if judgement and judgement.status == "ok"]
        return min(sound, key=_score) if sound and len(sound) == len(direct) else None

    def examined(self) -> Examined:
        if not self.parts:
            judgement = Judgement("error", error="no frame of the clip was sampled")
            return Examined(judgement, None, 0, None, answered=False)
        finals = [(part.start_s, final) for part in self.parts if (final := part.final)]
        if not finals:
            judgement = Judgement("unscored", error=self.left_out)
            return Examined(judgement, None, len(self.parts), None, answered=True)
        start_s, judgement = self._worst(finals)
        every = [final for _, final in finals]
        notes = dict.fromkeys(note for final in every for note in final.notes)
        if self.left_out is not None:
            notes[f"too close to call, but not reasoned about: {self.left_out}"] = None
        judgement = replace(
            judgement,
            fps=float(np.mean([final.fps for final in every])),
            frames=sum(final.frames for final in every),
            pixels=max(final.pixels for final in every),
            model=_models(final.model for final in every),
            seconds=sum(final.seconds for final in every),
            notes=tuple(notes),
        )
        direct = self.worst_direct()
        answered = any(final.status != "error" for final in every)
        score = None if direct is None else direct.score
        return Examined(judgement, score, len(self.parts), start_s, answered)

    def _worst(self, finals: Sequence[tuple[float, Judgement]]) -> tuple[float | None, Judgement]:
        """(start, judgement) of the window that speaks for the clip.

        A window without a score leaves the clip without one: what is in it may be worse.
        """
        failed = [final for _, final in finals if final.status != "ok"]
        if not failed:
            return min(finals, key=lambda item: _score(item[1]))
        status = commonest([final.status for final in failed])
        judgement = next(final for final in failed if final.status == status)
        if len(finals) > 1:
            why = f"{len(failed)} of {len(finals)} windows have no score: {judgement.error}"
            judgement = replace(judgement, error=why)
        return None, judgement


def _score(judgement: Judgement) -> float:
    assert judgement.score is not None
    return judgement.score


@dataclass(slots=True)
class _Spent:
    """What was used of the budgets."""

    settings: CriticSettings
    requests: int = 0
    seconds: float = 0.0

    def take(self, requests: int) -> str | None:
        """Count requests that are about to be sent, or say why they may not be."""
        most, most_s = self.settings.budget_requests, self.settings.budget_s
        if most is not None and self.requests + requests > most:
            return (
                f"{requests} more requests would exceed the budget of {most}: raise budget_requests"
            )
        if most_s is not None and self.seconds >= most_s:
            return f"the budget of {most_s:g} s of the model is spent: raise budget_s"
        self.requests += requests
        return None
