"""Moving pictures drawn from a number: textured ground, a drifting camera, objects that turn.

The demo and the tests need videos whose truth is known. A scene here has what codecs and detectors
live on: detail at every scale, motion everywhere in the frame and at every moment, normal exposure.
A scene is a pure function of its seed and of time, so one scene can be filmed at any frame rate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[Any]
"""(h, w, 3) uint8, RGB. OpenCV's annotations do not tell the types of what it returns."""
Field = NDArray[Any]
"""(h, w) float32 in 0..1."""

# A canvas is large enough for the camera to drift this long before it meets the edge.
LONGEST_S = 5.0

# Dark, middle and light tone of a ground; none so dark that it could pass for a black border.
_PALETTES = (
    ((62, 70, 48), (128, 132, 74), (214, 206, 150)),
    ((52, 66, 96), (84, 130, 160), (206, 226, 232)),
    ((96, 56, 44), (178, 112, 72), (240, 206, 160)),
    ((58, 54, 82), (126, 100, 138), (224, 190, 204)),
    ((46, 78, 70), (96, 152, 118), (222, 236, 190)),
    ((74, 66, 60), (138, 134, 128), (226, 222, 212)),
    ((84, 60, 36), (170, 142, 66), (246, 228, 140)),
)
_OBJECT_TONES = (
    ((120, 28, 30), (226, 84, 62)),
    ((24, 58, 128), (88, 152, 230)),
    ((128, 92, 16), (250, 206, 76)),
    ((30, 92, 50), (112, 206, 118)),
    ((98, 36, 110), (206, 122, 222)),
    ((170, 168, 160), (250, 248, 242)),
)
_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


@dataclass(frozen=True, slots=True)
class Shot:
    """One continuous take of one scene.

    `seed` chooses the scene (different seeds look clearly different), `camera` scales how fast the
    camera drifts and `action` how fast the objects move: 1 is normal, 0 stands still.
    """

    seed: int
    width: int = 640
    height: int = 360
    fps: float = 24.0
    seconds: float = 3.0
    camera: float = 1.0
    action: float = 1.0

    @property
    def times(self) -> NDArray[np.float64]:
        """(n,) the moment of each frame at the constant rate, in seconds."""
        return np.arange(round(self.seconds * self.fps)) / self.fps

    def frames(self, times: NDArray[np.float64] | None = None) -> Iterator[Image]:
        """Film the scene at its own rate, or at the given moments (up to LONGEST_S seconds)."""
        painter = _Painter(self)
        for moment in self.times if times is None else times:
            yield painter.paint(float(moment))


def noise(
    rng: np.random.Generator,
    height: int,
    width: int,
    cell: float,
    octaves: int = 6,
    stretch: float = 1.0,
) -> Field:
    """(height, width) value noise in 0..1: coarse shapes of about `cell` pixels, finer ones on top.

    `stretch` makes the shapes that many times wider than high.
    """
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        size = cell / 2**octave
        if size < 1:
            break
        rows, columns = math.ceil(height / size) + 2, math.ceil(width / size / stretch) + 2
        grid = rng.random((rows, columns), dtype=np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) * 0.62**octave
    return _stretched(total)


def _stretched(values: Field) -> Field:
    """Values brought to 0..1; the lowest and highest percent are clipped."""
    low, high = np.percentile(values[::4, ::4], (1, 99))
    stretched: Field = np.clip((values - low) / (high - low), 0, 1).astype(np.float32)
    return stretched


def _ground(rng: np.random.Generator, kind: int, height: int, width: int, unit: float) -> Field:
    """Tone of a ground in 0..1, in one of five patterns over a coarse light and dark layout."""
    layout = noise(rng, height, width, unit * 0.55, octaves=2)
    detail = noise(rng, height, width, unit * 0.14)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / unit
    if kind == 0:  # rock: ridges
        pattern = 1 - np.abs(2 * detail - 1)
    elif kind == 1:  # sand: wind ripples that bend with the layout
        pattern = 0.5 + 0.5 * np.sin(38 * y + 6 * x + 9 * layout)
    elif kind == 2:  # grass: fine tufts
        pattern = noise(rng, height, width, unit * 0.03, octaves=4)
    elif kind == 3:  # paving: slabs of different stone
        slab = 0.22
        shade = rng.random((int(height / unit / slab) + 2, int(width / unit / slab) + 2))
        pattern = shade.astype(np.float32)[(y / slab).astype(int), (x / slab).astype(int)]
    else:  # water: two crossing swells
        pattern = 0.5 + 0.25 * np.sin(21 * x + 13 * y + 7 * detail)
        pattern = pattern + 0.25 * np.sin(17 * y - 11 * x + 8 * layout)
    mixed = _stretched(0.5 * layout + 0.28 * pattern + 0.22 * detail)
    # Flecks with hard edges, darker and lighter than the ground: without them it looks out of focus.
    fleck = noise(rng, height, width, unit * 0.03, octaves=3)
    flecked: Field = np.clip(mixed - 0.3 * (fleck > 0.8) + 0.2 * (fleck < 0.15), 0, 1)
    return flecked.astype(np.float32)


