"""What a critic's five probabilities are worth: a temperature, cut points, limits, kept in a file.

A judge that was never shown human ratings is mostly too sure of itself, and seldom uses the scale as
people do. Its calibration says both in few numbers, fitted on rated clips by calibration_fit.py:
- `temperature` T: probabilities become p^(1/T), renormalised (Guo et al. 2017, "On Calibration of
  Modern Neural Networks": softmax(log p / T));
- `cut_points`: four limits on their expectation that make a label 1 to 5 of it, as in an ordinal
  regression;
- `thresholds`: how high the probability of 4 or 5 must be for a share of what is kept to be so rated.

It is applied when verdicts are decided (pipeline/calibrated.py says the same in SQL), not when clips
are scored: after a new fit the lake is refiltered, and no video is looked at again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import AwareDatetime, Field, field_validator, model_validator

from winnow.operators.critic.judgement import SCORES
from winnow.operators.errors import ConfigError
from winnow.operators.settings import Strict, parse_yaml, validate

FLOOR = 1e-12
"""Probabilities below count as this one: no vote of a few samples makes a score impossible."""
TOLERANCE = 1e-3
"""Five numbers that miss the sum 1 by more are no probabilities (float32 misses it by 1e-7)."""
DIGITS = 9
"""Decimals to which a score is compared with a cut point or limit: rounding must part no equals."""
COLDEST, HOTTEST = 0.05, 100.0
LOWEST_CUT, HIGHEST_CUT = 0.5, 5.5
"""Cut points beyond the scale: the label below, or above, is never given."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
# Goes into an SQL literal and must equal what a row of the lake says: one line of text.
Identity = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]


class FittedOn(Strict):
    """The rated clips behind a calibration."""

    dataset: str = Field(description="name of the data set")
    fingerprint: str = Field(description="hash of the examples and their ratings")
    examples: int = Field(ge=1, description="rated clips with a judgement")
    groups: int = Field(ge=1, description="prompts that the clips were made from")
    counts: tuple[int, int, int, int, int] = Field(description="clips by rating, 1 to 5")


class CriticIdentity(Strict):
    """Whose probabilities these are. Others have another calibration."""

    model: Identity = Field(description="repository and revision, or the server's model name")
    prompt: Identity = Field(description="name and hash of the prompt")
    mode: Literal["direct", "reasoning"]
    fps: Finite | None = Field(None, description="median rate of the frames that were shown")
    pixels: int | None = Field(None, description="median size of one frame")

    def __str__(self) -> str:
        return f"{self.model}, prompt {self.prompt}, mode {self.mode}"


class Threshold(Strict):
    """From which probability of a rating of 4 or 5 on a clip is kept, for a wished precision."""

    precision: float = Field(gt=0, lt=1, description="share of the kept that is to be 4 or 5")
    confidence: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="of the one-sided Clopper-Pearson bound that reaches the precision; "
        "null where the plain share had to",
    )
    limit: Share | None = Field(description="clips at it or above are kept; null: out of reach")
    kept: Share = Field(0.0, description="share of the clips that is kept")
    found: Share | None = Field(None, description="precision among those of the fit")
    held_out: Share | None = Field(
        None, description="precision on clips of other prompts than the limit was chosen on"
    )
    held_out_kept: Share | None = Field(None, description="share of those clips that was kept")
    text: str = Field("", description="the same for people")

    @property
    def key(self) -> str:
        """The precision as a part of a column's name."""
        return precision_key(self.precision)


class Figures(Strict):
    """How well probabilities, scores and labels agree with the ratings."""

    nll: Finite = Field(description="mean negative log likelihood of the rating, nats")
    ece_argmax: Share = Field(
        description="calibration error of the likeliest score, ten equal bins"
    )
    ece_good: Share = Field(description="calibration error of the probability of 4 or 5")
    mae: Finite = Field(description="mean distance of the expectation from the rating")
    accuracy: Share = Field(description="share of labels that equal the rating")
    kappa: Finite = Field(description="quadratic weighted kappa of the labels")


