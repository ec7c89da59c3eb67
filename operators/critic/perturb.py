"""What a probe does to a clip before the critic sees it again.

A perturbation is its settings and a pure function of a clip, the set that it belongs to, and a seed:
it returns another clip with the same id, and leaves the frames that it was given alone. Chance is
drawn from the seed and the clip's id, so neither the order nor the number of clips matters. Where a
perturbation would change nothing that can be seen (a still clip played backwards), it returns None.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from winnow.operators.settings import Strict
from winnow.operators.vlm.messages import Video

if TYPE_CHECKING:
    from winnow.operators.critic.critic import Shown

Image = NDArray[np.uint8]
"""(h, w, 3) RGB."""

_STILL_SIDE = 32
_STILL_LEVELS = 10.0
"""A clip stands still if no patch of 1/32 of its long side ever changes by as much (of 255)."""
_VANISH_SIDE = 64
_VANISH_LEVELS = 4.0
_BACKGROUND_FRAMES = 25
_TEXT_HEIGHT = 0.12


class ClipSet:
    """The clips that a probe is run on: whose captions and frames are borrowed, and the dice.

    Raises ValueError where two clips have one id.
    """

    def __init__(self, clips: Iterable[Shown], seed: int) -> None:
        clips = list(clips)
        self._seed = seed
        self._clips = {clip.clip_id: clip for clip in clips}
        if len(self._clips) < len(clips):
            raise ValueError("clips of one set must have different ids")
        order = sorted(self._clips, key=lambda clip_id: self._draw("order", clip_id))
        self._following = dict(zip(order, [*order[1:], *order[:1]], strict=True))
        self._captions = _other_captions([self._clips[clip_id] for clip_id in order])

    def dice(self, purpose: str, clip: Shown) -> np.random.Generator:
        """Chance that depends on the seed, the purpose and the clip's id only."""
        return np.random.default_rng(self._draw(purpose, clip.clip_id))

    def other_caption(self, clip: Shown) -> str | None:
        """The caption of another clip, each given away once; None where all captions are alike."""
        return self._captions.get(clip.clip_id)

    def other_clip(self, clip: Shown) -> Shown | None:
        """Another clip, each given away once; None where there is no other."""
        following = self._following[clip.clip_id]
        return None if following == clip.clip_id else self._clips[following]

    def _draw(self, purpose: str, clip_id: str) -> int:
        digest = hashlib.sha256(f"{self._seed}\0{purpose}\0{clip_id}".encode()).digest()
        return int.from_bytes(digest[:16], "big")


def _other_captions(clips: Sequence[Shown]) -> dict[str, str]:
    """A derangement of the captions: by clip a caption with another text.

    Equal captions stand together and all move on by the size of the largest such group: none lands
    in its own group, as long as that is no more than half of the clips.
    """
    groups: dict[str, list[Shown]] = defaultdict(list)
    for clip in clips:
        if clip.caption and clip.caption.strip():
            groups[clip.caption].append(clip)
    ordered = [clip for group in sorted(groups.values(), key=len, reverse=True) for clip in group]
    step = max(map(len, groups.values()), default=0)
    borrowed = {
        clip.clip_id: ordered[(place + step) % len(ordered)].caption
        for place, clip in enumerate(ordered)
    }
    return {
        clip.clip_id: caption
        for clip in ordered
        if (caption := borrowed[clip.clip_id]) is not None and caption != clip.caption
    }


class Perturbation(Strict, ABC):
    """Settings of one change to a clip."""

    applies_to: ClassVar[str] = "every clip"
    """For people: the clips that it changes; others are not counted."""

    @abstractmethod
    def __call__(self, clip: Shown, among: ClipSet) -> Shown | None:
        """The changed clip; None where this clip cannot be changed in this way."""


class _OfFilm(Perturbation):
    """A change to the frames alone."""

    def __call__(self, clip: Shown, among: ClipSet) -> Shown | None:
        film = self.film(clip.video, among.dice(type(self).__name__, clip))
        return None if film is None else replace(clip, video=film)

    @abstractmethod
    def film(self, video: Video, dice: np.random.Generator) -> Video | None: ...


class _OfOrder(_OfFilm):
    """Other frames at the same times. Of a clip that stands still, nothing would be seen."""

    applies_to: ClassVar[str] = "clips in which something moves"

    def film(self, video: Video, dice: np.random.Generator) -> Video | None:
        if len(video.frames) < 3 or not moves(video):
            return None
        places = self.places(len(video.frames), dice)
        return replace(video, frames=[video.frames[place] for place in places])

    @abstractmethod
    def places(self, frames: int, dice: np.random.Generator) -> list[int]:
        """For each moment the place of the frame that is shown."""


