"""Vision-language models of two layers, made on the spot and saved as the real ones are.

Weights are random (but the same every time), so answers mean nothing; they do depend on frames,
timestamps and text. The digits and WORDS are one token each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

QWEN3_VL = ("qwen3-vl-2b", "qwen3-vl-8b", "cosmos-reason2-2b", "cosmos-reason2-8b")
QWEN2_5_VL = ("qwen2.5-vl-7b", "cosmos-reason1-7b")
CONTEXT = 8192
"""Most tokens that the tiny models take."""

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

WORDS = ("Yes", "No", "yes", "no", "true", "false", "A", "B", "C", "D", "E")

CORPUS = """Is this video physically plausible? Answer Yes or No.
system user assistant You are a helpful assistant. <0.5 seconds> <12.0 seconds> seconds seconds
Describe the video. The robot arm picks up the cup and puts it on the table. Rate the video.
{"answer": "yes", "reason": "the hand has six fingers", "score": 3, "objects": []}
score between and violations of physical laws gravity inertia objects appear vanish frames
"""

CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


def vlm_models_file(folder: Path) -> Path:
    """A models file in `folder` whose VLMs are tiny models beside it, made where there are none."""
    entries: dict[str, Any] = {}
    for names, make in ((QWEN3_VL, make_tiny_qwen3_vl), (QWEN2_5_VL, make_tiny_qwen2_5_vl)):
        model = folder / make.__name__.removeprefix("make_")
        if not model.is_dir():
            make(model)
        for name in names:
            entries[name] = {
                "role": "vlm", "loader": "transformers", "licence": "Apache-2.0",
                "path": str(model),
            }  # fmt: skip
    path = folder / "models.yaml"
    path.write_text(yaml.safe_dump(entries), "utf-8")
    return path


def make_tiny_qwen3_vl(folder: Path) -> Path:
    """Qwen3-VL: 16-pixel patches merged two by two, a timestamp before every pair of frames."""
    from transformers import (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = train_tokenizer()
    config = Qwen3VLConfig(
        text_config={
            **text_config(tokenizer),
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
            "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.15,
        },
        **token_ids(tokenizer),
    )  # fmt: skip
    video = Qwen3VLVideoProcessor(size={"shortest_edge": 4096, "longest_edge": 25165824})
    return save(folder, Qwen3VLForConditionalGeneration, config, Qwen3VLProcessor, tokenizer, video)


def make_tiny_qwen2_5_vl(folder: Path) -> Path:
    """Qwen2.5-VL: 14-pixel patches merged two by two, time in the positions."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = train_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            **text_config(tokenizer),
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2],
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
            "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 112,
            "tokens_per_second": 2, "initializer_range": 0.15,
        },
        **token_ids(tokenizer),
    )  # fmt: skip
    video = Qwen2VLVideoProcessor(size={"shortest_edge": 3136, "longest_edge": 12845056})
    return save(
        folder, Qwen2_5_VLForConditionalGeneration, config, Qwen2_5_VLProcessor, tokenizer, video
    )


def train_tokenizer() -> Any:
    """Byte-level BPE, with the pre-tokenizer of the Qwen models: digits stay single."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=512,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=ByteLevel.alphabet(),
    )
    backend.train_from_iterator([*CORPUS.splitlines(), *WORDS] * 2, trainer)
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


def text_config(tokenizer: Any) -> dict[str, Any]:
    return {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        # Large enough that answers depend on what is asked.
        "initializer_range": 0.15,
    }


def token_ids(tokenizer: Any) -> dict[str, Any]:
    ids = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }


def save(
    folder: Path, architecture: Any, config: Any, processor: Any, tokenizer: Any, video: Any
) -> Path:
    import torch
    from transformers import GenerationConfig, Qwen2VLImageProcessor

    with torch.random.fork_rng():
        torch.manual_seed(20261120)
        model = architecture(config)
    # As the real checkpoints do, this one asks for sampling and penalties by default.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        repetition_penalty=1.5,
        eos_token_id=tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    model.save_pretrained(folder)
    image = Qwen2VLImageProcessor(patch_size=video.patch_size)
    processor(
        image_processor=image,
        tokenizer=tokenizer,
        video_processor=video,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder
