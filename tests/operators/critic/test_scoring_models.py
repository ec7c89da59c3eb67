"""The critic on tiny models of both families: real processor, chat template, decoding and forwards."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import scene, write_video
from tests.operators.vlm.openai_server import OpenAIServer, Reply
from tests.pipeline.lakes import rows
from tests.tiny_vlm import vlm_models_file
from winnow.operators.critic.critic import Critic, Shown, show
from winnow.operators.critic.judgement import CHOICES, Judgement
from winnow.operators.critic.settings import CriticSettings
from winnow.operators.models import Models
from winnow.operators.settings import parse_yaml, validate
from winnow.operators.vlm.backend import TransformersSettings
from winnow.operators.vlm.choices import choice_tokens
from winnow.operators.vlm.messages import Request, Video
from winnow.pipeline.config import RunConfig
from winnow.pipeline.lake import Lake
from winnow.pipeline.run import run

QWEN3, QWEN2_5 = "cosmos-reason2-2b", "cosmos-reason1-7b"


@pytest.fixture(scope="module")
def models_file(tmp_path_factory):
    return vlm_models_file(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def models(models_file) -> Models:
    return Models.read(str(models_file))


@pytest.fixture(scope="module")
def backends(models):
    """The backends of both families, by the model's name."""
    names = (QWEN3, QWEN2_5)
    loaded = {n: TransformersSettings(model=n, device="cpu").load(models) for n in names}
    yield loaded
    for backend in loaded.values():
        backend.close()


def short(reasoning=False) -> dict:
    """A rubric of few tokens: the tiny tokenizer makes many of a few words."""
    return {
        "name": "short", "task": "Rate.", "criteria": [{"name": "all", "text": "physical"}],
        "anchors": list("abcde"), "question": "?", "answer": "score", "caption": "Made from:",
        "reasoning": reasoning,
    }  # fmt: skip


def settings(model=QWEN3, **changes) -> CriticSettings:
    content = {
        "vlm": {"kind": "transformers", "model": model, "device": "cpu"},
        "prompt": short(changes.get("mode") == "reasoning"), "reasoning_prompt": short(True),
        "fps": 5.0, "pixels": 2**16, "max_tokens": 6, "samples": 2, **changes,
    }  # fmt: skip
    return validate(CriticSettings, content, "test")


