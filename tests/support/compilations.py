"""Prints the operators whose kernels Triton would compile again from one batch size to the next.

Run as a program, without Triton's interpreter, by tests/ops/test_recompilation.py; nothing is compiled or launched.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from stgcma_fast import ops
from stgcma_fast.kernels import launch
from stgcma_fast.ops.adapter import adapters
from stgcma_fast.ops.layer_norm import branched_layer_norm
from stgcma_fast.ops.temporal_attention import temporal_attentions

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import resources

FUSED = {"impl": "triton"}


def make(*shape: int, frozen: bool = False) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, requires_grad=not frozen)


def params() -> ops.AdapterParams:
    return ops.AdapterParams(make(24, 96), make(24), make(96, 24), make(96))


def streams(frames: int, channels: int) -> list[Tensor]:
    """Odd numbers of tokens: where the second stream begins, and what its address is divisible by, depends on the batch."""
    return [make(frames, 197, channels), make(frames, 103, channels)]


CALLS = {
    "layer_norm": lambda b: tree_leaves(
        branched_layer_norm(streams(10 * b, 96), make(96, frozen=True), make(96, frozen=True), **FUSED)
    ),
    "adapter": lambda b: adapters(
        streams(10 * b, 96), [params(), params()], streams(10 * b, 96), [make(10 * b, 1, 1, frozen=True)] * 2, **FUSED
    ),
    "cross_modal_attention": lambda b: ops.cross_modal_attention(*streams(10 * b, 24), make(1), make(1), **FUSED),
    "av_adapter": lambda b: ops.av_adapter(*streams(10 * b, 96), params(), params(), make(1), make(1), **FUSED),
    "av_adapter in windows": lambda b: ops.av_adapter(
        *(make(10 * b, 49, 96) for _ in range(2)), params(), params(), make(1), make(1), window=ops.WindowGrid(7, 7, 7), **FUSED
    ),
    "temporal_attention": lambda b: temporal_attentions(
        [make(b, 10, 197, 3, 2, 32), make(b, 10, 103, 3, 2, 32)], [make(2, 10, 10), make(2, 10, 10)], scale=0.1, **FUSED
    ),
    "window_attention": lambda b: ops.window_attention(
        make(10 * b, 7, 7, 3, 2, 32), make(2, 49, 49, frozen=True), window=7, shift=0, scale=0.1, **FUSED
    ),
    "gelu": lambda b: ops.gelu(make(10 * b, 197, 96), quick=True, **FUSED),
}


def compilations(call, batch: int) -> set[resources.Job]:
    """What a forward and a backward would compile on Hopper."""
    with launch.record((9, 0)) as recorded, resources.kernels_on_cpu():
        outs = call(batch)
        outs = [outs] if isinstance(outs, Tensor) else list(outs)
        torch.autograd.backward(outs, [torch.empty_like(y) for y in outs])
    assert recorded
    return {resources.job(one, "sm_90") for one in recorded}


if __name__ == "__main__":
    for name, call in CALLS.items():
        if not compilations(call, 1) == compilations(call, 2) == compilations(call, 3):
            print(name)
