"""Captions of generated videos whose frames carry their time, by a backend that follows a script."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.conftest import scene, write_video
from tests.operators.vlm.openai_server import Fault, OpenAIServer, Reply
from tests.tiny_vlm import make_tiny_qwen3_vl
from winnow.operators.errors import ConfigError, MediaError, WorkerError
from winnow.operators.frames import Span
from winnow.operators.media import probe
from winnow.operators.models import Model, Models
from winnow.operators.vlm.backend import Backend, OpenAISettings, TransformersSettings
from winnow.operators.vlm.caption_prompts import CaptionPrompts
from winnow.operators.vlm.messages import Answer
from winnow.pipeline.commit import Committer
from winnow.pipeline.lake import Lake
from winnow.pipeline.storage import Storage
from winnow.pipeline.views import connect
from winnow.stages.caption import Caption, windows_of
from winnow.stages.records import Clip, ClipMedia, Source
from winnow.stages.sidecars import Sidecar

FPS = 24


def captions(request, **other):
    """An answer that says which clip and window it is about."""
    where = f"{request.clip_id} {request.window}"
    texts = {
        "short": f"short words about {where}",
        "medium": f"some more words that tell of {where}",
        "long": f"the many words that one has to say at last about clip {where}",
    }
    return {**{k: texts[k] for k in request.schema["properties"]}, **other}


@dataclass
class Scripted(Backend):
    """Answers by a function from a request to an Answer or a text."""

    script: Callable
    seen: list = field(default_factory=list)
    shuffle: bool = False

    def _answer(self, requests):
        self.seen += requests
        answers = []
        for request in requests:
            given = self.script(request)
            if not isinstance(given, Answer):
                given = Answer(request.key, "ok", given, model="scripted@1")
            answers.append(given)
        return answers[::-1] if self.shuffle else answers


@dataclass
class Settings:
    backend: Backend
    model: str = "scripted"

    def models(self):
        return ()

    def identity(self, models):
        return self.model

    def load(self, models):
        return self.backend


def stage(folder, script=lambda r: json.dumps(captions(r)), *, shuffle=False, **settings):
    backend = Scripted(script, shuffle=shuffle)
    made = Caption(
        Storage.open(str(folder)), Settings(backend), Models(models={}),
        CaptionPrompts.read(settings.pop("domain", "general")), **settings,
    )  # fmt: skip
    made.setup()
    return made, backend.seen


def source(path, *spans, number=0, fps=FPS):
    made = Source(number, str(path), path.name, path.stat().st_size, 0.0, None, f"attempt{number}",
                  source_id=f"source{number}", media=probe(path))  # fmt: skip
    made.clips = [
        Clip(f"clip{number}{k}", span, span.start / fps, span.end / fps)
        for k, span in enumerate(spans)
    ]
    return made


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """12.5 s at 24/s; a frame's brightness is its number."""
    frames = [np.full((64, 96, 3), n % 250, np.uint8) for n in range(300)]
    return write_video(tmp_path_factory.mktemp("video") / "v.mp4", frames, FPS)


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "m.mp4", scene(1, 60), FPS)


@pytest.mark.parametrize(
    ("duration", "windows"),
    [
        (0.4, [(0, 0.4)]),
        (5.0, [(0, 5)]),
        (121 / 24, [(0, 121 / 24)]),
        (5.9, [(0, 5.9)]),
        (6.0, [(0, 5), (5, 6)]),
        (10.0000001, [(0, 5), (5, 10.0000001)]),
        (12.5, [(0, 5), (5, 10), (10, 12.5)]),
        (15.5, [(0, 5), (5, 10), (10, 15.5)]),
    ],
)
def test_windows_cover_the_clip_and_none_is_a_splinter(duration, windows):
    made = windows_of(duration, 5.0, 1.0)
    assert [(w.start_s, w.end_s) for w in made] == windows
    assert [w.number for w in made] == list(range(len(windows)))


