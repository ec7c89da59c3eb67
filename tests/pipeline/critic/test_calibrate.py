"""From the lines of an evaluation to a calibration file that a policy can name."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from winnow.operators.critic.calibration import load_calibration
from winnow.operators.critic.judgement import Judgement
from winnow.operators.errors import ConfigError, StorageError
from winnow.pipeline.critic.calibrate import calibrate, write_calibration
from winnow.pipeline.critic.metrics import Judged, measure
from winnow.pipeline.critic.results import Line


def lines(clips: int = 120, **changes) -> list[dict]:
    rng = np.random.default_rng(0)
    made = []
    for n in range(clips):
        truth = int(rng.integers(1, 6))
        weights = np.exp(-2.0 * (np.arange(1, 6) - truth - rng.normal(0, 1)) ** 2)
        made.append(
            {"example_id": f"{n:04}", "truth": truth, "group": f"prompt {n // 3}", "status": "ok",
             "probabilities": (weights / weights.sum()).tolist(), "model": "org/judge@abc",
             "prompt": "direct@12ab", "mode": "direct", "fps": 16.0, "pixels": 100_000 + n % 3,
             "uri": f"{n}.mp4", "seconds": 0.5} | changes
        )  # fmt: skip
    return made


def write(folder: Path, content: list[dict], tail: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in content)
    (folder / "videos.jsonl").write_text(text + tail)
    return folder


def test_an_evaluation_is_calibrated_with_whose_it_is_and_on_what(tmp_path):
    folder = write(tmp_path / "e", lines())
    (folder / "evaluation.json").write_text(json.dumps({"dataset": "videophy2/test"}))
    found = calibrate(folder, [0.7, 0.9], "physics")
    assert found.critic.model_dump() == {
        "model": "org/judge@abc", "prompt": "direct@12ab", "mode": "direct", "fps": 16.0,
        "pixels": 100_001,
    }  # fmt: skip
    assert (found.fitted_on.dataset, found.fitted_on.examples) == ("videophy2/test", 120)
    assert (found.fitted_on.groups, sum(found.fitted_on.counts)) == (40, 120)
    assert [threshold.precision for threshold in found.thresholds] == [0.7, 0.9]
    assert found.notes == ()
    # The file itself will do, and the order of its lines does not matter to what was used.
    other = write(tmp_path / "f", lines()[::-1])
    again = calibrate(other / "videos.jsonl", [0.7, 0.9], "physics")
    assert again.fitted_on.fingerprint == found.fitted_on.fingerprint
    assert again.temperature == pytest.approx(found.temperature, rel=1e-6)
    assert again.fitted_on.dataset == "videos"


def test_the_figures_are_those_of_an_evaluation(tmp_path):
    content = lines()
    found = calibrate(write(tmp_path / "e", content), [], "physics").figures.before
    judgements = [Judgement("ok", tuple(line["probabilities"])) for line in content]
    truth = np.array([line["truth"] for line in content], float)
    measured = measure(truth, Judged.of(judgements))
    assert found.ece_argmax == pytest.approx(measured.ece_argmax, abs=1e-9)
    assert found.ece_good == pytest.approx(measured.ece_good, abs=1e-9)
    assert found.mae == pytest.approx(measured.mae, abs=1e-9)
    assert found.accuracy == pytest.approx(measured.accuracy, abs=1e-9)
    assert found.kappa == pytest.approx(measured.kappa, abs=1e-9)


def test_what_has_no_judgement_is_left_out_and_counted(tmp_path):
    sound = lines()
    failed = [
        line | {"example_id": f"x{n}", "status": status, "probabilities": None, "model": None,
                "prompt": None, "mode": None}
        for n, (line, status) in enumerate(
            zip(lines(3), ("unparsed", "unparsed", "download"), strict=True))
    ]  # fmt: skip
    unrated = sound[0] | {"example_id": "y", "truth": None}
    found = calibrate(write(tmp_path / "e", [*failed, *sound, unrated]), [0.7], "physics")
    assert found.fitted_on.examples == 120
    assert found.notes == (
        "4 of 124 videos are in no figure here: 2 unparsed, 1 download, 1 without a rating",
    )
    with pytest.raises(ConfigError, match="no judged video with a rating: 2 unparsed, 1 download"):
        calibrate(write(tmp_path / "f", failed), [0.7], "physics")


def test_a_line_that_was_not_finished_is_no_line(tmp_path):
    whole = calibrate(write(tmp_path / "a", lines()), [], "p")
    torn = calibrate(write(tmp_path / "b", lines(), '{"example_id": "late", "tru'), [], "p")
    assert torn.fitted_on == whole.fitted_on.model_copy(update={"dataset": "videos"})


@pytest.mark.parametrize("change", [{"model": "org/judge@def"}, {"prompt": "q@1"},
                                    {"mode": "reasoning"}])  # fmt: skip
def test_judgements_of_two_critics_are_not_mixed(change, tmp_path):
    content = lines()
    content[7] |= change
    with pytest.raises(ConfigError, match=r"several models, prompts or modes \(119 by .*; 1 by"):
        calibrate(write(tmp_path / "e", content), [], "physics")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"probabilities": [0.5, 0.5]}, "line 3: probabilities"),
        ({"mode": "guess"}, "line 3: mode"),
        ({"example_id": "0000"}, "line 3: the example 0000 comes again"),
        ({"truth": "good"}, "line 3: truth"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(changed, words, tmp_path):
    content = lines()
    content[2] |= changed
    with pytest.raises(ConfigError, match=words):
        calibrate(write(tmp_path / "e", content), [], "physics")


def test_a_folder_without_an_evaluation_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="winnow critic evaluate"):
        calibrate(tmp_path, [], "physics")
    with pytest.raises(ConfigError, match="it is empty"):
        calibrate(write(tmp_path / "e", []), [], "physics")
    nameless = [line | {"model": None} for line in lines()]
    with pytest.raises(ConfigError, match="model"):
        calibrate(write(tmp_path / "f", nameless), [], "physics")


def test_lines_of_an_evaluation_have_what_is_read():
    assert {"example_id", "truth", "group", "status", "probabilities", "model", "prompt", "mode",
            "fps", "pixels"} <= set(Line.__dataclass_fields__)  # fmt: skip


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_a_written_calibration_is_never_overwritten(name, tmp_path):
    folder = write(tmp_path / "e", lines())
    out = tmp_path / "fits" / name
    first = calibrate(folder, [0.7], "physics")
    assert write_calibration(first, out) == out
    before = out.read_bytes()
    assert load_calibration(out) == first
    # The same numbers need no second file, whenever they were fitted.
    assert write_calibration(calibrate(folder, [0.7], "physics"), out) == out
    second = calibrate(folder, [0.8], "physics")
    target = write_calibration(second, out)
    assert target.name == name.replace("c.", "c-v2.")
    loaded = load_calibration(target)
    assert (loaded.version, loaded.thresholds) == (2, second.thresholds)
    assert write_calibration(second, out) == target
    # Back to the first numbers is a new version: the latest is what counts.
    assert write_calibration(first, out).name == name.replace("c.", "c-v3.")
    assert out.read_bytes() == before
    assert sorted(p.name for p in out.parent.iterdir()) == sorted(
        name.replace("c.", f"c{v}.") for v in ("", "-v2", "-v3")
    )


def test_what_else_lies_there_is_left_alone(tmp_path):
    calibration = calibrate(write(tmp_path / "e", lines()), [], "physics")
    out = tmp_path / "notes.yaml"
    out.write_text("my notes")
    (tmp_path / "notes-v2.yaml").symlink_to(tmp_path / "nowhere")
    assert write_calibration(calibration, out).name == "notes-v3.yaml"
    assert out.read_text() == "my notes"
    with pytest.raises(ConfigError, match=r"ends in \.yaml"):
        write_calibration(calibration, tmp_path / "fit.txt")
    with pytest.raises(StorageError, match="cannot be written"):
        write_calibration(calibration, out / "fit.yaml")


def test_writers_at_the_same_time_do_not_lose_each_others_fits(tmp_path):
    calibration = calibrate(write(tmp_path / "e", lines()), [], "physics")
    fits = [calibration.model_copy(update={"notes": (f"fit {n}",)}) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda fit: write_calibration(fit, tmp_path / "c.yaml"), fits))
    assert len(set(written)) == 8
    notes = [load_calibration(path).notes for path in written]
    assert notes == [fit.notes for fit in fits]
    assert not list(tmp_path.glob("*.part"))
