"""Probing: files whose truth is known, cut off, mangled and hostile ones."""

from __future__ import annotations

import csv
import pickle
import random
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest

from winnow.operators.errors import MediaError
from winnow.operators.media import Limits, check, hash_file, packet_sizes, probe

VIDEOS = Path(__file__).parents[3] / "shared" / "videos"
X264 = ("-c:v", "libx264", "-threads", "1", "-bf", "2")
TONE = ("-f", "lavfi", "-i", "sine=duration=2")


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-nostdin", *arguments]
    subprocess.run([str(a) for a in command], check=True, timeout=60, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)  # fmt: skip


def make(path, *arguments, rate="25", size="160x120", duration=2, inputs=()):
    picture = ("-f", "lavfi", "-i", f"testsrc2=size={size}:rate={rate}:duration={duration}")
    ffmpeg(*picture, *inputs, *arguments, path)
    return path


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """The same two seconds in every container: 50 pictures at 25 per second, with a tone."""
    folder = tmp_path_factory.mktemp("media")
    aac, g = ("-c:a", "aac"), ("-g", "10")
    recipes = {
        "a.mp4": (*X264, *g, *aac),
        "fast.mp4": (*X264, *aac, "-movflags", "+faststart"),
        "fragments.mp4": (*X264, *g, *aac, "-movflags", "frag_keyframe+empty_moov"),
        "a.mov": (*X264, "-c:a", "pcm_s16le"),
        "a.mkv": (*X264, *aac),
        "a.webm": ("-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "16", "-c:a", "libopus"),
        "a.avi": ("-c:v", "mpeg4", "-bf", "2", "-c:a", "libmp3lame"),
        "a.flv": (*X264, *aac),
        "a.ts": (*X264, *aac),
    }  # fmt: skip
    return {name: make(folder / name, *recipe, inputs=TONE) for name, recipe in recipes.items()}


def kind_of(path):
    """The kind of the error, None if there is none; whatever else is raised fails the test."""
    try:
        probe(path)
    except MediaError as error:
        return error.kind
    return None


def written(path, content):
    path.write_bytes(content)
    return path


# ------------------------------------------------------------------------------------------ facts

CONTAINERS = ["a.mp4", "fast.mp4", "fragments.mp4", "a.mov", "a.mkv", "a.webm", "a.avi", "a.flv",
              "a.ts"]  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_facts_do_not_depend_on_the_container(kept, name):
    info = probe(kept[name])
    with av.open(str(kept[name])) as container:
        decoded = sum(1 for _ in container.decode(video=0))
    assert info.frames == decoded == 50
    assert (info.frame_rate, info.fps, info.variable_frame_rate) == ("25", 25.0, False)
    assert info.duration_s == pytest.approx(2.0, abs=0.001)
    assert (info.width, info.height, info.rotation) == (160, 120, 0)
    assert (info.pixel_format, info.bit_depth) == ("yuv420p", 8)
    assert info.has_audio
    assert 0 <= info.start_s < 0.1
    assert pickle.loads(pickle.dumps(info)) == info


def test_names_of_containers_and_codecs(kept):
    found = {name: (probe(path).container, probe(path).codec) for name, path in kept.items()}
    assert found["a.mp4"] == found["fragments.mp4"] == ("mp4", "h264")
    assert found["a.mov"] == ("mov", "h264")
    assert found["a.mkv"] == ("matroska", "h264")
    assert found["a.webm"] == ("webm", "vp8")
    assert found["a.avi"] == ("avi", "mpeg4")
    assert probe(kept["a.webm"]).audio_codec == "opus"
    assert (probe(kept["a.mp4"]).keyframes, probe(kept["fast.mp4"]).keyframes) == (5, 1)
    assert probe(kept["a.mp4"]).profile == "High"


@pytest.mark.parametrize("rate", ["24000/1001", "30000/1001", "24", "16", "8", "60", "12.5"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frame_rates_are_exact(tmp_path, rate, suffix):
    info = probe(make(tmp_path / f"v.{suffix}", *X264, rate=rate))
    assert Fraction(info.frame_rate) == Fraction(rate)
    assert not info.variable_frame_rate
    assert info.duration_s == pytest.approx(info.frames / Fraction(rate), abs=0.002)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("drop", "frames"), [("not(eq(n\\,20))", 49), ("lt(n\\,20)+not(mod(n\\,2))", 35)]
)
def test_one_missing_picture_makes_the_rate_variable(tmp_path, suffix, drop, frames):
    info = probe(
        make(tmp_path / f"v.{suffix}", "-vf", f"select='{drop}'", "-fps_mode", "vfr", *X264)
    )
    assert info.variable_frame_rate
    assert info.frames == frames
    first_to_last = (frames - 1) / info.fps
    assert first_to_last == pytest.approx(1.96 if frames == 49 else 1.92, abs=0.002)


def test_ten_bit_hevc_and_av1(tmp_path):
    hevc = probe(make(tmp_path / "h.mp4", "-c:v", "libx265", "-pix_fmt", "yuv420p10le"))
    assert (hevc.codec, hevc.bit_depth, hevc.pixel_format) == ("hevc", 10, "yuv420p10le")
    av1 = probe(make(tmp_path / "a.mp4", "-c:v", "libsvtav1", "-preset", "10"))
    assert (av1.codec, av1.frames, av1.duration_s) == ("av1", 50, pytest.approx(2.0))


def test_colour(tmp_path):
    path = make(tmp_path / "v.mp4", *X264, "-color_range", "pc", "-color_trc", "smpte2084",
                "-vf", "scale=out_range=pc,setparams=range=pc:color_trc=smpte2084")  # fmt: skip
    info = probe(path)
    assert (info.color_range, info.transfer) == ("full", "smpte2084")


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_rotated_video_is_described_upright(tmp_path, turn):
    flat = make(tmp_path / "flat.mp4", *X264, size="160x90", duration=1)
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", turn, "-i", flat, "-c", "copy", turned)
    info = probe(turned)
    assert info.rotation == turn
    assert (info.width, info.height) == ((160, 90) if turn == 180 else (90, 160))
    assert (info.coded_width, info.coded_height) == (160, 96)


def test_pixels_that_are_not_square(tmp_path):
    flat = make(tmp_path / "flat.mp4", *X264, "-vf", "setsar=4/3", duration=1)
    assert probe(flat).sample_aspect_ratio == pytest.approx(4 / 3)
    ffmpeg("-display_rotation", 90, "-i", flat, "-c", "copy", tmp_path / "turned.mp4")
    assert probe(tmp_path / "turned.mp4").sample_aspect_ratio == pytest.approx(3 / 4)


def test_odd_sizes_and_a_single_frame(tmp_path):
    path = make(tmp_path / "v.mp4", *X264, "-vf", "format=yuv444p,scale=161:91", "-frames:v", "1")
    info = probe(path)
    assert (info.width, info.height, info.frames) == (161, 91, 1)
    assert info.fps == 25.0
    assert info.duration_s == pytest.approx(0.04)
    assert not info.variable_frame_rate


def test_frames_before_an_edit_lists_start_are_not_counted(tmp_path):
    whole = make(tmp_path / "whole.mp4", "-c:v", "libx264", "-bf", "0", "-g", "50")
    cut = tmp_path / "cut.mp4"
    ffmpeg("-ss", "0.4", "-i", whole, "-c", "copy", cut)
    with av.open(str(cut)) as container:
        decoded = sum(1 for _ in container.decode(video=0))
    info = probe(cut)
    assert len(packet_sizes(cut)) == 50
    assert info.frames == decoded == 40
    assert info.duration_s == pytest.approx(1.6)


def test_audio_that_leads(tmp_path):
    path = tmp_path / "v.mkv"
    ffmpeg("-f", "lavfi", "-itsoffset", "0.5", "-i", "testsrc2=size=64x64:rate=25:duration=1",
           *TONE, *X264, "-c:a", "pcm_s16le", path)  # fmt: skip
    info = probe(path)
    with av.open(str(path)) as container:
        first = next(container.decode(video=0)).time
    assert 0.4 < info.start_s < 0.6
    assert info.start_s == pytest.approx(first, abs=0.001)
    assert info.duration_s == pytest.approx(1.0, abs=0.002)


def test_a_cover_picture_is_not_the_video(tmp_path):
    sound, cover = tmp_path / "sound.m4a", tmp_path / "cover.png"
    ffmpeg(*TONE, "-c:a", "aac", sound)
    make(cover, "-frames:v", "1")
    both = tmp_path / "both.mp4"
    ffmpeg("-i", sound, "-i", cover, "-map", 0, "-map", 1, "-c", "copy",
           "-disposition:v:0", "attached_pic", both)  # fmt: skip
    assert kind_of(both) == "no_video"


def test_packet_sizes_survive_a_change_of_container(kept, tmp_path):
    ffmpeg("-i", kept["a.mkv"], "-c:v", "copy", "-an", tmp_path / "b.mp4")
    sizes = packet_sizes(kept["a.mkv"])
    assert len(sizes) == 50
    assert packet_sizes(tmp_path / "b.mp4") == sizes


def test_names_that_look_like_something_else(kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = kept["a.mp4"].read_bytes()
    for name in ("data:x,y.mp4", "concat:a|b.mp4", "100%d.mp4", "a, 'b' \"c\" #?.mp4", "-i.mp4"):
        assert probe(written(Path(name), content)).frames == 50


@pytest.mark.real
@pytest.mark.skipif(not VIDEOS.exists(), reason=f"{VIDEOS} is not there")
def test_real_videos_are_what_their_manifest_says():
    manifest = (VIDEOS / "manifest.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(manifest.splitlines()):
        path = VIDEOS / row["path"]
        info = probe(path)
        assert (info.codec, info.width, info.height, info.frames) == (
            row["codec"], int(row["width"]), int(row["height"]), int(row["frames"]),
        ), path.name  # fmt: skip
        assert info.fps == pytest.approx(float(row["fps"]), abs=0.01)
        assert hash_file(path).startswith(row["sha256_16"])


# -------------------------------------------------------------------------------------- bad files


def test_kinds_of_what_is_no_video(tmp_path):
    sound = tmp_path / "sound.mp4"
    ffmpeg(*TONE, "-c:a", "aac", sound)
    wave = tmp_path / "wave.mp4"
    ffmpeg(*TONE, "-f", "wav", wave)
    picture = make(tmp_path / "picture.png", "-frames:v", "1")
    text = written(tmp_path / "text.mp4", b"a cat runs over the road\n" * 100)
    assert kind_of(sound) == kind_of(wave) == "no_video"
    assert kind_of(written(tmp_path / "png.mp4", picture.read_bytes())) == "not_video"
    assert kind_of(text) == "not_video"
    assert kind_of(written(tmp_path / "zeros.mp4", bytes(10_000))) == "not_video"
    assert kind_of(written(tmp_path / "empty.mp4", b"")) == "empty"
    assert kind_of(tmp_path / "gone.mp4") == "vanished"
    assert kind_of(tmp_path) == "unreadable"


@pytest.mark.parametrize(
    "text",
    ["ffconcat version 1.0\nfile secret.mp4\n",
     "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.mp4\n#EXT-X-ENDLIST\n",
     "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"],
)  # fmt: skip
def test_files_that_point_at_others_are_no_videos(kept, tmp_path, text):
    written(tmp_path / "secret.mp4", kept["a.mp4"].read_bytes())
    assert kind_of(written(tmp_path / "v.mp4", text.encode())) == "not_video"


@pytest.mark.parametrize("name", ["a.mp4", "fast.mp4", "fragments.mp4", "a.mov", "a.mkv", "a.webm",
                                  "a.avi"])  # fmt: skip
def test_a_file_that_is_cut_off_anywhere_is_truncated(kept, tmp_path, name):
    content = kept[name].read_bytes()
    # From behind the first box or element; fragments end in an index that nobody needs.
    last = len(content) - (300 if name == "fragments.mp4" else 1)
    for end in [64, *np.linspace(100, last, 25).astype(int), last]:
        cut = written(tmp_path / "cut.mp4", content[:end])
        assert kind_of(cut) == "truncated", (end, len(content))


def test_a_cut_off_flash_video_misses_its_declared_duration(kept, tmp_path):
    content = kept["a.flv"].read_bytes()
    assert kind_of(written(tmp_path / "v.flv", content[: len(content) // 2])) == "truncated"


def test_an_index_without_pictures_and_rubbish_after_the_end(kept, tmp_path):
    content = kept["fast.mp4"].read_bytes()
    assert kind_of(written(tmp_path / "rubbish.mp4", content + b"rubbish" * 100)) is None
    moov = content.index(b"moov")
    assert kind_of(written(tmp_path / "v.mp4", content.replace(b"moov", b"free"))) == "truncated"
    broken = content[: moov + 12] + bytes(200) + content[moov + 212 :]
    assert kind_of(written(tmp_path / "broken.mp4", broken)) in ("corrupt", "no_video")


def test_pictures_of_noise_are_corrupt(kept, tmp_path):
    content = kept["fast.mp4"].read_bytes()
    start = content.index(b"mdat") + 4
    noise = content[:start] + random.Random(0).randbytes(len(content) - start)
    assert kind_of(written(tmp_path / "v.mp4", noise)) == "corrupt"


def test_random_bytes_never_raise_anything_else(tmp_path):
    path = tmp_path / "v.mp4"
    for seed in range(150):
        rng = random.Random(seed)
        content = rng.randbytes(rng.choice([1, 4, 8, 16, 100, 1000, 20_000]))
        assert kind_of(written(path, content)) == "not_video", seed


@pytest.mark.parametrize("name", CONTAINERS)
def test_mangled_files_never_raise_anything_else(kept, tmp_path, name):
    content, path = kept[name].read_bytes(), tmp_path / name
    for seed in range(40):
        rng = random.Random(seed)
        mangled = bytearray(content)
        where = (len(content), 2000, -2000)[seed % 3]  # anywhere, in the header, at the end
        for _ in range(rng.choice([1, 4, 40])):
            place = rng.randrange(where) if where > 0 else len(content) - 1 - rng.randrange(-where)
            mangled[place] ^= 1 << rng.randrange(8)
        kind_of(written(path, bytes(mangled)))
        kind_of(written(path, bytes(mangled[: rng.randrange(len(mangled))])))


def patched(content, box, offset, value):
    """A file with a 32-bit number in the first `box` changed."""
    start = content.index(box) + 4 + offset
    return content[:start] + struct.pack(">I", value) + content[start + 4 :]


def test_an_index_larger_than_the_file_is_never_built(kept, tmp_path):
    whole, fragments = kept["a.mov"].read_bytes(), kept["fragments.mp4"].read_bytes()
    many = 150_000_000
    bombs = {
        "uniform sizes": patched(patched(whole, b"stsz", 4, 1), b"stsz", 8, many),
        "table of sizes": patched(whole, b"stsz", 8, many),
        "fragment": patched(fragments, b"trun", 4, many),
        "edits": patched(whole, b"elst", 4, many),
    }
    for name, content in bombs.items():
        assert kind_of(written(tmp_path / "v.mp4", content)) in ("truncated", "corrupt"), name


# ----------------------------------------------------------------------------------------- limits


def test_limits(kept):
    path = kept["a.mp4"]
    info, size = probe(path), path.stat().st_size
    check(info, size, Limits())
    check(info, size, Limits(max_bytes=size, max_pixels=160 * 120, max_duration_s=2.01))
    beyond = {
        "too_large": Limits(max_bytes=size - 1),
        "too_many_pixels": Limits(max_pixels=160 * 120 - 1),
        "too_long": Limits(max_duration_s=1.99),
    }
    for kind, limits in beyond.items():
        with pytest.raises(MediaError) as caught:
            check(info, size, limits)
        assert caught.value.kind == kind
    with pytest.raises(MediaError, match="bytes"):
        check(None, size, Limits(max_bytes=10))


def test_a_picture_of_too_many_pixels_is_not_decoded(kept):
    for limits, kind in [(Limits(max_pixels=1000), "too_many_pixels"),
                         (Limits(max_bytes=1000), "too_large")]:  # fmt: skip
        with pytest.raises(MediaError) as caught:
            probe(kept["a.mp4"], limits)
        assert caught.value.kind == kind


@pytest.mark.parametrize("limit", [{"max_bytes": 0}, {"max_pixels": -1}, {"max_duration_s": 0.0}])
def test_limits_that_make_no_sense(limit):
    with pytest.raises(ValueError, match="above 0"):
        Limits(**limit)
