"""Sidecars: the layouts of the generators as written by them, users' own files, hostile files."""

from __future__ import annotations

import json
import random

import pytest

from winnow.operators.errors import StorageError
from winnow.stages.sidecars import MULTIVIEW, PREDICT, SIDECAR_LIMIT, TRANSFER, read_sidecar


class Folder:
    """Files by key, as a listing and a reader."""

    def __init__(self, **files):
        self.files = {}
        for name, content in files.items():
            self.add(name.replace("__", "."), content)

    def add(self, key, content=b""):
        if isinstance(content, dict):
            content = json.dumps(content)
        self.files[key] = content.encode() if isinstance(content, str) else content
        return self

    def describe(self, key):
        self.files.setdefault(key, b"video")

        def read(name):
            if name not in self.files:
                raise StorageError(f"{name} is not there")
            return self.files[name]

        return read_sidecar(key, frozenset(self.files), read)


def transfer_json(**changes):
    return {
        "name": "crash", "prompt_path": None, "prompt": "a red car", "negative_prompt": "blurry",
        "seed": 2025, "guidance": 3, "video_path": "/in/street.mp4", "max_frames": None,
        "image_context_path": None, "num_conditional_frames": 1, "resolution": "720",
        "edge": {"control_path": None, "control_weight": 1.0, "preset_edge_threshold": "medium"},
        "depth": None, "vis": None, "seg": None, "guided_generation_mask": None,
        "a_key_of_tomorrow": [1, {"x": 2}],
    } | changes  # fmt: skip


def predict_json(**changes):
    return {
        "inference_type": "video2world", "name": "p", "prompt": "a red car", "seed": 0,
        "negative_prompt": None, "guidance": 7, "input_path": "/in/street.mp4",
        "num_output_frames": 77,
    } | changes  # fmt: skip


def transfer_folder():
    folder = Folder(crash__json=transfer_json(), crash__txt="a red car")
    for name in ("crash_control_edge.mp4", "crash_mask_edge.mp4",
                 "crash_mask_guided_generation.mp4", "crash.mp4"):  # fmt: skip
        folder.add(name)
    return folder


def test_a_transfer_sample_is_read_whole():
    found = transfer_folder().describe("crash.mp4")
    assert (found.role, found.complete, found.problem) == ("generation", True, None)
    assert found.generator == TRANSFER
    assert (found.prompt, found.negative_prompt, found.seed) == ("a red car", "blurry", 2025)
    assert found.input_path == "/in/street.mp4"
    assert json.loads(found.fields) == transfer_json()


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("crash_control_edge.mp4", "control"),
        ("crash_mask_edge.mp4", "mask"),
        ("crash_mask_guided_generation.mp4", "mask"),
    ],
)
def test_controls_and_masks_share_the_group_of_their_generation(name, role):
    folder = transfer_folder()
    found = folder.describe(name)
    assert (found.role, found.complete) == (role, True)
    assert found.group_key == folder.describe("crash.mp4").group_key


@pytest.mark.parametrize("name", ["my_control_room.mp4", "the_mask_of_zorro.mp4", "x_grid.mp4"])
def test_a_users_file_with_such_a_name_is_a_generation(name):
    alone = Folder().describe(name)
    assert (alone.role, alone.generator, alone.problem) == ("generation", None, None)
    owner = name.partition("_")[0] + ".json"
    for other in ({"prompt": "hello"}, predict_json(), transfer_json()):
        assert Folder().add(owner, other).describe(name).role == "generation"


def test_a_generation_whose_own_name_looks_like_a_control():
    folder = transfer_folder().add("crash_control_edge.json", transfer_json(name="x"))
    assert folder.describe("crash_control_edge.mp4").role == "generation"
    assert not folder.describe("crash_control_edge.mp4").complete


def test_controls_of_a_name_that_holds_the_word_control():
    folder = Folder().add("a_control_edge_b.json", transfer_json())
    found = folder.describe("a_control_edge_b_control_depth.mp4")
    assert found.role == "control"


