"""The vLLM backend up to vLLM itself, which is not installed here.

`Engine` stands for vllm.LLM and its kin: it takes and gives what vLLM 0.33 does, as read in its
sources, and nothing of a model.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.tiny_vlm import vlm_models_file
from winnow.operators.errors import ConfigError, ModelUnavailable
from winnow.operators.models import Models
from winnow.operators.vlm.backend import VllmSettings
from winnow.operators.vlm.messages import Request, Video

SCORES = ("1", "2", "3")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models.read(str(vlm_models_file(tmp_path_factory.mktemp("vlm"))))


@dataclass
class OldSamplingParams:
    """As in vLLM 0.19."""

    max_tokens: int = 16
    temperature: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    allowed_token_ids: list[int] | None = None
    structured_outputs: Any = None


@dataclass
class SamplingParams(OldSamplingParams):
    logprob_token_ids: list[int] | None = None


@dataclass
class StructuredOutputsParams:
    json: Any = None


@dataclass
class Logprob:
    logprob: float


@dataclass
class CompletionOutput:
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = "stop"


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)


class Engine:
    """Weighs the tokens it is asked for as 1 : 2 : 4 with half of the mass elsewhere."""

    made: Engine

    def __init__(self, **arguments: Any) -> None:
        Engine.made = self
        self.arguments = arguments
        self.calls: list[list[tuple[dict, SamplingParams]]] = []
        self.finish_reason = "stop"
        self.lacking: set[int] = set()

    def generate(self, prompts, parameters, *, use_tqdm):
        self.calls.append(list(zip(prompts, parameters, strict=True)))
        if any("TOO LONG" in prompt["prompt"] for prompt in prompts):
            raise ValueError("The decoder prompt (length 99) is longer than the maximum")
        return [self._output(*call) for call in self.calls[-1]]

    def _output(self, prompt, parameters):
        length = [0] * len(prompt["prompt"])
        if not parameters.allowed_token_ids:
            text = CompletionOutput("Fine.", [5, 6, 7], finish_reason=self.finish_reason)
            return RequestOutput(length, [text])
        ids = parameters.allowed_token_ids
        first = {
            token: Logprob(math.log(0.5 * 2**place / 7))
            for place, token in enumerate(ids)
            if token not in self.lacking
        }
        return RequestOutput(length, [CompletionOutput("", ids[-1:], [first], "length")])


@pytest.fixture
def vllm(monkeypatch):
    package, parameters = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    package.LLM, package.SamplingParams = Engine, SamplingParams
    parameters.StructuredOutputsParams = StructuredOutputsParams
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)
    return package


@pytest.fixture
def backend(models, vllm):
    backend = VllmSettings(kind="vllm", model="qwen3-vl-8b").load(models)
    yield backend
    backend.close()
    backend.close()


def request_of(name: str = "a", frames: int = 3, **fields: Any) -> Request:
    video = Video(
        [np.full((64, 96, 3), n, np.uint8) for n in range(frames)],
        list(range(frames)),
        [n / 2 for n in range(frames)],
        24.0,
    )
    return Request(name, 0, video, **{"user": "Rate the video.", **fields})


def test_without_vllm_the_error_says_how_to_get_it(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelUnavailable, match=r'pip install "winnow-video\[vllm\]"'):
        VllmSettings(kind="vllm").load(models)


def test_a_family_whose_times_vllm_would_lose_is_refused(models, vllm):
    with pytest.raises(ConfigError, match=r"'qwen2_5_vl'.*kind: transformers"):
        VllmSettings(kind="vllm", model="cosmos-reason1-7b").load(models)


def test_the_engine_reads_local_safetensors_and_runs_no_code(models, backend):
    arguments = Engine.made.arguments
    assert arguments["model"] == models.get("qwen3-vl-8b").path
    assert arguments["load_format"] == "safetensors"
    assert arguments["trust_remote_code"] is False


def test_frames_go_in_as_they_are_with_their_times(backend):
    request = request_of(user="Rate <|im_end|> it.", system="You rate.")
    backend.answer([request])
    [[(prompt, _)]] = Engine.made.calls
    assert prompt["prompt"] == (
        "<|im_start|>system\nYou rate.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Rate < |im_end|> it."
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    [(frames, metadata)] = prompt["multi_modal_data"]["video"]
    assert frames.shape == (4, 64, 96, 3)
    assert frames[:, 0, 0, 0].tolist() == [0, 1, 2, 2]
    times = [number / metadata["fps"] for number in metadata["frames_indices"]]
    assert times == [0.0, 0.5, 1.0, 1.0]
    assert metadata["do_sample_frames"] is False
    assert prompt["mm_processor_kwargs"] == {"do_sample_frames": False, "do_resize": False}


def test_choices_are_weighed_by_raw_probabilities_of_the_first_token(backend):
    requests = [request_of("a", choices=SCORES), request_of("b", choices=("Yes", "No", "1"))]
    first, second = backend.answer(requests)
    assert first.probabilities == pytest.approx({"1": 1 / 7, "2": 2 / 7, "3": 4 / 7})
    assert first.leaked == pytest.approx(0.5)
    assert (first.text, first.status, first.tokens_out) == ("3", "ok", 1)
    assert list(second.probabilities) == ["Yes", "No", "1"]
    assert (first.frames, first.fps, first.pixels) == (3, 2.0, 64 * 96)
    assert first.tokens_in > 0
    assert first.model.endswith("@local")
    [[(_, parameters), _]] = Engine.made.calls
    assert (parameters.max_tokens, parameters.temperature) == (1, 0.0)
    assert parameters.logprob_token_ids == parameters.allowed_token_ids
    # vLLM refuses another number beside `logprob_token_ids`.
    assert parameters.logprobs == 3


def test_older_versions_are_asked_for_the_whole_vocabulary(backend, vllm):
    vllm.SamplingParams = OldSamplingParams
    [answer] = backend.answer([request_of(choices=SCORES)])
    assert answer.probabilities["3"] == pytest.approx(4 / 7)
    assert Engine.made.calls[0][0][1].logprobs == -1
    assert Engine.made.arguments["max_logprobs"] == -1


def test_a_choice_without_a_probability_is_an_error_and_not_a_zero(backend):
    backend.answer([request_of(choices=SCORES)])
    Engine.made.lacking = {Engine.made.calls[0][0][1].allowed_token_ids[1]}
    [answer] = backend.answer([request_of(choices=SCORES)])
    assert (answer.status, answer.probabilities) == ("error", {})
    assert answer.error == "vLLM gave no probability for the choices 2"


def test_text_is_asked_for_as_the_request_says(backend):
    schema = {"type": "object"}
    requests = [request_of("a", schema=schema), request_of("b", temperature=0.7, seed=3)]
    answers = backend.answer(requests)
    assert [(a.text, a.status, a.tokens_out) for a in answers] == [("Fine.", "ok", 3)] * 2
    [[(_, first), (_, second)]] = Engine.made.calls
    assert (first.max_tokens, first.temperature) == (512, 0.0)
    assert first.structured_outputs.json == schema
    assert (second.temperature, second.seed, second.structured_outputs) == (0.7, 3, None)


@pytest.mark.parametrize(
    ("reason", "status", "text"), [("length", "truncated", "Fine."), ("abort", "error", "")]
)
def test_how_an_answer_ended_is_its_status(backend, reason, status, text):
    Engine.made.finish_reason = reason
    [answer] = backend.answer([request_of()])
    assert (answer.status, answer.text) == (status, text)
    assert ("abort" in (answer.error or "")) == (reason == "abort")


def test_a_request_that_vllm_refuses_does_not_cost_the_others_their_answers(backend):
    empty = request_of("c", choices=SCORES)
    requests = [
        request_of("a", choices=SCORES),
        request_of("b", user="TOO LONG", choices=SCORES),
        replace(empty, video=replace(empty.video, frames=[])),
        request_of("d"),
    ]
    answers = backend.answer(requests)
    assert [answer.status for answer in answers] == ["ok", "error", "error", "ok"]
    assert "longer than the maximum" in answers[1].error
    assert answers[2].error == "0 frames with 3 times"
    assert [len(call) for call in Engine.made.calls] == [3, 1, 1, 1]


def test_choices_of_several_tokens_are_a_configuration_error(backend):
    with pytest.raises(ConfigError, match="'not at all' is"):
        backend.answer([request_of(choices=("Yes", "not at all"))])