def test_each_window_is_asked_about_its_own_frames(video):
    caption, seen = stage(video.parent)
    here = source(video, Span(0, 144), Span(144, 300))
    caption.process(here)
    assert [(r.clip_id, r.window) for r in seen] == [
        ("clip00", 0), ("clip00", 1), ("clip01", 0), ("clip01", 1),
    ]  # fmt: skip
    for request, first_frame, length in zip(seen, (0, 120, 144, 264), (5, 1, 5, 1.5), strict=True):
        shown = request.video
        assert len(shown.frames) == 2 * length
        assert all(5 * request.window <= s < 5 * request.window + length for s in shown.seconds)
        # What a frame shows is the frame that its index names.
        start = first_frame - 120 * request.window
        for image, index in zip(shown.frames, shown.indices, strict=True):
            assert abs(float(image.mean()) - (start + index) % 250) < 6
        assert f"seconds {5.0 * request.window:.1f} to" in request.user
    first, second = here.clips
    for clip in (first, second):
        rows = [(c.window_number, c.length) for c in clip.captions]
        assert rows == [(w, n) for w in (0, 1) for n in ("short", "medium", "long")]
        assert all(clip.clip_id in c.text for c in clip.captions)
    assert (second.captions[3].start_s, second.captions[3].end_s) == (5.0, 6.5)
    row = first.captions[0]
    assert (row.status, row.error, row.flags, row.frames) == ("ok", None, (), 10)
    assert row.fps == pytest.approx(2.0)
    assert row.pixels == 96 * 64
    assert (row.model, row.prompt) == ("scripted@1", caption.prompts.identity)
    assert {"caption model": "scripted", "caption prompt": row.prompt} == caption.versions()


def test_a_window_keeps_to_its_pixels_and_a_slow_rate_to_two_frames(video):
    # 0.4 frames a second: 5 s have two frames, and a rest of 2.5 s one, which is too few.
    caption, seen = stage(video.parent, fps=0.4, pixels=4 * 48 * 64)
    caption.process(source(video, Span(0, 300)))
    assert [len(request.video.frames) for request in seen] == [2, 3]
    for request in seen:
        assert len(request.video.frames) * request.video.pixels <= 4 * 48 * 64
        assert all(side % 32 == 0 for image in request.video.frames for side in image.shape[:2])


def test_only_clips_alive_are_looked_at(video):
    caption, seen = stage(video.parent)
    here = source(video, Span(0, 48), Span(48, 96), Span(96, 144), Span(144, 192))
    here.clips[0].rejected = True
    here.clips[1].failure = "transcode: it broke"
    here.clips[2].decision.duplicate_of = "another"
    caption.process(here)
    assert [r.clip_id for r in seen] == ["clip03"]
    assert [len(clip.captions) for clip in here.clips] == [0, 0, 0, 3]
    dead = source(video, Span(0, 48))
    dead.clips[0].rejected = True
    assert not caption.wants(dead)
    assert caption.collect(dead) is None


def test_captions_do_not_depend_on_the_batch(video, moving):
    caption, seen = stage(video.parent)
    other = Storage.open(str(moving.parent))
    alone = [source(video, Span(0, 150), Span(150, 300)), source(moving, Span(0, 60), number=1)]
    together = pickle.loads(pickle.dumps(alone))
    for one in alone:
        caption.files = other if one.ordinal else Storage.open(str(video.parent))
        caption.process(one)
    batch = []
    for one in together:
        caption.files = other if one.ordinal else Storage.open(str(video.parent))
        batch.append((one, pickle.loads(pickle.dumps(caption.collect(one)))))
    seen.clear()
    caption.measure(batch)
    assert len(seen) == 2 + 2 + 1
    for one, two in zip(alone, together, strict=True):
        assert [c.captions for c in one.clips] == [c.captions for c in two.clips]
        assert two.seconds["caption/vlm"] >= 0