class _OfFrames(_OfFilm):
    """The same change to every frame."""

    def film(self, video: Video, dice: np.random.Generator) -> Video | None:
        # OpenCV draws on rows that lie as it expects, and on no others.
        frames = [self.image(np.ascontiguousarray(frame)) for frame in video.frames]
        return replace(video, frames=frames)

    @abstractmethod
    def image(self, image: Image) -> Image: ...


class Repeated(_OfFilm):
    """The clip as it is, judged once more: how much the critic's word varies by itself."""

    kind: Literal["repeated"]

    def film(self, video: Video, dice: np.random.Generator) -> Video | None:
        return video


class Frozen(_OfOrder):
    """The first frame at all times."""

    kind: Literal["frozen"]

    def places(self, frames: int, dice: np.random.Generator) -> list[int]:
        return [0] * frames


class Reversed(_OfOrder):
    """The frames backwards, under the old times."""

    kind: Literal["reversed"]

    def places(self, frames: int, dice: np.random.Generator) -> list[int]:
        return list(range(frames))[::-1]


class Shuffled(_OfOrder):
    """No frame, or no piece of consecutive frames, at its own place."""

    kind: Literal["shuffled"]
    pieces: int | None = Field(
        None, ge=2, description="pieces that the clip is cut into; without it single frames"
    )
    after: float = Field(0.0, ge=0, lt=1, description="share of the clip that is left in order")

    def places(self, frames: int, dice: np.random.Generator) -> list[int]:
        first = min(round(frames * self.after), frames - 2)
        left, rest = list(range(first)), np.arange(first, frames)
        pieces = np.array_split(rest, min(self.pieces or len(rest), len(rest)))
        return left + [int(place) for k in _derangement(len(pieces), dice) for place in pieces[k]]


class Looped(_OfOrder):
    """The first part of the clip, played again and again with a jump back each time."""

    kind: Literal["looped"]
    times: int = Field(2, ge=2)

    def places(self, frames: int, dice: np.random.Generator) -> list[int]:
        length = -(-frames // self.times)
        return [place % length for place in range(frames)]


class OtherFps(_OfFilm):
    """The clip at another frame rate, at its own speed: frames are left out, or shown twice."""

    applies_to: ClassVar[str] = "clips that are shown at another rate"

    kind: Literal["other_fps"]
    fps: float = Field(gt=0, description="frames a second")

    def film(self, video: Video, dice: np.random.Generator) -> Video | None:
        if video.fps <= 0 or abs(self.fps - video.fps) < 0.05 * video.fps:
            return None
        seconds = np.asarray(video.seconds, float)
        end = seconds[-1] + 1 / video.fps
        count = max(2, round((end - seconds[0]) * self.fps))
        grid = seconds[0] + np.arange(count) / self.fps
        if self.fps < video.fps:
            nearest = np.abs(seconds[None] - grid[:, None]).argmin(axis=1)
            chosen = [int(place) for place in np.unique(nearest)]
            return replace(
                video,
                frames=[video.frames[place] for place in chosen],
                indices=[video.indices[place] for place in chosen],
                seconds=[video.seconds[place] for place in chosen],
            )
        # Half a microsecond: a frame that is due now is on screen already.
        on_screen = np.searchsorted(seconds, grid + 5e-7, side="right") - 1
        # A frame has one number, so the clip that shows it twice is one of the new rate.
        first = round(float(seconds[0]) * self.fps)
        return Video(
            [video.frames[place] for place in on_screen],
            [first + number for number in range(count)],
            [float(moment) for moment in grid],
            self.fps,
        )


class Mirrored(_OfFrames):
    """Left and right exchanged."""

    kind: Literal["mirrored"]

    def image(self, image: Image) -> Image:
        return np.ascontiguousarray(image[:, ::-1])


class Cropped(_OfFrames):
    """A margin cut off on all sides, the rest scaled to the old size."""

    kind: Literal["cropped"]
    share: float = Field(0.05, gt=0, le=0.2, description="of width and height that is cut off")

    def image(self, image: Image) -> Image:
        height, width = image.shape[:2]
        top, left = (max(1, round(side * self.share / 2)) for side in (height, width))
        return _scaled(image[top : height - top, left : width - left], width, height)


class Photometric(_OfFrames):
    """Light, colour and compression, as little as anybody would still call the same video."""

    kind: Literal["photometric"]
    gamma: float = Field(1.0, ge=0.6, le=1.6, description="exponent; below 1 lifts the shadows")
    contrast: float = Field(1.0, ge=0.6, le=1.4, description="factor around middle grey")
    brightness: float = Field(0.0, ge=-48, le=48, description="levels of 255 added")
    red: float = Field(0.0, ge=-24, le=24, description="levels added to this channel")
    green: float = Field(0.0, ge=-24, le=24)
    blue: float = Field(0.0, ge=-24, le=24)
    blur: float = Field(0.0, ge=0, le=1.5, description="sigma in pixels")
    jpeg: int | None = Field(None, ge=40, le=95, description="quality; without it no compression")

    @model_validator(mode="after")
    def _does_something(self) -> Photometric:
        if not (self._toned or self.blur or self.jpeg):
            raise ValueError("a photometric change must change something")
        return self

    @property
    def _toned(self) -> bool:
        tones = (self.gamma, self.contrast, self.brightness, self.red, self.green, self.blue)
        return tones != (1.0, 1.0, 0.0, 0.0, 0.0, 0.0)

    def image(self, image: Image) -> Image:
        if self._toned:
            tone = 255 * (np.arange(256) / 255) ** self.gamma
            tone = (tone - 127.5) * self.contrast + 127.5 + self.brightness
            tones = np.stack([tone + shift for shift in (self.red, self.green, self.blue)], axis=-1)
            table = np.clip(np.rint(tones), 0, 255).astype(np.uint8)[None]
            image = np.asarray(cv2.LUT(image, table), np.uint8)
        if self.blur:
            image = np.asarray(cv2.GaussianBlur(image, (0, 0), self.blur), np.uint8)
        if self.jpeg:
            bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            _, coded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, self.jpeg])
            decoded = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
            image = np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), np.uint8)
        return image


