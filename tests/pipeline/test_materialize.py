"""The dataset of a later policy: the media are those that a run with that policy would have made."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import scene, write_video
from tests.pipeline.lakes import rows
from tests.tiny_vlm import vlm_models_file
from winnow.operators.errors import ConfigError, LakeError, LedgerError
from winnow.pipeline.backfill import latest_settings
from winnow.pipeline.cli import app
from winnow.pipeline.config import load_config
from winnow.pipeline.export import ExportSettings, export
from winnow.pipeline.lake import Lake
from winnow.pipeline.lake_check import check_lake
from winnow.pipeline.materialize import materialize
from winnow.pipeline.policy import load_policy
from winnow.pipeline.refilter import refilter
from winnow.pipeline.run import run
from winnow.pipeline.run_lock import LakeBusy, hold_lake
from winnow.pipeline.storage import Storage

CONFIG = """
name: small
policy: {policy}
isolate: false
commit: {{sources: 2}}
stages:
- stage: ingest
- {{stage: split, detector: {{kind: none}}, longest_s: 1}}
- stage: filter
  label: cheap
  operators: {{border: {{}}, exposure: {{}}}}
- stage: transcode
- stage: shard
"""
RULE = "[{name: dark, reject: exposure_mean < 0.25, reason: too dark}]"
CLIPS = 11
BRIGHT = 3
DARK = CLIPS - BRIGHT
DARK_SOURCES = 4


# Ray and the models use what is deprecated.
models_warn = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)  # fmt: skip


def dark(images):
    return [image // 8 for image in images]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Clips of a dark scene are rejected; some share a source with bright ones."""
    folder = tmp_path_factory.mktemp("videos")
    given = folder / "in #1"
    write_video(given / "0 bright.mp4", scene(0, 48))
    write_video(given / "1 half.mp4", dark(scene(1, 24)) + scene(1, 48)[24:])
    (given / "1 half.txt").write_text("a disc turns bright")
    framed = [image // 3 for image in scene(2, 60)]
    for image in framed:
        image[:20], image[-20:] = 0, 0
    write_video(given / "2 framed.mp4", framed)
    uneven = [int(1000 * n / 24) + (15 if n % 3 else 0) for n in range(48)]
    write_video(given / "3 uneven.mp4", dark(scene(3, 48)), times=uneven)
    write_video(given / "4 short.mp4", dark(scene(4, 20)))
    for name, rule in (("strict", RULE), ("loose", "[]")):
        (folder / f"{name}.yaml").write_text(f"name: {name}\nrules: {rule}\n")
        text = CONFIG.format(policy=folder / f"{name}.yaml")
        (folder / f"run_{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def strict(folder, tmp_path_factory) -> Lake:
    """What a run with the strict policy leaves."""
    lake = Lake(str(tmp_path_factory.mktemp("lake") / "strict"))
    run(load_config(str(folder / "run_strict.yaml")), str(folder / "in #1"), lake)
    return lake


@pytest.fixture(scope="module")
def loose(folder, tmp_path_factory) -> Lake:
    """What a run with the loose policy would have left."""
    lake = Lake(str(tmp_path_factory.mktemp("lake") / "loose"))
    run(load_config(str(folder / "run_loose.yaml")), str(folder / "in #1"), lake)
    return lake


@pytest.fixture
def own(strict, folder, tmp_path) -> Lake:
    """A lake whose clips the loose policy keeps since."""
    lake = copied(strict, tmp_path)
    refilter(lake, load_policy(str(folder / "loose.yaml")))
    return lake


@pytest.fixture
def moved(folder, tmp_path) -> tuple[Lake, Path]:
    """The same over a folder that a test may change."""
    shutil.copytree(folder / "in #1", tmp_path / "in")
    lake = Lake(str(tmp_path / "lake"))
    run(load_config(str(folder / "run_strict.yaml")), str(tmp_path / "in"), lake)
    refilter(lake, load_policy(str(folder / "loose.yaml")))
    return lake, tmp_path / "in"


def copied(lake: Lake, tmp_path: Path) -> Lake:
    """A copy whose media lie in it."""
    shutil.copytree(lake.uri, tmp_path / "own")
    return Lake(str(tmp_path / "own"))


def dataset(lake: Lake, policy: str = "loose") -> list[tuple]:
    """The dataset with what its files hold, without what names the attempt and the place."""
    found = rows(lake, "SELECT * EXCLUDE (attempt_id, policy, media_uri, source_id), media_uri "
                       f"FROM dataset WHERE policy = '{policy}' ORDER BY clip_id")  # fmt: skip
    return [
        (*row, Path(uri).name, hashlib.sha256(Path(uri).read_bytes()).hexdigest())
        for *row, uri in found
    ]


def frames_by_decord(lake: Lake, policy: str = "loose") -> list[tuple[int, int]]:
    """(frames that decord sees and decodes, frames of the row) of each clip."""
    decord = pytest.importorskip("decord")
    found = []
    for uri, frames in rows(
        lake, f"SELECT media_uri, frames FROM dataset WHERE policy = '{policy}'"
    ):
        reader = decord.VideoReader(uri)
        assert reader[len(reader) - 1].shape[2] == 3
        found.append((len(reader), frames))
    return found


def sound(lake: Lake) -> None:
    result = check_lake(lake, deep=True)
    assert result.violations == []


def test_the_dataset_is_that_of_a_run_with_the_policy(own, loose):
    assert len(dataset(own)) == BRIGHT  # shared by refilter, from the run's own policy
    assert len(dataset(own, "strict")) == BRIGHT
    result = materialize(own, "loose")
    assert result.line == f"clips {DARK} = {DARK} made + 0 unavailable + 0 failed"
    assert (result.kept, result.present, result.shared) == (CLIPS, BRIGHT, 0)
    assert result.sources == DARK_SOURCES  # two clips of one source in one pass
    made = dataset(own)
    assert len(made) == CLIPS
    assert made == dataset(loose)
    seen = frames_by_decord(own)
    assert all(length == frames for length, frames in seen)
    assert len(seen) == CLIPS
    heights = {height for (height,) in rows(own, "SELECT DISTINCT height FROM dataset")}
    assert heights == {180, 140}, "what is framed is cropped"
    sound(own)
    assert not [note for note in check_lake(own).notes if note.check == "dataset"]


def test_refilter_puts_what_has_media_into_the_dataset_once(strict, folder, tmp_path):
    lake = copied(strict, tmp_path)
    policy = load_policy(str(folder / "loose.yaml"))
    assert refilter(lake, policy, dry_run=True).shared == 0
    assert dataset(lake) == []
    first = refilter(lake, policy)
    assert (first.shared, first.kept_without_media) == (BRIGHT, DARK)
    version = lake.open("dataset").version()
    shared = rows(lake, "SELECT * EXCLUDE policy FROM dataset WHERE policy = 'loose' ORDER BY 1")
    assert shared == rows(
        lake, "SELECT * EXCLUDE policy FROM dataset WHERE policy = 'strict' ORDER BY 1"
    )
    assert refilter(lake, policy).shared == 0
    assert lake.open("dataset").version() == version
    # What the strict policy finds again was its own all the time.
    assert refilter(lake, load_policy(str(folder / "strict.yaml"))).shared == 0
    assert lake.open("dataset").version() == version


def test_media_of_attempts_that_never_committed_are_not_shared(strict, folder, tmp_path):
    lake = copied(strict, tmp_path)
    (clip_id,) = rows(lake, "SELECT min(clip_id) FROM verdicts WHERE verdict = 'reject'")[0]
    lake.append("dataset", [{"clip_id": clip_id, "attempt_id": "lost", "policy": "strict",
                             "source_id": "s", "media_uri": "/gone.mp4"}])  # fmt: skip
    result = refilter(lake, load_policy(str(folder / "loose.yaml")))
    assert (result.shared, result.kept_without_media) == (BRIGHT, DARK)
    assert materialize(lake, "loose").counts["made"] == DARK
    assert rows(lake, "SELECT count(*) FROM dataset WHERE media_uri = '/gone.mp4'") == [(0,)]


def test_rows_are_shared_where_a_refilter_was_stopped_before_it_could(
    strict, folder, tmp_path, loose, monkeypatch
):
    lake = copied(strict, tmp_path)
    append = Lake.append_table

    def crash(self, table, data, batch=None):
        if table == "dataset":
            raise LakeError("the power went")
        append(self, table, data, batch)

    monkeypatch.setattr(Lake, "append_table", crash)
    with pytest.raises(LakeError, match="power"):
        refilter(lake, load_policy(str(folder / "loose.yaml")))
    monkeypatch.undo()
    assert dataset(lake) == []
    result = materialize(lake, "loose")
    assert (result.shared, result.present, result.counts["made"]) == (BRIGHT, 0, DARK)
    assert dataset(lake) == dataset(loose)


def test_made_is_made(own):
    materialize(own, "loose")
    versions = {t: own.open(t).version() for t in ("dataset", "captions", "verdicts")}
    again = materialize(own, "loose")
    assert (again.asked, again.present, again.useless) == (0, CLIPS, False)
    assert versions == {t: own.open(t).version() for t in versions}


def test_a_limit_leaves_the_rest_for_later_and_a_dry_run_writes_nothing(own, loose):
    before = own.open("dataset").version()
    dry = materialize(own, "loose", dry_run=True)
    assert (dry.asked, dry.sources, dry.counts["made"]) == (DARK, DARK_SOURCES, 0)
    assert own.open("dataset").version() == before
    part = materialize(own, "loose", limit=3)
    assert (part.counts["made"], part.later) == (3, DARK - 3)
    rest = materialize(own, "loose")
    assert (rest.counts["made"], rest.later) == (DARK - 3, 0)
    assert dataset(own) == dataset(loose)


def test_sources_that_are_gone_or_changed_leave_their_clips_without_media(moved):
    lake, given = moved
    (given / "2 framed.mp4").unlink()
    content = bytearray((given / "4 short.mp4").read_bytes())
    content[-1] ^= 1
    (given / "4 short.mp4").write_bytes(content)
    result = materialize(lake, "loose")
    assert result.problems == {"vanished": 1, "changed": 1}
    assert result.counts == {"made": DARK - 4, "unavailable": 4, "failed": 0}
    assert {Path(uri).name for uri, _ in result.examples} == {"2 framed.mp4", "4 short.mp4"}
    assert len(dataset(lake)) == CLIPS - 4
    assert rows(lake, "SELECT count(*) FROM verdicts WHERE verdict = 'keep' AND policy = 'loose'"
                ) == [(CLIPS,)]  # fmt: skip
    notes = [note for note in check_lake(lake).notes if note.check == "dataset"]
    assert [(note.count, "materialize" in note.text) for note in notes] == [(4, True)]
    for file in given.glob("*.mp4"):
        file.unlink()
    assert materialize(lake, "loose").useless


def test_a_clip_that_cannot_be_encoded_is_an_error_as_in_a_run(own, tmp_path):
    settings = latest_settings(own, ["stages.transcode.encoder=libx264"])
    broken = latest_settings(own, ["stages.transcode.encoder=libx264",
                                   "stages.transcode.preset=nosuch"])  # fmt: skip
    result = materialize(own, "loose", config=broken, limit=2)
    assert result.counts == {"made": 0, "unavailable": 0, "failed": 2}
    assert result.problems == {"transcode": 2}
    assert "1 half.mp4 from 0.00 to 1.00 s" in result.examples[0][0]
    failed = rows(lake := own, "SELECT verdict, reasons, decided_by FROM verdicts "
                               "WHERE policy = 'loose' AND verdict <> 'keep'")  # fmt: skip
    assert failed == [("error", ["transcode"], result.materialize_id)] * 2
    assert materialize(lake, "loose", config=settings).counts["made"] == DARK - 2
    sound(lake)


def test_a_batch_that_is_cut_off_is_made_again_and_nothing_twice(own, loose, monkeypatch):
    append = Lake.append

    def crash(self, table, data, batch=None):
        if table == "dataset" and batch[1] == 2:
            raise LakeError("the power went")
        append(self, table, data, batch)

    monkeypatch.setattr(Lake, "append", crash)
    with pytest.raises(LakeError, match="power"):
        materialize(own, "loose")
    monkeypatch.undo()
    there = len(dataset(own))
    assert BRIGHT < there < CLIPS
    result = materialize(own, "loose")
    assert result.counts["made"] == CLIPS - there
    assert dataset(own) == dataset(loose)
    sound(own)


def test_rows_that_vanish_are_an_error(own, monkeypatch):
    append = Lake.append

    def lossy(self, table, data, batch=None):
        append(self, table, data[:-1] if table == "dataset" else data, batch)

    monkeypatch.setattr(Lake, "append", lossy)
    with pytest.raises(LedgerError, match="does not balance"):
        materialize(own, "loose")


KILLED = """
import sys
from winnow.pipeline.backfill import latest_settings
from winnow.pipeline.lake import Lake
from winnow.pipeline.materialize import materialize
if __name__ == "__main__":
    lake = Lake(sys.argv[1])
    more = ["isolate=true", "commit.sources=1", "stages.transcode.workers={max: 1}"]
    materialize(lake, "loose", config=latest_settings(lake, more))
"""


def test_killed_in_the_middle_it_goes_on(own, loose, tmp_path):
    script = tmp_path / "make.py"
    script.write_text(KILLED)
    before = own.open("dataset").version()
    process = subprocess.Popen([sys.executable, script, own.uri], stderr=subprocess.PIPE)
    log = Path(own.table_uri("dataset")) / "_delta_log" / f"{before + 1:020d}.json"
    deadline = time.monotonic() + 60
    while not log.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    there = len(dataset(own))
    assert BRIGHT < there < CLIPS
    result = materialize(own, "loose")
    assert result.counts == {"made": CLIPS - there, "unavailable": 0, "failed": 0}
    assert dataset(own) == dataset(loose)
    sound(own)


@pytest.mark.slow
@models_warn
def test_captions_are_those_of_a_run_and_no_clip_gets_them_twice(folder, tmp_path, monkeypatch):
    """Cut off after its captions and before its row in the dataset, a clip has its captions."""
    stage = "{stage: caption, pixels: 65536, max_tokens: 4, workers: {max: 1}, decoders: 1, domain: general}"
    lakes, given = {}, tmp_path / "in"
    for file in ("1 half.mp4", "1 half.txt", "4 short.mp4"):
        given.mkdir(exist_ok=True)
        shutil.copy2(folder / "in #1" / file, given / file)
    for name in ("strict", "loose"):
        text = (folder / f"run_{name}.yaml").read_text().replace("- stage: shard", "")
        config = tmp_path / f"{name}.yaml"
        config.write_text(f"{text}- {stage}\n- stage: shard\n")
        models = vlm_models_file(tmp_path / "vlm")
        lakes[name] = Lake(str(tmp_path / name))
        settings = load_config(str(config), [f"models={models}", "commit.sources=1"])
        run(settings, str(given), lakes[name])
    lake = lakes["strict"]
    captions = "SELECT * EXCLUDE attempt_id FROM captions ORDER BY clip_id, window_number, length"
    refilter(lake, load_policy(str(folder / "loose.yaml")))
    append = Lake.append

    def crash(self, table, data, batch=None):
        if table == "dataset" and batch[1] == 2:
            raise LakeError("the power went")
        append(self, table, data, batch)

    monkeypatch.setattr(Lake, "append", crash)
    with pytest.raises(LakeError, match="power"):
        materialize(lake, "loose")
    monkeypatch.undo()
    assert len(rows(lake, "SELECT DISTINCT clip_id FROM captions")) == 3
    assert len(dataset(lake)) == 2
    assert rows(lake, captions) == rows(lakes["loose"], captions)
    version = lake.open("captions").version()
    result = materialize(lake, "loose")
    assert (result.captioned, result.counts["failed"]) == (0, 0)
    assert lake.open("captions").version() == version
    assert dataset(lake) == dataset(lakes["loose"])
    sound(lake)


@pytest.mark.slow
@models_warn
def test_ray_makes_the_same(own, loose):
    settings = latest_settings(own, ["engine=ray", "isolate=true"])
    assert materialize(own, "loose", config=settings).counts["made"] == DARK
    assert dataset(own) == dataset(loose)


def test_sources_in_a_bucket(folder, s3, tmp_path):
    bucket = Storage.open("s3://bucket/made", options=s3, create=True)
    for file in sorted((folder / "in #1").glob("*.mp4"))[1:3]:
        bucket.put(file, f"in #1/{file.name}")
    lake = Lake(str(tmp_path / "lake"))
    run(load_config(str(folder / "run_strict.yaml")), "s3://bucket/made/in #1", lake, options=s3)
    refilter(lake, load_policy(str(folder / "loose.yaml")))
    bucket.delete("in #1/2 framed.mp4")
    result = materialize(lake, "loose", options=s3)
    assert result.counts == {"made": 1, "unavailable": 3, "failed": 0}
    assert result.problems == {"vanished": 1}


def test_what_cannot_be_asked_is_said_before_any_work(own, folder, tmp_path):
    with pytest.raises(ConfigError, match="no verdicts of the policy 'nosuch'"):
        materialize(own, "nosuch")
    none = load_config(str(folder / "run_loose.yaml"))
    none = none.model_copy(update={"stages": none.stages[:3]})
    with pytest.raises(ConfigError, match="no stage transcode"):
        materialize(own, "loose", config=none)
    with pytest.raises(LakeError, match="no lake"):
        materialize(Lake(str(tmp_path / "nowhere")), "loose")
    with hold_lake(own, "a run"), pytest.raises(LakeBusy, match="a run"):
        materialize(own, "loose")


def test_an_export_has_what_was_made(own, tmp_path):
    settings = ExportSettings(policy="loose", form="jsonl")
    before = export(own, str(tmp_path / "out"), settings)
    assert not before.complete
    assert {problem.reason for problem in before.problems} == {
        "kept, but it has no media: `winnow materialize` makes them"
    }
    materialize(own, "loose")
    after = export(own, str(tmp_path / "out"), settings)
    assert after.complete
    assert after.clips == CLIPS


def test_media_that_policies_describe_differently_are_told(own):
    with_media = rows(own, "SELECT clip_id, attempt_id, source_id, media_uri, bytes FROM dataset "
                           "WHERE policy = 'strict' ORDER BY 1")  # fmt: skip
    names = ("clip_id", "attempt_id", "source_id", "media_uri")
    row = dict(zip(names, with_media[0], strict=False))
    own.append("dataset", [row | {"policy": "other", "bytes": with_media[0][4] + 1}])
    told = [finding.text for finding in check_lake(own).violations]
    assert "media that are described differently" in told


def test_the_commands(strict, folder, tmp_path):
    lake = copied(strict, tmp_path)
    place = ["--lake", lake.uri, "--policy"]
    told = CliRunner().invoke(app, ["refilter", *place, str(folder / "loose.yaml")])
    assert told.exit_code == 0, told.output
    assert f"winnow materialize --lake {lake.uri} --policy loose" in told.output.replace("\n", "")
    some = CliRunner().invoke(app, ["materialize", *place, "loose", "--limit", "2"])
    assert some.exit_code == 0, some.output
    assert f"{DARK - 2} clips are left for later" in some.output
    both = CliRunner().invoke(
        app, ["refilter", *place, str(folder / "loose.yaml"), "--materialize", "--json"]
    )
    assert both.exit_code == 0, both.output
    told = json.loads(both.stdout)
    assert told["kept_without_media"] == DARK - 2
    assert told["materialized"]["made"] == DARK - 2
    again = CliRunner().invoke(app, ["materialize", *place, "loose", "--json"])
    assert json.loads(again.stdout)["clips"] == 0
