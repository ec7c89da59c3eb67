"""The critic's evaluation, comparison and scoring, end to end with a tiny model and real decoding."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.conftest import scene, write_video
from tests.operators.vlm.openai_server import Asked, Fault, OpenAIServer, Reply
from tests.tiny_vlm import vlm_models_file
from winnow.operators.critic.judgement import expectation
from winnow.operators.critic.settings import CriticSettings
from winnow.operators.errors import ConfigError, MediaError, WorkerError
from winnow.operators.models import Models
from winnow.operators.settings import validate
from winnow.pipeline.critic import evaluate as evaluating
from winnow.pipeline.critic.commands import critic_app
from winnow.pipeline.critic.compare import compare
from winnow.pipeline.critic.datasets import load_dataset
from winnow.pipeline.critic.decoding import Decoders
from winnow.pipeline.critic.evaluate import Progress, evaluate
from winnow.pipeline.critic.figures import figures
from winnow.pipeline.critic.report import examples, link, render
from winnow.pipeline.critic.results import Line, Record, read_lines
from winnow.pipeline.critic.seeds import seeds

SMALL = {"fps": 4.0, "pixels": 2**16, "frame_pixels": 2**12}
TINY = {"vlm": {"kind": "transformers", "model": "qwen3-vl-2b", "device": "cpu"}, **SMALL}
HEADER = ["video", "pc", "caption", "model_name", "action", "is_hard"]
TRUTHS = (1, 2, 3, 4, 5, 4, 3, 2, 4, 5)
HOSTILE = "</style><script>alert(1)</script><img src=https://evil.example/x.png onerror=alert(2)>"


def settings(**changes) -> CriticSettings:
    return validate(CriticSettings, TINY | changes, "test")


def served(server: OpenAIServer, **changes) -> CriticSettings:
    vlm = {"kind": "openai", "base_url": server.base_url, "model": "m", "pause_s": 0.01, "tries": 1}
    return validate(CriticSettings, {"vlm": vlm, **SMALL} | changes, "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Ten videos that differ in brightness, one that is none, one that is not there, one unrated."""
    folder = tmp_path_factory.mktemp("critic")
    rows = []
    for n, truth in enumerate(TRUTHS):
        images = [(image // 8 + 20 * n + 10).astype("uint8") for image in scene(n, 16, 96, 64)]
        write_video(folder / f"v{n}.mp4", images, fps=8)
        caption = f"prompt {n // 2}" if n else HOSTILE
        rows.append([f"v{n}.mp4", truth, caption, "Wan" if n % 2 else "Sora", f"a{n % 3}", n % 2])
    (folder / "broken.mp4").write_bytes((folder / "v0.mp4").read_bytes()[:600])
    write_video(folder / "unrated.mp4", scene(77, 16, 96, 64), fps=8)
    rows += [["broken.mp4", 3, "broken", "Sora", "a1", 0], ["gone.mp4", 4, "gone", "Sora", "a1", 0],
             ["unrated.mp4", "", "unrated", "Sora", "a1", 0]]  # fmt: skip
    write_table(folder / "data.csv", rows)
    vlm_models_file(folder)
    return folder


def write_table(path: Path, rows: list[list]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return path


@pytest.fixture(scope="module")
def models(folder) -> Models:
    return Models.read(str(folder / "models.yaml"))


@pytest.fixture(scope="module")
def dataset(folder):
    return load_dataset(str(folder / "data.csv"), fetch=False)


@pytest.fixture(scope="module")
def whole(folder, dataset, models) -> Path:
    """An evaluation that nothing interrupted."""
    out = folder / "whole"
    evaluate(dataset, settings(), models, out, decoders=0)
    return out


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def measured(out: Path) -> dict:
    """What must not depend on how often the evaluation was interrupted."""
    content = results(out)
    return {key: content[key] for key in content if key not in ("speed", "versions")}


def assert_close(one, other, where: str = "") -> None:
    """Alike but for the last bits of float32, which differ between processes."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_close(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for n, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_close(a, b, f"{where}[{n}]")
    else:
        close = pytest.approx(other, abs=1e-5) if isinstance(other, float) else other
        assert one == close, where


def by_file(out: Path) -> dict[str, Line]:
    return {Path(line.uri).name: line for line in read_lines(out)}


# --- what is counted -------------------------------------------------------------------------------


def test_every_rated_video_is_in_the_figures_whatever_became_of_it(whole):
    """Fault d of the published scripts: what has no score dropped out of the accuracy."""
    found = results(whole)
    assert found["coverage"]["failures"] == {"decode": 1, "download": 1}
    assert found["coverage"]["judged"] == 10
    assert found["coverage"]["chosen"] == 12
    assert found["coverage"]["without_truth"] == 1
    hits = sum(line.argmax == line.truth for line in read_lines(whole))
    assert found["metrics"]["accuracy"] == pytest.approx(hits / 12)
    assert found["metrics"]["accuracy_of_judged"] == pytest.approx(hits / 10)
    lines = by_file(whole)
    assert lines["gone.mp4"].status == "download"
    assert lines["broken.mp4"].status == "decode"
    for line in read_lines(whole):
        if line.status == "ok":
            assert line.score == pytest.approx(expectation(line.probabilities), abs=1e-12)
            assert (line.mode, line.frames, line.fps) == ("direct", 8, pytest.approx(4.0))
    assert {one["label"] for one in found["generators"]} == {"Sora", "Wan"}
    assert [(one["label"], one["n"]) for one in found["hard"]] == [("hard", 5), ("other", 7)]
    assert found["baselines"]["constant_4"]["accuracy"] == pytest.approx(4 / 12)
    assert found["prompt"] == settings().prompt.identity


def test_unparsed_refused_and_failed_are_misses_and_not_scores(folder, dataset, models, tmp_path):
    """Fault d, for what the critic says: a trace without a score, a refusal, a server's error."""

    def answer(asked: Asked) -> str | Reply | Fault:
        level = brightness(asked)
        if level < 60:
            return "It might be a 3 or a 4, who knows."
        if level < 100:
            return Reply(None, refusal="I cannot help with that")
        return Fault("status", 400, "no such thing") if level < 140 else "<think>fine</think>\n4"

    with OpenAIServer(answer) as server:
        asked = served(server, mode="reasoning", samples=1)
        done = evaluate(dataset, asked, models, tmp_path / "out", decoders=0)
    failures = done.results["coverage"]["failures"]
    assert failures.pop("download") == failures.pop("decode") == 1
    assert set(failures) == {"unparsed", "refused", "error"}
    judged = [line for line in read_lines(tmp_path / "out") if line.status == "ok"]
    assert sum(failures.values()) + len(judged) == 10
    hits = sum(line.truth == 4 for line in judged)
    assert done.results["metrics"]["accuracy"] == pytest.approx(hits / 12)
    assert all(line.score == 4 and "fine" in line.trace for line in judged)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "who knows" in page
    # What the critic said stays; what the server owed is asked for again.
    before, status = len(server.asked), dict(failures)
    with OpenAIServer(lambda asked: "2") as server:
        again = replace_address(asked, server)
        done = evaluate(dataset, again, models, tmp_path / "out", decoders=0)
        assert len(server.asked) == status["error"] < before
    assert "error" not in done.results["coverage"]["failures"]
    assert done.results["coverage"]["failures"]["unparsed"] == status["unparsed"]


def replace_address(asked: CriticSettings, server: OpenAIServer) -> CriticSettings:
    vlm = asked.vlm.model_copy(update={"base_url": server.base_url})
    return asked.model_copy(update={"vlm": vlm})


def brightness(asked: Asked) -> float:
    return float(np.mean([frame.mean() for frame in asked.frames]))


def test_a_server_that_answers_nothing_stops_the_evaluation(
    folder, dataset, models, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluating, "GIVE_UP", 4)
    with OpenAIServer(lambda asked: Fault("status", 400, "no GPU")) as server:
        with pytest.raises(WorkerError, match=r"none of the first 4 videos.*no GPU"):
            evaluate(dataset, served(server), models, tmp_path / "out", decoders=0, batch=2)
        assert len(server.asked) == 4
    assert not (tmp_path / "out" / "results.json").exists()


def test_equal_results_through_a_server_with_logprobs(whole, dataset, models, tmp_path):
    """The server gives the probabilities that the local model has for the frames that it is sent."""
    local = [line for line in read_lines(whole) if line.status == "ok"]
    levels = {int(Path(line.uri).stem[1:]) * 20 + 26: line for line in local}

    def answer(asked: Asked) -> Reply:
        line = levels[min(levels, key=lambda level: abs(level - brightness(asked)))]
        within = 1 - line.leaked
        odds = {str(n): p * within for n, p in enumerate(line.probabilities, 1)}
        # Answers overtake each other.
        return Reply(
            "2", first_token={**odds, "The": line.leaked}, delay_s=0.03 * (asked.number % 3)
        )

    with OpenAIServer(answer) as server:
        out = tmp_path / "out"
        evaluate(dataset, served(server), models, out, decoders=0)
    for here, there in zip(read_lines(whole), read_lines(out), strict=True):
        assert here.example_id == there.example_id
        if here.status == "ok":
            assert there.probabilities == pytest.approx(here.probabilities, abs=1e-9)
    one, other = results(whole)["metrics"], results(out)["metrics"]
    for name in ("accuracy", "mae", "pearson", "spearman", "kappa", "rps"):
        assert other[name] == pytest.approx(one[name], abs=1e-9)
    assert compare(whole, out)["mcnemar"]["p_value"] == 1.0


@pytest.mark.real
def test_the_example_files_of_videophy2(real_videos, models, tmp_path):
    """The published files of its own judge, with the physics scores that it gave them."""
    scores = {"jetski": 4, "streamer": 5, "leaf_blower_is": 4, "Syrup": 5, "fold_a_map": 4,
              "paint_roller": 4, "hedge_trimmer": 4, "canoeist": 4}  # fmt: skip
    videos = sorted((real_videos / "generated" / "videophy2").glob("*.mp4"))
    rows = [
        [video.name, truth, video.stem.replace("_", " "), "CogVideoX-5B", name, 0]
        for name, truth in scores.items()
        for video in videos
        if name in video.name
    ]
    rows += [[video.name, "", "", "", "", ""] for video in videos if "seamstress" in video.name]
    table = write_table(tmp_path / "videophy2.csv", rows)
    done = evaluate(
        load_dataset(str(table), videos=videos[0].parent, fetch=False),
        settings(fps=2.0),
        models,
        tmp_path / "out",
    )
    assert done.results["coverage"]["judged"] == 8 == done.results["coverage"]["chosen"]
    assert done.results["coverage"]["without_truth"] == 1
    assert done.results["metrics"]["truth_counts"] == [0, 0, 0, 6, 2]
    assert done.results["baselines"]["constant_4"]["accuracy"] == pytest.approx(6 / 8)
    assert done.results["metrics"]["bad"]["auroc"] is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 8


# --- several videos of one prompt ------------------------------------------------------------------


def line(example_id: str, truth: float, score: float | None, **more) -> Line:
    """A line whose probabilities have that expectation."""
    known = {"uri": f"{example_id}.mp4", "video": None, "caption": None, "group": "g",
             "generator": "Wan", "action": None, "is_hard": None, "status": "unparsed"}  # fmt: skip
    if score is not None:
        low = min(int(score), 4)
        odds = [0.0] * 5
        odds[low - 1], odds[low] = low + 1 - score, score - low
        known |= {"status": "ok", "probabilities": tuple(odds), "score": score, "entropy": 0.0,
                  "argmax": int(np.argmax(odds)) + 1}  # fmt: skip
    return Line(example_id=example_id, truth=truth, **(known | more))


def test_best_of_n_picks_a_video_and_never_scores_the_mean():
    """Fault h: the scores of five seeds were averaged where the best was to be selected."""
    lines = [line("a", 2, 2.0), line("b", 5, 4.5), line("c", 3, 3.0), line("alone", 4, 4.0, group="h"),
             line("other", 1, 5.0, generator="Sora")]  # fmt: skip
    found = seeds(lines)
    (group,) = found["each"]
    assert group["picked"] == ["b"]
    assert (group["score_best"], group["score_mean"]) == (4.5, pytest.approx(9.5 / 3))
    assert (found["truth_of_pick"], found["truth_mean"]) == (5, pytest.approx(10 / 3))
    # Where the critic cannot tell, it is worth what chance is.
    tied = seeds([line("a", 2, 3.0), line("b", 4, 3.0)])
    assert tied["truth_of_pick"] == tied["truth_mean"] == 3
    # A group of which a video has no score is no fair choice.
    partly = seeds([line("a", 2, 3.0), line("b", 4, None)])
    assert (partly["groups"], partly["groups_scored_wholly"]) == (1, 0)
    assert partly["truth_of_pick"] is None
    assert seeds([line("a", 2, 3.0), line("b", 4, 3.0, group="h")]) is None
    # Every video keeps its own score in all other figures.
    empty = load_empty()
    assert figures(lines, empty)["metrics"]["n"] == 5


def load_empty():
    from winnow.pipeline.critic.datasets import Dataset

    return Dataset("d", "f", ())


# --- going on --------------------------------------------------------------------------------------


def command(folder: Path, out: Path, *more: str) -> list[str]:
    arguments = [
        "evaluate", "--dataset", str(folder / "data.csv"), "--offline", "--out", str(out),
        "--model", "qwen3-vl-2b", "--models", str(folder / "models.yaml"), "--fps", "4",
        "--pixels", str(2**16), "--set", f"frame_pixels={2**12}", "--set", "vlm.device=cpu",
        "--batch", "1", "--decoders", "0", *more,
    ]  # fmt: skip
    program = "from winnow.pipeline.critic.commands import critic_app; critic_app()"
    return [sys.executable, "-c", program, *arguments]


def stopped(arguments: list[str], out: Path, sent: signal.Signals) -> tuple[int, str]:
    """Start an evaluation and stop it in the middle: its exit code, and what it said."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    lines = out / "videos.jsonl"
    deadline = time.monotonic() + 90
    # Two of the lines need no model.
    while not lines.exists() or lines.read_bytes().count(b"\n") < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(sent)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_evaluation_goes_on_to_the_same_figures(folder, dataset, models, tmp_path, sent):
    for attempt in range(4):
        out = tmp_path / f"out{attempt}"
        code, said = stopped(command(folder, out), out, sent)
        if not (out / "results.json").exists():
            break  # else it was quicker than this process: a busy machine
    lines = out / "videos.jsonl"
    assert not (out / "results.json").exists()
    done = lines.read_bytes().count(b"\n")
    assert 4 <= done < 12
    if sent == signal.SIGINT:
        assert code == 1
        assert "run the same command again to go on" in " ".join(said.split())
        assert "Traceback" not in said
    with lines.open("ab") as file:
        file.write(b'{"example_id": "torn')
    finished = evaluate(dataset, settings(), models, out, decoders=0, batch=1)
    assert finished.judged_now == 10 - (done - 1)  # the one without a video is no judgement
    undisturbed = tmp_path / "undisturbed"
    evaluate(dataset, settings(), models, undisturbed, decoders=0, batch=1)
    assert_close(measured(out), measured(undisturbed))
    ids = [json.loads(text)["example_id"] for text in lines.read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 12


def test_a_finished_evaluation_is_not_judged_again(whole, dataset, models, tmp_path):
    before = (whole / "videos.jsonl").read_bytes()
    done = evaluate(dataset, settings(), models, whole, decoders=0)
    assert done.judged_now == 0
    assert sorted((whole / "videos.jsonl").read_bytes().splitlines()) == sorted(before.splitlines())


def test_an_interrupt_keeps_what_is_judged(dataset, models, tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(dataset, settings(), models, tmp_path / "out", decoders=0, batch=1,
                 progress=Progress(stop))  # fmt: skip
    assert len(read_lines(tmp_path / "out")) == 5


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"fps": 2.0}, "fps 4.0 there, 2.0 now"), ({"mode": "reasoning"}, "mode"),
     ({"prompt": "captioned"}, "prompt"), ({"vlm": {**TINY["vlm"], "model": "qwen2.5-vl-7b"}}, "model")],
)  # fmt: skip
def test_a_folder_is_of_one_evaluation(whole, dataset, models, changed, named):
    before = (whole / "videos.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="another evaluation") as error:
        evaluate(dataset, settings(**changed), models, whole, decoders=0)
    assert named in str(error.value)
    assert "--out another folder" in str(error.value)
    assert "--restart" in str(error.value)
    assert (whole / "videos.jsonl").read_bytes() == before


def test_other_truths_are_another_evaluation(folder, whole, dataset, models):
    first, *others = dataset.examples
    other = replace(dataset, examples=(replace(first, truth=5.0), *others), fingerprint="other")
    with pytest.raises(ConfigError, match="fingerprint"):
        evaluate(other, settings(), models, whole, decoders=0)


def test_what_does_not_change_the_answer_may_change(whole, dataset, models):
    vlm = {**TINY["vlm"], "batch_pixels": 2**20}
    done = evaluate(dataset, settings(vlm=vlm, budget_requests=9), models, whole, decoders=0)
    assert done.judged_now == 0


def test_a_folder_can_be_started_anew(dataset, models, tmp_path):
    out = tmp_path / "out"
    evaluate(dataset, settings(), models, out, decoders=0)
    done = evaluate(dataset, settings(fps=2.0), models, out, decoders=0, restart=True)
    assert done.judged_now == 10
    assert {line.frames for line in read_lines(out) if line.status == "ok"} == {4}


def test_a_video_that_has_come_is_judged(folder, models, tmp_path):
    """What was missing is looked for again, and its line replaced."""
    rows = [
        ["a.mp4", 3, "a", "Wan", "x", 0],
        ["https://videos.invalid/b.mp4", 4, "b", "Wan", "x", 0],
    ]
    table = write_table(tmp_path / "data.csv", rows)
    (tmp_path / "a.mp4").write_bytes((folder / "v1.mp4").read_bytes())
    there = tmp_path / "there"
    there.mkdir()
    for expected in ("download", "ok"):
        found = load_dataset(str(table), videos=there, cache=tmp_path / "cache", fetch=False)
        done = evaluate(found, settings(), models, tmp_path / "out", decoders=0)
        assert by_file(tmp_path / "out")["b.mp4"].status == expected
        (there / "b.mp4").write_bytes((folder / "v2.mp4").read_bytes())
    assert done.judged_now == 1


def test_one_video_counts_once(dataset, models, tmp_path):
    """Fault e: duplicates, made by balancing before the split, were evaluated twice."""
    double = replace(dataset, examples=(*dataset.examples, dataset.examples[0]))
    with pytest.raises(ConfigError, match="examples twice"):
        evaluate(double, settings(), models, tmp_path / "out", decoders=0)


def test_a_data_set_without_truth_cannot_be_evaluated(dataset, models, tmp_path):
    blind = replace(dataset, examples=tuple(replace(e, truth=None) for e in dataset.examples))
    with pytest.raises(ConfigError, match="no example with a truth"):
        evaluate(blind, settings(), models, tmp_path / "out", decoders=0)


# --- the folder ------------------------------------------------------------------------------------


def test_a_damaged_folder_is_said_and_not_mended(tmp_path):
    record = Record(tmp_path, {"model": "m"})
    for n in range(3):
        record.add(line(f"{n}", 3, 3.5, caption="\udcff\u2028", notes=("a", "b")))
    record.close()
    text = (tmp_path / "videos.jsonl").read_bytes()
    assert [one.caption for one in read_lines(tmp_path)] == ["\udcff\u2028"] * 3
    first, second, third = text.splitlines(keepends=True)
    for broken, said in (
        (first + second[:40] + b"\n" + third, "line 2"),
        (first + second + first, "twice"),
        (first + b"[]\n", "line 2"),
        (first + second.replace(b'"ok"', b'"fine"'), "status"),
        (
            first + second.replace(b'"probabilities": [', b'"probabilities": [0.0, '),
            "probabilities",
        ),
    ):
        (tmp_path / "videos.jsonl").write_bytes(broken)
        with pytest.raises(ConfigError, match="damaged") as error:
            Record(tmp_path, {"model": "m"})
        assert said in str(error.value)
        assert (tmp_path / "videos.jsonl").read_bytes() == broken
    (tmp_path / "videos.jsonl").write_bytes(first + second[:40])
    with Record(tmp_path, {"model": "m"}) as record:
        assert list(record.lines) == ["0"]
    assert (tmp_path / "videos.jsonl").read_bytes() == first


def test_a_folder_has_one_writer(tmp_path):
    with Record(tmp_path, {"model": "m"}), pytest.raises(ConfigError, match="another process"):
        Record(tmp_path, {"model": "m"})
    Record(tmp_path, {"model": "m"}).close()


# --- decoding --------------------------------------------------------------------------------------


def die(what: str) -> str:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(60)
    if what == "odd":
        raise ZeroDivisionError("so it goes")
    return what


def test_a_poisonous_video_costs_itself_only():
    with Decoders(1, timeout_s=3) as children:
        waiting = {
            what: children.submit(die, what) for what in ("a", "kill", "b", "hang", "odd", "c")
        }
        kinds = {}
        for what, pending in waiting.items():
            try:
                kinds[what] = pending.result()
            except MediaError as error:
                kinds[what] = error.kind
    assert kinds == {
        "a": "a", "kill": "crashed", "b": "b", "hang": "timeout", "odd": "internal", "c": "c",
    }  # fmt: skip


# --- comparing -------------------------------------------------------------------------------------


def write_evaluation(folder: Path, lines: list[Line], **header) -> Path:
    known = {"dataset": "d", "fingerprint": "f", "model": ["m"], "mode": "direct", "prompt": "p@1"}
    with Record(folder, known | header) as record:
        for one in lines:
            record.add(one)
    (folder / "results.json").write_text("{}")
    return folder


def judged_lines(noise: float, wrong: int = 0) -> list[Line]:
    random = np.random.default_rng(3)
    made = []
    for n in range(120):
        truth = int(random.integers(1, 6))
        score = float(np.clip(truth + random.normal(0, noise), 1, 5))
        made.append(line(f"{n:03}", truth, score if n >= wrong else None, group=f"g{n // 3}"))
    return made


def test_an_evaluation_does_not_differ_from_itself(tmp_path):
    a = write_evaluation(tmp_path / "a", judged_lines(0.5))
    found = compare(a, a)
    assert all(one["difference"] == 0 for one in found["differences"])
    assert found["mcnemar"]["p_value"] == 1.0
    assert found["verdict"].startswith("No figure differs")


def test_a_worse_critic_is_worse_with_significance(tmp_path):
    a = write_evaluation(tmp_path / "a", judged_lines(0.3))
    b = write_evaluation(tmp_path / "b", judged_lines(2.0)[::-1], model=["other"])
    found = compare(a, b)
    differences = {one["metric"]: one for one in found["differences"]}
    assert differences["accuracy"]["difference"] < 0 < differences["mae"]["difference"]
    assert differences["spearman"]["high"] < 0
    assert differences["spearman"]["p_holm"] < 0.05
    assert "accuracy -" in found["verdict"]
    assert (found["n"], found["groups"]) == (120, 40)
    # A critic that falls silent on every third video is no better for it.
    silent = compare(a, write_evaluation(tmp_path / "c", judged_lines(0.3, wrong=40)))
    assert silent["judged_by_both"] == 80
    of_all = {one["metric"]: one["difference"] for one in silent["differences"]}
    assert of_all["accuracy"] < -0.2
    assert of_all["mae"] == 0


def test_only_the_same_data_compares(tmp_path, whole):
    a = write_evaluation(tmp_path / "a", judged_lines(0.3))
    other = write_evaluation(tmp_path / "b", judged_lines(0.3), fingerprint="g", dataset="e")
    with pytest.raises(ConfigError, match="same data"):
        compare(a, other)
    changed = [replace(one, truth=6 - one.truth) for one in judged_lines(0.3)]
    with pytest.raises(ConfigError, match="another truth"):
        compare(a, write_evaluation(tmp_path / "c", changed))
    with pytest.raises(ConfigError, match="no video in common"):
        compare(a, write_evaluation(tmp_path / "d", [line("x", 3, 3.0)]))
    part = compare(a, write_evaluation(tmp_path / "e", judged_lines(0.3)[:50]))
    assert (part["n"], part["a"]["videos_of_this_one_only"]) == (50, 70)
    (a / "results.json").unlink()
    with pytest.raises(ConfigError, match="come to its end"):
        compare(a, a)


# --- the report ------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]


def test_a_report_trusts_nobody_and_loads_nothing(folder, tmp_path):
    name = 'javascript:alert(1)"><script>x</script>.mp4'.replace("/", "_")
    video = tmp_path / name
    video.write_bytes((folder / "v0.mp4").read_bytes())
    hostile = {"caption": HOSTILE, "generator": HOSTILE, "action": HOSTILE, "trace": HOSTILE,
               "notes": (HOSTILE,), "uri": HOSTILE}  # fmt: skip
    lines = [
        line("a", 5, 1.5, video=str(video), **hostile),
        line("b", 1, 4.5, video="https://evil.example/b.mp4", **hostile),
        line("c", 3, None, error=HOSTILE, **hostile),
        line("d", 3, 3.0, is_hard=True, **hostile),
    ]
    found = {"dataset": HOSTILE, "model": [HOSTILE], "prompt": HOSTILE, "mode": "direct",
             "speed": {"videos_per_s": None}, **figures(lines, load_empty())}  # fmt: skip
    found["coverage"]["problems"] = [HOSTILE]
    page = Page(render(found, lines, examples(lines), {}, tmp_path))
    assert not page.tags & {"script", "iframe", "video", "object", "link"} - {"link"}
    assert page.handlers == []
    remote = [a for a in page.addresses if not a.startswith(("#", "./", "data:"))]
    assert remote == []
    assert "./javascript%3Aalert%281%29%22%3E%3Cscript%3Ex%3C_script%3E.mp4" in page.addresses
    assert link("https://evil.example/b.mp4", tmp_path) is None


def test_the_report_shows_pictures_truth_and_trace(whole):
    page = (whole / "report.html").read_text()
    parsed = Page(page)
    assert sum(a.startswith("data:image/jpeg") for a in parsed.addresses) == 10
    assert "script" not in parsed.tags
    assert "0.401" in page
    assert "0.419" in page
    assert "its figures do not compare" in page
    assert "../v3.mp4" in parsed.addresses


# --- the command line ------------------------------------------------------------------------------


@pytest.fixture
def run(folder):
    def run(*arguments: str):
        more = ["--models", str(folder / "models.yaml"), "--model", "qwen3-vl-2b", "--fps", "4",
                "--pixels", str(2**16), "--set", "vlm.device=cpu"]  # fmt: skip
        return CliRunner().invoke(critic_app, [*arguments, *more])

    return run


def test_score_judges_what_can_be_judged(run, folder):
    files = [str(folder / name) for name in ("v1.mp4", "broken.mp4", "nowhere.mp4")]
    result = run("score", *files, "--json")
    assert result.exit_code == 0
    first, *others = json.loads(result.stdout)["videos"]
    assert (first["status"], first["mode"]) == ("ok", "direct")
    assert 1 <= first["score"] <= 5
    assert [one["status"] for one in others] == ["decode", "decode"]
    assert "no longer there" in others[1]["error"]
    assert run("score", files[1]).exit_code == 1


def test_score_shows_the_trace(folder):
    with OpenAIServer(lambda asked: "<think>The cup [bold]floats[/bold].</think>\n2") as server:
        result = CliRunner().invoke(
            critic_app,
            ["score", str(folder / "v1.mp4"), "--vlm-url", server.base_url, "--model", "m",
             "--mode", "reasoning", "--set", "samples=2", "--fps", "4"],
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "The cup [bold]floats[/bold]." in result.stdout
    assert "2.00" in result.stdout


def test_probe_and_calibrate_take_what_evaluate_takes(run, folder, tmp_path):
    result = run("probe", str(folder / "v1.mp4"), str(folder / "broken.mp4"), "--only", "frozen",
                 "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["clips"] == 1
    assert list(told["undecodable"]) == [str(folder / "broken.mp4")]
    assert [one["probe"] for one in told["outcomes"]] == ["frozen"]

    out = write_evaluation(tmp_path / "a", [
        replace(one, model="m@1", prompt="p@1", mode="direct", fps=4.0, pixels=100)
        for one in judged_lines(0.8)
    ])  # fmt: skip
    target = tmp_path / "physics.yaml"
    result = CliRunner().invoke(critic_app, ["calibrate", str(out), "-o", str(target)])
    assert result.exit_code == 0, result.output
    assert target.exists()
    assert "temperature" in result.stdout


def test_help_answers_at_once():
    program = (
        "import sys, winnow.pipeline.critic.commands\n"
        "heavy = {'torch', 'numpy', 'scipy', 'pandas', 'jinja2', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
