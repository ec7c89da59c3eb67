"""VLMs that transformers has loaded: from local safetensors only, once per process."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from winnow.operators.device import choose_device, choose_dtype
from winnow.operators.errors import ConfigError
from winnow.operators.models import Model, Models

FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl")
"""Cosmos-Reason2 and the Cosmos 3 reasoners are qwen3_vl, Cosmos-Reason1 is qwen2_5_vl."""


@dataclass(slots=True)
class Processor:
    """What turns a request into what the model reads."""

    call: Any
    """transformers' processor."""
    family: str
    special_tokens: list[str]

    @property
    def tokenizer(self) -> Any:
        return self.call.tokenizer

    @property
    def multiple(self) -> int:
        """What the sides of a frame must be multiples of."""
        return int(self.call.video_processor.patch_size * self.call.video_processor.merge_size)


@dataclass(slots=True)
class Weights:
    """A loaded model, shared by the backends of this process."""

    model: Any
    processor: Processor
    device: str
    identity: str
    end_tokens: list[int]
    key: tuple[str, ...] = ()
    users: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held during forwards: the models keep state between them."""

    @property
    def context(self) -> int:
        """Most tokens, in and out."""
        return int(self.model.config.get_text_config().max_position_embeddings)


_loaded: dict[tuple[str, ...], Weights] = {}
_loading = threading.Lock()


def acquire(name: str, models: Models, device: str, dtype: str) -> Weights:
    """The weights of that model, loaded or already there; to be given back by `release`.

    Raises ConfigError where it is no model of the families, ModelUnavailable where its files are
    missing, incomplete or damaged.
    """
    entry = find(name, models)
    folder = entry.locate()
    device = choose_device(device)
    number_format = choose_dtype(dtype if dtype != "auto" else entry.dtype, device)
    key = (str(folder), entry.identity, device, str(number_format))
    with _loading:
        if key not in _loaded:
            _loaded[key] = _load(entry, folder, device, number_format)
            _loaded[key].key = key
        _loaded[key].users += 1
        return _loaded[key]


def release(weights: Weights) -> None:
    """Give weights back; the last user's call lets go of them."""
    with _loading:
        weights.users -= 1
        if weights.users == 0:
            _loaded.pop(weights.key, None)


def empty_cache() -> None:
    """Return freed memory to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def find(name: str, models: Models) -> Model:
    """The VLM of that name. Raises ConfigError."""
    entry = models.get(name)
    if entry.loader != "transformers":
        raise ConfigError(
            f"the model {name!r} is loaded by {entry.loader}: name a VLM, such as qwen3-vl-8b"
        )
    return entry


def load_processor(entry: Model, folder: Path) -> Processor:
    """Raises ConfigError and ModelUnavailable as `acquire` does."""
    transformers = _transformers()
    local = _local(entry)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        family = config.model_type
        if family not in FAMILIES and not entry.remote_code:
            raise ConfigError(
                f"the model {entry.name!r} is of the family {family!r}: this backend knows "
                f"{', '.join(FAMILIES)}"
            )
        processor = transformers.AutoProcessor.from_pretrained(folder, **local)
    except (OSError, ValueError) as error:
        raise entry.unavailable(f"cannot be loaded from {folder}: {error}") from error
    # transformers makes an empty tokenizer where a file of it is missing.
    tokenizer = processor.tokenizer
    if (
        tokenizer.decode(tokenizer.encode("Is it 1?", add_special_tokens=False)) != "Is it 1?"
        or tokenizer.convert_tokens_to_ids(processor.video_token) != config.video_token_id
    ):
        raise entry.unavailable(
            f"has a tokenizer that is incomplete or another model's in {folder}"
        )
    # Frames come in their final size; versions of the library differ in what they would do to them.
    processor.video_processor.do_resize = False
    processor.video_processor.cap_pixels_per_frame = False
    tokens = tokenizer.added_tokens_decoder.values()
    return Processor(processor, family, [token.content for token in tokens if token.special])


def _load(entry: Model, folder: Path, device: str, number_format: Any) -> Weights:
    from safetensors import SafetensorError

    transformers = _transformers()
    processor = load_processor(entry, folder)
    try:
        with _no_progress_bar(transformers):
            model, report = transformers.AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=number_format,
                use_safetensors=True,
                output_loading_info=True,
                **_local(entry),
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise entry.unavailable(f"cannot be loaded from {folder}: {error}") from error
    # transformers only warns of tensors that are not there, and makes them up.
    if lacking := sorted(map(str, report["missing_keys"])):
        raise entry.unavailable(
            f"is incomplete: {folder} lacks {len(lacking)} tensors, {lacking[0]} among them"
        )
    ends = model.generation_config.eos_token_id or []
    end_tokens = {*([ends] if isinstance(ends, int) else ends), processor.tokenizer.eos_token_id}
    # The checkpoint's own temperature, top-k and penalties would fill what a request leaves open.
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=sorted(end_tokens), pad_token_id=processor.tokenizer.pad_token_id
    )
    return Weights(model.to(device).eval(), processor, device, entry.identity, sorted(end_tokens))


def _transformers() -> Any:
    """The library, imported when it is needed; its types say less than its documentation."""
    import transformers

    return transformers


@contextmanager
def _no_progress_bar(transformers: Any) -> Iterator[None]:
    """Every worker's bar would run across that of the run."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _local(entry: Model) -> dict[str, Any]:
    return {"local_files_only": True, "trust_remote_code": entry.remote_code}