class Agreement(Strict):
    """Figures without and with the calibration; without, the label is the likeliest score."""

    before: Figures
    after: Figures = Field(description="on the clips that it was fitted on: flattering")
    held_out: Figures | None = Field(
        None, description="on clips of other prompts than it was fitted on; null: too few prompts"
    )
    folds: int = Field(0, description="parts that the prompts were divided into for `held_out`")


class Calibration(Strict):
    """A critic's calibration, as its file holds it."""

    format_version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    version: int = Field(1, ge=1, description="counts the fits of this name")
    fitted_at: AwareDatetime
    fitted_on: FittedOn
    critic: CriticIdentity
    temperature: float = Field(ge=COLDEST, le=HOTTEST)
    cut_points: tuple[Finite, Finite, Finite, Finite] = Field(
        description="an expectation at or above the k-th has the label k + 1 or more"
    )
    thresholds: tuple[Threshold, ...] = ()
    figures: Agreement
    notes: tuple[str, ...] = ()

    @field_validator("cut_points")
    @classmethod
    def _rising(cls, cuts: tuple[float, ...]) -> tuple[float, ...]:
        if list(cuts) != sorted(cuts) or not LOWEST_CUT <= cuts[0] <= cuts[-1] <= HIGHEST_CUT:
            raise ValueError(f"cut points rise and lie in {LOWEST_CUT}..{HIGHEST_CUT}")
        return cuts

    @model_validator(mode="after")
    def _one_each(self) -> Calibration:
        keys = [threshold.key for threshold in self.thresholds]
        if len(set(keys)) < len(keys):
            raise ValueError("two thresholds are for the same precision")
        return self

    def __str__(self) -> str:
        return f"{self.name} v{self.version}"


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Judgements after calibration; n rows. Where the critic gave none: NaN, and label 0."""

    probabilities: NDArray[np.float64]
    """(n, 5), of the scores 1 to 5."""
    expectation: NDArray[np.float64]
    """1..5"""
    label: NDArray[np.int64]
    """1..5 by the cut points."""
    good: NDArray[np.float64]
    """Probability of 4 or 5."""
    bad: NDArray[np.float64]
    """Probability of 1 or 2."""


def calibrated(probabilities: ArrayLike, calibration: Calibration) -> Calibrated:
    """Apply a calibration to probabilities (n, 5) of the scores 1 to 5.

    A row with NaN, with a negative number or of another sum than 1 has no judgement.
    """
    tempered = temper(probabilities, calibration.temperature)
    score = expectations(tempered)
    return Calibrated(
        tempered,
        score,
        labels(score, calibration.cut_points),
        tempered[:, 3] + tempered[:, 4],
        tempered[:, 0] + tempered[:, 1],
    )


def temper(probabilities: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """p^(1/T), renormalised, of (n, 5); rows that are no probabilities become NaN."""
    given = np.asarray(probabilities, np.float64).reshape(-1, len(SCORES))
    with np.errstate(invalid="ignore"):
        usable = (np.abs(given.sum(axis=1) - 1) < TOLERANCE) & (given.min(axis=1) >= 0)
    weights = np.maximum(np.where(usable[:, None], given, np.nan), FLOOR) ** (1 / temperature)
    tempered: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return tempered


def expectations(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of score times probability of each row, 1..5."""
    return probabilities @ np.array(SCORES, np.float64)


def labels(expectation: NDArray[np.float64], cut_points: ArrayLike) -> NDArray[np.int64]:
    """1 plus the number of cut points at or below the expectation; 0 where it is NaN."""
    with np.errstate(invalid="ignore"):
        above = expectation.round(DIGITS)[:, None] >= np.asarray(cut_points, np.float64)[None, :]
    return np.where(np.isnan(expectation), 0, 1 + above.sum(axis=1))


def precision_key(precision: float) -> str:
    """A precision in per cent as a part of a column's name: 95, 97_5."""
    return f"{precision * 100:.10g}".replace(".", "_")


def load_calibration(path: Path) -> Calibration:
    """Read a calibration from .json, .yaml or .yml. Raises ConfigError."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the calibration {path}: {error}. `winnow critic calibrate` makes one"
        ) from error
    content: Any
    if path.suffix == ".json":
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
    else:
        content = parse_yaml(text, str(path))
    return validate(Calibration, content, str(path))
