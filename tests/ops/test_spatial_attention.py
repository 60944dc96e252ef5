"""Full self-attention of a frame."""

import pytest
import torch
import torch.nn.functional as F

from stgcma_fast import ops, reference
from tests.support.inputs import draw, each_dtype, each_low_dtype, each_stride
from tests.support.numerics import check, check_compiled, check_equal_in_float64, evaluate

# Frames, tokens, heads, channels of a head.
SIZES = {
    "clip_b16": (2, 197, 2, 96),
    "clip_l14": (1, 257, 2, 64),
    "audio": (3, 49, 4, 32),
    "odd": (2, 37, 1, 5),
    "one-token": (2, 1, 2, 16),
}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


def problem(frames, tokens, heads, head_dim, *, dtype=torch.float32, strides="packed", scale=1.0):
    return {"qkv": draw(0, frames, tokens, 3, heads, head_dim, dtype=dtype, scale=scale, strides=strides)}


def function(of, **options):
    return lambda qkv: of.spatial_attention(qkv, scale=qkv.shape[-1] ** -0.5, **options)


def written_out(qkv):
    """The equation, with whole score matrices: a reference apart from the library's fused attention."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    weights = ((query * qkv.shape[-1] ** -0.5) @ key.mT).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(-2)


def hold(tensors, *, fast=None, law=written_out, **options):
    _, tokens, _, _, head_dim = tensors["qkv"].shape
    return check("spatial_attention", fast or function(ops), law, tensors, reductions=[head_dim, tokens, tokens], **options)


@each_dtype
@each_size
def test_sizes(size, dtype):
    hold(problem(*size, dtype=dtype))


@each_dtype
@each_stride
def test_strided_inputs(strides, dtype):
    hold(problem(3, 20, 2, 16, dtype=dtype, strides=strides))


@each_dtype
@each_stride
def test_strided_upstream_gradients(strides, dtype):
    hold(problem(3, 20, 2, 16, dtype=dtype), upstream=strides)


@each_dtype
def test_large_scores(dtype):
    tensors = problem(2, 49, 2, 32, dtype=dtype, scale=30**0.5)
    query, key, _ = tensors["qkv"].double().permute(2, 0, 3, 1, 4)
    scores = (query @ key.mT).abs().max().item() * 32**-0.5
    assert scores > 100
    hold(tensors, scores=scores)


@each_size
def test_reference_is_the_equation_in_float64(size):
    check_equal_in_float64(function(ops, impl="reference"), written_out, problem(*size))
    check_equal_in_float64(function(ops, impl="torch"), function(ops, impl="reference"), problem(*size))


def test_is_multi_head_attention():
    """PyTorch's own function, with identities for its projections."""
    qkv = problem(3, 11, 2, 8, dtype=torch.float64)["qkv"]
    query, key, value = qkv.flatten(-2).permute(2, 1, 0, 3)  # [S, F, h * d] each
    eye = torch.eye(16, dtype=torch.float64)
    zeros = torch.zeros(48, dtype=torch.float64)
    expected, _ = F.multi_head_attention_forward(
        query, key, value, 16, 2, eye.repeat(3, 1), zeros, None, None, False, 0.0, eye, zeros[:16], need_weights=False
    )
    torch.testing.assert_close(function(ops)(qkv), expected.transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_repeated_runs_are_bit_equal(all_threads):
    tensors = problem(2, 197, 4, 32)
    first = evaluate(function(ops), tensors)
    for _ in range(5):
        assert all(torch.equal(x, first[name]) for name, x in evaluate(function(ops), tensors).items())


@each_low_dtype
def test_autocast(dtype):
    hold(problem(3, 20, 2, 16), law=function(reference), autocast=dtype)


def test_gradcheck_of_the_reference():
    assert torch.autograd.gradcheck(function(reference), [problem(1, 4, 2, 3, dtype=torch.float64)["qkv"].requires_grad_()])


def test_compiled():
    check_compiled(function(ops), hold, lambda batch: problem(batch, 20, 2, 16), batched=["qkv"])


@pytest.mark.parametrize("shape", [(2, 20, 96), (2, 20, 2, 2, 16), (1, 2, 20, 3, 2, 16)], ids=["flat", "two-of-three", "clips"])
def test_errors(shape):
    with pytest.raises(ValueError, match=rf"qkv: expected shape \[F, S, 3, h, d\], got \[{', '.join(map(str, shape))}\]"):
        ops.spatial_attention(draw(0, *shape), scale=0.25)
