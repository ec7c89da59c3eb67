from pathlib import Path

import pytest
import yaml

from winnow.operators.errors import ConfigError
from winnow.operators.settings import find_config
from winnow.pipeline.config import load_config
from winnow.pipeline.planning import check_config


def written(tmp_path: Path, change) -> str:
    content = yaml.safe_load(find_config("cpu")[0])
    change(content)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def dedup_of(content: dict) -> dict:
    return next(stage for stage in content["stages"] if stage["stage"] == "dedup")


@pytest.mark.parametrize("profile", ["cpu", "gpu", "paper"])
def test_the_shipped_profiles_fit_their_policies(profile):
    plan = check_config(load_config(profile))
    assert plan.policy.rules


def test_overrides_reach_a_stage_by_its_name_and_an_operator_by_its_label():
    config = load_config(
        "cpu", ["stages.split.longest_s=30", "stages.cheap.operators.text=null", "commit.sources=3"]
    )
    assert config.stage("split").longest_s == 30
    assert config.commit.sources == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(polcy="x"), ["polcy", "unknown key"]),
        (lambda c: c["stages"][1].update(longest_s="long"), ["longest_s", "number", "'long'"]),
        (lambda c: c["stages"][1].update(longest_s=-1), ["longest_s", "greater than 0"]),
        (lambda c: c["stages"][2]["operators"].update(moton={}), ["moton", "did you mean 'motion'"]),
        (lambda c: c["stages"][2]["operators"].update(motion={"speed": 1}), ["motion", "speed"]),
        (lambda c: c["stages"].pop(0), ["must begin with ingest"]),
        (lambda c: c["stages"][2]["operators"].pop("fingerprint"), ["fingerprint_v1", "dedup"]),
        (lambda c: c["stages"].pop(4), ["shard", "transcode"]),
        (lambda c: c["stages"][1].update(workers={"min": 4, "max": 2}), ["max (2)", "min (4)"]),
        (lambda c: c.update(policy="nosuch"), ["nosuch", "generated"]),
        (lambda c: c["stages"].insert(3, {"stage": "filter", "operators": {"motion": {}}}),
         ["both write", "motion_"]),
        (lambda c: c["stages"].append({"stage": "shred"}), ["shred"]),
        (lambda c: dedup_of(c).update(index={"index_type": "HNSW"}), ["Milvus server", "memory"]),
        (lambda c: dedup_of(c).update(index={"index_type": "IVF"}), ["index_type", "HNSW"]),
        (lambda c: dedup_of(c).update(index={"kind": "memory", "uri": "http://h:1"}), ["no server"]),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_named_with_its_place(tmp_path, change, words):
    with pytest.raises(ConfigError) as error:
        check_config(load_config(written(tmp_path, change)))
    for word in words:
        assert word in str(error.value)


def test_a_rule_over_a_column_that_no_operator_writes_is_an_error(tmp_path):
    policy = tmp_path / "p.yaml"
    policy.write_text("name: p\nrules: [{name: slow, reject: motion_meen < 1}]\n")
    with pytest.raises(ConfigError, match=r"motion_meen.*did you mean 'motion_mean'"):
        check_config(load_config("cpu", [f"policy={policy}"]))


@pytest.mark.parametrize(
    "assignment", ["nonsense", "stages.nosuch.x=1", "=3", "stages.split=[", "name.x.y=1"]
)
def test_an_override_that_reaches_nothing_is_an_error(assignment):
    with pytest.raises(ConfigError, match="--set"):
        load_config("cpu", [assignment])


def test_a_server_token_is_not_shown():
    config = load_config("cpu", ["stages.dedup.index={uri: 'http://h:1', token: secret-word}"])
    assert "secret-word" not in config.model_dump_json()


@pytest.mark.parametrize("name", ["cpu", "gpu", "paper"])
def test_a_shown_configuration_is_one_to_run(name, tmp_path):
    shown = tmp_path / "shown.yaml"
    shown.write_text(yaml.safe_dump(load_config(name).model_dump(mode="json")))
    assert load_config(str(shown)) == load_config(name)
    check_config(load_config(str(shown)))
