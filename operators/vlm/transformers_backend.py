"""VLMs of the Qwen3-VL and Qwen2.5-VL families in this process, by Hugging Face transformers.

A request's JSON schema is not enforced here: transformers has no constrained decoding of its own,
and nobody relies on it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from winnow.operators.device import batches, halving
from winnow.operators.models import Models
from winnow.operators.vlm.backend import Backend, TransformersSettings
from winnow.operators.vlm.chat import chat_text, footage
from winnow.operators.vlm.choices import choice_tokens, weigh
from winnow.operators.vlm.messages import Answer, Request
from winnow.operators.vlm.weights import Weights, acquire, empty_cache, release


def load(settings: TransformersSettings, models: Models) -> Backend:
    """Load a model, or share the weights that this process has loaded already.

    Raises ConfigError where it is no model of these families, ModelUnavailable where its files are
    missing, incomplete or damaged.
    """
    weights = acquire(settings.model, models, settings.device, settings.dtype)
    return TransformersBackend(weights, settings.batch_pixels)


@dataclass(slots=True)
class Prepared:
    """A request as tensors, a batch of one."""

    request: Request
    inputs: dict[str, Any]
    seconds: float = 0.0
    """Time that it took so far."""

    @property
    def tokens(self) -> int:
        return int(self.inputs["input_ids"].shape[1])


class TransformersBackend(Backend):
    """Answers in batches; a request's answer does not depend on the others of its batch.

    An answer's `seconds` are its own preparation and its share of the batch's forwards. Raises
    ConfigError where a choice is not one token, and torch.AcceleratorError where the device has
    failed for good: the process must then be replaced.
    """

    def __init__(self, weights: Weights, batch_pixels: int) -> None:
        self._shared: Weights | None = weights
        self._batch_pixels = batch_pixels
        self._tokens: dict[tuple[str, ...], list[int]] = {}

    @property
    def _weights(self) -> Weights:
        if self._shared is None:
            raise RuntimeError("this backend has been closed")
        return self._shared

    def close(self) -> None:
        """Give the weights back. May be called twice."""
        if self._shared is not None:
            release(self._shared)
            self._shared = None
            empty_cache()

    def _answer(self, requests: Sequence[Request]) -> list[Answer]:
        encode = self._weights.processor.tokenizer.encode
        for choices in {r.choices for r in requests if r.choices} - self._tokens.keys():
            self._tokens[choices] = choice_tokens(
                choices, lambda text: encode(text, add_special_tokens=False)
            )
        answers: dict[int, Answer] = {}
        with self._weights.lock:
            for batch in self._prepared_batches(requests):
                ready = [place for place, item in batch.items() if isinstance(item, Prepared)]
                answers |= {p: item for p, item in batch.items() if isinstance(item, Answer)}
                items = [item for item in batch.values() if isinstance(item, Prepared)]
                answers |= zip(ready, halving(self._ask, items), strict=True)
        return [answers[place] for place in range(len(requests))]

    def _prepared_batches(
        self, requests: Sequence[Request]
    ) -> Iterator[dict[int, Prepared | Answer]]:
        """Requests by place, in batches; the next is prepared while the model has the last."""

        def prepare(places: Sequence[int]) -> dict[int, Prepared | Answer]:
            return {place: self._prepare(requests[place]) for place in places}

        with ThreadPoolExecutor(1, "prepare") as pool:
            following: Future[dict[int, Prepared | Answer]] | None = None
            for places in self._batches(requests):
                current, following = following, pool.submit(prepare, places)
                if current:
                    yield current.result()
            if following:
                yield following.result()

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Places of requests that can go through the model together."""
        kinds: dict[tuple[bool, int, int], list[int]] = {}
        for place, request in enumerate(requests):
            # A sampled answer depends on the generator's state, so it has the model to itself.
            alone = place if request.temperature > 0 and not request.choices else -1
            length = 0 if request.choices else request.max_tokens
            kinds.setdefault((bool(request.choices), alone, length), []).append(place)
        for places in kinds.values():
            yield from batches(
                places,
                lambda place: len(requests[place].video.frames) * requests[place].video.pixels,
                self._batch_pixels,
            )

    def _prepare(self, request: Request) -> Prepared | Answer:
        import torch

        started = time.monotonic()
        try:
            prepared = Prepared(request, self._inputs(request))
        except torch.AcceleratorError:
            raise
        except (RuntimeError, ValueError) as error:
            return self._failed(request, str(error), time.monotonic() - started)
        wanted = 1 if request.choices else request.max_tokens
        prepared.seconds = time.monotonic() - started
        if prepared.tokens + wanted > self._weights.context:
            why = (
                f"the request has {prepared.tokens} tokens and its answer may have {wanted}: the "
                f"model takes {self._weights.context} together"
            )
            return self._failed(request, why, prepared.seconds)
        return prepared

    def _inputs(self, request: Request) -> dict[str, Any]:
        """Raises ValueError where the request cannot be put to the model."""
        import torch

        processor = self._weights.processor
        film = footage(request.video, processor.multiple)
        text = chat_text(request, processor)
        if processor.family.startswith("qwen3_vl"):
            # Qwen3-VL was trained without this pair around the timestamps. The first versions of
            # its processor took it away and later ones leave it (vllm-project/vllm issue 46817).
            pad = processor.call.video_token
            text = text.replace(f"<|vision_start|>{pad}<|vision_end|>", pad)

        def process(device: str) -> dict[str, Any]:
            inputs = processor.call(
                text=[text],
                videos=[film.frames],
                video_metadata=[film.metadata],
                do_sample_frames=False,
                return_tensors="pt",
                device=device,
            )
            return dict(inputs)

        try:
            return process(self._weights.device)
        except torch.OutOfMemoryError:
            # The batch before this one is still there.
            return process("cpu")

    def _ask(self, items: Sequence[Prepared]) -> list[Answer]:
        """One answer each. Raises torch.OutOfMemoryError where several do not fit together."""
        import torch

        if not items:
            return []
        started = time.monotonic()
        try:
            with torch.inference_mode():
                answers = self._weigh(items) if items[0].request.choices else self._write(items)
        except torch.OutOfMemoryError as error:
            if len(items) > 1:
                raise
            answers = [self._failed(items[0].request, f"too large for the device: {error}")]
        except torch.AcceleratorError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            # One request may have spoilt the batch of the others.
            if len(items) > 1:
                return [answer for item in items for answer in self._ask([item])]
            answers = [self._failed(items[0].request, f"{type(error).__name__}: {error}")]
        share = (time.monotonic() - started) / len(items)
        for item, answer in zip(items, answers, strict=True):
            answer.seconds = item.seconds + share
        return answers

    def _weigh(self, items: Sequence[Prepared]) -> list[Answer]:
        """Choices by the logits that follow the prompt; nothing is generated."""
        import torch

        batch = collate(items, self._weights.device)
        out = self._weights.model(**batch, use_cache=False, logits_to_keep=1)
        logs = torch.log_softmax(out.logits[:, -1].float(), dim=-1)
        answers = []
        for row, item in zip(logs, items, strict=True):
            choices = item.request.choices
            try:
                weighed = weigh(choices, row[self._tokens[choices]].tolist())
            except ValueError as error:
                answers.append(self._failed(item.request, str(error)))
                continue
            answer = self._given(item, weighed.text, tokens_out=1)
            answer.probabilities, answer.leaked = weighed.probabilities, weighed.leaked
            answers.append(answer)
        return answers

    def _write(self, items: Sequence[Prepared]) -> list[Answer]:
        import torch
        import transformers

        weights, request = self._weights, items[0].request
        sampling: dict[str, Any] = {"do_sample": False}
        if request.temperature > 0:
            sampling = {"do_sample": True, "temperature": request.temperature, "top_k": 0}
        # What this leaves open is left open by the model's own configuration too (see weights.py).
        library: Any = transformers
        config = library.GenerationConfig(max_new_tokens=request.max_tokens, **sampling)
        batch = collate(items, weights.device)
        cuda = [weights.device] if weights.device.startswith("cuda") else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(request.seed)
            sequences = weights.model.generate(**batch, generation_config=config)
        answers = []
        for row, item in zip(sequences, items, strict=True):
            written = row[batch["input_ids"].shape[1] :].tolist()
            end = next((n for n, t in enumerate(written, 1) if t in weights.end_tokens), None)
            text = weights.processor.tokenizer.decode(written[:end], skip_special_tokens=True)
            answer = self._given(item, text, tokens_out=len(written[:end]))
            if end is None:
                answer.status = "truncated"
            answers.append(answer)
        return answers

    def _given(self, item: Prepared, text: str, tokens_out: int) -> Answer:
        answer = self._failed(item.request, None)
        answer.status, answer.text = "ok", text
        answer.tokens_in, answer.tokens_out = item.tokens, tokens_out
        return answer

    def _failed(self, request: Request, error: str | None, seconds: float = 0.0) -> Answer:
        return Answer(
            request.key,
            "error",
            error=error,
            frames=len(request.video.frames),
            fps=request.video.fps,
            pixels=request.video.pixels,
            model=self._weights.identity,
            seconds=seconds,
        )


def collate(items: Sequence[Prepared], device: str) -> dict[str, Any]:
    """One batch, padded on the left so that every prompt ends where its answer begins."""
    import torch

    longest = max(item.tokens for item in items)
    batch: dict[str, Any] = {}
    for name in items[0].inputs:
        parts = [item.inputs[name].to(device) for item in items]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            # Whatever token 0 is, the mask hides it.
            parts = [torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in parts]
        batch[name] = torch.cat(parts)
    return batch