class Written(_OfFrames):
    """A line of text burnt into every frame, white on black, at the lower edge."""

    kind: Literal["written"]
    text: str = Field(pattern=r"^[ -~]{1,60}$", description="printable ASCII")
    width: float = Field(0.7, gt=0, le=1, description="of the frame's width, at most")

    def image(self, image: Image) -> Image:
        height, width = image.shape[:2]
        font = cv2.FONT_HERSHEY_SIMPLEX
        (wide, high), _ = cv2.getTextSize(self.text, font, 1.0, 1)
        scale = min(self.width * width / wide, _TEXT_HEIGHT * height / high)
        thick = max(1, round(scale * 2))
        (across, tall), below = cv2.getTextSize(self.text, font, scale, thick)
        left, base = (width - across) // 2, height - below - max(2, tall // 2)
        image = np.array(image)
        cv2.rectangle(image, (left - tall // 2, base - tall - tall // 2),
                      (left + across + tall // 2, base + below), (0, 0, 0), cv2.FILLED)  # fmt: skip
        cv2.putText(
            image, self.text, (left, base), font, scale, (255, 255, 255), thick, cv2.LINE_AA
        )
        return image


class Spliced(Perturbation):
    """From the middle on the frames of another clip, cropped and scaled to this one's size."""

    applies_to: ClassVar[str] = "sets of two clips or more"

    kind: Literal["spliced"]

    def __call__(self, clip: Shown, among: ClipSet) -> Shown | None:
        other, frames = among.other_clip(clip), list(clip.video.frames)
        if other is None or len(frames) < 2 or not other.video.frames:
            return None
        height, width = frames[0].shape[:2]
        for place in range((len(frames) + 1) // 2, len(frames)):
            # At the same share of its length: the other clip may have more frames, or fewer.
            taken = round(place / (len(frames) - 1) * (len(other.video.frames) - 1))
            frames[place] = _filling(np.asarray(other.video.frames[taken]), width, height)
        return replace(clip, video=replace(clip.video, frames=frames))


class Vanished(_OfFilm):
    """Where most moves, a square is replaced for a while by what is there most of the time."""

    applies_to: ClassVar[str] = "clips in which something moves"

    kind: Literal["vanished"]
    side: float = Field(0.35, gt=0, le=1, description="of the square, of the frame's short side")
    start: float = Field(1 / 3, ge=0, lt=1, description="share of the clip before it")
    end: float = Field(2 / 3, gt=0, le=1, description="share of the clip at which it is back")

    @model_validator(mode="after")
    def _lasts(self) -> Vanished:
        if self.end <= self.start:
            raise ValueError("`end` must come after `start`")
        return self

    def film(self, video: Video, dice: np.random.Generator) -> Video | None:
        frames = [np.asarray(frame) for frame in video.frames]
        gone = range(round(len(frames) * self.start), round(len(frames) * self.end))
        if len(frames) < 4 or not gone:
            return None
        height, width = frames[0].shape[:2]
        side = max(1, round(self.side * min(height, width)))
        small = _small_luma(frames, _VANISH_SIDE)
        away = np.abs(small[gone.start : gone.stop] - np.median(small, axis=0)).mean(axis=0)
        scale = away.shape[1] / width
        reach = min(max(1, round(side * scale)), *away.shape)
        # By square of that side its mean, each at its upper left corner.
        means = np.lib.stride_tricks.sliding_window_view(away, (reach, reach)).mean(axis=(2, 3))
        row, column = np.unravel_index(int(means.argmax()), means.shape)
        if means[row, column] < _VANISH_LEVELS:
            return None
        top = min(round(int(row) / scale), height - side)
        left = min(round(int(column) / scale), width - side)
        patch = np.s_[top : top + side, left : left + side]
        seen = np.linspace(0, len(frames) - 1, min(len(frames), _BACKGROUND_FRAMES)).round()
        background = np.median([frames[int(place)][patch] for place in seen], axis=0)
        for place in gone:
            frames[place] = np.array(frames[place])
            frames[place][patch] = np.rint(background).astype(np.uint8)
        return replace(video, frames=frames)


class OtherCaption(Perturbation):
    """Another clip's caption."""

    applies_to: ClassVar[str] = "clips with a caption, in sets with different ones"

    kind: Literal["other_caption"]

    def __call__(self, clip: Shown, among: ClipSet) -> Shown | None:
        caption = among.other_caption(clip)
        return None if caption is None else replace(clip, caption=caption)


class Injected(Perturbation):
    """A text behind the caption; the caption itself where the clip has none."""

    kind: Literal["injected"]
    text: str = Field(min_length=1, max_length=1000)

    def __call__(self, clip: Shown, among: ClipSet) -> Shown | None:
        caption = " ".join(part for part in ((clip.caption or "").strip(), self.text) if part)
        return replace(clip, caption=caption)


AnyPerturbation = Annotated[
    Repeated | Frozen | Reversed | Shuffled | Looped | OtherFps | Mirrored | Cropped | Photometric
    | Written | Spliced | Vanished | OtherCaption | Injected,
    Field(discriminator="kind"),
]  # fmt: skip
"""In a configuration a mapping with `kind` and the settings of that kind."""


def moves(video: Video) -> bool:
    """Whether anything in the frames changes so much that their order can be seen."""
    small = _small_luma([np.asarray(frame) for frame in video.frames], _STILL_SIDE)
    return bool(np.ptp(small, axis=0).max() >= _STILL_LEVELS)


def _derangement(count: int, dice: np.random.Generator) -> list[int]:
    """A random cycle through all places, so none keeps its own. Source: Sattolo's algorithm."""
    places = list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(dice.integers(last))
        places[last], places[other] = places[other], places[last]
    return places


def _small_luma(frames: Sequence[Image], long_side: int) -> NDArray[np.float32]:
    """(n, h, w) area-averaged, 0..255."""
    height, width = frames[0].shape[:2]
    scale = min(1.0, long_side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    luma = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames)
    return np.stack([cv2.resize(y, size, interpolation=cv2.INTER_AREA) for y in luma]).astype("f4")


def _scaled(image: Image, width: int, height: int) -> Image:
    if image.shape[:2] == (height, width):
        return image
    shrinks = width * height < image.shape[0] * image.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (width, height), interpolation=how), np.uint8)


def _filling(image: Image, width: int, height: int) -> Image:
    """The middle of the image in another shape, its aspect kept."""
    tall, wide = image.shape[:2]
    scale = max(width / wide, height / tall)
    inner_wide, inner_tall = min(wide, round(width / scale)), min(tall, round(height / scale))
    top, left = (tall - inner_tall) // 2, (wide - inner_wide) // 2
    return _scaled(image[top : top + inner_tall, left : left + inner_wide], width, height)