def test_a_transfer_sample_without_its_text_is_incomplete():
    found = Folder(crash__json=transfer_json()).describe("crash.mp4")
    assert (found.complete, found.prompt) == (False, "a red car")
    assert "crash.txt" in found.why


def test_a_control_whose_json_is_broken_says_what_it_may_be():
    found = Folder(crash__json='{"name": "cra').describe("crash_control_edge.mp4")
    assert found.role == "generation"
    assert "may be a control" in found.problem


def test_a_predict_sample_needs_no_text():
    found = Folder(p__json=predict_json(inference_type="text2world", input_path=None)).describe(
        "p.mp4"
    )
    assert (found.generator, found.complete, found.seed) == (PREDICT, True, 0)


def test_old_predict_output_is_a_plain_video():
    found = Folder(config__yaml="job:\n  name: x\n").describe("p.mp4")
    assert (found.generator, found.complete, found.fields) == (None, True, None)


@pytest.mark.parametrize("name", ["ring.mp4", "ring_rear_left.mp4"])
def test_a_multiview_sample_and_one_of_its_views(name):
    views = {"front_wide": {"input_path": "/in/f.mp4", "control_path": "/c/f.mp4"},
             "rear_left": {"input_path": None, "control_path": "/c/r.mp4"}}  # fmt: skip
    folder = Folder(ring__json={"name": "ring", "prompt": "rain", "fps": 10, **views})
    found = folder.describe(name)
    assert (found.role, found.generator, found.complete) == ("generation", MULTIVIEW, True)
    assert (found.prompt, found.input_path) == ("rain", "/in/f.mp4")
    assert folder.describe("ring_grid.mp4").role == "preview"


def test_groups_join_seeds_and_generators_and_part_inputs_and_prompts():
    def group(data):
        return Folder(v__json=data, v__txt="x").describe("v.mp4").group_key

    same = group(transfer_json())
    assert group(transfer_json(seed=7, guidance=1, depth={"control_weight": 0.5})) == same
    assert group(predict_json()) == same
    assert group(transfer_json(prompt="a blue car")) != same
    assert group(transfer_json(video_path="/in/road.mp4")) != same
    assert group(transfer_json(image_context_path="/in/a.png")) != same
    depth = {"depth": {"control_path": "/in/d.mp4"}, "video_path": None, "edge": None}
    assert group(transfer_json(**depth)) != group(transfer_json(video_path=None))
    assert Folder().describe("v.mp4").group_key is None


@pytest.mark.parametrize(
    ("files", "prompt"),
    [
        ({"v__txt": " a cat\n"}, "a cat"),
        ({"v__txt": b"\xef\xbb\xbfa cat"}, "a cat"),
        ({"v__txt": "\n"}, None),
        ({"v__json": {"prompt": "a cat", "seed": 3}, "v__txt": "a dog"}, "a cat"),
        ({"v__json": {"caption": "eine Katze ü 猫"}}, "eine Katze ü 猫"),
        ({"v__json": {"prompt": None, "text": "a cat"}}, "a cat"),
        ({"v__json": '"a cat"'}, "a cat"),
        ({"v__json": {"steps": 3}, "v__txt": "a cat"}, "a cat"),
        ({"v__json": {"prompt": "a cat", "video_path": "v.mp4"}}, "a cat"),
    ],
)
def test_plain_prompts(files, prompt):
    found = Folder(**files).describe("v.mp4")
    assert (found.prompt, found.generator, found.complete) == (prompt, None, True)
    assert found.problem is None


def test_files_of_another_folder_or_name_do_not_count():
    folder = Folder().add("a/v.txt", "no").add("v.txt", "no").add("b/v2.txt", "no")
    assert folder.describe("b/v.mp4").prompt is None
    assert folder.add("b/v.x, 100%.txt", "yes").describe("b/v.x, 100%.mp4").prompt == "yes"


