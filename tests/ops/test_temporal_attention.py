"""Attention over time."""

from functools import partial

import pytest
import torch

from stgcma_fast import ops, reference
from tests.support.inputs import draw, each_dtype, each_low_dtype, each_stride
from tests.support.numerics import check, check_compiled, check_equal_in_float64, evaluate

# Clips, frames, token positions, heads, channels of a head.
SIZES = {
    "swin": (1, 10, 49, 3, 32),
    "clip": (2, 10, 17, 2, 96),
    "five-frames": (2, 5, 12, 2, 64),
    "one-frame": (2, 1, 7, 2, 16),
    "one-site": (1, 3, 1, 1, 5),
}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])


def problem(batch, frames, sites, heads, head_dim, *, dtype=torch.float32, strides="packed", scale=1.0, bias=True):
    tensors = {"qkv": draw(0, batch, frames, sites, 3, heads, head_dim, dtype=dtype, scale=scale, strides=strides)}
    return tensors | ({"bias": draw(1, heads, frames, frames, dtype=dtype)} if bias else {})


def function(of, **options):
    return lambda qkv, bias=None: of.temporal_attention(qkv, bias, scale=qkv.shape[-1] ** -0.5, **options)


def hold(tensors, *, fast=None, **options):
    batch, frames, sites, _, _, head_dim = tensors["qkv"].shape
    return check(
        "temporal_attention",
        fast or function(ops),
        function(reference),
        tensors,
        reductions=[head_dim, frames, batch * sites],
        **options,
    )


@each_bias
@each_dtype
@each_size
def test_sizes(size, dtype, bias):
    hold(problem(*size, dtype=dtype, bias=bias))


@each_dtype
@each_stride
def test_strided_inputs(strides, dtype):
    hold(problem(2, 5, 6, 2, 16, dtype=dtype, strides=strides))


@each_dtype
@each_stride
def test_strided_upstream_gradients(strides, dtype):
    hold(problem(2, 5, 6, 2, 16, dtype=dtype), upstream=strides)


@each_dtype
def test_large_scores(dtype):
    hold(problem(2, 10, 6, 2, 16, dtype=dtype, scale=30**0.5))


@each_bias
@each_size
def test_equals_the_reference_in_float64(size, bias):
    check_equal_in_float64(function(ops, impl="torch"), function(ops, impl="reference"), problem(*size, bias=bias))


@each_bias
def test_is_attention_over_time(bias):
    """One query at a time, as the equation says it."""
    tensors = problem(2, 4, 3, 2, 5, dtype=torch.float64, bias=bias)
    qkv = tensors["qkv"]
    batch, frames, sites, _, heads, head_dim = qkv.shape
    expected = torch.empty(batch, frames, sites, heads, head_dim, dtype=torch.float64)
    for b, t, s, h in torch.cartesian_prod(*map(torch.arange, (batch, frames, sites, heads))).tolist():
        scores = torch.stack([qkv[b, t, s, 0, h].dot(qkv[b, k, s, 1, h]) for k in range(frames)]) / head_dim**0.5
        scores = scores + (tensors["bias"][h, t] if bias else 0)
        weights = scores.exp() / scores.exp().sum()
        expected[b, t, s, h] = sum(w * qkv[b, k, s, 2, h] for k, w in enumerate(weights))
    torch.testing.assert_close(function(ops)(**tensors), expected.flatten(-2), rtol=1e-12, atol=1e-12)


def test_is_multi_head_attention():
    """PyTorch's own module at each site, with identities for its projections."""
    qkv = problem(1, 6, 4, 2, 8, dtype=torch.float64, bias=False)["qkv"]
    module = torch.nn.MultiheadAttention(16, 2, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(16).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(16))
    sites = qkv[0].flatten(-2).permute(2, 1, 0, 3)  # [3, S, T, h * d]
    expected = module(*sites, need_weights=False)[0].transpose(0, 1)[None]
    torch.testing.assert_close(function(ops)(qkv), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["qkv", "bias"])
def test_frozen_inputs_change_nothing_else(frozen):
    got = hold(problem(2, 5, 6, 2, 16), frozen={frozen})
    assert f"grad_{frozen}" not in got


def test_repeated_runs_are_bit_equal(all_threads):
    tensors = problem(2, 10, 49, 3, 32)
    first = evaluate(function(ops), tensors)
    for _ in range(5):
        assert all(torch.equal(x, first[name]) for name, x in evaluate(function(ops), tensors).items())


@each_bias
@each_low_dtype
def test_autocast(dtype, bias):
    hold(problem(2, 5, 6, 2, 16, bias=bias), autocast=dtype)


@each_bias
def test_gradcheck_of_the_reference(bias):
    inputs = [x.requires_grad_() for x in problem(1, 3, 2, 2, 3, dtype=torch.float64, bias=bias).values()]
    assert torch.autograd.gradcheck(function(reference), inputs)


@each_bias
def test_compiled(bias):
    check_compiled(function(ops), hold, lambda batch: problem(batch, 5, 6, 2, 16, bias=bias), batched=["qkv"])


ERRORS = {
    "qkv": ({"qkv": draw(0, 2, 5, 6, 2, 2, 16)}, r"qkv: expected shape \[B, T, S, 3, h, d\], got \[2, 5, 6, 2, 2, 16\]"),
    "dimensions": ({"qkv": draw(0, 2, 5, 6, 96)}, r"qkv: expected shape \[B, T, S, 3, h, d\], got \[2, 5, 6, 96\]"),
    "heads": ({"bias": draw(0, 3, 5, 5)}, r"bias: expected shape \[2, 5, 5\], got \[3, 5, 5\]"),
    "frames": ({"bias": draw(0, 2, 6, 6)}, r"bias: expected shape \[2, 5, 5\], got \[2, 6, 6\]"),
    "dtype": ({"bias": draw(0, 2, 5, 5).half()}, "expected one floating dtype.*qkv torch.float32, bias torch.float16"),
}


@pytest.mark.parametrize(("changed", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        partial(ops.temporal_attention, scale=0.25)(**problem(2, 5, 6, 2, 16) | changed)