def _tinted(
    rng: np.random.Generator, tone: Field, palette: tuple[tuple[int, int, int], ...]
) -> Image:
    """Colour a tone field and give it grain of one to two pixels, so that it looks sharp."""
    height, width = tone.shape
    stops = np.linspace(0.05, 0.95, len(palette))
    table = np.stack(
        [np.interp(np.linspace(0, 1, 256), stops, c) for c in zip(*palette, strict=True)]
    )
    grain = cv2.GaussianBlur(rng.standard_normal((height, width), dtype=np.float32), (0, 0), 0.7)
    coloured = table.T[(tone * 255).astype(np.uint8)] * (1 + 0.08 * grain[..., None])
    tinted: Image = np.clip(coloured, 0, 255).astype(np.uint8)
    # Sharpened once, for what the bilinear camera will soften in every frame.
    return cv2.addWeighted(tinted, 1.7, cv2.GaussianBlur(tinted, (0, 0), 1.0), -0.7, 0)


class _Painter:
    """The canvases and objects of one shot, made once; frames are views of them."""

    def __init__(self, shot: Shot) -> None:
        self._shot = shot
        self._unit = (shot.width + shot.height) / 2
        rng = np.random.default_rng([2026, shot.seed])
        heading = shot.seed * _GOLDEN_ANGLE
        speed = (0.09 + 0.03 * rng.random()) * self._unit * shot.camera
        self._skyline = shot.seed % 3 == 1
        # Over a landscape the camera pans sideways only: the sky has no up and down to travel.
        vertical = 0.0 if self._skyline else math.sin(heading)
        along = math.copysign(1.0, math.cos(heading)) if self._skyline else math.cos(heading)
        self._velocity = (speed * along, speed * vertical)
        self._margin = 0.08 * self._unit
        self._phase = rng.uniform(0, 2 * math.pi)
        width = self._canvas(shot.width, self._velocity[0])
        height = self._canvas(shot.height, self._velocity[1])
        tone = _ground(rng, shot.seed % 5, height, width, self._unit)
        palette = _PALETTES[shot.seed % len(_PALETTES)]
        self._ground = _tinted(rng, tone, palette)
        if self._skyline:
            self._sky, self._land = self._landscape(rng, height, width)
        self._objects = [
            _Object(rng, self._unit, _OBJECT_TONES[(shot.seed + k) % len(_OBJECT_TONES)])
            for k in range(3 + shot.seed % 3)
        ]

    def _canvas(self, size: int, velocity: float) -> int:
        return math.ceil(size + abs(velocity) * LONGEST_S + 2 * self._margin)

    def _landscape(self, rng: np.random.Generator, height: int, width: int) -> tuple[Image, Field]:
        """A clouded sky, and how much of each canvas pixel is land (0..1)."""
        clouds = noise(rng, height, width, self._unit * 0.3, stretch=2.2)
        fall = np.linspace(0.15, 0.75, height, dtype=np.float32)[:, None]
        light = (96, 138, 196), (164, 190, 220), (240, 238, 232)
        dusk = (120, 92, 130), (214, 140, 112), (250, 220, 164)
        sky = _tinted(rng, 0.55 * clouds + 0.45 * fall, dusk if self._shot.seed % 2 else light)
        ridge = noise(rng, 1, width, self._unit * 0.4)[0]
        edge = self._margin + self._shot.height * (0.24 + 0.2 * ridge + 0.1 * rng.random())
        land = np.clip(np.arange(height, dtype=np.float32)[:, None] - edge[None, :], 0, 1)
        return sky, land.astype(np.float32)

    def paint(self, moment: float) -> Image:
        """The frame at `moment` seconds."""
        ground = self._view(self._ground, moment, 1.0)
        if self._skyline:
            land = self._view(self._land, moment, 1.0)
            sky = self._view(self._sky, moment, 0.6)
            ground = cv2.blendLinear(ground, sky, land, 1 - land)
        for thing in self._objects:
            thing.paint(ground, moment * self._shot.action)
        return ground

    def _view(self, canvas: NDArray[Any], moment: float, parallax: float) -> NDArray[Any]:
        """What the camera sees of a canvas; `parallax` below 1 for what is far away."""
        shot = self._shot
        sway = 0.02 * self._unit * math.sin(1.9 * moment * shot.camera + self._phase)
        zoom = 1.05 + 0.04 * math.sin(0.9 * moment * shot.camera + self._phase)
        corner = []
        for size, velocity, extra in zip(
            (shot.width, shot.height), self._velocity, (0.3 * sway, 0.5 * sway), strict=True
        ):
            start = self._margin + max(0.0, -velocity) * LONGEST_S * parallax
            corner.append(start + velocity * parallax * moment + extra + size / 2 * (1 - 1 / zoom))
        matrix = np.array([[1 / zoom, 0, corner[0]], [0, 1 / zoom, corner[1]]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(
            canvas, matrix, (shot.width, shot.height), flags=flags, borderMode=cv2.BORDER_REFLECT
        )


class _Object:
    """A rounded, speckled thing with a shadow that turns while it swings across the frame."""

    def __init__(
        self, rng: np.random.Generator, unit: float, tones: tuple[tuple[int, int, int], ...]
    ) -> None:
        side = round(unit * rng.uniform(0.18, 0.3))
        y, x = (np.mgrid[0:side, 0:side].astype(np.float32) + 0.5) * (2 / side) - 1
        angle, distance = np.arctan2(y, x), np.hypot(x, y)
        lobes = sum(
            rng.uniform(0.02, 0.09) * np.sin(n * angle + rng.uniform(0, 6.3)) for n in (2, 3, 5)
        )
        alpha = np.clip((0.72 + lobes - distance) * side / 2, 0, 1)
        spots = noise(rng, side, side, side * 0.3)
        spots = np.clip(spots - 0.4 * (noise(rng, side, side, side * 0.12) > 0.75), 0, 1)
        roundness = np.sqrt(np.clip(1 - (distance / 0.85) ** 2, 0.15, 1))
        colour = _tinted(rng, spots, tones) * roundness[..., None]
        # Contact shadow and body in one layer, colour premultiplied by cover: one blend a frame.
        shadow = cv2.GaussianBlur(alpha.astype(np.float32), (0, 0), side * 0.05) * 0.6
        cover = (alpha + shadow * (1 - alpha)) * 255
        self._layer = np.dstack([colour * alpha[..., None], cover]).astype(np.uint8)
        self._side = side
        self._centre = rng.uniform(0.3, 0.7, 2)
        self._reach = rng.uniform(0.18, 0.3, 2)
        self._pace = rng.uniform(0.7, 1.3, 2)  # radians a second
        self._phase = rng.uniform(0, 2 * math.pi, 2)
        self._spin = rng.choice([-1, 1]) * rng.uniform(20, 60)  # degrees a second

    def paint(self, image: Image, moment: float) -> None:
        """Draw the object where it is at `moment`, into the image."""
        height, width = image.shape[:2]
        place = self._centre + self._reach * np.sin(self._pace * moment + self._phase)
        x, y = place * (width, height)
        half = self._side * 0.75
        top, left = max(0, int(y - half)), max(0, int(x - half))
        bottom, right = min(height, int(y + half)), min(width, int(x + half))
        if bottom <= top or right <= left:
            return
        middle = self._side / 2
        matrix = cv2.getRotationMatrix2D((middle, middle), self._spin * moment, 1.0)
        matrix[:, 2] += (x - left - middle, y - top - middle)
        placed = cv2.warpAffine(self._layer, matrix, (right - left, bottom - top))
        behind = cv2.cvtColor(255 - placed[..., 3], cv2.COLOR_GRAY2RGB)
        spot = image[top:bottom, left:right]
        image[top:bottom, left:right] = cv2.add(
            cv2.multiply(spot, behind, scale=1 / 255), cv2.cvtColor(placed, cv2.COLOR_RGBA2RGB)
        )


def lettering(
    image: Image,
    text: str,
    *,
    place: Literal["bottom", "top right"],
    height_share: float = 0.07,
    opacity: float = 1.0,
) -> Image:
    """Burn white, dark-edged letters into a copy of the image.

    Capital letters are `height_share` of the frame high; `opacity` below 1 lets the scene through.
    """
    font, edge = cv2.FONT_HERSHEY_SIMPLEX, 2
    height, width = image.shape[:2]
    scale = cv2.getFontScaleFromHeight(font, round(height * height_share), edge)
    (across, up), _ = cv2.getTextSize(text, font, scale, edge)
    margin = round(height * 0.05)
    at = {"bottom": ((width - across) // 2, height - 2 * margin),
          "top right": (width - across - margin, margin + up)}[place]  # fmt: skip
    written = image.copy()
    cv2.putText(written, text, at, font, scale, (16, 16, 16), edge * 3, cv2.LINE_AA)
    cv2.putText(written, text, at, font, scale, (250, 250, 250), edge, cv2.LINE_AA)
    blended: Image = cv2.addWeighted(written, opacity, image, 1 - opacity, 0)
    return blended


def bordered(frames: Iterator[Image], box: tuple[int, int, int, int]) -> Iterator[Image]:
    """Everything outside the box (x, y, width, height) black."""
    x, y, width, height = box
    for image in frames:
        framed = np.zeros_like(image)
        framed[y : y + height, x : x + width] = image[y : y + height, x : x + width]
        yield framed


def spliced(first: list[Image], second: list[Image], blend: int) -> Iterator[Image]:
    """One take after the other; the last `blend` frames of the first dissolve into the second."""
    whole = len(first) - blend
    yield from first[:whole]
    for k in range(blend):
        share = (k + 1) / (blend + 1)
        yield cv2.addWeighted(first[whole + k], 1 - share, second[k], share, 0)
    yield from second[blend:]


def held(frames: Iterator[Image], start: int, count: int) -> Iterator[Image]:
    """After `start` frames the last of them is repeated `count` times; then the action goes on."""
    last = None
    for last in itertools.islice(frames, start):
        yield last
    if last is not None:
        yield from itertools.repeat(last, count)
    yield from frames
