"""The vision backbone: one CLIP-like model whose frame embeddings serve many heads.

A head is a batch operator that looks at these embeddings only: aesthetics, content type, match with
the prompt, the semantic vector, drift. Every sampled frame goes through the image tower once,
however many heads there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from winnow.operators.device import choose_device, choose_dtype, halving
from winnow.operators.errors import ConfigError, MeasureError
from winnow.operators.models import Model, Models
from winnow.operators.operator import (
    BatchMeasure,
    ClipView,
    FrameEmbeddings,
    Measures,
    Sampling,
    SeenClip,
    Square,
)
from winnow.operators.settings import Strict

if TYPE_CHECKING:
    import torch

WEIGHTS = "open_clip_model.safetensors"
"""The weights in a model's folder, named as open_clip saves them; no other file is loaded."""
CONFIG = "open_clip_config.json"
"""Beside them: the architecture and the normalisation of frames."""
TEXT_BATCH = 64
"""Texts of one forward."""
TEXTS_REMEMBERED = 4096
"""Text embeddings that a backbone keeps; the least recently used go first."""


class BackboneConfig(Strict):
    """Which backbone a filter stage has, and which frames it sees."""

    model: str = "clip-vit-l-14"
    rate: float = Field(2.0, gt=0, description="frames a second")
    minimum: int = Field(4, ge=1, description="least frames a clip, where it has them")
    maximum: int = Field(32, ge=1, description="most frames a clip")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_pixels: int = Field(
        128 * 224 * 224, ge=1, description="pixels of one forward; halved where memory runs out"
    )

    def sampling(self, models: Models) -> Sampling:
        """The frames to sample, as the model's image processor wants them."""
        model = models.get(self.model)
        return Sampling(
            self.rate,
            kind="rgb",
            minimum=self.minimum,
            maximum=self.maximum,
            fit=Square(_side(model), model.crop),
        )

    def load(self, models: Models) -> Backbone:
        """Load the model from local files; nothing is fetched.

        Raises ModelUnavailable where its files are missing or damaged, and ConfigError where the
        registry's entry does not describe them: another image size, another way to fit frames.
        """
        model = models.get(self.model)
        if model.role != "backbone" or model.loader != "open_clip":
            raise ConfigError(
                f"the model {self.model!r} is a {model.role} for {model.loader}: a backbone must be "
                "an entry of role `backbone` and loader `open_clip`"
            )
        return OpenClipBackbone(model, self)