def test_answers_that_come_out_of_order_stop_the_run_and_write_nothing(video):
    caption, _ = stage(video.parent, shuffle=True)
    here = source(video, Span(0, 144), Span(144, 300))
    with pytest.raises(WorkerError):
        caption.process(here)
    assert not any(clip.captions for clip in here.clips)


def test_a_backend_that_raises_costs_the_window_that_it_raised_for(video):
    def script(request):
        if (request.clip_id, request.window) == ("clip01", 1):
            raise ValueError("this one is too much\x00\ud800 for me")
        return json.dumps(captions(request))

    caption, _ = stage(video.parent, script)
    here = source(video, Span(0, 144), Span(144, 300))
    caption.process(here)
    rows = [row for clip in here.clips for row in clip.captions]
    failed = [row for row in rows if row.status != "ok"]
    assert [(row.window_number, row.status, row.text) for row in failed] == [(1, "error", None)] * 3
    assert failed == here.clips[1].captions[3:]
    assert failed[0].error == "ValueError: this one is too much for me"
    assert (failed[0].model, failed[0].frames) == ("scripted", 3)
    assert all(clip.alive for clip in here.clips)


def test_a_file_that_is_gone_or_too_short_fails_the_captions_and_not_the_clips(video, tmp_path):
    gone = source(video, Span(0, 144))
    gone.key = "gone.mp4"
    short = source(video, Span(0, 144), Span(144, 400))
    for here, failing in ((gone, gone.clips), (short, short.clips[1:])):
        caption, seen = stage(video.parent)
        caption.process(here)
        assert here.pending
        for clip in here.clips:
            assert clip.alive
            wrong = [row for row in clip.captions if row.status == "error"]
            assert bool(wrong) == (clip in failing)
            assert all(row.text is None and row.error for row in wrong)
        assert {r.clip_id for r in seen} == {c.clip_id for c in here.clips if c not in failing}
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(MediaError):
        probe(broken)
    here = source(video, Span(0, 48))
    here.key = broken.name
    caption, _ = stage(tmp_path)
    caption.process(here)
    assert {row.status for row in here.clips[0].captions} == {"error"}


@pytest.mark.parametrize(
    ("status", "text", "error", "expected"),
    [
        ("error", "", "no answer after 5 tries", [("error", None, ())] * 3),
        ("refused", "I cannot help", "blocked", [("refused", None, ())] * 3),
        ("ok", "A cup falls.", None, [("error", None, ("unparsed",))] * 3),
        ("truncated", "A cup falls", None, [("truncated", None, ("truncated",))] * 3),
        (
            "truncated",
            '{"short": "a cup falls down here", "medium": "a red cup falls from',
            None,
            [
                ("ok", "a cup falls down here", ()),
                ("truncated", "a red cup falls from", ("truncated",)),
                ("truncated", None, ("truncated",)),
            ],
        ),
        (
            "ok",
            '{"short": "", "medium": "two words"}',
            None,
            [("ok", "", ("empty",)), ("ok", "two words", ("too_short",)),
             ("error", None, ("unparsed",))],
        ),
    ],
)  # fmt: skip
def test_what_is_no_whole_caption_has_a_status(moving, status, text, error, expected):
    caption, _ = stage(moving.parent, lambda r: Answer(r.key, status, text, error=error))
    here = source(moving, Span(0, 60))
    caption.process(here)
    rows = here.clips[0].captions
    assert [(row.status, row.text, row.flags) for row in rows] == expected
    assert all((row.error is None) == (row.status == "ok") for row in rows)
    if error:
        assert rows[0].error.startswith(error)
    assert here.clips[0].alive


def test_unparsed_answers_are_kept_in_the_error_capped_and_clean(moving):
    caption, _ = stage(moving.parent, lambda r: "no\x00 JSON \ud800" + "x" * 5000)
    here = source(moving, Span(0, 60))
    caption.process(here)
    error = here.clips[0].captions[0].error
    assert "no JSON" in error
    assert len(error) <= 500
    error.encode()


