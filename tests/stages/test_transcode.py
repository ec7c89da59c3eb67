"""Every output frame carries its number as a barcode, so that a span is exact or seen not to be."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.conftest import write_video
from winnow.operators.frames import Span
from winnow.operators.media import probe
from winnow.pipeline.storage import Storage
from winnow.stages.records import Clip, Source
from winnow.stages.transcode import Transcode

BITS = 8


def barcode_frames(count: int, width: int = 256, height: int = 144) -> list[np.ndarray]:
    images = []
    for n in range(count):
        image = np.full((height, width, 3), 110, np.uint8)
        for bit in range(BITS):
            x = bit * width // BITS
            image[height // 4 : 3 * height // 4, x : x + width // BITS] = 235 * (n >> bit & 1)
        images.append(image)
    return images


def read_numbers(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        numbers = []
        for frame in container.decode(video=0):
            row = frame.to_ndarray(format="gray")[frame.height // 2]
            cells = row.reshape(BITS, -1) if len(row) % BITS == 0 else np.array_split(row, BITS)
            numbers.append(sum((np.mean(cell) > 120) << bit for bit, cell in enumerate(cells)))
        return numbers


def transcode(tmp_path: Path, path: Path, spans: list[Span], columns: dict | None = None):
    info = probe(path)
    files, media = Storage.open(str(path.parent)), Storage.open(str(tmp_path / "out"), create=True)
    stage = Transcode(files, media)
    stage.setup()
    fps = float(Fraction(info.frame_rate))
    with av.open(str(path)) as container:
        times = [float(f.pts * f.time_base) for f in container.decode(video=0)]
    times = [t - times[0] for t in times] + [info.duration_s]
    source = Source(0, str(path), path.name, path.stat().st_size, 0.0, None, "attempt", media=info)
    source.clips = [
        Clip(f"c{n}", span, times[span.start],
             times[span.end] if span.end < len(times) else span.end / fps, dict(columns or {}))
        for n, span in enumerate(spans)
    ]  # fmt: skip
    stage.process(source)
    return source.clips


@pytest.mark.parametrize("rate", [24, Fraction(30000, 1001), 16, 8])
@pytest.mark.parametrize("options", [{"g": "12", "bf": "2"}, {"g": "250", "bf": "3"}])
def test_spans_are_frame_exact(tmp_path, rate, options):
    video = write_video(tmp_path / "v.mp4", barcode_frames(60), rate, options=options)
    spans = [Span(0, 7), Span(7, 31), Span(31, 60)]
    clips = transcode(tmp_path, video, spans)
    for clip in clips:
        assert clip.failure is None
        assert read_numbers(Path(clip.media.uri)) == list(range(clip.span.start, clip.span.end))
        assert clip.media.fps == pytest.approx(float(rate))


def test_a_conforming_file_is_copied_without_encoding(tmp_path):
    video = write_video(tmp_path / "v.mp4", barcode_frames(48), 24)
    (clip,) = transcode(tmp_path, video, [Span(0, 48)])
    assert clip.media.copied
    assert read_numbers(Path(clip.media.uri)) == list(range(48))


def test_borders_are_cropped_away(tmp_path):
    framed = [np.pad(image, ((36, 36), (0, 0), (0, 0))) for image in barcode_frames(24)]
    video = write_video(tmp_path / "v.mp4", framed, 24)
    box = {"border_found": True, "border_x": 0, "border_y": 36, "border_width": 256,
           "border_height": 144}  # fmt: skip
    (clip,) = transcode(tmp_path, video, [Span(0, 24)], box)
    assert (clip.media.width, clip.media.height, clip.media.copied) == (256, 144, False)
    with av.open(clip.media.uri) as container:
        image = next(container.decode(video=0)).to_ndarray(format="gray")
    assert image[:4].mean() > 90


def test_an_uneven_frame_rate_becomes_constant(tmp_path):
    # 1 s of 30 fps, then 1 s of 10 fps.
    times = [*range(0, 990, 33), *range(1000, 2000, 100)]
    video = write_video(tmp_path / "v.mkv", barcode_frames(len(times)), 30, times=times)
    assert probe(video).variable_frame_rate
    (clip,) = transcode(tmp_path, video, [Span(0, len(times))])
    assert clip.failure is None
    made = probe(Path(clip.media.uri))
    assert not made.variable_frame_rate
    assert made.duration_s == pytest.approx(2.0, abs=0.12)
    numbers = read_numbers(Path(clip.media.uri))
    assert numbers == sorted(numbers)
    # At the mean rate the slow half loses no picture.
    assert set(numbers) >= set(range(31, len(times)))


def test_odd_sizes_ten_bits_and_other_codecs_conform_afterwards(tmp_path):
    odd = [image[:143, :255] for image in barcode_frames(24)]
    video = write_video(
        tmp_path / "v.mkv",
        odd,
        24,
        "libx265",
        "yuv444p10le",
        options={"x265-params": "log-level=none"},
    )
    (clip,) = transcode(tmp_path, video, [Span(0, 24)])
    assert clip.failure is None
    made = probe(Path(clip.media.uri))
    assert (made.codec, made.pixel_format, made.width, made.height) == ("h264", "yuv420p", 254, 142)


def test_a_rotated_video_comes_out_upright(tmp_path):
    plain = write_video(tmp_path / "plain.mp4", barcode_frames(24), 24)
    turned = tmp_path / "turned.mp4"
    with av.open(str(plain)) as source, av.open(str(turned), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(90)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    info = probe(turned)
    assert (info.width, info.height) == (144, 256)
    (clip,) = transcode(tmp_path, turned, [Span(0, 24)])
    assert clip.failure is None
    assert (clip.media.width, clip.media.height) == (144, 256)
    assert probe(Path(clip.media.uri)).rotation == 0


def test_a_clip_that_cannot_be_made_is_an_error_of_its_own(tmp_path):
    video = write_video(tmp_path / "v.mp4", barcode_frames(24), 24)
    beyond = Span(20, 40)
    good, bad = transcode(tmp_path, video, [Span(0, 20), beyond])
    assert good.failure is None
    assert bad.failure is not None
    assert bad.failure.startswith("transcode:")


@pytest.mark.parametrize("spans", [[Span(0, 12), Span(12, 30), Span(30, 40)], [Span(3, 33)]])
def test_spans_of_an_uneven_frame_rate_hold_their_own_frames_and_no_others(tmp_path, spans):
    times = [*range(0, 990, 33), *range(1000, 2000, 100)]
    video = write_video(tmp_path / "v.mkv", barcode_frames(len(times)), 30, times=times)
    for clip in transcode(tmp_path, video, spans):
        assert clip.failure is None
        numbers = read_numbers(Path(clip.media.uri))
        assert set(numbers) <= set(range(clip.span.start, clip.span.end))
        made = probe(Path(clip.media.uri))
        assert made.duration_s == pytest.approx(clip.end_s - clip.start_s, abs=0.06)
