"""The interface of VLM backends, and their settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from winnow.operators.errors import WorkerError
from winnow.operators.models import Models
from winnow.operators.settings import Strict
from winnow.operators.vlm.messages import Answer, Request


class Backend(ABC):
    """Something that answers requests."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer a request, in the order of the requests.

        A request that fails has an answer of status `error`; nothing is dropped or invented.
        Raises WorkerError where an answer carries another key than its request: captions of one
        clip on another are worse than no captions.
        """
        answers = self._answer(requests)
        if [answer.key for answer in answers] != [request.key for request in requests]:
            raise WorkerError("the VLM backend gave answers that belong to other clips: a bug")
        return answers

    @abstractmethod
    def _answer(self, requests: Sequence[Request]) -> list[Answer]: ...

    def close(self) -> None:  # noqa: B027 - optional hook
        """Release connections and weights."""


class TransformersSettings(Strict):
    """A model of the registry in this process, by Hugging Face transformers."""

    kind: Literal["transformers"] = "transformers"
    model: str = "qwen3-vl-8b"
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_pixels: int = Field(
        64 * 2**20, ge=1, description="pixels of one forward; halved where memory runs out"
    )

    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def identity(self, models: Models) -> str:
        """Repository and revision."""
        return models.get(self.model).identity

    def load(self, models: Models) -> Backend:
        from winnow.operators.vlm.transformers_backend import load

        return load(self, models)


class OpenAISettings(Strict):
    """A server that speaks the OpenAI protocol: vLLM, NIM, or a hosted one."""

    kind: Literal["openai"]
    base_url: str
    model: str
    api_key_env: str = Field(
        "OPENAI_API_KEY",
        pattern="^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable of the workers that holds the key; a configuration is "
        "stored with every run and must hold none",
    )
    concurrency: int = Field(16, ge=1, description="requests under way at once")
    timeout_s: float = Field(120.0, gt=0, description="for one try")
    tries: int = Field(5, ge=1, description="for one request, with growing pauses")
    pause_s: float = Field(0.5, gt=0, description="before the second try; doubled for each further")
    budget_requests: int | None = Field(
        None, ge=1, description="most requests that this worker sends, repeated tries included"
    )
    budget_tokens: int | None = Field(
        None, ge=1, description="most tokens in and out of this worker, by what the server counts"
    )
    video: Literal["images", "video"] = Field(
        "images", description="frames as timed images, or as one video of JPEG frames (vLLM)"
    )

    @field_validator("base_url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        address = urlsplit(value)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError("must be an address such as http://localhost:8000/v1")
        if address.query or address.fragment:
            raise ValueError("must end with the path, for example in /v1")
        return value

    def models(self) -> tuple[str, ...]:
        return ()

    def identity(self, models: Models) -> str:
        """The server's name of the model: it tells no revision."""
        return self.model

    def load(self, models: Models) -> Backend:
        from winnow.operators.vlm.openai_backend import load

        return load(self)


class VllmSettings(Strict):
    """A model of the registry in this process, by vLLM (optional extra `vllm`)."""

    kind: Literal["vllm"]
    model: str = "qwen3-vl-8b"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int = Field(16384, ge=1)
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)

    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def identity(self, models: Models) -> str:
        """Repository and revision."""
        return models.get(self.model).identity

    def load(self, models: Models) -> Backend:
        from winnow.operators.vlm.vllm_backend import load

        return load(self, models)


VlmSettings = Annotated[
    TransformersSettings | OpenAISettings | VllmSettings, Field(discriminator="kind")
]
