"""Judges whose faults are known are calibrated; what comes out is checked on clips not seen."""

from datetime import UTC, datetime
from itertools import combinations_with_replacement

import numpy as np
import pytest
import scipy.special
from scipy.stats import beta
from sklearn.metrics import cohen_kappa_score

from winnow.operators.critic.calibration import (
    Calibration,
    CriticIdentity,
    calibrated,
    expectations,
    labels,
    load_calibration,
    temper,
)
from winnow.operators.critic.calibration_fit import (
    choose_limit,
    fit,
    fit_cut_points,
    fit_temperature,
    lower_bound,
    weighted_kappa,
)
from winnow.operators.errors import ConfigError

CRITIC = CriticIdentity(model="org/judge@abc", prompt="rubric 12ab", mode="direct")


def judge(clips: int, too_sure: float = 1.0, seed: int = 0, shift: float = 0.0):
    """Probabilities of a judge that is `too_sure` times as sure as it may be, and ratings.

    Without it, ratings are drawn from just these probabilities. `shift` moves the judge's scale.
    """
    rng = np.random.default_rng(seed)
    scores = np.arange(1, 6)
    worth = rng.normal(3.3, 1.2, clips)[:, None]
    honest = scipy.special.softmax(-((scores - worth) ** 2) / 1.0, axis=1)
    truth = 1 + (rng.random(clips)[:, None] > honest.cumsum(axis=1)[:, :-1]).sum(axis=1)
    said = scipy.special.softmax(-((scores - worth - shift) ** 2) * too_sure, axis=1)
    return said, truth


def prompts(clips: int, each: int = 5) -> list[str]:
    return [f"prompt {n // each}" for n in range(clips)]


def fitted(said, truth, groups=None, **more) -> Calibration:
    return fit(said, truth, groups or prompts(len(truth)), name="physics", critic=CRITIC,
               dataset="made", fingerprint="f", **more)  # fmt: skip


@pytest.mark.parametrize("too_sure", [0.5, 1.0, 2.5, 4.0])
def test_the_temperature_of_a_judge_that_is_too_sure_is_found(too_sure):
    found = fit_temperature(*judge(20_000, too_sure))
    assert found == pytest.approx(too_sure, rel=0.04)


def test_tempering_is_a_softmax_of_the_logarithms_over_t():
    said, _ = judge(500, 1.5)
    expected = scipy.special.softmax(np.log(np.maximum(said, 1e-12)) / 2.2, axis=1)
    assert temper(said, 2.2) == pytest.approx(expected, abs=1e-12)


def test_a_judge_that_rules_the_truth_out_gets_a_finite_likelihood():
    said = np.eye(5)[[0, 1, 2, 3, 4] * 20]
    truth = np.array([1, 2, 3, 4, 5] * 19 + [5, 4, 3, 2, 1])
    found = fit_temperature(said, truth)
    assert np.isfinite(found)
    right = temper(said, found)[np.arange(100), truth - 1]
    # 4 of 100 votes are wrong: so sure may a single vote be.
    assert right[:95].mean() == pytest.approx(0.96, abs=0.01)


def test_rows_that_are_no_probabilities_have_no_score_and_no_label():
    nothing = [
        [np.nan] * 5, [0.2, 0.2, 0.2, 0.2, np.nan], [1.2, -0.2, 0, 0, 0], [0.1] * 5,
        [np.inf, 0, 0, 0, 0], [0] * 5, [1] * 5,
    ]  # fmt: skip
    answer = calibrated([*nothing, [0, 0, 0, 0.5, 0.5]], fitted(*judge(300)))
    assert answer.label.tolist()[:-1] == [0] * len(nothing)
    assert np.isnan(answer.expectation[:-1]).all()
    assert np.isnan(answer.good[:-1]).all()
    assert np.isnan(answer.bad[:-1]).all()
    assert answer.label[-1] in (4, 5)
    assert answer.good[-1] > 0.9
    assert calibrated(np.zeros((0, 5)), fitted(*judge(300))).label.shape == (0,)


@pytest.mark.parametrize("seed", range(25))
def test_no_other_cut_points_have_a_higher_kappa(seed):
    rng = np.random.default_rng(seed)
    clips = int(rng.integers(5, 14))
    truth = rng.integers(1, 6, clips)
    score = np.clip(truth + rng.normal(0, 1.5, clips), 1, 5).round(1)  # with ties
    values = np.unique(score)
    edges = [0.5, *(values[1:] + values[:-1]) / 2, 5.5]
    best = max(
        weighted_kappa(truth, labels(score, cuts))
        for cuts in combinations_with_replacement(edges, 4)
    )
    cuts = fit_cut_points(score, truth)
    assert weighted_kappa(truth, labels(score, cuts)) == pytest.approx(best, abs=1e-12)
    assert list(cuts) == sorted(cuts)


