"""Cutting the token grid of a frame into square windows, cyclically shifted or not, and putting it together again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class WindowGrid(NamedTuple):
    """A frame of ``height x width`` tokens in windows of ``size x size``, rolled by ``-shift`` before cutting."""

    height: int
    width: int
    size: int
    shift: int = 0


def window_partition(x: Tensor, size: int, shift: int) -> Tensor:
    """``[F, H, W, ...]`` to ``[F, H/size * W/size, size*size, ...]``."""
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    frames, height, width, *rest = x.shape
    x = x.view(frames, height // size, size, width // size, size, *rest)
    return x.transpose(2, 3).reshape(frames, -1, size * size, *rest)


def window_reverse(x: Tensor, height: int, width: int, size: int, shift: int) -> Tensor:
    """The inverse of `window_partition`: ``[F, windows, size*size, ...]`` to ``[F, H, W, ...]``."""
    frames, _, _, *rest = x.shape
    x = x.view(frames, height // size, width // size, size, size, *rest)
    x = x.transpose(2, 3).reshape(frames, height, width, *rest)
    return x.roll((shift, shift), (1, 2)) if shift else x


def shift_mask(height: int, width: int, size: int, shift: int) -> Tensor:
    """``[windows, size**2, size**2]`` float32: -100 between tokens that the cyclic roll alone made neighbours, else 0."""

    def regions(length: int) -> Tensor:
        # After the roll: whole windows, the rest of the last window, and what came round from the other border.
        position = torch.arange(length)
        return (position >= length - size).long() + (position >= length - shift).long()

    region = 3 * regions(height)[:, None] + regions(width)[None, :]
    windows = window_partition(region[None], size, 0)[0]
    return (windows[:, :, None] != windows[:, None, :]) * -100.0
