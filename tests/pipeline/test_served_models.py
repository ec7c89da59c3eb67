"""A whole run whose VLM is behind HTTP, on a server that misbehaves on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import scene, write_video
from tests.operators.vlm.openai_server import Asked, Fault, OpenAIServer, Reply
from tests.pipeline.lakes import rows
from winnow.operators.errors import ModelUnavailable
from winnow.operators.vlm.questions import Questions
from winnow.pipeline.config import RunConfig, parse_yaml, validate
from winnow.pipeline.lake import Lake
from winnow.pipeline.policy import load_policy
from winnow.pipeline.refilter import refilter
from winnow.pipeline.run import run

CONFIG = """
name: served
policy: {policy}
isolate: false
stages:
  - stage: ingest
  - stage: split
    detector: {{kind: none}}
  - stage: filter
    label: semantic
    batch_clips: 3
    operators:
      vlm_filter: {{vlm: {vlm}}}
  - stage: transcode
  - stage: caption
    lengths: [short]
    vlm: {vlm}
  - stage: shard
"""
POLICY = """
name: strict
rules:
  - name: morphing
    reject: vlm_filter_votes['morphing'] > 0.5
  - name: unanswered
    reject: vlm_filter_status <> 'ok'
    when: vlm_filter_status <> 'error'
"""
LEVELS = {"a": 60, "b": 90, "c": 120, "d": 150, "e": 180, "f": 210}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Videos that can be told apart by their brightness alone."""
    folder = tmp_path_factory.mktemp("bright")
    for name, level in LEVELS.items():
        images = [(image // 8 + level).astype("uint8") for image in scene(level, 144, 96, 64)]
        write_video(folder / f"{name}.mp4", images)
    return folder


def brightness(asked: Asked) -> float:
    return sum(float(frame.mean()) for frame in asked.frames) / len(asked.frames)


def answer(asked: Asked) -> str | Reply:
    """Clips above level 170 morph; a caption tells the brightness. Later requests overtake."""
    level = brightness(asked)
    delay = 0.05 * (3 - asked.number % 4)
    if "short" in asked.user and "vanish" not in asked.user:
        return Reply(
            json.dumps({"short": f"a surface of level {level:.0f} in daylight"}), delay_s=delay
        )
    questions = Questions.read("generated")
    said: dict[str, str] = {q.name: "no" for q in questions.questions}
    said |= {c.name: c.choices[0] for c in questions.classes}
    said["morphing"] = "yes" if level > 170 else "no"
    return Reply(json.dumps(said | {"evidence": ""}), delay_s=delay)


def config(server: OpenAIServer, policy: Path, **vlm: object) -> RunConfig:
    settings = {"kind": "openai", "base_url": server.base_url, "model": "tiny-vlm", "pause_s": 0.01,
                "timeout_s": 5, "concurrency": 4, "tries": 9, **vlm}  # fmt: skip
    text = CONFIG.format(policy=policy, vlm=json.dumps(settings))
    return validate(RunConfig, parse_yaml(text, "test"), "test")


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "strict.yaml"
    path.write_text(POLICY)
    return path


def test_every_answer_lands_on_its_own_clip_whatever_the_server_does(folder, policy, tmp_path):
    faults = [
        Fault("status", 429, headers={"Retry-After": "0.05"}), Fault("status", 500), None,
        Fault("cut"), Fault("broken"), Reply("[]"), Fault("reset"), Fault("empty"),
        Reply("it is fine", header_id="winnow-" + "f" * 32),
    ]  # fmt: skip
    lake = Lake(str(tmp_path / "lake"))
    with OpenAIServer(answer, faults=faults) as server:
        result = run(config(server, policy), str(folder), lake)
        assert server.most_in_flight <= 4
    assert result.ledger.balanced
    decided = rows(lake, "SELECT uri, verdict, reasons, vlm_filter_status, "
                         "vlm_filter_votes['morphing'] FROM clips_decided")  # fmt: skip
    found = {uri[-5]: rest for uri, *rest in decided}
    # One clip got an answer that is no object as asked for: that is said, and is no pass and no fail.
    unparsed = [name for name, rest in found.items() if rest[2] == "unparsed"]
    assert len(unparsed) == 1
    for name, (verdict, reasons, status, vote) in found.items():
        if name in unparsed:
            assert (verdict, vote) == ("reject", None)
            assert "unanswered" in reasons
        else:
            assert status == "ok"
            morphs = LEVELS[name] > 170
            assert (verdict, vote) == (("reject", 1.0) if morphs else ("keep", 0.0))
    captions = rows(lake, """
        SELECT s.uri, c.text, c.window_number FROM captions c JOIN clips USING (clip_id)
        JOIN sources s ON s.source_id = clips.source_id""")  # fmt: skip
    assert len(captions) == 2 * sum(rest[0] == "keep" for rest in found.values())
    for uri, text, _ in captions:
        level = int(text.split("level ")[1].split()[0])
        assert abs(level - LEVELS[uri[-5]] - 15) < 8, f"{uri} is not of level {level}"
    assert refilter(lake, load_policy(str(policy)), dry_run=True).changed == 0


def test_what_the_budget_leaves_unasked_is_an_error_and_no_pass(folder, policy, tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    with OpenAIServer(answer) as server:
        result = run(config(server, policy, budget_requests=3), str(folder), lake)
        assert len(server.asked) <= 6, "three for the filter, three for captions"
    assert result.ledger.verdicts.get("error", 0) == 3
    errors = rows(lake, "SELECT vlm_filter_error FROM clips_decided WHERE verdict = 'error'")
    assert all("budget" in error for (error,) in errors)


def test_a_server_that_refuses_all_stops_the_run_and_a_rerun_finishes_it(folder, policy, tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    with OpenAIServer(lambda _: Fault("status", 401)) as server:
        with pytest.raises(ModelUnavailable, match="OPENAI_API_KEY"):
            run(config(server, policy), str(folder), lake)
        assert rows(lake, "SELECT count(*) FROM clips") == [(0,)]
    with OpenAIServer(answer) as server:
        result = run(config(server, policy), str(folder), lake)
    assert result.ledger.sources == {"done": len(LEVELS)}
    assert result.ledger.verdicts == {"keep": 4, "reject": 2}