def test_kappa_is_that_of_scikit_learn():
    rng = np.random.default_rng(3)
    for _ in range(30):
        truth, label = rng.integers(1, 6, (2, 40))
        expected = cohen_kappa_score(truth, label, labels=[1, 2, 3, 4, 5], weights="quadratic")
        assert weighted_kappa(truth, label) == pytest.approx(expected, abs=1e-12)


def test_cut_points_of_many_clips_undo_a_shifted_scale():
    said, truth = judge(10_000, shift=1.0)
    calibration = fitted(said, truth, prompts(10_000))
    cuts = calibration.cut_points
    assert sorted(set(cuts)) == list(cuts)
    said, truth = judge(10_000, shift=1.0, seed=1)
    after = calibrated(said, calibration).label
    assert weighted_kappa(truth, after) > weighted_kappa(truth, said.argmax(axis=1) + 1) + 0.1
    assert abs(after.mean() - truth.mean()) < 0.1


def test_the_label_of_a_judge_that_sees_nothing_is_a_constant():
    truth = np.array([4] * 60 + [5] * 20 + [3] * 20)
    score = np.full(100, 3.7)
    cuts = fit_cut_points(score, truth)
    assert set(labels(score, cuts)) == {4}
    # One that is wrong the other way round is no better.
    backwards = 6.0 - truth
    assert set(labels(backwards, fit_cut_points(backwards, truth))) == {4}


def test_a_limit_keeps_its_promise_on_other_clips():
    """One clip in ten thousand fits would be luck: many fits, each on its own clips."""
    unseen, truth_unseen = judge(40_000, 2.0, seed=999)
    missed, kept = [], []
    for seed in range(12):
        said, truth = judge(1500, 2.0, seed=seed)
        calibration = fitted(said, truth, precisions=[0.9])
        (threshold,) = calibration.thresholds
        passed = calibrated(unseen, calibration).good >= threshold.limit
        precision = (truth_unseen[passed] >= 4).mean()
        missed.append(0.9 - precision)
        kept.append(passed.mean())
        assert threshold.found >= 0.9
        assert threshold.held_out == pytest.approx(precision, abs=0.05)
        assert threshold.kept == pytest.approx(passed.mean(), abs=0.06)
    # Sure to 90 %, and the lowest of many limits: a few fits may fall short, none by much.
    assert sum(miss > 0 for miss in missed) <= 3
    assert max(missed) < 0.015
    # And it is no empty promise: of these judges' clips about a quarter can be kept.
    assert min(kept) > 0.2


def test_the_lowest_limit_that_reaches_the_precision_is_chosen():
    good = np.arange(100) / 100
    truth = np.where(np.arange(100) >= 40, 5, 1)
    chosen = choose_limit(good, truth, 0.95, None)
    # 60 good ones and three bad ones below them are 95.2 %.
    assert (chosen.kept, chosen.good) == (63, 60)
    assert 0.36 < chosen.limit < 0.37
    cautious = choose_limit(good, truth, 0.95, 0.9)
    assert cautious.limit > chosen.limit
    assert beta.ppf(0.1, cautious.good, cautious.kept - cautious.good + 1) >= 0.95


def test_clips_of_equal_probability_are_kept_together_or_not_at_all():
    good = np.array([0.9] * 50 + [0.5] * 50)
    truth = np.array([5] * 50 + [5] * 25 + [1] * 25)
    assert choose_limit(good, truth, 0.9, None).kept == 50
    everything = choose_limit(good, truth, 0.7, None)
    assert (everything.limit, everything.kept) == (0.0, 100)


def test_the_bound_is_that_of_clopper_and_pearson():
    right, kept = np.array([0.0, 45, 44, 100]), np.array([10.0, 45, 45, 130])
    expected = [0, *(beta.ppf(0.1, r, k - r + 1) for r, k in zip(right[1:], kept[1:], strict=True))]
    assert lower_bound(right, kept, 0.9) == pytest.approx(np.array(expected), abs=1e-12)
    assert lower_bound(right, kept, None).tolist() == (right / kept).tolist()


def test_a_precision_out_of_reach_is_said_and_has_no_limit():
    said, truth = judge(400)
    (within, beyond) = fitted(said, truth, precisions=[0.999, 0.6]).thresholds
    assert within.precision == 0.6
    assert within.limit is not None
    assert (beyond.limit, beyond.kept, beyond.found) == (None, 0, None)
    assert "no limit keeps clips of which 0.999" in beyond.text
    assert "400 clips" in beyond.text
    none_good = np.minimum(truth, 3)
    assert fitted(said, none_good, precisions=[0.5]).thresholds[0].limit is None


def test_calibration_improves_the_likelihood_on_prompts_that_it_did_not_see():
    figures = fitted(*judge(2000, 4.0)).figures
    assert figures.folds == 5
    assert figures.held_out.nll < figures.before.nll - 0.1
    assert figures.held_out.ece_argmax < figures.before.ece_argmax / 2
    assert figures.after.nll <= figures.held_out.nll + 1e-3


def test_held_out_clips_are_of_other_prompts():
    """Ratings that depend on the prompt alone, by chance: nothing of them can be known of others."""
    rng = np.random.default_rng(0)
    truth = np.repeat(rng.integers(1, 6, 80), 10)
    # The judge names the prompt, so to say: the score's fraction tells which.
    level = np.repeat(rng.permutation(80) / 79, 10)
    said = np.zeros((800, 5))
    said[:, 0], said[:, 4] = 1 - level, level
    groups = np.repeat([f"p{n}" for n in range(80)], 10).tolist()
    figures = fitted(said, truth, groups).figures
    assert figures.after.kappa > 0.05
    assert figures.held_out.kappa < figures.after.kappa


def test_with_a_single_prompt_nothing_can_be_held_out():
    calibration = fitted(*judge(100), groups=["one"] * 100, precisions=[0.6])
    assert calibration.figures.held_out is None
    assert calibration.figures.folds == 0
    assert calibration.thresholds[0].held_out is None


@pytest.mark.parametrize(
    ("said", "truth", "words"),
    [
        (judge(29)[0], judge(29)[1], ["29 clips", "at least 30"]),
        (judge(50)[0], np.full(50, 4), ["same rating", "4: 50"]),
        (np.full((50, 5), np.nan), judge(50)[1], ["0 clips"]),
        (judge(50)[0], np.full(50, np.nan), ["0 clips"]),
    ],
)
def test_too_little_to_fit_to_is_refused_with_what_is_needed(said, truth, words):
    with pytest.raises(ConfigError) as error:
        fitted(said, truth)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("precisions", [[0.0], [1.0], [95], [0.9, 0.9]])
def test_a_precision_is_a_share_and_given_once(precisions):
    with pytest.raises(ConfigError, match="precision"):
        fitted(*judge(100), precisions=precisions)


def test_clips_without_a_judgement_or_rating_do_not_count():
    said, truth = judge(200)
    more = np.vstack([said, np.full((20, 5), np.nan), said[:20]])
    rated = np.concatenate([truth, truth[:20], np.full(20, np.nan)]).astype(float)
    when = datetime(2026, 1, 1, tzinfo=UTC)
    groups = prompts(200)
    alone = fitted(said, truth, groups, precisions=[0.7], fitted_at=when)
    both = fitted(more, rated, groups + ["x"] * 40, precisions=[0.7], fitted_at=when)
    assert both == alone
    assert both.fitted_on.examples == 200


def test_means_of_raters_are_rounded_half_up():
    said, truth = judge(200)
    when = datetime(2026, 1, 1, tzinfo=UTC)
    means = np.clip(truth + np.where(np.arange(200) % 2, -0.5, 0.49), 1, 5)
    assert fitted(said, means, fitted_at=when) == fitted(said, truth, fitted_at=when)


def test_a_judge_that_knows_nothing_is_said_to():
    rng = np.random.default_rng(1)
    said = scipy.special.softmax(rng.normal(0, 3, (400, 5)), axis=1)
    calibration = fitted(said, rng.integers(1, 6, 400))
    assert any("next to nothing" in note for note in calibration.notes)


def test_a_file_gives_back_every_number(tmp_path):
    calibration = fitted(*judge(300, 2.3), precisions=[0.6, 0.999])
    file = tmp_path / "c.json"
    file.write_text(calibration.model_dump_json())
    assert load_calibration(file) == calibration


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cut_points": [1.0, 3.0, 2.0, 4.0]}, "rise"),
        ({"cut_points": [1.0, 2.0, 3.0, 9.0]}, "rise"),
        ({"cut_points": [1.0, 2.0, 3.0]}, "cut_points"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"format_version": 2}, "format_version"),
        ({"surprise": 1}, "surprise"),
        ({"critic": {"model": "a\nb", "prompt": "p", "mode": "direct"}}, "critic.model"),
        ({"critic": {"model": "", "prompt": "p", "mode": "direct"}}, "critic.model"),
    ],
)
def test_a_damaged_file_is_refused(change, words, tmp_path):
    import json

    content = fitted(*judge(300)).model_dump(mode="json") | change
    file = tmp_path / "c.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=words):
        load_calibration(file)


@pytest.mark.parametrize("text", ["", "[1]", "{", "a: b: c"])
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_what_is_no_calibration_is_refused(text, suffix, tmp_path):
    file = tmp_path / f"c{suffix}"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"c\."):
        load_calibration(file)
    with pytest.raises(ConfigError, match="winnow critic calibrate"):
        load_calibration(tmp_path / "missing.yaml")


def test_expectations_are_within_the_scale():
    said, _ = judge(50, 6.0)
    assert ((expectations(temper(said, 0.05)) >= 1) & (expectations(temper(said, 50)) <= 5)).all()
