"""The heads on frame embeddings whose answers are known."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from tests.conftest import scene
from tests.pipeline.lakes import rows
from tests.tiny_clip import DIMENSIONS, HEAD_LAYERS, IMAGE_SIZE, tiny_models_file
from winnow.operators.aesthetic import Aesthetic, folded
from winnow.operators.backbone import Backbone, BackboneConfig
from winnow.operators.content_type import ContentType, Taxonomy
from winnow.operators.drift import Drift
from winnow.operators.embedding import Embedding
from winnow.operators.errors import ConfigError, MeasureError, ModelUnavailable
from winnow.operators.frames import fitted
from winnow.operators.models import Models
from winnow.operators.operator import (
    BatchOperator,
    ClipView,
    FrameEmbeddings,
    Measures,
    SeenClip,
    Square,
)
from winnow.operators.prompt_match import PromptMatch
from winnow.operators.settings import validate
from winnow.pipeline.lake import Lake

HEADS = (Aesthetic(), ContentType(), PromptMatch(), Embedding(), Drift())
PROMPTS = ("a robot arm puts a cup on a table", "a car drives through snow", "two dogs play")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models.read(str(tiny_models_file(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def backbone(models) -> Backbone:
    return BackboneConfig().load(models)


def clip(
    backbone: Backbone,
    vectors,
    fps: float = 2.0,
    prompt: str | None = None,
    other_prompts: tuple[str, ...] = (),
) -> SeenClip:
    """A clip whose sampled frames have these embeddings, scaled to length 1."""
    units = np.array(vectors, np.float64).reshape(len(vectors), -1)
    units = (units / np.linalg.norm(units, axis=1, keepdims=True)).astype(np.float32)
    view = ClipView("clip", len(units), fps, 640, 360, "h264", 0, prompt, other_prompts)
    return SeenClip(view, {}, FrameEmbeddings(units, np.arange(len(units)) / fps, backbone))


def measure(operator: BatchOperator, models: Models, *clips: SeenClip) -> list:
    answers = operator.load(models)(clips)
    for answer in answers:
        if isinstance(answer, Measures):
            assert set(answer.columns) == {column.name for column in operator.columns}
            assert set(answer.vectors) == set(operator.embeddings)
    return answers


def columns(operator: BatchOperator, models: Models, clip: SeenClip) -> dict:
    (answer,) = measure(operator, models, clip)
    assert isinstance(answer, Measures), answer
    return answer.columns


def random_vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, DIMENSIONS))


def turned(*degrees: float) -> np.ndarray:
    """Vectors in one plane, at these angles to the first axis."""
    angles = np.radians(degrees)
    vectors = np.zeros((len(angles), DIMENSIONS))
    vectors[:, 0], vectors[:, 1] = np.cos(angles), np.sin(angles)
    return vectors


class TestEveryHead:
    def test_sees_each_frame_through_one_forward(self, models, backbone):
        forwards: list[int] = []
        hook = backbone.network.visual.register_forward_hook(
            lambda _, given, out: forwards.append(len(out))
        )
        before = backbone.frames_seen
        frames = [fitted(image, Square(IMAGE_SIZE)) for image in scene(1, 6)]
        seen = clip(backbone, backbone.embed_frames(frames), 2, PROMPTS[0], PROMPTS)
        for operator in HEADS:
            assert operator.needs.frame_embeddings
            assert None not in columns(operator, models, seen).values()
        hook.remove()
        assert sum(forwards) == backbone.frames_seen - before == len(frames)

    @pytest.mark.parametrize("operator", HEADS, ids=lambda o: o.name)
    def test_answers_alone_as_in_a_batch(self, models, backbone, operator):
        clips = [clip(backbone, random_vectors(4 + n, n), 2, PROMPTS[n], PROMPTS) for n in range(3)]
        together = measure(operator, models, *clips)
        for seen, answer in zip(clips, together, strict=True):
            assert columns(operator, models, seen) == answer.columns

    @pytest.mark.parametrize("operator", HEADS, ids=lambda o: o.name)
    def test_fails_only_the_clip_that_has_no_frames_or_no_numbers(self, models, backbone, operator):
        good = clip(backbone, random_vectors(4), 2, PROMPTS[0])
        empty = clip(backbone, random_vectors(1), 2, PROMPTS[0])
        empty.embeddings.vectors = empty.embeddings.vectors[:0]
        broken = clip(backbone, random_vectors(4), 2, PROMPTS[0])
        broken.embeddings.vectors[2, 5] = np.nan
        unseen = replace(good, embeddings=None)
        answers = measure(operator, models, empty, broken, good, unseen)
        assert [isinstance(answer, MeasureError) for answer in answers] == [True, True, False, True]

    def test_can_be_sent_to_a_worker(self):
        assert pickle.loads(pickle.dumps(HEADS)) == HEADS


class TestAesthetic:
    def layered(self, models: Models, vectors: np.ndarray) -> np.ndarray:
        """The scores of the network as it is published, layer by layer."""
        tensors = load_file(models.get("laion-aesthetic-v2").weights()[0])
        state = {name.removeprefix("layers."): tensor for name, tensor in tensors.items()}
        places = [torch.nn.Dropout(0.2) for _ in range(max(HEAD_LAYERS) + 1)]
        for index, shape in HEAD_LAYERS.items():
            places[index] = torch.nn.Linear(*shape)
        network = torch.nn.Sequential(*places).eval()
        network.load_state_dict(state)
        with torch.no_grad():
            return network(torch.from_numpy(vectors))[:, 0].numpy()

    def test_folded_equals_layered(self, models, backbone):
        seen = clip(backbone, random_vectors(64))
        expected = self.layered(models, seen.embeddings.vectors)
        assert np.ptp(expected) > 0.5
        answers = measure(
            Aesthetic(), models, *(clip(backbone, [v]) for v in seen.embeddings.vectors)
        )
        scores = [answer.columns["aesthetic_mean"] for answer in answers]
        np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)

    def test_summary_over_frames(self, models, backbone):
        seen = clip(backbone, random_vectors(11))
        scores = np.sort(self.layered(models, seen.embeddings.vectors))
        found = columns(Aesthetic(), models, seen)
        expected = {"mean": scores.mean(), "min": scores[0]}
        expected |= {"p10": scores[1], "p50": scores[5], "p90": scores[9]}
        for name, value in expected.items():
            assert found[f"aesthetic_{name}"] == pytest.approx(value, abs=1e-5)

    def registry(self, folder: Path, file: Path, **fields) -> Models:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        entry = {"path": str(folder), "files": {file.name: digest}, **fields}
        registry = folder / "models.yaml"
        registry.write_text(yaml.safe_dump({"laion-aesthetic-v2": entry}), "utf-8")
        return Models.read(str(registry))

    def test_reads_the_published_file(self, models, backbone, tmp_path):
        tensors = load_file(models.get("laion-aesthetic-v2").weights()[0])
        published = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
        torch.save(tensors, published)
        seen = clip(backbone, random_vectors(3))
        own = self.registry(tmp_path, published)
        assert columns(Aesthetic(), own, seen) == columns(Aesthetic(), models, seen)

    def test_runs_no_code_of_a_file(self, tmp_path):
        harm = tmp_path / "harm.pth"
        ran = tmp_path / "ran"

        class Harm:
            def __reduce__(self):
                return Path.touch, (ran,)

        torch.save({"layers.0.weight": Harm()}, harm)
        with pytest.raises(ModelUnavailable, match=r"harm\.pth"):
            Aesthetic().load(self.registry(tmp_path, harm))
        assert not ran.exists()

    def test_several_files_are_not_guessed_from(self, tmp_path):
        for name in ("a", "b"):
            save_file({"layers.0.weight": torch.ones(1, 4)}, tmp_path / f"{name}.safetensors")
        models = self.registry(tmp_path, tmp_path / "a.safetensors", files={
            "a.safetensors": None, "b.safetensors": None})  # fmt: skip
        with pytest.raises(ModelUnavailable, match="one file"):
            Aesthetic().load(models)

    @pytest.mark.parametrize(
        "tensors",
        [
            {},
            {"layers.0.weight": np.ones((1, 4))},
            {"layers.0.weight": np.ones((2, 4)), "layers.0.bias": np.ones(2)},
            {"layers.0.weight": np.ones((3, 4)), "layers.0.bias": np.ones(3),
             "layers.2.weight": np.ones((1, 5)), "layers.2.bias": np.ones(1)},
            {"layers.0.weight": np.ones((1, 4)), "layers.0.bias": np.ones(1),
             "layers.1.running_mean": np.ones(1)},
        ],
        ids=["nothing", "no bias", "two outputs", "layers that do not fit", "a normalisation"],
    )  # fmt: skip
    def test_refuses_what_is_no_chain_of_linear_layers(self, tensors):
        with pytest.raises(ConfigError, match="'head' is no chain of linear layers"):
            folded(tensors, "head")

    def test_refuses_another_backbone(self, models, backbone):
        seen = clip(backbone, random_vectors(2))
        with pytest.raises(ConfigError, match="trained on 768 dimensions of 'siglip2'"):
            measure(Aesthetic(backbone="siglip2"), models, seen)

    def test_refuses_other_dimensions(self, models, backbone, tmp_path):
        layer = {"layers.0.weight": torch.ones(1, 512), "layers.0.bias": torch.ones(1)}
        save_file(layer, tmp_path / "narrow.safetensors")
        narrow = self.registry(tmp_path, tmp_path / "narrow.safetensors")
        with pytest.raises(ConfigError, match="trained on 512 dimensions"):
            measure(Aesthetic(), narrow, clip(backbone, random_vectors(2)))


class TestContentType:
    def test_frames_like_a_label_have_that_label(self, models, backbone):
        taxonomy = Taxonomy.read()
        for label, texts in list(taxonomy.texts.items())[::6]:
            frames = [backbone.embed_texts(texts).mean(axis=0)] * 3
            found = columns(ContentType(), models, clip(backbone, frames))
            assert found["content_type_label"] == label
            chances = dict(found["content_type_probabilities"])
            assert list(chances) == list(taxonomy.texts)
            assert sum(chances.values()) == pytest.approx(1)
            first, second = sorted(chances.values())[:-3:-1]
            assert found["content_type_probability"] == chances[label] == first
            assert found["content_type_margin"] == pytest.approx(first - second)

    def test_probabilities_are_softmaxes_of_the_frames_averaged(self, models, backbone):
        taxonomy = Taxonomy(name="two", texts={"cat": ("a cat",), "street": ("a street",)})
        cat, street = backbone.embed_texts(["a cat", "a street"])
        seen = clip(backbone, [cat, cat, cat, street])
        found = columns(ContentType(taxonomy), models, seen)
        chance = 1 / (1 + np.exp(backbone.logit_scale * (float(cat @ street) - 1)))
        assert found["content_type_label"] == "cat"
        expected = (3 * chance + (1 - chance)) / 4
        assert found["content_type_probability"] == pytest.approx(expected, abs=1e-4)

    def test_reaches_the_lake(self, models, backbone, tmp_path):
        operator = ContentType()
        found = columns(operator, models, clip(backbone, random_vectors(4)))
        lake = Lake(str(tmp_path / "lake"))
        lake.create(operator.columns)
        attempt = {"source_id": "s", "attempt_id": "a"}
        lake.append("clips", [{"clip_id": "c", **attempt, **found},
                              {"clip_id": "d", **attempt}])  # fmt: skip
        lake.append("sources", [{**attempt, "status": "done"}])
        label = found["content_type_label"]
        ((chance, named),) = rows(
            lake,
            f"SELECT content_type_probability, content_type_probabilities['{label}'] FROM clips "
            "WHERE content_type_label IS NOT NULL",
        )
        assert chance == pytest.approx(named)

    def test_takes_a_taxonomy_of_ones_own(self, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text("cat: [a cat]\ndog: [a dog, a puppy]\n", "utf-8")
        operator = validate(ContentType, {"taxonomy": str(file)}, "here")
        file.unlink()
        # Read where the configuration was: it is there wherever the operator goes.
        assert dict(pickle.loads(pickle.dumps(operator)).taxonomy.texts)["dog"] == (
            "a dog",
            "a puppy",
        )

    @pytest.mark.parametrize(
        ("text", "wrong"),
        [
            ("cat: [a cat]", "at least 2"),
            ("cat: [a cat]\nunknown: [anything]", "not classified"),
            ("cat: [a cat]\nDogs and more: [a dog]", "Dogs and more"),
            ("cat: [a cat]\ndog: []", "dog"),
            ("cat: [a cat]\ndog: ['  ']", "dog"),
            ("cat: a cat\ndog: a dog", "cat"),
        ],
    )
    def test_refuses_a_wrong_taxonomy_with_the_configuration(self, tmp_path, text, wrong):
        file = tmp_path / "mine.yaml"
        file.write_text(text, "utf-8")
        with pytest.raises(ConfigError, match=wrong):
            validate(ContentType, {"taxonomy": str(file)}, "here")

    def test_refuses_a_missing_taxonomy_with_the_configuration(self):
        with pytest.raises(ConfigError, match="content_types"):
            validate(ContentType, {"taxonomy": "no_such"}, "here")

    def test_setting_is_a_name_in_the_schema(self):
        schema = TypeAdapter(ContentType).json_schema()
        assert schema["properties"]["taxonomy"]["type"] == "string"


class TestPromptMatch:
    def test_frames_that_are_the_prompt_match_it(self, models, backbone):
        own = backbone.embed_texts(PROMPTS)
        seen = clip(backbone, [own[0]] * 6, 2, PROMPTS[0], PROMPTS[1:])
        found = columns(PromptMatch(), models, seen)
        nearest = max(float(own[0] @ own[1]), float(own[0] @ own[2]))
        assert found["prompt_match_mean"] == pytest.approx(1, abs=1e-5)
        assert found["prompt_match_min"] == pytest.approx(1, abs=1e-5)
        assert found["prompt_match_trend"] == pytest.approx(0, abs=1e-5)
        assert found["prompt_match_margin"] == pytest.approx(1 - nearest, abs=1e-5)
        assert found["prompt_match_rank_share"] == 1

    def test_frames_of_another_prompt_do_not(self, models, backbone):
        other = backbone.embed_texts(PROMPTS[1:2])[0]
        seen = clip(backbone, [other] * 3, 2, PROMPTS[0], PROMPTS[1:])
        found = columns(PromptMatch(), models, seen)
        assert found["prompt_match_margin"] < 0
        assert found["prompt_match_rank_share"] < 1

    def test_frames_that_leave_the_prompt_have_a_falling_trend(self, models, backbone):
        own, other = backbone.embed_texts(PROMPTS[:2])
        seen = clip(backbone, [own] * 2 + [own + other] * 3 + [other] * 2, 2, PROMPTS[0])
        found = columns(PromptMatch(), models, seen)
        assert found["prompt_match_trend"] == pytest.approx(float(own @ other) - 1, abs=1e-5)
        assert found["prompt_match_min"] == pytest.approx(float(own @ other), abs=1e-5)

    @pytest.mark.parametrize("prompt", [None, "", "  \n "])
    def test_nothing_is_known_without_a_prompt(self, models, backbone, prompt):
        seen = clip(backbone, random_vectors(4), 2, prompt, PROMPTS)
        assert set(columns(PromptMatch(), models, seen).values()) == {None}

    def test_nothing_to_compare_with_is_null(self, models, backbone):
        # The clip's own prompt, written otherwise, is no other prompt.
        others = (PROMPTS[0], f"  {PROMPTS[0]}\n", "")
        found = columns(
            PromptMatch(), models, clip(backbone, random_vectors(4), 2, PROMPTS[0], others)
        )
        assert found["prompt_match_margin"] is None
        assert found["prompt_match_rank_share"] is None
        assert found["prompt_match_mean"] is not None

    def test_two_frames_have_no_trend(self, models, backbone):
        found = columns(PromptMatch(), models, clip(backbone, random_vectors(2), 2, PROMPTS[0]))
        assert found["prompt_match_trend"] is None


class TestEmbedding:
    def test_is_the_mean_direction(self, models, backbone):
        (answer,) = measure(Embedding(), models, clip(backbone, turned(0, 60)))
        np.testing.assert_allclose(answer.vectors["semantic"], turned(30)[0], atol=1e-6)
        assert answer.vectors["semantic"].dtype == np.float32
        assert answer.columns["embedding_spread"] == pytest.approx(1 - np.cos(np.radians(30)))
        assert answer.columns["embedding_frames"] == 2

    def test_of_equal_frames_has_no_spread(self, models, backbone):
        found = columns(Embedding(), models, clip(backbone, turned(10, 10, 10)))
        assert found["embedding_spread"] == pytest.approx(0, abs=1e-6)

    def test_names_the_space_that_it_lies_in(self, models, backbone):
        found = columns(Embedding(), models, clip(backbone, turned(0)))
        assert found["embedding_model"] == models.get("clip-vit-l-14").identity

    def test_of_opposite_frames_has_no_direction(self, models, backbone):
        (answer,) = measure(Embedding(), models, clip(backbone, turned(0, 180)))
        assert isinstance(answer, MeasureError)
        assert "cancel" in str(answer)

    def test_is_found_by_its_text(self, models, backbone):
        wanted = backbone.embed_texts(PROMPTS)
        made = [
            answer.vectors["semantic"]
            for answer in measure(
                Embedding(),
                models,
                *(clip(backbone, v + 0.01 * random_vectors(4, n)) for n, v in enumerate(wanted)),
            )
        ]
        query = BackboneConfig().load(models).embed_texts([PROMPTS[2]])[0]
        assert int(np.argmax(np.stack(made) @ query)) == 2


class TestDrift:
    def test_of_a_clip_that_stands_still(self, models, backbone):
        found = columns(Drift(), models, clip(backbone, turned(*[20] * 8)))
        assert list(found.values()) == pytest.approx([0, 0, 0], abs=1e-6)

    def test_of_a_clip_that_turns_steadily(self, models, backbone):
        # Two frames a second: the first second's mean lies at 5 degrees, the last's at 75.
        found = columns(Drift(), models, clip(backbone, turned(*range(0, 81, 10))))
        assert found["drift_total"] == pytest.approx(1 - np.cos(np.radians(70)), abs=1e-6)
        assert found["drift_step_max"] == pytest.approx(1 - np.cos(np.radians(10)), abs=1e-6)
        assert found["drift_slope"] > 0.1

    def test_of_a_jump_and_back(self, models, backbone):
        found = columns(Drift(), models, clip(backbone, turned(0, 0, 0, 0, 90, 0, 0, 0, 0)))
        assert found["drift_total"] == pytest.approx(0, abs=1e-6)
        assert found["drift_step_max"] == pytest.approx(1, abs=1e-6)
        assert found["drift_slope"] == pytest.approx(0, abs=1e-6)

    def test_of_two_frames(self, models, backbone):
        found = columns(Drift(), models, clip(backbone, turned(0, 60), fps=0.5))
        assert found["drift_total"] == pytest.approx(0.5, abs=1e-6)
        assert found["drift_slope"] == pytest.approx(0.25, abs=1e-6)

    def test_of_a_single_frame_is_unknown(self, models, backbone):
        assert set(columns(Drift(), models, clip(backbone, turned(0))).values()) == {None}


def test_probabilities_are_a_map_in_arrow(models, backbone):
    found = columns(ContentType(), models, clip(backbone, random_vectors(2)))
    schema = pa.schema([column.field() for column in ContentType.columns])
    table = pa.Table.from_pylist([found, dict.fromkeys(found)], schema=schema)
    assert table.column("content_type_probabilities")[1].as_py() is None
