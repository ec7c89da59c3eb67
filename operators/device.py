"""Device, number format and batch size, chosen by what is there."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from winnow.operators.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")


def choose_device(wanted: str) -> str:
    """`auto` is CUDA where there is one. Raises ConfigError where the wanted device is missing."""
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {wanted!r}: PyTorch sees no CUDA device here: use auto or cpu")
    return wanted


def choose_dtype(wanted: str, device: str) -> Any:
    """The torch dtype; `auto` is bfloat16 on CUDA and float32 elsewhere."""
    import torch

    if wanted == "auto":
        wanted = "bfloat16" if device.startswith("cuda") else "float32"
    return getattr(torch, wanted)


def batches(items: Sequence[T], weight: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Consecutive items in batches of at most `limit` weight; a heavier item comes alone."""
    batch: list[T] = []
    total = 0
    for item in items:
        more = weight(item)
        if batch and total + more > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += more
    if batch:
        yield batch


def halving(forward: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
    """`forward` over items; where the device runs out of memory, over two halves, and so on.

    Raises torch.OutOfMemoryError where a single item does not fit.
    """
    import torch

    try:
        return list(forward(items))
    except torch.OutOfMemoryError:
        if len(items) <= 1:
            raise
    # Outside the handler, so that the traceback no longer holds the tensors.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(items) // 2
    return [*halving(forward, items[:middle]), *halving(forward, items[middle:])]
