"""The whole path with models: tiny ones, made on the spot, saved and loaded by the real classes."""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path

import pytest
import yaml

from tests.pipeline.lakes import facts, rows
from tests.tiny_clip import tiny_models_file
from tests.tiny_vlm import vlm_models_file
from winnow.operators.errors import ConfigError, ModelUnavailable
from winnow.pipeline.config import RunConfig, load_config
from winnow.pipeline.lake import Lake
from winnow.pipeline.policy import load_policy
from winnow.pipeline.refilter import refilter
from winnow.pipeline.run import run
from winnow.pipeline.search import search_text

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)  # fmt: skip

ON_CPU = [
    "stages.split.detector={kind: none}",
    "stages.vision.gpus=0", "stages.vision.decoders=1", "stages.vision.batch_clips=3",
    "stages.semantic.gpus=0", "stages.semantic.workers={min: 1, max: 1}",
    "stages.semantic.decoders=1",
    "stages.semantic.operators.vlm_filter.pixels=65536",
    "stages.semantic.operators.vlm_filter.max_tokens=4",
    "stages.critic.gpus=0", "stages.critic.workers={min: 1, max: 1}", "stages.critic.decoders=1",
    "stages.critic.operators.physics.critic.fps=4",
    "stages.critic.operators.physics.critic.frame_pixels=4096",
    "stages.caption.gpus=0", "stages.caption.workers={min: 1, max: 1}",
    "stages.caption.decoders=1",
    "stages.caption.pixels=65536", "stages.caption.max_tokens=4",
    "policy=generated",
]  # fmt: skip


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Path:
    """A models file whose entries are tiny models on this disk."""
    folder = tmp_path_factory.mktemp("models")
    entries = {}
    for file in (tiny_models_file(folder / "clip"), vlm_models_file(folder / "vlm")):
        entries |= yaml.safe_load(file.read_text())
    path = folder / "models.yaml"
    path.write_text(yaml.safe_dump(entries))
    return path


def config(registry: Path, *more: str) -> RunConfig:
    return load_config("gpu", [*ON_CPU, f"models={registry}", *more])


@pytest.fixture(scope="module")
def lake(videos, registry, tmp_path_factory) -> Lake:
    lake = Lake(str(tmp_path_factory.mktemp("lake") / "lake"))
    run(config(registry, "engine=inline", "isolate=false"), str(videos), lake)
    return lake


def test_every_head_speaks_of_every_clip_that_the_cheap_filters_left(lake: Lake):
    scored = rows(lake, """
        SELECT aesthetic_mean, content_type_label, embedding_frames, drift_total, vlm_filter_status,
               vlm_filter_error, physics_score FROM clips_decided
        WHERE verdict IN ('keep', 'duplicate')""")  # fmt: skip
    assert len(scored) == 4
    for aesthetic, label, frames, drift, status, error, physics in scored:
        assert 0 < abs(aesthetic) < 1000
        assert label
        assert frames == 5
        assert 0 <= drift <= 2
        assert 1 <= physics <= 5
        # Four tokens of a model that knows nothing are no answer, and said to be none.
        assert (status, error) == ("unparsed", None)
    unseen = rows(lake, "SELECT aesthetic_mean, vlm_filter_status FROM clips_decided "
                        "WHERE verdict = 'reject'")  # fmt: skip
    assert set(unseen) == {(None, None)}, "what the cheap filters rejected costs no model time"


def test_prompts_are_matched_where_there_are_some(lake: Lake):
    matched = rows(lake, "SELECT prompt, prompt_match_mean, prompt_match_error FROM clips_decided "
                         "WHERE verdict = 'keep' ORDER BY prompt NULLS LAST")  # fmt: skip
    assert matched[0][0] == "an apple falls"
    assert -1 <= matched[0][1] <= 1
    assert {mean for _, mean, _ in matched[1:]} == {None}
    assert {error for *_, error in matched} == {None}


def test_kept_clips_have_captions_with_what_was_shown(lake: Lake):
    captions = rows(lake, """
        SELECT clip_id, count(*), min(status), min(frames), min(fps), min(prompt) FROM captions
        GROUP BY 1""")  # fmt: skip
    kept = {clip for (clip,) in rows(lake, "SELECT clip_id FROM dataset")}
    assert {clip for clip, *_ in captions} == kept
    for _, count, status, frames, fps, prompt in captions:
        assert count == 3
        assert status == "truncated"
        assert frames == 5
        assert fps == pytest.approx(2, rel=0.1)
        assert prompt.startswith("general@")


def test_the_content_type_becomes_the_dataset_s_partition(lake: Lake):
    pairs = rows(lake, "SELECT d.content_type, c.content_type_label FROM dataset d "
                       "JOIN clips c USING (clip_id)")  # fmt: skip
    assert pairs
    assert all(partition == label for partition, label in pairs)


def test_the_run_tells_its_models_and_workers(lake: Lake):
    ((versions, workers),) = rows(lake, "SELECT versions, workers FROM runs")
    assert "model clip-vit-l-14" in json.loads(versions)["operators"]
    assert [pool["stage"] for pool in json.loads(workers)] == [
        "vision",
        "semantic",
        "critic",
        "caption",
    ]


def test_refilter_agrees_and_search_finds(lake: Lake, registry: Path):
    assert refilter(lake, load_policy("generated"), dry_run=True).changed == 0
    hits = search_text(lake, "a red disc", 3)
    assert len(hits) == 3
    assert hits == search_text(lake, "a red disc", 3), "the index is there already"
    assert sorted((h.similarity for h in hits), reverse=True) == [h.similarity for h in hits]
    with pytest.raises(ConfigError, match="--text is empty"):
        search_text(lake, " ")


@pytest.mark.slow
def test_ray_with_other_batches_leaves_the_same_lake(videos, lake: Lake, registry, tmp_path):
    other = Lake(str(tmp_path / "ray"))
    more = ["engine=ray", "stages.vision.batch_clips=1", "stages.vision.backbone.batch_pixels=3072",
            "stages.semantic.operators.vlm_filter.vlm.batch_pixels=1"]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(config(registry, *more), str(videos), other)
        gc.collect()
    one, two = facts(lake), facts(other)
    assert two["verdicts"] == one["verdicts"]
    assert two["dataset"] == one["dataset"]
    scores = [c for (c,) in rows(lake, "SELECT column_name FROM (DESCRIBE clips) WHERE "
                                       "column_type IN ('DOUBLE', 'FLOAT')")]  # fmt: skip
    query = f"SELECT {', '.join(scores)} FROM clips ORDER BY clip_id"
    for a, b in zip(rows(lake, query), rows(other, query), strict=True):
        assert b == pytest.approx(a, abs=1e-4, nan_ok=True)


def test_a_missing_model_is_said_before_anything_is_read(videos, tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    with pytest.raises(ModelUnavailable, match="winnow models pull") as raised:
        run(load_config("gpu", ["engine=inline", *ON_CPU]), str(videos), lake)
    assert "--config cpu" in str(raised.value)
    assert not lake.exists()


def test_gpus_that_a_machine_does_not_have_are_said(videos, registry, tmp_path):
    settings = [s for s in ON_CPU if ".gpus=" not in s]
    wanted = load_config("gpu", [*settings, f"models={registry}"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match="vision, semantic, critic, caption ask for GPUs"):
            run(wanted, str(videos), Lake(str(tmp_path / "lake")))
        gc.collect()
