"""VLMs of the Qwen3-VL family in this process, by vLLM, which batches on its own.

vLLM is an optional extra. Written from the sources of vLLM 0.33.0 and 0.19.0; Qwen3-VL needs 0.11.
The Qwen2.5-VL family is left to the transformers backend: vLLM does not hand its processor the
times of frames that were sampled beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from winnow.operators.errors import ConfigError, ModelUnavailable
from winnow.operators.models import Models
from winnow.operators.vlm.backend import Backend, VllmSettings
from winnow.operators.vlm.chat import chat_text, footage
from winnow.operators.vlm.choices import choice_tokens, weigh
from winnow.operators.vlm.messages import Answer, Request
from winnow.operators.vlm.weights import Processor, empty_cache, find, load_processor


def load(settings: VllmSettings, models: Models) -> Backend:
    """Start vLLM's engine in this process.

    Raises ModelUnavailable where vLLM or the model's files are missing, ConfigError where the model
    is of another family.
    """
    entry = find(settings.model, models)
    try:
        from vllm import LLM
    except ImportError as error:
        raise ModelUnavailable(
            f"the backend vllm is not installed here ({error}): `pip install "
            '"winnow-video[vllm]"` on a machine with CUDA, or use `kind: transformers`'
        ) from error
    folder = entry.locate()
    processor = load_processor(entry, folder)
    if not processor.family.startswith("qwen3_vl"):
        raise ConfigError(
            f"the model {entry.name!r} is of the family {processor.family!r}: the backend vllm "
            "takes Qwen3-VL models; use `kind: transformers`"
        )
    engine = LLM(
        model=str(folder),
        dtype=settings.dtype if settings.dtype != "auto" else entry.dtype,
        max_model_len=settings.max_model_len,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        limit_mm_per_prompt={"image": 0, "video": 1},
        load_format="safetensors",
        max_logprobs=-1,
        trust_remote_code=entry.remote_code,
    )
    return VllmBackend(engine, processor, entry.identity)


class VllmBackend(Backend):
    """Hands all requests to vLLM at once.

    An answer's `seconds` are its share of the time of all. Raises ConfigError where a choice is not
    one token; what vLLM raises when its engine has died is passed on.
    """

    def __init__(self, engine: Any, processor: Processor, identity: str) -> None:
        self._engine = engine
        self._processor = processor
        self._identity = identity

    def close(self) -> None:
        """Stop the engine. May be called twice."""
        self._engine = None
        empty_cache()

    def _answer(self, requests: Sequence[Request]) -> list[Answer]:
        encode = self._processor.tokenizer.encode
        tokens = {
            choices: choice_tokens(choices, lambda text: encode(text, add_special_tokens=False))
            for choices in {request.choices for request in requests}
        }
        answers = [self._blank(request) for request in requests]
        prompts: dict[int, dict[str, Any]] = {}
        for place, request in enumerate(requests):
            try:
                prompts[place] = prompt(request, self._processor)
            except ValueError as error:
                answers[place].error = str(error)
        started = time.monotonic()
        outputs = self._generate(
            list(prompts.values()),
            [sampling(requests[place], tokens[requests[place].choices]) for place in prompts],
        )
        for place, output in zip(prompts, outputs, strict=True):
            answers[place].seconds = (time.monotonic() - started) / len(prompts)
            try:
                if isinstance(output, ValueError):
                    raise output
                read(output, requests[place], tokens[requests[place].choices], answers[place])
            except ValueError as error:
                answers[place].error = str(error)
        return answers

    def _generate(self, prompts: list[dict[str, Any]], parameters: list[Any]) -> list[Any]:
        """vLLM's outputs, or the ValueError that it raises for a request it cannot take."""
        if not prompts:
            return []
        try:
            outputs = self._engine.generate(prompts, parameters, use_tqdm=False)
        except ValueError as error:
            # It refuses all for the sake of one.
            if len(prompts) == 1:
                return [error]
            pairs = zip(prompts, parameters, strict=True)
            return [output for p, s in pairs for output in self._generate([p], [s])]
        return list(outputs)

    def _blank(self, request: Request) -> Answer:
        return Answer(
            request.key,
            "error",
            frames=len(request.video.frames),
            fps=request.video.fps,
            pixels=request.video.pixels,
            model=self._identity,
        )


def prompt(request: Request, processor: Processor) -> dict[str, Any]:
    """The request as vLLM takes it. Raises ValueError where its frames are no video."""
    film = footage(request.video, processor.multiple)
    metadata = {**film.metadata, "duration": film.metadata["total_num_frames"]}
    return {
        "prompt": chat_text(request, processor),
        "multi_modal_data": {"video": [(film.frames, {**metadata, "do_sample_frames": False})]},
        "mm_processor_kwargs": {"do_sample_frames": False, "do_resize": False},
    }


def sampling(request: Request, tokens: Sequence[int]) -> Any:
    """vLLM's SamplingParams; the checkpoint's own temperature and penalties play no part.

    Log-probabilities are those before any constraint (vLLM's `raw_logprobs`), which is what tells
    the mass outside the choices.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if request.choices:
        weighed: dict[str, Any] = {"logprobs": -1}
        # Newer than vLLM 0.19; before, the whole vocabulary comes back.
        if hasattr(SamplingParams, "logprob_token_ids"):
            weighed = {"logprobs": len(tokens), "logprob_token_ids": list(tokens)}
        return SamplingParams(
            max_tokens=1, temperature=0.0, allowed_token_ids=list(tokens), **weighed
        )
    return SamplingParams(
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        seed=request.seed,
        structured_outputs=StructuredOutputsParams(json=request.schema) if request.schema else None,
    )


def read(output: Any, request: Request, tokens: Sequence[int], answer: Answer) -> None:
    """Fill an answer from vLLM's RequestOutput. Raises ValueError where it holds none."""
    completion = output.outputs[0]
    answer.tokens_in = len(output.prompt_token_ids)
    answer.tokens_out = len(completion.token_ids)
    if request.choices:
        first = completion.logprobs[0] if completion.logprobs else {}
        if lacking := [c for c, t in zip(request.choices, tokens, strict=True) if t not in first]:
            raise ValueError(f"vLLM gave no probability for the choices {', '.join(lacking)}")
        weighed = weigh(request.choices, [first[token].logprob for token in tokens])
        answer.text, answer.leaked = weighed.text, weighed.leaked
        answer.probabilities = weighed.probabilities
        answer.status = "ok"
        return
    if completion.finish_reason not in ("stop", "length"):
        raise ValueError(f"vLLM ended the answer: {completion.finish_reason}")
    answer.text = completion.text
    answer.status = "truncated" if completion.finish_reason == "length" else "ok"
