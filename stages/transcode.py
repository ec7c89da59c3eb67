"""Transcode: kept clips become conforming files, cropped and cut; what conforms is only copied."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import ffmpeg

from winnow.operators.errors import LakeError, MediaError, StorageError
from winnow.operators.frames import decode
from winnow.operators.media import MediaInfo, hash_file, packet_sizes, probe
from winnow.stages.encoders import choose_encoder, ffmpeg_executable
from winnow.stages.records import Clip, ClipMedia, Source
from winnow.stages.stage import Files, MediaSink, Stage


class TranscodeError(Exception):
    """One clip could not be encoded, or its output is not what it should be."""


@dataclass(frozen=True, slots=True)
class Crop:
    """A box in upright pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Target:
    """What the output of one clip must be."""

    frames: int
    fps: Fraction
    width: int
    height: int
    tolerance: int = 0
    """Frames by which the count may be off: 1 where an uneven rate is made constant."""


@dataclass
class Transcode(Stage):
    """Encodes the survivors: H.264 yuv420p, even sizes, constant frame rate, faststart."""

    name: ClassVar[str] = "transcode"
    files: Files
    media: MediaSink
    encoder: str = "auto"
    crf: int = 18
    preset: str = "veryfast"
    threads: int = 1
    timeout_s: float = 600.0
    label: str = "transcode"

    def setup(self) -> None:
        self.encoder = choose_encoder(self.encoder)

    def wants(self, source: Source) -> bool:
        return any(clip.alive for clip in source.clips)

    def process(self, source: Source) -> None:
        clips = [clip for clip in source.clips if clip.alive]
        if not clips or source.media is None:
            return
        with self.files.local(source.key) as path, tempfile.TemporaryDirectory() as folder:
            for clip in clips:
                try:
                    clip.media = self._make(path, source.media, clip, Path(folder))
                except (TranscodeError, MediaError) as error:
                    clip.failure = f"transcode: {error}"

    def _make(self, path: Path, info: MediaInfo, clip: Clip, folder: Path) -> ClipMedia:
        output = folder / f"{clip.clip_id}.mp4"
        crop = crop_box(clip, info)
        target = self._target(info, clip, crop)
        copied = conforms(info) and crop is None and len(clip.span) == info.frames
        if copied:
            self._run(copy_arguments(path, output))
            if packet_sizes(output) != packet_sizes(path):
                raise TranscodeError("the copied stream differs from the source's")
        else:
            self._run(self.encode_arguments(path, output, info, clip, crop, target))
        made = self._verify(output, target, decoded=copied)
        sha256 = hash_file(output)
        # With the hash in its name, no other making of the clip can replace a file that rows name.
        recipe = self._recipe(crop, copied)
        key = f"{clip.clip_id[:2]}/{clip.clip_id}-{recipe}-{sha256[:12]}.mp4"
        try:
            uri = self.media.put(output, key)
        except StorageError as error:
            raise LakeError(f"the lake cannot take the clip's media: {error}") from error
        return ClipMedia(
            uri=uri,
            bytes=output.stat().st_size,
            frames=made.frames,
            fps=made.fps,
            width=made.width,
            height=made.height,
            copied=copied,
            sha256=sha256,
        )

    def _recipe(self, crop: Crop | None, copied: bool) -> str:
        """Names how the file was made."""
        if copied:
            return "copy"
        box = f"-{crop.width}x{crop.height}+{crop.x}+{crop.y}" if crop else ""
        return f"{self.encoder}-crf{self.crf}{box}"

    def _target(self, info: MediaInfo, clip: Clip, crop: Crop | None) -> Target:
        width, height = (crop.width, crop.height) if crop else square_size(info)
        fps = Fraction(info.frame_rate)
        frames = len(clip.span)
        if info.variable_frame_rate:
            frames = max(1, round((clip.end_s - clip.start_s) * fps))
        uneven = int(info.variable_frame_rate)
        return Target(frames, fps, width - width % 2, height - height % 2, uneven)

    def encode_arguments(
        self, path: Path, output: Path, info: MediaInfo, clip: Clip, crop: Crop | None,
        target: Target,
    ) -> list[str]:  # fmt: skip
        """The ffmpeg command for one clip, as an argument list."""
        inputs: dict[str, Any] = {"protocol_whitelist": "file"}
        whole = len(clip.span) == info.frames
        offset = 0.0
        if not whole and clip.span.start > 0:
            # Seek to before the first frame: with re-encoding, ffmpeg drops what comes before.
            # Half a frame of slack keeps the frame itself on the right side of rounding.
            offset = max(0.0, clip.start_s - 0.5 / float(target.fps))
            inputs["ss"] = f"{info.start_s + offset:.6f}"
        video = ffmpeg.input(f"file:{path.resolve()}", **inputs).video
        if not whole:
            length = clip.end_s - clip.start_s
            lead = clip.start_s - offset
            video = video.filter(
                "trim", start=max(0.0, lead - 0.25 / float(target.fps)),
                end=lead + length - 0.25 / float(target.fps),
            ).filter("setpts", "PTS-STARTPTS")  # fmt: skip
        else:
            video = video.filter("setpts", "PTS-STARTPTS")
        if info.variable_frame_rate:
            video = video.filter("fps", fps=str(target.fps), start_time=0, eof_action="round")
        if crop:
            video = video.filter("crop", crop.width, crop.height, crop.x, crop.y)
        elif square_size(info) != (info.width, info.height):
            video = video.filter("scale", *square_size(info))
        video = video.filter("crop", target.width, target.height, 0, 0).filter("setsar", 1)
        options: dict[str, Any] = {
            "c:v": self.encoder, "pix_fmt": "yuv420p", "r": str(target.fps),
            "frames:v": target.frames + target.tolerance, "movflags": "+faststart", "threads": self.threads,
            "map_metadata": -1, "f": "mp4",
        }  # fmt: skip
        options |= quality(self.encoder, self.crf, self.preset)
        stream = ffmpeg.output(video, f"file:{output}", **options)
        return [ffmpeg_executable(), *stream.global_args(*QUIET).overwrite_output().get_args()]

    def _run(self, argv: list[str]) -> None:
        try:
            done = subprocess.run(argv, capture_output=True, timeout=self.timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise TranscodeError(f"ffmpeg took longer than {self.timeout_s:.0f} s") from error
        if done.returncode != 0:
            text = done.stderr.decode(errors="replace").strip().splitlines()
            raise TranscodeError(f"ffmpeg failed: {' | '.join(text[-3:]) or done.returncode}")

    def _verify(self, output: Path, target: Target, *, decoded: bool) -> MediaInfo:
        """Probe the output again, and decode it to the end.

        A copied stream has the source's packets, which an earlier stage has decoded.
        """
        made = probe(output)
        if abs(made.frames - target.frames) > target.tolerance:
            raise TranscodeError(f"the output has {made.frames} frames, not {target.frames}")
        if (made.width, made.height) != (target.width, target.height):
            raise TranscodeError(
                f"the output is {made.width}x{made.height}, not {target.width}x{target.height}"
            )
        if not decoded:
            frames = sum(1 for _ in decode(output, threads=self.threads))
            if frames != made.frames:
                raise TranscodeError(f"only {frames} of {made.frames} output frames decode")
        return made


QUIET = ("-hide_banner", "-nostdin", "-v", "error")


def quality(encoder: str, crf: int, preset: str) -> dict[str, Any]:
    """The same quality target in each encoder's own words."""
    if encoder == "h264_nvenc":
        return {"cq": crf, "rc": "vbr", "tune": "hq", "preset": "p5"}
    if encoder == "libx264":
        return {"crf": crf, "preset": preset}
    return {"b:v": "8M"}


def copy_arguments(path: Path, output: Path) -> list[str]:
    """The ffmpeg command that copies the video stream into a faststart mp4."""
    video = ffmpeg.input(f"file:{path.resolve()}", protocol_whitelist="file").video
    stream = ffmpeg.output(
        video, f"file:{output}", **{"c:v": "copy", "movflags": "+faststart", "map_metadata": -1,
                                    "f": "mp4"}
    )  # fmt: skip
    return [ffmpeg_executable(), *stream.global_args(*QUIET).overwrite_output().get_args()]


def conforms(info: MediaInfo) -> bool:
    """True where the video stream already is what transcoding would make."""
    return (
        info.codec == "h264"
        and info.pixel_format == "yuv420p"
        and info.width % 2 == 0
        and info.height % 2 == 0
        and info.rotation == 0
        and not info.variable_frame_rate
        and square_size(info) == (info.width, info.height)
    )


def square_size(info: MediaInfo) -> tuple[int, int]:
    """Upright size with square pixels."""
    aspect = info.sample_aspect_ratio
    if aspect <= 0 or abs(aspect - 1) < 1e-3:
        return info.width, info.height
    return max(2, round(info.width * aspect)), info.height


def crop_box(clip: Clip, info: MediaInfo) -> Crop | None:
    """The picture inside black borders, where `border` found any."""
    columns = clip.columns
    if not columns.get("border_found") or square_size(info) != (info.width, info.height):
        return None
    box = Crop(*(int(columns[f"border_{side}"]) for side in ("x", "y", "width", "height")))
    return None if (box.width, box.height) == (info.width, info.height) else box
