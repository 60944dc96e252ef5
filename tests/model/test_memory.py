"""What a train step of the largest model keeps and copies, counted on tensors without data."""

from collections import Counter

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stgcma_fast import FastSTGCMA

# Rows of a stream, channels and blocks of swin_l's stages at 10 frames; rank of its adapters.
STAGES = [(31360, 192, 2), (7840, 384, 2), (1960, 768, 18), (490, 1536, 2)]
RANK = 96
# What may write tensors as large as a stream: products, the kernels, patches, the last norm and the mean over tokens behind it.
ALLOWED = {"addmm", "mm", "_linear_pointwise", "convolution", "native_layer_norm", "div"}


class _LargeOutputs(TorchDispatchMode):
    """Names of the operators that write a new tensor of at least the smallest stream."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes = Counter(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                self.shapes.add(tuple(x.shape))
                if x.numel() >= 490 * 1536:
                    self.names[func.name()] += 1
        return out


@pytest.fixture(scope="module")
def step():
    """A bfloat16 train step of swin_l base for one clip: what it saves, and what it writes."""
    saved = []
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = FastSTGCMA("swin_l", adapters="base", impl="triton").train()
            audio, video = torch.empty(1, 10, 224, 224), torch.empty(1, 3, 10, 224, 224)
        finally:
            torch.set_default_dtype(torch.float32)
        with _LargeOutputs() as large:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
                logits = model(audio, video)
            logits.backward(torch.empty_like(logits))
        own = {x.untyped_storage()._cdata for x in [*model.parameters(), *model.buffers()]}
        sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in saved}
    return sum(size for storage, size in sizes.items() if storage not in own), large


def test_no_scores_are_written(step):
    """Neither n x m of whole frames nor those of windows; the relative position tables are smaller."""
    _, large = step
    scores = {(n, n) for n in (3136, 784, 196)}
    assert not [shape for shape in large.shapes if shape[-2:] in scores or (shape[-2:] == (49, 49) and len(shape) > 3)]


def test_only_products_and_kernels_write_token_tensors(step):
    """No copy for a layout, no sum of a residual or of two gradients, no mask of stochastic depth."""
    _, large = step
    others = {name for name in large.names if not name.startswith("stgcma_fast::")}
    assert {name.split("::")[1].split(".")[0] for name in others} <= ALLOWED
    assert large.names["stgcma_fast::av_adapter_bwd"] == 48


def test_kept_bytes_are_those_of_the_cards(step):
    """In channels of a row: two norms' inputs, qkv, two medial tokens and four of the FFN in each block; in every other block
    the temporal step's norm input, qkv and attention output. And hidden tokens, what they heard, and float32 statistics.
    """
    kept, _ = step
    block_bytes = sum(
        2 * blocks * rows * (2 * (2 + 3 + 2 + 4 + (1 + 3 + 1) / 2) * channels + 2 * (2 * 2 * RANK) + 4 * (2 + 2.5 * 2))
        for rows, channels, blocks in STAGES
    )
    assert block_bytes * 0.97 < kept < block_bytes * 1.03
