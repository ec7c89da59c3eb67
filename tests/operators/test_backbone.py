"""The backbone on a model of open_clip that is made on the spot and loaded as the real ones are."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.conftest import scene
from tests.tiny_clip import IMAGE_SIZE, make_tiny_clip, tiny_models_file
from winnow.operators.backbone import BackboneConfig, OpenClipBackbone, Tower
from winnow.operators.errors import ConfigError, ModelUnavailable
from winnow.operators.frames import fitted
from winnow.operators.models import Models
from winnow.operators.operator import Square

ENTRY = {
    "role": "backbone",
    "loader": "open_clip",
    "licence": "none",
    "architecture": "none",
    "image_size": IMAGE_SIZE,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models.read(str(tiny_models_file(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture
def backbone(models) -> OpenClipBackbone:
    return BackboneConfig().load(models)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("something is being fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def entry(folder: Path, **fields) -> Models:
    """A registry whose only own model `mine` lies in the folder."""
    registry = folder / "models.yaml"
    registry.write_text(yaml.safe_dump({"mine": {**ENTRY, "path": str(folder), **fields}}), "utf-8")
    return Models.read(str(registry))


def load(folder: Path, **fields) -> OpenClipBackbone:
    return BackboneConfig(model="mine").load(entry(folder, **fields))


def frames(count: int) -> list[np.ndarray]:
    return [fitted(scene(seed, 1)[0], Square(IMAGE_SIZE)) for seed in range(count)]


def image_batches(backbone: OpenClipBackbone) -> list[int]:
    """Sizes of the batches that go through the image tower from now on."""
    sizes: list[int] = []
    backbone.network.visual.register_forward_hook(lambda _, given, out: sizes.append(len(out)))
    return sizes


class WordTokenizer:
    """Saves a tokenizer that knows a few words, as models on a hub bring one along."""

    def __init__(self, folder: Path) -> None:
        words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "cat": 3, "dog": 4, "street": 5}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        ).save_pretrained(folder)


def make_tiny_siglip(folder: Path) -> Path:
    """What SigLIP has and CLIP has not: a tower of timm, squashed frames, a tokenizer of its own."""
    text = {"context_length": 8, "vocab_size": 6, "hf_tokenizer_name": "somebody/not-here"}
    text |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    half = (0.5, 0.5, 0.5)
    return make_tiny_clip(
        folder,
        64,
        vision={"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"},
        text=text,
        preprocess={"mean": half, "std": half, "resize_mode": "squash"},
        custom_text=True,
        init_logit_bias=-10.0,
    )


class TestFrames:
    @pytest.mark.parametrize(
        "size", [(320, 180), (181, 317), (97, 97), (33, 240), (32, 32), (20, 31)]
    )
    @pytest.mark.parametrize(("mode", "crop"), [("shortest", True), ("squash", False)])
    def test_are_prepared_as_open_clip_prepares_them(self, backbone, size, mode, crop):
        width, height = size
        image = scene(3, 1, width, height)[0]
        shown = backbone.network.visual.preprocess_cfg | {"resize_mode": mode}
        theirs = image_transform_v2(PreprocessCfg(**shown), is_train=False)
        ours = backbone.normalised([fitted(image, Square(IMAGE_SIZE, crop))])[0]
        assert (ours - theirs(Image.fromarray(image))).abs().max() < 1e-6

    def test_have_the_embedding_that_open_clip_gives(self, backbone):
        given = frames(3)
        with torch.no_grad():
            theirs = backbone.network.encode_image(backbone.normalised(given), normalize=True)
        ours = backbone.embed_frames(given)
        assert ours.shape == (3, backbone.dimensions)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)

    def test_have_one_forward_each(self, backbone):
        seen = image_batches(backbone)
        backbone.embed_frames(frames(7))
        assert (sum(seen), backbone.frames_seen) == (7, 7)
        backbone.embed_frames(frames(2))
        assert (sum(seen), backbone.frames_seen) == (9, 9)

    def test_do_not_depend_on_their_batch(self, models):
        given = frames(9)
        whole = BackboneConfig().load(models).embed_frames(given)
        parts = BackboneConfig(batch_pixels=4 * IMAGE_SIZE**2).load(models)
        sizes = image_batches(parts)
        np.testing.assert_allclose(parts.embed_frames(given), whole, atol=1e-5)
        assert sizes == [4, 4, 1]
        np.testing.assert_allclose(parts.embed_frames(given[5:6]), whole[5:6], atol=1e-5)

    def test_of_another_size_are_refused(self, backbone):
        with pytest.raises(ValueError, match=r"\(16, 16, 3\)"):
            backbone.embed_frames([np.zeros((16, 16, 3), np.uint8)])

    def test_none_give_none(self, backbone):
        assert backbone.embed_frames([]).shape == (0, backbone.dimensions)

    def test_keep_no_gradients(self, backbone):
        assert not backbone.network.training
        assert not any(p.requires_grad for p in backbone.network.parameters())

    def test_in_bfloat16_are_nearly_the_same(self, models, backbone):
        short = BackboneConfig(dtype="bfloat16", device="cpu").load(models)
        given = frames(3)
        cosines = (short.embed_frames(given) * backbone.embed_frames(given)).sum(axis=1)
        assert cosines.min() > 0.999
        texts = ["a cat", "a street"]
        cosines = (short.embed_texts(texts) * backbone.embed_texts(texts)).sum(axis=1)
        assert cosines.min() > 0.999


class TestMemory:
    def test_that_runs_out_halves_the_batch_for_good(self, backbone):
        given = frames(10)
        whole = backbone.embed_frames(given)
        tried: list[int] = []

        def fits_three(_, arguments):
            tried.append(len(arguments[0]))
            if tried[-1] > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")

        backbone.network.visual.register_forward_pre_hook(fits_three)
        seen = backbone.frames_seen
        np.testing.assert_allclose(backbone.embed_frames(given), whole, atol=1e-5)
        assert backbone.frames_seen - seen == len(given)
        assert max(tried) == 10
        tried.clear()
        np.testing.assert_allclose(backbone.embed_frames(given), whole, atol=1e-5)
        assert max(tried) <= 3

    def test_too_small_for_a_single_frame_is_an_error(self, backbone):
        def never(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        backbone.network.visual.register_forward_pre_hook(never)
        with pytest.raises(torch.OutOfMemoryError):
            backbone.embed_frames(frames(4))
        assert backbone.frames_seen == 0

    def test_batches_with_a_filler_all_have_one_size(self):
        sizes = []

        def encode(numbers):
            sizes.append(len(numbers))
            if len(numbers) > 4:
                raise torch.OutOfMemoryError
            return torch.tensor(numbers, dtype=torch.float32)[:, None]

        tower = Tower(encode, 8, filler=-1)
        assert tower([1, 2, 3]).tolist() == [[1], [2], [3]]
        assert sizes == [8, 4, 4]
        sizes.clear()
        assert tower(range(6))[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
        assert sizes == [4, 4]


class TestTexts:
    def test_have_the_embedding_that_open_clip_gives(self, backbone):
        texts = ["a cat", "a street with cars"]
        with torch.no_grad():
            tokens = open_clip.get_tokenizer("ViT-L-14-quickgelu")(texts)
            theirs = backbone.network.encode_text(tokens, normalize=True)
        np.testing.assert_allclose(backbone.embed_texts(texts), theirs.numpy(), atol=1e-5)

    def test_are_encoded_once(self, backbone):
        encoded: list[int] = []
        backbone.network.transformer.register_forward_hook(
            lambda _, given, out: encoded.append(len(out))
        )
        first = backbone.embed_texts(["a cat", "a dog", "a cat"])
        again = backbone.embed_texts(["a dog", "a cat", "a street"])
        assert sum(encoded) == 3
        np.testing.assert_array_equal(first[0], first[2])
        np.testing.assert_array_equal(again[:2], first[1::-1])

    def test_used_least_recently_are_forgotten(self, backbone, monkeypatch):
        monkeypatch.setattr("winnow.operators.backbone.TEXTS_REMEMBERED", 2)
        encoded: list[int] = []
        backbone.network.transformer.register_forward_hook(
            lambda _, given, out: encoded.append(len(out))
        )
        all_three = backbone.embed_texts(["a", "b", "c"])
        assert all_three.shape == (3, backbone.dimensions)
        backbone.embed_texts(["b"])
        backbone.embed_texts(["d"])
        backbone.embed_texts(["b"])
        assert sum(encoded) == 4
        backbone.embed_texts(["c"])
        assert sum(encoded) == 5

    def test_too_long_are_cut(self, backbone):
        long = " ".join(["street"] * 200)
        texts = backbone.embed_texts([long, f"{long} with a dog"])
        np.testing.assert_array_equal(texts[0], texts[1])

    def test_none_give_none(self, backbone):
        assert backbone.embed_texts([]).shape == (0, backbone.dimensions)


class TestLoading:
    def test_fetches_nothing(self, models, no_network):
        backbone = BackboneConfig().load(models)
        assert backbone.embed_texts(["a cat"]).shape == (1, backbone.dimensions)
        assert backbone.model == "clip-vit-l-14"
        assert backbone.identity == models.get("clip-vit-l-14").identity
        assert backbone.logit_scale == pytest.approx(100, rel=1e-3)

    def test_of_a_siglip_with_its_own_tokenizer(self, tmp_path, no_network):
        WordTokenizer(make_tiny_siglip(tmp_path))
        backbone = load(tmp_path, crop=False)
        assert backbone.embed_frames(frames(2)).shape == (2, 64)
        cat, padded, dog = backbone.embed_texts(["cat", " cat ", "dog"])
        np.testing.assert_allclose(cat, padded, atol=1e-6)
        assert cat @ dog < 0.999

    def test_without_the_tokenizer_that_it_needs(self, tmp_path, no_network):
        make_tiny_siglip(tmp_path)
        with pytest.raises(ModelUnavailable, match="tokenizer"):
            load(tmp_path, crop=False)

    def test_by_the_name_of_an_architecture(self, tmp_path):
        made = make_tiny_clip(tmp_path / "model")
        config = made / "open_clip_config.json"
        described = json.loads(config.read_text("utf-8"))["model_cfg"]
        config.rename(tmp_path / "kept.json")
        known = tmp_path / "winnow-tiny.json"
        known.write_text(json.dumps(described), "utf-8")
        open_clip.add_model_config(known)
        named = load(made, architecture="winnow-tiny")
        (tmp_path / "kept.json").rename(config)
        np.testing.assert_array_equal(
            named.embed_frames(frames(2)), load(made).embed_frames(frames(2))
        )

    def test_of_an_architecture_that_nobody_knows(self, tmp_path):
        (make_tiny_clip(tmp_path) / "open_clip_config.json").unlink()
        with pytest.raises(ConfigError, match="no architecture 'hf-hub:somebody/model'"):
            load(tmp_path, architecture="hf-hub:somebody/model")

    def test_of_timm_without_its_normalisation(self, tmp_path):
        (make_tiny_clip(tmp_path) / "open_clip_config.json").unlink()
        with pytest.raises(ModelUnavailable, match="normalised"):
            load(tmp_path, architecture="ViT-B-16-SigLIP2")

    def test_without_weights(self, tmp_path):
        (make_tiny_clip(tmp_path) / "open_clip_model.safetensors").unlink()
        with pytest.raises(ModelUnavailable, match="'mine'"):
            load(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"the weights of something else")
        with pytest.raises(ModelUnavailable, match=r"no open_clip_model\.safetensors"):
            load(tmp_path)

    def test_of_damaged_weights(self, tmp_path):
        weights = make_tiny_clip(tmp_path) / "open_clip_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        with pytest.raises(ModelUnavailable, match="damaged"):
            load(tmp_path)

    def test_of_weights_of_another_architecture(self, tmp_path):
        make_tiny_clip(tmp_path / "wide", text={"width": 64})
        made = make_tiny_clip(tmp_path / "made")
        (tmp_path / "wide" / "open_clip_model.safetensors").replace(
            made / "open_clip_model.safetensors"
        )
        with pytest.raises(ModelUnavailable, match="another architecture"):
            load(made)

    @pytest.mark.parametrize(
        "config", ["{", "[]", '{"model_cfg": {}}', '{"model_cfg": {"text_cfg": 1}}']
    )
    def test_of_a_broken_description(self, tmp_path, config):
        (make_tiny_clip(tmp_path) / "open_clip_config.json").write_text(config, "utf-8")
        with pytest.raises(ModelUnavailable, match="cannot be used"):
            load(tmp_path)

    @pytest.mark.parametrize(
        "changes",
        [
            {"text": {"hf_model_name": "somebody/text-tower"}},
            {"vision": {"timm_model_name": "hf-hub:somebody/image-tower"}},
        ],
    )
    def test_of_towers_that_would_be_fetched(self, tmp_path, no_network, changes):
        config = make_tiny_clip(tmp_path) / "open_clip_config.json"
        described = json.loads(config.read_text("utf-8"))
        for tower, fields in changes.items():
            described["model_cfg"][f"{tower}_cfg"] |= fields
        config.write_text(json.dumps(described), "utf-8")
        with pytest.raises(ConfigError, match="hub"):
            load(tmp_path)

    def test_with_another_activation_than_the_architecture_has(self, tmp_path):
        make_tiny_clip(tmp_path, quick_gelu=False)
        with pytest.raises(ConfigError, match="QuickGELU"):
            load(tmp_path, architecture="ViT-L-14-quickgelu")

    def test_where_the_registry_says_another_size(self, tmp_path):
        make_tiny_clip(tmp_path)
        with pytest.raises(ConfigError, match="image_size 48"):
            load(tmp_path, image_size=48)

    def test_where_the_registry_says_another_fit(self, tmp_path):
        make_tiny_clip(tmp_path)
        with pytest.raises(ConfigError, match="crop"):
            load(tmp_path, crop=False)

    def test_of_another_interpolation(self, tmp_path):
        make_tiny_clip(tmp_path, preprocess={"interpolation": "bilinear"})
        with pytest.raises(ConfigError, match="bilinear"):
            load(tmp_path)

    def test_of_a_model_that_is_no_backbone(self, models):
        with pytest.raises(ConfigError, match="head"):
            BackboneConfig(model="laion-aesthetic-v2").load(models)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
    def test_on_a_device_that_is_not_there(self, models):
        with pytest.raises(ConfigError, match="cuda"):
            BackboneConfig(device="cuda").load(models)


def test_frames_are_asked_for_as_the_model_wants_them(tmp_path):
    make_tiny_clip(tmp_path)
    sampling = BackboneConfig(model="mine", rate=1, maximum=5).sampling(entry(tmp_path, crop=False))
    assert sampling.fit == Square(IMAGE_SIZE, crop=False)
    assert len(sampling.indices(240, 24)) == 5
