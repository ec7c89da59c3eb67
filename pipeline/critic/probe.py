"""Robustness probes: how the critic's score moves when a clip is changed in a known way.

A critic can agree with people for the wrong reasons: because it likes sharp pictures, stillness, or
what the caption says. A probe changes one thing and compares each clip with itself. What is done
and what a sound critic should do is data: configs/critic/probes.yaml.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from winnow.operators.critic.judgement import Judgement
from winnow.operators.critic.perturb import AnyPerturbation, ClipSet
from winnow.operators.errors import ConfigError, WorkerError
from winnow.operators.settings import Strict, find_config, parse_yaml, validate
from winnow.operators.vlm.untrusted import clean

if TYPE_CHECKING:
    from winnow.operators.critic.critic import Shown

FOLDER = "critic"
CLIPS_AT_ONCE = 16
"""Changed clips that are in memory together; a clip of the recipe's pixel budget has 20 MB."""
CLEAR_MOVE = 0.5
BLIND_MOVE = 0.05
"""A critic whose score moves less than this, whatever is done, does not look."""
_KEPT_TEXT = 300

Expectation = Literal["same", "not_up", "down", "any"]
Sound = Literal["yes", "no", "cannot say", "not asked"]


class Probe(Strict):
    """One change, and the movement that a sound critic should show."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    change: AnyPerturbation
    expect: Expectation
    tolerance: float | None = Field(None, gt=0, description="for same and not_up, in score points")
    at_least: float | None = Field(None, gt=0, description="for down, in score points")
    reason: str = Field(min_length=1, description="why a sound critic should do so, in a sentence")

    @model_validator(mode="after")
    def _measured(self) -> Probe:
        wanted = {"same": "tolerance", "not_up": "tolerance", "down": "at_least"}.get(self.expect)
        for name in ("tolerance", "at_least"):
            if (getattr(self, name) is not None) != (name == wanted):
                asks = f"needs `{wanted}` alone" if wanted else "takes no limit"
                raise ValueError(f"`expect: {self.expect}` {asks}")
        return self

    @property
    def expected(self) -> str:
        """For people: the expectation with its limit."""
        limit = self.tolerance or self.at_least or 0.0
        return {
            "same": f"same ±{limit:g}",
            "not_up": f"up ≤ {limit:g}",
            "down": f"down ≥ {limit:g}",
            "any": "any",
        }[self.expect]


class Probes(Strict):
    """A list of probes, and when they may speak."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    description: str = ""
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of the intervals")
    resamples: int = Field(4000, ge=200, description="of the bootstrap over clips")
    fewest: int = Field(8, ge=2, description="clips (or groups of them) that a verdict needs")
    floor: float = Field(3.0, ge=1, le=5, description="`down` is asked of clips that scored this")
    most_failed: float = Field(
        0.1, ge=0, lt=1, description="share of changed clips without a score that a verdict bears"
    )
    probes: tuple[Probe, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Probes:
        for name, count in Counter(probe.name for probe in self.probes).items():
            if count > 1:
                raise ValueError(f"two probes are called {name!r}")
        return self

    @classmethod
    def read(cls, name: str = "probes") -> Probes:
        """A file of probes: a path, or a name in configs/critic. Raises ConfigError."""
        text, origin = find_config(name, FOLDER)
        return validate(cls, parse_yaml(text, origin), origin)

    def only(self, names: Sequence[str]) -> Probes:
        """Those probes, in the order of the file. Raises ConfigError for an unknown name."""
        known = [probe.name for probe in self.probes]
        if unknown := [name for name in names if name not in known] or (not names and ["''"]):
            raise ConfigError(f"there is no probe {unknown[0]!r}: there are {', '.join(known)}")
        chosen = tuple(probe for probe in self.probes if probe.name in names)
        return self.model_copy(update={"probes": chosen})


class Judge(Protocol):
    """What can be probed: operators.critic.critic.Critic, or anything else that judges."""

    def judge(self, shown: Sequence[Shown]) -> list[Judgement]: ...


@dataclass(frozen=True, slots=True)
class Pair:
    """One clip, judged as it is and changed."""

    clip_id: str
    before: Judgement
    after: Judgement

    @property
    def move(self) -> float | None:
        """Change of the expectation; None where the changed clip has no score."""
        if self.before.score is None or self.after.score is None:
            return None
        return self.after.score - self.before.score


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the critic took one probe. Figures are of the clips that count: scored both times and,
    where the score should fall, at the floor or above before."""

    probe: Probe
    pairs: tuple[Pair, ...]
    """All clips that were changed, failures included."""
    n: int
    mean_move: float | None
    """Of the expectation, -4..4; None where no clip counts."""
    low: float | None
    """Lower end of the interval of the mean; None with less than two clips."""
    high: float | None
    moved_down: float | None
    """Share of clips that fell by more than CLEAR_MOVE."""
    moved_up: float | None
    argmax_changed: int
    changed: int
    """Clips whose probabilities changed at all."""
    below_floor: int
    not_applicable: int
    """Clips that this probe does not change; see `Perturbation.applies_to`."""
    failed: dict[str, int]
    """By status, changed clips without a score that had one before."""
    sound: Sound
    why: str
    """For people: the ground of a verdict that is not plain, and what else to know."""

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "probe": self.probe.name,
            "change": self.probe.change.model_dump(),
            "expect": self.probe.expect,
            "tolerance": self.probe.tolerance,
            "at_least": self.probe.at_least,
            "reason": self.probe.reason,
            "n": self.n,
            "mean_move": self.mean_move,
            "interval": None if self.low is None else [self.low, self.high],
            "moved_down": self.moved_down,
            "moved_up": self.moved_up,
            "argmax_changed": self.argmax_changed,
            "changed": self.changed,
            "below_floor": self.below_floor,
            "not_applicable": self.not_applicable,
            "failed": self.failed,
            "sound": self.sound,
            "why": self.why,
            "clips": [
                {
                    "clip_id": pair.clip_id,
                    "before": pair.before.score,
                    "after": pair.after.score,
                    "argmax_before": pair.before.argmax,
                    "argmax_after": pair.after.argmax,
                    "status": pair.after.status,
                    "error": _kept(pair.after.error),
                }
                for pair in self.pairs
            ],
        }


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The probes of one critic on one set of clips."""

    probes: Probes
    seed: int
    clips: int
    left_out: dict[str, Judgement]
    """Clips that had no score as they are, with what was said: nothing can be compared."""
    outcomes: tuple[Outcome, ...]
    models: tuple[str, ...]
    prompts: tuple[str, ...]
    seconds: float

    @property
    def counts(self) -> dict[Sound, int]:
        """Number of probes by verdict."""
        found = Counter(outcome.sound for outcome in self.outcomes)
        return {sound: found[sound] for sound in ("yes", "no", "cannot say", "not asked")}

    @property
    def is_blind(self) -> bool:
        """Whether nothing moved the score although some change should have."""
        enough = [outcome for outcome in self.outcomes if outcome.n >= self.probes.fewest]
        return any(outcome.probe.expect == "down" for outcome in enough) and all(
            abs(move) < BLIND_MOVE for o in enough for p in o.pairs if (move := p.move) is not None
        )

    @property
    def notes(self) -> list[str]:
        """Sentences to read with the table."""
        said = []
        if self.left_out:
            statuses = _counted(Counter(j.status for j in self.left_out.values()))
            said.append(
                f"{len(self.left_out)} of {self.clips} clips had no score as they are ({statuses}) "
                "and are left out."
            )
        if broken := [outcome.probe.name for outcome in self.outcomes if outcome.failed]:
            said.append(f"Some changed clips got no score at all: {', '.join(broken)}.")
        if self.is_blind:
            said.append(
                "Nothing that was done to the clips moved the score: this critic does not look at "
                "them, and its yes in the rows that ask for the same means nothing."
            )
        return said

    def record(self) -> dict[str, Any]:
        """As JSON, with every clip of every probe."""
        return {
            "probes": self.probes.name,
            "models": list(self.models),
            "prompts": list(self.prompts),
            "seed": self.seed,
            "clips": self.clips,
            "left_out": [
                {"clip_id": clip_id, "status": j.status, "error": _kept(j.error)}
                for clip_id, j in self.left_out.items()
            ],
            "confidence": self.probes.confidence,
            "resamples": self.probes.resamples,
            "fewest": self.probes.fewest,
            "floor": self.probes.floor,
            "most_failed": self.probes.most_failed,
            "sound": self.counts,
            "is_blind": self.is_blind,
            "notes": self.notes,
            "seconds": round(self.seconds, 3),
            "outcomes": [outcome.record() for outcome in self.outcomes],
        }


def probe(
    critic: Judge,
    shown: Sequence[Shown],
    probes: Probes,
    seed: int = 0,
    *,
    groups: Mapping[str, str] | None = None,
    report: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> ProbeResult:
    """Judge clips as they are and after every change of `probes`.

    Clip ids must differ. `groups` names the prompt (or other kin) of clips by their id: clips of one
    group are drawn together for the intervals. `report` is told the name of what was done last and
    how many of all judgements have been made; clips that a probe leaves alone count as judged. With
    the same seed and clips the changes are the same, in whatever order the clips come.
    Raises ValueError for an id that two clips have, WorkerError where the critic loses clips.
    """
    started = time.monotonic()
    among = ClipSet(shown, seed)
    done, total = 0, len(shown) * (1 + len(probes.probes))
    baseline: list[Judgement] = []
    pairs: dict[str, list[Pair]] = {p.name: [] for p in probes.probes}
    alone: Counter[str] = Counter()
    for start in range(0, len(shown), CLIPS_AT_ONCE):
        clips = shown[start : start + CLIPS_AT_ONCE]
        judged = _judge(critic, clips)
        baseline += judged
        done += len(clips)
        report("as they are", done, total)
        scored = [(c, j) for c, j in zip(clips, judged, strict=True) if _is_scored(j)]
        for each in probes.probes:
            made = [(each.change(clip, among), before) for clip, before in scored]
            changed = [(clip, before) for clip, before in made if clip is not None]
            alone[each.name] += len(made) - len(changed)
            answers = _judge(critic, [clip for clip, _ in changed])
            pairs[each.name] += [
                Pair(clip.clip_id, before, after)
                for (clip, before), after in zip(changed, answers, strict=True)
            ]
            done += len(clips)
            report(each.name, done, total)
    return ProbeResult(
        probes,
        seed,
        len(shown),
        {c.clip_id: j for c, j in zip(shown, baseline, strict=True) if not _is_scored(j)},
        tuple(
            _outcome(p, pairs[p.name], alone[p.name], groups or {}, probes, seed)
            for p in probes.probes
        ),
        tuple(sorted({j.model for j in baseline if j.model})),
        tuple(sorted({j.prompt for j in baseline if j.prompt})),
        time.monotonic() - started,
    )


def _judge(critic: Judge, clips: Sequence[Shown]) -> list[Judgement]:
    if not clips:
        return []
    judged = critic.judge(clips)
    if len(judged) != len(clips):
        raise WorkerError(f"the critic judged {len(judged)} of {len(clips)} clips: a bug")
    return judged


def _is_scored(judgement: Judgement) -> bool:
    return judgement.status == "ok" and judgement.score is not None


def _outcome(
    probe: Probe,
    pairs: list[Pair],
    alone: int,
    groups: Mapping[str, str],
    probes: Probes,
    seed: int,
) -> Outcome:
    answered = [pair for pair in pairs if _is_scored(pair.after)]
    failed = Counter(str(pair.after.status) for pair in pairs if not _is_scored(pair.after))
    counting = answered
    if probe.expect == "down":
        counting = [p for p in answered if p.before.score and p.before.score >= probes.floor]
    # Sorted, so that the interval does not depend on the order of the clips.
    counting = sorted(counting, key=lambda pair: pair.clip_id)
    moves = np.array([pair.move for pair in counting], float)
    kin = [(pair.clip_id in groups, groups.get(pair.clip_id, pair.clip_id)) for pair in counting]
    group = np.unique([f"{named}{name}" for named, name in kin], return_inverse=True)[1]
    low, high = _interval(moves, group, probe.name, probes, seed)
    independent = int(group.max()) + 1 if len(group) else 0
    lost = failed.total() / max(1, len(pairs))
    sound, why = _verdict(probe, independent, low, high, lost, probes)
    changed = sum(pair.before.probabilities != pair.after.probabilities for pair in answered)
    if not pairs:
        why = f"no clip to change: for {probe.change.applies_to}"
    other_mode = sum(pair.before.mode != pair.after.mode for pair in counting)
    below = len(answered) - len(counting)
    said = [
        why,
        f"{below} scored below {probes.floor:g} before" if below else "",
        f"{alone} left alone: for {probe.change.applies_to}" if alone and pairs else "",
        f"no score for {_counted(failed)}" if failed else "",
        f"{other_mode} scores came from another mode of the cascade" if other_mode else "",
        "identical answers" if answered and not changed else "",
    ]
    why = "; ".join(filter(None, said))
    return Outcome(
        probe,
        tuple(pairs),
        n=len(moves),
        mean_move=float(moves.mean()) if len(moves) else None,
        low=low,
        high=high,
        moved_down=float((moves < -CLEAR_MOVE).mean()) if len(moves) else None,
        moved_up=float((moves > CLEAR_MOVE).mean()) if len(moves) else None,
        argmax_changed=sum(pair.before.argmax != pair.after.argmax for pair in counting),
        changed=changed,
        below_floor=below,
        not_applicable=alone,
        failed=dict(failed),
        sound=sound,
        why=why,
    )


def _interval(
    moves: NDArray[np.float64], group: NDArray[np.int64], name: str, probes: Probes, seed: int
) -> tuple[float | None, float | None]:
    """Percentile bootstrap of the mean, drawing whole groups of clips; needs two of them."""
    sums, counts = np.bincount(group, moves), np.bincount(group)
    if len(counts) < 2:
        return None, None
    # Of the name too: a verdict must not depend on which other probes are run.
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    dice = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    drawn = dice.integers(len(counts), size=(probes.resamples, len(counts)), dtype=np.int32)
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = (1 - probes.confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _verdict(
    probe: Probe, n: int, low: float | None, high: float | None, failed: float, probes: Probes
) -> tuple[Sound, str]:
    """Whether the interval of the mean move lies where it should, and why nothing can be said."""
    if probe.expect == "any":
        return "not asked", ""
    if failed > probes.most_failed:
        return "cannot say", "too many changed clips have no score"
    if n < probes.fewest or low is None or high is None:
        of = f" that scored {probes.floor:g} or more" if probe.expect == "down" else ""
        return "cannot say", f"{n} independent clips{of}, {probes.fewest} are needed"
    limit = probe.tolerance or probe.at_least or 0.0
    inside, outside = {
        "same": (-limit <= low and high <= limit, low > limit or high < -limit),
        "not_up": (high <= limit, low > limit),
        "down": (high <= -limit, low > -limit),
    }[probe.expect]
    if inside or outside:
        return ("yes" if inside else "no"), ""
    return "cannot say", "the interval lies on both sides of the limit: more clips are needed"


def _kept(error: str | None) -> str | None:
    return None if error is None else clean(error, _KEPT_TEXT)


def _counted(counts: Counter[Any]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