def blocks(clip_id, seed, seconds=1.6, side=64) -> Shown:
    """Frames of grey blocks, which JPEG keeps to the last bit; times are whole tenths of a second."""
    random = np.random.default_rng(seed)
    times = [round(0.1 + 0.2 * n, 1) for n in range(round(seconds * 5))]
    small = random.integers(0, 256, (len(times), side // 16, side // 16), np.uint8)
    frames = small.repeat(16, axis=1).repeat(16, axis=2)[..., None].repeat(3, axis=3)
    video = Video(list(frames), [round(t * 10) for t in times], times, 10.0)
    return Shown(clip_id, video, "a grey ball", seconds)


CLIPS = [blocks("a", 1), blocks("b", 2, 1.0), blocks("c", 3, 4.2), blocks("d", 4, side=96)]


def assert_equal(first: Judgement, second: Judgement, within: float) -> None:
    """In all but what differs between machines."""
    assert first.probabilities == pytest.approx(second.probabilities, abs=within)
    assert first.leaked == pytest.approx(second.leaked, abs=within)
    same = {"probabilities": None, "leaked": None, "seconds": 0.0, "model": ""}
    assert replace(first, **same) == replace(second, **same)


@pytest.mark.parametrize("model", [QWEN3, QWEN2_5])
def test_probabilities_differ_by_clip_and_not_by_batch(backends, model):
    def judge(clips) -> list[Judgement]:
        return Critic(settings(model, most_s=2.0), backends[model]).judge(clips)

    together = judge(CLIPS)
    assert [j.status for j in together] == ["ok"] * 4
    assert len({round(j.score, 6) for j in together}) == 4
    for judgement in together:
        assert sum(judgement.probabilities) == pytest.approx(1.0)
        assert 0.5 < judgement.leaked < 1.0  # of some 500 tokens five are digits
        assert judgement.model.endswith("@local")
    for clip, judgement in zip(CLIPS, together, strict=True):
        (alone,) = judge([clip])
        assert_equal(alone, judgement, 1e-5)
    backwards = judge(CLIPS[::-1])
    for first, second in zip(together, backwards[::-1], strict=True):
        assert_equal(first, second, 1e-5)


@pytest.mark.parametrize("model", [QWEN3, QWEN2_5])
def test_samples_repeat_whatever_the_batch_and_nonsense_has_no_score(backends, model):
    def judge(clips, **changes) -> list[Judgement]:
        own = settings(model, mode="reasoning", temperature=1.0, **changes)
        return Critic(own, backends[model]).judge(clips)

    together = judge(CLIPS[:2])
    (again,) = judge(CLIPS[1:2])
    assert {j.status for j in together} == {"unparsed"}
    assert together[0].score is together[0].trace is None
    assert together[1].error == again.error  # quotes what was written
    assert judge(CLIPS[1:2], seed=2)[0].error != again.error


@pytest.fixture(scope="module")
def taught(models, tmp_path_factory):
    """A backend whose model has learnt to think, and to give a dark clip a 2 and a bright one a 4."""
    folder = shutil.copytree(models.get(QWEN3).locate(), tmp_path_factory.mktemp("taught") / "vlm")
    entry = models.get(QWEN3).model_copy(update={"path": str(folder)})
    backend = TransformersSettings(model=QWEN3, device="cpu").load(Models(models={QWEN3: entry}))
    model, tokenizer = backend._weights.model, backend._weights.processor.tokenizer
    examples = []
    for clip, said in ((level("dark", 40), "<think>no\n3</think>\n2"), (level("bright", 200), "4")):
        rubric = settings(mode="reasoning").prompt
        request = Request(clip.clip_id, 0, clip.video, rubric.render(clip.caption), rubric.system)
        inputs = backend._prepare(request).inputs
        written = [*tokenizer.encode(said, add_special_tokens=False), tokenizer.eos_token_id]
        answer = torch.tensor([written])
        more = {"input_ids": answer, "attention_mask": torch.ones_like(answer),
                "mm_token_type_ids": torch.zeros_like(answer)}  # fmt: skip
        joined = {k: torch.cat([v, more[k]], 1) if k in more else v for k, v in inputs.items()}
        unasked = torch.full_like(inputs["input_ids"], -100)
        examples.append(joined | {"labels": torch.cat([unasked, answer], 1)})
    steps = torch.optim.Adam(model.parameters(), 3e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slowed down by more, on a busy machine by far
    for _ in range(200):
        loss = sum(model(**example).loss for example in examples)
        steps.zero_grad()
        loss.backward()
        steps.step()
        if loss < 0.02:
            break
    torch.set_num_threads(threads)
    yield backend
    backend.close()


def level(clip_id, brightness, seconds=1.6) -> Shown:
    clip = blocks(clip_id, 0, seconds)
    frames = [np.full_like(frame, brightness) for frame in clip.video.frames]
    return replace(clip, video=replace(clip.video, frames=frames))


def test_a_model_that_thinks_is_read_by_what_it_says_last(taught):
    own = settings(mode="reasoning", max_tokens=30, temperature=0.05, samples=3)
    dark, bright = Critic(own, taught).judge([level("dark", 40), level("bright", 200)])
    assert (dark.status, dark.samples, dark.score) == ("ok", (2, 2, 2), 2.0)
    assert dark.trace == "<think>no 3</think> 2"
    assert (bright.status, bright.samples, bright.trace) == ("ok", (4, 4, 4), "4")
    cut_off = settings(mode="reasoning", max_tokens=4, samples=1)
    (judgement,) = Critic(cut_off, taught).judge([level("dark", 40)])
    assert (judgement.status, judgement.score) == ("unparsed", None)
    assert "cut off" in judgement.error


class ServedTiny:
    """Answers of an OpenAI-compatible server, from a model in this process."""

    def __init__(self, backend) -> None:
        self.backend = backend

    def __call__(self, asked) -> Reply:
        body = asked.body
        weighed = body["max_tokens"] == 1
        (answer,) = self.backend.answer(
            [
                Request(
                    "served", 0, self.video(asked), asked.user, asked.system, body["max_tokens"],
                    body["temperature"], body.get("seed", 0), choices=CHOICES if weighed else (),
                )
            ]
        )  # fmt: skip
        if not weighed:
            return Reply(answer.text, {"ok": "stop", "truncated": "length"}[answer.status])
        assert answer.leaked is not None
        tokens = {c: p * (1 - answer.leaked) for c, p in answer.probabilities.items()}
        return Reply(answer.text, first_token={**tokens, "The": answer.leaked})

    def video(self, asked) -> Video:
        """As vLLM would make it of the request."""
        media = asked.body.get("media_io_kwargs", {}).get("video")
        if media:
            indices = media["frames_indices"]
            return Video(asked.frames, indices, [i / media["fps"] for i in indices], media["fps"])
        seconds = [float(text[1:].split()[0]) for text in asked.texts[:-1]]
        return Video(asked.frames, [round(s * 10) for s in seconds], seconds, 10.0)


@pytest.mark.parametrize("form", ["images", "video"])
@pytest.mark.parametrize("mode", ["direct", "reasoning", "cascade"])
def test_a_served_model_says_what_the_model_in_this_process_says(backends, mode, form):
    changes = {"mode": mode, "temperature": 1.0, "most_s": 2.0, "most_entropy": 0.0}
    here = Critic(settings(**changes), backends[QWEN3]).judge(CLIPS)
    with OpenAIServer(ServedTiny(backends[QWEN3])) as server:
        vlm = {"kind": "openai", "base_url": server.base_url, "model": "m", "video": form,
               "concurrency": 2}  # fmt: skip
        critic = Critic.open(settings(**changes, vlm=vlm), Models(models={}))
        try:
            there = critic.judge(CLIPS)
        finally:
            critic.close()
        asked = len(server.asked)
    assert {j.status for j in here} == {"unparsed" if mode == "reasoning" else "ok"}
    windows = len(CLIPS) + 2  # the third clip has three
    assert asked == {"direct": windows, "reasoning": 2 * windows, "cascade": 3 * windows}[mode]
    for first, second in zip(here, there, strict=True):
        assert_equal(first, second, 1e-6)


@pytest.mark.parametrize("model", [QWEN3, QWEN2_5])
def test_each_digit_is_one_token_of_both_families(models, model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.get(model).locate(), local_files_only=True)
    encode = tokenizer.encode
    tokens = choice_tokens(CHOICES, lambda text: encode(text, add_special_tokens=False))
    assert [tokenizer.decode([token]) for token in tokens] == list(CHOICES)


CONFIG = """
name: judged
policy: {policy}
models: {models}
isolate: false
stages:
  - stage: ingest
  - stage: split
    detector: {{kind: none}}
  - stage: filter
    label: critic
    batch_clips: 2
    operators:
      physics: {{critic: {critic}}}
"""
POLICY = """
name: plausible
rules:
  - name: implausible
    reject: physics_score < {threshold}
"""


def test_a_whole_run_stores_the_scores_that_single_files_get_and_decides_by_them(
    models, models_file, tmp_path
):
    videos = tmp_path / "videos"
    for seed in range(3):
        write_video(videos / f"{seed}.mp4", scene(seed, 36, 96, 64))
    content = settings(fps=4.0, frame_pixels=2**12, prompt="direct").model_dump(mode="json")
    own = validate(CriticSettings, content, "test")
    paths = sorted(videos.glob("*.mp4"))
    critic = Critic.open(own, models)
    try:
        alone = critic.judge([show(path, own, path.stem) for path in paths])
    finally:
        critic.close()
    expected = {path.name: judgement for path, judgement in zip(paths, alone, strict=True)}
    threshold = sorted(judgement.score for judgement in alone)[1]
    policy = tmp_path / "plausible.yaml"
    policy.write_text(POLICY.format(threshold=threshold + 1e-4))
    config = CONFIG.format(policy=policy, models=models_file, critic=json.dumps(content))
    lake = Lake(str(tmp_path / "lake"))
    result = run(validate(RunConfig, parse_yaml(config, "test"), "test"), str(videos), lake)
    assert result.ledger.balanced
    found = rows(lake, "SELECT uri, verdict, physics_score, physics_p1, physics_argmax, "
                       "physics_status, physics_frames, physics_prompt, physics_model, "
                       "physics_samples, physics_error FROM clips_decided")  # fmt: skip
    assert len(found) == 3
    for uri, verdict, score, p1, argmax, *facts in found:
        judgement = expected[uri.rpartition("/")[2]]
        assert score == pytest.approx(judgement.score, abs=1e-5)
        assert p1 == pytest.approx(judgement.probabilities[0], abs=1e-5)
        assert argmax == judgement.argmax
        assert facts == ["ok", 6, own.prompt.identity, judgement.model, None, None]
        assert verdict == ("keep" if judgement.score > threshold + 1e-4 else "reject")
    assert [verdict for _, verdict, *_ in found].count("keep") == 1
