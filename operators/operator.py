"""What an operator is: a declared measure over the frames of one clip.

An operator measures and never decides. It is a frozen dataclass whose fields are its settings, with
a `name`, a `version`, the `columns` that it writes and the frames that it `needs`. For every clip it
starts one `Measurement`, which is fed the frames chunk by chunk in order and then asked for its
columns, so memory is bounded by the chunk and not by the clip.

A `BatchOperator` has a model that wants many clips at once: the sampled frames of a clip are
collected, and its `BatchMeasure` is given a batch of such clips.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.operators.errors import MeasureError

if TYPE_CHECKING:
    from winnow.operators.backbone import Backbone
    from winnow.operators.models import Models

Direction = Literal["higher is better", "lower is better", "neutral"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column that an operator or stage writes into `clips`.

    `name` is the full column name, `<operator>_<measure>`. `range` and `unit` are for people,
    `direction` says which way is good, `source` where the method comes from.
    """

    name: str
    type: pa.DataType
    meaning: str
    unit: str = ""
    range: str = ""
    direction: Direction = "neutral"
    source: str = ""

    def field(self) -> pa.Field:
        """The Arrow field, with the declaration kept as metadata."""
        described = {
            "meaning": self.meaning,
            "unit": self.unit,
            "range": self.range,
            "direction": self.direction,
            "source": self.source,
        }
        return pa.field(self.name, self.type, metadata={k: v for k, v in described.items() if v})


@dataclass(frozen=True, slots=True)
class Square:
    """A square of `side` pixels, bicubic as in Pillow: what CLIP and its kin were trained on.

    With `crop` the short side is scaled and the middle cut out, else the frame is squashed.
    """

    side: int
    crop: bool = True


@dataclass(frozen=True, slots=True)
class Budget:
    """At most `pixels` a frame, aspect kept, sides multiples of `multiple`: what a VLM is shown.

    Frames are never enlarged, except to the next multiple. Source: `smart_resize` of Qwen2-VL.
    """

    pixels: int
    multiple: int = 32

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that a frame is scaled to."""
        scale = min(1.0, math.sqrt(self.pixels / (width * height)))
        sides = [max(1, round(side * scale / self.multiple)) for side in (width, height)]
        while sides[0] * sides[1] * self.multiple**2 > self.pixels and max(sides) > 1:
            sides[sides.index(max(sides))] -= 1
        return sides[0] * self.multiple, sides[1] * self.multiple


@dataclass(frozen=True, slots=True)
class Sampling:
    """Frames at a rate: `rate` per second of clip time, at least `minimum` a clip (if it has them).

    `kind` luma gives (h, w) uint8 in full range, rgb gives (h, w, 3) uint8; `height` scales the
    frame to that height with its aspect kept (never up), None leaves the native size. `fit` sizes
    RGB frames for a model instead. Where `maximum` would be exceeded, the frames lie further apart.
    """

    rate: float
    kind: Literal["luma", "rgb"] = "luma"
    height: int | None = None
    minimum: int = 1
    maximum: int | None = None
    fit: Square | Budget | None = None

    def __post_init__(self) -> None:
        if self.fit is not None and (self.kind != "rgb" or self.height is not None):
            raise ValueError("`fit` is for RGB frames and takes the place of `height`")

    def indices(self, frames: int, fps: float) -> NDArray[np.int64]:
        """Frame numbers to sample in a clip of `frames` frames, centred in equal intervals."""
        if frames <= 0:
            return np.zeros(0, np.int64)
        most = frames if self.maximum is None else min(frames, self.maximum)
        least = min(self.minimum, most)
        count = int(np.clip(round(frames / max(fps, 1e-6) * self.rate), least, most))
        return ((np.arange(count) + 0.5) * frames / count).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Needs:
    """What an operator wants to be shown."""

    luma: bool = False
    """Every frame as small luma: long side 160, full range."""
    motion_vectors: bool = False
    """The codec's motion vectors of every frame, where the codec exports them."""
    samples: tuple[Sampling, ...] = ()
    """Frames at a rate."""
    columns: tuple[str, ...] = ()
    """Columns of the clip that earlier stages wrote."""
    frame_embeddings: bool = False
    """The stage's vision backbone's embeddings of sampled frames (batch operators only)."""
    backbone: str | None = None
    """The only backbone whose embeddings are of use; None where any is."""


@dataclass(slots=True)
class Sample:
    """One sampled frame: its number in the clip, its time from the clip's start, its pixels."""

    index: int
    seconds: float
    image: NDArray[np.uint8]


@dataclass(slots=True)
class FrameChunk:
    """Some consecutive frames of one clip, in order, upright (rotation applied)."""

    first: int
    """Number in the clip of the first frame here."""
    seconds: NDArray[np.float64]
    """(n,) time of each frame from the clip's first frame."""
    pictures: NDArray[np.int8]
    """(n,) picture type: 1 I, 2 P, 3 B, as in FFmpeg's AVPictureType."""
    luma: NDArray[np.uint8] | None = None
    """(n, h, w) small luma, 0..255 full range."""
    vectors: list[NDArray[Any] | None] | None = None
    """Per frame the codec's motion vectors (FFmpeg's AVMotionVector as a structured array)."""
    samples: dict[Sampling, list[Sample]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seconds)


