"""Which models there are: configs/models.yaml says where each comes from, pinned, under what licence.

Weights are never fetched while a run works: `winnow models pull` does that beforehand. Loading
reads local files only, and only safetensors or files whose SHA-256 is in the registry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from winnow.operators.errors import ConfigError, ModelUnavailable
from winnow.operators.settings import Strict, find_config, parse_yaml, validate


class Model(Strict):
    """One model of the registry."""

    name: str
    role: Literal["backbone", "head", "vlm"]
    loader: Literal["open_clip", "transformers", "torch"]
    licence: str
    hub: str | None = Field(None, description="repository on the Hugging Face hub")
    revision: str | None = Field(None, description="commit of that repository")
    url: str | None = Field(None, description="where a file that is on no hub comes from")
    files: dict[str, str | None] = Field(
        default_factory=dict,
        description="files to fetch, with SHA-256; all safetensors and configs where empty",
    )
    path: str | None = Field(None, description="a local folder that holds the files already")
    architecture: str | None = Field(None, description="open_clip's name of the architecture")
    image_size: int | None = None
    crop: bool = Field(True, description="image processor: cut out the middle, or squash")
    size_mb: int | None = Field(None, description="what there is to download")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    remote_code: bool = Field(False, description="run code of the repository: never by default")
    gated: bool = Field(False, description="the hub asks for an accepted licence and a token")
    profile_without: str = Field("cpu", description="a configuration that works without it")

    @property
    def identity(self) -> str:
        """What made a score, for the `runs` table: repository and revision."""
        return f"{self.hub or self.url or self.path}@{self.revision or 'local'}"

    def locate(self) -> Path:
        """The folder with the model's files on this machine. Raises ModelUnavailable."""
        raise ModelUnavailable(
            f"the model {self.name!r} is not on this machine: fetch it with `winnow models pull "
            f"{self.name}`, or run a profile that does without it (`--config {self.profile_without}`)"
        )


class Models(Strict):
    """The registry: the shipped models, and those of a file of your own over them."""

    models: dict[str, Model]

    @classmethod
    def read(cls, name: str = "models") -> Models:
        """The shipped registry, overlaid with the file `name`. Raises ConfigError."""
        entries: dict[str, Any] = {}
        for source in dict.fromkeys(("models", name)):
            text, origin = find_config(source)
            for key, entry in parse_yaml(text, origin).items():
                entries[key] = {"name": key, **entry}
        return validate(cls, {"models": entries}, name)

    def get(self, name: str) -> Model:
        """The model of that name. Raises ConfigError."""
        if name not in self.models:
            raise ConfigError(f"unknown model {name!r}: there are {', '.join(self.models)}")
        return self.models[name]