class Backbone(ABC):
    """A loaded vision backbone."""

    model: str
    """Its name in the registry."""
    identity: str = ""
    """What made the embeddings: repository and revision. Two identities are two spaces."""
    dimensions: int
    logit_scale: float
    """What cosines are multiplied by before a softmax over texts."""
    frames_seen: int = 0
    """Frames that went through the image tower; one forward a sampled frame."""

    @abstractmethod
    def embed_frames(self, frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """(n, d) embeddings of length 1 of square RGB frames (side, side, 3)."""

    @abstractmethod
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, d) embeddings of length 1; texts seen before are remembered."""


class Head(BatchMeasure):
    """Measures each clip by its frame embeddings alone, and therefore apart from the others."""

    def __call__(self, clips: Sequence[SeenClip]) -> list[Measures | MeasureError]:
        return [self._answer(clip) for clip in clips]

    def _answer(self, clip: SeenClip) -> Measures | MeasureError:
        frames = clip.embeddings
        if frames is None or not len(frames.vectors):
            return MeasureError("no frame of the clip was seen")
        if not np.isfinite(frames.vectors).all():
            return MeasureError("the backbone's embeddings are not finite numbers")
        try:
            return self.measure(clip.view, frames)
        except MeasureError as error:
            return error

    @abstractmethod
    def measure(self, view: ClipView, frames: FrameEmbeddings) -> Measures:
        """Measure one clip with at least one frame. Raises MeasureError."""


class OpenClipBackbone(Backbone):
    """A CLIP or SigLIP model of open_clip.

    The folder holds the weights as `open_clip_model.safetensors`, and `open_clip_config.json` unless
    the model is a CLIP of an architecture that open_clip knows, with OpenAI's normalisation. Texts
    longer than the model's context (77 tokens for CLIP, 64 for SigLIP 2: some 50 words) are cut by
    its tokenizer: what comes after is not seen.

    On CUDA every forward has the same shape, filled up with blanks, so that an embedding does not
    depend on the batch that it came in. Where memory runs out the batch is halved for good.
    """

    def __init__(self, model: Model, config: BackboneConfig) -> None:
        import torch

        folder = model.locate()
        self.model, self.identity = model.name, model.identity
        self._device = choose_device(config.device)
        wanted = model.dtype if config.dtype == "auto" else config.dtype
        self._dtype = choose_dtype(wanted, self._device)
        source, architecture = _architecture(model, folder)
        self.network = _load(model, folder, source, self._device, self._dtype)
        preprocess = self.network.visual.preprocess_cfg
        _check_preprocess(model, preprocess)
        self._tokenize = _tokenizer(model, folder, architecture["text_cfg"])
        self._mean, self._deviation = (
            torch.tensor(preprocess[key], device=self._device).view(3, 1, 1)
            for key in ("mean", "std")
        )
        self._side = _side(model)
        self.dimensions = int(architecture["embed_dim"])
        self.logit_scale = float(self.network.logit_scale.exp())
        self._texts: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        filled = self._device.startswith("cuda")
        blank = np.zeros((self._side, self._side, 3), np.uint8)
        self._image_tower = Tower(
            self._encode_frames, config.batch_pixels // self._side**2, blank if filled else None
        )
        self._text_tower = Tower(self._encode_texts, TEXT_BATCH, "" if filled else None)

    def embed_frames(self, frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        shape = (self._side, self._side, 3)
        for frame in frames:
            if frame.shape != shape or frame.dtype != np.uint8:
                raise ValueError(f"a frame is {frame.shape} {frame.dtype}, not {shape} uint8")
        vectors = self._image_tower(frames)
        self.frames_seen += len(frames)
        return vectors.reshape(-1, self.dimensions)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = {text: self._texts[text] for text in texts if text in self._texts}
        new = [text for text in dict.fromkeys(texts) if text not in vectors]
        # Copies: a row alone would keep all rows of its forward in memory.
        vectors |= {t: v.copy() for t, v in zip(new, self._text_tower(new), strict=True)}
        self._texts.update(vectors)
        for text in vectors:
            self._texts.move_to_end(text)
        while len(self._texts) > TEXTS_REMEMBERED:
            self._texts.popitem(last=False)
        rows = np.array([vectors[text] for text in texts], np.float32)
        return rows.reshape(-1, self.dimensions)

    def normalised(self, frames: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """(n, 3, side, side) float32 on the device, as open_clip's own preprocessing gives it."""
        import torch

        stacked = torch.empty(
            (len(frames), self._side, self._side, 3),
            dtype=torch.uint8,
            pin_memory=self._device.startswith("cuda"),
        )
        np.stack(frames, out=stacked.numpy())
        # From pinned memory the copy does not wait for the forward before it.
        images = stacked.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        return (images.to(torch.float32).div(255) - self._mean) / self._deviation

    def _encode_frames(self, frames: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            return _unit(self.network.encode_image(self.normalised(frames).to(self._dtype)))

    def _encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            return _unit(self.network.encode_text(self._tokenize(list(texts)).to(self._device)))


class Tower:
    """An encoder that is fed in batches.

    With a filler all batches have the same size. Where memory runs out the size is halved, and
    the smaller one is remembered.
    """

    def __init__(
        self, encode: Callable[[Sequence[Any]], torch.Tensor], batch: int, filler: Any = None
    ) -> None:
        self._encode = encode
        self._batch = max(1, batch)
        self._filler = filler

    def __call__(self, items: Sequence[Any]) -> NDArray[np.float32]:
        """(n, d) embeddings; of shape (0,) for none."""
        import torch

        rows: list[torch.Tensor] = []
        while len(rows) < len(items):
            batch = list(items[len(rows) : len(rows) + self._batch])
            filling = [] if self._filler is None else [self._filler] * (self._batch - len(batch))
            rows += halving(self._forward, batch + filling)[: len(batch)]
        # Fetched once at the end: until then the device works while the next batch is made ready.
        return torch.stack(rows).cpu().numpy() if rows else np.zeros(0, np.float32)

    def _forward(self, items: Sequence[Any]) -> Sequence[torch.Tensor]:
        import torch

        try:
            return self._encode(items).unbind()
        except torch.OutOfMemoryError:
            self._batch = max(1, min(self._batch, (len(items) + 1) // 2))
            raise


def _unit(features: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import normalize

    return normalize(features.float(), dim=-1)


def _side(model: Model) -> int:
    if model.image_size is None:
        raise ConfigError(f"the model {model.name!r} has no image_size: give it in its entry")
    return model.image_size


def _architecture(model: Model, folder: Path) -> tuple[str, dict[str, Any]]:
    """open_clip's name of what the folder holds, and its description.

    A description saved with the weights goes before the registry's `architecture`. What open_clip
    would fetch by itself is refused.
    """
    import open_clip

    described = (folder / CONFIG).is_file()
    known = (
        open_clip.get_model_config(model.architecture) if _is_known(model.architecture) else None
    )
    if known is None and not described:
        raise ConfigError(
            f"the model {model.name!r}: open_clip knows no architecture {model.architecture!r}"
        )
    source = f"local-dir:{folder}" if described else str(model.architecture)
    try:
        architecture: dict[str, Any] = open_clip.get_model_config(source)
        text, vision = architecture["text_cfg"], architecture["vision_cfg"]
        fetches = "hf_model_name" in text or ":" in vision.get("timm_model_name", "")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise model.unavailable(f"has a {CONFIG} that cannot be used: {error!r}") from error
    if fetches:
        raise ConfigError(
            f"the model {model.name!r} takes a tower from a hub: only architectures that open_clip "
            "or timm define themselves can be loaded"
        )
    if not described and "timm_model_name" in vision:
        raise model.unavailable(f"has no {CONFIG}, which says how its frames are normalised")
    activations = [bool(c.get("quick_gelu", False)) for c in (known, architecture) if c is not None]
    if len(set(activations)) > 1:
        raise ConfigError(
            f"the model {model.name!r}: {folder / CONFIG} and the architecture "
            f"{model.architecture!r} disagree on QuickGELU, without which weights trained with it "
            "score wrongly: correct the one that is wrong"
        )
    return source, architecture


def _is_known(architecture: str | None) -> bool:
    import open_clip

    return architecture in open_clip.list_models()


def _load(model: Model, folder: Path, source: str, device: str, dtype: Any) -> Any:
    import open_clip
    import torch

    weights = folder / WEIGHTS
    if not weights.is_file():
        raise model.unavailable(f"has no {WEIGHTS} in {folder}")
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    try:
        loaded = open_clip.create_model(
            source,
            # In a folder of its own open_clip takes WEIGHTS before any other file.
            pretrained=None if source.startswith("local-dir:") else str(weights),
            precision=precision,
            device=device,
            pretrained_image=False,
            pretrained_text=False,
            require_pretrained=True,
            weights_only=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # open_clip asserts, and PyTorch and safetensors have their own
        text = " ".join(str(error).split())[:300]
        raise model.unavailable(
            f"cannot be loaded from {folder}, damaged or of another architecture ({text})"
        ) from error
    return loaded.eval().requires_grad_(False)


def _check_preprocess(model: Model, preprocess: dict[str, Any]) -> None:
    """Frames come fitted as the registry says: it must be what the model was trained on."""
    size = preprocess["size"]
    sides = {size} if isinstance(size, int) else set(size)
    if sides != {_side(model)}:
        raise ConfigError(
            f"the model {model.name!r} takes frames of {size} pixels, not image_size "
            f"{model.image_size}: correct its entry"
        )
    crops = {"shortest": True, "squash": False}.get(preprocess["resize_mode"])
    if crops is not model.crop:
        raise ConfigError(
            f"the model {model.name!r} fits frames by {preprocess['resize_mode']!r}, not by crop: "
            f"{str(model.crop).lower()} (shortest is true, squash is false): correct its entry"
        )
    if preprocess["interpolation"] != "bicubic":
        raise ConfigError(
            f"the model {model.name!r} scales frames by {preprocess['interpolation']!r}: only "
            "bicubic is supported"
        )


def _tokenizer(
    model: Model, folder: Path, described: dict[str, Any]
) -> Callable[[list[str]], torch.Tensor]:
    """The model's tokenizer: from its folder, or the one of CLIP, which open_clip brings along."""
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

    context = described.get("context_length", DEFAULT_CONTEXT_LENGTH)
    settings = dict(described.get("tokenizer_kwargs", {}))
    made: Callable[[list[str]], torch.Tensor]
    if not described.get("hf_tokenizer_name"):
        made = SimpleTokenizer(context_length=context, **settings)
        return made
    settings |= {"local_files_only": True, "trust_remote_code": False}
    try:
        made = HFTokenizer(
            str(folder), context, tokenizer_mode=described.get("tokenizer_mode"), **settings
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())[:300]
        raise model.unavailable(f"has no tokenizer in {folder} ({text})") from error
    return made