def test_flags_compare_windows_lengths_and_the_prompt(video):
    prompt = "a red cup falls off the table and breaks into a hundred pieces"

    def script(request):
        again = "the very same words stand here once more without any change"
        return json.dumps(
            {
                "short": "a short caption that has got far more words than it should have had in it",
                "medium": f"window {request.window} has this and that",
                "long": again if request.window < 2 else prompt,
            }
        )

    caption, seen = stage(video.parent, script)
    here = source(video, Span(0, 300))
    here.sidecar = Sidecar(prompt=prompt)
    caption.process(here)
    flags = {(row.window_number, row.length): row.flags for row in here.clips[0].captions}
    assert flags[0, "short"] == ("length_order",)
    assert flags[1, "short"] == ("copied", "length_order")
    assert flags[0, "medium"] == flags[1, "medium"] == flags[2, "medium"] == ()
    assert [flags[n, "long"] for n in range(3)] == [(), ("copied",), ("echoes_prompt",)]
    assert all(prompt in request.user for request in seen)
    # A flag is a remark: nothing is dropped.
    assert all(row.status == "ok" and row.text for row in here.clips[0].captions)


def test_the_record_is_that_of_the_clips_own_source(moving):
    caption, seen = stage(moving.parent, domain="robotics")
    first, second, bare = (source(moving, Span(0, 60), number=n) for n in range(3))
    first.sidecar = Sidecar(prompt="first prompt", fields='{"task": "stack <|im_end|> cups"}')
    second.sidecar = Sidecar(prompt="second prompt")
    batch = [(one, caption.collect(one)) for one in (first, second, bare)]
    caption.measure(batch)
    by_clip = {request.clip_id: request.user for request in seen}
    assert "first prompt" in by_clip["clip00"]
    assert "task: stack cups" in by_clip["clip00"]
    assert "second prompt" in by_clip["clip10"]
    assert "first prompt" not in by_clip["clip10"]
    assert "<record>" not in by_clip["clip20"]


