"""Figures on VideoPhy-2's physical commonsense that others have published, to stand beside one's own.

None was measured here, and no two rows share prompt, frame rate and videos for certain: they say
what is usual, not who is better. Accuracy and Pearson are of single digits, as `accuracy` and
`pearson_argmax` are here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    """A row of the report's table; None where it was not published."""

    model: str
    how: str
    accuracy: float | None
    pearson: float | None
    source: str
    kappa: float | None = None
    remark: str = ""


_COOKBOOK = "NVIDIA's recipe in cosmos-cookbook"
_PAPER = "VideoPhy-2 paper, as summarised by others"
_UNSEEN = "on the prompts held out of training"

PUBLISHED: tuple[Published, ...] = (
    Published("Cosmos-Reason1-7B", "as released", None, 0.293, _COOKBOOK),
    Published(
        "Cosmos-Reason1-7B", "after SFT", 0.340, 0.395, _COOKBOOK,
        remark="best steps 100 and 60; another recipe quotes 0.395 as the accuracy",
    ),
    Published("Cosmos-Reason1-7B", "after RL", 0.374, 0.425, _COOKBOOK, remark="step 900"),
    Published(
        "Cosmos-Reason2-8B", "as released, by a user", 0.354, 0.322, "cosmos-cookbook#249",
        remark="all 3,397 videos; 96 % of the answers were 3 or 4",
    ),
    Published(
        "Cosmos-Reason2-8B", "after SFT", 0.401, 0.419, _COOKBOOK, remark="best steps 40 and 80"
    ),
    Published(
        "Cosmos-Eval", "distilled from AutoEval", 0.391, None, "ICLR 2026 submission", kappa=0.330
    ),
    Published("VideoPhy-2 AutoEval", "7B, fine-tuned", None, 0.37, _PAPER, remark=_UNSEEN),
    Published("VideoCon-Physics", "VideoPhy-1", None, 0.25, _PAPER, remark=_UNSEEN),
    Published("Gemini-2.0-Flash-Exp", "prompted", None, 0.11, _PAPER, remark=_UNSEEN),
    Published("Gemini-2.5-Flash-Exp", "prompted", None, 0.10, _PAPER, remark=_UNSEEN),
    Published("VideoScore", "regression head", None, 0.10, _PAPER, remark=_UNSEEN),
    Published("Video-LLaVA", "prompted", None, 0.02, _PAPER, remark=_UNSEEN),
    Published(
        "Qwen3-VL-8B-Instruct", "prompted, 16 frames", None, None, "PAVG critic",
        remark="good (4 or 5) or not: 0.552 of all 3,397 right, macro F1 0.549",
    ),
)  # fmt: skip

REMARK = (
    "Of the truths of the VideoPhy-2 test set 52.5 % are 4 or 5, and about a third are 4: an accuracy "
    "near 0.33 is what always answering 4 gives."
)
