"""A CLIP model and an aesthetic head so small that they are made on the spot.

They are saved as open_clip and LAION save theirs, and loaded by the code that loads those.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
import yaml
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file

IMAGE_SIZE = 32
DIMENSIONS = 768
HEAD_LAYERS = {0: (DIMENSIONS, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
"""As in LAION's network: index in its sequence to (inputs, outputs); dropout lies between."""


def make_tiny_clip(
    folder: Path,
    dimensions: int = DIMENSIONS,
    image_size: int = IMAGE_SIZE,
    *,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    preprocess: dict[str, Any] | None = None,
    **architecture: Any,
) -> Path:
    """Save a two-layer CLIP of random weights, always the same, into a folder of its own.

    `vision`, `text`, `preprocess` and further keys change open_clip's description of the model.
    """
    images = {"image_size": image_size, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
    texts = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    description = {
        "embed_dim": dimensions,
        "quick_gelu": True,
        "vision_cfg": images | (vision or {}),
        "text_cfg": texts | (text or {}),
        **architecture,
    }
    normalisation = {
        "mean": OPENAI_DATASET_MEAN,
        "std": OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    } | (preprocess or {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": description, "preprocess_cfg": normalisation}), "utf-8"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = open_clip.CustomTextCLIP if description.pop("custom_text", False) else open_clip.CLIP
        model = kind(**description)
    # CLIP's trained scale; as initialised it would leave all texts nearly equally probable.
    model.logit_scale.data.fill_(4.6052)
    # Without an embedding of its own the class token says nothing but what it sees: different
    # pictures then lie well apart, although nothing was trained.
    if hasattr(model.visual, "class_embedding"):
        model.visual.class_embedding.data.zero_()
        model.visual.positional_embedding.data[0].zero_()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def make_tiny_head(folder: Path) -> Path:
    """Save an aesthetic head of LAION's shape, with random weights that are always the same."""
    layers = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for index, (inputs, outputs) in HEAD_LAYERS.items():
            layer = torch.nn.Linear(inputs, outputs)
            layers[f"layers.{index}.weight"] = layer.weight.data * 3
            layers[f"layers.{index}.bias"] = layer.bias.data
    layers["layers.7.bias"] += 5
    folder.mkdir(parents=True, exist_ok=True)
    save_file(layers, folder / "model.safetensors")
    return folder


def tiny_models_file(folder: Path) -> Path:
    """Make both in `folder`, and a registry that puts them in the place of the default models."""
    entries = {
        "clip-vit-l-14": {
            "role": "backbone",
            "loader": "open_clip",
            "licence": "none",
            "path": str(make_tiny_clip(folder / "clip")),
            "image_size": IMAGE_SIZE,
        },
        "laion-aesthetic-v2": {
            "role": "head",
            "loader": "torch",
            "licence": "none",
            "path": str(make_tiny_head(folder / "head")),
            "files": {"model.safetensors": None},
        },
    }
    registry = folder / "models.yaml"
    registry.write_text(yaml.safe_dump(entries), "utf-8")
    return registry