@dataclass(slots=True)
class ClipView:
    """What an operator may know of the clip before it sees frames. Sizes are upright."""

    clip_id: str
    frames: int
    fps: float
    width: int
    height: int
    codec: str
    coded_rotation: int = 0
    """Degrees that the coded frame was turned by to be upright; motion vectors are not turned."""
    prompt: str | None = None
    other_prompts: tuple[str, ...] = ()
    """Prompts of other generations of the same run, for comparison."""
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        return self.frames / self.fps if self.fps > 0 else 0.0


class Measurement(ABC):
    """One operator at work on one clip."""

    @abstractmethod
    def update(self, chunk: FrameChunk) -> None:
        """Take the next frames. Keep sums, not frames."""

    @abstractmethod
    def columns(self) -> dict[str, Any]:
        """The measured columns; None where the clip does not allow the measure.

        Raises MeasureError where the clip should have allowed it but did not.
        """

    def vectors(self) -> dict[str, NDArray[np.float32]]:
        """Embedding vectors by model name, for the `embeddings` table; usually none."""
        return {}


@dataclass(frozen=True)
class Operator(ABC):
    """Base of all operators: settings are dataclass fields, identity is class data."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    name: ClassVar[str]
    version: ClassVar[int]
    columns: ClassVar[tuple[Column, ...]]
    embeddings: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if ABC in cls.__bases__:
            return
        for attribute in ("name", "version", "columns"):
            if attribute not in cls.__dict__:
                raise TypeError(
                    f"operator {cls.__name__} must declare the class attribute {attribute!r}"
                )
        for column in cls.columns:
            if not column.name.startswith(f"{cls.name}_"):
                raise TypeError(
                    f"operator {cls.name}: column {column.name!r} must start with {cls.name + '_'!r}"
                )

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """The frames that this operator, with these settings, wants to be shown."""

    def setup(self) -> None:  # noqa: B027 - optional hook, most operators have no model
        """Load models. Called once per worker process, before the first clip."""

    @abstractmethod
    def start(self, view: ClipView) -> Measurement:
        """Begin one clip."""

    @classmethod
    def error_column(cls) -> Column:
        return Column(
            f"{cls.name}_error", pa.string(), f"why `{cls.name}` could not measure this clip"
        )


@dataclass(slots=True)
class FrameEmbeddings:
    """What the vision backbone says of a clip's sampled frames."""

    vectors: NDArray[np.float32]
    """(n, d), each of length 1."""
    seconds: NDArray[np.float64]
    """(n,) time of each frame from the clip's first."""
    backbone: Backbone
    """Encodes texts into the same space."""


@dataclass(slots=True)
class SeenClip:
    """A clip with the frames that a batch operator asked for."""

    view: ClipView
    samples: dict[Sampling, list[Sample]] = field(default_factory=dict)
    embeddings: FrameEmbeddings | None = None

    @property
    def pixels(self) -> int:
        """Pixels of all sampled frames."""
        return sum(
            sample.image.shape[0] * sample.image.shape[1]
            for samples in self.samples.values()
            for sample in samples
        )


@dataclass(slots=True)
class Measures:
    """What a batch operator measured on one clip."""

    columns: dict[str, Any]
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)


class BatchMeasure(ABC):
    """A batch operator with its model loaded."""

    @abstractmethod
    def __call__(self, clips: Sequence[SeenClip]) -> list[Measures | MeasureError]:
        """Measure clips, one answer each, in their order.

        A clip that cannot be measured has a MeasureError in its place. What raises instead is tried
        again clip by clip. A clip's answer does not depend on the others of its batch.
        """

    def close(self) -> None:  # noqa: B027 - optional hook
        """Release what was loaded."""


@dataclass(frozen=True)
class BatchOperator(Operator, ABC):
    """An operator whose model sees whole clips in batches, apart from decoding."""

    def models(self) -> tuple[str, ...]:
        """Names in configs/models.yaml of the models that `load` will need."""
        return ()

    def made_by(self, models: Models) -> dict[str, str]:
        """What makes the columns beside this code, for the `runs` table: models and prompts."""
        return {f"model {name}": models.get(name).identity for name in self.models()}

    @abstractmethod
    def load(self, models: Models) -> BatchMeasure:
        """Load the model. Called once per worker process. Raises ModelUnavailable."""

    def start(self, view: ClipView) -> Measurement:
        return Collecting(view, self.needs)


class Collecting(Measurement):
    """Keeps the sampled frames of one clip for a batch operator."""

    def __init__(self, view: ClipView, needs: Needs) -> None:
        self.seen = SeenClip(view, {sampling: [] for sampling in needs.samples})

    def update(self, chunk: FrameChunk) -> None:
        for sampling, samples in self.seen.samples.items():
            samples += chunk.samples[sampling]

    def columns(self) -> dict[str, Any]:
        raise TypeError("a batch operator measures batches of clips: `load()` it and call that")
