"""Where the batched backward of short sequences serves, and that it is an operator; its numbers are held by the operators'."""

import pytest
import torch

from stgcma_fast.ops import cross_modal, short_attention
from tests.support.inputs import draw


def bias(dtype, **options):
    return draw(1, 5, 2, 7, 7).to(dtype).requires_grad_(options.get("trained", False))


@pytest.mark.parametrize(
    ("tokens", "dtype", "batched"),
    [
        (64, torch.float32, True),
        (65, torch.float32, False),
        (65, torch.bfloat16, True),
        (1025, torch.bfloat16, False),
        (7, torch.float16, False),
        (7, torch.float64, False),
    ],
    ids=str,
)
def test_where_it_serves(tokens, dtype, batched):
    qkv = draw(0, 1, tokens, 3, 2, 4).to(dtype).requires_grad_()
    out = short_attention.attention(qkv, None, 0.5)
    assert ("_AttentionBackward" in out.grad_fn.name()) == batched
    with torch.no_grad():
        assert torch.equal(short_attention.attention(qkv, None, 0.5), out)


@pytest.mark.parametrize("trained", [False, True])
def test_a_trained_bias_gets_its_gradient(trained):
    qkv, b = draw(0, 5, 7, 3, 2, 4).requires_grad_(), bias(torch.float32, trained=trained)
    out = short_attention.attention(qkv, b, 0.5)
    out.backward(draw(2, *out.shape))
    assert (b.grad is not None) == trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators(dtype):
    qkv = draw(0, 5, 7, 3, 2, 4).to(dtype)
    torch.library.opcheck(short_attention._backward, (draw(1, 5, 7, 8).to(dtype), qkv, bias(dtype), 0.5))
    torch.library.opcheck(short_attention._backward, (draw(1, 5, 7, 8).to(dtype), qkv, None, 0.5))
    streams = [draw(seed, 5, n, 8).to(dtype) for seed, n in ((2, 7), (3, 6), (4, 7), (5, 6))]
    torch.library.opcheck(cross_modal._batched_backward, tuple(streams))
    torch.library.opcheck(cross_modal._batched_backward, (None, *streams[1:]))


def test_many_groups_are_taken_a_few_at_a_time(monkeypatch):
    """Bounded scores in memory, and the same numbers."""
    streams = [draw(seed, 9, n, 8) for seed, n in ((0, 7), (1, 6), (2, 7), (3, 6))]
    whole = cross_modal._batched_backward(*streams)
    monkeypatch.setattr(cross_modal, "TILE_BYTES", 2 * 4 * 7 * 6)
    sizes = []
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: sizes.append(len(a)) or product(a, b))
    parts = cross_modal._batched_backward(*streams)
    assert max(sizes) == 2
    for part, wanted in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, wanted)