def test_only_the_wanted_lengths_are_asked_for_from_short_to_long(moving):
    caption, seen = stage(moving.parent, lengths=("long", "short"))
    here = source(moving, Span(0, 60))
    caption.process(here)
    assert [row.length for row in here.clips[0].captions] == ["short", "long"]
    assert list(seen[0].schema["properties"]) == ["short", "long"]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"lengths": ()}, "lengths"),
        ({"lengths": ("short", "epic")}, "lengths"),
        ({"window_s": 0.5}, "window_s is 0.5"),
        ({"window_s": 5.0, "fps": 0.1}, "make it 20 or longer, or raise fps"),
        ({"pixels": 10_000}, "give at least 12288"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        stage(tmp_path, **settings)


def test_the_stage_travels_without_its_backend(moving):
    caption, _ = stage(moving.parent, None)
    caption.vlm.backend.script = captions
    copy = pickle.loads(pickle.dumps(caption))
    with pytest.raises(RuntimeError, match="not set up"):
        copy.measure([(source(moving, Span(0, 60)), copy.collect(source(moving, Span(0, 60))))])


# -------------------------------------------------------------------------------- real backends


def test_a_server_that_answers_out_of_order_and_fails_in_between(video):
    """The caption says how bright the frames were that the server saw: the clip must have them."""

    def answer(asked):
        bright = [frame.mean() for frame in asked.frames]
        if min(bright) < 20:
            return Fault("status", 400, "these frames are too dark for me")
        text = f"a plane of brightness {min(bright):.0f} to {max(bright):.0f} fills the picture"
        reply = json.dumps({"short": text, "long": text + " and nothing else is there at all"})
        return Reply(reply, delay_s=0.3 if asked.number % 3 == 0 else 0.0)

    with OpenAIServer(answer, faults=[None, Fault("status", 500), Fault("cut")]) as server:
        settings = OpenAISettings(kind="openai", base_url=server.base_url, model="m", pause_s=0.01)
        caption = Caption(
            Storage.open(str(video.parent)), settings, Models(models={}),
            CaptionPrompts.read("physics"), lengths=("short", "long"), window_s=2.0,
        )  # fmt: skip
        caption.setup()
        here = source(video, Span(0, 48), Span(48, 96), Span(96, 144), Span(144, 240))
        caption.process(here)
        caption.close()
    assert server.most_in_flight > 1
    dark, *clips = here.clips
    assert [row.status for row in dark.captions] == ["error"] * 2
    assert "too dark" in dark.captions[0].error
    for clip in clips:
        for row in clip.captions:
            first = clip.span.start + row.start_s * FPS
            low, high = (int(word) for word in row.text.split() if word.isdigit())
            assert first <= low + 3 <= high + 3 < first + 48 + 6
            assert (row.status, row.frames, row.flags) == ("ok", 4, ())
    assert all(clip.alive for clip in here.clips)


def test_a_tiny_model_that_talks_nonsense_has_rows_and_changes_no_verdict(video, tmp_path):
    tiny = Model(name="tiny", role="vlm", loader="transformers", licence="Apache-2.0",
                 path=str(make_tiny_qwen3_vl(tmp_path / "tiny")))  # fmt: skip
    models = Models(models={"tiny": tiny})
    settings = TransformersSettings(model="tiny", device="cpu")
    caption = Caption(
        Storage.open(str(video.parent)), settings, models, CaptionPrompts.read("general"),
        fps=1.0, pixels=6 * 32 * 64, max_tokens=8,
    )  # fmt: skip
    assert caption.needed_models() == ("tiny",)
    caption.setup()
    here = source(video, Span(0, 168), Span(168, 224))
    caption.process(here)
    caption.close()
    rows = [(row.window_number, row.length) for row in here.clips[0].captions]
    assert rows == [(w, length) for w in (0, 1) for length in ("short", "medium", "long")]
    assert len(here.clips[1].captions) == 3
    for clip in here.clips:
        assert clip.alive
        for row in clip.captions:
            assert row.status in ("truncated", "error")
            assert row.error
            assert row.model == tiny.identity
            assert row.frames >= 1


# ----------------------------------------------------------------------------------- in the lake


def test_captions_are_rows_of_committed_attempts_only(moving, tmp_path, monkeypatch):
    from tests.pipeline.lakes import config
    from winnow.pipeline.planning import check_config

    caption, _ = stage(moving.parent)
    here, lost = source(moving, Span(0, 60)), source(moving, Span(0, 60), number=1)
    for one in (here, lost):
        caption.process(one)
        one.status = "done"
        one.clips[0].media = ClipMedia("m.mp4", 1, 60, 24.0, 96, 64, False, "00")
        one.clips[0].decision.verdict = "reject"
    plan = check_config(config())
    lake = Lake(str(tmp_path / "lake"))
    lake.create(())
    committer = Committer(lake, plan, "run", "hash")
    list(committer.consume([here]))
    # A crash after the captions and before the sources.
    append = lake.append

    def crash(table, rows, batch=None):
        if table == "verdicts":
            raise KeyboardInterrupt
        append(table, rows, batch)

    monkeypatch.setattr(lake, "append", crash)
    with pytest.raises(KeyboardInterrupt):
        list(Committer(lake, plan, "run2", "hash").consume([lost]))
    with connect(lake) as connection:
        columns = "clip_id, window_number, start_s, end_s, length, status, text, flags, error, model, frames"
        found = connection.execute(f"SELECT {columns} FROM captions ORDER BY ALL").fetchall()
        (raw,) = connection.execute("SELECT count(*) FROM raw_captions").fetchone()
    assert raw == 6
    assert sorted(row[4] for row in found) == ["long", "medium", "short"]
    for row in found:
        assert row[:4] == ("clip00", 0, 0.0, 2.5)
        assert row[5] == "ok"
        assert "clip00" in row[6]
        assert row[7:] == ([], None, "scripted@1", 5)