HOSTILE = {
    "broken": b'{"prompt": "a',
    "empty": b"",
    "number": b"7",
    "list": b'["a cat"]',
    "not a number": b'{"prompt": "a cat", "x": NaN}',
    "infinite": b'{"prompt": "a cat", "x": 1e999}',
    "long integer": b'{"prompt": "a cat", "seed": ' + b"9" * 5000 + b"}",
    "seed beyond 64 bits": b'{"prompt": "a cat", "seed": 9223372036854775808}',
    "seed as text": b'{"prompt": "a cat", "seed": "1"}',
    "seed as truth": b'{"prompt": "a cat", "seed": true}',
    "prompt as list": b'{"prompt": ["a cat"]}',
    "utf-16": '{"prompt": "a cat"}'.encode("utf-16"),
    "latin-1": b'{"prompt": "caf\xe9"}',
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "huge": b'{"prompt": "' + b"x" * SIDECAR_LIMIT + b'"}',
    "wrong control": json.dumps(transfer_json(edge=[1])).encode(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_sidecar_is_a_problem_and_the_video_stays(name):
    found = Folder(v__json=HOSTILE[name]).describe("v.mp4")
    assert found.role == "generation"
    assert found.prompt is None
    assert "v.json" in found.problem


def test_a_bad_sidecar_leaves_the_prompt_beside_it():
    found = Folder(v__json=HOSTILE["broken"], v__txt="a cat").describe("v.mp4")
    assert (found.prompt, "v.json" in found.problem) == ("a cat", True)


def test_a_sidecar_that_cannot_be_read_is_a_problem():
    def refuse(key):
        raise PermissionError(13, "Permission denied")

    found = read_sidecar("v.mp4", {"v.mp4", "v.json", "v.txt"}, refuse)
    assert "v.json" in found.problem
    assert "v.txt" in found.problem


def test_texts_fit_into_any_table():
    data = b'{"prompt": "a\\ud800b\\u0000c", "negative_prompt": "\\udfff", "x\\ud800": 1}'
    found = Folder(v__json=data).describe("v.mp4")
    for text in (found.prompt, found.negative_prompt, found.fields):
        text.encode()
        assert "\0" not in text


def test_random_sidecars_never_raise():
    rng = random.Random(0)
    good = json.dumps(transfer_json()).encode()
    for _ in range(400):
        mangled = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            mangled[rng.randrange(len(mangled))] = rng.randrange(256)
        folder = Folder(v__json=bytes(mangled), config__yaml=rng.randbytes(200))
        assert folder.describe("v.mp4").role == "generation"
        folder.describe("v_control_edge.mp4")


CONFIG = """
checkpoint:
  load_path: s3://models/ckpt-500
  strict_resume: true
job: {group: transfer, name: edge_720p, version: 25, rate: 0.5}
model:
  _target_: !!python/name:os.system
  config: !!python/object/apply:os.system ['touch /tmp/winnow-was-here']
trainer: {max_iter: 1000}
"""


def test_config_yaml_tells_the_model_and_runs_nothing():
    folder = Folder(p__json=predict_json(), config__yaml=CONFIG)
    model = json.loads(folder.describe("p.mp4").fields)["config.yaml"]
    assert model["checkpoint"] == {"load_path": "s3://models/ckpt-500", "strict_resume": True}
    assert model["job"] == {"group": "transfer", "name": "edge_720p", "version": 25, "rate": 0.5}
    assert model["model"]["config"] == ["touch /tmp/winnow-was-here"]
    assert "trainer" not in model


LAUGHS = "model:\n a0: &a0 [x, x]\n" + "".join(
    f" a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)
)


@pytest.mark.parametrize(
    "text",
    ["model: [unclosed", "{a: " * 50_000, LAUGHS, "model: &m {x: {y: *m}}\n", "\x00", "model: {a: 1",
     "job: {x: 99999999999999999999999999, y: .nan, z: 1_0, t: 2026-01-01, 1: 2, [a]: b}"],
)  # fmt: skip
def test_a_hostile_config_yaml_does_no_harm(text):
    found = Folder(p__json=predict_json(), config__yaml=text).describe("p.mp4")
    assert found.prompt == "a red car"
    assert len(found.fields) < 100_000
    json.loads(found.fields)
