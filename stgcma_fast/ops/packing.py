"""Rows of several streams one behind the other in one tensor, taken apart and put together without copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        return rows.split(sizes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return join(grads), None


def split(rows: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Views of ``sizes`` rows each. Gradients that lie one behind the other in memory, as the kernels leave them, come back as
    they are; PyTorch's own split would copy them together.
    """
    return _Split.apply(rows, tuple(sizes)) if len(sizes) > 1 else (rows,)


def join(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts in one tensor: a view where they lie one behind the other already, else a copy."""
    first = parts[0]
    if not torch.compiler.is_compiling():
        ends = [part.storage_offset() + part.numel() for part in parts]
        starts = [part.storage_offset() for part in parts[1:]]
        storages = {part.untyped_storage()._cdata for part in parts}
        if len(storages) == 1 and starts == ends[:-1] and all(part.is_contiguous() for part in parts):
            return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    return torch.cat(list(parts))
