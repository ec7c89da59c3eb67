"""Models of the real shapes with random weights, saved as the real ones are.

A random model costs as much time as a trained one and says nothing: good for measuring speed where
no weights can be fetched. Each function saves one model into a folder and returns its fields for a
file that is laid over configs/models.yaml. `tiny` is the same with two narrow layers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tiny_vlm import CHAT_TEMPLATE, SPECIAL, WORDS

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = "tiny"
VOCABULARY = 151936
"""Rows of the real embedding tables; the tokenizer here knows far fewer words."""
TOKENIZER_WORDS = 4096
"""Of the tokenizer: with them the VLM filter's prompt has some 1.5 tokens a word, names included."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen3-VL."""

    text: dict[str, Any]
    vision: dict[str, Any]
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    head_dim: int = 128
    tied: bool = False
    """Input and output embeddings are one table."""


# The config.json of Qwen/Qwen3-VL-2B-Instruct and -8B-Instruct. With them a model has 2,127,532,032
# and 8,767,123,696 parameters: in bfloat16 what configs/models.yaml says there is to download.
SHAPES = {
    TINY: Shape(
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2},
        {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
         "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1]},
        mrope_section=(4, 2, 2), head_dim=16, tied=True,
    ),
    "qwen3-vl-2b": Shape(
        {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
         "num_attention_heads": 16, "num_key_value_heads": 8},
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
         "out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17]},
        tied=True,
    ),
    "qwen3-vl-8b": Shape(
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
         "num_attention_heads": 32, "num_key_value_heads": 8},
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
         "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
    ),
}  # fmt: skip


def save_backbone(folder: Path, architecture: str, *, tiny: bool) -> dict[str, Any]:
    """A CLIP of one of open_clip's own architectures."""
    if tiny:
        from tests.tiny_clip import IMAGE_SIZE, make_tiny_clip

        return {"path": str(make_tiny_clip(folder)), "image_size": IMAGE_SIZE}
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model(architecture, pretrained=None)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return {"path": str(folder)}


def save_aesthetic_head(folder: Path) -> dict[str, Any]:
    """LAION's network on ViT-L/14: the one size for all, since it is small."""
    from tests.tiny_clip import make_tiny_head

    return {"path": str(make_tiny_head(folder)), "files": {"model.safetensors": None}}


def save_vlm(folder: Path, shape: str, device: str) -> dict[str, Any]:
    """A Qwen3-VL in bfloat16, its weights drawn on the device; 4 GB for 2B and 18 GB for 8B."""
    import torch
    import transformers

    library: Any = transformers
    tokenizer = train_tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    sizes = SHAPES[shape]
    config = library.Qwen3VLConfig(
        text_config={
            **sizes.text,
            "head_dim": sizes.head_dim,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": list(sizes.mrope_section),
                "mrope_interleaved": True,
            },
            "bos_token_id": None,
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
            "tie_word_embeddings": sizes.tied,
        },
        vision_config={**sizes.vision, "num_position_embeddings": 2304},
        tie_word_embeddings=sizes.tied,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = library.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.generation_config = library.GenerationConfig(
        eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>")
    )
    library.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    library.Qwen3VLProcessor(
        image_processor=library.Qwen2VLImageProcessor(patch_size=16),
        tokenizer=tokenizer,
        video_processor=library.Qwen3VLVideoProcessor(
            size={"shortest_edge": 4096, "longest_edge": 25165824}
        ),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return {"path": str(folder), "files": {}}


def train_tokenizer() -> Any:
    """Byte-level BPE with the pre-tokenizer of the Qwen models, trained on the prompts themselves.

    A prompt then has about as many tokens as with the real tokenizer, which cannot be had here.
    """
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=TOKENIZER_WORDS, show_progress=False, initial_alphabet=ByteLevel.alphabet()
    )
    prompts = [path.read_text("utf-8") for path in sorted((CONFIGS / "prompts").rglob("*.yaml"))]
    # The answers that are weighed by one token each must be one.
    backend.train_from_iterator([*prompts, *WORDS * 100], trainer)
    model = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer
